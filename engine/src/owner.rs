//! The thread that owns this host's partitions: it takes requests, makes passes one at
//! a time, and answers. It never waits for a session.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::detect::{Anew, Detector, JournalPosition, Partition, Rebuild, Rebuilt, Watermark};
use crate::error::{Error, Kind, Result};
use crate::hosts::PartitionReport;
use crate::ids::{Address, Fingerprint, Sequence, SessionId, Slices};
use crate::part::{Asker, Entry, HandOver, Part};

/// Commands that wait for the owner: a batch of requests is at most 160 KiB, so this
/// bounds what waits to a few MiB.
const QUEUE: usize = 16;
/// How long the owner sleeps when nothing comes: old logs get their pass after it.
const TICK: Duration = Duration::from_millis(200);
/// Between two tries to bring the index up to the journals.
const REFILL_AGAIN: Duration = Duration::from_secs(10);
/// Passes that may fail one after the other before sessions are told.
const PASS_TRIES: u32 = 5;
/// Entries in one answer of [`Owner::entries_after`].
const EXPORT_ENTRIES: usize = 4096;

impl Part for Owner {
    fn register(&self, session: SessionId, asker: Arc<dyn Asker>) -> Result<()> {
        self.register(session, asker)
    }

    fn ask(&self, session: SessionId, asked: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.ask(session, asked)
    }

    fn release(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.release(session, grants)
    }

    fn claim(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.send(Command::Claim { session, grants })
    }

    fn keep(&self, slices: Slices, hand: HandOver) -> Result<()> {
        self.send(Command::Keep { slices: Box::new(slices), hand })
    }

    fn waiting(&self, session: SessionId, waiting: bool) -> Result<()> {
        self.waiting(session, waiting)
    }

    fn learn(&self, entries: Vec<Entry>, position: JournalPosition) -> Result<()> {
        self.learn(entries, position)
    }

    fn withdraw(&self, session: SessionId) {
        self.withdraw(session);
    }

    fn refill(&self) -> Result<()> {
        self.refill()
    }

    fn advanced(&self) {
        self.figures.progress.fetch_add(1, Ordering::Release);
    }
}

/// Brings an index up to the store's journals.
pub type Refill = Box<dyn FnMut(&mut Detector) -> Result<()> + Send>;

enum Command {
    Register { session: SessionId, asker: Arc<dyn Asker> },
    Ask { session: SessionId, requests: Vec<(Fingerprint, Sequence)> },
    Release { session: SessionId, grants: Vec<(Fingerprint, Sequence)> },
    Claim { session: SessionId, grants: Vec<(Fingerprint, Sequence)> },
    Keep { slices: Box<Slices>, hand: HandOver },
    Waiting { session: SessionId, waiting: bool },
    Learn { entries: Vec<(Fingerprint, Address)>, position: JournalPosition },
    Withdraw { session: SessionId },
    Refill,
    Describe { reply: Sender<Vec<PartitionReport>> },
    Entries { partition: Partition, after: Option<Fingerprint>, reply: Sender<Result<Vec<Entry>>> },
    Applied { reply: Sender<Watermark> },
    Rebuild { anew: Anew, reply: Sender<Result<Option<Rebuild>>> },
    Install { rebuilt: Rebuilt, reply: Sender<Result<()>> },
    Stop,
}

/// Figures of the index that others may read at any time.
#[derive(Default)]
pub struct Figures {
    /// Distinct fingerprints.
    pub unique_blocks: AtomicU64,
    /// Fingerprints that were learned under a second address.
    pub double_blocks: AtomicU64,
    /// Bytes of the index's files.
    pub index_bytes: AtomicU64,
    /// Entries that are in checkpoints in the store.
    pub checkpointed_blocks: AtomicU64,
    /// Grows whenever blocks were sealed or a session ended: questions may have new answers.
    pub progress: AtomicU64,
}

/// A handle on the owner's thread.
#[derive(Clone)]
pub struct Owner {
    commands: Sender<Command>,
    figures: Arc<Figures>,
    partitions: u16,
}

