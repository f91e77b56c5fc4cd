//! The beginning of a session, or its going on in another engine: what the plugin asks for,
//! checked against the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use super::Context;
use super::answers::Answers;
use super::event::{Event, QUEUE};
use super::handover::Patience;
use super::publish::DiskState;
use super::registry::{Live, Progress};
use super::stages::{Calls, Session};
use crate::error::{Context as _, Error, Kind, Result};
use crate::ids::{DiskId, SessionId, SnapshotId, VmId};
use crate::store::commit::{Fate, SnapshotKey};
use crate::store::container::{ContainerKind, Packer};
use crate::store::manifest::{Counts, MAX_CONFIG, MAX_DISK_SIZE, MAX_DISKS, Manifest, Record};
use crate::store::recipe::{RecipeReader, Shape};
use crate::store::sessions::SessionRecord;

/// What the plugin wants to back up.
#[derive(Clone, Debug)]
pub struct Request {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub vm_name: String,
    /// It takes over the snapshots of `vm` under another name.
    pub adopt: bool,
    /// Its disks, in the order in which they are scanned.
    pub disks: Vec<DiskSpec>,
    /// Its configuration.
    pub config: Vec<u8>,
    /// The hypervisor and its version.
    pub hypervisor: String,
}

/// A disk to back up.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// The disk.
    pub uuid: DiskId,
    /// Its name now.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The snapshot that its valid dirty bitmap names, as text; empty for a full read.
    pub parent: String,
}

/// How a disk is to be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskPlan {
    /// Only what is dirty.
    pub incremental: bool,
    /// Why not, where a parent was named.
    pub reason: String,
    /// Ranges (offset, length) to be read whatever the bitmap says.
    pub forced: Vec<(u64, u64)>,
}

/// A session that has begun.
pub struct Begun {
    /// The snapshot it will be.
    pub snapshot: SnapshotId,
    /// How its disks are to be read.
    pub disks: Vec<DiskPlan>,
    /// The client's end.
    pub client: ClientEnd,
    /// How far it is.
    pub progress: Arc<Progress>,
}

/// What became of a session whose engine is gone.
pub enum Resumed {
    /// It had been committed.
    Committed(Box<Manifest>),
    /// It goes on, from its first block.
    Begun(Begun),
}

/// The client's end of a session: the session ends with it, wherever it is dropped.
pub struct ClientEnd {
    /// Where the session's events go.
    pub events: Sender<Event>,
    /// Set while no client holds it.
    left: Arc<AtomicBool>,
}

impl ClientEnd {
    /// The client has it now, until it is dropped.
    pub fn hand_over(&self) {
        self.left.store(false, Ordering::Release);
    }
}

impl Drop for ClientEnd {
    fn drop(&mut self) {
        self.left.store(true, Ordering::Release);
        if let Err(TrySendError::Full(hangup)) = self.events.try_send(Event::Hangup) {
            let events = self.events.clone();
            // The thread works through its queue: a moment's wait, but not here.
            std::thread::spawn(move || drop(events.send(hangup)));
        }
    }
}

/// Forced ranges of one disk that a plan names; more are joined into one.
const FORCED_RANGES: usize = 4096;

/// Checks the request, enters the session here and in the store, starts its thread.
///
/// # Errors
/// [`Kind::Usage`] for a wrong request, [`Kind::NotPermitted`] for a name that another VM
/// has, [`Kind::Busy`] while the VM has a session.
pub fn begin(context: &Context, request: Request, now_ms: i64) -> Result<Begun> {
    let snapshot = new_snapshot_id()?;
    enter(context, request, snapshot, |request, latest| {
        let seq = context.manifests.next_seq(request.vm)?;
        register(context, request, latest, seq, snapshot, now_ms)?;
        Ok(seq)
    })
}

