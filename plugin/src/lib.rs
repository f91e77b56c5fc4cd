//! The plugin: everything of Fleece that touches a VM or a disk image.

pub mod cli;
pub mod engine;
pub mod error;
pub mod extents;
pub mod fingerprint;
pub mod image;
pub mod nbd;
pub mod progress;
pub mod qmp;
pub mod restore;
pub mod source;
pub mod units;
pub mod vms;