impl Owner {
    /// Starts the thread; join it after [`Owner::stop`]. An index that turns out to be
    /// damaged is begun anew and refilled.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        detector: Detector,
        refill: Refill,
    ) -> Result<(Self, std::thread::JoinHandle<()>)> {
        let (commands, queue) = bounded(QUEUE);
        let figures = Arc::new(Figures::default());
        let partitions = detector.partitions().count() as u16;
        let mut thread = OwnerThread {
            detector,
            sessions: HashMap::new(),
            waiting: HashSet::new(),
            figures: Arc::clone(&figures),
            last_passes: HashMap::new(),
            has_advanced: false,
            failed_passes: 0,
            hand: None,
            refill,
            refill_at: None,
        };
        thread.publish_figures();
        let handle = std::thread::Builder::new()
            .name("owner".into())
            .spawn(move || {
                let _guard = AbortOnPanic;
                thread.run(&queue);
            })
            .map_err(|e| Error::caused(Kind::Failed, "cannot start the owner's thread", e))?;
        Ok((Owner { commands, figures, partitions }, handle))
    }

    /// The figures of the index.
    #[must_use]
    pub fn figures(&self) -> &Figures {
        &self.figures
    }

    /// The number of partitions.
    #[must_use]
    pub fn partitions(&self) -> u16 {
        self.partitions
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|_| stopped())
    }

    /// A session begins.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn register(&self, session: SessionId, asker: Arc<dyn Asker>) -> Result<()> {
        self.send(Command::Register { session, asker })
    }

    /// Asks about blocks.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn ask(&self, session: SessionId, requests: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.send(Command::Ask { session, requests })
    }

    /// Gives grants back: who asks for these blocks next may write them.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn release(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        self.send(Command::Release { session, grants })
    }

    /// Whether the session waits for nothing but answers: passes need not wait for more requests.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn waiting(&self, session: SessionId, waiting: bool) -> Result<()> {
        self.send(Command::Waiting { session, waiting })
    }

    /// A container is sealed and in the journal.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn learn(&self, entries: Vec<Entry>, position: JournalPosition) -> Result<()> {
        self.send(Command::Learn { entries, position })
    }

    /// A session's end, whatever the end.
    pub fn withdraw(&self, session: SessionId) {
        // An owner that is gone holds no grants.
        let _ = self.send(Command::Withdraw { session });
    }

    /// Brings the index up to the journals: another host may have said less than they do.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn refill(&self) -> Result<()> {
        self.send(Command::Refill)
    }

    /// How it is with each partition.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn describe(&self) -> Result<Vec<PartitionReport>> {
        let (reply, answer) = bounded(1);
        self.send(Command::Describe { reply })?;
        answer.recv().map_err(|_| stopped())
    }

    /// Up to 4096 entries of a partition, ascending, after a fingerprint; empty at the end.
    ///
    /// # Errors
    /// When the index cannot be read or the engine is ending.
    pub fn entries_after(
        &self,
        partition: Partition,
        after: Option<Fingerprint>,
    ) -> Result<Vec<Entry>> {
        let (reply, answer) = bounded(1);
        self.send(Command::Entries { partition, after, reply })?;
        answer.recv().map_err(|_| stopped())?
    }

    /// Up to where all that the journals record has been learned.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn applied(&self) -> Result<Watermark> {
        let (reply, answer) = bounded(1);
        self.send(Command::Applied { reply })?;
        answer.recv().map_err(|_| stopped())
    }

    /// Begins what is new beside the present index; it is fed and built by the caller, and
    /// detection goes on meanwhile.
    ///
    /// # Errors
    /// When the index cannot be written or the engine is ending.
    pub fn begin_rebuild(&self, anew: Anew) -> Result<Rebuild> {
        loop {
            let (reply, answer) = bounded(1);
            self.send(Command::Rebuild { anew, reply })?;
            // None: a step was made on the way to it, and others have their turn before the next one.
            if let Some(begun) = answer.recv().map_err(|_| stopped())?? {
                return Ok(begun);
            }
        }
    }

    /// Puts a new index in place of the present one.
    ///
    /// # Errors
    /// When it cannot be made durable or the engine is ending.
    pub fn install(&self, rebuilt: Rebuilt) -> Result<()> {
        let (reply, answer) = bounded(1);
        self.send(Command::Install { rebuilt, reply })?;
        answer.recv().map_err(|_| stopped())?
    }

    /// Ends the thread once it did what was sent before.
    pub fn stop(&self) {
        let _ = self.send(Command::Stop);
    }
}

/// Without its owner an engine answers nobody: better it ends and is started anew.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

fn stopped() -> Error {
    Error::new(Kind::Failed, "the engine is ending")
}

