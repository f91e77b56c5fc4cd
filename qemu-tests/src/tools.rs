//! Where the programs under test and QEMU's own are.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::Result;

/// The version of QEMU under test: `7.2` (the default) or `10`, from `FLEECE_TEST_QEMU`.
#[must_use]
pub fn qemu_version() -> String {
    env::var("FLEECE_TEST_QEMU").unwrap_or_else(|_| "7.2".into())
}

/// The folder that `ci/setup` fills.
#[must_use]
pub fn cache() -> PathBuf {
    env::var_os("FLEECE_TEST_CACHE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache"), PathBuf::from)
}

/// The folder of the QEMU under test.
#[must_use]
pub fn qemu_folder() -> PathBuf {
    cache().join(format!("qemu-{}", qemu_version()))
}

/// A program of the QEMU under test, ready for arguments.
///
/// # Errors
/// When `ci/setup` has not put it there.
pub fn qemu(program: &str) -> Result<Command> {
    let path = qemu_folder().join("usr/bin").join(program);
    ensure!(path.exists(), "{} is missing: run ci/setup", path.display());
    let mut command = Command::new(path);
    command.env("QEMU_MODULE_DIR", qemu_folder().join("usr/lib/x86_64-linux-gnu/qemu"));
    Ok(command)
}

/// One of Fleece's programs, with the PATH that leads to the QEMU tools under test.
///
/// # Errors
/// When it has not been built.
pub fn fleece(program: &str) -> Result<Command> {
    let path = programs()?.join(program);
    ensure!(
        path.exists(),
        "{} is missing: run `cargo build -p fleece -p fleece-engine`",
        path.display()
    );
    let mut command = Command::new(path);
    command
        .env("PATH", search_path()?)
        .env("QEMU_MODULE_DIR", qemu_folder().join("usr/lib/x86_64-linux-gnu/qemu"));
    Ok(command)
}

/// The engine of the version before this one.
///
/// # Errors
/// When `ci/previous` has not built it.
pub fn previous_engine() -> Result<PathBuf> {
    let path = cache().join("previous/fleece-engine");
    ensure!(path.exists(), "{} is missing: run ci/previous", path.display());
    Ok(path)
}

/// The folder of Fleece's programs: `FLEECE_TEST_PROGRAMS`, or where this test was built.
///
/// # Errors
/// When this is no program that cargo built.
pub fn programs() -> Result<PathBuf> {
    if let Some(folder) = env::var_os("FLEECE_TEST_PROGRAMS") {
        return Ok(folder.into());
    }
    let this = env::current_exe()?;
    let folder =
        this.ancestors().nth(2).context("a test's executable lies in target/debug/deps")?;
    Ok(folder.into())
}

/// The PATH that leads to the QEMU tools under test.
///
/// # Errors
/// When it cannot be written as one.
pub fn search_path() -> Result<OsString> {
    let mut folders = vec![qemu_folder().join("usr/bin")];
    folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    Ok(env::join_paths(folders)?)
}

/// A program of the system as root: by itself where we are root, through sudo elsewhere.
#[must_use]
pub fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.args(["-n", program]);
    command
}

/// Runs a command to its end and gives its standard output.
///
/// # Errors
/// When it cannot start or fails; with its standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
