//! A new index, or a partition of it, from entries in any order: sort them outside memory, then write the
//! bases.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::current::{Identity, Level, RunMeta, run_path};
use super::duplicates::Duplicates;
use super::index::finish_run;
use super::memtable::Entry;
use super::records::take;
use super::shard::RunWriter;
use super::{DetectOptions, Partition, Watermark};
use crate::error::Result;
use crate::ids::{Address, Fingerprint};
use crate::sort::{Sorted, Sorter};

/// Fingerprint, arrival counted down so that the last one fed comes first, address.
const RECORD: usize = Fingerprint::LEN + 8 + Address::LEN;
/// Addresses of one fingerprint that are told apart: more need as many faults.
const MAX_OTHERS: usize = 64;

/// What is made anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Anew {
    /// The index.
    Index,
    /// The index, of another part of the fingerprints.
    Part(u64),
    /// One partition of the index.
    Partition(Partition),
}

/// A new index in the making, beside the present one. It may be fed and built on another thread;
/// it takes half a pass's memory. Dropped, it leaves the present index as it is.
pub struct Rebuild {
    dir: PathBuf,
    options: DetectOptions,
    only: Option<Partition>,
    first_number: u64,
    sorter: Sorter<RECORD>,
    fed: u64,
    token: Arc<()>,
}

/// A new index, ready for [`super::Detector::install`].
pub struct Rebuilt {
    pub(super) bases: Bases,
    pub(super) watermark: Watermark,
    /// The partition that was rebuilt; none: all of them.
    pub(super) only: Option<Partition>,
    /// What it is complete for.
    pub(super) part: u64,
    entries: u64,
    pub(super) duplicates: Duplicates,
    _token: Arc<()>,
}

/// Bases that no CURRENT names yet. Dropped, their files go: the next opening, which would sweep them, may be
/// far, and they are as large as the index.
pub(super) struct Bases {
    dir: PathBuf,
    runs: Vec<RunMeta>,
}

impl Bases {
    /// They are somebody else's from now on.
    pub(super) fn take(&mut self) -> Vec<RunMeta> {
        std::mem::take(&mut self.runs)
    }
}

impl Drop for Bases {
    fn drop(&mut self) {
        for run in &self.runs {
            let _ = fs::remove_file(run.path(&self.dir));
        }
    }
}

impl Rebuild {
    pub(super) fn new(
        dir: &Path,
        scratch: &Path,
        (options, only): (DetectOptions, Option<Partition>),
        (token, first_number): (Arc<()>, u64),
    ) -> Self {
        let sorter = Sorter::new(scratch, options.pass_memory / 2);
        Rebuild { dir: dir.into(), options, only, first_number, sorter, fed: 0, token }
    }

    /// Adds entries in any order; of equal fingerprints the one fed last wins. Those of partitions that are
    /// not rebuilt are passed over.
    pub fn feed(&mut self, entries: &[(Fingerprint, Address)]) -> Result<()> {
        let wanted = |fingerprint: &_| {
            self.only.is_none_or(|only| self.options.partition_of(fingerprint) == only)
        };
        for (fingerprint, address) in entries.iter().filter(|entry| wanted(&entry.0)) {
            let mut record = [0; RECORD];
            record[..20].copy_from_slice(&fingerprint.0);
            record[20..28].copy_from_slice(&(!self.fed).to_be_bytes());
            record[28..].copy_from_slice(&address.to_bytes());
            self.sorter.push(&record)?;
            self.fed += 1;
        }
        Ok(())
    }

    /// Sorts what was fed and writes the bases. `watermark` is what was fed: it must cover every
    /// journal entry that there was when [`super::Detector::rebuild`] was called.
    pub fn build(self, watermark: Watermark) -> Result<Rebuilt> {
        let Rebuild { dir, options, only, first_number, sorter, token, .. } = self;
        let mut newest =
            Newest { sorted: sorter.finish()?, others: Vec::new(), head: None, duplicates: 0 };
        newest.advance()?;
        let mut bases = Bases { dir: dir.clone(), runs: Vec::new() };
        let (mut entries, mut duplicates) = (0, Duplicates::default());
        // How many entries a partition has is not known before; fingerprints are spread evenly, and
        // a map that is too large costs nothing.
        let expected = newest.sorted.len();
        for partition in (0..options.partitions()).map(Partition) {
            let own = |entry: &Entry| options.partition_of(&entry.0) == partition;
            if newest.head.is_none_or(|entry| !own(&entry)) {
                continue;
            }
            let number = first_number + u64::from(partition.0);
            let path = run_path(&dir, number);
            let mut writer = RunWriter::create(path, expected, options.txn_entries)?;
            let written = loop {
                let more = writer.append(options.step_entries.max(1), || newest.next_if(own));
                match more.and_then(|more| writer.sync().map(|()| more)) {
                    Ok(true) => {}
                    Ok(false) => break Ok(()),
                    Err(error) => break Err(error),
                }
            };
            if let Err(error) = written {
                writer.discard();
                return Err(error);
            }
            duplicates.add(partition, std::mem::take(&mut newest.duplicates));
            let (level, identity) = (Level::Base(partition), Identity::of(&options));
            let base = finish_run(&dir, writer, number, level, identity, &watermark)?;
            entries += base.entries;
            bases.runs.push(base);
        }
        let part = options.part;
        Ok(Rebuilt { bases, watermark, only, part, entries, duplicates, _token: token })
    }
}

impl Rebuilt {
    /// Distinct fingerprints.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Fingerprints' further addresses.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.duplicates.total()
    }
}

/// The last fed entry of each fingerprint, ascending.
struct Newest {
    sorted: Sorted<RECORD>,
    /// Further addresses of the same fingerprint.
    others: Vec<Address>,
    head: Option<Entry>,
    duplicates: u64,
}

impl Newest {
    fn advance(&mut self) -> Result<()> {
        let last = self.head;
        self.others.clear();
        loop {
            let Some(record) = self.sorted.next()? else {
                self.head = None;
                return Ok(());
            };
            let fingerprint = Fingerprint(take(&record[..20]));
            let address = Address::from_bytes(take(&record[28..]));
            match last {
                Some((same, newest)) if same == fingerprint => {
                    // What is fed twice is one.
                    let is_new = address != newest && !self.others.contains(&address);
                    if is_new && self.others.len() < MAX_OTHERS {
                        self.others.push(address);
                    }
                    self.duplicates += u64::from(is_new);
                }
                _ => {
                    self.head = Some((fingerprint, address));
                    return Ok(());
                }
            }
        }
    }

    fn next_if(&mut self, wanted: impl Fn(&Entry) -> bool) -> Result<Option<Entry>> {
        let Some(entry) = self.head else { return Ok(None) };
        if !wanted(&entry) {
            return Ok(None);
        }
        self.advance()?;
        Ok(Some(entry))
    }
}
