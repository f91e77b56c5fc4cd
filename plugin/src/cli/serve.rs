//! `fleece serve`.

use std::path::PathBuf;

use super::restore::{open, resolve, wanted_disks};
use super::{Session, SnapshotName, interrupted};
use crate::error::Result;
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
    for disk in wanted_disks(&snapshot, args.disk.as_deref())? {
        disks.push(open(&engine, &snapshot, &disk).await?);
    }
    let stop = async {
        let _ = interrupted().await;
    };
    serve(&session.report, &snapshot, disks, &args.socket, stop).await
}
