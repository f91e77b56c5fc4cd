//! A running VM: through QEMU, at one point in time of all its disks.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::messages::{Committed, DiskLine, Plan, PointInTime};
use super::resume::{Held, until_committed};
use super::{
    Admitted, Context, Failure, Identity, Options, Stop, alive, choose, commit, forced,
    forced_again, full_for_all, parent, transfer, within,
};
use crate::engine::{self, BackupPlan, BackupRequest, DiskRequest, Engine, Snapshot, SnapshotId};
use crate::error::{Context as _, Error, Kind, Result};
use crate::extents::PlanInput;
use crate::nbd::{ConnectOptions, NbdError, NbdTarget};
use crate::pace::{Pace, Reads};
use crate::progress::Report;
use crate::qmp::bitmap::{self, Action, DiskPlan, Fate, Known, KnownDisk};
use crate::qmp::disk::{self, Disk};
use crate::qmp::guard::{self, Guard};
use crate::qmp::load::Load;
use crate::qmp::recover;
use crate::qmp::running::Lock;
use crate::qmp::session::Session as Qemu;
use crate::qmp::view::{self, Outcome, View, Way};
use crate::read_limit::ReadLimit;
use crate::scan::ScanDisk;
use crate::source::{DiskSource, NbdDisk, READ_SIZE};
use crate::vms::Vm;

/// Between two looks at a view that nobody reads, or that is broken.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Bytes of reads in flight from a running VM: its QEMU answers them in the thread that serves the
/// guest, which waits behind them. Two reads of the scan and two of the writing keep hashing busy.
const LIVE_IN_FLIGHT: u32 = 4 * READ_SIZE;

/// What an NBD context of a dirty bitmap begins with.
const DIRTY_CONTEXT: &str = "qemu:dirty-bitmap:";

/// Backs up a running VM.
///
/// # Errors
/// Nothing was committed, and the VM is as it was.
pub async fn live(
    report: &Report,
    engine: &Engine,
    vm: &Vm,
    options: &Options,
    stop: &Stop,
) -> Result<()> {
    let begun = Instant::now();
    // Held until the end: one backup of a VM at a time.
    let _lock = match options.dry_run {
        true => None,
        false => {
            stop.unless(recover::wait_for_guard(&options.run_dir, vm)).await?;
            Some(Lock::take(&options.run_dir, &vm.qmp)?)
        }
    };
    let qemu = stop.unless(Qemu::connect(vm)).await?;
    let _vm_lock = match options.dry_run {
        true => None,
        false => Some(Lock::of_vm(&options.run_dir, qemu.identity().uuid)?),
    };
    let mut found = stop.unless(prepare(report, engine, &qemu, options)).await?;
    if options.dry_run {
        report.send(&found.message(engine, &qemu, options));
        return Ok(());
    }
    let config = stop.unless(qemu.configuration()).await?;
    let hypervisor = format!("QEMU {}", qemu.version());
    let mut request = found.identity.request(found.disk_requests(), config, hypervisor);
    let (mut plan, session) = stop.unless(engine.open_backup(&request)).await?;
    found.heed(&mut plan, &qemu);
    // What is asked for again after a restart of the engine.
    request.disks = found.disk_requests();
    report.send(&found.message(engine, &qemu, options));

    let context = Context { report, engine, options, stop };
    let mut admitted = Admitted { plan, session };
    // Not before the engine took the VM: one that it refuses must lose nothing.
    let result = match bitmap::carry_out(&qemu, &found.recovery).await {
        Ok(()) => backup(&context, (&qemu, vm), &found, &request, &mut admitted).await,
        Err(error) => Err(error.into()),
    };
    match result {
        Ok((snapshot, seen)) => {
            let mut message = Committed::new(&snapshot, begun.elapsed());
            (message.scratch_peak, message.scratch_max) =
                (seen.scratch_peak, Some(seen.scratch_max));
            message.paced_to = seen.paced_to;
            report.send(&message);
            Ok(())
        }
        Err(failure) => {
            // The guard may need the monitor now, and the next try must not find it at work.
            drop(qemu);
            failure.give_up(&admitted.session).await;
            // The failure is what is to be told, not what came after it.
            let _ = recover::wait_for_guard(&options.run_dir, vm).await;
            Err(failure.error)
        }
    }
}

fn spare_the_guest(plan: &mut BackupPlan) {
    plan.in_flight = plan.in_flight.min(LIVE_IN_FLIGHT);
}

