//! The point in time itself: what is put into QEMU before it, at it, and right after it.

use crate::error::{Error, Kind, Result};
use crate::qmp::bitmap::{Base, DiskPlan};
use crate::qmp::command as cmd;
use crate::qmp::disk::{self, Disk};
use crate::qmp::end::{Pair, set_drive};
use crate::qmp::guard::Guard;
use crate::qmp::names::Names;
use crate::qmp::scratch::Scratch;
use crate::qmp::session::{CallError, Called, Session};
use crate::qmp::view::Way;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Seconds that a guest's write waits for the copy of what it overwrites; then the view breaks.
/// Local scratch answers in milliseconds, and guests' own time limits are 30 s and more.
const CBW_TIMEOUT: u64 = 10;
/// While the guest stands still or is frozen, no command may take long (Windows thaws after 10 s).
const SHORT: Duration = Duration::from_secs(10);

/// One disk of a view.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) disk: Disk,
    pub(crate) plan: DiskPlan,
    pub(crate) way: Way,
    pub(crate) names: Names,
    /// The bitmap that begins at the point in time.
    pub(crate) new: String,
    /// Bytes per second that a push may copy; 0 for no limit, as QEMU has it.
    pub(crate) speed: u64,
}

impl Part {
    /// The bitmap that is read, and therefore stops recording.
    pub(crate) fn dirty(&self) -> Option<&str> {
        match self.plan.base {
            Base::Incremental { .. } => self.plan.bitmap.as_deref(),
            Base::Full { .. } => None,
        }
    }

    pub(crate) fn pair(&self) -> Pair {
        Pair {
            node: self.disk.node.clone(),
            new: self.new.clone(),
            old: self.dirty().map(str::to_owned),
        }
    }

    fn add_new(&self) -> Value {
        json!({"node": self.disk.node, "name": self.new, "persistent": self.disk.persistent})
    }
}

/// When it was, and what it cost the guest.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Instants {
    /// Unix milliseconds.
    pub(crate) time_ms: i64,
    /// The CPUs stood still.
    pub(crate) stopped: Duration,
}

/// The best way for each disk of one view, or the one that was asked for if it is possible.
///
/// A guest with an iothread must not be stopped for it: `cont` aborts QEMU 7.2 while a job runs (12 of
/// 854 rounds), and on QEMU 10 `stop` and `cont` alone, with nothing of ours in between, now and then
/// leave a write waiting for ever, its queue empty (seen on 10.0.2 with TCG). Filters of several disks
/// need the stop; jobs and pushes are one transaction and need none. Besides, 7.2 aborts when the
/// client of such a disk's view leaves: there nothing but a push is left.
pub(crate) fn choose(session: &Session, disks: &[Disk], asked: Option<Way>) -> Result<Vec<Way>> {
    let safe = session.features().iothread_safe;
    let no_stop = disks.len() > 1 && disks.iter().any(|disk| disk.iothread);
    let refuse = |disk: &Disk, why: &str| {
        let text = format!("VM {}: disk {}: {why}", session.identity().name, disk.label);
        Err(Error::new(Kind::Usage, text))
    };
    let choose_one = |disk: &Disk| {
        let pull_kills = disk.iothread && !safe;
        let can_filter = session.features().filter && disk.qdev.is_some();
        match asked {
            Some(Way::Push) => Ok(Way::Push),
            Some(_) if pull_kills => {
                refuse(disk, "this QEMU would abort; with an iothread, only push is possible")
            }
            Some(Way::Filter) if no_stop => {
                refuse(disk, "filters of several disks need a stop, which iothreads do not bear")
            }
            Some(Way::Filter) if !can_filter => {
                refuse(disk, "no filter can be put between it and its device")
            }
            Some(way) => Ok(way),
            None if pull_kills => Ok(Way::Push),
            None if can_filter && !no_stop => Ok(Way::Filter),
            None => Ok(Way::Job),
        }
    };
    disks.iter().map(choose_one).collect()
}

