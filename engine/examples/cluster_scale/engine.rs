//! An engine of the simulation: a real cluster and a real detector, whose owner works when it is let.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use fleece_engine::budget::Budget;
use fleece_engine::cluster::map::PartitionMap;
use fleece_engine::cluster::{Cluster, Here, Instance};
use fleece_engine::detect::{DetectOptions, Detector, JournalPosition, Verdict};
use fleece_engine::error::{Error, Result};
use fleece_engine::ids::{
    Address, ContainerId, Fingerprint, HostId, Incarnation, Sequence, SessionId, Slices, Slot,
    StoreId,
};
use fleece_engine::part::{Asker, Entry, HandOver, Part, Wake};
use fleece_engine::session::answers::Answers;
use fleece_engine::session::registry::Registry;

use crate::Outcome;
use crate::content::Content;
use crate::cost::{Costs, Stage, processor};

/// Blocks of a container: 16 MiB of blocks that cannot be compressed. Larger ones make fewer messages.
pub(crate) const CONTAINER: usize = 4096;

/// What an owner is told, in order.
enum Command {
    Register(SessionId, Arc<dyn Asker>),
    Ask(SessionId, Vec<(Fingerprint, Sequence)>),
    Release(SessionId, Vec<(Fingerprint, Sequence)>),
    Learn(Vec<Entry>, JournalPosition),
    Withdraw(SessionId),
}

impl Command {
    fn stage(&self) -> Stage {
        match self {
            Command::Register(..) | Command::Withdraw(_) => Stage::Sessions,
            Command::Ask(..) | Command::Release(..) => Stage::Log,
            Command::Learn(..) => Stage::Learn,
        }
    }
}

/// An owner that works when the simulation lets it.
#[derive(Clone, Default)]
pub(crate) struct Owned(Arc<Mutex<VecDeque<Command>>>);

impl Owned {
    fn push(&self, command: Command) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(command);
    }

    fn pop(&self) -> Option<Command> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

impl Part for Owned {
    fn register(&self, session: SessionId, asker: Arc<dyn Asker>) -> Result<()> {
        self.push(Command::Register(session, asker));
        Ok(())
    }

    fn ask(&self, session: SessionId, asked: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.push(Command::Ask(session, asked));
        Ok(())
    }

    fn release(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.push(Command::Release(session, grants));
        Ok(())
    }

    fn claim(&self, _: SessionId, _: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        // Only where the map changes, which here it never does.
        Ok(())
    }

    fn keep(&self, _: Slices, _: HandOver) -> Result<()> {
        Ok(())
    }

    fn waiting(&self, _: SessionId, _: bool) -> Result<()> {
        // Passes are made once all sessions wait.
        Ok(())
    }

    fn learn(&self, entries: Vec<Entry>, position: JournalPosition) -> Result<()> {
        self.push(Command::Learn(entries, position));
        Ok(())
    }

    fn withdraw(&self, session: SessionId) {
        self.push(Command::Withdraw(session));
    }

    fn refill(&self) -> Result<()> {
        // Only where messages are lost, which here they never are.
        Ok(())
    }

    fn advanced(&self) {}
}

/// A session of the owner's own host.
struct Local {
    host: HostId,
    answers: Arc<Answers>,
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

/// A backup of a VM: what it asks about, and what it was told.
pub(crate) struct Session {
    pub(crate) id: SessionId,
    answers: Arc<Answers>,
    /// By sequence.
    pub(crate) contents: Vec<Content>,
    /// Sequences of this round of questions.
    asked: Vec<u32>,
}

/// What sessions were told, and whether it is true.
#[derive(Clone, Copy, Default)]
pub(crate) struct Told {
    pub(crate) granted: u64,
    pub(crate) stored: u64,
    /// The same as what a session is to write: asked again.
    pub(crate) same: u64,
    pub(crate) undetected: u64,
}

/// A running engine.
pub(crate) struct Engine {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) detector: Detector,
    pub(crate) sessions: Vec<Session>,
    pub(crate) costs: Costs,
    pub(crate) told: Told,
    /// Requests that its owner was asked, and those of other hosts among them.
    pub(crate) requests: u64,
    pub(crate) remote: u64,
    /// What is granted and in no container yet.
    granted: Vec<Content>,
    /// What its containers hold, by slot; and where each of them begins.
    pub(crate) stored: Vec<Content>,
    begins: Vec<u32>,
    owned: Owned,
    askers: HashMap<SessionId, Arc<dyn Asker>>,
    progress: u64,
    has_advanced: bool,
    next_session: u32,
    pub(crate) dir: PathBuf,
    budget: Budget,
    seed: u64,
    /// By host: whether something waits for it.
    pub(crate) ready: Arc<Vec<AtomicBool>>,
}

