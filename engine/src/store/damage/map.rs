//! What the marks of a store say, in memory.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Kind, Result};
use crate::ids::{Address, ContainerId, Slot};
use crate::store::recipe::{NodeSource, Placement, RecipeReader};

/// Containers that the marks in memory may name: a store with more damage than this has
/// lost a disk.
const MAX_CONTAINERS: usize = 16_384;
/// Ranges of one container in memory; beyond, all of it counts as damaged.
const MAX_RANGES: usize = 64;
/// Slots of a container.
const SLOTS: u32 = u16::MAX as u32;
/// All slots of a container.
pub const ALL: (u16, u16) = (0, u16::MAX);

/// All marks of a store, in memory: damage is rare, so this is small, and it is capped.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct DamageMap {
    /// Disjoint ranges of slots, ascending. A range without slots stands for a container
    /// that has lost nothing and is worth rewriting.
    containers: BTreeMap<ContainerId, Vec<(u16, u16)>>,
    /// Containers that were rewritten, and as which generation.
    rewritten: BTreeMap<ContainerId, u32>,
    /// More containers are damaged than we keep: then any that is not named is
    /// [suspected](Self::suspects).
    overflow: bool,
}

impl DamageMap {
    /// Whether there is no damage at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.containers.is_empty() && !self.overflow
    }

    /// Containers with marks that were not taken back.
    pub fn containers(&self) -> impl Iterator<Item = ContainerId> + '_ {
        self.containers.keys().copied()
    }

    /// Whether a container has marks that were not taken back.
    #[must_use]
    pub fn names(&self, container: ContainerId) -> bool {
        self.containers.contains_key(&container)
    }

    /// Damaged slots.
    #[must_use]
    pub fn slots(&self) -> u64 {
        self.containers.values().flatten().map(|(_, count)| u64::from(*count)).sum()
    }

    /// The generation that a container was rewritten as; 0 as it was first written.
    #[must_use]
    pub fn generation(&self, container: ContainerId) -> u32 {
        self.rewritten.get(&container).copied().unwrap_or(0)
    }

    /// Containers that stand in another generation than `before` knows.
    pub fn rewritten_since<'m>(
        &'m self,
        before: &'m Self,
    ) -> impl Iterator<Item = ContainerId> + 'm {
        let changed =
            |(id, generation): &(&ContainerId, &u32)| before.rewritten.get(id) != Some(*generation);
        self.rewritten.iter().filter(changed).map(|(id, _)| *id)
    }

    /// Whether a slot is marked as damaged: reading it is of no use.
    #[must_use]
    pub fn has(&self, address: Address) -> bool {
        self.containers.get(&address.container).is_some_and(|ranges| meets(ranges, address, 1))
    }

    /// Whether a slot must not be deduplicated against: it is marked, or there are more
    /// marks than are kept. A restore may still try: what it reads is authenticated.
    #[must_use]
    pub fn suspects(&self, address: Address) -> bool {
        self.touches(address, 1)
    }

    /// Whether any of `count` slots from `address` on is suspected.
    #[must_use]
    pub fn touches(&self, address: Address, count: u64) -> bool {
        match self.containers.get(&address.container) {
            Some(ranges) => meets(ranges, address, count),
            None => self.overflow,
        }
    }

    /// Adds `count` slots from `first` on; none for a container that has lost nothing and is
    /// worth rewriting.
    pub fn add(&mut self, container: ContainerId, first: u16, count: u16) {
        if self.containers.len() >= MAX_CONTAINERS && !self.containers.contains_key(&container) {
            self.overflow = true;
            return;
        }
        let ranges = self.containers.entry(container).or_default();
        ranges.push((first, count.min(u16::MAX - first)));
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
        for &(first, count) in ranges.iter() {
            match merged.last_mut() {
                Some(last) if u32::from(first) <= u32::from(last.0) + u32::from(last.1) => {
                    let end = (u32::from(first) + u32::from(count))
                        .max(u32::from(last.0) + u32::from(last.1));
                    last.1 = (end.min(SLOTS) - u32::from(last.0)) as u16;
                }
                _ => merged.push((first, count)),
            }
        }
        if merged.len() > MAX_RANGES {
            merged = vec![ALL];
        }
        *ranges = merged;
    }

    /// Takes marks of `count` slots from `first` on back.
    pub fn heal(&mut self, container: ContainerId, first: u16, count: u16) {
        let Some(ranges) = self.containers.get_mut(&container) else { return };
        let (from, to) = (u32::from(first), u32::from(first) + u32::from(count));
        let mut left = Vec::with_capacity(ranges.len() + 1);
        for &(first, count) in ranges.iter() {
            let (start, end) = (u32::from(first), u32::from(first) + u32::from(count));
            if start < from.min(end) {
                left.push((first, (end.min(from) - start) as u16));
            }
            if end > to.max(start) {
                let start = start.max(to);
                left.push((start as u16, (end - start) as u16));
            }
        }
        if left.len() > MAX_RANGES {
            // Too many to keep: more stays marked than is damaged, never less.
            left = vec![ALL];
        }
        if left.is_empty() {
            self.containers.remove(&container);
        } else {
            *ranges = left;
        }
    }

    /// Remembers that a container stands in this generation now.
    pub fn rewrite(&mut self, container: ContainerId, generation: u32) {
        let known = self.rewritten.contains_key(&container);
        // Beyond the limit it is read as first written, which is damaged and says so.
        if generation > 0 && (known || self.rewritten.len() < MAX_CONTAINERS) {
            let newest = self.rewritten.entry(container).or_default();
            *newest = generation.max(*newest);
        }
    }

    /// What `news` has of these containers takes the place of what was known of them.
    pub fn replace(&mut self, containers: &BTreeSet<ContainerId>, news: Self) {
        self.containers.retain(|container, _| !containers.contains(container));
        for (container, ranges) in news.containers {
            ranges.into_iter().for_each(|(first, count)| self.add(container, first, count));
        }
        for (container, generation) in news.rewritten {
            self.rewrite(container, generation);
        }
        self.overflow |= news.overflow;
    }

    /// What is known of one container.
    pub(super) fn only(&self, container: ContainerId) -> Self {
        let mut only = DamageMap::default();
        only.containers
            .extend(self.containers.get(&container).map(|ranges| (container, ranges.clone())));
        only.rewrite(container, self.generation(container));
        only
    }

    /// There are more marks than can be kept.
    pub(super) fn overflow(&mut self) {
        self.overflow = true;
    }

    /// The ranges of blocks, as (first, count), whose runs touch damage, or that are unknown
    /// because a node of the recipe is damaged: the next session reads them again. Costs
    /// nothing while there is no damage.
    ///
    /// # Errors
    /// When the recipe cannot be read for another reason than damage.
    pub fn forced_ranges<S: NodeSource>(
        &self,
        recipe: &RecipeReader<S>,
    ) -> Result<Vec<(u64, u64)>> {
        let mut forced: Vec<(u64, u64)> = Vec::new();
        if self.is_empty() {
            return Ok(forced);
        }
        let mut add = |first: u64, count: u64| match forced.last_mut() {
            Some(last) if last.0 + last.1 == first => last.1 += count,
            _ => forced.push((first, count)),
        };
        let mut runs = recipe.all_runs().tolerant();
        loop {
            let run = runs.next()?;
            for lost in runs.take_lost() {
                if lost.error.kind() != Kind::Damaged && lost.error.kind() != Kind::NotFound {
                    return Err(lost.error);
                }
                add(lost.first_block, lost.count);
            }
            let Some(run) = run else { break };
            if let Placement::At(address) = run.placement
                && self.touches(address, run.count)
            {
                (0..run.count).for_each(|i| {
                    if let Placement::At(address) = run.placement.skip(i)
                        && self.suspects(address)
                    {
                        add(run.first_block + i, 1);
                    }
                });
            }
        }
        forced.sort_unstable();
        Ok(forced)
    }
}

