//! A raw file: sparse, under another name until it is whole.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::Target;
use super::writes::Writes;
use crate::engine::{BlockTarget, DiskImage, Range, Scattered};
use crate::error::{Context, Error, Kind, Result};

/// A raw file in the making; removed if it is dropped before it is finished.
pub struct FileTarget {
    writes: Writes,
    name: TempName,
}

/// A temporary name beside the final one.
pub(super) struct TempName {
    pub(super) temporary: PathBuf,
    last: PathBuf,
    keep: bool,
}

impl TempName {
    pub(super) fn beside(last: &Path) -> TempName {
        let mut name = std::ffi::OsString::from(".");
        name.push(last.file_name().unwrap_or_default());
        name.push(format!(".fleece-{}", std::process::id()));
        TempName { temporary: folder_of(last).join(name), last: last.to_owned(), keep: false }
    }

    /// Gives the file its final name, durably.
    pub(super) fn publish(mut self) -> Result<()> {
        not_in_use(&self.last)?;
        let last = self.last.display().to_string();
        std::fs::rename(&self.temporary, &self.last)
            .context(|| format!("cannot give {last} its name"))?;
        self.keep = true;
        let folder = folder_of(&self.last);
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .context(|| format!("cannot make {last} durable"))
    }
}

impl Drop for TempName {
    fn drop(&mut self) {
        if !self.keep {
            // Best effort: it may never have been created.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// The folder that a path is in.
pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Refuses an image that QEMU has open: it holds record locks on it. (A VM whose image is replaced
/// goes on writing to the old one, and all of that is lost when it ends.)
///
/// # Errors
/// [`Kind::Busy`].
pub(super) fn not_in_use(path: &Path) -> Result<()> {
    // What cannot be opened or locked is for those to tell who come to write to it.
    let Ok(file) = OpenOptions::new().read(true).write(true).open(path) else { return Ok(()) };
    match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        // Closing the file gives the lock back.
        Err(Errno::ACCESS | Errno::AGAIN) => Err(Error::new(
            Kind::Busy,
            format!("{} is in use, by a running VM or another program", path.display()),
        )),
        _ => Ok(()),
    }
}

/// A write that failed; a full file system is the target's fault.
pub(super) fn write_error(error: std::io::Error, offset: u64) -> Error {
    let kind = match error.kind() {
        std::io::ErrorKind::StorageFull
        | std::io::ErrorKind::QuotaExceeded
        | std::io::ErrorKind::FileTooLarge => Kind::Target,
        _ => Kind::Failed,
    };
    Error::caused(kind, format!("cannot write at {offset}"), error)
}

impl FileTarget {
    /// Creates the temporary file beside `path`, all holes.
    ///
    /// # Errors
    /// Where it cannot be created.
    pub fn create(path: &Path, size: u64) -> Result<FileTarget> {
        let name = TempName::beside(path);
        let open = || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&name.temporary)?;
            file.set_len(size)?;
            Ok(file)
        };
        let file = open().map_err(|error: std::io::Error| {
            Error::caused(Kind::Target, format!("cannot create {}", path.display()), error)
        })?;
        Ok(FileTarget { writes: Writes::new(file), name })
    }
}

impl BlockTarget for FileTarget {
    async fn write(&self, piece: Scattered) -> Result<()> {
        self.writes.write(piece).await
    }

    fn file(&self) -> Option<&File> {
        Some(self.writes.file())
    }

    async fn wrote(&self, bytes: u64) -> Result<()> {
        self.writes.wrote(bytes).await
    }
}

impl Target for FileTarget {
    const ORDERED: bool = false;

    async fn prepare(&self, _image: &impl DiskImage, _size: u64) -> Result<()> {
        Ok(())
    }

    async fn finish(self, _holes: &[Range]) -> Result<()> {
        self.writes.finish().await?;
        self.name.publish()
    }
}
