//! The tree against a map of blocks.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::error::Kind;
use crate::ids::{ContainerId, Incarnation, Slot};

/// Nodes in memory.
#[derive(Default)]
struct Memory {
    nodes: HashMap<Address, Vec<u8>>,
    bytes: u64,
    written: u32,
    /// What is missing cannot be read for now.
    away: bool,
}

impl NodeSource for Memory {
    fn get(&self, node: &NodeRef) -> Result<Vec<u8>> {
        let kind = if self.away { Kind::Failed } else { Kind::Damaged };
        let missing = || crate::error::Error::new(kind, "missing");
        self.nodes.get(&node.address).cloned().ok_or_else(missing)
    }
}

impl NodeStore for Memory {
    fn put(&mut self, _level: u8, bytes: &[u8]) -> Result<Address> {
        let n = self.written;
        self.written += 1;
        let container = ContainerId { incarnation: Incarnation(7), counter: 1 + n / 1000 };
        let address = Address { container, slot: Slot((n % 1000) as u16) };
        self.nodes.insert(address, bytes.to_vec());
        self.bytes += bytes.len() as u64;
        Ok(address)
    }
}

type Model = BTreeMap<u64, Address>;

fn address(counter: u32, slot: u16) -> Address {
    let container = ContainerId { incarnation: Incarnation(1), counter };
    Address { container, slot: Slot(slot) }
}

/// What `range` must read as: runs from the model, block by block.
fn expected(model: &Model, range: Range<u64>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for block in range {
        let placement = model.get(&block).map_or(Placement::Zero, |at| Placement::At(*at));
        let run = Run { first_block: block, count: 1, placement };
        match runs.last_mut() {
            Some(last) if last.continues(&run) => last.count += 1,
            _ => runs.push(run),
        }
    }
    runs
}

fn read_all<S: NodeSource>(mut runs: Runs<'_, S>) -> Vec<Run> {
    let mut all = Vec::new();
    while let Some(run) = runs.next().unwrap() {
        all.push(run);
    }
    all
}

/// One generation of random edits, in the tree and in the model.
fn edit(
    rng: &mut StdRng,
    nodes: &mut Memory,
    model: &mut Model,
    root: Option<NodeRef>,
    shape: Shape,
) -> Option<NodeRef> {
    let mut editor = RecipeEditor::new(nodes, root, shape).unwrap();
    let mut at = 0;
    while at < shape.blocks() {
        at += match rng.random_range(0..3) {
            0 => 0,
            1 => rng.random_range(0..40),
            _ => rng.random_range(0..3000_u64),
        };
        if at >= shape.blocks() {
            break;
        }
        let most = if rng.random_bool(0.3) { 5000 } else { 30 };
        let count = rng.random_range(1..most).min(shape.blocks() - at);
        if rng.random_bool(0.4) {
            editor.put(at, count, Placement::Zero).unwrap();
            (at..at + count).for_each(|block| _ = model.remove(&block));
        } else {
            let first = address(rng.random_range(1..4), rng.random_range(0..5));
            editor.put(at, count, Placement::At(first)).unwrap();
            (0..count).for_each(|i| _ = model.insert(at + i, first.plus(i as u16).unwrap()));
        }
        at += count;
    }
    editor.finish().unwrap()
}

