//! From maps of a disk to what a backup has to do: a linear merge, in constant memory.
//!
//! Two maps come in, ascending and in batches of any size: what is dirty and what is
//! allocated. Out come [`Work`] items in whole blocks, ascending: blocks to read, and blocks
//! that are zeros throughout. What no item covers is inherited from the parent.
//!
//! | map says | block is |
//! |---|---|
//! | no byte dirty | not mentioned |
//! | a byte dirty, all bytes known to be zeros | zero |
//! | a byte dirty, anything else (data, a hole that is not known to be zeros, a mix) | read |
//!
//! The [`Planner`] asks for the maps as it goes ([`Step`]), and for the allocation only where
//! something is dirty: looking up the allocation of a whole large disk is dear.

use std::collections::VecDeque;
use std::ops::Range;

use crate::nbd::wire::{STATE_DIRTY, STATE_ZERO};

/// What a map says about a stretch; the bits depend on the map (see [`crate::nbd::wire`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flags(pub u32);

impl Flags {
    /// Of an allocation map: reads as zeros.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 & STATE_ZERO != 0
    }

    /// Of a dirty bitmap: written since.
    #[must_use]
    pub fn is_dirty(self) -> bool {
        self.0 & STATE_DIRTY != 0
    }
}

/// A stretch of a disk, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes, at least 1.
    pub length: u64,
    /// What the map says.
    pub flags: Flags,
}

impl Extent {
    /// The byte after the last.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// What is to be done with blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Read them.
    Read,
    /// They are zeros; nothing to read.
    Zero,
}

/// Adjacent blocks with the same thing to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Work {
    /// The first block.
    pub first_block: u64,
    /// How many, at least 1.
    pub blocks: u32,
    /// What to do.
    pub action: Action,
}

/// Most bytes in one item to read: its reading begins before the map behind it is known.
const MAX_READ_ITEM: u64 = 64 << 20;
/// Most blocks in an item of zeros.
const MAX_ZERO_BLOCKS: u64 = 1 << 30;

/// What the planner wants next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Here is work.
    Work(Work),
    /// Feed it the dirty map from here on.
    NeedDirty(Wanted),
    /// Feed it the allocation map from here on.
    NeedAllocation(Wanted),
    /// That was all.
    Done,
}

/// A part of a map. It must be given from its start, without gaps; shorter or longer is fine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// First byte.
    pub from: u64,
    /// What is beyond is not needed now.
    pub until: u64,
}

/// A map that does not begin where it was asked for, has gaps, or is empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadMap;

impl std::fmt::Display for BadMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a map of the disk has a gap or does not begin where it was asked for")
    }
}

impl std::error::Error for BadMap {}

/// What to plan for.
#[derive(Clone, Debug)]
pub struct PlanInput {
    /// The disk's size in bytes.
    pub size: u64,
    /// Bytes of a block, a power of two.
    pub block_size: u32,
    /// Where the dirty map holds: up to the parent's size. What is beyond counts as dirty
    /// (QEMU does not mark grown space). `None`: no map, everything is dirty.
    pub dirty_until: Option<u64>,
    /// Ranges dirty whatever the map says, in bytes, in any order.
    pub forced: Vec<Range<u64>>,
}

/// Merges the maps; see the module.
#[derive(Debug)]
pub struct Planner {
    size: u64,
    block: u64,
    dirty_until: u64,
    forced: VecDeque<Range<u64>>,
    dirty: Feed,
    allocation: Feed,
    /// Everything before it is decided as dirty or clean.
    position: u64,
    /// Dirty blocks not yet told apart, in bytes; its start is where we are.
    open: Range<u64>,
    /// While looking at a block piece by piece: everything before it is zeros.
    probe: Option<u64>,
    /// The item that may still grow, in bytes.
    growing: Option<(Range<u64>, Action)>,
    steps: u64,
}

impl Planner {
    /// A plan for a disk. A block size of 0 counts as 1, a disk ends at 2^63 bytes.
    #[must_use]
    pub fn new(input: PlanInput) -> Self {
        let size = input.size.min(1 << 63);
        Planner {
            size,
            block: u64::from(input.block_size.max(1)),
            dirty_until: input.dirty_until.unwrap_or(0).min(size),
            forced: normalise(input.forced, size),
            dirty: Feed::default(),
            allocation: Feed::default(),
            position: 0,
            open: 0..0,
            probe: None,
            growing: None,
            steps: 0,
        }
    }

    /// The next thing: work in ascending order, or a wish. After a wish, feed and call again.
    pub fn step(&mut self) -> Step {
        loop {
            self.steps += 1;
            if self.open.is_empty() {
                match self.next_dirty() {
                    Search::Found(range) => self.open = range,
                    Search::Need(wanted) => return Step::NeedDirty(wanted),
                    Search::Moved => {}
                    Search::End => {
                        return self.growing.take().map_or(Step::Done, |item| self.work(item));
                    }
                }
                continue;
            }
            match self.next_piece() {
                Ok(Some((range, action))) => {
                    if let Some(item) = self.grow(range, action) {
                        return self.work(item);
                    }
                }
                Ok(None) => {}
                Err(wanted) => return Step::NeedAllocation(wanted),
            }
        }
    }

    /// Answers [`Step::NeedDirty`].
    pub fn feed_dirty(&mut self, map: impl IntoIterator<Item = Extent>) -> Result<(), BadMap> {
        self.dirty.feed(self.position, map)
    }

