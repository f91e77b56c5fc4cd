//! What a backup tells the operator.

use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use crate::engine::{Counts, Snapshot};
use crate::progress::Message;
use crate::units::{human_bytes, human_duration, human_rate, local_time, short_time};

/// What is about to be read.
#[derive(Serialize)]
pub(super) struct Plan {
    pub(super) vm: String,
    pub(super) uuid: Uuid,
    pub(super) host: String,
    pub(super) hypervisor: String,
    /// filter, job, push, image; what it means for the guest.
    pub(super) way: String,
    pub(super) means: String,
    pub(super) disks: Vec<DiskLine>,
    pub(super) skipped: Vec<(String, String)>,
    pub(super) dry_run: bool,
}

/// One disk of the plan.
#[derive(Serialize)]
pub(super) struct DiskLine {
    pub(super) name: String,
    pub(super) uuid: Uuid,
    pub(super) size: u64,
    pub(super) incremental: bool,
    pub(super) parent: Option<String>,
    pub(super) parent_time_ms: Option<i64>,
    pub(super) reason: String,
    /// Bytes dirty, or allocated for a full read.
    pub(super) bytes: u64,
}

impl Message for Plan {
    const TYPE: &'static str = "plan";

    fn human(&self) -> String {
        let uuid = self.uuid.simple().to_string();
        let mut lines = vec![format!(
            "{} {}…{} on {}, {}, way: {} ({})",
            self.vm,
            &uuid[..4],
            &uuid[28..],
            self.host,
            self.hypervisor,
            self.way,
            self.means,
        )];
        let name_width = self.disks.iter().map(|disk| disk.name.len()).max().unwrap_or(0);
        for disk in &self.disks {
            let (name, size) = (&disk.name, human_bytes(disk.size));
            lines.push(format!("  {name:<name_width$}  {size:>8}  {}", disk.what()));
        }
        for (disk, reason) in &self.skipped {
            lines.push(format!("  {disk:<name_width$}  left out: {reason}"));
        }
        if self.dry_run {
            lines.push("dry run: nothing was changed".to_owned());
        }
        lines.join("\n")
    }
}

impl DiskLine {
    fn what(&self) -> String {
        let bytes = human_bytes(self.bytes);
        match (&self.parent, self.incremental) {
            (Some(parent), true) => {
                let time = self
                    .parent_time_ms
                    .map_or_else(String::new, |time| format!(" ({})", short_time(time)));
                format!("incremental since {parent}{time}, {bytes} dirty")
            }
            _ => format!("FULL READ: {}, {bytes} allocated", self.reason),
        }
    }
}

/// The moment that the backup will show; scripts may wait for this line.
#[derive(Serialize)]
pub(super) struct PointInTime {
    pub(super) vm: String,
    pub(super) snapshot: String,
    pub(super) time_ms: i64,
    pub(super) frozen_seconds: Option<f64>,
    /// Of a running guest's CPUs.
    pub(super) stopped_seconds: Option<f64>,
}

impl Message for PointInTime {
    const TYPE: &'static str = "point_in_time";

    fn human(&self) -> String {
        let frozen = self.frozen_seconds.map_or_else(String::new, |seconds| {
            format!("   frozen {}", human_duration(Duration::from_secs_f64(seconds)))
        });
        let stopped = self.stopped_seconds.map_or_else(String::new, |seconds| {
            let comma = if frozen.is_empty() { "  " } else { "," };
            format!("{comma} stopped {:.0} ms", seconds * 1000.0)
        });
        format!("point in time {}{frozen}{stopped}", local_time(self.time_ms))
    }
}

/// The engine went away; the point in time is held for it.
#[derive(Serialize)]
pub(super) struct EngineGone {
    pub(super) vm: String,
    pub(super) snapshot: String,
    pub(super) host: String,
    pub(super) wait_seconds: f64,
}

impl Message for EngineGone {
    const TYPE: &'static str = "engine_gone";

    fn human(&self) -> String {
        let wait = human_duration(Duration::from_secs_f64(self.wait_seconds));
        format!(
            "the engine of {} is gone: the point in time is kept, waiting up to {wait} for it",
            self.host
        )
    }
}

