//! The planner against a slow model that looks at every byte.

use proptest::prelude::*;

use super::*;

fn extent(offset: u64, length: u64, flags: u32) -> Extent {
    Extent { offset, length, flags: Flags(flags) }
}

/// A map of the whole disk from (length, flags) pairs.
fn map(size: u64, pieces: &[(u64, u32)]) -> Vec<Extent> {
    let mut out = Vec::new();
    let mut at = 0;
    for (length, flags) in pieces {
        let length = (*length).min(size - at);
        if length > 0 {
            out.push(extent(at, length, *flags));
            at += length;
        }
    }
    if at < size {
        out.push(extent(at, size - at, 0));
    }
    out
}

/// At most `most` extents of a map from `from` on, the first one cut to begin there.
fn part(map: &[Extent], from: u64, most: usize) -> Vec<Extent> {
    let start = map.partition_point(|e| e.end() <= from);
    let found = map[start..].iter().take(most);
    found.map(|e| extent(e.offset.max(from), e.end() - e.offset.max(from), e.flags.0)).collect()
}

/// Runs a plan over maps served `batch` extents at a time.
fn run(
    input: PlanInput,
    dirty: &[Extent],
    allocation: &[Extent],
    batch: usize,
) -> (Vec<Work>, u64) {
    let mut planner = Planner::new(input);
    let mut out = Vec::new();
    loop {
        match planner.step() {
            Step::Work(work) => out.push(work),
            Step::NeedDirty(wanted) => {
                planner.feed_dirty(part(dirty, wanted.from, batch)).unwrap();
            }
            Step::NeedAllocation(wanted) => {
                planner.feed_allocation(part(allocation, wanted.from, batch)).unwrap();
            }
            Step::Done => return (out, planner.steps()),
        }
    }
}

/// Byte by byte.
fn model(input: &PlanInput, dirty: &[Extent], allocation: &[Extent]) -> Vec<Option<Action>> {
    let flag =
        |map: &[Extent], at| map.iter().find(|e| e.offset <= at && at < e.end()).unwrap().flags;
    let block = u64::from(input.block_size);
    (0..input.size.div_ceil(block))
        .map(|number| {
            let bytes = number * block..((number + 1) * block).min(input.size);
            let is_dirty = bytes.clone().any(|at| {
                input.dirty_until.is_none_or(|until| at >= until || flag(dirty, at).is_dirty())
                    || input.forced.iter().any(|range| range.contains(&at))
            });
            let is_zero = bytes.clone().all(|at| flag(allocation, at).is_zero());
            is_dirty.then_some(if is_zero { Action::Zero } else { Action::Read })
        })
        .collect()
}

fn per_block(input: &PlanInput, work: &[Work]) -> Vec<Option<Action>> {
    let mut blocks = vec![None; input.size.div_ceil(u64::from(input.block_size)) as usize];
    let mut next = 0;
    for item in work {
        assert!(item.first_block >= next && item.blocks > 0, "{work:?}");
        next = item.first_block + u64::from(item.blocks);
        blocks[item.first_block as usize..next as usize].fill(Some(item.action));
    }
    blocks
}