    /// Answers [`Step::NeedAllocation`].
    pub fn feed_allocation(&mut self, map: impl IntoIterator<Item = Extent>) -> Result<(), BadMap> {
        self.allocation.feed(self.probe.unwrap_or(self.open.start), map)
    }

    /// Whether nothing that is known to be dirty begins between what was given out and `until`.
    #[must_use]
    pub fn is_clean_until(&self, until: u64) -> bool {
        let begins = |start: u64| start >= self.position;
        let mut forced = self.forced.iter().take_while(|range| range.start < until);
        let mut known = self.dirty.0.iter().take_while(|extent| extent.offset < until);
        self.dirty_until >= until.min(self.size)
            && !forced.any(|range| begins(range.start))
            && !known.any(|extent| extent.flags.is_dirty() && begins(extent.offset))
    }

    /// How often the planner looked at something: linear in the extents and items.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The next dirty range from `position` on, rounded out to blocks.
    fn next_dirty(&mut self) -> Search {
        let at = self.position;
        if at >= self.size {
            return Search::End;
        }
        while self.forced.front().is_some_and(|range| range.end <= at) {
            self.steps += 1;
            self.forced.pop_front();
        }
        let forced = self.forced.front().cloned();
        let end = if at >= self.dirty_until {
            self.size
        } else if let Some(range) = forced.clone().filter(|range| range.start <= at) {
            range.end
        } else {
            let Some(extent) = self.dirty.at(at, &mut self.steps) else {
                return Search::Need(Wanted { from: at, until: self.dirty_until });
            };
            let end = extent.end().min(self.dirty_until);
            if !extent.flags.is_dirty() {
                self.position = forced.map_or(end, |range| range.start.min(end));
                return Search::Moved;
            }
            end
        };
        // `position` never lies inside a block that was given out, so neither does its start.
        let start = at - at % self.block;
        self.position = end.next_multiple_of(self.block).min(self.size);
        Search::Found(start..self.position)
    }

    /// The next blocks of `open` with one thing to do; `None` after a look at part of a block.
    fn next_piece(&mut self) -> Result<Option<(Range<u64>, Action)>, Wanted> {
        let start = self.open.start;
        let end = self.open.end;
        let at = self.probe.unwrap_or(start);
        let Some(extent) = self.allocation.at(at, &mut self.steps) else {
            return Err(Wanted { from: at, until: end });
        };
        if !extent.flags.is_zero() {
            self.probe = None;
            // A block of which some is not zeros is read whole.
            let stop = extent.end().min(end).next_multiple_of(self.block).min(end);
            return Ok(Some((start..stop, Action::Read)));
        }
        let known = extent.end().min(end);
        let whole = if known == end { end } else { known - known % self.block };
        if whole > start {
            self.probe = None;
            return Ok(Some((start..whole, Action::Zero)));
        }
        self.probe = Some(known);
        Ok(None)
    }

    /// Adds to the growing item, or gives it out and begins another. What is longer than an
    /// item may be is left in `open`, to come again.
    fn grow(&mut self, range: Range<u64>, action: Action) -> Option<(Range<u64>, Action)> {
        let most = self.most(action);
        if let Some((item, its)) = &mut self.growing
            && *its == action
            && item.end == range.start
            && item.end - item.start < most
        {
            item.end = range.end.min(item.start + most);
            self.open.start = item.end;
            return None;
        }
        let first = range.start..range.end.min(range.start + most);
        self.open.start = first.end;
        self.growing.replace((first, action))
    }

    fn most(&self, action: Action) -> u64 {
        match action {
            Action::Read => (MAX_READ_ITEM / self.block).max(1) * self.block,
            Action::Zero => MAX_ZERO_BLOCKS * self.block,
        }
    }

    fn work(&self, (range, action): (Range<u64>, Action)) -> Step {
        let blocks = (range.end - range.start).div_ceil(self.block);
        Step::Work(Work { first_block: range.start / self.block, blocks: blocks as u32, action })
    }
}

enum Search {
    Found(Range<u64>),
    Need(Wanted),
    Moved,
    End,
}

/// The part of a map that was fed and is still ahead.
#[derive(Debug, Default)]
struct Feed(VecDeque<Extent>);

impl Feed {
    /// The extent that covers `at`; gives up everything before it.
    fn at(&mut self, at: u64, steps: &mut u64) -> Option<Extent> {
        while let Some(first) = self.0.front() {
            if first.end() > at {
                return Some(*first);
            }
            *steps += 1;
            self.0.pop_front();
        }
        None
    }

    fn feed(&mut self, from: u64, map: impl IntoIterator<Item = Extent>) -> Result<(), BadMap> {
        let mut next = from;
        self.0.clear();
        for extent in map {
            if extent.offset != next || extent.length == 0 {
                return Err(BadMap);
            }
            next = extent.end();
            self.0.push_back(extent);
        }
        if next == from { Err(BadMap) } else { Ok(()) }
    }
}

/// Sorted, merged, within the disk.
fn normalise(mut ranges: Vec<Range<u64>>, size: u64) -> VecDeque<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: VecDeque<Range<u64>> = VecDeque::new();
    for range in ranges {
        let range = range.start..range.end.min(size);
        match merged.back_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push_back(range),
        }
    }
    merged
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "extents_tests.rs"]
mod tests;