/// A VM's turn has come, and no engine answers.
#[derive(Serialize)]
pub(super) struct EngineAwaited {
    pub(super) vm: String,
    pub(super) host: String,
    pub(super) wait_seconds: f64,
}

impl Message for EngineAwaited {
    const TYPE: &'static str = "engine_awaited";

    fn human(&self) -> String {
        let wait = human_duration(Duration::from_secs_f64(self.wait_seconds));
        format!("{}: the engine of {} is gone, waiting up to {wait} for it", self.vm, self.host)
    }
}

/// An engine answers again, and has the session.
#[derive(Serialize)]
pub(super) struct EngineBack {
    pub(super) vm: String,
    pub(super) snapshot: String,
    /// How long it was away.
    pub(super) seconds: f64,
    /// It had committed the snapshot before it went.
    pub(super) committed: bool,
}

impl Message for EngineBack {
    const TYPE: &'static str = "engine_back";

    fn human(&self) -> String {
        let away = human_duration(Duration::from_secs_f64(self.seconds));
        let then = match self.committed {
            true => "the snapshot was there before it went",
            false => "the backup goes on from its point in time",
        };
        format!("the engine answers again after {away}: {then}")
    }
}

/// The backup can be restored.
#[derive(Serialize)]
pub(super) struct Committed {
    pub(super) vm: String,
    pub(super) snapshot: String,
    pub(super) parent: Option<String>,
    pub(super) time_ms: i64,
    pub(super) seconds: f64,
    pub(super) disk_bytes: u64,
    #[serde(flatten)]
    pub(super) counts: Counts,
    pub(super) scratch_peak: u64,
    pub(super) scratch_max: Option<u64>,
    /// The slowest pace beside a busy guest, bytes per second.
    pub(super) paced_to: Option<u64>,
    /// Most anonymous memory of this process.
    pub(super) peak_memory: u64,
}

impl Committed {
    pub(super) fn new(snapshot: &Snapshot, elapsed: Duration) -> Committed {
        Committed {
            vm: snapshot.vm_name.clone(),
            snapshot: snapshot.id.0.clone(),
            parent: snapshot.parent.as_ref().map(|id| id.0.clone()),
            time_ms: snapshot.time_ms,
            seconds: elapsed.as_secs_f64(),
            disk_bytes: snapshot.disks.iter().map(|disk| disk.size).sum(),
            counts: snapshot.counts,
            scratch_peak: 0,
            scratch_max: None,
            paced_to: None,
            peak_memory: peak_memory(),
        }
    }
}

impl Message for Committed {
    const TYPE: &'static str = "committed";

    fn human(&self) -> String {
        let counts = &self.counts;
        let elapsed = Duration::from_secs_f64(self.seconds);
        let mut text = format!(
            "read {} = zero {} + unchanged {} + duplicate {} + new {} (stored {})   undetected {}\n\
             committed {}@{}   {}, {}",
            human_bytes(counts.read),
            human_bytes(counts.zero),
            human_bytes(counts.unchanged),
            human_bytes(counts.duplicate),
            human_bytes(counts.new),
            human_bytes(counts.stored),
            counts.undetected,
            self.vm,
            self.snapshot,
            human_duration(elapsed),
            human_rate(counts.read, elapsed),
        );
        if self.scratch_peak > 0 || self.scratch_max.is_some() {
            text.push_str(&format!("   scratch peak {}", human_bytes(self.scratch_peak)));
        }
        if let Some(most) = self.scratch_max {
            text.push_str(&format!(" of {}", human_bytes(most)));
        }
        if let Some(rate) = self.paced_to {
            let rate = human_bytes(rate);
            text.push_str(&format!("   paced: down to {rate}/s, as the guest was busy"));
        }
        text
    }
}

/// Resident anonymous memory: what it takes from guests. The kernel keeps no peak of it
/// alone, so this is the peak of all resident memory less what is backed by files now.
fn peak_memory() -> u64 {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return 0 };
    let kib = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let (peak, files) = (kib("VmHWM:"), kib("RssFile:"));
    peak.unwrap_or(0).saturating_sub(files.unwrap_or(0)) * 1024
}
