//! How much of the store's journals the index has.

use std::collections::BTreeMap;

use crate::ids::Incarnation;

/// One entry of an incarnation's journal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct JournalPosition {
    /// Whose journal.
    pub incarnation: Incarnation,
    /// The entry's number in it, from 1, without gaps.
    pub n: u64,
}

/// For each incarnation the number of the last journal entry up to which the index has all.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Watermark(BTreeMap<Incarnation, u64>);

impl Watermark {
    /// The last entry that is in the index, 0 for none: refill from the one after it.
    #[must_use]
    pub fn get(&self, incarnation: Incarnation) -> u64 {
        self.0.get(&incarnation).copied().unwrap_or(0)
    }

    /// Notes that all entries of `incarnation` up to `n` are in the index; never goes back.
    pub fn raise(&mut self, incarnation: Incarnation, n: u64) {
        let mark = self.0.entry(incarnation).or_insert(0);
        *mark = n.max(*mark);
    }

    /// The incarnations with their last entries, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (Incarnation, u64)> + '_ {
        self.0.iter().map(|(incarnation, n)| (*incarnation, *n))
    }

    /// Whether it covers nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
