//! Merges: young runs into deltas, deltas into one another and into bases, one bounded step at a
//! time between passes.

use std::fs;
use std::ops::Bound;
use std::path::Path;

use super::Partition;
use super::current::{Level, RunMeta, range_of, run_path};
use super::duplicates::Duplicates;
use super::index::Index;
use super::merge::Merge;
use super::shard::RunWriter;
use crate::error::Result;
use crate::ids::Fingerprint;

/// A merge under way. It holds no reader between its steps, so that passes can open the same runs.
pub(super) struct Work {
    /// The run being written.
    goal: Level,
    /// The partition of the last run that is written.
    last: Partition,
    /// Numbers of the runs that are merged, ascending.
    inputs: Vec<u64>,
    output: Option<Output>,
    /// Runs that are written but that CURRENT does not name yet.
    done: Vec<RunMeta>,
    /// Second addresses met so far.
    duplicates: Duplicates,
}

struct Output {
    number: u64,
    writer: RunWriter,
    /// The last fingerprint written.
    after: Option<Fingerprint>,
}

impl Work {
    fn new(goal: Level, last: Partition, inputs: Vec<u64>) -> Self {
        let (output, done, duplicates) = (None, Vec::new(), Duplicates::default());
        Work { goal, last, inputs, output, done, duplicates }
    }

    /// Gives the merge up and removes what it wrote.
    pub(super) fn abandon(self, dir: &Path) {
        if let Some(output) = self.output {
            output.writer.discard();
        }
        for run in self.done {
            // A leftover is swept at the next opening.
            let _ = fs::remove_file(run.path(dir));
        }
    }
}

fn entries(runs: &[&RunMeta]) -> u64 {
    runs.iter().map(|run| run.entries).sum()
}

/// Ascending.
fn numbers(runs: &[&RunMeta]) -> Vec<u64> {
    let mut numbers: Vec<u64> = runs.iter().map(|run| run.number).collect();
    numbers.sort_unstable();
    numbers
}

/// The newest deltas, at least two, as far as none is more than twice as large as all that are newer:
/// so an entry moves a few times before it reaches the base, and not with every young run, as in a
/// log-structured merge tree (O'Neil et al., 1996). Only the newest, as the newest entry must win.
fn light<'r, 'm>(deltas: &'r [&'m RunMeta]) -> &'r [&'m RunMeta] {
    let (mut count, mut newer) = (0, 0_u64);
    for run in deltas.iter().rev() {
        if count >= 2 && run.entries > 2 * newer {
            break;
        }
        count += 1;
        newer += run.entries;
    }
    deltas.get(deltas.len() - count..).unwrap_or_default()
}

impl Index {
    /// One step of the most useful merge. False: there is none.
    pub(super) fn maintain(&mut self) -> Result<bool> {
        if self.is_rebuilding() {
            return Ok(false);
        }
        let planned = self.work.take().or_else(|| self.plan());
        self.go_on(planned)
    }

    /// One step on the way to an index without young runs. False: there are none.
    pub(super) fn part_young(&mut self) -> Result<bool> {
        let planned = self.work.take().or_else(|| self.young());
        self.go_on(planned)
    }

    fn go_on(&mut self, planned: Option<Work>) -> Result<bool> {
        let Some(mut work) = planned else { return Ok(false) };
        match self.step(&mut work) {
            Ok(true) => self.work = Some(work),
            Ok(false) => {}
            Err(error) => {
                work.abandon(&self.dir);
                return Err(error);
            }
        }
        Ok(true)
    }

    fn plan(&self) -> Option<Work> {
        if self.runs_of(Level::Young).len() >= self.options.young_runs.max(1) {
            return self.young();
        }
        for partition in (0..self.options.partitions()).map(Partition) {
            let deltas = self.runs_of(Level::Delta(partition));
            let mut base = self.runs_of(Level::Base(partition));
            let heavy = entries(&deltas).saturating_mul(self.options.delta_fraction);
            if heavy > entries(&base) {
                base.extend(deltas);
                return Some(Work::new(Level::Base(partition), partition, numbers(&base)));
            }
            if deltas.len() > self.options.delta_runs.max(1) {
                let light = light(&deltas);
                return Some(Work::new(Level::Delta(partition), partition, numbers(light)));
            }
        }
        None
    }

