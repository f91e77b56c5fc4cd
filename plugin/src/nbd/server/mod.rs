//! Our server: read-only, for disks that are restored while they are read.

use std::future::Future;

use bytes::Bytes;

use crate::error::Result;

/// A disk to serve. Not `Send`: the server lives where its sources live.
pub trait ImageSource {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// `length` bytes at `offset`, within the disk, at most [`PIECE`].
    fn read(&self, offset: u64, length: u32) -> impl Future<Output = Result<Bytes>>;

    /// What is zeros from `offset` on: stretches one after the other, at least one, of which
    /// the last may go beyond `length`.
    fn extents(&self, offset: u64, length: u64) -> impl Future<Output = Result<Vec<Stretch>>>;
}

/// A stretch of a served disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    /// Bytes, at least 1.
    pub length: u64,
    /// Reads as zeros.
    pub zero: bool,
}

/// Most bytes asked of a source at once.
pub const PIECE: u32 = 256 * 1024;
