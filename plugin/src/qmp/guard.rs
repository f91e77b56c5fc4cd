//! The guard: a process that sets the VM right if the worker dies.

use crate::error::{Error, Kind, Result};
use crate::vms::Vm;
use std::path::PathBuf;
use std::process::ExitCode;

/// The hidden subcommand that makes this program the guard.
pub const SUBCOMMAND: &str = "guard";

/// How to start one.
#[derive(Clone, Debug)]
pub struct Options {
    /// Our own program.
    pub program: PathBuf,
    /// Where it writes what it does (only if it has something to do).
    pub log: PathBuf,
    /// The run directory (`/run/fleece`).
    pub run_dir: PathBuf,
}

/// The worker's end of the guard.
#[derive(Debug)]
pub struct Guard {}

impl Guard {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// It did not start.
    pub fn spawn(_options: &Options, _vm: &Vm) -> Result<Guard> {
        Err(Error::new(Kind::Failed, "not built yet"))
    }

    /// All is well: it may go.
    pub fn done(self) {}
}

/// The guard's `main`: for the hidden subcommand.
#[must_use]
pub fn main() -> ExitCode {
    ExitCode::FAILURE
}
