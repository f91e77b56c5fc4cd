//! What dead runs left behind in a VM, and how it is ended: `cleanup`, `abort`, the guard.

use crate::error::{Error, Kind, Result};
use crate::qmp::session::Session;
use crate::vms::Vm;
use std::path::Path;

/// What was found and ended.
#[derive(Clone, Default, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Report {
    /// In words, one per thing done.
    pub done: Vec<String>,
    /// What could not be ended, with the reason.
    pub left: Vec<String>,
}

/// Ends views of dead runs (exports, jobs, filters, scratch, our NBD server). Bitmaps are left to
/// the plan of the next backup.
///
/// # Errors
/// QEMU went away.
pub async fn end_leftovers(_session: &Session) -> Result<Report> {
    Err(Error::new(Kind::Failed, "not built yet"))
}

/// `fleece cleanup VM`: [`end_leftovers`], and bitmaps of dead runs merged back without an engine.
///
/// # Errors
/// `Busy`: a backup of this VM runs. Otherwise as [`Session::connect`].
pub async fn cleanup(_run_dir: &Path, _vm: &Vm) -> Result<Report> {
    Err(Error::new(Kind::Failed, "not built yet"))
}

/// `fleece abort VM`: ends a running backup (or what one left) within 5 s; the guest goes on.
///
/// # Errors
/// Something is left; what, is in the message.
pub async fn abort(_run_dir: &Path, _vm: &Vm) -> Result<Report> {
    Err(Error::new(Kind::Failed, "not built yet"))
}
