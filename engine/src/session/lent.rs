//! The image of a disk that the plugin lent: granted blocks are read from it, instead of coming
//! through the socket.

use std::fs::File;
use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt};

use rustix::fs::{Advice, fadvise};

use crate::error::{Context, Error, Kind, Result};

/// A file whose bytes are a disk's, at their offsets.
pub(super) struct LentImage {
    file: File,
}

impl LentImage {
    /// Takes a file from a client.
    ///
    /// # Errors
    /// [`Kind::Usage`] where it is none that can be read in any order.
    pub(super) fn new(file: File) -> Result<LentImage> {
        let kind = file.metadata().context(|| "a file that was lent".to_owned())?.file_type();
        if kind.is_file() || kind.is_block_device() {
            return Ok(LentImage { file });
        }
        let what = "what was lent as a disk's image is neither a file nor a block device";
        Err(Error::new(Kind::Usage, what))
    }

    /// Lets the kernel read ahead what will be asked for.
    pub(super) fn announce(&self, offset: u64, length: u64) {
        // Where it cannot, the reads take longer.
        let _ = fadvise(&self.file, offset, NonZeroU64::new(length), Advice::WillNeed);
    }

    /// Reads all of `buffer`. What is behind the file's end is zero: QEMU rounds a disk up to
    /// whole sectors, and a disk's last block is padded.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => {
                    buffer[done..].fill(0);
                    return Ok(());
                }
                Ok(n) => done += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