/// The VM's disks and what is to be read of them.
struct Found {
    identity: Identity,
    disks: Vec<Disk>,
    skipped: Vec<(String, String)>,
    plans: Vec<DiskPlan>,
    /// What is to become of dead runs' bitmaps first.
    recovery: Vec<Action>,
    forced: Vec<Vec<std::ops::Range<u64>>>,
    latest: Option<Snapshot>,
}

/// Sets right what dead runs left, asks the engine what became of them, and plans.
async fn prepare(
    report: &Report,
    engine: &Engine,
    qemu: &Qemu,
    options: &Options,
) -> Result<Found> {
    let named = qemu.identity();
    let identity = Identity::new(named.uuid, &named.name, options);
    if named.derived && options.adopt.is_none() {
        let name = &named.name;
        report.note(&format!("{name} has no UUID (QEMU's -uuid): it is known by its name alone"));
    }
    if !options.dry_run {
        let mut ended = recover::Report::default();
        let result = recover::end_leftovers(&options.run_dir, qemu, &mut ended).await;
        ended
            .done
            .iter()
            .for_each(|what| report.note(&format!("left by a dead run, set right: {what}")));
        ended.left.iter().for_each(|what| report.warn(&format!("left by a dead run: {what}")));
        result?;
    }
    let listed = disk::list(qemu).await?;
    let labels: Vec<&str> = listed.disks.iter().map(|disk| disk.label.as_str()).collect();
    let is_called = |i: usize, word: &str| listed.disks[i].is_called(word);
    let chosen = choose(&identity.name, &labels, options, is_called)?;

    // All disks are planned, also those left out: a disk's bitmap claims its identity even then.
    let store = engine.info().store.to_string();
    let (fates, latest) = fates(engine, identity.uuid, &listed.disks, options).await?;
    let known_disks = known_disks(latest.as_ref());
    let latest_id = latest.as_ref().map_or("", |snapshot| snapshot.id.0.as_str());
    let known = Known { store: &store, fates: &fates, latest: latest_id, known: &known_disks };
    let plan = bitmap::plan(&listed.disks, known, Uuid::new_v4);
    let (disks, mut plans): (Vec<Disk>, Vec<DiskPlan>) =
        chosen.into_iter().map(|i| (listed.disks[i].clone(), plan.disks[i].clone())).unzip();
    if let Some(reason) = full_for_all(engine, identity.uuid, latest.as_ref(), options).await? {
        plans.iter_mut().for_each(|disk| disk.make_full(reason.as_str()));
    }
    let forced = vec![Vec::new(); disks.len()];
    let (skipped, recovery) = (listed.skipped, plan.recovery);
    Ok(Found { identity, disks, skipped, plans, recovery, forced, latest })
}

/// What became of the snapshots that the disks' bitmaps name. A dry run must not end any of
/// them: it only looks which ones are listed.
pub(super) async fn fates(
    engine: &Engine,
    vm: Uuid,
    disks: &[Disk],
    options: &Options,
) -> Result<(BTreeMap<String, Fate>, Option<Snapshot>)> {
    let named = bitmap::named_snapshots(disks, &engine.info().store.to_string());
    if options.dry_run {
        let mut snapshots = match engine.snapshots(&vm.to_string()).await {
            Err(error) if error.kind() == Kind::NotFound => Vec::new(),
            other => other?,
        };
        let listed = |id: &String| match snapshots.iter().any(|snapshot| snapshot.id.0 == *id) {
            true => Fate::Committed,
            false => Fate::Ended,
        };
        let fates = named.iter().map(|id| (id.clone(), listed(id))).collect();
        return Ok((fates, snapshots.pop()));
    }
    let ids: Vec<SnapshotId> = named.iter().cloned().map(SnapshotId).collect();
    let (fates, latest) = engine.settle(vm, &ids).await?;
    let fates = fates.into_iter().map(|fate| match fate {
        engine::Fate::Committed => Fate::Committed,
        engine::Fate::Ended => Fate::Ended,
    });
    Ok((named.into_iter().zip(fates).collect(), latest))
}

pub(super) fn known_disks(latest: Option<&Snapshot>) -> Vec<KnownDisk> {
    let disks = latest.map_or(&[][..], |snapshot| &snapshot.disks);
    disks
        .iter()
        .map(|disk| KnownDisk { uuid: disk.uuid, label: disk.name.clone(), size: disk.size })
        .collect()
}

