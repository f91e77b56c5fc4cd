//! `fleece status`: what this host's engine does and holds.

use serde::Serialize;

use super::Session;
use crate::engine::Status;
use crate::error::Result;
use crate::progress::Message;
use crate::units::{human_bytes, human_duration};

/// Show what this host's engine does and holds.
#[derive(clap::Args)]
pub(super) struct Args {}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    status: Status,
}

pub(super) async fn run(session: &Session, _args: Args) -> Result<()> {
    let status = session.engine().await?.status().await?;
    session.report.send(&Shown { status });
    Ok(())
}

impl Message for Shown {
    const TYPE: &'static str = "status";

    fn human(&self) -> String {
        let status = &self.status;
        let safety =
            if status.encrypted { "encrypted" } else { "NOT ENCRYPTED (authenticated only)" };
        let mut lines = vec![
            format!(
                "engine {} on {}, store {} ({safety})",
                status.version, status.host, status.store
            ),
            format!(
                "{} snapshots of {} VMs: {} of disks, {} unique, {} stored{}",
                status.snapshots,
                status.vms,
                human_bytes(status.logical_bytes),
                human_bytes(status.unique_bytes),
                human_bytes(status.stored_bytes),
                ratio(status.logical_bytes, status.stored_bytes),
            ),
            format!(
                "index {}, memory {} at most of {}",
                human_bytes(status.index_bytes),
                human_bytes(status.peak_anonymous),
                human_bytes(status.memory_budget),
            ),
        ];
        if status.damaged_blocks > 0 {
            lines.push(format!("DAMAGED blocks: {} (see fleecectl verify)", status.damaged_blocks));
        }
        if status.undetected_blocks > 0 {
            lines.push(format!("blocks stored more than once: {}", status.undetected_blocks));
        }
        lines.extend(status.sessions.iter().map(|running| {
            let age = std::time::Duration::from_millis(running.age_ms);
            format!(
                "  {}@{}  {}  for {}, read {}",
                running.vm_name,
                running.snapshot,
                running.stage,
                human_duration(age),
                human_bytes(running.counts.read),
            )
        }));
        lines.join("\n")
    }
}

fn ratio(logical: u64, stored: u64) -> String {
    match stored {
        0 => String::new(),
        _ => format!(" ({:.1} : 1)", logical as f64 / stored as f64),
    }
}
