//! Which owner a request goes to: our own, or another host's.

use std::sync::Arc;

use crate::cluster::Cluster;
use crate::detect::{JournalPosition, Verdict};
use crate::error::{Error, Result};
use crate::ids::{Address, Fingerprint, HostId, Sequence, SessionId};
use crate::owner::{Figures, Owner};
use crate::part::{Asker, Wake};
use crate::session::answers::Answers;
use crate::session::event::Event;
use crate::session::registry::Registry;

/// The owners of all fingerprints. A cheap handle.
#[derive(Clone)]
pub struct Owners {
    here: Owner,
    cluster: Option<Arc<Cluster>>,
}

/// A session of this host, as its owner knows it.
struct LocalAsker {
    host: HostId,
    answers: Arc<Answers>,
    wake: Wake,
}

impl Asker for LocalAsker {
    fn answer(&self, sequence: Sequence, verdict: &Verdict) -> Result<()> {
        self.answers.put(self.host, sequence, verdict)
    }

    fn fail(&self, error: &Error) {
        self.answers.fail(error);
        (self.wake)();
    }

    fn answered(&self) {
        (self.wake)();
    }

    fn advanced(&self, _: u64) {
        (self.wake)();
    }
}

impl Owners {
    /// One host that owns everything.
    #[must_use]
    pub fn alone(here: Owner) -> Self {
        Owners { here, cluster: None }
    }

    /// A host among others.
    #[must_use]
    pub fn among(here: Owner, cluster: Arc<Cluster>) -> Self {
        Owners { here, cluster: Some(cluster) }
    }

    /// The owner of this host's part.
    #[must_use]
    pub fn here(&self) -> &Owner {
        &self.here
    }

    /// The other hosts, if there are any.
    #[must_use]
    pub fn cluster(&self) -> Option<&Arc<Cluster>> {
        self.cluster.as_ref()
    }

    /// Whether this host answers for a fingerprint.
    #[must_use]
    pub fn owns(&self, fingerprint: &Fingerprint) -> bool {
        self.cluster.as_ref().is_none_or(|cluster| cluster.owns(fingerprint))
    }

    /// The same by the map of now, whatever becomes of it.
    pub fn ownership(&self) -> impl Fn(&Fingerprint) -> bool + use<> {
        let place = self.cluster.as_ref().map(|cluster| (cluster.map(), cluster.us()));
        move |fingerprint| place.as_ref().is_none_or(|(map, us)| map.owner(fingerprint) == *us)
    }

    /// The figures of this host's part.
    #[must_use]
    pub fn figures(&self) -> &Figures {
        self.here.figures()
    }

    /// A session begins: its answers go to `answers`.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn register(&self, session: SessionId, answers: &Arc<Answers>, wake: &Wake) -> Result<()> {
        let host = session.host();
        let (kept, told) = (Arc::clone(answers), Arc::clone(wake));
        self.here.register(session, Arc::new(LocalAsker { host, answers: kept, wake: told }))?;
        if let Some(cluster) = &self.cluster {
            cluster.register(session, answers, wake);
        }
        Ok(())
    }

    /// Asks about blocks.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn ask(&self, session: SessionId, requests: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        match &self.cluster {
            Some(cluster) => cluster.ask(session, requests),
            None => self.here.ask(session, requests),
        }
    }

    /// Gives grants back: who asks for these blocks next may write them.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn release(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        match &self.cluster {
            Some(cluster) => cluster.release(session, grants),
            None => self.here.release(session, grants),
        }
    }

    /// Whether the session waits for nothing but answers: passes need not wait for more requests.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn waiting(&self, session: SessionId, waiting: bool) -> Result<()> {
        if let Some(cluster) = &self.cluster {
            cluster.waiting(session, waiting);
        }
        self.here.waiting(session, waiting)
    }

    /// A container is sealed and in the journal. All hosts hear of it, so that none sees a gap.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn learn(
        &self,
        entries: Vec<(Fingerprint, Address)>,
        position: JournalPosition,
    ) -> Result<()> {
        match &self.cluster {
            Some(cluster) => cluster.learn(entries, position),
            None => self.here.learn(entries, position),
        }
    }

    /// A session's end, whatever the end.
    pub fn withdraw(&self, session: SessionId) {
        if let Some(cluster) = &self.cluster {
            cluster.withdraw(session);
        }
        self.here.withdraw(session);
    }

    /// Tells a session something, here or elsewhere; false if it cannot hear it.
    pub fn tell(&self, registry: &Registry, to: SessionId, event: Event) -> bool {
        let elsewhere = self.cluster.as_ref().filter(|cluster| cluster.us() != to.host());
        match (elsewhere, event) {
            (Some(cluster), Event::GiveUp { to: waiter, claims }) => {
                cluster.give_up(waiter, to, claims)
            }
            (Some(cluster), Event::GaveUp { from }) => cluster.gave_up(from, to),
            (_, event) => {
                registry.events_of(to).is_some_and(|events| events.try_send(event).is_ok())
            }
        }
    }
}
