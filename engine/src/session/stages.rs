//! The session's thread: events in, and after each one as far as it goes.
//!
//! A window is scanned while the one before it is written. Nothing here waits for
//! another session: what others write is asked about again later.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::Context;
use super::answers::Answers;
use super::begin::Request;
use super::event::{Event, Grants, Reply};
use super::handover::Patience;
use super::met::Met;
use super::publish::{DiskState, place_window};
use super::registry::{Progress, StageName};
use super::window::{Settled, Window};
use crate::detect::{JournalPosition, Verdict};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, Fingerprint, Sequence, SessionId, SnapshotId};
use crate::store::Store;
use crate::store::commit::Ending;
use crate::store::container::{Packer, SlotInfo};
use crate::store::manifest::Tombstone;
use crate::store::recipe::StoredNodes;

/// Windows open at once: one is written while the next is scanned.
const OPEN_WINDOWS: usize = 2;
/// How often a session looks at the clock while it waits for others.
const TICK: Duration = Duration::from_millis(50);
/// Blocks with a wrong address that are remembered while verdicts are gone through: 2 MiB.
const WRONG_KEPT: usize = 32_768;
/// A session, as its thread knows it.
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) context: Context,
    pub(super) request: Request,
    pub(super) snapshot: SnapshotId,
    pub(super) seq: u64,
    pub(super) parent: Option<SnapshotId>,
    pub(super) progress: Arc<Progress>,
    pub(super) disks: Vec<DiskState>,
    pub(super) windows: VecDeque<Window>,
    pub(super) next_sequence: u64,
    pub(super) last_disk: u16,
    pub(super) scan_ended: bool,
    /// Committed, or ended by a tombstone.
    pub(super) over: bool,
    pub(super) began: Instant,
    pub(super) answers: Arc<Answers>,
    pub(super) blocks: Packer,
    pub(super) nodes: Packer,
    /// A wake is in the queue: no further one is sent.
    pub(super) woken: Arc<AtomicBool>,
    pub(super) calls: Calls,
    pub(super) patience: Patience,
    pub(super) failure: Option<(Kind, String)>,
    /// That was not because the engine ends.
    pub(super) failed_by_itself: bool,
    /// Damage that was met and is not recorded yet.
    pub(super) met: Met,
}

/// Calls of the plugin that are not answered yet.
#[derive(Default)]
pub(super) struct Calls {
    end_window: Option<Reply<()>>,
    pub(super) grants: Option<Reply<Grants>>,
}

impl Session {
    /// Runs until the commit, or until the plugin is gone.
    pub(super) fn run(mut self, events: &Receiver<Event>) {
        loop {
            let event = match events.recv_timeout(TICK) {
                Ok(Event::Hangup) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
            };
            let ended = event.is_some_and(|event| self.take(event));
            self.record_met();
            if self.failure.is_none()
                && let Err(error) = self.advance()
            {
                self.fail(&self.context.explain(error));
            }
            if ended {
                break;
            }
        }
        self.give_back();
        self.record_met();
        // Its client lives, and goes on with it in the next engine.
        if self.failed_by_itself || !self.context.registry.is_closed() {
            self.end_in_store();
        }
    }

    /// Takes an event in; `true` when the session is over.
    fn take(&mut self, event: Event) -> bool {
        match event {
            Event::Submit { disk, extents, fingerprints, reply } => {
                let outcome = self.guarded(|s| s.submit(disk, &extents, &fingerprints));
                let _ = reply.send(outcome);
            }
            Event::Write { runs, data, reply } => {
                let outcome = self.guarded(|s| s.write(&runs, &data));
                let _ = reply.send(outcome);
            }
            Event::Lend { disk, file, alone, reply } => {
                let outcome = self.guarded(|s| s.lend(disk, file));
                // Before the answer, which the next one may follow at once.
                drop(alone);
                let _ = reply.send(outcome);
            }
            Event::WriteLent { runs, alone, reply } => {
                let outcome = self.guarded(|s| s.write_lent(&runs));
                drop(alone);
                let _ = reply.send(outcome);
            }
            Event::EndWindow(reply) => match self.guarded(Session::end_window) {
                Ok(()) => self.calls.end_window = Some(reply),
                Err(error) => drop(reply.send(Err(error))),
            },
            Event::EndScan(reply) => {
                let outcome = self.guarded(|s| {
                    s.scan_ended = true;
                    s.end_window()
                });
                let _ = reply.send(outcome);
            }
            Event::Grants(reply) => match self.guarded(|_| Ok(())) {
                Ok(()) => self.calls.grants = Some(reply),
                Err(error) => drop(reply.send(Err(error))),
            },
            Event::Commit { point_in_time_ms, bitmaps, reply } => {
                self.progress.enter(StageName::Publish);
                self.give_back();
                let outcome = self.guarded(|s| s.commit(point_in_time_ms, bitmaps));
                let ended = outcome.is_ok();
                if ended {
                    // Whoever hears of the commit may begin the next backup at once.
                    self.leave();
                }
                let _ = reply.send(outcome);
                return ended;
            }
            Event::Abort { reason, reply } => {
                self.failure.get_or_insert((Kind::Failed, reason));
                self.give_back();
                self.end_in_store();
                self.leave();
                let _ = reply.send(Ok(()));
                return true;
            }
            Event::GiveUp { to, claims } => {
                // A session that failed holds no grants any more: nothing to give up.
                let _ = self.guarded(|s| s.give_up(&claims));
                // A full queue: the other one asks again.
                let _ = self.context.tell(to, Event::GaveUp { from: self.id });
            }
            Event::GaveUp { from } => {
                let _ = self.guarded(|s| s.gave_up(from));
            }
            Event::Wake => self.woken.store(false, Ordering::Release),
            Event::Hangup => {}
        }
        false
    }

