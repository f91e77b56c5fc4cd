//! `fleece check VM`: how a backup would go.

use std::path::PathBuf;

use serde::Serialize;

use super::Session;
use crate::error::Result;
use crate::progress::Message;
use crate::qmp::check::{Report, check};
use crate::qmp::scratch::DEFAULT_DIR;
use crate::units::human_bytes;

/// Show how a backup of a VM would go, and what stands in its way; changes nothing.
#[derive(clap::Args)]
pub(super) struct Args {
    /// VM, by name.
    #[arg(required_unless_present = "qmp")]
    vm: Option<String>,

    /// Its monitor (QMP) socket, where it is not described in the VMs' folder.
    #[arg(long, value_name = "SOCK")]
    qmp: Option<PathBuf>,

    /// Folder for the data that the guest overwrites during a backup.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
    scratch_dir: PathBuf,
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    report: Report,
}

pub(super) async fn run(session: &Session, args: Args) -> Result<()> {
    let vm = session.vm(args.vm.as_deref(), args.qmp.as_deref())?;
    let report = check(&vm, &args.scratch_dir).await?;
    session.report.send(&Shown { report });
    Ok(())
}

impl Message for Shown {
    const TYPE: &'static str = "check";

    fn human(&self) -> String {
        let Report { vm, uuid, qemu, status, agent, scratch_free, .. } = &self.report;
        let mut lines = vec![
            format!("{vm} {uuid}, QEMU {qemu}, {status}"),
            format!("agent: {agent}   scratch: {} free", human_bytes(*scratch_free)),
        ];
        let disks = &self.report.disks;
        let width = disks.iter().map(|disk| disk.label.len()).max().unwrap_or(0);
        for disk in disks {
            let (label, size) = (&disk.label, human_bytes(disk.size));
            let (format, way, means) = (&disk.format, &disk.way, &disk.means);
            lines.push(format!("  {label:<width$}  {size:>8}  {format}, way: {way} ({means})"));
            lines.extend(disk.bitmaps.iter().map(|what| format!("  {:width$}  bitmap {what}", "")));
        }
        for (label, reason) in &self.report.skipped {
            lines.push(format!("  {label:<width$}  left out: {reason}"));
        }
        lines.extend(self.report.obstacles.iter().map(|what| format!("OBSTACLE: {what}")));
        if self.report.obstacles.is_empty() {
            lines.push("nothing stands in the way of a backup".to_owned());
        }
        lines.join("\n")
    }
}
