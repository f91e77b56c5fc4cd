//! The plugin: everything of Fleece that touches a VM or a disk image.

pub mod error;
pub mod extents;
pub mod image;
pub mod nbd;
pub mod qmp;
pub mod source;
pub mod vms;