fn pieces(flags: u32) -> impl Strategy<Value = Vec<(u64, u32)>> {
    prop::collection::vec((1u64..40, 0..=flags), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn equals_the_model(
        size in 1u64..400,
        block_bits in 0u32..5,
        dirty in pieces(1),
        allocation in pieces(3),
        until in prop::option::of(0u64..450),
        forced in prop::collection::vec((0u64..400, 0u64..50), 0..4),
        batch in 1usize..9,
    ) {
        let forced = forced.into_iter().map(|(start, length)| start..start + length).collect();
        let input = PlanInput { size, block_size: 1 << block_bits, dirty_until: until, forced };
        let (dirty, allocation) = (map(size, &dirty), map(size, &allocation));
        let (work, _) = run(input.clone(), &dirty, &allocation, batch);
        prop_assert_eq!(per_block(&input, &work), model(&input, &dirty, &allocation));
        // Adjacent items differ: everything that can be merged is.
        for pair in work.windows(2) {
            let touch = pair[0].first_block + u64::from(pair[0].blocks) == pair[1].first_block;
            prop_assert!(!(touch && pair[0].action == pair[1].action), "{:?}", work);
        }
    }
}

#[test]
fn the_table_of_the_design() {
    // Five blocks: clean, dirty zero, dirty hole that is not zero, dirty data, dirty half zero.
    let dirty = map(20480, &[(4096, 0), (16384, 1)]);
    let allocation =
        map(20480, &[(4096, 0), (4096, 3), (4096, 1), (4096, 0), (2048, 2), (2048, 0)]);
    let input =
        PlanInput { size: 20480, block_size: 4096, dirty_until: Some(20480), forced: Vec::new() };
    let (work, _) = run(input, &dirty, &allocation, 100);
    assert_eq!(
        work,
        [
            Work { first_block: 1, blocks: 1, action: Action::Zero },
            Work { first_block: 2, blocks: 3, action: Action::Read },
        ]
    );
}

#[test]
fn grown_space_and_last_partial_block_are_dirty() {
    // 10,000 bytes in blocks of 4096; the parent had 5000, and nothing is marked.
    let input =
        PlanInput { size: 10_000, block_size: 4096, dirty_until: Some(5000), forced: Vec::new() };
    let (work, _) = run(input, &map(10_000, &[]), &map(10_000, &[]), 100);
    assert_eq!(work, [Work { first_block: 1, blocks: 2, action: Action::Read }]);
}

#[test]
fn ten_terabytes_in_linear_time() {
    const TERABYTE: u64 = 1 << 40;
    let size = 10 * TERABYTE;
    // 64 KiB dirty in every 32 MiB: 327,680 islands; allocation alternates every 1 MiB.
    let islands = size / (32 << 20);
    let dirty_at = |n: u64| extent(n / 2 * (32 << 20) + (n % 2) * (64 << 10), 0, 0);
    let mut planner = Planner::new(PlanInput {
        size,
        block_size: 4096,
        dirty_until: Some(size),
        forced: vec![5..6, size - 1..size],
    });
    let (mut items, mut fed) = (0u64, 0u64);
    loop {
        match planner.step() {
            Step::Work(_) => items += 1,
            Step::NeedDirty(wanted) => {
                let n = wanted.from / (32 << 20) * 2 + u64::from(wanted.from % (32 << 20) > 0);
                let batch = (n..(n + 1000).min(islands * 2)).map(|n| {
                    let start = dirty_at(n).offset.max(wanted.from);
                    extent(start, dirty_at(n + 1).offset - start, u32::from(n % 2 == 0))
                });
                fed += 1000;
                planner.feed_dirty(batch).unwrap();
            }
            Step::NeedAllocation(wanted) => {
                let end = (wanted.from / (1 << 20) + 1) * (1 << 20);
                fed += 1;
                let zero = (wanted.from >> 20) % 64 >= 32;
                let flags = if zero { STATE_ZERO } else { 0 };
                planner.feed_allocation([extent(wanted.from, end - wanted.from, flags)]).unwrap();
            }
            Step::Done => break,
        }
    }
    assert_eq!(items, islands + 1);
    assert!(planner.steps() <= 4 * (fed + items), "{} steps, {fed} extents", planner.steps());
}

#[test]
fn a_huge_full_read_is_cut_into_items() {
    let size = 1u64 << 40;
    let input = PlanInput { size, block_size: 4096, dirty_until: None, forced: Vec::new() };
    let (work, steps) = run(input, &[], &map(size, &[(size, 0)]), 10);
    assert_eq!(work.len() as u64, size / MAX_READ_ITEM);
    assert_eq!(work.iter().map(|w| u64::from(w.blocks)).sum::<u64>(), size / 4096);
    assert!(steps <= 4 * work.len() as u64);
}

#[test]
fn maps_with_gaps_are_refused() {
    let input = PlanInput { size: 100, block_size: 1, dirty_until: Some(100), forced: Vec::new() };
    let mut planner = Planner::new(input);
    assert_eq!(planner.step(), Step::NeedDirty(Wanted { from: 0, until: 100 }));
    assert_eq!(planner.feed_dirty([]), Err(BadMap));
    assert_eq!(planner.feed_dirty([extent(1, 9, 0)]), Err(BadMap));
    assert_eq!(planner.feed_dirty([extent(0, 9, 0), extent(10, 9, 0)]), Err(BadMap));
    assert_eq!(planner.feed_dirty([extent(0, 100, 0)]), Ok(()));
    assert_eq!(planner.step(), Step::Done);
}