    /// Does something unless the session has failed; an error fails it.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some((kind, message)) = &self.failure {
            return Err(Error::new(*kind, message.clone()));
        }
        let outcome = work(self).map_err(|error| self.context.explain(error));
        if let Err(error) = &outcome {
            self.fail(error);
        }
        outcome
    }

    fn fail(&mut self, error: &Error) {
        let message = format!("{}@{}: {error}", self.request.vm_name, self.snapshot);
        eprintln!("fleece-engine: {message}");
        self.give_back();
        if let Some(reply) = self.calls.grants.take() {
            let _ = reply.send(Err(Error::new(error.kind(), message.clone())));
        }
        if let Some(reply) = self.calls.end_window.take() {
            let _ = reply.send(Err(Error::new(error.kind(), message.clone())));
        }
        self.failure = Some((error.kind(), message));
        self.failed_by_itself = !self.context.registry.is_closed();
        // What is durable is found by others, although this session will not use it.
        let leftovers = [self.blocks.take_leftovers(), self.nodes.take_leftovers()];
        for container in leftovers.iter().flatten() {
            // Without its owner the engine is ending.
            let _ = self.learn(container);
        }
        // Others need not wait for what we will never write.
        self.context.owners.withdraw(self.id);
    }

    /// The window that is being scanned.
    pub(super) fn scanning(&mut self) -> Result<&mut Window> {
        self.windows
            .back_mut()
            .filter(|window| !window.scanned)
            .ok_or_else(|| Error::new(Kind::Usage, "no window is open"))
    }

    /// Begins a window if none is being scanned.
    pub(super) fn open_window(&mut self) -> Result<()> {
        if self.windows.back().is_some_and(|window| !window.scanned) {
            return Ok(());
        }
        if self.windows.len() >= OPEN_WINDOWS {
            return Err(Error::new(
                Kind::Usage,
                "batch of the scan: the window before is not written yet; wait for endWindow",
            ));
        }
        let run_bytes = self.context.budget.session_sort / 2;
        let window =
            Window::begin(&self.context.work_dir, run_bytes, self.next_sequence, &self.answers)?;
        self.windows.push_back(window);
        Ok(())
    }

    fn end_window(&mut self) -> Result<()> {
        if let Some(window) = self.windows.back_mut() {
            window.scanned = true;
        }
        Ok(())
    }

    /// Goes as far as it can.
    fn advance(&mut self) -> Result<()> {
        if let Some(error) = self.answers.failure() {
            return Err(error);
        }
        while self.advance_front()? {}
        if self.windows.len() < OPEN_WINDOWS
            && let Some(reply) = self.calls.end_window.take()
        {
            let _ = reply.send(Ok(()));
        }
        self.answer_grants()
    }

    /// One step of the oldest window; `false` when it must wait.
    fn advance_front(&mut self) -> Result<bool> {
        self.tell_waiting()?;
        let Some(window) = self.windows.front_mut() else {
            // After the last window only the commit is to come.
            if !self.scan_ended {
                self.progress.enter(StageName::Scan);
            }
            return Ok(false);
        };
        if window.is_answered(&self.answers) {
            self.settle()?;
            self.progress.enter(StageName::Write);
            return Ok(true);
        }
        if window.waits_for_answers() {
            self.progress.enter(StageName::Detect);
            return Ok(false);
        }
        if window.is_written()? {
            window.end_writing()?;
            self.seal_blocks()?;
            let first_time = self.patience.own_ended.is_none();
            self.patience.own_ended.get_or_insert_with(Instant::now);
            self.patience.silent = None;
            // Our own duplicates are stored now; others' may be.
            return if first_time { self.ask_again() } else { Ok(true) };
        }
        if window.is_settled() {
            self.finish_front()?;
            return Ok(true);
        }
        if window.waiting()?.is_some() {
            self.progress.enter(StageName::Settle);
            return self.wait_for_others();
        }
        Ok(false)
    }

    fn tell_waiting(&mut self) -> Result<()> {
        let waiting = self.windows.front().is_some_and(Window::waits_for_answers);
        if waiting != self.patience.told_waiting {
            self.context.owners.waiting(self.id, waiting)?;
            self.patience.told_waiting = waiting;
        }
        Ok(())
    }

    /// Goes through the front window's verdicts: none is used that its container's
    /// directory does not confirm.
    fn settle(&mut self) -> Result<()> {
        let Some(window) = self.windows.front_mut() else { return Ok(()) };
        let (store, progress, id) = (&self.context.store, &self.progress, self.id);
        let (silent, met) = (self.patience.silent, &mut self.met);
        let block = u64::from(store.block_size());
        // Of a block whose address is wrong, the first is written; the others find it then.
        let mut wrong: HashMap<Fingerprint, Sequence> = HashMap::new();
        window.settle(&self.answers, |question, verdict| match verdict {
            Some(Verdict::Grant) => Ok(Settled::Ours),
            // Its owner is cut off.
            None => {
                Progress::add(&progress.undetected, block);
                Ok(Settled::Ours)
            }
            Some(Verdict::SameAs(session, _)) if Some(session) == silent => {
                Progress::add(&progress.undetected, block);
                Ok(Settled::Ours)
            }
            Some(Verdict::SameAs(session, sequence)) => Ok(Settled::Later(session, sequence)),
            Some(Verdict::Stored(address)) => {
                if let Some(at) = confirmed(store, address, question.fingerprint, met)? {
                    return Ok(Settled::At(at));
                }
                if let Some(first) = wrong.get(&question.fingerprint) {
                    return Ok(Settled::Later(id, *first));
                }
                if wrong.len() < WRONG_KEPT {
                    wrong.insert(question.fingerprint, question.sequence);
                }
                Progress::add(&progress.undetected, block);
                Ok(Settled::Ours)
            }
        })
    }

    fn finish_front(&mut self) -> Result<()> {
        let Some(window) = self.windows.pop_front() else { return Ok(()) };
        self.answers.close_oldest();
        let directories = self.context.store.directories();
        let mut nodes = StoredNodes::new(directories, &mut self.nodes);
        if let Err(error) = place_window(window, &mut self.disks, &mut nodes) {
            if matches!(error.kind(), Kind::Damaged | Kind::NotFound) {
                self.recipe_is_lost();
            }
            return Err(error);
        }
        self.seal_nodes()?;
        self.patience = Patience::new(Instant::now());
        let open: u64 = self.windows.iter().map(|window| window.end - window.first).sum();
        let placed = (self.next_sequence - open) * u64::from(self.context.store.block_size());
        self.progress.set_duplicate(placed);
        Ok(())
    }

    /// Creates the tombstone, unless the manifest stands there.
    pub(super) fn end_record(&self, reason: &str) -> Result<Ending> {
        self.context.manifests.tombstone(&Tombstone {
            snapshot: self.snapshot,
            vm: self.request.vm,
            seq: self.seq,
            reason: reason.to_owned(),
            time_ms: jiff::Timestamp::now().as_millisecond(),
        })
    }

    /// Ends a session that did not commit: a tombstone, so that its bitmaps can be merged back.
    fn end_in_store(&mut self) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        let reason = self.failure.as_ref().map_or("the plugin is gone", |(_, message)| message);
        if let Err(error) = self.end_record(reason) {
            eprintln!(
                "fleece-engine: cannot end {}@{} in the store (the next backup does): {error}",
                self.request.vm_name, self.snapshot
            );
        }
    }

    /// Others need not wait for this session any more, and its VM is free.
    fn leave(&mut self) {
        self.context.owners.withdraw(self.id);
        self.context.registry.leave(self.id);
    }
}

