//! A connection to one QEMU's monitor: greeting, version, identity, commands, events.

use crate::error::{Error, Kind, Result};
use crate::qmp::command::{self as cmd, Event};
use crate::qmp::schema::Features;
use crate::qmp::wire::Tap;
use crate::vms::Vm;
use qapi::futures::{QapiService, QmpStreamTokio};
use qapi::qmp::QmpCommand;
use serde_json::{Value, json};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::broadcast;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

/// QEMU greets at once, unless another client holds the monitor.
pub const GREETING_LIMIT: Duration = Duration::from_secs(3);
/// The longest that a command may take: all of ours are short, but `stop` and a transaction wait
/// for the requests in flight, and a disk can be slow.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// Events kept for a listener that is slow; one that misses some asks for the state instead.
const EVENTS: usize = 256;
/// How often a wait for a condition looks again although no event came.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// What the manifest takes of a VM's configuration.
pub const MAX_CONFIGURATION: usize = 256 << 10;
/// The oldest QEMU with snapshot-access, cbw-timeout and what else we need.
const OLDEST: Version = Version { major: 7, minor: 2, micro: 0 };

/// QEMU's version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    /// 7 of 7.2.22.
    pub major: i64,
    /// 2 of 7.2.22.
    pub minor: i64,
    /// 22 of 7.2.22.
    pub micro: i64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Who the VM is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// `-uuid`, or one made of the name.
    pub uuid: Uuid,
    /// The name under which it was asked for.
    pub name: String,
    /// `uuid` was made of the name because QEMU has none: warn, a renamed VM is another one.
    pub derived: bool,
}

/// Why a command failed.
#[derive(Clone, Debug)]
pub enum CallError {
    /// QEMU refused it.
    Refused {
        /// The command.
        command: &'static str,
        /// What it was about: a node, a job, a bitmap; may be empty.
        object: String,
        /// QMP's error class.
        class: qapi::ErrorClass,
        /// QEMU's own words.
        desc: String,
    },
    /// The connection is gone, and most likely QEMU with it.
    Gone {
        /// The command.
        command: &'static str,
    },
    /// No answer in time.
    Silent {
        /// The command.
        command: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The answer was none that we understand.
    Odd {
        /// The command.
        command: &'static str,
        /// What is wrong with it.
        detail: String,
    },
}

impl CallError {
    /// QEMU is no longer there (or cannot be reached any more).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, CallError::Gone { .. })
    }

    /// QEMU's words, where it said something.
    #[must_use]
    pub fn desc(&self) -> &str {
        match self {
            CallError::Refused { desc, .. } => desc,
            _ => "",
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Refused { command, object, class, desc } => {
                let on = if object.is_empty() { String::new() } else { format!(" of {object}") };
                write!(f, "QEMU refused {command}{on}: {desc} ({class:?})")
            }
            CallError::Gone { command } => {
                write!(f, "QEMU went away (or closed the monitor) during {command}")
            }
            CallError::Silent { command, limit } => {
                write!(f, "QEMU did not answer {command} within {} s", limit.as_secs())
            }
            CallError::Odd { command, detail } => {
                write!(f, "QEMU's answer to {command} is not understood: {detail}")
            }
        }
    }
}

impl std::error::Error for CallError {}

impl From<CallError> for Error {
    fn from(error: CallError) -> Self {
        Error::caused(Kind::Failed, "QMP", error)
    }
}

/// The result of a command.
pub type Called<T> = std::result::Result<T, CallError>;

type Service = QapiService<QmpStreamTokio<OwnedWriteHalf>>;

/// An open monitor. Commands are sent one after another; dropping a pending call is harmless.
pub struct Session {
    vm: Vm,
    identity: Identity,
    version: Version,
    features: Features,
    service: Service,
    events: broadcast::Sender<Event>,
    /// The process at the other end, and its user.
    peer: Option<Peer>,
}