impl Found {
    fn disk_requests(&self) -> Vec<DiskRequest> {
        let pairs = self.disks.iter().zip(&self.plans);
        pairs
            .map(|(disk, plan)| DiskRequest {
                uuid: plan.uuid,
                name: disk.label.clone(),
                size: disk.size,
                parent: parent(plan.parent()),
            })
            .collect()
    }

    /// Takes over what the engine decided.
    fn heed(&mut self, plan: &mut BackupPlan, qemu: &Qemu) {
        spare_the_guest(plan);
        let ways = view::ways_for(qemu, &self.disks);
        for (i, decided) in plan.disks.iter().enumerate() {
            if !decided.incremental && !self.plans[i].parent().is_empty() {
                self.plans[i].make_full(decided.reason.as_str());
            }
            self.forced[i] = forced(decided);
            // The image of a push holds what is dirty, and zeros in place of all else.
            let pushed = ways.get(i) == Some(&Way::Push);
            if pushed && !self.forced[i].is_empty() && !self.plans[i].parent().is_empty() {
                self.plans[i].make_full("parts of its last snapshot are damaged");
            }
        }
    }

    /// Bytes that the scan will go over.
    fn bytes(&self, i: usize) -> u64 {
        let (disk, plan) = (&self.disks[i], &self.plans[i]);
        if plan.parent().is_empty() {
            return disk.allocated.min(disk.size);
        }
        let bitmap = plan.bitmap.as_deref();
        let used = disk.bitmaps.iter().find(|b| Some(b.name.to_string().as_str()) == bitmap);
        used.map_or(0, |bitmap| bitmap.dirty)
    }

    /// The way that the disks will most likely need; the view decides.
    fn likely_way(&self, qemu: &Qemu) -> Way {
        view::ways_for(qemu, &self.disks).into_iter().max().unwrap_or(Way::Filter)
    }

    /// The view that they need.
    fn view(&self, engine: &Engine, snapshot: &str, options: &Options) -> view::Request {
        view::Request {
            store: engine.info().store.to_string(),
            snapshot: snapshot.to_owned(),
            disks: self.disks.iter().cloned().zip(self.plans.iter().cloned()).collect(),
            scratch_dir: options.scratch_dir.clone(),
            scratch_max: options.scratch_max,
            read_limit: options.read_limit,
            freeze: options.freeze,
            way: None,
        }
    }

    fn message(&self, engine: &Engine, qemu: &Qemu, options: &Options) -> Plan {
        let lines = self.disks.iter().zip(&self.plans).enumerate().map(|(i, (disk, plan))| {
            let id = plan.parent();
            let latest = self.latest.as_ref().filter(|latest| latest.id.0 == id);
            DiskLine {
                name: disk.label.clone(),
                uuid: plan.uuid,
                size: disk.size,
                incremental: !id.is_empty(),
                parent: parent(id).map(|id| id.0),
                parent_time_ms: latest.map(|latest| latest.time_ms),
                reason: match &plan.base {
                    bitmap::Base::Full { reason } => reason.clone(),
                    bitmap::Base::Incremental { .. } => String::new(),
                },
                bytes: self.bytes(i),
            }
        });
        let way = self.likely_way(qemu);
        Plan {
            vm: self.identity.name.clone(),
            uuid: self.identity.uuid,
            host: engine.info().host.clone(),
            hypervisor: format!("QEMU {}", qemu.version()),
            way: way.to_string(),
            means: way.means().to_owned(),
            disks: lines.collect(),
            skipped: self.skipped.clone(),
            dry_run: options.dry_run,
        }
    }
}

/// What only the plugin knows of a backup, bytes.
struct Seen {
    scratch_peak: u64,
    scratch_max: u64,
    /// A second.
    paced_to: Option<u64>,
}

