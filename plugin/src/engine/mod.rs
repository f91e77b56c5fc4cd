//! The engine of this host, as the rest of the plugin sees it.
//!
//! Only this folder names Cap'n Proto. Its objects are not `Send`: everything
//! here lives on the plugin's one `LocalSet` thread.

mod convert;
mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod image;
mod session;
mod types;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use capnp::message::ReaderOptions;
use capnp_rpc::{RpcSystem, rpc_twoparty_capnp::Side, twoparty::VatNetwork};
use fleece_schema::engine_capnp as wire;
use futures::io::{BufReader, BufWriter};
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};
use uuid::Uuid;

pub use image::{BlockTarget, DiskImage, Image, Scattered};
pub use session::{BackupSession, Session};
pub use types::*;

use crate::error::{Error, Kind, Result};
use convert::{Wire, engine_error};
use files::{Files, Writing};

/// Where the engine listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/fleece/engine.sock";

/// Blocks of data in one window of a backup.
pub const BLOCKS_PER_WINDOW: u64 = wire::BLOCKS_PER_WINDOW as u64;

/// Blocks of data, and extents, in one call of `submit`.
pub const BLOCKS_PER_SUBMIT: usize = wire::BLOCKS_PER_SUBMIT as usize;

/// Bytes of data in one call.
pub const MAX_WRITE: u32 = wire::MAX_WRITE;

/// Bytes of disks that were lent, in one call.
pub const MAX_LENT: u32 = wire::MAX_LENT;

/// Words (8 bytes) that one message may make us look at, and so allocate: the longest
/// answers are lists of snapshots, a few hundred bytes each.
const MESSAGE_WORDS: usize = 1 << 20;

/// Bytes of streaming calls on their way: two of the largest writes keep the engine busy.
const STREAM_WINDOW: usize = 2 * MAX_WRITE as usize;

/// Buffer of either direction of the socket; large data bypasses it.
const SOCKET_BUFFER: usize = 16 << 10;

/// A live engine says hello at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(20);

/// A connection to the engine that said hello.
pub struct Engine {
    socket: PathBuf,
    connection: RefCell<Connection>,
    info: EngineInfo,
}

/// What calls go through.
struct Connection {
    client: wire::engine::Client,
    /// Files that are handed over with calls, to an engine that takes them.
    files: Option<Rc<Files>>,
}

/// What became of a session whose engine went away.
pub enum Resumed {
    /// It had been committed.
    Committed(Box<Snapshot>),
    /// It goes on, from its first block.
    Session(BackupPlan, Session),
}

/// A stored disk and the way to read it.
pub struct OpenDisk {
    /// The snapshot that it belongs to.
    pub snapshot: Snapshot,
    /// Which of its disks.
    pub disk: Disk,
    /// Its bytes.
    pub image: Image,
}

impl Engine {
    /// Connects and says hello; must run inside a `LocalSet`.
    ///
    /// # Errors
    /// [`Kind::NoEngine`] where nobody listens, [`Kind::Failed`] where another version does.
    pub async fn connect(socket: &Path) -> Result<Engine> {
        let (connection, info) = dial(socket).await?;
        Ok(Engine { socket: socket.to_owned(), connection: RefCell::new(connection), info })
    }

    /// Connects again after it was gone. Sessions do not come with it.
    ///
    /// # Errors
    /// As [`Engine::connect`]; [`Kind::NoStore`] where the engine has another store now.
    pub async fn reconnect(&self) -> Result<()> {
        let (connection, info) = dial(&self.socket).await?;
        let same = |info: &EngineInfo| (info.store, info.block_size, info.fingerprint_state);
        if same(&info) != same(&self.info) {
            let what = format!(
                "the engine at {} has another store now ({}); the backup began in {}",
                self.socket.display(),
                info.store,
                self.info.store
            );
            return Err(Error::new(Kind::NoStore, what));
        }
        self.connection.replace(connection);
        Ok(())
    }