#[test]
fn equals_a_map_over_generations_and_growth() {
    let seeds = match std::env::var("FLEECE_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..20).chain((0..20).map(|_| rand::random())).collect::<Vec<u64>>(),
    };
    for seed in seeds {
        println!("FLEECE_SEED={seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let block_size = 4096 << rng.random_range(0..5);
        let mut size = rng.random_range(1..40_u64 << 20);
        if seed % 4 == 0 {
            size = rng.random_range(1..5 * 128 * SEGMENT_SIZE / 4);
        }
        let (mut nodes, mut model, mut root) = (Memory::default(), Model::new(), None);
        for generation in 0..5 {
            let shape = Shape::new(size, block_size);
            root = edit(&mut rng, &mut nodes, &mut model, root, shape);
            let reader = RecipeReader::new(&nodes, root, shape).unwrap();
            let all = expected(&model, 0..shape.blocks());
            assert!(read_all(reader.all_runs()) == all, "seed {seed}, generation {generation}");
            for _ in 0..20 {
                let first = rng.random_range(0..shape.blocks());
                let end = first + rng.random_range(0..2000);
                let part = expected(&model, first..end.min(shape.blocks()));
                assert!(read_all(reader.runs(first..end)) == part, "seed {seed}, from {first}");
            }
            if rng.random_bool(0.5) {
                size += rng.random_range(1..300_u64 << 20);
            }
        }
    }
}

#[test]
fn the_same_content_makes_the_same_tree_and_writes_nothing() {
    let shape = Shape::new(1 << 30, 4096);
    let (mut nodes, mut model) = (Memory::default(), Model::new());
    let mut rng = StdRng::seed_from_u64(5);
    let root = edit(&mut rng, &mut nodes, &mut model, None, shape);
    let before = nodes.nodes.len();
    // Everything is put again, as a full read does.
    let mut editor = RecipeEditor::new(&mut nodes, root, shape).unwrap();
    for run in expected(&model, 0..shape.blocks()) {
        editor.put(run.first_block, run.count, run.placement).unwrap();
    }
    assert_eq!(editor.finish().unwrap(), root);
    // Nothing is put.
    assert_eq!(RecipeEditor::new(&mut nodes, root, shape).unwrap().finish().unwrap(), root);
    // All zeros make no node at all.
    let mut editor = RecipeEditor::new(&mut nodes, root, shape).unwrap();
    editor.put(0, shape.blocks(), Placement::Zero).unwrap();
    assert_eq!(editor.finish().unwrap(), None);
    assert_eq!(nodes.nodes.len(), before);
}

#[test]
fn a_small_change_of_a_large_disk_writes_little() {
    const CHANGES: u64 = 16_384;
    let shape = Shape::new(1 << 40, 4096);
    let mut nodes = Memory::default();
    let mut editor = RecipeEditor::new(&mut nodes, None, shape).unwrap();
    // A first generation with a run in every 16th segment, and one with scattered blocks.
    for i in 0..shape.blocks() / 8192 {
        editor.put(i * 8192, 400, Placement::At(address(i as u32 + 1, 0))).unwrap();
    }
    let root = editor.finish().unwrap();
    let before = (nodes.nodes.len(), nodes.bytes);
    let mut editor = RecipeEditor::new(&mut nodes, root, shape).unwrap();
    for i in 0..CHANGES {
        let at = i * (shape.blocks() / CHANGES) + i % 97;
        editor.put(at, 1, Placement::At(address(1 << 31, i as u16))).unwrap();
    }
    let written = editor.written();
    let root = editor.finish().unwrap();
    let (count, bytes) = (nodes.nodes.len() - before.0, nodes.bytes - before.1);
    assert!(written <= CHANGES * 2, "{written}");
    // One segment node each, and an index node for every four of them.
    assert!(count as u64 <= CHANGES + CHANGES / 4 + 40, "{count} nodes");
    assert!(bytes < CHANGES * 900, "{bytes} bytes");
    let reader = RecipeReader::new(&nodes, root, shape).unwrap();
    let mut changed = 0;
    let mut runs = reader.all_runs();
    while let Some(run) = runs.next().unwrap() {
        changed += u64::from(run.placement == Placement::At(address(1 << 31, changed as u16)));
    }
    assert_eq!(changed, CHANGES);
    // An empty part of any size is one run.
    let reader = RecipeReader::new(&nodes, None, shape).unwrap();
    assert_eq!(read_all(reader.all_runs()).len(), 1);
}

#[test]
fn only_what_is_new_is_visited() {
    let shape = Shape::new(10 << 30, 4096);
    let mut nodes = Memory::default();
    let mut editor = RecipeEditor::new(&mut nodes, None, shape).unwrap();
    for i in 0..shape.blocks() / 512 {
        editor.put(i * 512, 512, Placement::At(address(i as u32 + 1, 0))).unwrap();
    }
    let old = editor.finish().unwrap();
    let mut editor = RecipeEditor::new(&mut nodes, old, shape).unwrap();
    editor.put(1_000_000, 3, Placement::At(address(5, 8))).unwrap();
    let new = editor.finish().unwrap();
    let reader = RecipeReader::new(&nodes, new, shape).unwrap();
    let visited = |old| {
        let (mut count, mut runs) = (0, Vec::new());
        let mut visit = |_: &NodeRef, _: Range<u64>, seen: Result<&[Run]>| {
            count += 1;
            runs.extend_from_slice(seen?);
            Ok(())
        };
        reader.visit_new(old, &mut visit).unwrap();
        (count, runs)
    };
    let (count, runs) = visited(old);
    assert_eq!(count, 3); // The root, one index node, one segment node.
    assert_eq!(runs.len(), 3);
    assert_eq!(visited(None).0, nodes.nodes.len() - 3);
    assert_eq!(visited(new).0, 0);
}

#[test]
fn a_damaged_node_is_found_and_the_rest_is_read() {
    let shape = Shape::new(1 << 30, 4096);
    let mut nodes = Memory::default();
    let mut editor = RecipeEditor::new(&mut nodes, None, shape).unwrap();
    editor.put(0, 3, Placement::At(address(1, 0))).unwrap();
    editor.put(5000, 3, Placement::At(address(1, 3))).unwrap();
    let root = editor.finish().unwrap();
    let victim = *nodes.nodes.iter().find(|(_, bytes)| bytes[0] == b'S').unwrap().0;
    let last = nodes.nodes.get_mut(&victim).unwrap().last_mut().unwrap();
    *last ^= 1;
    let reader = RecipeReader::new(&nodes, root, shape).unwrap();
    let mut runs = reader.all_runs();
    let error = std::iter::from_fn(|| runs.next().transpose()).find_map(Result::err).unwrap();
    assert_eq!(error.kind(), Kind::Damaged);
    let mut runs = reader.all_runs().tolerant();
    let mut data = 0;
    while let Some(run) = runs.next().unwrap() {
        data += if run.placement == Placement::Zero { 0 } else { run.count };
    }
    assert_eq!(data, 3);
    let lost = runs.take_lost();
    assert_eq!(lost.len(), 1);
    assert_eq!((lost[0].node.address, lost[0].count), (victim, 512));
}

#[test]
fn a_node_beyond_the_disks_end_is_said_to_be_one() {
    // A tree of three segments as that of a disk of two.
    let shape = Shape::new(3 * SEGMENT_SIZE, 4096);
    let mut nodes = Memory::default();
    let mut editor = RecipeEditor::new(&mut nodes, None, shape).unwrap();
    editor.put(0, shape.blocks(), Placement::At(address(1, 0))).unwrap();
    let root = editor.finish().unwrap();
    let shorter = Shape::new(2 * SEGMENT_SIZE, 4096);
    let reader = RecipeReader::new(&nodes, root, shorter).unwrap();
    let (mut good, mut bad) = (0, Vec::new());
    let mut visit = |_: &NodeRef, below: Range<u64>, read: Result<&[Run]>| {
        match read {
            Ok(_) => good += 1,
            Err(error) => bad.push((below, error.to_string())),
        }
        Ok(())
    };
    reader.visit_new(None, &mut visit).unwrap();
    assert_eq!((good, bad.len()), (3, 1));
    assert_eq!(bad[0].0, 1024..1024);
    assert!(bad[0].1.contains("beyond the disk's end"), "{}", bad[0].1);
    let blocks: u64 = read_all(reader.all_runs()).iter().map(|run| run.count).sum();
    assert_eq!(blocks, shorter.blocks());
}

/// Loses the last node that was written of a level (of level 2 that is the root); the blocks below it.
fn lose_one(nodes: &mut Memory, root: Option<NodeRef>, shape: Shape, level: u8) -> Range<u64> {
    let of = |bytes: &[u8]| if bytes[0] == b'S' { 0 } else { bytes[2] };
    let of_level = nodes.nodes.iter().filter(|(_, bytes)| of(bytes) == level);
    let victim = *of_level.map(|(address, _)| address).max_by_key(|a| a.to_string()).unwrap();
    nodes.nodes.remove(&victim);
    let reader = RecipeReader::new(&*nodes, root, shape).unwrap();
    let mut runs = reader.all_runs().tolerant();
    while runs.next().unwrap().is_some() {}
    let lost = runs.take_lost();
    assert_eq!(lost.len(), 1);
    lost[0].first_block..lost[0].first_block + lost[0].count
}

#[test]
fn a_damaged_node_is_healed_by_putting_all_below_it() {
    let shape = Shape::new((3 << 30) + 5000, 4096);
    for damaged_level in [0, 1, 2] {
        let (mut nodes, mut model) = (Memory::default(), Model::new());
        let mut rng = StdRng::seed_from_u64(u64::from(damaged_level));
        let old = edit(&mut rng, &mut nodes, &mut model, None, shape);
        let below = lose_one(&mut nodes, old, shape, damaged_level);
        // One block less is not enough.
        for missing in [1, 0] {
            let mut editor = RecipeEditor::new(&mut nodes, old, shape).unwrap();
            let all = expected(&model, below.start..below.end - missing);
            let put = all.iter().try_for_each(|r| editor.put(r.first_block, r.count, r.placement));
            let finished = put.and_then(|()| editor.finish());
            assert_eq!(finished.is_err(), missing == 1, "level {damaged_level}");
            if let Ok(new) = finished {
                let reader = RecipeReader::new(&nodes, new, shape).unwrap();
                assert!(read_all(reader.all_runs()) == expected(&model, 0..shape.blocks()));
            }
        }
    }
}

#[test]
fn what_is_put_in_parts_heals_a_damaged_node_too() {
    let shape = Shape::new((3 << 30) + 5000, 4096);
    for (damaged_level, tenths) in (0..3).flat_map(|level| [0, 3, 10].map(|cut| (level, cut))) {
        let (mut nodes, mut model) = (Memory::default(), Model::new());
        let mut rng = StdRng::seed_from_u64(u64::from(damaged_level));
        let old = edit(&mut rng, &mut nodes, &mut model, None, shape);
        let below = lose_one(&mut nodes, old, shape, damaged_level);
        let blocks = below.end - below.start;
        let cut = below.start + (blocks * tenths / 10).clamp(1, blocks - 1);
        let (mut root, mut owed): (_, Vec<Owed>) = (old, Vec::new());
        nodes.away = true;
        let mut editor = RecipeEditor::new(&mut nodes, old, shape).unwrap();
        let put = editor.put(below.start, 1, Placement::At(address(9, 9)));
        let error = put.and_then(|()| editor.finish_part().map(drop)).unwrap_err();
        assert_eq!(error.kind(), Kind::Failed, "what is only away is not lost");
        nodes.away = false;
        for part in [below.start..cut, cut..below.end - 1, below.end - 1..below.end] {
            let last = part.end == below.end;
            let mut editor = RecipeEditor::new(&mut nodes, root, shape).unwrap();
            for run in expected(&model, part) {
                editor.put(run.first_block, run.count, run.placement).unwrap();
                let put = run.first_block..run.first_block + run.count;
                owed.iter_mut().for_each(|owed| owed.pay(put.clone()));
            }
            let more;
            (root, more) = editor.finish_part().unwrap();
            owed.retain(|owed| !owed.is_paid());
            owed.extend(more);
            // Others do not count.
            owed.iter_mut().for_each(|owed| owed.pay(0..below.start));
            owed.iter_mut().for_each(|owed| owed.pay(below.end..u64::MAX));
            owed.retain(|owed| !owed.is_paid());
            assert_eq!(owed.is_empty(), last, "level {damaged_level}, {tenths} tenths");
        }
        let reader = RecipeReader::new(&nodes, root, shape).unwrap();
        assert!(read_all(reader.all_runs()) == expected(&model, 0..shape.blocks()));
    }
}

#[test]
fn a_shrunk_disk_and_disorder_are_refused() {
    let mut nodes = Memory::default();
    let large = Shape::new(1 << 30, 4096);
    let mut editor = RecipeEditor::new(&mut nodes, None, large).unwrap();
    assert!(editor.put(0, large.blocks() + 1, Placement::Zero).is_err());
    assert!(editor.put(0, 10, Placement::At(address(1, u16::MAX - 5))).is_err());
    editor.put(10, 3, Placement::At(address(1, 0))).unwrap();
    assert!(editor.put(12, 1, Placement::Zero).is_err());
    let root = editor.finish().unwrap();
    assert!(RecipeEditor::new(&mut nodes, root, Shape::new(1 << 20, 4096)).is_err());
    assert!(RecipeReader::new(&nodes, root, Shape::new(1 << 20, 4096)).is_err());
}

#[test]
fn a_reference_survives_its_text_and_nonsense_is_refused() {
    let node = NodeRef { address: address(0xabc, 77), level: 3, tag: [0xa5; 16] };
    let text = serde_json::to_string(&node).unwrap();
    assert_eq!(serde_json::from_str::<NodeRef>(&text).unwrap(), node);
    for bad in ["\"\"", "\"3:1-2/3\"", "\"9:1-2/3:00\"", "\"3:1-2/3:zz\""] {
        assert!(serde_json::from_str::<NodeRef>(bad).is_err(), "{bad}");
    }
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_a_decoder_panic(
        level in 0_u8..4,
        body in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
    ) {
        let mut bytes = vec![if level == 0 { b'S' } else { b'I' }, 1];
        bytes.extend(body);
        let _ = decode_node(level, &bytes);
    }
}
