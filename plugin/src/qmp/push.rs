//! The way push: QEMU copies into the scratch image, a server of our own serves the result.
//!
//! For disks with an iothread on a QEMU that an NBD client's disconnect would abort.

use crate::error::{Context, Error, Kind, Result};
use crate::qmp::command as cmd;
use crate::qmp::point::Part;
use crate::qmp::scratch::Scratch;
use crate::qmp::session::{Called, Session};
use serde_json::json;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

/// A copy takes as long as it takes; the caller's `--max-hold` is the limit. This one only keeps
/// the arithmetic of time sane.
const COPY_LIMIT: Duration = Duration::from_secs(30 * 24 * 3600);
/// qemu-nbd listens within milliseconds.
const SERVER_LIMIT: Duration = Duration::from_secs(10);
/// Between two tries to connect.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// The bitmap inside the scratch image: what was copied of an incremental disk.
pub(crate) const COPIED: &str = "fleece-copied";
/// Connections that the server takes at once.
const CLIENTS: &str = "16";

/// How a copy ended.
enum Copied {
    Whole,
    Failed(String),
}

/// Waits until the disk is copied, and takes the image away from QEMU.
pub(crate) async fn copy(session: &Session, part: &Part, scratch: &Scratch) -> Result<()> {
    let ended = session
        .wait("blockdev-backup", COPY_LIMIT, async || ended(session, part, scratch).await)
        .await?;
    if let Copied::Failed(reason) = ended {
        let text = format!("disk {}: copying it into scratch failed: {reason}", part.disk.label);
        return Err(Error::new(Kind::Failed, text));
    }
    session.call(cmd::JobDismiss(json!({"id": part.names.job})), &part.names.job).await?;
    let node = &part.names.scratch;
    if let Some(bitmap) = part.dirty() {
        // What was dirty goes along inside the image: QEMU's own server must not be used here.
        let add = json!({"node": node, "name": COPIED, "persistent": true, "disabled": true});
        session.call(cmd::BitmapAdd(add), COPIED).await?;
        let from = json!([{"node": part.disk.node, "name": bitmap}]);
        let merge = json!({"node": node, "target": COPIED, "bitmaps": from});
        session.call(cmd::BitmapMerge(merge), COPIED).await?;
    }
    session.call(cmd::BlockdevDel(json!({"node-name": node})), node).await?;
    Ok(())
}

async fn ended(session: &Session, part: &Part, scratch: &Scratch) -> Called<Option<Copied>> {
    scratch.used();
    let jobs = session.call(cmd::QueryJobs(json!({})), "").await?;
    let Some(job) = jobs.into_iter().find(|j| j.id == part.names.job) else {
        return Ok(Some(Copied::Failed("someone ended the job".into())));
    };
    if job.status == "concluded" {
        return Ok(Some(job.error.map_or(Copied::Whole, Copied::Failed)));
    }
    let status = session.call(cmd::QueryStatus(json!({})), "").await?.status;
    if status == "io-error" {
        // The guest waits for scratch that is full: it comes first.
        return Ok(Some(Copied::Failed("the scratch image is full".into())));
    }
    Ok(None)
}

/// A private server for a finished image; ends when dropped, and with us, whoever kills us: it holds
/// a whole disk in a file without a name. Call it where the runtime's thread lives as long as the
/// program.
pub(crate) async fn serve(image: &Path, socket: &Path, part: &Part) -> Result<Child> {
    let failed = || format!("disk {}: serving its copy with qemu-nbd", part.disk.label);
    // It becomes qemu-nbd, in the same process.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "qemu-nbd"]);
    command.args(["-r", "-t", "-f", "qcow2", "-e", CLIENTS, "-x", &part.disk.label]);
    if part.dirty().is_some() {
        command.args(["-B", COPIED]);
    }
    command.arg("-k").arg(socket).arg(image);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command
        .spawn()
        .context(|| format!("{}: setpriv (Debian: package util-linux)", failed()))?;
    let end = Instant::now() + SERVER_LIMIT;
    loop {
        if UnixStream::connect(socket).await.is_ok() {
            return Ok(child);
        }
        let status = child.try_wait().context(failed)?;
        if status.is_some() || Instant::now() >= end {
            drop(child.start_kill());
            let output = child.wait_with_output().await.context(failed)?;
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Error::new(Kind::Failed, format!("{}: {words}", failed())));
        }
        sleep(LOOK_AGAIN).await;
    }
}
