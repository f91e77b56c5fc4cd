//! `fleece snapshots`: what can be restored.

use serde::Serialize;

use super::Session;
use super::table::layout;
use crate::engine::Snapshot;
use crate::error::{Error, Kind, Result};
use crate::progress::Message;
use crate::units::{human_bytes, local_time};

/// List the snapshots of a VM, or of all, oldest first.
#[derive(clap::Args)]
pub(super) struct Args {
    /// VM, by name or UUID.
    vm: Option<String>,

    /// Only the newest N.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    last: Option<u32>,

    /// Show what each of them read and stored.
    #[arg(long)]
    usage: bool,
}

#[derive(Serialize)]
struct One<'a> {
    #[serde(flatten)]
    snapshot: &'a Snapshot,
}

impl Message for One<'_> {
    const TYPE: &'static str = "snapshot";

    fn human(&self) -> String {
        format!("{}@{}", self.snapshot.vm_name, self.snapshot.id)
    }
}

pub(super) async fn run(session: &Session, args: Args) -> Result<()> {
    let engine = session.engine().await?;
    let vm = args.vm.as_deref().unwrap_or("");
    let mut snapshots = engine.snapshots(vm).await?;
    if snapshots.is_empty() && !vm.is_empty() {
        return Err(Error::new(Kind::NotFound, format!("there is no snapshot of {vm}")));
    }
    if let Some(last) = args.last {
        snapshots.drain(..snapshots.len().saturating_sub(last as usize));
    }
    if session.report.is_json() {
        snapshots.iter().for_each(|snapshot| session.report.send(&One { snapshot }));
    } else if snapshots.is_empty() {
        session.report.note("no snapshots yet");
    } else {
        session.report.note(&table(&snapshots, args.usage));
    }
    Ok(())
}

fn table(snapshots: &[Snapshot], usage: bool) -> String {
    let mut header = vec!["SNAPSHOT", "TIME", "SIZE", "DISKS", "HOST"];
    if usage {
        header.extend(["READ", "ZERO", "UNCHANGED", "DUPLICATE", "NEW", "STORED"]);
    }
    let rows: Vec<Vec<String>> = snapshots.iter().map(|snapshot| row(snapshot, usage)).collect();
    layout(&header, &rows, &[2, 5, 6, 7, 8, 9, 10])
}

fn row(snapshot: &Snapshot, usage: bool) -> Vec<String> {
    let disks: Vec<&str> = snapshot.disks.iter().map(|disk| disk.name.as_str()).collect();
    let damaged = if snapshot.damaged { " DAMAGED" } else { "" };
    let mut cells = vec![
        format!("{}@{}{damaged}", snapshot.vm_name, snapshot.id),
        local_time(snapshot.time_ms),
        human_bytes(snapshot.disks.iter().map(|disk| disk.size).sum()),
        disks.join(","),
        snapshot.host.clone(),
    ];
    if usage {
        let counts = &snapshot.counts;
        let columns = [
            counts.read,
            counts.zero,
            counts.unchanged,
            counts.duplicate,
            counts.new,
            counts.stored,
        ];
        cells.extend(columns.map(human_bytes));
    }
    cells
}