impl Engine {
    pub(crate) fn start(
        (dir, seed): (&Path, u64),
        us: HostId,
        map: &PartitionMap,
        memtable: usize,
    ) -> Outcome<Self> {
        let dir = dir.join(format!("hv{:03}", us.0));
        let work = dir.join("sessions");
        std::fs::create_dir_all(&work)?;
        let budget = Budget::new(32 << 20)?;
        let options = DetectOptions {
            part: map.slices(us).digest(),
            pass_memory: budget.pass,
            memtable_entries: memtable,
            ..DetectOptions::new(StoreId(uuid::Uuid::from_u128(1)))
        };
        let (detector, _) = Detector::open(&dir.join("index"), options)?;
        let owned = Owned::default();
        let here = Here {
            owner: Box::new(owned.clone()),
            registry: Arc::new(Registry::default()),
            clock: Box::new(Instant::now),
        };
        let ready: Vec<AtomicBool> = map.members().iter().map(|_| AtomicBool::new(false)).collect();
        let ready = Arc::new(ready);
        let told = Arc::clone(&ready);
        let cluster = Cluster::new(
            (map.clone(), us, true),
            Instance(u64::from(us.0 + 1) << 32),
            here,
            (&work, budget.peers),
            move |host| {
                let told = Arc::clone(&told);
                Box::new(move || told[usize::from(host.0)].store(true, Ordering::Release))
            },
        );
        Ok(Engine {
            cluster,
            detector,
            sessions: Vec::new(),
            costs: Costs::default(),
            told: Told::default(),
            requests: 0,
            remote: 0,
            granted: Vec::new(),
            stored: Vec::new(),
            begins: Vec::new(),
            owned,
            askers: HashMap::new(),
            progress: 0,
            has_advanced: false,
            next_session: 1,
            dir,
            budget,
            seed,
            ready,
        })
    }

    /// A backup begins that will ask about these.
    pub(crate) fn begin(&mut self, contents: Vec<Content>) -> Outcome<()> {
        let us = self.cluster.us();
        let id = SessionId::on(us, self.next_session);
        self.next_session += 1;
        let begun = processor();
        let answers =
            Arc::new(Answers::new(&self.dir.join("sessions"), self.budget.session_sort / 2));
        answers.open(0);
        let local = Local { host: us, answers: Arc::clone(&answers) };
        self.owned.register(id, Arc::new(local))?;
        let wake: Wake = Arc::new(|| ());
        self.cluster.register(id, &answers, &wake);
        self.costs.until_now(Some(Stage::Sessions), begun);
        self.sessions.push(Session { id, answers, contents, asked: Vec::new() });
        self.obey_all()
    }

    /// A session asks about these sequences of its.
    pub(crate) fn ask(&mut self, session: usize, sequences: &[u32]) -> Outcome<()> {
        let (seed, session) = (self.seed, &mut self.sessions[session]);
        let question = |at: &u32| {
            let content = session.contents[*at as usize];
            (content.fingerprint(seed), Sequence(u64::from(*at)))
        };
        let questions: Vec<_> = sequences.iter().map(question).collect();
        session.asked.extend_from_slice(sequences);
        let (cluster, id) = (&self.cluster, session.id);
        self.costs.of(Stage::Ask, || cluster.ask(id, questions))?;
        self.obey_all()
    }

    /// Says of all sessions that have questions whether they wait for nothing else.
    pub(crate) fn wait(&mut self, waiting: bool) {
        let Engine { sessions, cluster, costs, .. } = self;
        for session in sessions.iter().filter(|session| !session.asked.is_empty()) {
            costs.of(Stage::Sessions, || cluster.waiting(session.id, waiting));
        }
    }

