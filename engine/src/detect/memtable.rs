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

/// Entries that wait to be sorted in among all others: enough for moving those not to be felt.
const FRESH: usize = 2048;

/// Sorted arrays, bounded by their owner.
#[derive(Default)]
pub(super) struct Memtable {
    sorted: Vec<Entry>,
    /// The newest ones, none of which is in `sorted`: of a container that other hosts share, each learns
    /// a few entries only, and must not move all that it has for them.
    fresh: Vec<Entry>,
}

/// Hears of fingerprints that got another address.
pub(super) type Moved<'m> = dyn FnMut(&Fingerprint) + 'm;

/// Merges sorted entries in; of equal fingerprints the new one wins.
fn merge(sorted: &mut Vec<Entry>, entries: &[Entry], moved: &mut Moved<'_>) {
    sorted.extend_from_slice(entries);
    // Stable: what was there stays before what came; two sorted runs are merged in linear time.
    sorted.sort_by_key(|(fingerprint, _)| *fingerprint);
    sorted.dedup_by(|new, old| {
        let equal = new.0 == old.0;
        if equal {
            replace(old, new, moved);
        }
        equal
    });
}

fn replace(old: &mut Entry, new: &Entry, moved: &mut Moved<'_>) {
    if old.1 != new.1 {
        moved(&new.0);
    }
    *old = *new;
}

impl Memtable {
    /// Adds sorted entries; of equal fingerprints the new one wins.
    pub(super) fn insert(&mut self, entries: &[Entry], moved: &mut Moved<'_>) {
        if entries.len() >= FRESH {
            self.settle();
            return merge(&mut self.sorted, entries, moved);
        }
        let mut new = Vec::with_capacity(entries.len());
        for entry in entries {
            let at = self.sorted.partition_point(|(fingerprint, _)| fingerprint < &entry.0);
            match self.sorted.get_mut(at).filter(|old| old.0 == entry.0) {
                Some(old) => replace(old, entry, moved),
                None => new.push(*entry),
            }
        }
        merge(&mut self.fresh, &new, moved);
        if self.fresh.len() >= FRESH {
            self.settle();
        }
    }

    /// Sorts the newest entries in among all others.
    fn settle(&mut self) {
        if !self.fresh.is_empty() {
            // None of them is in `sorted`.
            merge(&mut self.sorted, &self.fresh, &mut |_| {});
            self.fresh.clear();
        }
    }

    /// The entries, ascending.
    pub(super) fn entries(&mut self) -> &[Entry] {
        self.settle();
        &self.sorted
    }

    /// The entries from `first` to `last`.
    pub(super) fn range(&mut self, first: &Fingerprint, last: &Fingerprint) -> &[Entry] {
        let sorted = self.entries();
        let start = sorted.partition_point(|(fingerprint, _)| fingerprint < first);
        let end = sorted.partition_point(|(fingerprint, _)| fingerprint <= last);
        sorted.get(start..end).unwrap_or(&[])
    }

    pub(super) fn len(&self) -> usize {
        self.sorted.len() + self.fresh.len()
    }

    /// Empties it; its memory stays for the next entries.
    pub(super) fn clear(&mut self) {
        self.sorted.clear();
        self.fresh.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::ids::{ContainerId, Incarnation, Slot};

    #[test]
    fn however_few_come_at_a_time_the_newest_address_counts_and_all_are_sorted() {
        let mut random = 7_u64;
        let mut next = |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % limit
        };
        let (mut memtable, mut expected) = (Memtable::default(), BTreeMap::new());
        let (mut counted, mut duplicates) = (0, 0);
        for container in 0..3000_u32 {
            let few = if container % 500 == 7 { 3000 } else { 1 + next(40) };
            let mut entries = BTreeMap::new();
            for _ in 0..few {
                let mut fingerprint = Fingerprint([0; Fingerprint::LEN]);
                fingerprint.0[..8].copy_from_slice(&next(30_000).to_be_bytes());
                let container = ContainerId { incarnation: Incarnation(1), counter: container };
                entries.insert(fingerprint, Address { container, slot: Slot(0) });
            }
            let entries: Vec<Entry> = entries.into_iter().collect();
            memtable.insert(&entries, &mut |_| counted += 1);
            for (fingerprint, address) in entries {
                duplicates += u64::from(expected.insert(fingerprint, address).is_some());
            }
            assert_eq!(memtable.len(), expected.len());
        }
        assert_eq!(counted, duplicates);
        assert!(memtable.entries().iter().copied().eq(expected.iter().map(|(f, a)| (*f, *a))));
        let first = Fingerprint([0; Fingerprint::LEN]);
        assert_eq!(
            memtable.range(&first, &first).len(),
            usize::from(expected.contains_key(&first))
        );
    }
}
