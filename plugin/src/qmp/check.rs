//! `fleece check VM`: how a backup would go; changes nothing.

use crate::error::{Error, Kind, Result};
use crate::vms::Vm;
use serde::Serialize;
use std::path::Path;

/// The answer for one VM.
#[derive(Clone, Default, Debug, Serialize)]
pub struct Report {
    /// UUID, name.
    pub vm: String,
    /// Its UUID.
    pub uuid: String,
    /// QEMU's version.
    pub qemu: String,
    /// running, paused, …
    pub status: String,
    /// The way that would be taken, and what it means.
    pub way: String,
    /// The same in words.
    pub means: String,
    /// The guest agent: `answers`, `silent: …`, `none`.
    pub agent: String,
    /// Bytes free for scratch.
    pub scratch_free: u64,
    /// One per disk.
    pub disks: Vec<DiskReport>,
    /// Disks left out, with the reason.
    pub skipped: Vec<(String, String)>,
    /// What stands in the way of a backup.
    pub obstacles: Vec<String>,
}

/// One disk.
#[derive(Clone, Default, Debug, Serialize)]
pub struct DiskReport {
    /// Its label.
    pub label: String,
    /// Its format.
    pub format: String,
    /// Bytes.
    pub size: u64,
    /// The way.
    pub way: String,
    /// The state of its bitmap, in words.
    pub bitmap: String,
}

/// Looks at a VM.
///
/// # Errors
/// As [`crate::qmp::session::Session::connect`].
pub async fn check(_vm: &Vm, _scratch_dir: &Path) -> Result<Report> {
    Err(Error::new(Kind::Failed, "not built yet"))
}