    /// What it said about itself.
    #[must_use]
    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    /// What became of the snapshots that dirty bitmaps of this VM name, and its newest snapshot.
    ///
    /// One that is neither committed nor ended is ended here, for good.
    ///
    /// # Errors
    /// [`Kind::Busy`] while a backup of this VM runs.
    pub async fn settle(
        &self,
        vm: Uuid,
        snapshots: &[SnapshotId],
    ) -> Result<(Vec<Fate>, Option<Snapshot>)> {
        let doing = "cannot settle earlier backups";
        let mut request = self.connection.borrow().client.settle_request();
        request.get().set_vm(vm.as_bytes());
        let mut list = request.get().init_snapshots(count(snapshots.len()));
        for (i, id) in snapshots.iter().enumerate() {
            list.set(count(i), id.0.as_str());
        }
        let decode = async {
            let response = request.send().promise.await?;
            let response = response.get()?;
            let fates = response.get_fates()?.iter().map(|fate| {
                match fate.map_err(capnp::Error::from)? {
                    wire::Fate::Committed => Ok(Fate::Committed),
                    wire::Fate::Ended => Ok(Fate::Ended),
                }
            });
            let fates = fates.collect::<Wire<Vec<_>>>()?;
            let latest = match response.has_latest() {
                true => Some(convert::snapshot(response.get_latest()?)?),
                false => None,
            };
            Ok((fates, latest))
        };
        let (fates, latest) = decode.await.map_err(|error| engine_error(&error, doing))?;
        if fates.len() != snapshots.len() {
            return Err(Error::new(Kind::Failed, format!("{doing}: the engine left some out")));
        }
        Ok((fates, latest))
    }

    /// Waits for a reader's place and begins a session.
    ///
    /// # Errors
    /// [`Kind::Busy`] while another backup of this VM runs; [`Kind::Usage`] where the name
    /// belongs to another VM.
    pub async fn open_backup(&self, wanted: &BackupRequest) -> Result<(BackupPlan, Session)> {
        let mut request = self.connection.borrow().client.open_backup_request();
        session::fill(request.get().init_request(), wanted);
        let files = self.connection.borrow().files.clone();
        let decode = async {
            let response = request.send().promise.await?;
            let response = response.get()?;
            let plan = convert::backup_plan(response.get_plan()?, wanted.disks.len())?;
            Ok((plan, Session::new(response.get_session()?, files)))
        };
        decode.await.map_err(|error| {
            engine_error(&error, &format!("cannot begin a backup of {}", wanted.vm_name))
        })
    }

    /// Goes on with a session whose engine went away, for the same snapshot.
    ///
    /// # Errors
    /// [`Kind::Failed`] where it was ended, or a newer snapshot is there.
    pub async fn resume_backup(
        &self,
        wanted: &BackupRequest,
        snapshot: &SnapshotId,
    ) -> Result<Resumed> {
        let mut request = self.connection.borrow().client.resume_backup_request();
        request.get().set_snapshot(snapshot.0.as_str());
        session::fill(request.get().init_request(), wanted);
        let files = self.connection.borrow().files.clone();
        let decode = async {
            let response = request.send().promise.await?;
            let response = response.get()?;
            if response.has_committed() {
                let committed = convert::snapshot(response.get_committed()?)?;
                return Ok(Resumed::Committed(Box::new(committed)));
            }
            let plan = convert::backup_plan(response.get_plan()?, wanted.disks.len())?;
            if plan.snapshot != *snapshot {
                return Err(capnp::Error::failed("the plan is another snapshot's".into()));
            }
            Ok(Resumed::Session(plan, Session::new(response.get_session()?, files)))
        };
        decode.await.map_err(|error| {
            engine_error(&error, &format!("cannot go on with the backup of {}", wanted.vm_name))
        })
    }

    /// The snapshots of one VM (name or UUID), oldest first, or of all for "".
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is no such VM.
    pub async fn snapshots(&self, vm: &str) -> Result<Vec<Snapshot>> {
        let mut request = self.connection.borrow().client.snapshots_request();
        request.get().set_vm(vm);
        let decode = async {
            let response = request.send().promise.await?;
            response.get()?.get_snapshots()?.iter().map(convert::snapshot).collect::<Wire<_>>()
        };
        decode.await.map_err(|error| engine_error(&error, "cannot list snapshots"))
    }