/// A job's copy that fails fails the guest's write, and only the device's default pauses the guest then.
///
/// # Errors
/// `Usage`: a disk that is copied by a job would give the guest the error, or say that it wrote.
pub(crate) async fn pauses_on_errors(session: &Session, parts: &[Part]) -> Result<()> {
    for part in parts.iter().filter(|part| part.way != Way::Filter) {
        let Some(device) = &part.disk.qdev else { continue };
        let does = disk::property(session, device, "werror").await?;
        if let Some(does) = does.filter(|does| matches!(does.as_str(), "report" | "ignore")) {
            let text = format!(
                "VM {}: disk {}: its device has werror={does} (libvirt: error_policy), so a full scratch would \
                 reach the guest as a failed or a lost write; take that away, or its iothread",
                session.identity().name,
                part.disk.label
            );
            return Err(Error::new(Kind::Usage, text));
        }
    }
    Ok(())
}

/// The NBD server: QEMU has one, and it may be someone else's.
pub(crate) async fn start_server(
    session: &Session,
    guard: &mut Guard,
    socket: &Path,
) -> Result<()> {
    // No limit: QEMU's own, 100, is too little for some 25 disks with several connections each. The
    // socket is in a directory that is closed to others (mode 0700), so nobody else can connect.
    let address = json!({"addr": {"type": "unix", "data": {"path": socket}}, "max-connections": 0});
    guard.tell(|state| state.server = true)?;
    let result = session.call(cmd::NbdStart(address), "").await;
    if let Err(error) = &result {
        if matches!(error, CallError::Refused { .. }) {
            guard.tell(|state| state.server = false)?;
        }
        if error.desc().contains("already running") {
            let text = format!(
                "VM {}: QEMU's NBD server is in use (a libvirt backup, a migration, another backup program): try again when that has ended",
                session.identity().name
            );
            return Err(Error::caused(Kind::Busy, text, error.clone()));
        }
    }
    Ok(result.map(drop)?)
}

/// Scratch nodes for all, and for the way filter the new bitmap and the filter, not yet in use.
pub(crate) async fn prepare(session: &Session, parts: &[Part], scratch: &Scratch) -> Result<()> {
    for (i, part) in parts.iter().enumerate() {
        let name = &part.names.scratch;
        session.call(cmd::BlockdevAdd(scratch.node(i, name)), name).await?;
        scratch.unlink(i)?;
        if part.way == Way::Filter {
            // Before the filter goes in, so that no write falls between the two bitmaps.
            session.call(cmd::BitmapAdd(part.add_new()), &part.new).await?;
            let filter = json!({
                "driver": "copy-before-write", "node-name": part.names.filter,
                "file": part.disk.top, "target": name,
                "on-cbw-error": "break-snapshot", "cbw-timeout": CBW_TIMEOUT,
            });
            session.call(cmd::BlockdevAdd(filter), &part.names.filter).await?;
        }
    }
    Ok(())
}

/// Takes the point in time. Several disks with filters need the guest to stand still for it:
/// inserting a filter is no transaction action. The guest goes on whatever happens.
pub(crate) async fn take(session: &Session, guard: &mut Guard, parts: &[Part]) -> Result<Instants> {
    let filters = parts.iter().filter(|p| p.way == Way::Filter).count();
    let running = session.call_within(cmd::QueryStatus(json!({})), "", SHORT).await?.running;
    let stop = running && filters > 0 && parts.len() > 1;
    if !stop {
        let time_ms = instant(session, parts).await?;
        return Ok(Instants { time_ms, stopped: Duration::ZERO });
    }
    guard.tell(|state| state.stopped = true)?;
    let begin = Instant::now();
    let result = match session.call_within(cmd::Stop(json!({})), "", SHORT).await {
        Ok(_) => instant(session, parts).await,
        Err(error) => Err(error.into()),
    };
    let gone_on = session.call_within(cmd::Cont(json!({})), "", SHORT).await;
    let stopped = begin.elapsed();
    gone_on?;
    guard.tell(|state| state.stopped = false)?;
    let time_ms = result?;
    Ok(Instants { time_ms, stopped })
}

/// Are the disks still what they were when they were listed? Someone may have taken an external
/// snapshot since, or pivoted: what was planned on the old node would then miss the guest's writes.
///
/// # Errors
/// `Busy`: they are not. QEMU went away.
pub(crate) async fn unchanged(session: &Session, parts: &[Part]) -> Result<()> {
    let now = disk::list(session).await?.disks;
    for Part { disk, .. } in parts {
        let same = |d: &Disk| {
            (&d.qdev, &d.top, &d.node, d.size) == (&disk.qdev, &disk.top, &disk.node, disk.size)
        };
        if !now.iter().any(same) {
            return Err(changed(session, disk));
        }
    }
    Ok(())
}