struct OwnerThread {
    detector: Detector,
    sessions: HashMap<SessionId, Arc<dyn Asker>>,
    waiting: HashSet<SessionId>,
    figures: Arc<Figures>,
    last_passes: HashMap<Partition, Instant>,
    /// Blocks were sealed or a session ended, and the sessions were not told yet.
    has_advanced: bool,
    failed_passes: u32,
    /// Where it goes what there is about what is not ours any more.
    hand: Option<HandOver>,
    refill: Refill,
    /// When the index is to be brought up to the journals again.
    refill_at: Option<Instant>,
}

impl OwnerThread {
    fn run(&mut self, queue: &Receiver<Command>) {
        let mut patience = Duration::ZERO;
        loop {
            match queue.recv_timeout(patience) {
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(command) => {
                    self.obey(command);
                    patience = Duration::ZERO;
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.tell_advanced();
                    let worked = self.work();
                    patience = if worked { Duration::ZERO } else { TICK };
                }
            }
        }
        if let Err(error) = self.detector.flush() {
            report("the index could not be written out; it is refilled at the next start", &error);
        }
    }

    /// One pass or one step of merging; `false` when there was nothing to do.
    fn work(&mut self) -> bool {
        self.refill_if_due();
        if let Some(partition) = self.detector.due(Instant::now(), !self.waiting.is_empty()) {
            let passed = self.pass(partition);
            self.hand_over();
            match passed {
                Ok(()) => self.failed_passes = 0,
                Err(error) => {
                    report("a pass failed; it is made again", &error);
                    self.heal(&error);
                    self.failed_passes += 1;
                    if self.failed_passes >= PASS_TRIES {
                        self.fail_all(&error);
                    }
                    return false;
                }
            }
            return true;
        }
        match self.detector.maintain() {
            Ok(worked) => {
                if worked {
                    self.publish_figures();
                }
                worked
            }
            Err(error) => {
                report("merging the index failed; it is tried again", &error);
                self.heal(&error);
                false
            }
        }
    }

    /// A damaged index was set aside by the detector: the store's journals have it all. If
    /// it was a log instead, requests are lost, and those who asked must not wait for ever.
    fn heal(&mut self, error: &Error) {
        if self.detector.take_lost_requests() {
            self.fail_all(error);
        }
        if error.kind() == Kind::Damaged && self.detector.watermark().is_empty() {
            self.refill_at = Some(Instant::now());
        }
    }

    /// Brings the index up to the journals again, if it is due; tries again later if it fails.
    fn refill_if_due(&mut self) {
        if self.refill_at.is_none_or(|at| Instant::now() < at) {
            return;
        }
        self.refill_at = None;
        if let Err(error) = (self.refill)(&mut self.detector) {
            report("the index is not refilled yet; duplicates are missed until it is", &error);
            self.refill_at = Some(Instant::now() + REFILL_AGAIN);
        }
        self.publish_figures();
    }

    /// A disk that is full may stay so: backups fail rather than wait for it.
    fn fail_all(&mut self, error: &Error) {
        self.sessions.values().for_each(|asker| asker.fail(error));
    }

    fn pass(&mut self, partition: Partition) -> Result<()> {
        let sessions = &self.sessions;
        let mut touched = HashSet::new();
        self.detector.pass(
            partition,
            &|session| sessions.contains_key(&session),
            &mut |session, sequence, verdict| {
                let Some(asker) = sessions.get(&session) else { return Ok(()) };
                touched.insert(session);
                // A session that cannot take its answers fails alone; the pass goes on.
                if let Err(error) = asker.answer(sequence, &verdict) {
                    asker.fail(&error);
                }
                Ok(())
            },
        )?;
        self.last_passes.insert(partition, Instant::now());
        for session in touched {
            if let Some(asker) = self.sessions.get(&session) {
                asker.answered();
            }
        }
        Ok(())
    }

    /// Sends on what the last pass left about what is not ours any more.
    fn hand_over(&mut self) {
        let Some(hand) = &self.hand else { return };
        let mut kept = Vec::new();
        let handed = self.detector.hand_over(|session, what| {
            let ours = hand(session, what);
            if !ours.is_empty() {
                kept.push((session, ours));
            }
        });
        let claim = |(session, grants): &(_, Vec<_>)| self.detector.claim(*session, grants);
        if let Err(error) = handed.and_then(|()| kept.iter().try_for_each(claim)) {
            // Those who asked would wait for ever.
            report("questions to another host are lost", &error);
            self.fail_all(&error);
        }
    }