/// Goes on with a session that began in an engine that is gone: the same snapshot at the same
/// commit key, so that whichever of the two commits it, it is that point in time. What was sealed
/// before is in the index, and found like any other block.
///
/// # Errors
/// As [`begin`]; [`Kind::Failed`] where the session was ended, or the VM has a newer snapshot;
/// [`Kind::NotFound`] where it never began in this store.
pub fn resume(context: &Context, request: Request, snapshot: SnapshotId) -> Result<Resumed> {
    let (vm, manifests) = (request.vm, &context.manifests);
    let label = format!("{}@{snapshot}", request.vm_name);
    let fate = manifests.fate(vm, snapshot)?;
    let seq = match fate {
        Fate::Committed(seq) | Fate::Open(seq) => seq,
        Fate::Tombstoned(_) | Fate::Unreadable(_) => {
            let what = format!("{label} was ended while its engine was away");
            return Err(Error::new(Kind::Failed, what));
        }
        Fate::Unknown => {
            let what = format!("{label} never began in this store");
            return Err(Error::new(Kind::NotFound, what));
        }
    };
    let key = SnapshotKey { vm, seq, snapshot };
    if fate == Fate::Committed(seq)
        && let Record::Manifest(manifest) = manifests.read(&key)?
    {
        return Ok(Resumed::Committed(manifest));
    }
    let parent = manifests.session(&key)?.parent;
    let begun = enter(context, request, snapshot, |_, latest| {
        let latest = latest.map(|m| m.snapshot);
        if latest == parent {
            return Ok(seq);
        }
        let newest = latest.map_or("none".into(), |id| id.to_string());
        let what =
            format!("{label} cannot go on: the newest snapshot is another one now ({newest})");
        Err(Error::new(Kind::Failed, what))
    })?;
    Ok(Resumed::Begun(begun))
}

/// Enters a session and starts its thread; `number` gives its sequence, once what it is planned
/// with is known.
fn enter(
    context: &Context,
    request: Request,
    snapshot: SnapshotId,
    number: impl FnOnce(&Request, Option<&Manifest>) -> Result<u64>,
) -> Result<Begun> {
    check(&request)?;
    let (events, queue) = bounded(QUEUE);
    let live = Live {
        vm: request.vm,
        vm_name: request.vm_name.clone(),
        snapshot,
        since: Instant::now(),
        progress: Arc::default(),
        events,
        // Until the client has it, nobody knows whether it still waits.
        left: Arc::new(AtomicBool::new(true)),
    };
    // Entered first: from here on nobody else commits for this VM, so that what is planned
    // with the newest snapshot stays true.
    let id = context.registry.enter(live.clone())?;
    let begun = begin_alone(context, request, id, &live, queue, number);
    let begun = begun.map_err(|error| context.explain(error));
    if begun.is_err() {
        context.owners.withdraw(id);
        context.registry.leave(id);
    }
    begun
}

fn begin_alone(
    context: &Context,
    request: Request,
    id: SessionId,
    live: &Live,
    queue: Receiver<Event>,
    number: impl FnOnce(&Request, Option<&Manifest>) -> Result<u64>,
) -> Result<Begun> {
    let manifests = &context.manifests;
    if !request.adopt {
        manifests.check_name(request.vm, &request.vm_name)?;
    }
    let latest = manifests.latest(request.vm)?;
    if request.adopt && latest.is_none() {
        return Err(Error::new(
            Kind::NotFound,
            format!("there is no VM {} in the store that could be adopted", request.vm),
        ));
    }
    // What other hosts found damaged is read again, and not deduplicated against.
    context.damage.refresh(&context.store)?;
    let mut states = Vec::with_capacity(request.disks.len());
    let mut plans = Vec::with_capacity(request.disks.len());
    for spec in &request.disks {
        let (state, plan) = plan_disk(context, request.vm, spec, latest.as_ref())?;
        states.push(state);
        plans.push(plan);
    }
    let seq = number(&request, latest.as_ref())?;
    let begun = Begun {
        snapshot: live.snapshot,
        disks: plans,
        client: ClientEnd { events: live.events.clone(), left: Arc::clone(&live.left) },
        progress: Arc::clone(&live.progress),
    };
    let session = session(context, request, id, live, seq, latest, states)?;
    std::thread::Builder::new()
        .name(format!("session-{}", id.0))
        .spawn(move || session.run(&queue))
        .map_err(|e| Error::caused(Kind::Failed, "cannot start a session's thread", e))?;
    Ok(begun)
}

