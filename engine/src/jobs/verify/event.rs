//! What `verify` says, one JSON object a line.

use serde::Serialize;

use crate::jobs::affected::Affected;

/// Something that `verify` says as it goes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "message_type", rename_all = "snake_case")]
pub enum Event {
    /// How far it is.
    Progress {
        /// `snapshots`, `journals`, `containers`.
        stage: &'static str,
        /// How many of them are done.
        done: u64,
    },
    /// Something is wrong.
    Problem {
        /// `store`, `key`, `incarnation`, `session`, `mark`, `manifest`, `recipe`, `journal`,
        /// `container`, `directory`, `frame`, `fingerprint`, `reference`, `index`.
        what: &'static str,
        /// The object.
        object: String,
        /// In words.
        message: String,
    },
    /// Something is unusual and harms nothing.
    Note {
        /// The object.
        object: String,
        /// In words.
        message: String,
    },
    /// A snapshot's disk cannot be restored whole.
    Affected(Affected),
    /// The end.
    Summary(Report),
}

/// What was verified, and what came out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Report {
    /// Committed snapshots.
    pub snapshots: u64,
    /// Recipe nodes.
    pub nodes: u64,
    /// Runs of blocks that recipes name (shared ones once per chain of snapshots).
    pub runs: u64,
    /// Journal entries.
    pub journal_entries: u64,
    /// Containers.
    pub containers: u64,
    /// Containers whose directory's second copy was missing and was made.
    pub copies_made: u64,
    /// Containers whose directory's second copy is missing and could not be made.
    pub copies_missing: u64,
    /// Frames read, decrypted and decompressed.
    pub frames: u64,
    /// Blocks fingerprinted.
    pub blocks: u64,
    /// Slots that are marked as damaged.
    pub damaged_slots: u64,
    /// Snapshots that damage touches.
    pub affected_snapshots: u64,
    /// Things that are wrong.
    pub problems: u64,
}

impl Report {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn clean(&self) -> bool {
        self.problems == 0 && self.affected_snapshots == 0
    }
}