/// From the guard to the end of the view. The VM is as it was when this returns an error, or the guard
/// sees to it.
async fn backup(
    context: &Context<'_>,
    (qemu, vm): (&Qemu, &Vm),
    found: &Found,
    request: &BackupRequest,
    admitted: &mut Admitted,
) -> std::result::Result<(Snapshot, Seen), Failure> {
    let Context { report, engine, options, stop } = *context;
    let program = std::env::current_exe().context(|| "cannot find our own program".to_owned())?;
    let log = options.run_dir.join("guard.log");
    let guard_options = guard::Options { program, log, run_dir: options.run_dir.clone() };
    let mut guard = Guard::spawn(&guard_options, vm)?;
    // Before the point in time: a guest that is busy is to be known as soon as there is something to read.
    let load = stop.unless(async { Ok(Load::of(qemu).await.ok()) }).await?;
    let before = load.map(|load| (load, Instant::now()));
    let snapshot = admitted.plan.snapshot.0.clone();
    let wanted = found.view(engine, &snapshot, options);
    let since = Instant::now();
    // A push copies before it returns; interrupted, the guard sets the VM right.
    let opening = Box::pin(View::open(qemu, &mut guard, wanted));
    let opening = within(options, since, opening);
    let mut view = stop.unless(alive(&admitted.session, opening)).await?;
    report.send(&PointInTime {
        vm: found.identity.name.clone(),
        snapshot,
        time_ms: view.point_in_time_ms(),
        frozen_seconds: view.frozen().map(|time| time.as_secs_f64()),
        stopped_seconds: Some(view.stopped().as_secs_f64()),
    });
    view.warnings().iter().for_each(|warning| report.warn(warning));

    let forced = found.forced.clone();
    let limit = Rc::new(ReadLimit::new(options.read_limit));
    let mut held = HeldView {
        context,
        qemu,
        found,
        view: &mut view,
        guard: &mut guard,
        forced,
        since,
        limit: Rc::clone(&limit),
        before: Cell::new(before),
    };
    let result = until_committed(context, request, &mut held, admitted).await;
    let seen = Seen {
        scratch_peak: view.scratch_peak(),
        scratch_max: view.scratch_cap(),
        paced_to: limit.slowest_pace(),
    };
    let outcome = match &result {
        Ok(_) => Outcome::Committed,
        Err(failure) if failure.ambiguous => Outcome::Unknown,
        Err(_) => Outcome::Failed,
    };
    let ended = view.teardown(qemu, outcome).await;
    match &ended {
        // If it cannot be told any more, its last word was the same.
        Ok(()) if outcome == Outcome::Unknown => drop(guard.done_but_unsettled()),
        Ok(()) => guard.done(),
        Err(error) => {
            let committed = if result.is_ok() { "committed, but " } else { "" };
            let name = &found.identity.name;
            report.warn(&format!(
                "{committed}the view did not end ({error}); run fleece cleanup {name}"
            ));
        }
    }
    result.map(|snapshot| (snapshot, seen))
}

/// A view of a running VM, until it is ended.
struct HeldView<'a> {
    context: &'a Context<'a>,
    qemu: &'a Qemu,
    found: &'a Found,
    view: &'a mut View,
    guard: &'a mut Guard,
    forced: Vec<Vec<std::ops::Range<u64>>>,
    since: Instant,
    limit: Rc<ReadLimit>,
    /// What the guest had been answered, and when; of the first attempt.
    before: Cell<Option<(Load, Instant)>>,
}

impl Held for HeldView<'_> {
    async fn attempt(&mut self, admitted: &Admitted) -> std::result::Result<Snapshot, Failure> {
        self.keep(self.read(admitted)).await?;
        self.view.still_valid(self.qemu).await?;
        let Context { stop, .. } = *self.context;
        stop.check()?;
        // From here on the outcome is the engine's word alone.
        self.guard.committing()?;
        let (time_ms, bitmaps) = (self.view.point_in_time_ms(), self.view.bitmaps());
        tokio::select! {
            result = commit(&admitted.session, (time_ms, &bitmaps), stop) => result,
            never = keep_guest_going(self.qemu, self.view) => match never {},
        }
    }

    async fn keep<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let Context { options, stop, .. } = *self.context;
        tokio::select! {
            result = within(options, self.since, work) => result,
            error = self.view.broken(self.qemu) => Err(error),
            error = stop.requested() => Err(error),
        }
    }

    async fn keep_unread<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let unless_unreadable = async {
            tokio::select! {
                result = work => result,
                error = self.unreadable() => Err(error),
            }
        };
        self.keep(unless_unreadable).await
    }

    fn begin_again(&mut self, plan: &mut BackupPlan) -> Result<()> {
        self.guard.not_committed()?;
        spare_the_guest(plan);
        self.forced = forced_again(&self.found.plans, plan)?;
        let targets = self.view.targets().iter().zip(&self.forced);
        // The image of a push holds what is dirty, and zeros in place of all else.
        let mut missing = targets.filter(|(target, forced)| {
            target.way == Way::Push && target.dirty_context.is_some() && !forced.is_empty()
        });
        match missing.next() {
            None => Ok(()),
            Some((target, _)) => {
                let what = format!(
                    "disk {}: parts of its last snapshot are damaged, and the copy in scratch lacks them",
                    target.export
                );
                Err(Error::new(Kind::Failed, what))
            }
        }
    }
}

