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

/// Sorts `new` in, ascending, none of which is in `sorted`. In place and with little to spare: nothing that
/// an engine keeps is larger, and a copy of it would be what its memory peaks at.
fn weave(sorted: &mut Vec<Entry>, new: &[Entry]) {
    let mut from = sorted.len();
    if sorted.capacity() - from < new.len() {
        sorted.reserve_exact(new.len().max(from / 4));
    }
    sorted.extend_from_slice(new);
    let mut to = sorted.len();
    for entry in new.iter().rev() {
        let at = place(&sorted[..from], &entry.0);
        to -= from - at;
        sorted.copy_within(at..from, to);
        from = at;
        to -= 1;
        sorted[to] = *entry;
    }
}

/// Where an entry is, or would be.
fn place(sorted: &[Entry], fingerprint: &Fingerprint) -> usize {
    sorted.partition_point(|(other, _)| other.is_before(fingerprint))
}

/// Replaces what is in `sorted` by the new one.
fn replaced(sorted: &mut [Entry], new: &Entry, moved: &mut Moved<'_>) -> bool {
    let at = place(sorted, &new.0);
    let Some(old) = sorted.get_mut(at).filter(|old| old.0 == new.0) else { return false };
    if old.1 != new.1 {
        moved(&new.0);
    }
    *old = *new;
    true
}

impl Memtable {
    /// Adds sorted entries; of equal fingerprints the new one wins. The slice is rearranged.
    pub(super) fn insert(&mut self, entries: &mut [Entry], moved: &mut Moved<'_>) {
        let mut count = 0;
        for at in 0..entries.len() {
            let entry = entries[at];
            // What comes twice at once is among the new ones.
            let tables = [&mut self.sorted[..], &mut self.fresh[..], &mut entries[..count]];
            if !tables.into_iter().any(|sorted| replaced(sorted, &entry, moved)) {
                entries[count] = entry;
                count += 1;
            }
        }
        let new = &entries[..count];
        if new.len() >= FRESH {
            return weave(&mut self.sorted, new);
        }
        weave(&mut self.fresh, new);
        if self.fresh.len() >= FRESH {
            self.settle();
        }
    }

    /// Sorts the newest entries in among all others.
    fn settle(&mut self) {
        weave(&mut self.sorted, &self.fresh);
        self.fresh.clear();
    }

    /// The entries, ascending.
    pub(super) fn entries(&mut self) -> &[Entry] {
        self.settle();
        &self.sorted
    }

    /// The entries from `first` to `last`.
    pub(super) fn range(&mut self, first: &Fingerprint, last: &Fingerprint) -> &[Entry] {
        let sorted = self.entries();
        let start = place(sorted, first);
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
            let mut entries: Vec<Entry> = Vec::new();
            for slot in 0..few as u16 {
                let mut fingerprint = Fingerprint([0; Fingerprint::LEN]);
                fingerprint.0[..8].copy_from_slice(&next(30_000).to_be_bytes());
                let container = ContainerId { incarnation: Incarnation(1), counter: container };
                entries.push((fingerprint, Address { container, slot: Slot(slot) }));
            }
            entries.sort_by_key(|(fingerprint, _)| *fingerprint);
            for (fingerprint, address) in &entries {
                duplicates += u64::from(expected.insert(*fingerprint, *address).is_some());
            }
            memtable.insert(&mut entries, &mut |_| counted += 1);
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
