//! An engine of the simulation: a real cluster and a real detector, whose owner works when it is let.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::cluster::map::PartitionMap;
use crate::cluster::{Cluster, Here, Instance};
use crate::detect::{DetectOptions, Detector, JournalPosition, Verdict};
use crate::error::{Error, Result};
use crate::ids::{Fingerprint, HostId, Incarnation, Sequence, SessionId, Slices, StoreId};
use crate::part::{Asker, Entry, HandOver, Part};
use crate::session::answers::Answers;
use crate::session::registry::Registry;

/// What an owner is told, in order.
pub(super) enum Command {
    Register(SessionId, Arc<dyn Asker>),
    Ask(SessionId, Vec<(Fingerprint, Sequence)>),
    Release(SessionId, Vec<(Fingerprint, Sequence)>),
    Claim(SessionId, Vec<(Fingerprint, Sequence)>),
    Keep(Box<Slices>, HandOver),
    Learn(Vec<Entry>, JournalPosition),
    Withdraw(SessionId),
    Refill,
}

/// An owner that works when the simulation lets it.
#[derive(Clone)]
pub(super) struct Owned {
    pub(super) commands: Arc<Mutex<VecDeque<Command>>>,
}

impl Owned {
    fn push(&self, command: Command) -> Result<()> {
        self.commands.lock().unwrap().push_back(command);
        Ok(())
    }
}

impl Part for Owned {
    fn register(&self, session: SessionId, asker: Arc<dyn Asker>) -> Result<()> {
        self.push(Command::Register(session, asker))
    }

    fn ask(&self, session: SessionId, asked: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.push(Command::Ask(session, asked))
    }

    fn release(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.push(Command::Release(session, grants))
    }

    fn claim(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.push(Command::Claim(session, grants))
    }

    fn keep(&self, slices: Slices, hand: HandOver) -> Result<()> {
        self.push(Command::Keep(Box::new(slices), hand))
    }

    fn waiting(&self, _: SessionId, _: bool) -> Result<()> {
        Ok(())
    }

    fn learn(&self, entries: Vec<Entry>, position: JournalPosition) -> Result<()> {
        self.push(Command::Learn(entries, position))
    }

    fn withdraw(&self, session: SessionId) {
        self.push(Command::Withdraw(session)).unwrap();
    }

    fn refill(&self) -> Result<()> {
        self.push(Command::Refill)
    }

    fn advanced(&self) {}
}

/// A session of the owner's own host.
pub(super) struct Local {
    pub(super) host: HostId,
    pub(super) answers: Arc<Answers>,
}

impl Asker for Local {
    fn answer(&self, sequence: Sequence, verdict: &Verdict) -> Result<()> {
        self.answers.put(self.host, sequence, verdict)
    }

    fn fail(&self, error: &Error) {
        self.answers.fail(error);
    }

    fn answered(&self) {}

    fn advanced(&self, _: u64) {}
}

/// A running engine.
pub(super) struct Host {
    pub(super) cluster: Arc<Cluster>,
    pub(super) owned: Owned,
    pub(super) detector: Detector,
    askers: HashMap<SessionId, Arc<dyn Asker>>,
    hand: Option<HandOver>,
    progress: u64,
    pub(super) incarnation: Incarnation,
    pub(super) sealed: u64,
}

impl Host {
    pub(super) fn start(
        dir: &Path,
        us: HostId,
        map: &PartitionMap,
        (start, filled): (u32, bool),
        now: impl Fn() -> Instant + Send + Sync + 'static,
    ) -> Self {
        let dir = dir.join(format!("{}-{start}", us.0));
        let work = dir.join("work");
        std::fs::create_dir_all(&work).unwrap();
        let part = map.slices(us).digest();
        let options = DetectOptions {
            part,
            partition_bits: 1,
            ..DetectOptions::new(StoreId(uuid::Uuid::from_u128(1)))
        };
        let (detector, _) = Detector::open(&dir.join("index"), options).unwrap();
        let owned = Owned { commands: Arc::default() };
        let here = Here {
            owner: Box::new(owned.clone()),
            registry: Arc::new(Registry::default()),
            clock: Box::new(now),
        };
        let place = (map.clone(), us, filled);
        let instance = Instance(u64::from(start) << 32);
        let cluster = Cluster::new(place, instance, here, (&work, 64 << 10), |_| Box::new(|| ()));
        let (askers, incarnation) = (HashMap::new(), Incarnation(start));
        let hand = None;
        Host { cluster, owned, detector, askers, hand, progress: 0, incarnation, sealed: 0 }
    }

    /// One thing that waits for the owner, or a pass.
    pub(super) fn work(&mut self, journal: &[(JournalPosition, Vec<Entry>)]) {
        let command = self.owned.commands.lock().unwrap().pop_front();
        match command {
            Some(Command::Register(session, asker)) => {
                self.askers.insert(session, asker);
            }
            Some(Command::Ask(session, asked)) => self.detector.submit(session, &asked).unwrap(),
            Some(Command::Release(session, grants)) => {
                self.detector.release(session, &grants).unwrap();
            }
            Some(Command::Claim(session, grants)) => self.detector.claim(session, &grants).unwrap(),
            Some(Command::Keep(slices, hand)) => {
                self.detector.keep(*slices);
                self.hand = Some(hand);
            }
            Some(Command::Learn(mut entries, position)) => {
                self.detector.learn(&mut entries, position).unwrap();
                self.advance();
            }
            Some(Command::Withdraw(session)) => {
                self.askers.remove(&session);
                self.detector.withdraw(session);
                self.advance();
            }
            Some(Command::Refill) => self.refill(journal),
            None => self.pass(),
        }
    }

    /// Whether it has nothing to do.
    pub(super) fn is_idle(&mut self) -> bool {
        let commands = self.owned.commands.lock().unwrap().len();
        commands == 0 && self.detector.due(Instant::now(), true).is_none()
    }

    /// Learns what the journals have more than the index.
    fn refill(&mut self, journal: &[(JournalPosition, Vec<Entry>)]) {
        for (position, entries) in journal {
            if position.n > self.detector.applied().get(position.incarnation) {
                let ours = |entry: &&Entry| self.cluster.owns(&entry.0);
                let mut ours: Vec<Entry> = entries.iter().filter(ours).copied().collect();
                self.detector.learn(&mut ours, *position).unwrap();
            }
        }
        self.advance();
    }

    fn advance(&mut self) {
        self.progress += 1;
        self.askers.values().for_each(|asker| asker.advanced(self.progress));
    }

    fn pass(&mut self) {
        let Some(partition) = self.detector.due(Instant::now(), true) else { return };
        let askers = &self.askers;
        self.detector
            .pass(
                partition,
                &|session| askers.contains_key(&session),
                &mut |session, sequence, verdict| match askers.get(&session) {
                    Some(asker) => asker.answer(sequence, &verdict),
                    None => Ok(()),
                },
            )
            .unwrap();
        if let Some(hand) = &self.hand {
            let mut kept = Vec::new();
            let each = |session, what| kept.push((session, hand(session, what)));
            self.detector.hand_over(each).unwrap();
            kept.iter().for_each(|(session, ours)| self.detector.claim(*session, ours).unwrap());
        }
    }
}
