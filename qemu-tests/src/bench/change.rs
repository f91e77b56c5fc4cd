//! A qcow2 image of a shut-off VM that is changed through QEMU, which notes it in its bitmaps.

use std::path::Path;
use std::time::Duration;

use super::nbd::Client;
use crate::wait::{SOON, wait_for};
use crate::{Result, Running, tools};

/// How long the image may take to be closed.
const LIMIT: Duration = Duration::from_secs(300);

/// Lets `change` write to an image, and waits until it is closed.
///
/// # Errors
/// QEMU's, or what `change` says.
pub fn change(image: &Path, change: impl FnOnce(&mut Client) -> Result) -> Result {
    let folder = tempfile::Builder::new().prefix("fleece").tempdir()?;
    let socket = folder.path().join("nbd");
    let mut command = tools::qemu("qemu-nbd")?;
    command.args(["-f", "qcow2", "--discard=unmap", "-x", "vda", "-k"]).arg(&socket).arg(image);
    // It ends by itself when its client has gone.
    let server = Running::start("qemu-nbd", &mut command)?;
    let mut client =
        wait_for(SOON, "qemu-nbd's socket", || Ok(Client::connect(&socket, "vda").ok()))?;
    change(&mut client)?;
    client.flush()?;
    drop(client);
    server.finish(LIMIT)?.code(0)?;
    rustix::fs::sync();
    Ok(())
}
