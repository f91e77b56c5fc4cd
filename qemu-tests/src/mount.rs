//! Small file systems that a test can fill up, make read-only, and empty again.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::bail;
use rustix::fs::FallocateFlags;
use tempfile::TempDir;

use crate::{Result, tools};

/// The file that takes all the room.
const BALLAST: &str = "ballast";

/// A tmpfs of its own; it goes with its owner, whatever happens.
pub struct Tmpfs {
    folder: TempDir,
}

impl Tmpfs {
    /// A new one of `size` bytes.
    ///
    /// # Errors
    /// When it cannot be mounted: that takes root, or sudo.
    pub fn new(size: u64) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("fleece-fs").tempdir()?;
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        let options = format!("size={size},mode=0700,uid={},gid={}", uid.as_raw(), gid.as_raw());
        let mut mount = tools::as_root("mount");
        tools::run(mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder.path()))?;
        Ok(Tmpfs { folder })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A path in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Fills it to the last byte.
    ///
    /// # Errors
    /// The system's, but for the one that says that it is full.
    pub fn fill(&self) -> Result {
        let mut file = File::options().create(true).append(true).open(self.file(BALLAST))?;
        // Nearly all at once, so that it is full at the moment that the test chose.
        let free = rustix::fs::statvfs(self.path())?;
        let (begin, room) = (file.metadata()?.len(), free.f_bavail * free.f_frsize);
        // Another writer may be faster: then there is less room by now.
        let _ = rustix::fs::fallocate(&file, FallocateFlags::empty(), begin, room);
        let chunk = [0x5a; 4096];
        loop {
            match file.write_all(&chunk) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                Err(error) => bail!("cannot fill {}: {error}", self.path().display()),
            }
        }
    }

    /// Makes the room free again.
    ///
    /// # Errors
    /// The system's.
    pub fn free(&self) -> Result {
        match fs::remove_file(self.file(BALLAST)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Mounts it anew with options, such as `ro`, or `rw,size=64m`.
    ///
    /// # Errors
    /// mount's, such as that a file is open for writing.
    pub fn remount(&self, options: &str) -> Result {
        let options = format!("remount,{options}");
        tools::run(tools::as_root("mount").args(["-o", &options]).arg(self.path()))?;
        Ok(())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: whatever still has a file open there must not keep the mount.
        let _ = tools::as_root("umount").arg("--lazy").arg(self.path()).status();
    }
}
