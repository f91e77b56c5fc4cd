//! What can happen to a session: calls of the plugin, and words of other sessions.

use std::fs::File;

use tokio::sync::{OwnedMutexGuard, oneshot};

use super::spool::Position;
use crate::error::Result;
use crate::ids::{Fingerprint, Sequence, SessionId};
use crate::store::manifest::Manifest;

/// Where the answer to a call goes.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// The turn of a call of which one at a time may be there, whatever its caller does.
pub type Alone = Option<OwnedMutexGuard<()>>;

/// Events that wait for a session's thread at most. The plugin's calls are bounded by
/// their flow control; a client that sends more than this at once is refused.
pub const QUEUE: usize = 256;

/// Some blocks of a disk, as the scan saw them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The first block's number on the disk.
    pub first_block: u64,
    /// How many.
    pub blocks: u32,
    /// Whether they are zero; otherwise each has a fingerprint.
    pub zero: bool,
}

/// Blocks that the plugin is to write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GrantExtent {
    /// The first block.
    pub at: Position,
    /// How many.
    pub blocks: u32,
}

/// One answer to the question what is to be written.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Grants {
    /// The blocks, in the order in which they must come.
    pub extents: Vec<GrantExtent>,
    /// Nothing more will be granted: the session can be committed.
    pub done: bool,
}

/// A block that one session asks another one to leave to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claim {
    /// The block.
    pub fingerprint: Fingerprint,
    /// The request that holds the grant.
    pub theirs: Sequence,
}

/// What can happen to a session.
pub enum Event {
    /// A batch of the scan.
    Submit {
        /// The disk's number in the session.
        disk: u16,
        /// What was seen, ascending.
        extents: Vec<Extent>,
        /// One for each block that is not zero.
        fingerprints: Vec<Fingerprint>,
        /// Answered when it is spooled.
        reply: Reply<()>,
    },
    /// The window's scan is complete; answered when the next one may begin.
    EndWindow(Reply<()>),
    /// The scan is complete.
    EndScan(Reply<()>),
    /// What is to be written? Answered when there is something, or never will be.
    Grants(Reply<Grants>),
    /// Granted blocks.
    Write {
        /// Which, in the order in which they were granted.
        runs: Vec<GrantExtent>,
        /// Whole blocks, those of all runs.
        data: Vec<u8>,
        /// Answered when they are taken in.
        reply: Reply<()>,
    },
    /// A file that holds a disk's bytes.
    Lend {
        /// The disk's number in the session.
        disk: u16,
        /// As the plugin handed it over.
        file: File,
        /// Until it is dropped no other such call comes.
        alone: Alone,
        /// Whether it is taken.
        reply: Reply<bool>,
    },
    /// Granted blocks of disks that were lent: to be read there.
    WriteLent {
        /// Which, in the order in which they were granted.
        runs: Vec<GrantExtent>,
        /// Until it is dropped no other such call comes.
        alone: Alone,
        /// Answered when they are taken in.
        reply: Reply<()>,
    },
    /// Publish the snapshot.
    Commit {
        /// The point in time, Unix milliseconds.
        point_in_time_ms: i64,
        /// The dirty bitmaps that begin at it.
        bitmaps: Vec<String>,
        /// Answered once the manifest is durable.
        reply: Reply<Manifest>,
    },
    /// The plugin gives up.
    Abort {
        /// Why, for the log.
        reason: String,
        /// Answered once the session is ended in the store.
        reply: Reply<()>,
    },
    /// The plugin is gone, or the engine ends.
    Hangup,
    /// There may be new answers.
    Wake,
    /// Another session asks for blocks that we have not packed yet.
    GiveUp {
        /// Who asks.
        to: SessionId,
        /// For what.
        claims: Vec<Claim>,
    },
    /// Another session has done with what we asked for: it gave it up, or has sealed it.
    GaveUp {
        /// Who.
        from: SessionId,
    },
}
