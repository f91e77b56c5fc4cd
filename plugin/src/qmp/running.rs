//! One backup of a VM at a time on this host: a lock file per monitor socket.

use crate::error::{Error, Kind, Result};
use std::path::Path;

/// Held while a backup of the VM runs; released by the kernel if the process dies.
#[derive(Debug)]
pub struct Lock {}

impl Lock {
    /// Takes it.
    ///
    /// # Errors
    /// `Busy`: another backup of this VM runs (its process id is in the message).
    pub fn take(_run_dir: &Path, _qmp: &Path) -> Result<Lock> {
        Err(Error::new(Kind::Failed, "not built yet"))
    }
}
