//! A raw file: sparse, under another name until it is whole.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::Target;
use super::writes::Writes;
use crate::engine::{BlockTarget, DiskImage, Range, Scattered};
use crate::error::{Context, Error, Kind, Result};
use crate::image::in_use;

/// A raw file in the making; removed if it is dropped before it is finished.
pub struct FileTarget {
    writes: Writes,
    name: TempName,
}

/// A temporary name beside the final one.
pub(super) struct TempName {
    pub(super) temporary: PathBuf,
    last: PathBuf,
    /// What has the final name by then may be replaced.
    replace: bool,
    keep: bool,
}

impl TempName {
    /// Makes an empty file beside `last`, under a name that nobody can have or foresee: process ids
    /// are the same in several containers, and what dead runs left keeps its name.
    ///
    /// # Errors
    /// [`Kind::Target`]: it cannot be made.
    pub(super) fn create(last: &Path, replace: bool) -> Result<(TempName, File)> {
        let mut name = std::ffi::OsString::from(".");
        name.push(last.file_name().unwrap_or_default());
        name.push(format!(".fleece-{}", uuid::Uuid::new_v4().simple()));
        let temporary = folder_of(last).join(name);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&temporary);
        let file = file.map_err(|error| {
            Error::caused(Kind::Target, format!("cannot create {}", last.display()), error)
        })?;
        Ok((TempName { temporary, last: last.to_owned(), replace, keep: false }, file))
    }

    /// Gives the file its final name, durably.
    ///
    /// # Errors
    /// [`Kind::Busy`]: what it would replace is in use. [`Kind::Target`]: it may replace nothing,
    /// and somebody has the name by now.
    pub(super) fn publish(mut self) -> Result<()> {
        let last = self.last.display().to_string();
        let named = match self.replace {
            true => {
                not_in_use(&self.last)?;
                std::fs::rename(&self.temporary, &self.last)
            }
            false => rename_to_new(&self.temporary, &self.last),
        };
        named.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                let what = format!("{last} exists by now; add --force to overwrite it");
                Error::new(Kind::Target, what)
            }
            _ => Error::caused(Kind::Failed, format!("cannot give {last} its name"), error),
        })?;
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
            // Best effort: nobody takes what has such a name for the disk.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Gives a file another name, which nobody may have.
///
/// # Errors
/// `AlreadyExists`: somebody has it, and keeps it.
fn rename_to_new(from: &Path, to: &Path) -> std::io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system can do that; NFS cannot.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => link_to_new(from, to),
        named => named.map_err(std::io::Error::from),
    }
}

/// The same by a second name, which is never made in place of another; then the first one goes.
fn link_to_new(from: &Path, to: &Path) -> std::io::Result<()> {
    match std::fs::hard_link(from, to) {
        Ok(()) => {
            // Best effort: the file has its name.
            let _ = std::fs::remove_file(from);
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(error),
        // Some have no second names either. Then nothing better is left than to look just before.
        Err(_) if to.symlink_metadata().is_ok() => Err(std::io::ErrorKind::AlreadyExists.into()),
        Err(_) => std::fs::rename(from, to),
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
/// goes on writing to the old one, and all of that is lost when it ends.) On a block device these
/// do not always meet ours: there nobody else may have it open at all.
///
/// # Errors
/// [`Kind::Busy`].
pub(super) fn not_in_use(path: &Path) -> Result<()> {
    in_use::not_open(path)?;
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
    /// Creates the temporary file beside `path`, all holes; what is at `path` at the end may be
    /// replaced, or not.
    ///
    /// # Errors
    /// Where it cannot be created.
    pub fn create(path: &Path, size: u64, replace: bool) -> Result<FileTarget> {
        let (name, file) = TempName::create(path, replace)?;
        file.set_len(size).map_err(|error| {
            let what = format!("cannot make {} {size} bytes long", path.display());
            Error::caused(Kind::Target, what, error)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_name_that_somebody_has_is_left_to_them() {
        for give in [rename_to_new, link_to_new] {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            fs::write(path("ours"), "ours").unwrap();
            fs::write(path("theirs"), "theirs").unwrap();
            std::os::unix::fs::symlink("nowhere", path("link")).unwrap();
            for theirs in ["theirs", "link"] {
                let error = give(&path("ours"), &path(theirs)).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists, "{theirs}");
            }
            assert_eq!(fs::read(path("theirs")).unwrap(), b"theirs");
            give(&path("ours"), &path("free")).unwrap();
            assert_eq!(fs::read(path("free")).unwrap(), b"ours");
            assert!(!path("ours").exists() && path("link").is_symlink());
        }
    }

    #[test]
    fn two_restores_to_one_place_have_a_file_each() {
        let folder = tempfile::tempdir().unwrap();
        let last = folder.path().join("vda.raw");
        let (first, _) = TempName::create(&last, false).unwrap();
        let (second, _) = TempName::create(&last, false).unwrap();
        assert_ne!(first.temporary, second.temporary);
        first.publish().unwrap();
        assert_eq!(second.publish().unwrap_err().kind(), Kind::Target);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let (third, _) = TempName::create(&last, true).unwrap();
        third.publish().unwrap();
    }
}
