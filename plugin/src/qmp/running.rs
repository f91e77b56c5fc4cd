//! One backup of a VM at a time on this host: lock files per monitor socket.
//!
//! The worker and its guard hold one each. They are POSIX record locks: the kernel frees them when
//! their process dies, and says who holds them, which is how `abort` finds the worker.

use crate::error::{Context, Error, Kind, Result};
use rustix::fs::FlockOperation;
use rustix::process::{Flock, FlockType, Pid};
use sha1::Digest;
use std::fmt::Write as _;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The files about one VM in the run directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Files {
    /// Locked by the worker.
    pub(crate) worker: PathBuf,
    /// Locked by the guard.
    pub(crate) guard: PathBuf,
    /// How far the worker got, for the next backup, `cleanup` and `abort` after both died.
    pub(crate) state: PathBuf,
}

impl Files {
    pub(crate) fn new(run_dir: &Path, qmp: &Path) -> Files {
        let path = qmp.canonicalize().unwrap_or_else(|_| qmp.to_owned());
        let hash = sha1::Sha1::digest(path.as_os_str().as_encoded_bytes());
        let key = hash.iter().take(10).fold(String::new(), |mut key, byte| {
            // Writing to a String cannot fail.
            let _ = write!(key, "{byte:02x}");
            key
        });
        let file = |what: &str| run_dir.join(format!("{key}.{what}"));
        Files { worker: file("lock"), guard: file("guard"), state: file("state") }
    }
}

/// Held while a backup of the VM runs; released by the kernel if the process dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes it.
    ///
    /// # Errors
    /// `Busy`: another backup of this VM runs (its process id is in the message), or the guard of
    /// one that died is still at work. `NotPermitted`: the run directory is not ours.
    pub fn take(run_dir: &Path, qmp: &Path) -> Result<Lock> {
        let files = Files::new(run_dir, qmp);
        if let Some(pid) = holder(&files.guard)?.filter(|pid| *pid != own_pid()) {
            let text = format!(
                "the guard of another backup of the VM at {} is at work (process {})",
                qmp.display(),
                pid.as_raw_nonzero()
            );
            return Err(Error::new(Kind::Busy, text));
        }
        lock(run_dir, &files.worker)?.map(|file| Lock { _file: file }).ok_or_else(|| {
            let who = holder(&files.worker).ok().flatten().map_or(0, |p| p.as_raw_nonzero().get());
            let text = format!(
                "a backup of the VM at {} runs already (process {who}); `fleece abort` ends it",
                qmp.display()
            );
            Error::new(Kind::Busy, text)
        })
    }

    /// Takes the lock of the VM itself, once it is known who it is: it may have two monitors.
    ///
    /// # Errors
    /// `Busy`: a backup of it runs through another monitor.
    pub fn of_vm(run_dir: &Path, vm: Uuid) -> Result<Lock> {
        let file = lock(run_dir, &run_dir.join(format!("{vm}.vm")))?;
        file.map(|file| Lock { _file: file }).ok_or_else(|| {
            Error::new(
                Kind::Busy,
                format!("a backup of VM {vm} runs already, through another monitor of it"),
            )
        })
    }
}

fn own_pid() -> Pid {
    rustix::process::getpid()
}

/// Locks a file, made if need be; none if another process holds it.
pub(crate) fn lock(run_dir: &Path, path: &Path) -> Result<Option<File>> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(run_dir)
        .map_err(|e| refused(run_dir, e))?;
    let mut options = OpenOptions::new();
    let file = options
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| refused(path, e))?;
    match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::AGAIN) => Ok(None),
        Err(e) => Err(e).context(|| format!("locking {}", path.display())),
    }
}

/// The other process that holds a lock file.
pub(crate) fn holder(path: &Path) -> Result<Option<Pid>> {
    let file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(refused(path, e)),
    };
    let lock = rustix::process::fcntl_getlk(&file, &Flock::from(FlockType::WriteLock));
    Ok(lock.context(|| format!("asking who holds {}", path.display()))?.and_then(|l| l.pid))
}

fn refused(path: &Path, error: std::io::Error) -> Error {
    let kind = match error.kind() {
        std::io::ErrorKind::PermissionDenied => Kind::NotPermitted,
        _ => Kind::Failed,
    };
    Error::caused(kind, format!("run directory: {}", path.display()), error)
}
