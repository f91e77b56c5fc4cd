//! The kernel of detection, `engine/examples/detect_speed.rs`, as a program of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::Cgroup;
use crate::{Result, Running, tools};

/// How long one call may take: the largest index is built within it on a slow disk.
const LIMIT: Duration = Duration::from_secs(3600);

/// A call of `detect_speed`.
pub struct Detection<'a> {
    /// The folder of the index; built if it is not there.
    pub index: &'a Path,
    /// Entries of the index.
    pub entries: u64,
    /// Requests of a batch.
    pub requests: u64,
    /// How many of 100 requests are new.
    pub new: u64,
    /// Batches, one after the other.
    pub batches: u64,
    /// The store that the index belongs to, if it is to serve an engine.
    pub store: Option<&'a str>,
}

impl Detection<'_> {
    /// Its command line, for the report.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut words = vec![self.index.display().to_string()];
        words.extend([self.entries, self.requests, self.new, self.batches].map(|n| n.to_string()));
        words.extend(["--cold".into(), "--json".into()]);
        words.extend(self.store.map(|store| format!("--store={store}")));
        words
    }

    /// Runs it, within a group if there is one; what it says of each batch.
    ///
    /// # Errors
    /// When it is not built, fails, or is not done in time.
    pub fn run(&self, group: Option<&Cgroup>) -> Result<Vec<Value>> {
        let mut command = Command::new(program("detect_speed")?);
        command.args(self.arguments());
        if let Some(group) = group {
            command = group.within(&command);
        }
        let batches =
            Running::start("detect_speed", &mut command)?.finish(LIMIT)?.code(0)?.json()?;
        ensure!(batches.len() as u64 == self.batches, "{} batches were told of", batches.len());
        Ok(batches)
    }
}

/// An example of the product's, built beside its programs.
///
/// # Errors
/// When it is not there.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = tools::programs()?.join("examples").join(name);
    let how = "run `cargo build --release -p fleece -p fleece-engine --examples`";
    ensure!(path.exists(), "{} is missing: {how}", path.display());
    Ok(path)
}

/// A figure of a batch.
///
/// # Errors
/// When it is not there.
pub fn figure(batch: &Value, name: &str) -> Result<f64> {
    batch[name].as_f64().with_context(|| format!("no {name} in {batch}"))
}

/// The sum of a figure over batches.
///
/// # Errors
/// When it is missing in one.
pub fn sum(batches: &[Value], name: &str) -> Result<f64> {
    batches.iter().map(|batch| figure(batch, name)).sum()
}
