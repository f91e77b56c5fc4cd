//! An opened image as a disk to read.
//!
//! Its `qemu-nbd` holds QEMU's locks and knows the maps. The data of a raw image need not come
//! through a second process and a socket: that is read straight from the file.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, fadvise};

use crate::error::{Context, Result};
use crate::extents::{Extent, Wanted};
use crate::nbd::{Buffer, MAX_READ, NbdError, NbdErrorKind, Pool};
use crate::source::{DiskSource, NbdDisk};

/// Copying this much costs less than another read does.
const GAP: u64 = 32 << 10;

/// A disk whose image nobody writes to; clones share it.
#[derive(Clone, Debug)]
pub struct ImageDisk {
    export: NbdDisk,
    raw: Option<RawFile>,
}

/// The file of a raw image: the disk's bytes as they are.
#[derive(Clone, Debug)]
struct RawFile {
    file: Arc<File>,
    name: Arc<str>,
    buffers: Arc<Pool>,
}

impl ImageDisk {
    /// A disk of any format.
    pub(super) fn translated(export: NbdDisk) -> Self {
        ImageDisk { export, raw: None }
    }

    /// A raw one, which the process `server` serves; `idle` bytes of buffers are kept for the next
    /// reads. If its name is another file's by now, all of it comes through the server.
    pub(super) fn raw(
        export: NbdDisk,
        file: &Path,
        server: Option<u32>,
        idle: u32,
    ) -> Result<Self> {
        let opened = File::open(file).context(|| format!("cannot open {}", file.display()))?;
        if !server.is_some_and(|server| has_open(server, &opened)) {
            return Ok(Self::translated(export));
        }
        // Doubles the kernel's read-ahead; where there is none nothing is lost.
        let _ = fadvise(&opened, 0, None, Advice::Sequential);
        let name = file.display().to_string().into();
        let buffers = Pool::new(idle as usize);
        let raw = Some(RawFile { file: Arc::new(opened), name, buffers });
        Ok(ImageDisk { export, raw })
    }

    /// What its `qemu-nbd` serves.
    pub(super) fn export(&self) -> &NbdDisk {
        &self.export
    }
}

impl DiskSource for ImageDisk {
    fn size(&self) -> u64 {
        self.export.size()
    }

    async fn read(&self, offset: u64, length: u32) -> std::result::Result<Buffer, NbdError> {
        match &self.raw {
            Some(raw) => raw.read(offset, length, self.size()).await,
            None => self.export.read(offset, length).await,
        }
    }

    fn gap(&self) -> u64 {
        GAP
    }

    fn file(&self) -> Option<&File> {
        self.raw.as_ref().map(|raw| &*raw.file)
    }

    async fn allocation(&self, wanted: Wanted) -> std::result::Result<Vec<Extent>, NbdError> {
        self.export.allocation(wanted).await
    }

    async fn dirty(&self, wanted: Wanted) -> std::result::Result<Vec<Extent>, NbdError> {
        self.export.dirty(wanted).await
    }
}

impl RawFile {
    async fn read(
        &self,
        offset: u64,
        length: u32,
        size: u64,
    ) -> std::result::Result<Buffer, NbdError> {
        let failed = |kind, what: &dyn std::fmt::Display| {
            let place = format!("read of {length} bytes at offset {offset} of {}", self.name);
            NbdError::new(kind, &place, what)
        };
        if length > MAX_READ || offset.saturating_add(u64::from(length)) > size {
            return Err(failed(NbdErrorKind::Usage, &"past the disk's end, or too long"));
        }
        let (file, mut buffer) = (Arc::clone(&self.file), self.buffers.take(length as usize));
        let work = move || fill(&file, &mut buffer, offset).map(|()| buffer);
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(buffer)) => Ok(buffer),
            Ok(Err(error)) => {
                let number = error.raw_os_error().map_or(0, i32::unsigned_abs);
                Err(failed(NbdErrorKind::Io(number), &error))
            }
            Err(error) => Err(failed(NbdErrorKind::Disconnected, &error)),
        }
    }
}

/// Whether a process of ours has this very file open.
fn has_open(process: u32, file: &File) -> bool {
    let (Ok(this), Ok(open)) = (file.metadata(), fs::read_dir(format!("/proc/{process}/fd")))
    else {
        return false;
    };
    let is_this = |other: Metadata| (other.dev(), other.ino()) == (this.dev(), this.ino());
    // Following a link there leads to the open file, whatever its name is now.
    open.flatten().any(|fd| fs::metadata(fd.path()).is_ok_and(is_this))
}

/// Reads all of `buffer`. What is behind the file's end is zero: QEMU rounds a disk up to whole
/// sectors.
fn fill(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => {
                buffer[done..].fill(0);
                return Ok(());
            }
            Ok(n) => done += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_took_an_images_name_is_not_taken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let (image, other) = (dir.path().join("image"), dir.path().join("other"));
        fs::write(&image, b"served").unwrap();
        fs::write(&other, b"another").unwrap();
        let mut server = std::process::Command::new("sleep")
            .arg("60")
            .stdin(File::open(&image).unwrap())
            .spawn()
            .unwrap();
        assert!(has_open(server.id(), &File::open(&image).unwrap()));
        assert!(!has_open(server.id(), &File::open(&other).unwrap()));
        fs::rename(&other, &image).unwrap();
        assert!(!has_open(server.id(), &File::open(&image).unwrap()));
        server.kill().unwrap();
        server.wait().unwrap();
        assert!(!has_open(server.id(), &File::open(&image).unwrap()));
    }
}
