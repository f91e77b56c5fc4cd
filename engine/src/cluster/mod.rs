//! Several engines as one: every host owns a part of the fingerprints ([`map`]) and answers for it.
//!
//! Hosts talk by frames of messages ([`frame`]) that wait in an outbox for each host ([`outbox`])
//! until it has taken them, in order and once, however often the link breaks. Nothing here does I/O
//! on a network and nothing waits for another host: [`crate::rpc`] carries the frames.
//!
//! A process that ends takes what it was asked with it; a host that is silent for [`SILENCE`] is given
//! up. Then the sessions of that time are *cut* from it: what they asked it they write themselves, and
//! count as undetected. Detection is a hint, so that costs space and never bytes.

pub mod frame;
pub mod map;
pub mod outbox;
mod peer;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::frame::{FrameReader, Message};
use self::map::PartitionMap;
use self::outbox::{FrameNumber, Share};
use self::peer::{Peer, RemoteAsker};
use crate::detect::{JournalPosition, Verdict};
use crate::error::Result;
use crate::ids::{Address, Fingerprint, HostId, Sequence, SessionId};
use crate::owner::{Owner, Wake};
use crate::session::answers::Answers;
use crate::session::event::{Claim, Event};
use crate::session::registry::Registry;

/// How long a host may take nothing of what waits for it: an engine starts anew in less.
pub const SILENCE: Duration = Duration::from_secs(30);

/// Distinguishes an engine's process from every other one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instance(pub u64);

/// The other hosts, as this one sees them.
pub struct Cluster {
    map: PartitionMap,
    us: HostId,
    instance: Instance,
    owner: Owner,
    registry: Arc<Registry>,
    /// By number; none for ourselves.
    peers: Vec<Option<Arc<Peer>>>,
    sessions: Mutex<HashMap<SessionId, Asking>>,
}

/// A session of this host that asks others, too.
#[derive(Clone)]
struct Asking {
    answers: Arc<Answers>,
    wake: Wake,
}

/// What a host is like at the moment, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostView {
    /// Its name.
    pub name: String,
    /// Its slices, and all there are.
    pub share: (usize, usize),
    /// It is us, or we have a link to it.
    pub linked: bool,
    /// It was given up, and has not come back.
    pub lost: bool,
}

impl Cluster {
    /// This host, number `us` of the map. What waits for others takes `memory` bytes, and spills into
    /// `dir`; `ready` makes what is called when something waits for a host.
    pub fn new(
        map: PartitionMap,
        us: HostId,
        instance: Instance,
        (owner, registry): (Owner, Arc<Registry>),
        (dir, memory): (&Path, usize),
        ready: impl Fn(HostId) -> Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Self> {
        let share = Share::new(memory);
        let peer = |host| Arc::new(Peer::new(host, dir, &share, ready(host), Instant::now()));
        let hosts = (0..map.members().len()).map(|n| HostId(n as u16));
        let peers = hosts.map(|host| (host != us).then(|| peer(host))).collect();
        let sessions = Mutex::default();
        Arc::new(Cluster { map, us, instance, owner, registry, peers, sessions })
    }

    /// The partition map.
    #[must_use]
    pub fn map(&self) -> &PartitionMap {
        &self.map
    }

    /// Our number in it.
    #[must_use]
    pub fn us(&self) -> HostId {
        self.us
    }

    /// This process.
    #[must_use]
    pub fn instance(&self) -> Instance {
        self.instance
    }

    /// The other hosts' numbers.
    pub fn others(&self) -> impl Iterator<Item = HostId> + '_ {
        self.peers.iter().flatten().map(|peer| peer.host)
    }

    /// Whether we answer for a fingerprint.
    #[must_use]
    pub fn owns(&self, fingerprint: &Fingerprint) -> bool {
        self.map.owner(fingerprint) == self.us
    }

