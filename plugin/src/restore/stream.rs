//! Standard output, a pipe, a character device: every byte in its order, zeros included.

use std::cell::{Cell, RefCell};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;

use super::Target;
use crate::engine::{BlockTarget, DiskImage, Range, Scattered};
use crate::error::{Context, Error, Kind, Result};

/// Zeros written at once.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A stream and how far it is.
pub struct StreamTarget {
    output: RefCell<File>,
    position: Cell<u64>,
    size: u64,
}

impl StreamTarget {
    /// Opens the path, or standard output.
    ///
    /// # Errors
    /// [`Kind::Target`] where it cannot be opened.
    pub fn open(path: Option<&Path>, size: u64) -> Result<StreamTarget> {
        let output = match path {
            Some(path) => OpenOptions::new().write(true).open(path),
            None => std::io::stdout().as_fd().try_clone_to_owned().map(File::from),
        };
        let output =
            output.map_err(|error| Error::caused(Kind::Target, "cannot open the output", error))?;
        Ok(StreamTarget { output: RefCell::new(output), position: Cell::new(0), size })
    }

    fn put(&self, data: &[u8]) -> Result<()> {
        let at = self.position.get();
        self.output
            .borrow_mut()
            .write_all(data)
            .context(|| format!("cannot write byte {at} to the output"))?;
        self.position.set(at + data.len() as u64);
        Ok(())
    }

    fn zeros_until(&self, offset: u64) -> Result<()> {
        while self.position.get() < offset {
            let gap = usize::try_from(offset - self.position.get()).unwrap_or(ZEROS.len());
            self.put(&ZEROS[..gap.min(ZEROS.len())])?;
        }
        Ok(())
    }
}

impl BlockTarget for StreamTarget {
    async fn write(&self, piece: Scattered) -> Result<()> {
        for (offset, bytes) in piece.iter() {
            let at = self.position.get();
            if offset < at {
                return Err(Error::new(
                    Kind::Failed,
                    format!("byte {offset} came after byte {at}"),
                ));
            }
            self.zeros_until(offset)?;
            self.put(&bytes)?;
        }
        Ok(())
    }
}

impl Target for StreamTarget {
    const ORDERED: bool = true;

    async fn prepare(&self, _image: &impl DiskImage, _size: u64) -> Result<()> {
        Ok(())
    }

    async fn finish(self, _holes: &[Range]) -> Result<()> {
        self.zeros_until(self.size)?;
        self.output.borrow_mut().flush().context(|| "cannot finish the output".to_owned())
    }
}
