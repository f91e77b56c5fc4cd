//! The recipe: the tree that names a disk's blocks.
//!
//! A disk is cut into segments of 2 MiB. A *segment node* (level 0) lists runs: so many
//! blocks from here on are in consecutive slots of a container. An *index node* of level
//! `n` has 128 children of level `n - 1`. A child that is absent is all zeros, so zeros
//! cost nothing; a child that did not change is named again, so a snapshot costs what
//! changed. A reference carries a tag of the child's bytes: whoever has the root in an
//! authenticated manifest has the whole tree authenticated.

mod editor;
mod node;
mod reader;
mod stored;
#[cfg(test)]
mod tests;

pub use editor::{Owed, RecipeEditor};
#[cfg(any(test, fuzzing))]
pub(crate) use node::decode_node;
pub use node::{NodeRef, fingerprint};
pub use reader::{Lost, RecipeReader, Runs, Visit};
pub use stored::StoredNodes;

use std::ops::Range;

use crate::error::Result;
use crate::ids::Address;

/// Bytes of a segment.
pub const SEGMENT_SIZE: u64 = 2 << 20;
/// Children of an index node.
pub const FAN_OUT: usize = 128;
/// Bits of a segment number that one level of index nodes resolves.
const FAN_OUT_BITS: u32 = FAN_OUT.trailing_zeros();

/// Where nodes are read.
pub trait NodeSource {
    /// The bytes of a node, not yet checked against the reference's tag.
    fn get(&self, node: &NodeRef) -> Result<Vec<u8>>;
}

impl<S: NodeSource + ?Sized> NodeSource for &S {
    fn get(&self, node: &NodeRef) -> Result<Vec<u8>> {
        (**self).get(node)
    }
}

/// Where nodes are written.
pub trait NodeStore: NodeSource {
    /// Keeps a node; it must be readable only after the store's own sealing.
    fn put(&mut self, level: u8, bytes: &[u8]) -> Result<Address>;
}

/// What a range of blocks holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placement {
    /// Zeros.
    Zero,
    /// Consecutive slots of one container, this being the first block's.
    At(Address),
}

impl Placement {
    /// The placement `blocks` further on.
    #[must_use]
    pub fn skip(self, blocks: u64) -> Self {
        match self {
            Placement::Zero => Placement::Zero,
            Placement::At(address) => {
                let mut further = address;
                further.slot.0 = further.slot.0.wrapping_add(blocks as u16);
                Placement::At(further)
            }
        }
    }
}

/// Consecutive blocks of a disk with one placement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The first block's number on the disk.
    pub first_block: u64,
    /// How many blocks.
    pub count: u64,
    /// What they hold.
    pub placement: Placement,
}

impl Run {
    /// Whether `next` continues this run on the disk and in its placement.
    fn continues(&self, next: &Run) -> bool {
        self.first_block + self.count == next.first_block
            && match (self.placement, next.placement) {
                (Placement::Zero, Placement::Zero) => true,
                (Placement::At(here), Placement::At(there)) => {
                    here.container == there.container
                        && u64::from(here.slot.0) + self.count == u64::from(there.slot.0)
                }
                _ => false,
            }
    }
}

/// The shape of a disk's tree: follows from its size and the block size alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    blocks: u64,
    segment_blocks: u32,
}

impl Shape {
    /// Of a disk of `size` bytes in blocks of `block_size` bytes (a power of two, 4 to 64 KiB).
    #[must_use]
    pub fn new(size: u64, block_size: u32) -> Self {
        Shape {
            blocks: size.div_ceil(u64::from(block_size)),
            segment_blocks: (SEGMENT_SIZE / u64::from(block_size)) as u32,
        }
    }

    /// Blocks of the disk; the last one may be partial.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Blocks of a segment.
    #[must_use]
    pub fn segment_blocks(&self) -> u32 {
        self.segment_blocks
    }

    /// Levels of index nodes above the segment nodes: the root's level.
    #[must_use]
    pub fn height(&self) -> u8 {
        let segments = self.blocks.div_ceil(u64::from(self.segment_blocks));
        let bits = u64::BITS - segments.saturating_sub(1).leading_zeros();
        bits.div_ceil(FAN_OUT_BITS) as u8
    }

    /// Segments below one node of a level.
    fn span(level: u8) -> u64 {
        1 << (FAN_OUT_BITS * u32::from(level))
    }

    /// The blocks below the node of a level that begins with `segment`; none beyond the disk's end.
    fn blocks_below(&self, segment: u64, level: u8) -> Range<u64> {
        let blocks = u64::from(self.segment_blocks);
        let first = (segment * blocks).min(self.blocks);
        first..first.saturating_add(Shape::span(level) * blocks).min(self.blocks)
    }

    /// Blocks of a segment that the disk has: the last segment may have fewer.
    fn blocks_of(&self, segment: u64) -> u32 {
        let first = segment * u64::from(self.segment_blocks);
        self.blocks.saturating_sub(first).min(u64::from(self.segment_blocks)) as u32
    }
}
