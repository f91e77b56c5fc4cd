//! Scratch files of fixed-width records, written once and read once in order.
//!
//! They serve the process that writes them and no other: the next opening of the index removes
//! them. So they are not synced, and their length and checksum are kept in memory.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use crate::error::{Context, Error, Kind, Result};

/// Bytes read or written at a time by a pass; a pass has four such files open, and two more after slices moved.
pub(super) const BUFFER: usize = 64 << 10;

/// A finished file of records.
#[derive(Debug)]
pub(super) struct RecordFile {
    path: PathBuf,
    records: u64,
    crc: u32,
}

/// Appends records of `N` bytes.
pub(super) struct RecordWriter<const N: usize> {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    /// Bytes beyond which the buffer goes to the file.
    limit: usize,
    flushed: u64,
    crc: u32,
}

/// Reads the records back and ends with the checksum's proof.
pub(super) struct RecordReader<const N: usize> {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    at: usize,
    left: u64,
    crc: u32,
    expected: u32,
}

impl<const N: usize> RecordWriter<N> {
    pub(super) fn create(path: PathBuf, buffer: usize) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .context(|| format!("cannot create {}", path.display()))?;
        let limit = (buffer / N).max(1) * N;
        Ok(RecordWriter { file, path, buffer: Vec::new(), limit, flushed: 0, crc: 0 })
    }

    /// Adds a record; after an error it is not added, and the call may be repeated.
    pub(super) fn push(&mut self, record: &[u8; N]) -> Result<()> {
        if self.buffer.len() >= self.limit {
            self.flush()?;
        }
        if self.buffer.capacity() == 0 {
            self.buffer.reserve_exact(self.limit);
        }
        self.buffer.extend_from_slice(record);
        Ok(())
    }

    pub(super) fn records(&self) -> u64 {
        (self.flushed + self.buffer.len() as u64) / N as u64
    }

    /// Writes what is buffered; after an error the call may be repeated.
    pub(super) fn flush(&mut self) -> Result<()> {
        // At a place of its own, so that a repeated write covers a torn one.
        self.file
            .write_all_at(&self.buffer, self.flushed)
            .context(|| format!("cannot write {}", self.path.display()))?;
        self.crc = crc32c::crc32c_append(self.crc, &self.buffer);
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<RecordFile> {
        self.flush()?;
        Ok(RecordFile { records: self.records(), path: self.path, crc: self.crc })
    }
}

impl RecordFile {
    pub(super) fn records(&self) -> u64 {
        self.records
    }

    pub(super) fn read<const N: usize>(&self) -> Result<RecordReader<N>> {
        let file =
            File::open(&self.path).context(|| format!("cannot open {}", self.path.display()))?;
        Ok(RecordReader {
            file,
            path: self.path.clone(),
            buffer: Vec::new(),
            at: 0,
            left: self.records,
            crc: 0,
            expected: self.crc,
        })
    }

    pub(super) fn remove(&self) {
        // A leftover costs disk space until the next opening; the pass is done all the same.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl<const N: usize> RecordReader<N> {
    /// The next record. The end is an error if what was read is not what was written.
    #[allow(clippy::should_implement_trait)] // It can fail.
    pub(super) fn next(&mut self) -> Result<Option<[u8; N]>> {
        if self.at == self.buffer.len() && !self.fill()? {
            return Ok(None);
        }
        let Some(record) = self.buffer[self.at..].first_chunk::<N>() else { return Ok(None) };
        self.at += N;
        Ok(Some(*record))
    }

    fn fill(&mut self) -> Result<bool> {
        let records = self.left.min((BUFFER / N) as u64);
        if records == 0 {
            if self.crc != self.expected {
                let message = format!("{} is damaged: its checksum is wrong", self.path.display());
                return Err(Error::new(Kind::Damaged, message));
            }
            return Ok(false);
        }
        self.buffer.resize(records as usize * N, 0);
        self.at = 0;
        self.file.read_exact(&mut self.buffer).map_err(|error| {
            let kind = match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Kind::Damaged,
                _ => Kind::Failed,
            };
            Error::caused(kind, format!("cannot read {}", self.path.display()), error)
        })?;
        self.crc = crc32c::crc32c_append(self.crc, &self.buffer);
        self.left -= records;
        Ok(true)
    }
}

/// The first `N` bytes; zeros where there are fewer.
pub(super) fn take<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk::<N>().copied().unwrap_or([0; N])
}
