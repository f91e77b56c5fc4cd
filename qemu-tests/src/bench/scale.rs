//! The simulated cluster, `engine/examples/cluster_scale`, as a program of its own; and the model that
//! takes what it measures to the full size.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::detect::program;
use crate::{Result, Running};

/// How long one call may take.
const LIMIT: Duration = Duration::from_secs(3600);
/// Bytes of a block.
pub const BLOCK: f64 = 4096.0;
/// The simulation's VMs have this part of the blocks of a real one.
pub const SCALE: f64 = 1000.0;
/// Partitions of an index, and requests that are due for a pass over one of them: the engine's own
/// (`DetectOptions`).
const PARTITIONS: f64 = 16.0;
const PASS_REQUESTS: f64 = 262_144.0;

/// Runs it with these words; the lines that it says.
///
/// # Errors
/// When it is not built, fails, or is not done in time.
pub fn call(words: &[String]) -> Result<Vec<Value>> {
    let mut command = Command::new(program("cluster_scale")?);
    command.args(words);
    Running::start("cluster_scale", &mut command)?.finish(LIMIT)?.code(0)?.json()
}

/// A line of a kind.
///
/// # Errors
/// When there is none.
pub fn line(lines: &[Value], kind: &str) -> Result<Value> {
    let found = lines.iter().find(|line| line["kind"] == kind);
    found.cloned().with_context(|| format!("nothing was said of {kind}"))
}

/// A run with so many engines.
pub struct Run(pub Value);

/// Which rounds of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rounds {
    /// All, the first and full one among them.
    All,
    /// Those after the first: a day's work.
    Later,
}

impl Run {
    /// The figure at a path.
    ///
    /// # Errors
    /// When it is not there.
    pub fn get(&self, path: &str) -> Result<f64> {
        self.0.pointer(path).and_then(Value::as_f64).with_context(|| format!("no {path}"))
    }

    /// A figure of all rounds or of the later ones.
    fn of(&self, rounds: Rounds, name: &str, rest: &str) -> Result<f64> {
        let later = if rounds == Rounds::Later { "_later" } else { "" };
        self.get(&format!("/{name}{later}{rest}"))
    }

    /// Processor seconds of a stage, or of all: `mean` or `max` over engines.
    ///
    /// # Errors
    /// When it is not there.
    pub fn seconds(&self, rounds: Rounds, stage: &str, which: &str) -> Result<f64> {
        self.of(rounds, "costs", &format!("/{stage}/{which}"))
    }

    /// Blocks asked about.
    ///
    /// # Errors
    /// When it is not there.
    pub fn asked(&self, rounds: Rounds) -> Result<f64> {
        self.of(rounds, "asked", "")
    }

    /// GB a second of all VMs, what dirty bitmaps leave out included, as soon as the busiest engine is
    /// done.
    ///
    /// # Errors
    /// When a figure is not there.
    pub fn throughput(&self, rounds: Rounds) -> Result<f64> {
        let bytes = self.of(rounds, "logical_blocks", "")? * BLOCK;
        Ok(bytes / self.seconds(rounds, "all", "max")? / 1e9)
    }

    /// Blocks asked about a second and engine, on the mean of all engines' time.
    ///
    /// # Errors
    /// When a figure is not there.
    pub fn requests_a_second(&self, rounds: Rounds) -> Result<f64> {
        let each = self.asked(rounds)? / self.get("/engines")?;
        Ok(each / self.seconds(rounds, "all", "mean")?)
    }

    /// Bytes over the network for each block asked about.
    ///
    /// # Errors
    /// When a figure is not there.
    pub fn bytes_a_block(&self) -> Result<f64> {
        let kinds = ["asking", "answering", "learning", "ending"];
        let bytes = kinds.iter().map(|kind| self.get(&format!("/network/{kind}")));
        Ok(bytes.sum::<Result<f64>>()? / self.asked(Rounds::All)?)
    }

    /// What was asked about over what is distinct.
    ///
    /// # Errors
    /// When a figure is not there.
    pub fn reduction(&self) -> Result<f64> {
        Ok(self.asked(Rounds::All)? / self.get("/distinct")?)
    }

    /// Everything that would make it inexact, counted.
    ///
    /// # Errors
    /// When a figure is not there.
    pub fn inexact(&self) -> Result<f64> {
        let difference = |a, b| Ok::<_, anyhow::Error>((self.get(a)? - self.get(b)?).abs());
        let counted = ["/doubles", "/wrong", "/undetected", "/index_duplicates"];
        let sum = counted.iter().map(|path| self.get(path)).sum::<Result<f64>>()?;
        Ok(sum + difference("/granted", "/distinct")? + difference("/entries", "/distinct")?)
    }
}

/// One of the model's constants.
pub struct Constant {
    /// What it is called in the formula.
    pub name: &'static str,
    /// What it is, and where it was measured.
    pub what: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// What was measured.
    pub value: f64,
}

/// One engine and one round of incremental backups at full size.
pub struct Model {
    constants: Vec<Constant>,
    /// Blocks of all VMs of an engine.
    pub logical: f64,
    /// Blocks that an engine asks about, and those of them that are new.
    pub asked: f64,
    /// New ones among them.
    pub new: f64,
    /// Entries of its index after all rounds.
    pub entries: f64,
}

