//! A real S3 server, and a wire to it that loses answers.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, ensure};

use crate::process::Running;
use crate::wait::{SOON, wait_until};
use crate::{Result, tools};

/// The bucket that there is.
pub const BUCKET: &str = "backups";
const KEY_ID: &str = "fleece-test";
const SECRET: &str = "not-a-secret-of-anybody";

/// A server of one bucket, in a folder.
pub struct S3 {
    folder: PathBuf,
    address: SocketAddr,
    server: Option<Running>,
}

impl S3 {
    /// Starts it. Its objects are files in `folder`.
    ///
    /// # Errors
    /// When `ci/setup` has not built it, or it does not come up.
    pub fn start(folder: &Path) -> Result<Self> {
        Self::start_at(folder, "127.0.0.1")
    }

    /// The same at another address of this machine.
    ///
    /// # Errors
    /// As [`S3::start`].
    pub fn start_at(folder: &Path, ip: &str) -> Result<Self> {
        fs::create_dir_all(folder.join(BUCKET))?;
        let address = TcpListener::bind((ip, 0))?.local_addr()?;
        let mut s3 = S3 { folder: folder.into(), address, server: None };
        s3.start_again()?;
        Ok(s3)
    }

    /// Starts it after a kill, at the same address.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_again(&mut self) -> Result {
        let program = tools::cache().join("tools/bin/s3s-fs");
        ensure!(program.exists(), "{} is missing: run ci/setup", program.display());
        let mut command = Command::new(program);
        let (ip, port) = (self.address.ip().to_string(), self.address.port().to_string());
        command.args(["--host", &ip, "--port", &port]);
        command.args(["--access-key", KEY_ID, "--secret-key", SECRET]).arg(&self.folder);
        let mut server = Running::start("s3s-fs", &mut command)?;
        wait_until(SOON, "the S3 server", || {
            ensure!(server.ended()?.is_none(), "it ended: {}", server.printed());
            Ok(TcpStream::connect(self.address).is_ok())
        })?;
        self.server = Some(server);
        Ok(())
    }

    /// SIGKILLs it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> Result {
        self.server.take().context("no S3 server runs")?.kill()
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its objects are files here.
    #[must_use]
    pub fn bucket(&self) -> PathBuf {
        self.folder.join(BUCKET)
    }

    /// Writes what a client proves itself with.
    ///
    /// # Errors
    /// The system's.
    pub fn write_credentials(path: &Path) -> Result {
        let text = format!("access_key_id = \"{KEY_ID}\"\nsecret_access_key = \"{SECRET}\"\n");
        fs::write(path, text)?;
        Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o400))?)
    }
}

/// What a bucket's policy lets somebody do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// Read, and create what is not there: what README's policy gives hosts.
    Host,
    /// Take away, too.
    Keeper,
}

/// A wire that loses answers to uploads: they arrive, and nobody hears of it. What a policy forbids does not
/// get through it.
pub struct LossyWire {
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    upstream: SocketAddr,
    policy: Policy,
    to_lose: AtomicUsize,
    refused: AtomicUsize,
}

impl LossyWire {
    /// A wire to `upstream` that loses nothing yet.
    ///
    /// # Errors
    /// The system's.
    pub fn to(upstream: SocketAddr, policy: Policy) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (to_lose, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let state = Arc::new(State { upstream, policy, to_lose, refused });
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                thread::spawn(move || pass(&client, &state));
            }
        });
        Ok(LossyWire { address, state })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Loses the answers to the next uploads.
    pub fn lose(&self, answers: usize) {
        self.state.to_lose.store(answers, Ordering::Release);
    }

    /// Answers still to be lost.
    #[must_use]
    pub fn left(&self) -> usize {
        self.state.to_lose.load(Ordering::Acquire)
    }

    /// Requests that the policy forbade.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.state.refused.load(Ordering::Acquire)
    }
}

/// What a server answers to what a policy forbids.
const FORBIDDEN: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>AccessDenied</Code>\
                         <Message>Access Denied</Message></Error>";

impl Policy {
    /// Whether a request may pass, by its first bytes; `true` for what begins none.
    fn allows(self, bytes: &[u8]) -> bool {
        let head = String::from_utf8_lossy(bytes).to_ascii_lowercase();
        let head = head.split("\r\n\r\n").next().unwrap_or_default();
        match head.split(' ').next() {
            Some("put") => head.lines().any(|line| line == "if-none-match: *"),
            // Several at once are taken away by a POST.
            Some("delete" | "post") => self == Policy::Keeper,
            _ => true,
        }
    }
}

/// One connection: requests one way, answers the other.
fn pass(client: &TcpStream, state: &Arc<State>) -> Option<()> {
    let server = TcpStream::connect(state.upstream).ok()?;
    let (mut from, mut to) = (client.try_clone().ok()?, server.try_clone().ok()?);
    let uploads = Arc::new(AtomicUsize::new(0));
    let (seen, shared) = (Arc::clone(&uploads), Arc::clone(state));
    thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut bytes) {
            if !shared.policy.allows(&bytes[..length]) {
                shared.refused.fetch_add(1, Ordering::AcqRel);
                let length = FORBIDDEN.len();
                let head = format!(
                    "HTTP/1.1 403 Forbidden\r\ncontent-type: application/xml\r\n\
                                    content-length: {length}\r\nconnection: close\r\n\r\n"
                );
                let _ = from.write_all(format!("{head}{FORBIDDEN}").as_bytes());
                break;
            }
            if bytes.starts_with(b"PUT ") {
                seen.fetch_add(1, Ordering::AcqRel);
            }
            if to.write_all(&bytes[..length]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to) = (server, client);
    let mut bytes = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut bytes) {
        let take = |left: usize| left.checked_sub(1);
        let upload = uploads.swap(0, Ordering::AcqRel) > 0;
        let losing =
            || state.to_lose.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok();
        if upload && losing() {
            break;
        }
        to.write_all(&bytes[..length]).ok()?;
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
    Some(())
}
