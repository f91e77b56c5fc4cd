//! The memory budget, carved up once: every large buffer of the engine is one of these shares.

use crate::error::{Error, Kind, Result};
use crate::store::StoreBudget;

/// What a session's two packers hold: fingerprints of an open and a closing container, and
/// two frames on the pool, each compressed and not.
const PACKERS: usize = 640 << 10;
/// What waits for other hosts; the rest of their fixed part is for links and frames on their way.
const PEERS: usize = 2 << 20;
/// However much memory there is: each session is a thread.
const MAX_SESSIONS: usize = 64;
/// Below this the shares no longer hold their fixed parts.
pub const MINIMUM: u64 = 24 << 20;

/// What each part of the engine may allocate, in bytes. Nothing in it grows with
/// the number of blocks, VMs, snapshots or peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// All of it.
    pub total: u64,
    /// Packers: blocks of frames being compressed, and staged writes.
    pub packing: usize,
    /// Directories and frames that were read.
    pub caches: usize,
    /// Sorting the requests of a pass; restore borrows it.
    pub pass: usize,
    /// Blocks on their way between the RPC thread and sessions.
    pub messages: usize,
    /// Sort runs of one session's answers and places.
    pub session_sort: usize,
    /// Backups that may run at once; more wait before their point in time.
    pub sessions: usize,
    /// What waits for other hosts, all of them together.
    pub peers: usize,
}

impl Budget {
    /// Carves up `total` bytes.
    ///
    /// # Errors
    /// [`Kind::Usage`] below [`MINIMUM`].
    pub fn new(total: u64) -> Result<Self> {
        if total < MINIMUM {
            return Err(Error::new(
                Kind::Usage,
                format!("memory_budget is {} MiB; the engine needs at least 24M", total >> 20),
            ));
        }
        // Fixed: 5 MiB runtime, 2.5 MiB LMDB transaction, 3 MiB memtable, 3 MiB peers, and half a MiB of
        // frames on the pool beyond those of the packers.
        let free = total - (14 << 20);
        let share = |parts: u64| usize::try_from(free * parts / 18).unwrap_or(usize::MAX);
        let sessions = (share(5) / PACKERS).clamp(1, MAX_SESSIONS);
        Ok(Budget {
            total,
            packing: share(5),
            caches: share(3),
            pass: share(6),
            messages: share(2),
            session_sort: (share(2) / sessions).max(64 << 10),
            sessions,
            peers: PEERS,
        })
    }
}

impl Budget {
    /// The store's shares. A packer keeps its open container's fingerprints and two frames
    /// on the pool, each compressed and not.
    #[must_use]
    pub fn store(&self) -> StoreBudget {
        StoreBudget {
            directory_cache: self.caches / 2,
            frame_cache: self.caches / 2,
            ..StoreBudget::default()
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shares_stay_within_the_total() {
        for total in [MINIMUM, 32 << 20, 1 << 30] {
            let b = Budget::new(total).unwrap();
            let shares = b.packing + b.caches + b.pass + b.messages;
            assert!((shares as u64) + (14 << 20) <= total, "{b:?}");
        }
        assert_eq!(Budget::new(MINIMUM - 1).unwrap_err().kind(), Kind::Usage);
    }
}
