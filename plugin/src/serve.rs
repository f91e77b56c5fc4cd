//! Stored disks as read-only NBD exports: a VM boots from them at once, with an overlay.

use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::engine::{DiskImage, Image, OpenDisk, Snapshot};
use crate::error::{Error, Kind, Result};
use crate::nbd::server::{ImageSource, Server, Stretch};
use crate::progress::{Message, Report};
use crate::units::human_bytes;

/// Calls to the engine at once, over all disks and clients: it answers those of one disk one
/// after the other, so more would only take its threads and our memory.
const CALLS_AT_ONCE: usize = 4;

/// A stored disk as the NBD server sees it.
struct Served {
    image: Image,
    size: u64,
    calls: Rc<Semaphore>,
}

impl Served {
    /// Waits for a turn.
    async fn turn(&self) -> Result<SemaphorePermit<'_>> {
        let closed = |_| Error::new(Kind::Failed, "the server has ended");
        self.calls.acquire().await.map_err(closed)
    }
}

impl ImageSource for Served {
    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Bytes> {
        let _turn = self.turn().await?;
        let mut data = Vec::with_capacity(length as usize);
        self.image.read(offset, length, &mut data).await?;
        Ok(data.into())
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Stretch>> {
        let _turn = self.turn().await?;
        let extents = self.image.extents(offset, length).await?;
        let mut next = offset;
        let mut stretches = Vec::with_capacity(extents.len());
        for extent in extents {
            if extent.offset > next || extent.length == 0 {
                let what = format!("the engine's map has a gap at {next}");
                return Err(Error::new(Kind::Failed, what));
            }
            // The first one may begin before what was asked for.
            let end = extent.offset + extent.length;
            if end > next {
                stretches.push(Stretch { length: end - next, zero: extent.zero });
                next = end;
            }
        }
        Ok(stretches)
    }
}

/// What is served, and how to use it.
#[derive(Serialize)]
struct Serving {
    vm: String,
    snapshot: String,
    socket: String,
    exports: Vec<Export>,
}

#[derive(Serialize)]
struct Export {
    disk: String,
    size: u64,
    uri: String,
    overlay_command: String,
    qemu_option: String,
}

impl Message for Serving {
    const TYPE: &'static str = "serving";

    fn human(&self) -> String {
        let mut lines =
            vec![format!("serving {}@{}, read-only, until Ctrl-C", self.vm, self.snapshot)];
        for export in &self.exports {
            lines.push(format!("  {}  {}  {}", export.disk, human_bytes(export.size), export.uri));
        }
        lines.push("to boot from it, put an overlay on top:".to_owned());
        lines.extend(self.exports.iter().map(|export| format!("  {}", export.overlay_command)));
        lines.push("and start QEMU with".to_owned());
        lines.extend(self.exports.iter().map(|export| format!("  {}", export.qemu_option)));
        lines.join("\n")
    }
}

impl Export {
    fn new(disk: &OpenDisk, socket: &str) -> Export {
        let name = &disk.disk.name;
        let uri = format!("nbd+unix:///{}?socket={}", escape(name, false), escape(socket, true));
        let overlay = format!("{}-overlay.qcow2", crate::restore::safe_name(&disk.disk));
        Export {
            disk: name.clone(),
            size: disk.disk.size,
            overlay_command: format!("qemu-img create -f qcow2 -F raw -b '{uri}' {overlay}"),
            qemu_option: format!("-drive file={overlay},format=qcow2,if=virtio"),
            uri,
        }
    }
}

/// Percent-encodes what has a meaning in a URI, or in the shell's single quotes.
fn escape(text: &str, slashes: bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
        match plain || slashes && byte == b'/' {
            true => escaped.push(char::from(byte)),
            false => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// Serves disks of one snapshot on a UNIX socket until `stop` is ready.
///
/// # Errors
/// Where the socket cannot be had.
pub async fn serve(
    report: &Report,
    snapshot: &Snapshot,
    disks: Vec<OpenDisk>,
    socket: &Path,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    // Clients may run elsewhere: the URI needs the whole path.
    let socket = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
    let shown = socket.display().to_string();
    let exports = disks.iter().map(|disk| Export::new(disk, &shown)).collect();
    let calls = Rc::new(Semaphore::new(CALLS_AT_ONCE));
    let served = disks.into_iter().map(|open| {
        let served = Served { image: open.image, size: open.disk.size, calls: Rc::clone(&calls) };
        (open.disk.name, served)
    });
    let server = Server::bind(&socket, served.collect())?;
    report.send(&Serving {
        vm: snapshot.vm_name.clone(),
        snapshot: snapshot.id.0.clone(),
        socket: shown,
        exports,
    });
    server.serve(stop).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_survive_strange_names() {
        assert_eq!(escape("vda", false), "vda");
        assert_eq!(escape("a/b c'", false), "a%2Fb%20c%27");
        assert_eq!(escape("/run/a b", true), "/run/a%20b");
    }
}
