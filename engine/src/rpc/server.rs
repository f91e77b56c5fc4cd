//! The socket, and who may use it.

use std::cell::{Cell, RefCell};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use capnp_rpc::{RpcSystem, rpc_twoparty_capnp, twoparty};
use fleece_schema::engine_capnp::engine;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

use super::MESSAGE_WORDS;
use super::engine::EngineServer;
use super::files::Reading;
use super::flow::{Bounded, Counted, Flow};
use super::peers::Peers;
use crate::error::{Context as _, Error, Kind, Result};
use crate::membership::Membership;
use crate::session::Context;

/// The socket's mode: its owner and its group.
const SOCKET_MODE: u32 = 0o660;
/// Connections at once: far more than backups, restores and serves of a host. With what one may
/// keep in memory (`flow`) this bounds them all.
const CONNECTIONS: usize = 256;
/// Of them, those whose client has said nothing yet; the oldest goes when another comes.
const SILENT: usize = 64;
/// How long a client may say nothing after it connected; ours speak at once.
const SILENCE: Duration = Duration::from_secs(10);
/// How long the goodbye to a client may take.
const GOODBYE: Duration = Duration::from_secs(1);

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
    /// Where the store's key is.
    pub key_file: PathBuf,
    /// The store's name for people.
    pub store_name: String,
    /// The other hosts, if there are any.
    pub peers: Option<Rc<Peers>>,
    /// This host's place in a cluster that etcd knows.
    pub membership: Option<Rc<Membership>>,
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
    let clients = Clients::default();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => if let Some(flow) = clients.enter().await {
                    drop(tokio::task::spawn_local(talk(Rc::clone(&services), stream, flow)));
                },
                // Out of descriptors: those who wait may leave some.
                Err(error) => {
                    eprintln!("fleece-engine: accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            _ = stop.changed() => break,
        }
    }
    // The next engine may have its socket there already only after we are gone.
    let _ = std::fs::remove_file(socket);
    Ok(())
}

/// The connections that there are, oldest first.
#[derive(Default)]
struct Clients {
    flows: RefCell<Vec<Weak<Flow>>>,
    /// That there are too many has been said.
    full: Cell<bool>,
}

impl Clients {
    /// Takes in a new connection. `None` when there are too many, and none of them ends in a moment:
    /// those that were dismissed do.
    async fn enter(&self) -> Option<Rc<Flow>> {
        let begun = Instant::now();
        loop {
            if let Some(flow) = self.try_enter() {
                self.full.set(false);
                return Some(flow);
            }
            if begun.elapsed() > 2 * GOODBYE {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if !self.full.replace(true) {
            eprintln!("fleece-engine: {} connections at once: no more", self.flows.borrow().len());
        }
        None
    }

    fn try_enter(&self) -> Option<Rc<Flow>> {
        let mut flows = self.flows.borrow_mut();
        flows.retain(|flow| flow.strong_count() > 0);
        if flows.len() >= CONNECTIONS {
            return None;
        }
        let silent = |flow: &Weak<Flow>| flow.upgrade().filter(|flow| flow.is_silent());
        let mut waiting = flows.iter().filter_map(silent);
        if let Some(oldest) = waiting.next()
            && waiting.count() + 1 >= SILENT
        {
            oldest.dismiss();
        }
        let flow = Rc::<Flow>::default();
        flows.push(Rc::downgrade(&flow));
        Some(flow)
    }
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
async fn talk(services: Rc<Services>, stream: UnixStream, flow: Rc<Flow>) {
    // A peer without credentials is nobody.
    let uid = stream.peer_cred().map_or(u32::MAX, |peer| peer.uid());
    let permitted = services.permits(uid);
    let (half, write) = stream.into_split();
    let read = Reading { half, flow: Rc::clone(&flow), permitted };
    converse(services, flow, (permitted, uid), (read, write)).await;
}

/// What a peer and we say to each other, over whatever is between us.
pub(super) async fn converse<R, W>(
    services: Rc<Services>,
    flow: Rc<Flow>,
    (permitted, uid): (bool, u32),
    (read, write): (R, W),
) where
    R: AsyncRead + Unpin + 'static,
    W: AsyncWrite + Unpin + 'static,
{
    let mut options = capnp::message::ReaderOptions::new();
    options.traversal_limit_in_words(Some(MESSAGE_WORDS));
    let network = twoparty::VatNetwork::new(
        Counted { inner: futures::io::BufReader::new(read.compat()), flow: Rc::clone(&flow) },
        futures::io::BufWriter::new(write.compat_write()),
        rpc_twoparty_capnp::Side::Server,
        options,
    );
    let network = Bounded { network, flow: Rc::clone(&flow) };
    let server = EngineServer { services, permitted, uid, flow: Rc::clone(&flow) };
    let server: engine::Client = capnp_rpc::new_client(server);
    let mut system = RpcSystem::new(Box::new(network), Some(server.client));
    let disconnector = system.get_disconnector();
    let dismissed = async {
        tokio::select! {
            () = flow.dismissed() => {}
            () = stays_silent(&flow, permitted) => {}
        }
        let _ = tokio::time::timeout(GOODBYE, disconnector).await;
    };
    let outcome = tokio::select! {
        outcome = &mut system => outcome,
        () = dismissed => Ok(()),
    };
    if let Err(error) = outcome {
        // A client that was killed is no news; a malformed message is.
        if error.kind != capnp::ErrorKind::Disconnected {
            eprintln!("fleece-engine: connection of uid {uid}: {error}");
        }
    }
}

/// Completes when a client has said nothing for too long. One that may call nothing is only told so.
async fn stays_silent(flow: &Flow, permitted: bool) {
    tokio::time::sleep(SILENCE).await;
    if permitted && flow.has_spoken() {
        std::future::pending::<()>().await;
    }
}