    /// All hosts.
    #[must_use]
    pub fn view(&self) -> Vec<HostView> {
        let hosts = self.map.members().iter().zip(&self.peers).enumerate();
        let view = |(n, (member, peer)): (usize, (&map::Member, &Option<Arc<Peer>>))| {
            let (linked, lost) = match peer {
                Some(peer) => {
                    let link = peer.link();
                    (link.connected, link.lost)
                }
                None => (true, false),
            };
            let share = self.map.share(HostId(n as u16));
            HostView { name: member.name.clone(), share, linked, lost }
        };
        hosts.map(view).collect()
    }

    fn peer(&self, host: HostId) -> Option<&Arc<Peer>> {
        self.peers.get(usize::from(host.0)).and_then(Option::as_ref)
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Asking>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // What sessions of this host say.

    /// A session of ours begins. Hosts that are lost now are not asked for it.
    pub fn register(&self, session: SessionId, answers: &Arc<Answers>, wake: &Wake) {
        let asking = Asking { answers: Arc::clone(answers), wake: Arc::clone(wake) };
        self.sessions().insert(session, asking);
        for peer in self.peers.iter().flatten().filter(|peer| peer.link().lost) {
            answers.cut(peer.host);
        }
    }

    /// Asks another host.
    pub fn ask(&self, host: HostId, session: SessionId, asked: Vec<(Fingerprint, Sequence)>) {
        let asking = self.sessions().get(&session).cloned();
        let (Some(asking), Some((_, first))) = (asking, asked.first()) else { return };
        if asking.answers.expect(host, *first, asked.len() as u64) {
            self.put(host, &Message::Ask(session, asked));
        } else {
            (asking.wake)();
        }
    }

    /// Gives grants back to another host.
    pub fn release(&self, host: HostId, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) {
        self.put(host, &Message::Release(session, grants));
    }

    /// Tells all others whether a session waits for nothing but answers.
    pub fn waiting(&self, session: SessionId, waiting: bool) {
        self.others().for_each(|host| self.put(host, &Message::Waiting(session, waiting)));
    }

    /// Tells another host of its blocks in a container that is sealed and in the journal.
    pub fn learn(
        &self,
        host: HostId,
        entries: Vec<(Fingerprint, Address)>,
        position: JournalPosition,
    ) {
        self.put(host, &Message::Learn(position, entries));
    }

    /// A session of ours has ended.
    pub fn withdraw(&self, session: SessionId) {
        if self.sessions().remove(&session).is_some() {
            self.others().for_each(|host| self.put(host, &Message::Withdraw(session)));
        }
    }

    /// Asks a session of another host to leave blocks to one of ours; false if it cannot hear it.
    pub fn give_up(&self, to: SessionId, writer: SessionId, claims: Vec<Claim>) -> bool {
        self.tell(writer.host(), &Message::GiveUp { to, writer, claims })
    }

    /// Tells a session of another host that one of ours has done with what it asked for.
    pub fn gave_up(&self, from: SessionId, to: SessionId) -> bool {
        self.tell(to.host(), &Message::GaveUp { from, to })
    }

    fn tell(&self, host: HostId, message: &Message) -> bool {
        let heard = self.peer(host).is_some_and(|peer| !peer.link().lost);
        if heard {
            self.put(host, message);
        }
        heard
    }

    /// Puts a message into a host's outbox. What cannot be kept any more gives the host up; a host
    /// that is lost learns nothing: it reads the journals when it is back.
    fn put(&self, host: HostId, message: &Message) {
        let Some(peer) = self.peer(host) else { return };
        if peer.link().lost {
            return;
        }
        if let Err(error) = peer.outbox.put(message) {
            self.lose(peer, &error.to_string());
        }
    }

    // What links say.

    /// What waits for a host, from a frame on.
    ///
    /// # Errors
    /// When it cannot be read back; the host is given up.
    pub fn next(&self, host: HostId, from: FrameNumber) -> Result<Option<(FrameNumber, Vec<u8>)>> {
        let Some(peer) = self.peer(host) else { return Ok(None) };
        let next = peer.outbox.next(from);
        if let Err(error) = &next {
            self.lose(peer, &error.to_string());
        }
        next
    }

    /// A host has taken everything up to a frame, or answered at least.
    pub fn taken(&self, host: HostId, number: FrameNumber) {
        if let Some(peer) = self.peer(host) {
            peer.outbox.taken(number);
            peer.link().heard = Instant::now();
        }
    }

    /// We have a link to a host's process, which has taken frames up to `received`. Gives the number to go
    /// on from.
    pub fn connected(
        &self,
        host: HostId,
        instance: Instance,
        received: FrameNumber,
    ) -> FrameNumber {
        let Some(peer) = self.peer(host) else { return FrameNumber(1) };
        self.meet(peer, instance);
        peer.link().connected = true;
        peer.outbox.taken(received);
        FrameNumber(received.0 + 1)
    }

    /// A host's process says something, whichever way. What the process before it was asked is gone
    /// with that one, and what it was to be told is for nobody.
    fn meet(&self, peer: &Peer, instance: Instance) {
        let mut link = peer.link();
        let known = link.instance.replace(instance);
        (link.lost, link.heard) = (false, Instant::now());
        drop(link);
        if known.is_some_and(|known| known != instance) {
            eprintln!("fleece-engine: {} was started anew", self.name(peer.host));
            peer.outbox.restart();
            self.cut(peer.host);
        }
    }

    /// The link to a host has ended.
    pub fn disconnected(&self, host: HostId) {
        if let Some(peer) = self.peer(host) {
            peer.link().connected = false;
        }
    }

    /// A host's process begins to send. Gives the last of its frames that we took.
    pub fn greeted(&self, host: HostId, instance: Instance) -> FrameNumber {
        let Some(peer) = self.peer(host) else { return FrameNumber(0) };
        // Before anything of it is answered.
        self.meet(peer, instance);
        let mut link = peer.link();
        if link.theirs.replace(instance) != Some(instance) {
            link.received = FrameNumber(0);
            let ended = std::mem::take(&mut link.sessions);
            drop(link);
            ended.into_iter().for_each(|session| self.owner.withdraw(session));
            return FrameNumber(0);
        }
        link.received
    }

    /// Takes a frame of a host in; one that was taken before is passed over. Frames of a host come one
    /// after the other.
    ///
    /// # Errors
    /// [`crate::error::Kind::Usage`] for a frame that no engine writes; when this engine is ending.
    pub fn take(&self, host: HostId, number: FrameNumber, frame: &[u8]) -> Result<()> {
        let Some(peer) = self.peer(host) else { return Ok(()) };
        if number <= peer.link().received {
            return Ok(());
        }
        let mut reader = FrameReader::new(frame);
        let mut answered = Vec::new();
        while let Some(message) = reader.read_next()? {
            self.obey(peer, message, &mut answered)?;
        }
        answered.dedup();
        for session in answered {
            if let Some(asking) = self.sessions().get(&session) {
                (asking.wake)();
            }
        }
        peer.link().received = number;
        Ok(())
    }

    fn obey(
        &self,
        peer: &Arc<Peer>,
        message: Message,
        answered: &mut Vec<SessionId>,
    ) -> Result<()> {
        match message {
            Message::Ask(session, asked) => {
                self.enter(peer, session)?;
                self.owner.ask(session, asked)
            }
            Message::Release(session, grants) => {
                self.enter(peer, session)?;
                self.owner.release(session, grants)
            }
            Message::Waiting(session, waiting) => {
                if peer.link().sessions.contains(&session) {
                    self.owner.waiting(session, waiting)?;
                }
                Ok(())
            }
            Message::Withdraw(session) => {
                if peer.link().sessions.remove(&session) {
                    self.owner.withdraw(session);
                }
                Ok(())
            }
            Message::Learn(position, mut entries) => {
                entries.retain(|(fingerprint, _)| self.owns(fingerprint));
                self.owner.learn(entries, position)
            }
            Message::Verdict(session, sequence, verdict) => {
                self.answer(peer, (session, sequence, verdict), answered);
                Ok(())
            }
            Message::Failed(session, reason) => {
                let name = self.name(peer.host);
                eprintln!("fleece-engine: {name} cannot answer, so blocks are missed: {reason}");
                if let Some(asking) = self.sessions().get(&session) {
                    asking.answers.cut(peer.host);
                    answered.push(session);
                }
                Ok(())
            }
            Message::Advanced => {
                self.owner.figures().progress.fetch_add(1, Ordering::Release);
                self.wake_all();
                Ok(())
            }
            Message::GiveUp { to, writer, claims } => {
                // A session that is gone or overloaded says nothing: the other one asks again.
                if let Some(writer) = self.registry.events_of(writer) {
                    let _ = writer.try_send(Event::GiveUp { to, claims });
                }
                Ok(())
            }
            Message::GaveUp { from, to } => {
                if let Some(waiter) = self.registry.events_of(to) {
                    let _ = waiter.try_send(Event::GaveUp { from });
                }
                Ok(())
            }
            Message::Reset => {
                let ended = std::mem::take(&mut peer.link().sessions);
                ended.into_iter().for_each(|session| self.owner.withdraw(session));
                self.cut(peer.host);
                self.owner.refill()
            }
        }
    }

    /// An answer to a session of ours.
    fn answer(
        &self,
        peer: &Peer,
        (session, sequence, verdict): (SessionId, Sequence, Verdict),
        answered: &mut Vec<SessionId>,
    ) {
        let asking = self.sessions().get(&session).cloned();
        let Some(asking) = asking else { return };
        if let Err(error) = asking.answers.put(peer.host, sequence, &verdict) {
            asking.answers.fail(&error);
        }
        answered.push(session);
    }

    /// A session of another host, known to our owner from its first word on.
    fn enter(&self, peer: &Arc<Peer>, session: SessionId) -> Result<()> {
        if session.host() != peer.host || !peer.link().sessions.insert(session) {
            return Ok(());
        }
        self.owner.register(session, Arc::new(RemoteAsker::new(session, Arc::clone(peer))))
    }

    // Time.

    /// Gives hosts up that take nothing for too long. Called every second or so.
    pub fn look(&self, now: Instant) {
        for peer in self.peers.iter().flatten() {
            let link = peer.link();
            let silent = now.saturating_duration_since(link.heard) > SILENCE;
            let waits = !link.connected || !peer.outbox.is_empty();
            let lost = !link.lost && silent && waits;
            drop(link);
            if lost {
                self.lose(peer, &format!("it took nothing for {} s", SILENCE.as_secs()));
            }
        }
    }

    /// Gives a host up until it has a link again.
    fn lose(&self, peer: &Peer, why: &str) {
        {
            let mut link = peer.link();
            if std::mem::replace(&mut link.lost, true) {
                return;
            }
        }
        let name = self.name(peer.host);
        eprintln!("fleece-engine: {name} is given up, blocks that it has are missed: {why}");
        peer.outbox.clear();
        // The first thing that it hears when it is back.
        let _ = peer.outbox.put(&Message::Reset);
        self.cut(peer.host);
    }

    /// The sessions that live now ask a host nothing any more.
    fn cut(&self, host: HostId) {
        self.sessions().values().for_each(|asking| asking.answers.cut(host));
        self.wake_all();
    }

    fn wake_all(&self) {
        let wakes: Vec<Wake> = self.sessions().values().map(|a| Arc::clone(&a.wake)).collect();
        wakes.iter().for_each(|wake| wake());
    }

    fn name(&self, host: HostId) -> &str {
        self.map.members().get(usize::from(host.0)).map_or("?", |member| &member.name)
    }
}
