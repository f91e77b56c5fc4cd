//! Where the bytes of a restored disk go: into messages for the client, or right into its file.

use std::fs::File;
use std::io::{ErrorKind, IoSlice};
use std::os::unix::fs::FileTypeExt;

use super::MAX_WRITE;
use crate::error::{Context, Error, Kind, Result};

/// Bytes after which a client learns what is in its file, and we learn whether it is still there.
pub(super) const TELL: u64 = 1 << 20;

/// Takes the bytes of a disk, in any order, each once.
pub trait Target {
    /// Takes bytes that follow one another on the disk, and where they begin.
    ///
    /// # Errors
    /// Where they cannot be taken; ends the restore.
    fn put(&mut self, offset: u64, parts: &[&[u8]]) -> Result<()>;

    /// Everything was put.
    ///
    /// # Errors
    /// Where the last bytes cannot be taken.
    fn finish(&mut self) -> Result<()>;
}

/// A disk in memory.
#[cfg(test)]
impl Target for Vec<u8> {
    fn put(&mut self, offset: u64, parts: &[&[u8]]) -> Result<()> {
        let bytes = parts.concat();
        self[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
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
    fn put(&mut self, mut offset: u64, parts: &[&[u8]]) -> Result<()> {
        for mut bytes in parts.iter().copied() {
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

/// Writes parts one behind the other, together: large writes cost the page cache less. Returns their bytes.
fn write_all(file: &File, offset: u64, parts: &[&[u8]]) -> Result<u64> {
    let mut all: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let (mut rest, mut at) = (&mut all[..], offset);
    IoSlice::advance_slices(&mut rest, 0); // Lets go of what is empty.
    while !rest.is_empty() {
        let wrote = match rustix::io::pwritev(file, rest, at) {
            Ok(0) => Err(std::io::Error::from(ErrorKind::WriteZero)),
            Ok(wrote) => Ok(wrote),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => Err(error.into()),
        };
        let wrote = wrote.map_err(|error| write_error(error, at))?;
        at += wrote as u64;
        IoSlice::advance_slices(&mut rest, wrote);
    }
    Ok(at - offset)
}

fn write_error(error: std::io::Error, offset: u64) -> Error {
    let kind = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Kind::Target,
        _ => Kind::Failed,
    };
    Error::caused(kind, format!("cannot write to the target at {offset}"), error)
}

impl<S: FnMut(u64) -> Result<()>> Target for IntoFile<S> {
    fn put(&mut self, offset: u64, parts: &[&[u8]]) -> Result<()> {
        self.wrote += write_all(&self.file, offset, parts)?;
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_one_another_in_a_file() {
        let file = tempfile::tempfile().unwrap();
        let mut told = Vec::new();
        let mut target = IntoFile::new(file.try_clone().unwrap(), |bytes| {
            told.push(bytes);
            Ok(())
        })
        .unwrap();
        let parts: Vec<Vec<u8>> = (0..300).map(|n| vec![n as u8; 4096]).collect();
        let borrowed: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        target.put(8192, &borrowed).unwrap();
        target.put(0, &[b"a", b"", b"bc"]).unwrap();
        target.put(0, &[b""]).unwrap();
        target.put(0, &[]).unwrap();
        target.finish().unwrap();
        assert_eq!(told, [300 * 4096, 3]);
        let mut expected = b"abc".to_vec();
        expected.resize(8192, 0);
        expected.extend(parts.concat());
        let mut found = vec![0; expected.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).unwrap();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_full_target_is_told_with_the_place() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = write_all(&full, 4096, &[&[1; 10], &[2; 10]]).unwrap_err();
        assert_eq!(error.kind(), Kind::Target);
        assert!(error.to_string().contains("at 4096"), "{error}");
    }
}