fn meets(ranges: &[(u16, u16)], address: Address, count: u64) -> bool {
    let first = u64::from(address.slot.0);
    ranges.iter().any(|(from, n)| {
        let from = u64::from(*from);
        from < first + count && first < from + u64::from(*n)
    })
}

/// The ranges that `bad` slots, which ascend, leave of a container.
#[must_use]
pub fn all_but(bad: impl IntoIterator<Item = Slot>) -> Vec<(u16, u16)> {
    let mut ranges = Vec::new();
    let mut next = 0;
    for Slot(slot) in bad {
        if slot > next {
            ranges.push((next, slot - next));
        }
        next = slot.saturating_add(1);
    }
    if next < u16::MAX {
        ranges.push((next, u16::MAX - next));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Incarnation;

    fn id(counter: u32) -> ContainerId {
        ContainerId { incarnation: Incarnation(1), counter }
    }

    fn at(counter: u32, slot: u16) -> Address {
        Address { container: id(counter), slot: Slot(slot) }
    }

    #[test]
    fn marks_are_taken_back_slot_by_slot() {
        let mut map = DamageMap::default();
        map.add(id(1), 10, 20);
        map.heal(id(1), 12, 3);
        let marked: Vec<u16> = (0..40).filter(|slot| map.has(at(1, *slot))).collect();
        let expected: Vec<u16> = (10..12).chain(15..30).collect();
        assert_eq!(marked, expected);
        for (first, count) in all_but([Slot(15), Slot(29)]) {
            map.heal(id(1), first, count);
        }
        assert_eq!(map.slots(), 2);
        assert!(map.has(at(1, 15)) && map.has(at(1, 29)));
        map.heal(id(1), 0, u16::MAX);
        assert!(map.is_empty());
        // A container that has lost nothing.
        map.add(id(2), 0, 0);
        assert!(map.names(id(2)) && !map.has(at(2, 0)));
        map.heal(id(2), 0, u16::MAX);
        assert!(map.is_empty());
    }

    #[test]
    fn beyond_the_limit_nothing_unnamed_is_deduplicated_against() {
        let mut map = DamageMap::default();
        (0..MAX_CONTAINERS as u32).for_each(|counter| map.add(id(counter), 5, 1));
        assert!(!map.suspects(at(70_000, 5)));
        map.add(id(70_001), 5, 1);
        assert!(map.suspects(at(70_001, 5)) && map.suspects(at(70_000, 4)));
        assert!(!map.has(at(70_000, 5)), "a restore still tries");
        assert!(!map.suspects(at(3, 4)) && map.suspects(at(3, 5)) && map.has(at(3, 5)));
    }
}