fn check(request: &Request) -> Result<()> {
    let wrong = |what: String| {
        Err(Error::new(Kind::Usage, format!("backup of VM {}: {what}", request.vm_name)))
    };
    if request.vm_name.is_empty() {
        return wrong("a VM needs a name".into());
    }
    if request.disks.is_empty() || request.disks.len() > MAX_DISKS {
        return wrong(format!("{} disks; 1 to {MAX_DISKS} are possible", request.disks.len()));
    }
    if request.config.len() > MAX_CONFIG {
        return wrong(format!("its configuration is larger than {} KiB", MAX_CONFIG >> 10));
    }
    for (i, disk) in request.disks.iter().enumerate() {
        if disk.size > MAX_DISK_SIZE {
            return wrong(format!(
                "disk {} of {} bytes; at most {MAX_DISK_SIZE} are possible",
                disk.name, disk.size
            ));
        }
        if request.disks[..i].iter().any(|d| d.uuid == disk.uuid || d.name == disk.name) {
            return wrong(format!("disk {} ({}) is named twice", disk.name, disk.uuid));
        }
    }
    Ok(())
}

/// Whether the disk can be read incrementally, from the store's point of view.
fn plan_disk(
    context: &Context,
    vm: VmId,
    spec: &DiskSpec,
    latest: Option<&Manifest>,
) -> Result<(DiskState, DiskPlan)> {
    let shape = Shape::new(spec.size, context.store.block_size());
    let before = latest.and_then(|m| m.disks.iter().find(|d| d.uuid == spec.uuid));
    let mut state = DiskState::new(spec, shape);
    let mut plan = DiskPlan { incremental: false, reason: String::new(), forced: Vec::new() };
    let Some(before) = before else {
        if !spec.parent.is_empty() {
            plan.reason = format!("disk is new since {}", spec.parent);
        }
        return Ok((state, plan));
    };
    if context.registry.is_mistrusted(vm) {
        plan.reason = "the recipes of its newest snapshot are damaged".into();
        return Ok((state, plan));
    }
    state.parent_root = before.root;
    state.parent_shape = Shape::new(before.size, context.store.block_size());
    if before.size == spec.size {
        // Every block is put again by a full read; nodes that come out the same are shared.
        state.root = before.root;
    }
    if spec.parent.is_empty() {
        return Ok((state, plan));
    }
    let newest = latest.map(|m| m.snapshot);
    let named = newest.filter(|id| id.as_str() == spec.parent);
    plan.reason = match named {
        None => match newest {
            // The newest snapshot may not be the bitmap's: then the bitmap misses changes.
            Some(newest) => {
                format!("its bitmap is of {}, the newest snapshot is {newest}", spec.parent)
            }
            None => format!("snapshot {} is not in the store", spec.parent),
        },
        Some(_) if before.size != spec.size => {
            format!("its size changed from {} to {} bytes", before.size, spec.size)
        }
        Some(_) => String::new(),
    };
    if plan.reason.is_empty() {
        match forced_ranges(context, &state) {
            Ok(forced) => {
                plan.incremental = true;
                plan.forced = forced;
                state.incremental = true;
            }
            Err(error) if error.kind() == Kind::Damaged => {
                plan.reason = format!("the parent's recipe is damaged ({error})");
                state.parent_root = None;
                state.root = None;
            }
            Err(error) => return Err(error).context(|| format!("disk {} of VM {vm}", spec.name)),
        }
    }
    Ok((state, plan))
}

