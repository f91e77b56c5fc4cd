//! CURRENT: the one file that says which runs are valid. It is replaced atomically; a run that it
//! does not name does not exist.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::duplicates::Duplicates;
use super::format::{Decoder, Encoder};
use super::{DetectOptions, Partition, Watermark};
use crate::error::{Context, Result};
use crate::ids::{Fingerprint, StoreId};

const NAME: &str = "CURRENT";
const TEMPORARY: &str = "CURRENT.new";
const MAGIC: &[u8; 8] = b"FLEECEIX";
/// 2: runs hold groups of entries. 3: double blocks are counted. 4: by partition. An older index is set aside
/// and refilled.
const VERSION: u16 = 4;
/// More than 256 partitions with all their runs ever need; a larger file is not ours.
const MAX_BYTES: u64 = 4 << 20;

/// Where a run stands: newer levels win.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Level {
    /// All blocks of a partition up to some time.
    Base(Partition),
    /// What came to a partition after its base.
    Delta(Partition),
    /// What came to all partitions lately.
    Young,
}

/// A valid run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct RunMeta {
    /// Its name; ascends with its age at each level, never used twice.
    pub(super) number: u64,
    pub(super) level: Level,
    pub(super) entries: u64,
    /// Length of its file.
    pub(super) bytes: u64,
    /// CRC-32C of its file.
    pub(super) crc: u32,
}

impl RunMeta {
    pub(super) fn path(&self, dir: &Path) -> PathBuf {
        run_path(dir, self.number)
    }

    /// Whether it can have entries of the partition.
    pub(super) fn touches(&self, partition: Partition) -> bool {
        match self.level {
            Level::Young => true,
            Level::Delta(own) | Level::Base(own) => own == partition,
        }
    }
}

/// The file of run `number`.
pub(super) fn run_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("run-{number:010}"))
}

/// The number in a run's file name.
pub(super) fn run_number(name: &str) -> Option<u64> {
    name.strip_prefix("run-")?.parse().ok()
}

/// What an index is of; all of it must fit, or the index is of no use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    pub(super) store: StoreId,
    pub(super) partition_bits: u8,
    pub(super) part: u64,
    pub(super) gc_epoch: u64,
}

impl Identity {
    pub(super) fn of(options: &DetectOptions) -> Self {
        Identity {
            store: options.store,
            partition_bits: options.partition_bits,
            part: options.part,
            gc_epoch: options.gc_epoch,
        }
    }

    pub(super) fn encode(&self, encoder: &mut Encoder) {
        encoder.store(self.store);
        encoder.u8(self.partition_bits);
        encoder.u64(self.part);
        encoder.u64(self.gc_epoch);
    }

    pub(super) fn decode(decoder: &mut Decoder<'_>) -> Option<Self> {
        Some(Identity {
            store: decoder.store()?,
            partition_bits: decoder.u8()?,
            part: decoder.u64()?,
            gc_epoch: decoder.u64()?,
        })
    }

    /// Why an index of `self` does not serve `wanted`, if it does not.
    pub(super) fn differs(&self, wanted: &Identity) -> Option<String> {
        if self.store != wanted.store {
            Some(format!("belongs to store {}, not {}", self.store, wanted.store))
        } else if self.partition_bits != wanted.partition_bits {
            let (bits, wanted) = (self.partition_bits, wanted.partition_bits);
            Some(format!(
                "has {} partitions, not {}",
                1_u32 << bits.min(31),
                1_u32 << wanted.min(31)
            ))
        } else if self.part != wanted.part {
            Some("is of another part of the fingerprints: the hosts of the cluster changed".into())
        } else if self != wanted {
            Some("is outdated: the garbage collection went on".into())
        } else {
            None
        }
    }
}

/// The contents of CURRENT.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Current {
    pub(super) identity: Identity,
    /// Counts the openings of the index.
    pub(super) instance: u64,
    /// All runs from this number on are still to be written.
    pub(super) next_run: u64,
    /// What the runs have; the memtable is not in it.
    pub(super) watermark: Watermark,
    /// Times that a fingerprint was found under a second address, in what the runs have.
    pub(super) duplicates: Duplicates,
    /// Ascending by number.
    pub(super) runs: Vec<RunMeta>,
}