    /// Does what the owner was told.
    pub(crate) fn obey_all(&mut self) -> Outcome<()> {
        // The clock is read where the stage changes: messages of many hosts are small.
        let (mut begun, mut running) = (processor(), None);
        while let Some(command) = self.owned.pop() {
            let stage = command.stage();
            if running.is_some_and(|running| running != stage) {
                begun = self.costs.until_now(running, begun);
            }
            running = Some(stage);
            self.obey(command)?;
        }
        self.costs.until_now(running, begun);
        // As the owner does once nothing waits for it.
        if std::mem::take(&mut self.has_advanced) {
            let (askers, progress) = (&self.askers, self.progress);
            let tell = || askers.values().for_each(|asker| asker.advanced(progress));
            self.costs.of(Stage::Sessions, tell);
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Outcome<()> {
        match command {
            Command::Register(session, asker) => {
                self.askers.insert(session, asker);
            }
            Command::Ask(session, asked) => {
                self.requests += asked.len() as u64;
                if session.host() != self.cluster.us() {
                    self.remote += asked.len() as u64;
                }
                self.detector.submit(session, &asked)?;
            }
            Command::Release(session, grants) => self.detector.release(session, &grants)?,
            Command::Learn(mut entries, position) => {
                self.detector.learn(&mut entries, position)?;
                self.advance();
            }
            Command::Withdraw(session) => {
                self.askers.remove(&session);
                self.detector.withdraw(session);
                self.advance();
            }
        }
        Ok(())
    }

    fn advance(&mut self) {
        self.progress += 1;
        self.has_advanced = true;
    }

    /// A pass over a partition that has requests; false if there is none.
    pub(crate) fn pass(&mut self) -> Outcome<bool> {
        let Some(partition) = self.detector.due(Instant::now(), true) else { return Ok(false) };
        let Engine { detector, askers, costs, .. } = self;
        costs.of(Stage::Pass, || {
            detector.pass(
                partition,
                &|session| askers.contains_key(&session),
                &mut |session, sequence, verdict| match askers.get(&session) {
                    Some(asker) => asker.answer(sequence, &verdict),
                    None => Ok(()),
                },
            )
        })?;
        Ok(true)
    }

    /// Reads what a session was told; gives the places that it believes, for somebody to check.
    pub(crate) fn settle(
        &mut self,
        at: usize,
        places: &mut Vec<(Content, Address)>,
    ) -> Outcome<()> {
        let session = &mut self.sessions[at];
        let asked = std::mem::take(&mut session.asked);
        if asked.is_empty() {
            return Ok(());
        }
        let (answers, counted) = (&session.answers, session.answers.count(0));
        if counted != asked.len() as u64 {
            return Err(format!("{counted} answers to {} questions", asked.len()).into());
        }
        let read = || -> Result<Vec<Option<Verdict>>> {
            let mut stream = answers.take(0)?;
            asked.iter().map(|at| stream.answer(Sequence(u64::from(*at)))).collect()
        };
        let verdicts = self.costs.of(Stage::Settle, read)?;
        for (at, verdict) in asked.into_iter().zip(verdicts) {
            let content = session.contents[at as usize];
            match verdict {
                Some(Verdict::Stored(address)) => {
                    self.told.stored += 1;
                    places.push((content, address));
                }
                Some(Verdict::Grant) => {
                    self.told.granted += 1;
                    self.granted.push(content);
                }
                Some(Verdict::SameAs(writer, first)) => {
                    // Of its own ones too, as a session does: once they are stored they have a place.
                    self.told.same += 1;
                    session.asked.push(at);
                    if writer == session.id && session.contents[first.0 as usize] != content {
                        return Err("a block is said to be the same as another one".into());
                    }
                }
                None => self.told.undetected += 1,
            }
        }
        Ok(())
    }

    /// Puts what was granted into containers and tells its owners.
    pub(crate) fn seal(&mut self) -> Outcome<()> {
        let incarnation = Incarnation(u32::from(self.cluster.us().0) + 1);
        for blocks in std::mem::take(&mut self.granted).chunks(CONTAINER) {
            self.begins.push(self.stored.len() as u32);
            let counter = self.begins.len() as u32;
            let container = ContainerId { incarnation, counter };
            let entry = |(slot, content): (usize, &Content)| {
                let address = Address { container, slot: Slot(slot as u16) };
                (content.fingerprint(self.seed), address)
            };
            let entries: Vec<Entry> = blocks.iter().enumerate().map(entry).collect();
            self.stored.extend_from_slice(blocks);
            let position = JournalPosition { incarnation, n: u64::from(counter) };
            let cluster = &self.cluster;
            self.costs.of(Stage::Tell, || cluster.learn(entries, position))?;
            self.obey_all()?;
        }
        Ok(())
    }

    /// What a container of ours holds in a slot.
    pub(crate) fn holds(&self, counter: u32, slot: u16) -> Option<Content> {
        let begin = *self.begins.get((counter as usize).checked_sub(1)?)?;
        self.stored.get(begin as usize + usize::from(slot)).copied()
    }

    /// Sequences that a session has to ask about again.
    pub(crate) fn take_again(&mut self, session: usize) -> Vec<u32> {
        std::mem::take(&mut self.sessions[session].asked)
    }

    /// All sessions end.
    pub(crate) fn end(&mut self) -> Outcome<()> {
        for session in std::mem::take(&mut self.sessions) {
            let Engine { cluster, owned, .. } = self;
            self.costs.of(Stage::Sessions, || {
                cluster.withdraw(session.id);
                owned.withdraw(session.id);
            });
        }
        self.obey_all()
    }

    /// Merges until there is nothing to merge.
    pub(crate) fn merge(&mut self) -> Outcome<()> {
        let Engine { detector, costs, .. } = self;
        costs.of(Stage::Merge, || -> Result<()> {
            while detector.maintain()? {}
            Ok(())
        })?;
        Ok(())
    }

    /// Bytes that only the simulation needs: what it will check.
    pub(crate) fn of_the_driver(&self) -> u64 {
        let sessions: usize =
            self.sessions.iter().map(|s| (s.contents.capacity() + s.asked.capacity()) * 4).sum();
        (sessions + (self.stored.capacity() + self.granted.capacity()) * 4) as u64
    }
}
