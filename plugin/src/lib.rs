//! The plugin: everything of Fleece that touches a VM or a disk image.

pub mod backup;
pub mod cache;
pub mod cli;
pub mod engine;
pub mod error;
pub mod extents;
pub mod fingerprint;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod hash_pool;
pub mod image;
pub mod nbd;
pub mod pace;
pub mod progress;
pub mod qmp;
pub mod read_limit;
pub mod restore;
pub mod scan;
pub mod serve;
pub mod source;
pub mod units;
pub mod vms;
pub mod write;