impl HeldView<'_> {
    /// Returns when the view cannot be read any more. A filter's snapshot breaks without a word: only
    /// reads tell.
    async fn unreadable(&self) -> Error {
        let Err(error) = self.read_first_blocks().await;
        self.view.explain(self.qemu, error).await
    }

    async fn read_first_blocks(&self) -> Result<Infallible> {
        let mut disks = Vec::new();
        for target in self.view.targets() {
            let place = NbdTarget::unix(&target.socket, target.export.as_str());
            let options = ConnectOptions { connections: 1, ..ConnectOptions::default() };
            let disk = NbdDisk::connect(&place, options, None, false).await;
            let label = &target.export;
            disks.push((label, disk.context(|| format!("cannot read {label}"))?));
        }
        let block_size = u64::from(self.context.engine.info().block_size);
        loop {
            for (label, disk) in &disks {
                let first = disk.read(0, disk.size().min(block_size) as u32).await;
                first.context(|| format!("cannot read {label}"))?;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn read(&self, admitted: &Admitted) -> Result<()> {
        let found = self.found;
        let read = async {
            let disks = self.connect(&admitted.plan).await?;
            let total = (0..found.disks.len()).map(|i| match found.plans[i].parent().is_empty() {
                true => found.disks[i].size,
                false => found.bytes(i),
            });
            tokio::select! {
                result = transfer(self.context, admitted, disks, total.sum(), &self.limit) => result,
                never = self.keep_pace() => match never {},
            }
        };
        match read.await {
            // The view knows better why a read failed than the read itself.
            Err(error) if error.has_cause::<NbdError>() => {
                Err(self.view.explain(self.qemu, error).await)
            }
            outcome => outcome,
        }
    }

    /// Slows the reads down while the guest waits too long beside them; for no more than half of the time that
    /// the view may be held, so that the other half is left to end the backup.
    async fn keep_pace(&self) -> Infallible {
        let Context { options, .. } = *self.context;
        let most = options.max_hold / 2;
        let (mut pace, mut before) = (Pace::default(), self.before.take());
        let mut read = self.limit.admitted();
        while options.pacing && self.since.elapsed() < most && self.view.bears_slow_reads() {
            // A QEMU that does not answer is noticed by who watches the view.
            let Ok(load) = Load::of(self.qemu).await else { break };
            let (now, admitted) = (Instant::now(), self.limit.admitted());
            let (then, at) = before.replace((load, now)).unwrap_or((load, now));
            let (reads, time) = pace.next(&load.since(&then), admitted - read, now - at);
            read = admitted;
            self.limit.pace(now, reads, time);
            tokio::time::sleep(time).await;
        }
        self.limit.pace(Instant::now(), Reads::Freely, Duration::ZERO);
        std::future::pending().await
    }

    async fn connect(&self, plan: &BackupPlan) -> Result<Vec<ScanDisk<NbdDisk>>> {
        let found = self.found;
        let share = plan.in_flight / u32::try_from(found.disks.len()).unwrap_or(u32::MAX).max(1);
        let mut disks = Vec::new();
        for (i, target) in self.view.targets().iter().enumerate() {
            let place = NbdTarget::unix(&target.socket, target.export.as_str());
            let context = target.dirty_context.as_deref();
            let bitmap = context.map(|name| name.strip_prefix(DIRTY_CONTEXT).unwrap_or(name));
            let options = ConnectOptions {
                in_flight: share.max(super::LEAST_IN_FLIGHT),
                ..ConnectOptions::default()
            };
            let source = NbdDisk::connect(&place, options, bitmap, true)
                .await
                .context(|| format!("cannot read {}", found.disks[i].label))?;
            let size = found.disks[i].size;
            let input = PlanInput {
                size,
                block_size: self.context.engine.info().block_size,
                dirty_until: bitmap.map(|_| size),
                forced: self.forced[i].clone(),
            };
            disks.push(ScanDisk { source: Rc::new(source), input });
        }
        Ok(disks)
    }
}

/// What breaks the view is no news any more, but a guest that its full scratch paused must go on.
async fn keep_guest_going(qemu: &Qemu, view: &View) -> Infallible {
    loop {
        view.broken(qemu).await;
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
