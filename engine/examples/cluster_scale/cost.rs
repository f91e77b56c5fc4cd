//! What things cost: processor time by stage, memory, disk.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Processor time of this process, its helper threads included: runs above 4 MiB are swept by one.
pub(crate) fn processor() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What reading the clock takes: a system call, which small frames would otherwise pay for. The least of
/// many, so that never too much is taken off.
static READING: LazyLock<Duration> = LazyLock::new(|| {
    let mut least = Duration::MAX;
    for _ in 0..10_000 {
        let begun = processor();
        least = least.min(processor().saturating_sub(begun));
    }
    least
});

/// What an engine does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// A session's batch is split by owners and goes into their outboxes.
    Ask,
    /// Frames are taken out of the outboxes.
    Send,
    /// Frames of others are read: questions, verdicts, what they learned.
    Receive,
    /// Questions go into the logs of their partitions.
    Log,
    /// Passes, with the verdicts put into outboxes and sheets.
    Pass,
    /// A session's sheet is sorted and read.
    Settle,
    /// What is stored is split by owners and told to them.
    Tell,
    /// What was stored enters the index.
    Learn,
    /// Runs are merged.
    Merge,
    /// Sessions begin, wait and end.
    Sessions,
}

const STAGES: usize = 10;

impl Stage {
    pub(crate) const ALL: [Stage; STAGES] = [
        Stage::Ask,
        Stage::Send,
        Stage::Receive,
        Stage::Log,
        Stage::Pass,
        Stage::Settle,
        Stage::Tell,
        Stage::Learn,
        Stage::Merge,
        Stage::Sessions,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Stage::Ask => "ask",
            Stage::Send => "send",
            Stage::Receive => "receive",
            Stage::Log => "log",
            Stage::Pass => "pass",
            Stage::Settle => "settle",
            Stage::Tell => "tell",
            Stage::Learn => "learn",
            Stage::Merge => "merge",
            Stage::Sessions => "sessions",
        }
    }
}

/// Processor time of an engine, by stage.
#[derive(Clone, Copy, Default)]
pub(crate) struct Costs([Duration; STAGES]);

impl Costs {
    /// What a stage took since then, if any ran, less what reading the clock takes; gives the time.
    pub(crate) fn until_now(&mut self, stage: Option<Stage>, begun: Duration) -> Duration {
        let now = processor();
        if let Some(stage) = stage {
            self.0[stage as usize] += now.saturating_sub(begun + *READING);
        }
        now
    }

    /// Runs something that belongs to a stage.
    pub(crate) fn of<T>(&mut self, stage: Stage, run: impl FnOnce() -> T) -> T {
        let begun = processor();
        let done = run();
        self.until_now(Some(stage), begun);
        done
    }

    pub(crate) fn get(&self, stage: Stage) -> f64 {
        self.0[stage as usize].as_secs_f64()
    }

    pub(crate) fn sum(&self) -> f64 {
        self.0.iter().sum::<Duration>().as_secs_f64()
    }

    pub(crate) fn with(&self, other: &Costs) -> Costs {
        let mut both = *self;
        both.0.iter_mut().zip(other.0).for_each(|(time, others)| *time += others);
        both
    }
}

/// What is there of something on each of many engines.
pub(crate) fn spread(values: &[f64]) -> Value {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let most = values.iter().copied().fold(0.0, f64::max);
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    json!({"mean": mean, "max": most, "min": least, "imbalance": most / mean})
}

/// The costs of engines, all and by stage.
pub(crate) fn costs(engines: &[Costs]) -> Value {
    let all: Vec<f64> = engines.iter().map(Costs::sum).collect();
    let mut value = json!({"all": spread(&all)});
    for stage in Stage::ALL {
        let each: Vec<f64> = engines.iter().map(|costs| costs.get(stage)).collect();
        value[stage.name()] = spread(&each);
    }
    value
}

/// Bytes of the files below a folder.
pub(crate) fn files(folder: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.metadata()?;
        bytes += if kind.is_dir() { files(&entry.path())? } else { kind.len() };
    }
    Ok(bytes)
}