/// The process behind the socket.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Its id: QEMU's own, or that of the program that opened the socket for it.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl Session {
    /// Connects, checks the version and what QEMU can do, and asks who the VM is.
    ///
    /// # Errors
    /// `NotFound`: nothing listens. `Busy`: another program holds this monitor. `NotPermitted`.
    /// `Failed`: not QEMU, or too old.
    pub async fn connect(vm: &Vm) -> Result<Session> {
        let at = || format!("VM {}: monitor {}", vm.name, vm.qmp.display());
        let socket = UnixStream::connect(&vm.qmp).await.map_err(|e| no_connection(&at(), e))?;
        Self::over(vm, socket).await
    }

    /// The same over a connection to the monitor.
    pub(super) async fn over(vm: &Vm, socket: UnixStream) -> Result<Session> {
        let Greeted { service, version, events, peer } = greet(vm, socket).await?;
        if version < OLDEST {
            return Err(Error::new(
                Kind::Failed,
                format!(
                    "VM {}: QEMU {version} is too old: Fleece needs {}.{} or newer",
                    vm.name, OLDEST.major, OLDEST.minor
                ),
            ));
        }
        let identity = Identity { uuid: Uuid::nil(), name: vm.name.clone(), derived: true };
        let features = Features { filter: false, iothread_safe: false };
        let mut session =
            Session { vm: vm.clone(), identity, version, features, service, events, peer };
        session.features = session.check_features().await?;
        session.identity = session.ask_identity().await?;
        Ok(session)
    }

    /// Who this is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How it is reached.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// QEMU's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// What it can do.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// The process behind the socket.
    #[must_use]
    pub fn peer(&self) -> Option<Peer> {
        self.peer
    }

    /// Events from now on; a slow listener loses the oldest ones.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Runs a command within [`COMMAND_LIMIT`]. `object` is what it is about, for the message.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call<C>(&self, command: C, object: &str) -> Called<C::Ok>
    where
        C: QmpCommand + 'static,
        C::Ok: Send,
    {
        self.call_within(command, object, COMMAND_LIMIT).await
    }

    /// Runs a command within a limit of its own.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call_within<C>(&self, command: C, object: &str, limit: Duration) -> Called<C::Ok>
    where
        C: QmpCommand + 'static,
        C::Ok: Send,
    {
        // In a task of its own: `qapi` matches answers by order, so a call that is dropped half
        // way (Ctrl-C, our limit) must still take its answer off the line.
        let answer = tokio::spawn(self.service.execute(command));
        let command = C::NAME;
        match timeout(limit, answer).await {
            Err(_) => Err(CallError::Silent { command, limit }),
            Ok(Err(_)) => Err(CallError::Gone { command }),
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(qapi::ExecuteError::Qapi(error)))) => Err(CallError::Refused {
                command,
                object: object.to_owned(),
                class: error.class,
                desc: error.desc,
            }),
            Ok(Ok(Err(qapi::ExecuteError::Io(error))))
                if error.kind() == std::io::ErrorKind::InvalidData =>
            {
                Err(CallError::Odd { command, detail: error.to_string() })
            }
            Ok(Ok(Err(qapi::ExecuteError::Io(error)))) => match error.get_ref() {
                Some(inner) if inner.is::<serde_json::Error>() => {
                    Err(CallError::Odd { command, detail: error.to_string() })
                }
                _ => Err(CallError::Gone { command }),
            },
        }
    }

    /// Waits until `reached` says `Some`, asked again at every event and every 200 ms.
    ///
    /// # Errors
    /// What `reached` fails with; `Silent` after `limit`.
    pub async fn wait<T>(
        &self,
        what: &'static str,
        limit: Duration,
        mut reached: impl AsyncFnMut() -> Called<Option<T>>,
    ) -> Called<T> {
        let mut events = self.events();
        let end = Instant::now() + limit;
        loop {
            if let Some(value) = reached().await? {
                return Ok(value);
            }
            if Instant::now() >= end {
                return Err(CallError::Silent { command: what, limit });
            }
            // An event, a lost event or the time: each is a reason to look again.
            drop(timeout(LOOK_AGAIN, events.recv()).await);
        }
    }

    /// The VM's configuration for the manifest: what QEMU says, its command line where it can be
    /// read, and the file that vms.d names. JSON, at most [`MAX_CONFIGURATION`] bytes.
    ///
    /// # Errors
    /// QEMU went away, or the file cannot be read or is too large.
    pub async fn configuration(&self) -> Result<Vec<u8>> {
        let block: Value = self.call(RawQueryBlock(json!({})), "").await?;
        let mut config = json!({
            "name": self.identity.name,
            "uuid": self.identity.uuid.to_string(),
            "qemu": self.version.to_string(),
            "block": block,
        });
        if let Some(line) = self.command_line() {
            config["command-line"] = json!(line);
        }
        if let Some(path) = &self.vm.config {
            config["file"] = json!({"path": path, "text": read_config(path)?});
        }
        let mut bytes = config.to_string().into_bytes();
        if bytes.len() > MAX_CONFIGURATION {
            // QEMU's view of the block layer is the part that can be had again.
            config["block"] = Value::Null;
            bytes = config.to_string().into_bytes();
        }
        if bytes.len() > MAX_CONFIGURATION {
            return Err(Error::new(
                Kind::Failed,
                format!("VM {}: its configuration is larger than 256 KiB", self.vm.name),
            ));
        }
        Ok(bytes)
    }

    /// QEMU's arguments, where the peer is QEMU and we may look.
    fn command_line(&self) -> Option<Vec<String>> {
        let raw = std::fs::read(format!("/proc/{}/cmdline", self.peer?.pid?)).ok()?;
        let words: Vec<String> = raw
            .split(|&b| b == 0)
            .filter(|w| !w.is_empty())
            .map(|w| String::from_utf8_lossy(w).into_owned())
            .collect();
        words.first()?.contains("qemu").then_some(words)
    }

    async fn check_features(&self) -> Result<Features> {
        let schema = self.call(cmd::QuerySchema(json!({})), "").await?;
        Features::of(&schema, self.version).map_err(|missing| self.lacks(&missing))
    }

    fn lacks(&self, what: &str) -> Error {
        Error::new(
            Kind::Failed,
            format!("VM {}: this build of QEMU {} lacks {what}", self.vm.name, self.version),
        )
    }

    async fn ask_identity(&self) -> Result<Identity> {
        let answer = self.call(cmd::QueryUuid(json!({})), "").await?;
        let own = self.call(cmd::QueryName(json!({})), "").await?.name;
        let name =
            if self.vm.name.is_empty() { own.unwrap_or_default() } else { self.vm.name.clone() };
        let uuid = Uuid::parse_str(&answer.uuid).unwrap_or_default();
        if !uuid.is_nil() {
            let name = if name.is_empty() { uuid.to_string() } else { name };
            return Ok(Identity { uuid, name, derived: false });
        }
        if name.is_empty() {
            return Err(Error::new(
                Kind::Usage,
                format!(
                    "the VM at {} has neither -uuid nor -name: start QEMU with one of them, or name the VM in /etc/fleece/vms.d",
                    self.vm.qmp.display()
                ),
            ));
        }
        Ok(Identity { uuid: uuid_of_name(&name), name, derived: true })
    }
}

