//! The sessions that live in this engine.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::event::Event;
use crate::error::{Error, Kind, Result};
use crate::ids::{HostId, SessionId, SnapshotId, VmId};

/// Figures of a session that others may read while it runs. Bytes of disk, but for
/// `stored` (bytes of containers) and `requested` (blocks).
#[derive(Default, Debug)]
pub struct Progress {
    /// Everything the scan reported.
    pub read: AtomicU64,
    /// Of it, zeros.
    pub zero: AtomicU64,
    /// Of it, equal to the parent at the same place.
    pub unchanged: AtomicU64,
    /// Of it, stored already or written by another session.
    pub duplicate: AtomicU64,
    /// Of it, packed by this session.
    pub new: AtomicU64,
    /// Bytes of the containers written.
    pub stored: AtomicU64,
    /// Packed although the index may have it: another writer was silent, or a shard was wrong.
    pub undetected: AtomicU64,
    /// Fingerprints that were asked about.
    pub requested: AtomicU64,
    stage: Mutex<Stage>,
}

/// The stage that a session is in, and the time that each one took so far.
#[derive(Debug)]
struct Stage {
    name: StageName,
    since: Instant,
    spent: [Duration; STAGES],
}

impl Default for Stage {
    fn default() -> Self {
        Stage { name: StageName::Scan, since: Instant::now(), spent: [Duration::ZERO; STAGES] }
    }
}

/// The number of stages.
pub const STAGES: usize = 5;

/// What a session is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StageName {
    /// The plugin scans.
    Scan,
    /// It waits for answers.
    Detect,
    /// The plugin writes what was granted.
    Write,
    /// Other sessions write the rest.
    Settle,
    /// Recipes and the manifest are written.
    Publish,
}

impl StageName {
    /// All of them, in their order.
    pub const ALL: [StageName; STAGES] = [
        StageName::Scan,
        StageName::Detect,
        StageName::Write,
        StageName::Settle,
        StageName::Publish,
    ];

    /// The stage's name for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            StageName::Scan => "scan",
            StageName::Detect => "detect",
            StageName::Write => "write",
            StageName::Settle => "settle",
            StageName::Publish => "publish",
        }
    }
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the stage.
    pub fn enter(&self, name: StageName) {
        let mut stage = self.lock();
        if stage.name == name {
            return;
        }
        let now = Instant::now();
        let (left, since) = (stage.name, stage.since);
        stage.spent[left as usize] += now.saturating_duration_since(since);
        (stage.name, stage.since) = (name, now);
    }

    /// The stage's name for people.
    #[must_use]
    pub fn stage(&self) -> &'static str {
        self.lock().name.name()
    }

    /// The time that each of [`StageName::ALL`] took so far. A scan that goes on while the window
    /// before it is written counts as the writing.
    #[must_use]
    pub fn stage_times(&self) -> [Duration; STAGES] {
        let stage = self.lock();
        let mut spent = stage.spent;
        spent[stage.name as usize] += stage.since.elapsed();
        spent
    }

    /// Of `placed` bytes that were asked about, what was not packed here was elsewhere.
    pub fn set_duplicate(&self, placed: u64) {
        let new = self.new.load(Ordering::Relaxed);
        self.duplicate.store(placed.saturating_sub(new), Ordering::Relaxed);
    }

    /// Adds to a figure.
    pub fn add(figure: &AtomicU64, n: u64) {
        figure.fetch_add(n, Ordering::Relaxed);
    }
}

/// A session as others see it.
#[derive(Clone)]
pub struct Live {
    /// Whose.
    pub vm: VmId,
    /// The VM's name.
    pub vm_name: String,
    /// The snapshot it will be.
    pub snapshot: SnapshotId,
    /// Since when.
    pub since: Instant,
    /// How far it is.
    pub progress: Arc<Progress>,
    /// Its queue.
    pub events: Sender<Event>,
    /// Its client is gone, or does not have it yet.
    pub left: Arc<AtomicBool>,
}