/// Nanoseconds of a stage for each of some blocks of an engine.
fn per(run: &Run, stage: &str, blocks: f64) -> Result<f64> {
    Ok(run.seconds(Rounds::Later, stage, "mean")? * 1e9 / blocks)
}

impl Model {
    /// From a run of many engines and from costs on larger indexes.
    ///
    /// # Errors
    /// When a figure is not there.
    pub fn new(run: &Run, larger: &Value) -> Result<Self> {
        let engines = run.get("/engines")?;
        let rounds = run.get("/snapshots")? - 1.0;
        ensure!(rounds >= 1.0, "a model of later rounds needs some");
        let asked = run.asked(Rounds::Later)? / engines;
        let new = run.get("/granted_later")? / engines;
        let large = |name: &str| larger[name].as_f64().with_context(|| format!("no {name}"));
        let constant = |name, what, unit, value| Constant { name, what, unit, value };
        let mut constants = Vec::new();
        let stages = [
            ("ask", "splitting batches by owner, and encoding them"),
            ("send", "taking frames out of outboxes"),
            ("receive", "reading frames: questions, verdicts, what others learned"),
            ("settle", "sorting and reading a session's answers"),
        ];
        for (name, what) in stages {
            constants.push(constant(name, what, "ns a block asked", per(run, name, asked)?));
        }
        let again = run.get("/requests_later")? / run.asked(Rounds::Later)?;
        constants.extend([
            constant("again", "requests for a block asked", "", again),
            constant("log", "request logs, larger index", "ns a request", large("log_ns")?),
            constant(
                "pass",
                "sort, join, verdicts, larger index",
                "ns a request",
                large("pass_ns")?,
            ),
            constant("sweep", "larger index", "ns an entry", large("sweep_ns_per_entry")?),
            constant(
                "tell",
                "telling owners what is stored",
                "ns a new block",
                per(run, "tell", new)?,
            ),
            constant(
                "learn",
                "into the memtable, young runs",
                "ns a new block",
                large("learn_ns")?,
            ),
            constant("merge", "all merges, larger index", "ns a new block", large("merge_ns")?),
            constant(
                "sessions",
                "their beginnings and ends, which do not grow with blocks",
                "ms a round",
                run.seconds(Rounds::Later, "sessions", "mean")? * 1e3 / rounds,
            ),
            constant(
                "uneven",
                "busiest engine over mean",
                "",
                run.seconds(Rounds::Later, "all", "imbalance")?,
            ),
            constant("entry", "on disk, after merges", "bytes", large("bytes_per_entry_merging")?),
            constant(
                "wire",
                "both directions, TLS not counted",
                "bytes a block asked",
                run.bytes_a_block()?,
            ),
        ]);
        Ok(Model {
            constants,
            logical: run.get("/logical_blocks_later")? / engines / rounds * SCALE,
            asked: asked / rounds * SCALE,
            new: new / rounds * SCALE,
            entries: run.get("/distinct")? / engines * SCALE,
        })
    }

    /// All constants.
    #[must_use]
    pub fn constants(&self) -> &[Constant] {
        &self.constants
    }

    fn get(&self, name: &str) -> f64 {
        let found = self.constants.iter().find(|constant| constant.name == name);
        found.map_or(f64::NAN, |constant| constant.value)
    }

    /// Entries that the passes of a round step over: every pass over a partition all of it.
    #[must_use]
    pub fn swept(&self) -> f64 {
        self.asked * self.get("again") / PASS_REQUESTS * self.entries / PARTITIONS
    }

    /// Processor seconds of a round, of an engine that is as busy as the mean.
    #[must_use]
    pub fn processor(&self) -> f64 {
        let block =
            ["ask", "send", "receive", "settle"].iter().map(|name| self.get(name)).sum::<f64>();
        let request = self.get("again") * (self.get("log") + self.get("pass"));
        let new = self.get("tell") + self.get("learn") + self.get("merge");
        let nanoseconds =
            self.asked * (block + request) + self.swept() * self.get("sweep") + self.new * new;
        nanoseconds / 1e9 + self.get("sessions") / 1e3
    }

    /// The same of the busiest engine.
    #[must_use]
    pub fn busiest(&self) -> f64 {
        self.processor() * self.get("uneven")
    }

    /// GB a second of `engines` together, with one core each.
    #[must_use]
    pub fn throughput(&self, engines: f64) -> f64 {
        engines * self.logical * BLOCK / self.busiest() / 1e9
    }

    /// The part of one core that the busiest engine needs where each backs up so many bytes a second.
    #[must_use]
    pub fn of_a_core(&self, bytes_a_second: f64) -> f64 {
        self.busiest() / (self.logical * BLOCK / bytes_a_second)
    }

    /// Bytes of the index.
    #[must_use]
    pub fn index(&self) -> f64 {
        self.entries * self.get("entry")
    }

    /// Bytes that sweeps of a round read.
    #[must_use]
    pub fn read(&self) -> f64 {
        self.swept() * self.get("entry")
    }

    /// Bytes over an engine's network in a round, sent and received.
    #[must_use]
    pub fn network(&self) -> f64 {
        // What is sent is received by another one.
        2.0 * self.asked * self.get("wire")
    }
}
