//! What the parts of `ci/bench` share: how they are called, what a command costs, and how figures
//! become tables and files that a script can plot.
//!
//! A part is a binary `bench-PART`. It reads its [`Bench`] from the environment, measures, and
//! writes one [`Report`] (`PART.md`) and any number of [`Csv`] files (`PART-*.csv`).

pub mod blocks;
pub mod cgroup;
pub mod change;
pub mod cost;
pub mod csv;
pub mod detect;
pub mod machine;
pub mod nbd;
pub mod report;
pub mod scale;

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::Context;

use crate::Result;

pub use cgroup::Cgroup;
pub use cost::{Cost, measure};
pub use csv::Csv;
pub use report::{Report, Table, Target};

/// Runs of everything that is timed, unless `ci/bench --runs` says otherwise; the median counts.
const RUNS: usize = 3;

/// How a part was called.
pub struct Bench {
    /// Its name, the first part of its files' names.
    pub part: &'static str,
    /// The folder of guest images that `ci/bench` made (`FLEECE_BENCH_GUESTS`).
    pub guests: PathBuf,
    /// The folder that results go to (`FLEECE_BENCH_OUT`).
    pub out: PathBuf,
    /// Less of everything, to see that it works (`FLEECE_BENCH_QUICK`): such figures prove nothing.
    pub quick: bool,
    /// How often what is timed is run (`FLEECE_BENCH_RUNS`).
    runs: usize,
}

impl Bench {
    /// What `ci/bench` says in the environment; makes the folder of results.
    ///
    /// # Errors
    /// When a variable is missing.
    pub fn from_environment(part: &'static str) -> Result<Self> {
        let folder = |name: &str| {
            let path =
                env::var_os(name).with_context(|| format!("{name} is not set: call ci/bench"))?;
            Ok::<_, anyhow::Error>(PathBuf::from(path))
        };
        let out = folder("FLEECE_BENCH_OUT")?;
        fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
        let quick = env::var_os("FLEECE_BENCH_QUICK").is_some_and(|value| value == "1");
        let runs = match env::var("FLEECE_BENCH_RUNS") {
            Ok(runs) if !runs.is_empty() => {
                runs.parse().with_context(|| format!("{runs} is no number of runs"))?
            }
            _ if quick => 1,
            _ => RUNS,
        };
        Ok(Bench { part, guests: folder("FLEECE_BENCH_GUESTS")?, out, quick, runs })
    }

    /// How often what is timed is run.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// A new report of this part, with the machine and the date.
    ///
    /// # Errors
    /// When the machine cannot be described.
    pub fn report(&self, title: &str) -> Result<Report> {
        let mut report = Report::new(title);
        report.text(&machine::describe()?);
        if self.quick {
            report.text(
                "**A quick run: one run of each, small sizes. These figures prove nothing.**",
            );
        }
        Ok(report)
    }

    /// Writes the report as `PART.md`.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, report: &Report) -> Result {
        let path = self.out.join(format!("{}.md", self.part));
        fs::write(&path, report.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("{}: wrote {}", self.part, path.display());
        Ok(())
    }

    /// A new table of plain values, `PART-NAME.csv`.
    ///
    /// # Errors
    /// The system's.
    pub fn csv(&self, name: &str, columns: &[&str]) -> Result<Csv> {
        Csv::create(&self.out.join(format!("{}-{name}.csv", self.part)), columns)
    }

    /// Says what is being done, on standard error.
    pub fn step(&self, what: &str) {
        eprintln!("{}: {what}", self.part);
    }
}

/// The middle one; of an even number the mean of the two in the middle. 0 for none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// Bytes as MiB.
#[must_use]
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / crate::MIB as f64
}

/// MiB per second; 0 where no time passed.
#[must_use]
pub fn rate(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { mib(bytes) / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
    }
}
