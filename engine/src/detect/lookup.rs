//! Ascending look-ups through everything that an index has of a partition, the newest first.

use std::ops::Bound;

use super::memtable::Entry;
use super::shard::RunReader;
use super::sweep::Sweep;
use crate::error::Result;
use crate::ids::{Address, Fingerprint};

/// Nanoseconds to step over one entry in a sweep: 31 bytes at disk speed.
const SWEEP_NS: u64 = 30;
/// Nanoseconds to seek one fingerprint in a run that fits into one readahead window.
const SEEK_NS: u64 = 1_500;
/// Nanoseconds to seek one fingerprint in a larger run: a page fault on a local SSD.
const COLD_SEEK_NS: u64 = 60_000;

/// An open run.
pub(super) struct OpenRun {
    pub(super) reader: RunReader,
    /// About how many of its entries are in the partition.
    pub(super) entries: u64,
    /// How many they are at most.
    pub(super) entries_at_most: u64,
}

impl OpenRun {
    /// Whether that many ascending look-ups are cheaper as one sweep over all entries.
    fn sweeps(&self, lookups: u64) -> bool {
        let seek = if self.reader.is_small() { SEEK_NS } else { COLD_SEEK_NS };
        lookups.saturating_mul(seek) > self.entries.saturating_mul(SWEEP_NS)
    }
}

/// Answers ascending look-ups.
pub(super) struct Lookup<'r> {
    memtable: &'r [Entry],
    cursors: Vec<Cursor>,
    sweeping: bool,
}

/// A place in a run that only moves forward.
enum Cursor {
    Seek(RunReader),
    Sweep(Sweep),
}

impl<'r> Lookup<'r> {
    /// Over `memtable` and `runs`, newest first, for about `lookups` look-ups from `range`.
    pub(super) fn new(
        memtable: &'r [Entry],
        runs: Vec<OpenRun>,
        lookups: u64,
        range: (Fingerprint, Fingerprint),
    ) -> Result<Self> {
        let mut cursors = Vec::with_capacity(runs.len());
        for run in runs {
            cursors.push(if run.sweeps(lookups) {
                Cursor::Sweep(Sweep::begin(run.reader, Bound::Included(range.0), range.1)?)
            } else {
                run.reader.prefetch();
                Cursor::Seek(run.reader)
            });
        }
        let sweeping = cursors.iter().all(|cursor| matches!(cursor, Cursor::Sweep(_)));
        Ok(Lookup { memtable, cursors, sweeping })
    }

    /// Whether look-ups beyond those announced cost nothing to speak of.
    pub(super) fn is_sweeping(&self) -> bool {
        self.sweeping
    }

    /// Where the block of `fingerprint` is; never asked for one before the last one asked for.
    pub(super) fn get(&mut self, fingerprint: &Fingerprint) -> Result<Option<Address>> {
        while let Some(((head, address), rest)) = self.memtable.split_first() {
            if head == fingerprint {
                return Ok(Some(*address));
            }
            if head > fingerprint {
                break;
            }
            self.memtable = rest;
        }
        for cursor in &mut self.cursors {
            if let Some(address) = cursor.seek_forward(fingerprint)? {
                return Ok(Some(address));
            }
        }
        Ok(None)
    }
}

impl Cursor {
    fn seek_forward(&mut self, fingerprint: &Fingerprint) -> Result<Option<Address>> {
        match self {
            Cursor::Seek(run) => run.get(fingerprint),
            Cursor::Sweep(entries) => entries.seek_forward(fingerprint),
        }
    }
}
