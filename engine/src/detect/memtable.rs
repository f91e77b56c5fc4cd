//! The freshest entries of all partitions, in memory until they are enough for a young run.

use super::records::take;
use crate::ids::{Address, Fingerprint};

/// A fingerprint and where its block is.
pub(super) type Entry = (Fingerprint, Address);

/// The leading bits of a fingerprint as a number, which compares faster than bytes.
pub(super) trait Lead {
    /// The first eight bytes, big endian.
    fn lead(&self) -> u64;

    /// Whether it sorts before `other`.
    fn is_before(&self, other: &Self) -> bool;
}

impl Lead for Fingerprint {
    #[inline]
    fn lead(&self) -> u64 {
        u64::from_be_bytes(take(&self.0))
    }

    #[inline]
    fn is_before(&self, other: &Self) -> bool {
        let (own, others) = (self.lead(), other.lead());
        own < others || (own == others && self.0 < other.0)
    }
}

/// A sorted array, bounded by its owner.
#[derive(Default)]
pub(super) struct Memtable(Vec<Entry>);

impl Memtable {
    /// Adds entries; of equal fingerprints the new one wins. Returns how many got another address.
    pub(super) fn insert(&mut self, entries: &[Entry]) -> u64 {
        self.0.extend_from_slice(entries);
        // Stable: what was there stays before what came; two sorted runs are merged in linear time.
        self.0.sort_by_key(|(fingerprint, _)| *fingerprint);
        let mut duplicates = 0;
        self.0.dedup_by(|new, old| {
            let equal = new.0 == old.0;
            if equal {
                duplicates += u64::from(new.1 != old.1);
                *old = *new;
            }
            equal
        });
        duplicates
    }

    /// The entries, ascending.
    pub(super) fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// The entries from `first` to `last`.
    pub(super) fn range(&self, first: &Fingerprint, last: &Fingerprint) -> &[Entry] {
        let start = self.0.partition_point(|(fingerprint, _)| fingerprint < first);
        let end = self.0.partition_point(|(fingerprint, _)| fingerprint <= last);
        self.0.get(start..end).unwrap_or(&[])
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Empties it; its memory stays for the next entries.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
