//! The socket, and who may use it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use capnp_rpc::{RpcSystem, rpc_twoparty_capnp, twoparty};
use fleece_schema::engine_capnp::engine;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

use super::MESSAGE_WORDS;
use super::engine::EngineServer;
use crate::error::{Context as _, Error, Kind, Result};
use crate::session::Context;

/// The socket's mode: its owner and its group.
const SOCKET_MODE: u32 = 0o660;

/// What the RPC objects work with.
pub struct Services {
    /// What sessions work with.
    pub context: Context,
    /// Backups that may run at once.
    pub readers: Arc<Semaphore>,
    /// KiB of blocks that may be on their way to sessions' threads.
    pub messages: Arc<Semaphore>,
    /// Restores that may run at once.
    pub restores: Arc<Semaphore>,
    /// User ids that may use the socket, besides root and our own.
    pub allowed_uids: Vec<u32>,
    /// The store's name for people.
    pub store_name: String,
}

impl Services {
    /// May a process of this user talk to us?
    fn permits(&self, uid: u32) -> bool {
        uid == 0 || uid == rustix::process::geteuid().as_raw() || self.allowed_uids.contains(&uid)
    }
}

/// Listens until `stop` changes. Runs on a `LocalSet`.
///
/// # Errors
/// [`Kind::Busy`] when another engine has the socket; otherwise when it cannot be made.
pub async fn serve(
    services: Rc<Services>,
    socket: &Path,
    mut stop: watch::Receiver<bool>,
) -> Result<()> {
    let listener = listen(socket).await?;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(tokio::task::spawn_local(talk(Rc::clone(&services), stream))),
                // Out of descriptors: those who wait may leave some.
                Err(error) => {
                    eprintln!("fleece-engine: accept: {error}");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
            _ = stop.changed() => break,
        }
    }
    // The next engine may have its socket there already only after we are gone.
    let _ = std::fs::remove_file(socket);
    Ok(())
}

async fn listen(socket: &Path) -> Result<UnixListener> {
    let what = || format!("cannot listen on {}", socket.display());
    if UnixStream::connect(socket).await.is_ok() {
        return Err(Error::new(
            Kind::Busy,
            format!(
                "another engine listens on {}; give this one another --socket",
                socket.display()
            ),
        ));
    }
    if let Some(folder) = socket.parent().filter(|folder| !folder.exists()) {
        std::fs::create_dir_all(folder).context(what)?;
        // The socket's own mode says who may use it; its folder must let them get there.
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder, mode).context(what)?;
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context(what);
        }
        _ => {}
    }
    let listener = UnixListener::bind(socket).context(what)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(SOCKET_MODE)).context(what)?;
    Ok(listener)
}

/// One connection, to its end. What it opened ends with it.
async fn talk(services: Rc<Services>, stream: UnixStream) {
    // A peer without credentials is nobody.
    let uid = stream.peer_cred().map_or(u32::MAX, |peer| peer.uid());
    let permitted = services.permits(uid);
    converse(services, permitted, uid, stream.into_split()).await;
}

/// What a peer and we say to each other, over whatever is between us.
pub(super) async fn converse<R, W>(
    services: Rc<Services>,
    permitted: bool,
    uid: u32,
    (read, write): (R, W),
) where
    R: AsyncRead + Unpin + 'static,
    W: AsyncWrite + Unpin + 'static,
{
    let mut options = capnp::message::ReaderOptions::new();
    options.traversal_limit_in_words(Some(MESSAGE_WORDS));
    let network = twoparty::VatNetwork::new(
        futures::io::BufReader::new(read.compat()),
        futures::io::BufWriter::new(write.compat_write()),
        rpc_twoparty_capnp::Side::Server,
        options,
    );
    let server: engine::Client = capnp_rpc::new_client(EngineServer { services, permitted, uid });
    if let Err(error) = RpcSystem::new(Box::new(network), Some(server.client)).await {
        // A client that was killed is no news; a malformed message is.
        if error.kind != capnp::ErrorKind::Disconnected {
            eprintln!("fleece-engine: connection of uid {uid}: {error}");
        }
    }
}