    /// Opens a stored disk. `snapshot`: id, "latest", a date or ""; `disk`: name, UUID,
    /// or "" where there is one only.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is none, [`Kind::Usage`] where there are several.
    pub async fn open_disk(&self, vm: &str, snapshot: &str, disk: &str) -> Result<OpenDisk> {
        let files = self.connection.borrow().files.clone();
        let mut request = self.connection.borrow().client.open_disk_request();
        let mut wanted = request.get();
        wanted.set_vm(vm);
        wanted.set_snapshot(snapshot);
        wanted.set_disk(disk);
        let decode = async {
            let response = request.send().promise.await?;
            let response = response.get()?;
            Ok(OpenDisk {
                snapshot: convert::snapshot(response.get_snapshot()?)?,
                disk: convert::disk(response.get_disk()?)?,
                image: Image::new(response.get_image()?, files),
            })
        };
        decode.await.map_err(|error| engine_error(&error, &format!("cannot open {vm}")))
    }

    /// The configuration that the VM had at a snapshot.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is no such snapshot.
    pub async fn vm_config(&self, vm: &str, snapshot: &str) -> Result<Vec<u8>> {
        let mut request = self.connection.borrow().client.vm_config_request();
        request.get().set_vm(vm);
        request.get().set_snapshot(snapshot);
        let decode = async {
            let response = request.send().promise.await?;
            Ok(response.get()?.get_config()?.to_vec())
        };
        decode
            .await
            .map_err(|error| engine_error(&error, &format!("cannot read {vm}'s configuration")))
    }

    /// What the engine and its store hold.
    ///
    /// # Errors
    /// Where the engine cannot tell.
    pub async fn status(&self) -> Result<Status> {
        let request = self.connection.borrow().client.status_request();
        let decode = async {
            let response = request.send().promise.await?;
            convert::status(response.get()?.get_status()?)
        };
        decode.await.map_err(|error| engine_error(&error, "cannot read the status"))
    }
}

async fn dial(socket: &Path) -> Result<(Connection, EngineInfo)> {
    let stream = tokio::net::UnixStream::connect(socket).await.map_err(|error| {
        let kind = match error.kind() {
            std::io::ErrorKind::PermissionDenied => Kind::NotPermitted,
            _ => Kind::NoEngine,
        };
        let hint = match kind {
            Kind::NotPermitted => "run fleece as root or as a member of the socket's group",
            _ => "start fleece-engine, or name its socket with --engine or FLEECE_ENGINE",
        };
        Error::caused(kind, format!("no engine at {} ({hint})", socket.display()), error)
    })?;
    let (reader, half) = stream.into_split();
    let files = Rc::<Files>::default();
    let writer = Writing { half, files: Rc::clone(&files) };
    let reader = BufReader::with_capacity(SOCKET_BUFFER, reader.compat());
    let writer = BufWriter::with_capacity(SOCKET_BUFFER, writer.compat_write());
    let mut options = ReaderOptions::new();
    options.traversal_limit_in_words(Some(MESSAGE_WORDS));
    let mut network = VatNetwork::new(reader, writer, Side::Client, options);
    network.set_window_size(STREAM_WINDOW);
    let mut rpc = RpcSystem::new(Box::new(network), None);
    let client: wire::engine::Client = rpc.bootstrap(Side::Server);
    tokio::task::spawn_local(rpc);
    let info = tokio::time::timeout(HELLO_TIMEOUT, hello(&client)).await.map_err(|_| {
        let socket = socket.display();
        Error::new(Kind::NoEngine, format!("{socket} accepts but says nothing: not an engine?"))
    })??;
    let files = info.takes_files.then_some(files);
    Ok((Connection { client, files }, info))
}

async fn hello(client: &wire::engine::Client) -> Result<EngineInfo> {
    let mut request = client.hello_request();
    let mut ours = request.get();
    ours.set_program("fleece");
    ours.set_version(env!("CARGO_PKG_VERSION"));
    ours.set_protocol(wire::PROTOCOL_VERSION);
    ours.set_oldest_protocol(wire::OLDEST_PROTOCOL);
    let decode = async {
        let response = request.send().promise.await?;
        convert::info(response.get()?.get_info()?)
    };
    decode.await.map_err(|error| engine_error(&error, "the engine refuses to talk to us"))
}

/// A length for the wire; our lists are far below its limit.
fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}
