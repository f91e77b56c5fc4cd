//! `fleece serve`.

use std::path::PathBuf;

use super::restore::resolve;
use super::{Session, SnapshotName, interrupted};
use crate::error::{Error, Kind, Result};
use crate::serve::serve;

/// Serve the disks of a snapshot over NBD, read-only, to boot from or to take single files from.
///
/// Ends at Ctrl-C or SIGTERM.
#[derive(clap::Args)]
pub(super) struct Args {
    /// VM (its latest snapshot), or VM@ID, VM@latest, VM@2026-11-20.
    #[arg(value_name = "VM[@ID]")]
    name: SnapshotName,

    /// Only this disk, by name or UUID.
    #[arg(long, value_name = "DISK")]
    disk: Option<String>,

    /// UNIX socket to listen on.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
}

pub(super) async fn run(session: &Session, args: Args) -> Result<()> {
    let engine = session.engine().await?;
    let snapshot = resolve(&engine, &args.name).await?;
    let mut disks = Vec::new();
    for disk in &snapshot.disks {
        let uuid = disk.uuid.to_string();
        if args.disk.as_ref().is_none_or(|wanted| *wanted == disk.name || *wanted == uuid) {
            disks.push(engine.open_disk(&snapshot.vm.to_string(), &snapshot.id.0, &uuid).await?);
        }
    }
    if disks.is_empty() {
        let (disk, id) = (args.disk.as_deref().unwrap_or(""), &snapshot.id);
        let what = format!("{}@{id} has no disk {disk:?}", snapshot.vm_name);
        return Err(Error::new(Kind::NotFound, what));
    }
    let stop = async {
        let _ = interrupted().await;
    };
    serve(&session.report, &snapshot, disks, &args.socket, stop).await
}
