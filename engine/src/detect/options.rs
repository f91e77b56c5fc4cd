//! The settings of detection, and the partitions they make.

use std::time::Duration;

use crate::ids::{Fingerprint, StoreId};

/// More would make the shared write buffers of the logs smaller than half a page.
pub const MAX_PARTITION_BITS: u8 = 8;

/// A slice of the fingerprint space: its number among the leading bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Partition(pub u16);

impl Partition {
    /// Whose fingerprint this is, of so many partitions: a power of two, 256 at most.
    #[must_use]
    pub fn of(fingerprint: &Fingerprint, partitions: u16) -> Self {
        let [first, ..] = fingerprint.0;
        Partition(((u32::from(first) * u32::from(partitions)) >> u8::BITS) as u16)
    }
}

/// How detection works; the defaults fit one host with the default memory budget.
#[derive(Clone, Debug)]
pub struct DetectOptions {
    /// The store whose blocks are indexed; an index of another one is set aside.
    pub store: StoreId,
    /// Leading bits of a fingerprint that name its partition, at most 8.
    pub partition_bits: u8,
    /// Which part of all fingerprints is indexed; an index of another part is set aside.
    pub part: u64,
    /// Garbage collections the index has seen; an older index is set aside.
    pub gc_epoch: u64,
    /// Bytes a pass may take: three quarters sort runs, one quarter merge windows.
    pub pass_memory: usize,
    /// A log of this many requests is due for a pass.
    pub pass_requests: u64,
    /// A log whose first request waits this long is due for a pass.
    pub pass_age: Duration,
    /// Entries of fresh blocks kept in memory before they become a young run.
    pub memtable_entries: usize,
    /// Entries of one LMDB transaction: its dirty pages are anonymous memory (50,000 take 1.5 MiB).
    pub txn_entries: usize,
    /// Young runs that are merged into deltas.
    pub young_runs: usize,
    /// Deltas of a partition beyond which the light ones are merged into one.
    pub delta_runs: usize,
    /// A base is rewritten when its deltas have more than this fraction of its entries (1/n).
    pub delta_fraction: u64,
    /// Entries that one step of a merge moves (`Detector::maintain`): bounds a pass's wait.
    pub step_entries: usize,
}

impl DetectOptions {
    /// The defaults for `store`.
    #[must_use]
    pub fn new(store: StoreId) -> Self {
        DetectOptions {
            store,
            partition_bits: 4,
            part: 0,
            gc_epoch: 0,
            pass_memory: 8 << 20,
            pass_requests: 256 << 10,
            pass_age: Duration::from_secs(10),
            memtable_entries: 65_536,
            txn_entries: 50_000,
            young_runs: 8,
            delta_runs: 4,
            delta_fraction: 5,
            step_entries: 500_000,
        }
    }

    /// Number of partitions.
    #[must_use]
    pub fn partitions(&self) -> u16 {
        1 << self.partition_bits.min(MAX_PARTITION_BITS)
    }

    /// Whose fingerprint this is.
    #[must_use]
    pub fn partition_of(&self, fingerprint: &Fingerprint) -> Partition {
        Partition::of(fingerprint, self.partitions())
    }
}
