//! Recipes for the fuzzer: trees of nodes of any bytes, whose tags fit.

use crate::error::Result;
use crate::ids::{Address, ContainerId, Incarnation, Slot};
use crate::store::format::{damaged, le16, le64};
use crate::store::recipe::{
    FAN_OUT, NodeRef, NodeSource, NodeStore, Placement, RecipeEditor, RecipeReader, Shape,
    decode_node,
};

/// Runs, and nodes of a walk, that are looked at.
const MANY: usize = 2000;
/// Levels of a tree whose nodes are the data's.
const LEVELS: u8 = 3;
/// Children of an index node that are made to fit.
const SEALED_CHILDREN: usize = 4;
/// Where an index node's children begin, and the bytes of each: address, then tag.
const CHILDREN: usize = 3 + FAN_OUT / 8;
const CHILD: usize = Address::LEN + 16;

/// A tree: a byte for the block size, the disk's size (u64), the root's level and node (a byte
/// each), then nodes (a length u16 and bytes each), then what an edit puts.
pub fn recipe(data: &[u8]) {
    let Some((head, mut rest)) = data.split_first_chunk::<11>() else { return };
    for level in 0..=8 {
        let _ = decode_node(level, rest);
    }
    let block_size = 4096 << (head[0] % 5);
    let shape = Shape::new(le64(head, 1) >> (head[0] >> 5), block_size);
    let mut tree = Tree::default();
    while tree.nodes.len() < 64 && rest.len() > 2 {
        let length = usize::from(le16(rest, 0)).min(rest.len() - 2);
        tree.nodes.push(rest[2..2 + length].to_vec());
        rest = &rest[2 + length..];
    }
    // A root of another level is refused; most inputs should get further.
    let level = if shape.height() > LEVELS { head[9] % (LEVELS + 1) } else { shape.height() };
    let root = tree.seal(usize::from(head[10]), level);
    read(&tree, root, shape);
    edit(&mut tree, root, shape, rest);
}

/// Nodes in memory; a node's slot is its number.
#[derive(Default)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Vec<u8>>,
}

impl Tree {
    fn address(number: usize) -> Address {
        let container = ContainerId { incarnation: Incarnation(1), counter: 1 };
        Address { container, slot: Slot(number as u16) }
    }

    /// The reference of a node as one of a level. The first children of an index node are made to
    /// name the nodes that follow (depth first), so that somebody could have written the tree.
    fn seal(&mut self, number: usize, level: u8) -> Option<NodeRef> {
        let mut bytes = self.nodes.get(number)?.clone();
        if level > 0 && bytes.len() >= CHILDREN {
            let children = bytes[CHILDREN..].chunks_exact_mut(CHILD).take(SEALED_CHILDREN);
            let mut next = number + 1;
            for child in children {
                let node = self.seal(next, level - 1);
                next += (0..level).map(|l| SEALED_CHILDREN.pow(l.into())).sum::<usize>();
                if let Some(node) = node {
                    child[..Address::LEN].copy_from_slice(&node.address.to_bytes());
                    child[Address::LEN..].copy_from_slice(&node.tag);
                }
            }
            self.nodes[number].clone_from(&bytes);
        }
        Some(NodeRef::of(Self::address(number), level, &bytes))
    }
}

impl NodeSource for Tree {
    fn get(&self, node: &NodeRef) -> Result<Vec<u8>> {
        let found = self.nodes.get(usize::from(node.address.slot.0)).cloned();
        found.ok_or_else(|| damaged(&node.to_string(), "it is not there"))
    }
}

impl NodeStore for Tree {
    fn put(&mut self, _level: u8, bytes: &[u8]) -> Result<Address> {
        self.nodes.push(bytes.to_vec());
        Ok(Self::address(self.nodes.len() - 1))
    }
}

/// Runs cover what was asked for without a gap, whatever the tree is.
fn read(tree: &Tree, root: Option<NodeRef>, shape: Shape) {
    let Ok(reader) = RecipeReader::new(tree, root, shape) else { return };
    let middle = shape.blocks() / 2;
    for range in [0..shape.blocks(), middle..middle.saturating_add(5000)] {
        let mut runs = reader.runs(range.clone()).tolerant();
        let mut at = range.start;
        for _ in 0..MANY {
            let Ok(Some(run)) = runs.next() else { break };
            assert!(run.first_block == at && run.count > 0, "a gap before block {at}: {run:?}");
            at += run.count;
        }
        assert!(at <= range.end.min(shape.blocks()), "runs beyond the disk's end");
        runs.take_lost();
    }
    let mut visited = 0;
    let _ = reader.visit_new(None, &mut |node, below, _| {
        visited += 1;
        assert!(below.start <= below.end && below.end <= shape.blocks(), "{node}: {below:?}");
        if visited < MANY { Ok(()) } else { Err(damaged("x", "enough")) }
    });
}

/// What is put into a tree is read from it; of the rest nothing is claimed.
fn edit(tree: &mut Tree, root: Option<NodeRef>, shape: Shape, mut what: &[u8]) {
    let mut puts: Vec<(u64, u64, Placement)> = Vec::new();
    let Ok(mut editor) = RecipeEditor::new(tree, root, shape) else { return };
    let mut at = 0_u64;
    while let Some((put, rest)) = what.split_first_chunk::<8>() {
        what = rest;
        at = at.saturating_add(u64::from(le16(put, 0)) << (put[7] % 20));
        let count = 1 + u64::from(le16(put, 2)) % 700;
        let slot = Slot(le16(put, 4) % 60_000);
        let container = ContainerId { incarnation: Incarnation(2), counter: u32::from(put[6] % 3) };
        let placement = match put[6] & 0x80 {
            0 => Placement::At(Address { container, slot }),
            _ => Placement::Zero,
        };
        let fits = at.checked_add(count).is_some_and(|end| end <= shape.blocks());
        let taken = editor.put(at, count, placement);
        assert!(fits || taken.is_err(), "a put beyond the disk's end was taken");
        if taken.is_err() || puts.len() > 200 {
            return;
        }
        puts.push((at, count, placement));
        at += count;
    }
    let Ok(root) = editor.finish() else { return };
    let Ok(reader) = RecipeReader::new(&*tree, root, shape) else {
        panic!("the editor made a tree of the wrong height");
    };
    for (first, count, placement) in puts {
        let mut runs = reader.runs(first..first + count);
        let mut at = first;
        while let Ok(Some(run)) = runs.next() {
            assert_eq!(run.placement, placement.skip(at - first), "block {at} is not what was put");
            at += run.count;
        }
        assert_eq!(at, first + count, "what was put cannot be read");
    }
}