/// What is damaged in the parent must be read again, whatever the bitmap says.
fn forced_ranges(context: &Context, state: &DiskState) -> Result<Vec<(u64, u64)>> {
    let damage = context.damage.map();
    if damage.is_empty() {
        return Ok(Vec::new());
    }
    let nodes = context.store.directories();
    let reader = RecipeReader::new(nodes, state.parent_root, state.parent_shape)?;
    let mut blocks = damage.forced_ranges(&reader)?;
    while blocks.len() > FORCED_RANGES {
        blocks = blocks
            .chunks(2)
            .map(|pair| match *pair {
                [(first, _), (last, count)] => (first, last + count - first),
                [one] => one,
                _ => (0, 0),
            })
            .collect();
    }
    let size = u64::from(context.store.block_size());
    Ok(blocks.into_iter().map(|(first, count)| (first * size, count * size)).collect())
}

/// Random: no two sessions of a VM ever have one name, whatever clocks and hosts say.
fn new_snapshot_id() -> Result<SnapshotId> {
    let bits = getrandom::u32()
        .map_err(|e| Error::caused(Kind::Failed, "the system gives no random numbers", e))?;
    Ok(SnapshotId::from_random(bits))
}

fn register(
    context: &Context,
    request: &Request,
    latest: Option<&Manifest>,
    seq: u64,
    snapshot: SnapshotId,
    now_ms: i64,
) -> Result<()> {
    let record = SessionRecord {
        snapshot,
        vm: request.vm,
        vm_name: request.vm_name.clone(),
        seq,
        parent: latest.map(|m| m.snapshot),
        host: context.host.clone(),
        engine: env!("CARGO_PKG_VERSION").into(),
        gc_epoch: 0,
        started_ms: now_ms,
        expires_ms: None,
    };
    if context.manifests.begin_session(&record)? {
        return Ok(());
    }
    Err(Error::new(
        Kind::Busy,
        format!("another host began {}@{snapshot} just now", request.vm_name),
    ))
}

/// A session with nothing done yet, known to the owner.
fn session(
    context: &Context,
    request: Request,
    id: SessionId,
    live: &Live,
    seq: u64,
    latest: Option<Manifest>,
    disks: Vec<DiskState>,
) -> Result<Session> {
    let answers = Arc::new(Answers::new(&context.work_dir, context.budget.session_sort / 2));
    let woken = Arc::new(AtomicBool::new(false));
    let wake = wake(live.events.clone(), Arc::clone(&woken));
    context.owners.register(id, &answers, &wake)?;
    let label = format!("{}@{}", request.vm_name, live.snapshot);
    Ok(Session {
        id,
        context: context.clone(),
        blocks: Packer::new(&context.store, ContainerKind::Blocks, label.clone()),
        nodes: Packer::new(&context.store, ContainerKind::Nodes, label),
        request,
        snapshot: live.snapshot,
        seq,
        // Of a snapshot that was read in full, nothing comes from an earlier one.
        parent: latest.filter(|_| disks.iter().any(|d| d.incremental)).map(|m| m.snapshot),
        progress: Arc::clone(&live.progress),
        disks,
        windows: std::collections::VecDeque::new(),
        next_sequence: 0,
        last_disk: 0,
        scan_ended: false,
        over: false,
        began: Instant::now(),
        answers,
        woken,
        calls: Calls::default(),
        patience: Patience::new(Instant::now()),
        failure: None,
        failed_by_itself: false,
        met: super::met::Met::default(),
    })
}

/// One wake in the queue is enough, and a full queue needs none: the session looks at its
/// answers after every event.
fn wake(events: Sender<Event>, woken: Arc<AtomicBool>) -> crate::part::Wake {
    Arc::new(move || {
        if !woken.swap(true, Ordering::AcqRel) && events.try_send(Event::Wake).is_err() {
            woken.store(false, Ordering::Release);
        }
    })
}

impl Progress {
    /// The figures as they are kept in a manifest.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let of = |figure: &std::sync::atomic::AtomicU64| figure.load(Ordering::Relaxed);
        Counts {
            read: of(&self.read),
            zero: of(&self.zero),
            unchanged: of(&self.unchanged),
            duplicate: of(&self.duplicate),
            new: of(&self.new),
            stored: of(&self.stored),
            undetected: of(&self.undetected),
        }
    }
}
