//! A block device: what is zero is discarded or zeroed, the rest written in place.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::Target;
use super::file::write_error;
use super::writes::Writes;
use crate::engine::{BlockTarget, DiskImage, Range, Scattered};
use crate::error::{Context, Error, Kind, Result};
use crate::units::human_bytes;

/// Zeros written at once where a device can neither discard nor zero a range.
const ZEROS: usize = 256 << 10;

/// A block device that nobody else uses.
pub struct DeviceTarget {
    writes: Writes,
}

impl DeviceTarget {
    /// Opens it for ourselves alone.
    ///
    /// # Errors
    /// [`Kind::Target`] where it is too small, mounted or otherwise in use.
    pub fn open(path: &Path, size: u64) -> Result<DeviceTarget> {
        let shown = path.display();
        let mut device = OpenOptions::new()
            .write(true)
            .custom_flags(OFlags::EXCL.bits().cast_signed())
            .open(path)
            .map_err(|error| {
                let what = format!("cannot open {shown} for ourselves (is it mounted or in use?)");
                Error::caused(Kind::Target, what, error)
            })?;
        let room = device
            .seek(SeekFrom::End(0))
            .context(|| format!("cannot learn the size of {shown}"))?;
        if room < size {
            let (room, size) = (human_bytes(room), human_bytes(size));
            let what = format!("{shown} has {room}, the disk needs {size}; use a larger device");
            return Err(Error::new(Kind::Target, what));
        }
        Ok(DeviceTarget { writes: Writes::new(device) })
    }

    /// Makes a range read as zeros, by the cheapest way that the device knows.
    fn zero(&self, offset: u64, length: u64) -> Result<()> {
        let ways = [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE];
        for way in ways {
            if fallocate(self.writes.file(), way | FallocateFlags::KEEP_SIZE, offset, length)
                .is_ok()
            {
                return Ok(());
            }
        }
        let zeros = vec![0; ZEROS.min(usize::try_from(length).unwrap_or(ZEROS))];
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let piece = zeros.len().min(usize::try_from(end - at).unwrap_or(ZEROS));
            self.writes
                .file()
                .write_all_at(&zeros[..piece], at)
                .map_err(|error| write_error(error, at))?;
            at += piece as u64;
        }
        Ok(())
    }
}

impl BlockTarget for DeviceTarget {
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

impl Target for DeviceTarget {
    const ORDERED: bool = false;

    async fn prepare(&self, image: &impl DiskImage, size: u64) -> Result<()> {
        let mut at = 0;
        while at < size {
            let extents = image.extents(at, size - at).await?;
            let begun = at;
            for extent in extents {
                if extent.zero {
                    self.zero(extent.offset, extent.length.min(size - extent.offset))?;
                }
                at = extent.offset + extent.length;
            }
            if at <= begun {
                return Err(Error::new(
                    Kind::Failed,
                    format!("the engine has no map of byte {at}"),
                ));
            }
        }
        Ok(())
    }

    async fn finish(self, holes: &[Range]) -> Result<()> {
        holes.iter().try_for_each(|hole| self.zero(hole.offset, hole.length))?;
        self.writes.finish().await
    }
}