impl Current {
    pub(super) fn new(identity: Identity, instance: u64) -> Self {
        Current {
            identity,
            instance,
            next_run: 1,
            watermark: Watermark::default(),
            duplicates: Duplicates::default(),
            runs: Vec::new(),
        }
    }

    /// Reads the file in `dir`. `Ok(None)`: there is none. `Ok(Some(Err(_)))`: why it is of no use.
    pub(super) fn load(dir: &Path) -> Result<Option<std::result::Result<Self, String>>> {
        let path = dir.join(NAME);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(|| format!("cannot open {}", path.display())),
        };
        let mut bytes = Vec::new();
        file.take(MAX_BYTES)
            .read_to_end(&mut bytes)
            .context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(Self::decode(&bytes).map_err(|why| format!("its file CURRENT {why}"))))
    }

    /// Replaces the file in `dir`. All files that it names must be synced before; it is synced
    /// itself, and with its directory also the names of all runs.
    pub(super) fn store(&self, dir: &Path) -> Result<()> {
        let (temporary, path) = (dir.join(TEMPORARY), dir.join(NAME));
        let write = || -> std::io::Result<()> {
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&temporary)?;
            file.write_all(&self.encode())?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)?;
            File::open(dir)?.sync_all()
        };
        write().context(|| format!("cannot replace {}", path.display()))
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut encoder = Encoder::begin(MAGIC, VERSION);
        self.identity.encode(&mut encoder);
        encoder.u64(self.instance);
        encoder.u64(self.next_run);
        encoder.watermark(&self.watermark);
        encoder.u32(self.duplicates.iter().len() as u32);
        for (partition, count) in self.duplicates.iter() {
            encoder.u16(partition.0);
            encoder.u64(count);
        }
        encoder.u32(self.runs.len() as u32);
        for run in &self.runs {
            let (level, partition) = match run.level {
                Level::Base(partition) => (0, partition.0),
                Level::Delta(partition) => (1, partition.0),
                Level::Young => (2, 0),
            };
            encoder.u64(run.number);
            encoder.u8(level);
            encoder.u16(partition);
            encoder.u64(run.entries);
            encoder.u64(run.bytes);
            encoder.u32(run.crc);
        }
        encoder.finish()
    }

    /// Reads the bytes of a CURRENT file; the error says what is wrong with them.
    pub(super) fn decode(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut decoder = Decoder::begin(bytes, MAGIC, VERSION)?;
        let current = Self::decode_fields(&mut decoder).ok_or("is too short")?;
        let ascending = current.runs.is_sorted_by(|a, b| a.number < b.number);
        let known = current.runs.last().is_none_or(|run| run.number < current.next_run);
        let partitions = 1_u32 << current.identity.partition_bits.min(16);
        let inside = current.runs.iter().all(|run| match run.level {
            Level::Base(Partition(p)) | Level::Delta(Partition(p)) => u32::from(p) < partitions,
            Level::Young => true,
        });
        let counted = current.duplicates.iter().all(|(Partition(p), _)| u32::from(p) < partitions);
        if !(decoder.is_empty() && ascending && known && inside && counted) {
            return Err("contradicts itself".into());
        }
        Ok(current)
    }

    fn decode_fields(decoder: &mut Decoder<'_>) -> Option<Self> {
        let identity = Identity::decode(decoder)?;
        let instance = decoder.u64()?;
        let next_run = decoder.u64()?;
        let watermark = decoder.watermark()?;
        let mut duplicates = Duplicates::default();
        for _ in 0..decoder.u32()? {
            duplicates.add(Partition(decoder.u16()?), decoder.u64()?);
        }
        let mut runs = Vec::new();
        for _ in 0..decoder.u32()? {
            let number = decoder.u64()?;
            let level = (decoder.u8()?, Partition(decoder.u16()?));
            runs.push(RunMeta {
                number,
                level: match level {
                    (0, partition) => Level::Base(partition),
                    (1, partition) => Level::Delta(partition),
                    (2, _) => Level::Young,
                    _ => return None,
                },
                entries: decoder.u64()?,
                bytes: decoder.u64()?,
                crc: decoder.u32()?,
            });
        }
        Some(Current { identity, instance, next_run, watermark, duplicates, runs })
    }
}

