//! Containers: immutable objects of frames of blocks, and the directory of what they hold.
//!
//! An object holds one section, or several small ones one after the other:
//! ```text
//! section  = lead (header 80, container id, generation, block size, crc)
//!            frames            each ciphertext ‖ tag; 64 KiB of blocks before compression
//!            fingerprint column  4 KiB chunks, each authenticated: per slot its
//!                                fingerprint and its state (present, dead, forward, damaged);
//!                                not of blocks as first written
//!            frame table         readable alone: slots, offset, lengths, codec per frame
//!            trailer 160         header again, places and sizes of the two; found by one suffix read
//! ```
//! A slot is for ever: rewriting makes a new generation under a new key and keeps slots.
//! Column, table and trailer stand in an object of their own, the directory's. Of blocks as first written
//! the column is there alone: whoever has lost it computes it from the frames, and whoever
//! has lost those needs it.

mod cache;
pub(crate) mod codec;
mod column;
mod copy;
pub mod directory;
mod frame;
mod open;
pub mod reader;
mod rewrite;
mod salvage;
pub mod writer;

pub use copy::SecondCopy;
pub use directory::SlotState;
pub use frame::FrameRef;
pub use open::SlotInfo;
pub use reader::{Directories, Summary};
pub use rewrite::Rewriter;
pub use salvage::Salvage;
pub use writer::{Packer, SealedContainer};

use super::format::ObjectKind;

/// Bytes of frames in a container: long enough to make syncs and requests rare,
/// short enough to rewrite and to upload at once.
pub const CONTAINER_BYTES: u32 = 16 << 20;
/// Slots of a container: a slot's number is 16 bits, and their count must fit, too.
pub const CONTAINER_SLOTS: u32 = 65_535;
/// Frames of a container: its table (32 bytes each) stays within 128 KiB.
pub const CONTAINER_FRAMES: u32 = 4096;
/// Bytes of a frame of blocks before compression. 64 KiB compress nearly as well as 128 KiB,
/// and a single block's read decompresses half as much.
pub const FRAME_BYTES: usize = 64 << 10;
/// Bytes of a frame of nodes: read one by one, so shorter.
pub const NODE_FRAME_BYTES: usize = 32 << 10;
/// The longest recipe node.
pub const NODE_MAX: usize = 64 << 10;
/// No frame is longer before compression: a full frame of nodes, one more node, their lengths.
pub const FRAME_RAW_MAX: u32 = 160 << 10;
/// Nodes in a frame: small ones share it, and its list of lengths stays small.
pub const NODES_PER_FRAME: u16 = 512;

/// What a container's slots hold.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ContainerKind {
    /// Blocks, each of the store's block size.
    Blocks,
    /// Recipe nodes of any length up to [`NODE_MAX`].
    Nodes,
}

impl ContainerKind {
    /// The kind of the object.
    #[must_use]
    pub fn object(self) -> ObjectKind {
        match self {
            ContainerKind::Blocks => ObjectKind::Blocks,
            ContainerKind::Nodes => ObjectKind::Nodes,
        }
    }

    pub(crate) fn from_object(kind: ObjectKind) -> Option<Self> {
        match kind {
            ObjectKind::Blocks => Some(ContainerKind::Blocks),
            ObjectKind::Nodes => Some(ContainerKind::Nodes),
            _ => None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
