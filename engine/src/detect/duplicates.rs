//! Double blocks: how often a fingerprint was found under a second address.

use std::collections::BTreeMap;

use super::Partition;

/// Times that a fingerprint was found under a second address, by partition: one that is rebuilt is
/// counted anew.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Duplicates(BTreeMap<Partition, u64>);

impl Duplicates {
    /// Adds some of a partition.
    pub(super) fn add(&mut self, partition: Partition, count: u64) {
        if count > 0 {
            let sum = self.0.entry(partition).or_insert(0);
            *sum = sum.saturating_add(count);
        }
    }

    /// Adds all that `other` has.
    pub(super) fn add_all(&mut self, other: &Duplicates) {
        other.iter().for_each(|(partition, count)| self.add(partition, count));
    }

    /// Forgets those of a partition.
    pub(super) fn forget(&mut self, partition: Partition) {
        self.0.remove(&partition);
    }

    /// The partitions that have some, ascending.
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (Partition, u64)> + '_ {
        self.0.iter().map(|(partition, count)| (*partition, *count))
    }

    /// Those of all partitions.
    pub(super) fn total(&self) -> u64 {
        self.0.values().fold(0, |sum, count| sum.saturating_add(*count))
    }
}