/// Where a block is, if its container's directory says that it is there. A shard may be
/// wrong and a block damaged: then the block is new. A directory that is damaged is noted.
fn confirmed(
    store: &Store,
    address: Address,
    fingerprint: Fingerprint,
    met: &mut Met,
) -> Result<Option<Address>> {
    let directories = store.directories();
    let mut at = |address| -> Result<SlotInfo> {
        match directories.slot(address) {
            Err(error) if error.kind() == Kind::Damaged => {
                met.note(directories, address, &error);
                Ok(SlotInfo::Damaged)
            }
            Err(error) if error.kind() == Kind::NotFound => Ok(SlotInfo::Missing),
            slot => slot,
        }
    };
    let (address, slot) = match at(address)? {
        SlotInfo::Forward(further) => (further, at(further)?),
        slot => (address, slot),
    };
    Ok((slot == SlotInfo::Present(fingerprint)).then_some(address))
}

/// A place in the store's journal, as detection counts it.
pub(crate) fn position(at: crate::store::journal::Position) -> JournalPosition {
    JournalPosition { incarnation: at.incarnation, n: u64::from(at.n) }
}

/// However the thread ends, others need not wait for it, and its VM is free.
impl Drop for Session {
    fn drop(&mut self) {
        self.leave();
    }
}
