//! The spool: what the scan of a window found, in disk order, on the local disk.
//!
//! It holds fingerprints and addresses, never a guest's data. The file has no name:
//! a kill leaves nothing behind.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::error::{Context, Error, Kind, Result};
use crate::ids::{Address, Fingerprint};

/// Bytes of a spool's write and read buffers.
const BUFFER: usize = 32 << 10;
/// Blocks that one record asks about at most: a segment, so that a reader's memory is bounded.
pub const BLOCKS_PER_RECORD: usize = 512;

/// A block of a disk of the session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Position {
    /// The disk's number in the session.
    pub disk: u16,
    /// The block's number on the disk.
    pub block: u64,
}

/// What the scan says of some blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// They are zero.
    Zero(u64),
    /// They equal the parent's at the same place: this many from this address on.
    Unchanged(u16, Address),
    /// They are asked about, one fingerprint each.
    Asked(Vec<Fingerprint>),
}

const ZERO: u8 = 0;
const UNCHANGED: u8 = 1;
const ASKED: u8 = 2;
/// tag, disk, block, count
const HEAD: usize = 1 + 2 + 8 + 8;

/// Writes a spool.
pub struct Spool {
    file: BufWriter<File>,
}

impl Spool {
    /// A new one in `dir`.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn create(dir: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(dir)
            .context(|| format!("cannot create a spool in {}", dir.display()))?;
        Ok(Spool { file: BufWriter::with_capacity(BUFFER, file) })
    }

    /// Appends what was found at `at`; positions ascend.
    ///
    /// # Errors
    /// When the spool cannot be written, such as on a full disk.
    pub fn push(&mut self, at: Position, found: &Found) -> Result<()> {
        let (tag, count) = match found {
            Found::Zero(blocks) => (ZERO, *blocks),
            Found::Unchanged(blocks, _) => (UNCHANGED, u64::from(*blocks)),
            Found::Asked(fingerprints) => (ASKED, fingerprints.len() as u64),
        };
        let mut head = [0; HEAD];
        head[0] = tag;
        head[1..3].copy_from_slice(&at.disk.to_le_bytes());
        head[3..11].copy_from_slice(&at.block.to_le_bytes());
        head[11..].copy_from_slice(&count.to_le_bytes());
        let body = |file: &mut BufWriter<File>| match found {
            Found::Zero(_) => Ok(()),
            Found::Unchanged(_, address) => file.write_all(&address.to_bytes()),
            Found::Asked(fingerprints) => {
                fingerprints.iter().try_for_each(|f| file.write_all(&f.0))
            }
        };
        self.file
            .write_all(&head)
            .and_then(|()| body(&mut self.file))
            .context(|| "cannot write the session's spool".into())
    }

    /// Reads it from its start.
    ///
    /// # Errors
    /// When the spool cannot be written out.
    pub fn read(&mut self) -> Result<SpoolReader> {
        self.file.flush().context(|| "cannot write the session's spool".into())?;
        let file = self.file.get_ref();
        let mut file = file.try_clone().context(|| "cannot read the session's spool".into())?;
        file.seek(SeekFrom::Start(0)).context(|| "cannot read the session's spool".into())?;
        Ok(SpoolReader { file: BufReader::with_capacity(BUFFER, file) })
    }
}

/// Reads a spool in the order it was written. The writer must not write meanwhile.
pub struct SpoolReader {
    file: BufReader<File>,
}

impl SpoolReader {
    /// The next record, `None` at the end.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_next(&mut self) -> Result<Option<(Position, Found)>> {
        self.read_record().context(|| "cannot read the session's spool".into())
    }

    fn read_record(&mut self) -> std::io::Result<Option<(Position, Found)>> {
        let mut head = [0; HEAD];
        if !read_or_end(&mut self.file, &mut head)? {
            return Ok(None);
        }
        let [tag, d0, d1, rest @ ..] = head;
        let (block, count) = rest.split_at(8);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        let at = Position { disk: u16::from_le_bytes([d0, d1]), block: number(block) };
        let count = number(count);
        let found = match tag {
            ZERO => Found::Zero(count),
            UNCHANGED => {
                let mut address = [0; Address::LEN];
                self.file.read_exact(&mut address)?;
                Found::Unchanged(count as u16, Address::from_bytes(address))
            }
            ASKED if count <= BLOCKS_PER_RECORD as u64 => {
                let mut fingerprints = vec![Fingerprint([0; Fingerprint::LEN]); count as usize];
                for fingerprint in &mut fingerprints {
                    self.file.read_exact(&mut fingerprint.0)?;
                }
                Found::Asked(fingerprints)
            }
            _ => return Err(std::io::ErrorKind::InvalidData.into()),
        };
        Ok(Some((at, found)))
    }
}