    fn obey(&mut self, command: Command) {
        let outcome = match command {
            Command::Register { session, asker } => {
                self.sessions.insert(session, asker);
                Ok(())
            }
            Command::Ask { session, requests } => {
                let asked = self.detector.submit(session, &requests);
                self.fail_if(session, asked)
            }
            Command::Release { session, grants } => {
                let released = self.detector.release(session, &grants);
                self.fail_if(session, released)
            }
            Command::Claim { session, grants } => self.detector.claim(session, &grants),
            Command::Keep { slices, hand } => {
                self.detector.keep(*slices);
                self.hand = Some(hand);
                Ok(())
            }
            Command::Waiting { session, waiting } => {
                if waiting {
                    self.waiting.insert(session);
                } else {
                    self.waiting.remove(&session);
                }
                Ok(())
            }
            Command::Learn { mut entries, position } => {
                let learned = self.detector.learn(&mut entries, position);
                if let Err(error) = &learned {
                    // Those who wait for these blocks would ask for ever.
                    self.fail_all(error);
                    self.refill_at = Some(Instant::now() + REFILL_AGAIN);
                }
                self.publish_figures();
                self.advanced();
                learned
            }
            Command::Withdraw { session } => {
                self.sessions.remove(&session);
                self.waiting.remove(&session);
                self.detector.withdraw(session);
                self.advanced();
                Ok(())
            }
            Command::Refill => {
                self.refill_at = Some(Instant::now());
                Ok(())
            }
            question => {
                self.reply(question);
                Ok(())
            }
        };
        if let Err(error) = outcome {
            report("the index could not take something in", &error);
        }
    }

    /// Answers who waits for it; one that does not any more needs no answer.
    fn reply(&mut self, question: Command) {
        match question {
            Command::Describe { reply } => drop(reply.send(self.describe())),
            Command::Entries { partition, after, reply } => {
                let entries = self.detector.export(partition, after, EXPORT_ENTRIES);
                let entries = entries.inspect_err(|error| self.heal(error));
                drop(reply.send(entries));
            }
            Command::Applied { reply } => drop(reply.send(self.detector.applied().clone())),
            Command::Rebuild { anew, reply } => drop(reply.send(self.rebuild(anew))),
            Command::Install { rebuilt, reply } => {
                drop(reply.send(self.detector.install(rebuilt)));
                self.publish_figures();
            }
            // None of these is a question.
            Command::Register { .. }
            | Command::Ask { .. }
            | Command::Release { .. }
            | Command::Claim { .. }
            | Command::Keep { .. }
            | Command::Waiting { .. }
            | Command::Learn { .. }
            | Command::Withdraw { .. }
            | Command::Refill
            | Command::Stop => {}
        }
    }

    /// A session whose questions are lost would wait for ever.
    fn fail_if(&self, session: SessionId, outcome: Result<()>) -> Result<()> {
        if let (Err(error), Some(asker)) = (&outcome, self.sessions.get(&session)) {
            asker.fail(error);
        }
        outcome
    }

    fn rebuild(&mut self, anew: Anew) -> Result<Option<Rebuild>> {
        let begun = match anew {
            Anew::Index => self.detector.rebuild().map(Some),
            Anew::Part(part) => self.detector.rebuild_as(part).map(Some),
            Anew::Partition(partition) => self.detector.rebuild_partition(partition),
        };
        begun.inspect_err(|error| self.heal(error))
    }

    fn describe(&self) -> Vec<PartitionReport> {
        let report = |partition: Partition| {
            let (entries, bytes) = self.detector.size_of(partition);
            let last = self.last_passes.get(&partition);
            PartitionReport {
                partition: partition.0,
                entries,
                bytes,
                waiting: self.detector.waiting(partition),
                last_pass_ms: last.map(|at| at.elapsed().as_millis() as u64),
            }
        };
        self.detector.partitions().map(report).collect()
    }

    fn publish_figures(&self) {
        let unique = self.detector.entries();
        self.figures.unique_blocks.store(unique, Ordering::Relaxed);
        self.figures.double_blocks.store(self.detector.duplicates(), Ordering::Relaxed);
        self.figures.index_bytes.store(self.detector.index_bytes(), Ordering::Relaxed);
    }

    fn advanced(&mut self) {
        self.figures.progress.fetch_add(1, Ordering::Release);
        self.has_advanced = true;
    }

    /// Tells the sessions, of which a cluster has thousands: once for all commands that came together.
    fn tell_advanced(&mut self) {
        if std::mem::take(&mut self.has_advanced) {
            let progress = self.figures.progress.load(Ordering::Acquire);
            self.sessions.values().for_each(|asker| asker.advanced(progress));
        }
    }
}

fn report(what: &str, error: &Error) {
    eprintln!("fleece-engine: {what}: {error}");
}
