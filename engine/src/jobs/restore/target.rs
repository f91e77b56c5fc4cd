//! Where the bytes of a restored disk go: into messages for the client, or right into its file.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, FileTypeExt};

use super::MAX_WRITE;
use crate::error::{Context, Error, Kind, Result};

/// Bytes after which a client learns what is in its file, and we learn whether it is still there.
const TELL: u64 = 1 << 20;

/// Takes the bytes of a disk, in any order, each once.
pub trait Target {
    /// Takes bytes and their place.
    ///
    /// # Errors
    /// Where they cannot be taken; ends the restore.
    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Everything was put.
    ///
    /// # Errors
    /// Where the last bytes cannot be taken.
    fn finish(&mut self) -> Result<()>;
}

/// A disk in memory.
#[cfg(test)]
impl Target for Vec<u8> {
    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Bytes of one or more runs of a disk.
#[derive(Clone, Default, Debug)]
pub struct Scattered {
    /// Where they belong: (offset, length) in bytes, in the order of `bytes`.
    pub runs: Vec<(u64, u64)>,
    /// All runs, one after the other.
    pub bytes: Vec<u8>,
}

impl Scattered {
    fn with_room() -> Self {
        Scattered { runs: Vec::new(), bytes: Vec::with_capacity(MAX_WRITE) }
    }

    /// Each run: its offset and its bytes.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut rest = &self.bytes[..];
        self.runs.iter().map(move |(offset, length)| {
            let (run, others) = rest.split_at(*length as usize);
            rest = others;
            (*offset, run)
        })
    }

    fn append(&mut self, offset: u64, bytes: &[u8]) {
        match self.runs.last_mut() {
            Some((first, length)) if *first + *length == offset => *length += bytes.len() as u64,
            _ => self.runs.push((offset, bytes.len() as u64)),
        }
        self.bytes.extend_from_slice(bytes);
    }
}

/// Collects bytes until they fill a message.
pub struct Messages<S> {
    send: S,
    waiting: Scattered,
}

impl<S: FnMut(Scattered) -> Result<()>> Messages<S> {
    /// Full ones go to `send`: at most [`MAX_WRITE`] bytes each.
    pub fn new(send: S) -> Self {
        Messages { send, waiting: Scattered::with_room() }
    }
}

impl<S: FnMut(Scattered) -> Result<()>> Target for Messages<S> {
    fn put(&mut self, mut offset: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = MAX_WRITE - self.waiting.bytes.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.waiting.append(offset, now);
            offset += now.len() as u64;
            bytes = later;
            if self.waiting.bytes.len() == MAX_WRITE {
                self.finish()?;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        match self.waiting.bytes.is_empty() {
            true => Ok(()),
            false => (self.send)(std::mem::replace(&mut self.waiting, Scattered::with_room())),
        }
    }
}

/// Writes right into a file or device, whose owner makes it durable.
pub struct IntoFile<S> {
    file: File,
    told: S,
    /// Bytes since it was told last.
    wrote: u64,
}

impl<S: FnMut(u64) -> Result<()>> IntoFile<S> {
    /// `told` learns how many bytes were written since the last time.
    ///
    /// # Errors
    /// [`Kind::Usage`] for what is neither a regular file nor a block device: a write to it may
    /// never end.
    pub fn new(file: File, told: S) -> Result<Self> {
        let kind = file.metadata().context(|| "cannot look at the target".into())?.file_type();
        match kind.is_file() || kind.is_block_device() {
            true => Ok(IntoFile { file, told, wrote: 0 }),
            false => Err(Error::new(
                Kind::Usage,
                "the target that was handed over is neither a regular file nor a block device",
            )),
        }
    }
}

impl<S: FnMut(u64) -> Result<()>> Target for IntoFile<S> {
    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|error| {
            let kind = match error.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                    Kind::Target
                }
                _ => Kind::Failed,
            };
            Error::caused(kind, format!("cannot write to the target at {offset}"), error)
        })?;
        self.wrote += bytes.len() as u64;
        match self.wrote < TELL {
            true => Ok(()),
            false => (self.told)(std::mem::take(&mut self.wrote)),
        }
    }

    fn finish(&mut self) -> Result<()> {
        match std::mem::take(&mut self.wrote) {
            0 => Ok(()),
            last => (self.told)(last),
        }
    }
}
