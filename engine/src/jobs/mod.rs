//! Work on the store as a whole: restore, verify, rebuild, checkpoints, tidying.

pub mod affected;
pub mod checkpoint;
#[cfg(test)]
pub(crate) mod fixture;
pub mod journals;
pub mod rebuild;
pub mod repair;
pub mod restore;
pub mod tidy;
pub mod usage;
pub mod verify;

use std::path::PathBuf;

/// How a job runs that changes the store.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only say what would be done.
    pub dry_run: bool,
    /// For sorts.
    pub scratch: PathBuf,
    /// The time, Unix milliseconds.
    pub now_ms: i64,
}
