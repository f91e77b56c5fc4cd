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

/// The journal entries that were learned, in whatever order they came: sessions seal at their own
/// pace, so entry 6 may come before entry 5, and then the watermark waits for 5.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Applied {
    mark: Watermark,
    /// First and last entries of the stretches behind a gap, by incarnation and first entry.
    ahead: BTreeMap<(Incarnation, u64), u64>,
}

impl Applied {
    /// All entries up to `mark`.
    pub(super) fn up_to(mark: Watermark) -> Self {
        Applied { mark, ahead: BTreeMap::new() }
    }

    /// Up to where there is no gap.
    pub(super) fn mark(&self) -> &Watermark {
        &self.mark
    }

    /// Adds the entries from `first` to `last`.
    pub(super) fn add(&mut self, incarnation: Incarnation, mut first: u64, mut last: u64) {
        // Join with every stretch that it overlaps or touches.
        let reach = (incarnation, last.saturating_add(1));
        while let Some((&(own, start), &end)) = self.ahead.range(..=reach).next_back()
            && own == incarnation
            && end.saturating_add(1) >= first
        {
            self.ahead.remove(&(own, start));
            first = first.min(start);
            last = last.max(end);
        }
        if first <= self.mark.get(incarnation).saturating_add(1) {
            self.mark.raise(incarnation, last);
        } else {
            self.ahead.insert((incarnation, first), last);
        }
    }

    /// Adds all that `other` has.
    pub(super) fn add_all(&mut self, other: &Applied) {
        for (incarnation, last) in other.mark.iter() {
            self.add(incarnation, 1, last);
        }
        for (&(incarnation, first), &last) in &other.ahead {
            self.add(incarnation, first, last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_waits_for_the_missing_entry() {
        let mut applied = Applied::default();
        let one = Incarnation(1);
        for n in [1, 3, 5, 6, 9] {
            applied.add(one, n, n);
        }
        assert_eq!(applied.mark().get(one), 1);
        assert_eq!(applied.ahead.len(), 3);
        applied.add(one, 2, 2);
        assert_eq!(applied.mark().get(one), 3);
        applied.add(one, 4, 4);
        assert_eq!((applied.mark().get(one), applied.ahead.len()), (6, 1));
        applied.add(one, 4, 4);
        let mut later = Applied::up_to(applied.mark().clone());
        later.add(one, 8, 8);
        later.add(Incarnation(2), 1, 4);
        later.add_all(&applied);
        assert_eq!(later.mark().get(one), 6);
        later.add(one, 7, 7);
        assert_eq!((later.mark().get(one), later.mark().get(Incarnation(2))), (9, 4));
        assert!(later.ahead.is_empty());
    }

    /// Against the set of all entries, in a shuffled order.
    #[test]
    fn any_order_ends_in_the_same_mark() {
        let mut order: Vec<u64> = (1..=200).collect();
        for i in 0..order.len() {
            order.swap(i, (i * 7919 + 13) % 200);
        }
        let (mut applied, mut set) = (Applied::default(), std::collections::BTreeSet::new());
        for n in order {
            applied.add(Incarnation(3), n, n);
            set.insert(n);
            let expected = (1..).find(|n| !set.contains(n)).unwrap_or(1) - 1;
            assert_eq!(applied.mark().get(Incarnation(3)), expected);
        }
        assert!(applied.ahead.is_empty());
    }
}