    /// Of all young runs a delta for each partition.
    fn young(&self) -> Option<Work> {
        let young = self.runs_of(Level::Young);
        let last = Partition(self.options.partitions().saturating_sub(1));
        let work = || Work::new(Level::Delta(Partition(0)), last, numbers(&young));
        (!young.is_empty()).then(work)
    }

    /// Oldest first.
    fn runs_of(&self, level: Level) -> Vec<&RunMeta> {
        self.current.runs.iter().filter(|run| run.level == level).collect()
    }

    /// Moves some entries; true while the work goes on.
    fn step(&mut self, work: &mut Work) -> Result<bool> {
        let (Level::Delta(partition) | Level::Base(partition)) = work.goal else {
            return Ok(false);
        };
        let range = range_of(partition, self.options.partition_bits);
        let inputs = &work.inputs;
        let runs = self.open_runs(partition, |run| inputs.binary_search(&run.number).is_ok())?;
        let output = match &mut work.output {
            Some(output) => output,
            none => {
                let entries = runs.iter().map(|run| run.entries_at_most).sum();
                let number = self.new_number();
                let path = run_path(&self.dir, number);
                let writer = RunWriter::create(path, entries, self.options.txn_entries)?;
                none.insert(Output { number, writer, after: None })
            }
        };
        let first = output.after.map_or(Bound::Included(range.0), Bound::Excluded);
        let mut merge = Merge::new(&[], runs, first, range.1)?;
        let after = &mut output.after;
        let more = output.writer.append(self.options.step_entries.max(1), || {
            let entry = merge.next()?;
            *after = entry.map(|(fingerprint, _)| fingerprint).or(*after);
            Ok(entry)
        })?;
        work.duplicates.add(partition, merge.duplicates());
        if more {
            output.writer.sync()?;
            return Ok(true);
        }
        drop(merge);
        self.end_output(work)
    }

    /// The run is complete: goes on with the next partition, or makes all of it the index.
    fn end_output(&mut self, work: &mut Work) -> Result<bool> {
        if let Some(Output { number, writer, .. }) = work.output.take() {
            if writer.entries() == 0 {
                writer.discard();
            } else {
                let watermark = self.current.watermark.clone();
                work.done.push(self.finish_run(writer, number, work.goal, &watermark)?);
            }
        }
        if let Level::Delta(Partition(partition)) = work.goal
            && partition < work.last.0
        {
            work.goal = Level::Delta(Partition(partition + 1));
            return Ok(true);
        }
        let mut next = self.current.clone();
        next.duplicates.add_all(&work.duplicates);
        next.runs.retain(|run| work.inputs.binary_search(&run.number).is_err());
        next.runs.extend(work.done.iter().cloned());
        self.replace(next)?;
        work.done.clear();
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of deltas with so many entries, oldest first, are merged.
    fn merged(entries: &[u64]) -> usize {
        let level = Level::Delta(Partition(0));
        let run = |(i, &entries)| RunMeta { number: i as u64, level, entries, bytes: 0, crc: 0 };
        let runs: Vec<RunMeta> = entries.iter().enumerate().map(run).collect();
        let deltas: Vec<&RunMeta> = runs.iter().collect();
        let light = light(&deltas);
        assert!(
            light
                .iter()
                .map(|run| run.number)
                .eq((entries.len() - light.len()) as u64..entries.len() as u64)
        );
        light.len()
    }

    #[test]
    fn the_newest_deltas_are_merged_until_one_is_heavy() {
        assert_eq!(merged(&[5, 5, 5, 5, 5]), 5);
        assert_eq!(merged(&[9, 1, 1, 1, 1]), 4);
        assert_eq!(merged(&[8, 1, 1, 1, 1]), 5);
        assert_eq!(merged(&[16, 4, 1, 1, 1]), 4);
        // Two at least, so that there are fewer afterwards.
        assert_eq!(merged(&[1000, 100, 1]), 2);
        assert_eq!(merged(&[100, 1, 100, 1]), 4);
        assert_eq!(merged(&[0, 0, 0]), 3);
    }
}