/// The first and the last fingerprint that can be in a partition.
pub(super) fn range_of(partition: Partition, bits: u8) -> (Fingerprint, Fingerprint) {
    let shift = 16 - u32::from(bits.min(super::options::MAX_PARTITION_BITS));
    let first = (u32::from(partition.0) << shift) as u16;
    let last = (((u32::from(partition.0) + 1) << shift) - 1) as u16;
    let mut range = ([0; Fingerprint::LEN], [0xff; Fingerprint::LEN]);
    range.0[..2].copy_from_slice(&first.to_be_bytes());
    range.1[..2].copy_from_slice(&last.to_be_bytes());
    (Fingerprint(range.0), Fingerprint(range.1))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use uuid::Uuid;

    use super::*;
    use crate::detect::header::Header;
    use crate::ids::Incarnation;

    fn current() -> Current {
        let store = StoreId(Uuid::from_u128(5));
        let identity = Identity { store, partition_bits: 4, part: 1, gc_epoch: 2 };
        let mut current = Current::new(identity, 77);
        current.watermark.raise(Incarnation(4), 1 << 40);
        let levels = [Level::Base(Partition(0)), Level::Delta(Partition(15)), Level::Young];
        for (number, level) in (3..).zip(levels) {
            current.runs.push(RunMeta { number, level, entries: 9, bytes: 8192, crc: 7 });
        }
        current.next_run = 6;
        current.duplicates.add(Partition(9), 1 << 33);
        current
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Current::load(dir.path()).unwrap(), None);
        let current = current();
        current.store(dir.path()).unwrap();
        assert_eq!(Current::load(dir.path()).unwrap(), Some(Ok(current.clone())));
        let header = Header {
            identity: current.identity,
            number: 4,
            level: Level::Delta(Partition(15)),
            entries: 9,
            watermark: current.watermark.clone(),
        };
        assert_eq!(Header::decode(&header.encode()), Ok(header.clone()));
        assert!(header.fits(&current.identity, &current.runs[1]));
        assert!(!header.fits(&current.identity, &current.runs[0]));
    }

    #[test]
    fn contradictions_and_other_formats_are_refused() {
        let decode = |current: &Current| Current::decode(&current.encode());
        let mut wrong = current();
        wrong.next_run = 5;
        assert!(decode(&wrong).is_err());
        let mut wrong = current();
        wrong.runs[0].level = Level::Base(Partition(16));
        assert!(decode(&wrong).is_err());
        let mut wrong = current();
        wrong.runs.swap(0, 1);
        assert!(decode(&wrong).is_err());
        for version in [VERSION - 1, VERSION + 1] {
            let other = Encoder::begin(MAGIC, version).finish();
            let refused = Current::decode(&other).unwrap_err();
            assert!(refused.contains(&format!("version {version}")), "{refused}");
        }
    }

    /// Any bytes, also behind a right magic and checksum, are refused or read, without a panic.
    #[test]
    fn any_bytes_are_decoded_or_refused() {
        let mut rng = StdRng::seed_from_u64(1);
        let good = current().encode();
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            bytes.truncate(rng.random_range(0..=good.len()));
            for _ in 0..rng.random_range(0..5) {
                if !bytes.is_empty() {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] = rng.random();
                }
            }
            if rng.random_bool(0.8) && bytes.len() > 14 {
                let body = bytes.len() - 4;
                let crc = crc32c::crc32c(&bytes[..body]);
                bytes[body..].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = Current::decode(&bytes);
            if bytes.len() > 8 {
                bytes[..8].copy_from_slice(b"FLEECERN");
                let _ = Header::decode(&bytes);
            }
        }
    }

    #[test]
    fn partitions_share_the_fingerprints_out() {
        for bits in 0..=8 {
            let options = DetectOptions {
                partition_bits: bits,
                ..DetectOptions::new(StoreId(Uuid::from_u128(5)))
            };
            for partition in (0..options.partitions()).map(Partition) {
                let (first, last) = range_of(partition, bits);
                assert_eq!(options.partition_of(&first), partition);
                assert_eq!(options.partition_of(&last), partition);
            }
            assert_eq!(range_of(Partition(0), bits).0.0, [0; 20]);
            assert_eq!(range_of(Partition(options.partitions() - 1), bits).1.0, [0xff; 20]);
        }
    }
}