/// All of them.
#[derive(Default)]
pub struct Registry {
    live: Mutex<HashMap<SessionId, Live>>,
    host: HostId,
    next: AtomicU32,
    /// VMs whose newest recipes could not be read: their next backup builds new ones.
    mistrusted: Mutex<HashSet<VmId>>,
    /// The engine ends.
    closed: AtomicBool,
}

impl Registry {
    /// On a host of a cluster. Numbers begin at `first`: others may still know those of a process
    /// before this one.
    #[must_use]
    pub fn on(host: HostId, first: u32) -> Self {
        Registry { host, next: AtomicU32::new(first), ..Registry::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a session.
    ///
    /// # Errors
    /// [`Kind::Busy`] while the VM has another one.
    pub fn enter(&self, live: Live) -> Result<SessionId> {
        let mut sessions = self.lock();
        if sessions.values().any(|other| other.vm == live.vm) {
            return Err(busy(&live.vm_name));
        }
        let id = SessionId::on(self.host, self.next.fetch_add(1, Ordering::Relaxed));
        sessions.insert(id, live);
        Ok(id)
    }

    /// The newest recipes of this VM cannot be read.
    pub fn mistrust(&self, vm: VmId) {
        self.mistrusted.lock().unwrap_or_else(PoisonError::into_inner).insert(vm);
    }

    /// Whether the newest recipes of this VM are known to be unreadable.
    #[must_use]
    pub fn is_mistrusted(&self, vm: VmId) -> bool {
        self.mistrusted.lock().unwrap_or_else(PoisonError::into_inner).contains(&vm)
    }

    /// This VM has new recipes.
    pub fn trust(&self, vm: VmId) {
        self.mistrusted.lock().unwrap_or_else(PoisonError::into_inner).remove(&vm);
    }

    /// The engine ends: sessions lose their clients by it, not the other way round, and stay open in
    /// the store.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Whether the engine ends.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Removes a session at its end.
    pub fn leave(&self, id: SessionId) {
        self.lock().remove(&id);
    }

    /// Fails while the VM has a session.
    ///
    /// # Errors
    /// [`Kind::Busy`].
    pub fn must_be_idle(&self, vm: VmId) -> Result<()> {
        match self.lock().values().find(|live| live.vm == vm) {
            Some(live) => Err(busy(&live.vm_name)),
            None => Ok(()),
        }
    }

    /// Whether the VM has a session that will end by itself or be somebody's in a moment: its client is
    /// gone, or was not told yet.
    #[must_use]
    pub fn is_ending(&self, vm: VmId) -> bool {
        self.lock().values().any(|live| live.vm == vm && live.left.load(Ordering::Acquire))
    }

    /// The queue of a session, if it lives.
    #[must_use]
    pub fn events_of(&self, id: SessionId) -> Option<Sender<Event>> {
        self.lock().get(&id).map(|live| live.events.clone())
    }

    /// All sessions, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<Live> {
        let mut all: Vec<Live> = self.lock().values().cloned().collect();
        all.sort_by_key(|live| live.since);
        all
    }
}

fn busy(vm: &str) -> Error {
    Error::new(
        Kind::Busy,
        format!(
            "VM {vm} is being backed up already (see `fleecectl sessions`; `fleece abort {vm}` ends it)"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stages_times_add_up_to_the_sessions() {
        let begun = Instant::now();
        let progress = Progress::default();
        for stage in [StageName::Scan, StageName::Write, StageName::Scan, StageName::Publish] {
            progress.enter(stage);
            let entered = Instant::now();
            while entered.elapsed() < Duration::from_millis(3) {
                std::hint::spin_loop();
            }
        }
        assert_eq!(progress.stage(), "publish");
        let times = progress.stage_times();
        let of = |stage: StageName| times[stage as usize];
        assert!(of(StageName::Scan) >= Duration::from_millis(6), "{times:?}");
        assert!(of(StageName::Write) >= Duration::from_millis(3), "{times:?}");
        assert_eq!(of(StageName::Detect), Duration::ZERO);
        assert!(times.iter().sum::<Duration>() <= begun.elapsed());
    }
}
