//! `fleece check VM`: how a backup would go; changes nothing.

use crate::error::Result;
use crate::qmp::agent::{self, Agent};
use crate::qmp::command as cmd;
use crate::qmp::disk::{self, Disk};
use crate::qmp::names::PREFIX;
use crate::qmp::point;
use crate::qmp::scratch;
use crate::qmp::session::Session;
use crate::qmp::view::Way;
use crate::vms::Vm;
use serde::Serialize;
use serde_json::json;
use std::path::Path;

/// Less free space than this is called an obstacle.
const LITTLE_SCRATCH: u64 = 1 << 30;

/// The answer for one VM.
#[derive(Clone, Default, Debug, Serialize)]
pub struct Report {
    /// Its name.
    pub vm: String,
    /// Its UUID.
    pub uuid: String,
    /// QEMU's version.
    pub qemu: String,
    /// running, paused, …
    pub status: String,
    /// The guest agent: `answers`, `none`, or why not.
    pub agent: String,
    /// Bytes free for scratch.
    pub scratch_free: u64,
    /// One per disk.
    pub disks: Vec<DiskReport>,
    /// Disks left out, with the reason.
    pub skipped: Vec<(String, String)>,
    /// What stands in the way of a backup, or will be remarked on.
    pub obstacles: Vec<String>,
}

/// One disk.
#[derive(Clone, Default, Debug, Serialize)]
pub struct DiskReport {
    /// Its label.
    pub label: String,
    /// Its image.
    pub file: String,
    /// Its format.
    pub format: String,
    /// Bytes.
    pub size: u64,
    /// The way to its point in time.
    pub way: String,
    /// What that means for the guest.
    pub means: String,
    /// The state of its bitmaps, in words; one per bitmap of ours.
    pub bitmaps: Vec<String>,
}

/// Looks at a VM.
///
/// # Errors
/// As [`Session::connect`].
pub async fn check(vm: &Vm, scratch_dir: &Path) -> Result<Report> {
    let session = Session::connect(vm).await?;
    let found = disk::list(&session).await?;
    let mut report = Report {
        vm: session.identity().name.clone(),
        uuid: session.identity().uuid.to_string(),
        qemu: session.version().to_string(),
        status: session.call(cmd::QueryStatus(json!({})), "").await?.status,
        skipped: found.skipped,
        ..Report::default()
    };
    let ways = point::choose(&session, &found.disks, None)?;
    for (disk, way) in found.disks.iter().zip(ways) {
        report.disks.push(of_disk(disk, way, &mut report.obstacles));
    }
    if report.disks.is_empty() {
        report.obstacles.push("no disk to back up".into());
    }
    report.agent = agent_state(&session).await?;
    // The default folder is made by the first backup.
    let existing = match scratch_dir == Path::new(scratch::DEFAULT_DIR) {
        true => scratch_dir.ancestors().find(|path| path.is_dir()).unwrap_or(scratch_dir),
        false => scratch_dir,
    };
    match scratch::free_space(existing) {
        Ok(free) => {
            report.scratch_free = free;
            if free < LITTLE_SCRATCH {
                report.obstacles.push(format!(
                    "{}: only {} MiB free for scratch",
                    scratch_dir.display(),
                    free >> 20
                ));
            }
        }
        Err(error) => report.obstacles.push(error.to_string()),
    }
    if session.identity().derived {
        report
            .obstacles
            .push("QEMU runs without -uuid: the VM's identity is made of its name".into());
    }
    others(&session, &mut report.obstacles).await?;
    Ok(report)
}

fn of_disk(disk: &Disk, way: Way, obstacles: &mut Vec<String>) -> DiskReport {
    if !disk.persistent {
        let text = format!(
            "{}: a {} disk's bitmap does not outlive QEMU: full reads after restarts",
            disk.label, disk.format
        );
        obstacles.push(text);
    }
    if disk.bitmap_beneath {
        obstacles.push(format!(
            "{}: an overlay was put on top since the last backup: a full read",
            disk.label
        ));
    }
    let words = |b: &crate::qmp::bitmap::Bitmap| {
        let state = match (b.inconsistent, b.busy, b.recording) {
            (true, _, _) => "inconsistent",
            (_, true, _) => "in use",
            (_, _, true) => "recording",
            _ => "stopped",
        };
        format!(
            "since {} (store {}): {state}, {} MiB dirty",
            b.name.snapshot,
            b.name.store,
            b.dirty >> 20
        )
    };
    DiskReport {
        label: disk.label.clone(),
        file: disk.file.clone(),
        format: disk.format.clone(),
        size: disk.size,
        way: way.to_string(),
        means: way.means().to_owned(),
        bitmaps: disk.bitmaps.iter().map(words).collect(),
    }
}

async fn agent_state(session: &Session) -> Result<String> {
    let Some(path) = agent::find(session).await? else { return Ok("none".into()) };
    Ok(match Agent::connect(&path).await {
        Err(error) => error.to_string(),
        Ok(mut agent) => match agent.status().await {
            Ok(status) => format!("answers, {status}"),
            Err(error) => error.to_string(),
        },
    })
}

/// Other programs' exports and jobs, and what dead runs of ours left.
async fn others(session: &Session, obstacles: &mut Vec<String>) -> Result<()> {
    let exports = session.call(cmd::QueryExports(json!({})), "").await?;
    let jobs = session.call(cmd::QueryJobs(json!({})), "").await?;
    let ids = exports.into_iter().map(|e| e.id).chain(jobs.into_iter().map(|j| j.id));
    let (ours, foreign): (Vec<String>, Vec<String>) = ids.partition(|id| id.starts_with(PREFIX));
    if !ours.is_empty() {
        obstacles.push(format!(
            "a backup runs, or left {}: `fleece cleanup` removes that",
            ours.join(", ")
        ));
    }
    if !foreign.is_empty() {
        obstacles.push(format!("another program's export or job: {}", foreign.join(", ")));
    }
    Ok(())
}