#[derive(Clone, Debug, serde::Serialize)]
#[serde(transparent)]
struct RawQueryBlock(Value);
impl QmpCommand for RawQueryBlock {}
impl qapi::Command for RawQueryBlock {
    type Ok = Value;
    const NAME: &'static str = "query-block";
    const ALLOW_OOB: bool = false;
}

/// A stable UUID for a VM that has only a name (version 5 by form, with a namespace of ours).
#[must_use]
pub fn uuid_of_name(name: &str) -> Uuid {
    use sha1::Digest;
    let hash = sha1::Sha1::new()
        .chain_update(b"fleece: a VM without -uuid\0")
        .chain_update(name)
        .finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_sha1_bytes(bytes).into_uuid()
}

struct Greeted {
    service: Service,
    version: Version,
    events: broadcast::Sender<Event>,
    peer: Option<Peer>,
}

/// Shakes hands within [`GREETING_LIMIT`].
async fn greet(vm: &Vm, socket: UnixStream) -> Result<Greeted> {
    let path: &PathBuf = &vm.qmp;
    let at = || format!("VM {}: monitor {}", vm.name, path.display());
    let received = Arc::new(AtomicU64::new(0));
    let (events, _) = broadcast::channel(EVENTS);
    let handshake = async {
        let peer =
            socket.peer_cred().ok().map(|c| Peer { pid: c.pid(), uid: c.uid(), gid: c.gid() });
        let (read, write) = socket.into_split();
        let tap = Tap::new(read, events.clone(), received.clone());
        let not_qmp = |e: std::io::Error| {
            use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
            if matches!(e.kind(), BrokenPipe | ConnectionReset | UnexpectedEof) {
                return Error::caused(
                    Kind::NotFound,
                    format!("{}: closed at once: is the VM ending?", at()),
                    e,
                );
            }
            Error::caused(Kind::Failed, format!("{} is not a QMP monitor of QEMU", at()), e)
        };
        let greeting = QmpStreamTokio::open_split(tap, write).await.map_err(not_qmp)?;
        let v = greeting.capabilities.QMP.version.qemu.clone();
        let stream = greeting.negotiate().await.map_err(not_qmp)?;
        let (service, _task) = stream.spawn_tokio();
        let version = Version { major: v.major, minor: v.minor, micro: v.micro };
        Ok(Greeted { service, version, events: events.clone(), peer })
    };
    match timeout(GREETING_LIMIT, handshake).await {
        Ok(result) => result,
        Err(_) if received.load(Ordering::Relaxed) > 0 => Err(Error::new(
            Kind::Failed,
            format!("{} is not a QMP monitor of QEMU: it sent something else", at()),
        )),
        Err(_) => Err(Error::new(
            Kind::Busy,
            format!(
                "{} does not greet: another program holds this monitor. Give QEMU a second one (-qmp unix:PATH,server=on,wait=off)",
                at()
            ),
        )),
    }
}

fn no_connection(at: &str, error: std::io::Error) -> Error {
    use std::io::ErrorKind;
    let (kind, hint) = match error.kind() {
        ErrorKind::NotFound => (Kind::NotFound, "no such socket: is the VM running?"),
        ErrorKind::ConnectionRefused => (Kind::NotFound, "nobody listens: is the VM running?"),
        ErrorKind::PermissionDenied => (Kind::NotPermitted, "not permitted"),
        _ => (Kind::Failed, "cannot connect"),
    };
    Error::caused(kind, format!("{at}: {hint}"), error)
}

fn read_config(path: &std::path::Path) -> Result<String> {
    let fail = |e| Error::caused(Kind::Failed, format!("VM configuration {}", path.display()), e);
    let size = std::fs::metadata(path).map_err(fail)?.len();
    if size > MAX_CONFIGURATION as u64 {
        return Err(Error::new(
            Kind::Failed,
            format!("VM configuration {} is larger than 256 KiB", path.display()),
        ));
    }
    std::fs::read_to_string(path).map_err(fail)
}
