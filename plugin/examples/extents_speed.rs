//! Measures the merge of a dirty map with an allocation map, made up, of a large disk.
//!
//! ```text
//! cargo run --release -p fleece --example extents_speed -- SIZE_TB EXTENTS
//! ```
//!
//! A disk of SIZE_TB TB with EXTENTS extents in each of the two maps, dirty and clean, allocated and
//! zero in turn, served as QEMU does: some thousand extents at a time from where they are asked for.
//! Prints a line of JSON: extents, items of work, steps of the planner, seconds.

use std::time::Instant;

use fleece::extents::{BadMap, Extent, Flags, PlanInput, Planner, Step, Wanted};
use fleece::nbd::wire::{STATE_DIRTY, STATE_ZERO};

/// Extents in one answer.
const BATCH: u64 = 8192;
const BLOCK: u64 = 4096;

/// A map in which every other extent has a flag; extents begin `shift` blocks late.
struct Map {
    size: u64,
    extents: u64,
    shift: u64,
    flag: u32,
}

impl Map {
    /// Where an extent begins.
    fn start(&self, index: u64) -> u64 {
        if index == 0 {
            return 0;
        }
        if index >= self.extents {
            return self.size;
        }
        self.size / BLOCK / self.extents * index * BLOCK + self.shift * BLOCK
    }

    /// The extents from a place on, a batch of them, cut to begin there.
    fn part(&self, wanted: Wanted) -> impl Iterator<Item = Extent> + '_ {
        let each = self.size / BLOCK / self.extents * BLOCK;
        let near = (wanted.from / each).min(self.extents - 1);
        let first = if self.start(near) > wanted.from { near - 1 } else { near };
        let last = (first + BATCH).min(self.extents);
        (first..last).map(move |index| {
            let start = self.start(index).max(wanted.from);
            let flags = Flags(if index % 2 == 0 { self.flag } else { 0 });
            Extent { offset: start, length: self.start(index + 1) - start, flags }
        })
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1).map(|word| word.parse::<u64>());
    let (Some(terabytes), Some(extents)) = (words.next(), words.next()) else {
        return Err("usage: extents_speed SIZE_TB EXTENTS".into());
    };
    let (size, extents) = (terabytes? * 1_000_000_000_000 / BLOCK * BLOCK, extents?);
    if extents == 0 || size / BLOCK / extents < 4 {
        return Err("there must be at least one extent, each of at least four blocks".into());
    }
    let dirty = Map { size, extents, shift: 0, flag: STATE_DIRTY };
    let allocation = Map { size, extents, shift: 1, flag: STATE_ZERO };
    let input =
        PlanInput { size, block_size: BLOCK as u32, dirty_until: Some(size), forced: Vec::new() };
    let start = Instant::now();
    let (work, steps) = merge(&mut Planner::new(input), &dirty, &allocation)?;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{{\"extents\":{},\"work\":{work},\"steps\":{steps},\"seconds\":{seconds}}}",
        2 * extents
    );
    Ok(())
}

/// Items of work, and steps of the planner.
fn merge(planner: &mut Planner, dirty: &Map, allocation: &Map) -> Result<(u64, u64), BadMap> {
    let mut work = 0;
    loop {
        match planner.step() {
            Step::Work(_) => work += 1,
            Step::NeedDirty(wanted) => planner.feed_dirty(dirty.part(wanted))?,
            Step::NeedAllocation(wanted) => planner.feed_allocation(allocation.part(wanted))?,
            Step::Done => return Ok((work, planner.steps())),
        }
    }
}