/// Fills `buffer`, or says `false` when the input ended just before it.
fn read_or_end(input: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<bool> {
    match input.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// A file of fixed-width records without a name, appended to, then read by number.
pub struct Records<const N: usize> {
    file: BufWriter<File>,
    len: u64,
}

impl<const N: usize> Records<N> {
    /// An empty one in `dir`.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn create(dir: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(dir)
            .context(|| format!("cannot create a working file in {}", dir.display()))?;
        Ok(Records { file: BufWriter::with_capacity(BUFFER, file), len: 0 })
    }

    /// Appends a record.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn push(&mut self, record: &[u8; N]) -> Result<()> {
        self.len += 1;
        self.file.write_all(record).context(|| "cannot write a session's working file".into())
    }

    /// The records so far.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Ends the appending.
    ///
    /// # Errors
    /// When it cannot be written out.
    pub fn finish(self) -> Result<RecordsReader<N>> {
        let len = self.len;
        let file = self
            .file
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .context(|| "cannot write a session's working file".into())?;
        Ok(RecordsReader { file, len, buffer: Vec::new(), buffered: 0 })
    }
}

/// Reads records by number; a buffer makes ascending reads cheap.
pub struct RecordsReader<const N: usize> {
    file: File,
    len: u64,
    buffer: Vec<u8>,
    /// The number of the buffer's first record.
    buffered: u64,
}

impl<const N: usize> RecordsReader<N> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Record `index`, `None` past the last.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn get(&mut self, index: u64) -> Result<Option<[u8; N]>> {
        use std::os::unix::fs::FileExt;
        if index >= self.len {
            return Ok(None);
        }
        let held = (self.buffer.len() / N) as u64;
        if index < self.buffered || index >= self.buffered + held {
            let count = (self.len - index).min((BUFFER / N) as u64) as usize;
            self.buffer.resize(count * N, 0);
            self.file
                .read_exact_at(&mut self.buffer, index * N as u64)
                .context(|| "cannot read a session's working file".into())?;
            self.buffered = index;
        }
        let at = (index - self.buffered) as usize * N;
        let record = self.buffer.get(at..at + N).and_then(|r| r.try_into().ok());
        record
            .map(Some)
            .ok_or_else(|| Error::new(Kind::Failed, "a session's working file is cut short"))
    }

    /// A second reader of the same file, with a buffer of its own.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated.
    pub fn reader(&self) -> Result<Self> {
        let file = self.file.try_clone().context(|| "cannot read a working file".into())?;
        Ok(RecordsReader { file, len: self.len, buffer: Vec::new(), buffered: 0 })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ids::{ContainerId, Incarnation, Slot};

    #[test]
    fn reads_back_what_was_pushed_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address {
            container: ContainerId { incarnation: Incarnation(3), counter: 9 },
            slot: Slot(7),
        };
        let items = [
            (Position { disk: 0, block: 5 }, Found::Zero(1 << 40)),
            (Position { disk: 0, block: 1 << 41 }, Found::Unchanged(300, address)),
            (Position { disk: 1, block: 0 }, Found::Asked(vec![Fingerprint([7; 20]); 512])),
        ];
        let mut spool = Spool::create(dir.path()).unwrap();
        for (at, found) in &items {
            spool.push(*at, found).unwrap();
        }
        for _ in 0..2 {
            let mut reader = spool.read().unwrap();
            for (at, found) in &items {
                assert_eq!(reader.read_next().unwrap(), Some((*at, found.clone())));
            }
            assert_eq!(reader.read_next().unwrap(), None);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no name on the disk");
    }

    #[test]
    fn records_are_read_by_number() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::<8>::create(dir.path()).unwrap();
        (0..20_000_u64).for_each(|n| records.push(&n.to_be_bytes()).unwrap());
        let mut reader = records.finish().unwrap();
        for n in (0..20_000).chain([0, 19_999, 5, 4_096]) {
            assert_eq!(reader.get(n).unwrap(), Some(n.to_be_bytes()));
        }
        assert_eq!(reader.get(20_000).unwrap(), None);
    }
}