/// The same by one short question, for the moment before it counts.
async fn still_on_top<'a>(session: &Session, parts: impl Iterator<Item = &'a Part>) -> Result<()> {
    let devices = session.call_within(cmd::QueryBlock(json!({})), "", SHORT).await?;
    for Part { disk, .. } in parts {
        let same = |device: &cmd::Device| {
            let qdev = device.qdev.as_deref().filter(|q| !q.is_empty()).map(disk::qom_path);
            let top = device.inserted.as_ref();
            let is_top =
                top.is_some_and(|n| n.node_name == disk.top && n.image.virtual_size == disk.size);
            is_top && qdev == disk.qdev
        };
        if !devices.iter().any(same) {
            return Err(changed(session, disk));
        }
    }
    Ok(())
}

fn changed(session: &Session, disk: &Disk) -> Error {
    let text = format!(
        "VM {}: disk {}: its disks changed while the backup began; try again",
        session.identity().name,
        disk.label
    );
    Error::new(Kind::Busy, text)
}

/// One transaction for jobs, then the filters, then the old bitmaps of filtered disks: each side
/// may have a write too much, none too little.
async fn instant(session: &Session, parts: &[Part]) -> Result<i64> {
    still_on_top(session, parts.iter()).await?;
    let mut actions = Vec::new();
    for part in parts.iter().filter(|p| p.way != Way::Filter) {
        actions.extend(job_actions(part));
    }
    if !actions.is_empty() {
        session
            .call_within(cmd::Transaction(json!({"actions": &actions})), "backup", SHORT)
            .await?;
    }
    let filtered = || parts.iter().filter(|p| p.way == Way::Filter);
    if !actions.is_empty() {
        still_on_top(session, filtered()).await?;
    }
    for part in filtered() {
        if let Some(qdev) = &part.disk.qdev {
            set_drive(session, qdev, &part.names.filter).await?;
        }
    }
    let now = unix_ms(SystemTime::now());
    let disable: Vec<Value> = filtered().filter_map(disable_action).collect();
    if !disable.is_empty() {
        session
            .call_within(cmd::Transaction(json!({"actions": disable})), "bitmaps", SHORT)
            .await?;
    }
    Ok(now)
}

fn unix_ms(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

fn disable_action(part: &Part) -> Option<Value> {
    let name = part.dirty()?;
    Some(
        json!({"type": "block-dirty-bitmap-disable", "data": {"node": part.disk.node, "name": name}}),
    )
}

fn job_actions(part: &Part) -> Vec<Value> {
    let mut backup = json!({
        "job-id": part.names.job, "device": part.disk.node, "target": part.names.scratch,
        "filter-node-name": part.names.filter, "auto-dismiss": false,
    });
    if part.speed > 0 && part.way == Way::Push {
        backup["speed"] = json!(part.speed);
    }
    match (part.way, part.dirty()) {
        (Way::Push, Some(bitmap)) => {
            backup["sync"] = json!("bitmap");
            backup["bitmap"] = json!(bitmap);
            // It stays what it is: whether it goes is decided by the commit.
            backup["bitmap-mode"] = json!("never");
        }
        (Way::Push, None) => backup["sync"] = json!("full"),
        _ => backup["sync"] = json!("none"),
    }
    let mut actions = vec![json!({"type": "block-dirty-bitmap-add", "data": part.add_new()})];
    actions.extend(disable_action(part));
    actions.push(json!({"type": "blockdev-backup", "data": backup}));
    actions
}

/// After the point in time: the view node and its export.
pub(crate) async fn export(session: &Session, part: &Part) -> Called<()> {
    let names = &part.names;
    let view = json!({"driver": "snapshot-access", "node-name": names.view, "file": names.filter});
    session.call(cmd::BlockdevAdd(view), &names.view).await?;
    let mut export = json!({"type": "nbd", "id": names.export, "node-name": names.view, "name": part.disk.label});
    if let Some(bitmap) = part.dirty() {
        export["bitmaps"] = json!([{"node": part.disk.node, "name": bitmap}]);
    }
    session.call(cmd::ExportAdd(export), &names.export).await.map(drop)
}
