//! One backup of one VM, from the first batch of fingerprints to the commit.
//!
//! A session has a thread of its own; [`event::Event`]s come in, and after each the
//! session goes as far as it can ([`stages`]). Windows ([`window`]) follow one another:
//! scanned and asked about (spool, answers), written (grants), settled, put into recipes.

pub mod answers;
pub mod begin;
pub mod event;
mod handover;
mod lent;
mod met;
mod publish;
pub mod registry;
pub mod spool;
mod stages;
mod submit;
#[cfg(test)]
mod tests;
mod window;
mod write;

pub(crate) use stages::position;

use std::sync::Arc;

use crate::budget::Budget;
use crate::damage::Damage;
use crate::error::Error;
use crate::routing::Owners;
use crate::store::Store;
use crate::store::commit::Manifests;

/// What every session of an engine works with.
#[derive(Clone)]
pub struct Context {
    /// Where blocks and recipes go.
    pub store: Store,
    /// Where snapshots are committed.
    pub manifests: Manifests,
    /// What is known to be damaged.
    pub damage: Arc<Damage>,
    /// Who answers requests.
    pub owners: Owners,
    /// The sessions that live.
    pub registry: Arc<registry::Registry>,
    /// The engine's memory.
    pub budget: Budget,
    /// For sessions' working files.
    pub work_dir: std::path::PathBuf,
    /// This host's name.
    pub host: String,
    /// Held while the index is rebuilt or the store repaired: one at a time.
    pub rebuilding: Arc<std::sync::Mutex<()>>,
    /// Held while the store is tidied.
    pub tidying: Arc<std::sync::Mutex<()>>,
    /// How long after its own writes a session leaves the rest to those who hold the grants.
    pub patience: std::time::Duration,
}

impl Context {
    /// Tells a session something, here or on another host; false if it cannot hear it.
    pub(crate) fn tell(&self, to: crate::ids::SessionId, event: event::Event) -> bool {
        self.owners.tell(&self.registry, to, event)
    }

    /// Says which disk is full, and what to do.
    pub(crate) fn explain(&self, error: Error) -> Error {
        if !error.is_disk_full() {
            return error;
        }
        let dir = self.work_dir.display();
        let advice = format!("the disk of {dir} is full: make room there and run it again");
        Error::caused(error.kind(), advice, error)
    }
}

/// Data blocks of a window: bounds spool, logs, open grants and the view's scratch.
pub const BLOCKS_PER_WINDOW: u64 = 4 << 20;
/// Extents in one answer of grants.
pub const GRANTS_PER_CALL: usize = 4096;
/// Bytes of lent images that one call may name.
pub const MAX_LENT: u64 = 4 << 20;
/// Blocks in one batch of the scan: 160 KiB of fingerprints.
pub const BLOCKS_PER_SUBMIT: usize = 8192;
