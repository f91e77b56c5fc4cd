//! A frame of a container: where it is, and where its blocks or nodes are in it.

use std::ops::Range;

use super::directory::FrameEntry;
use crate::ids::{ContainerId, Slot};

/// A frame, and where to read it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameRef {
    /// Its container.
    pub container: ContainerId,
    /// The container's generation in which it was found.
    pub generation: u32,
    /// Its number in the container.
    pub number: u32,
    /// Its first slot.
    pub first: Slot,
    /// Slots from its first to its last, holes included.
    pub span: u16,
    /// Where it is in its object.
    pub offset: u64,
    /// Bytes there.
    pub stored_len: u32,
    /// Bytes after decompression.
    pub raw_len: u32,
    pub(crate) entry: FrameEntry,
}

impl FrameRef {
    /// Its bytes in its object.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.stored_len)
    }

    /// Where the block of a slot is in the decompressed frame of blocks of `block_size`.
    #[must_use]
    pub fn block_range(&self, slot: Slot, block_size: u32) -> Option<Range<usize>> {
        let start = self.entry.index_of(slot)? * block_size as usize;
        Some(start..start + block_size as usize)
    }

    /// The block of each slot that is there, of a decompressed frame of blocks of `block_size`.
    pub fn blocks<'a>(
        &self,
        raw: &'a [u8],
        block_size: u32,
    ) -> impl Iterator<Item = (Slot, &'a [u8])> {
        (0..self.span).filter_map(move |n| {
            let slot = self.first.0.checked_add(n).map(Slot)?;
            Some((slot, raw.get(self.block_range(slot, block_size)?)?))
        })
    }

    /// A node of a frame of nodes: the lengths of all come first.
    pub(crate) fn node<'a>(&self, raw: &'a [u8], slot: Slot) -> Option<&'a [u8]> {
        let count = self.entry.count() as usize;
        let (lengths, bodies) = raw.split_at_checked(4 * count)?;
        let index = self.entry.index_of(slot)?;
        let mut lengths =
            lengths.as_chunks::<4>().0.iter().map(|l| u32::from_le_bytes(*l) as usize);
        let start: usize = lengths.by_ref().take(index).sum();
        bodies.get(start..start.checked_add(lengths.next()?)?)
    }
}
