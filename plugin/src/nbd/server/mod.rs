//! Our server: read-only, for disks that are restored while they are read.
//!
//! Why not the `nbd` crate's: it knows no `NBD_OPT_GO`, lists one export under a fixed name
//! (so qemu refuses any other), hangs up on meta contexts, has neither structured replies nor
//! block status nor several connections, and takes one request at a time. It stays the
//! independent peer of our tests.
//!
//! Bounds: [`MAX_CLIENTS`] clients, [`MAX_REQUESTS`] requests of each at once, and [`PIECE`]
//! bytes in memory for each, however long it is: 2 MiB a client. No client waits for another.

mod handshake;
mod transmission;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::net::{UnixListener, UnixStream};

use crate::error::{Context, Error, Kind, Result};

/// A disk to serve. Not `Send`: the server lives where its sources live.
pub trait ImageSource {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// `length` bytes at `offset`, within the disk, at most [`PIECE`].
    fn read(&self, offset: u64, length: u32) -> impl Future<Output = Result<Bytes>>;

    /// What is zeros from `offset` on: stretches one after the other, at least one, of which
    /// the last may go beyond `length`.
    fn extents(&self, offset: u64, length: u64) -> impl Future<Output = Result<Vec<Stretch>>>;
}

/// A stretch of a served disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    /// Bytes, at least 1.
    pub length: u64,
    /// Reads as zeros.
    pub zero: bool,
}

/// Most bytes asked of a source at once.
pub const PIECE: u32 = 256 * 1024;
/// Clients at once; more wait to be greeted. nbdcopy opens 4, QEMU one or a few for a disk.
pub const MAX_CLIENTS: usize = 16;
/// Requests of one client that are worked on at once.
pub const MAX_REQUESTS: usize = 8;
/// A client that does not choose an export in this time is dropped; QEMU does the same.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Pause after an error of accept, which would otherwise repeat at once (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Disks under their export names.
struct Exports<S> {
    disks: Vec<(String, S)>,
}

impl<S> Exports<S> {
    /// The export of that name; "" is the only one, where there is only one.
    fn find(&self, name: &str) -> Option<&S> {
        match self.disks.as_slice() {
            [(_, only)] if name.is_empty() => Some(only),
            disks => disks.iter().find(|(known, _)| known == name).map(|(_, disk)| disk),
        }
    }
}

/// A server that listens.
pub struct Server<S> {
    exports: Rc<Exports<S>>,
    listener: UnixListener,
    path: PathBuf,
}

impl<S: ImageSource> Server<S> {
    /// Listens on a new UNIX socket for clients of these exports (name, disk). A socket left
    /// by a dead server is replaced; [`Kind::Busy`] if one lives there, [`Kind::Target`] if
    /// something else is there. The socket is for the owner alone and goes with the server.
    pub fn bind(path: &Path, disks: Vec<(String, S)>) -> Result<Self> {
        clear_the_way(path)?;
        let listener = UnixListener::bind(path)
            .context(|| format!("cannot listen on the socket {}", path.display()))?;
        let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(path, owner_only)
            .context(|| format!("cannot protect the socket {}", path.display()))?;
        Ok(Server { exports: Rc::new(Exports { disks }), listener, path: path.to_owned() })
    }

    /// Serves until `stop` is ready; clients are dropped then.
    pub async fn serve(self, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        let mut clients = FuturesUnordered::new();
        loop {
            tokio::select! {
                () = &mut stop => return,
                Some(()) = clients.next() => {}
                accepted = self.listener.accept(), if clients.len() < MAX_CLIENTS => {
                    match accepted {
                        Ok((socket, _)) => clients.push(client(socket, Rc::clone(&self.exports))),
                        Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                    }
                }
            }
        }
    }
}

impl<S> Drop for Server<S> {
    fn drop(&mut self) {
        // Someone may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One client, from greeting to goodbye. Whatever it does wrong ends it, and only it.
async fn client<S: ImageSource>(socket: UnixStream, exports: Rc<Exports<S>>) {
    let (read, write) = socket.into_split();
    let chosen = handshake::choose(read, write, &exports);
    if let Ok(Ok(Some(chosen))) = tokio::time::timeout(HANDSHAKE_LIMIT, chosen).await {
        transmission::serve(chosen).await;
    }
}

/// Serves one disk to whoever is at the other end of a socket, for the fuzzer.
#[cfg(any(test, fuzzing))]
pub(super) async fn to_one<S: ImageSource>(socket: UnixStream, disk: S) {
    client(socket, Rc::new(Exports { disks: vec![("vda".to_owned(), disk)] })).await;
}

fn clear_the_way(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        let message = format!("{} exists and is no socket; choose another path", path.display());
        return Err(Error::new(Kind::Target, message));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)
            .context(|| format!("cannot remove the dead socket {}", path.display())),
        _ => {
            let message = format!("someone serves on {}; choose another path", path.display());
            Err(Error::new(Kind::Busy, message))
        }
    }
}
