//! An external sorter of fixed-width records: bounded memory, sequential disk access.
//!
//! Records are compared as whole byte strings, so callers encode keys big endian and
//! first. Runs live in unlinked files: a kill leaves nothing behind.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};

/// Runs that one merge reads at most, however much memory there is: more would only
/// make every read of a run shorter.
const MAX_FAN_IN: usize = 128;
/// Bytes that a merge reads of a run at a time, where the memory allows it: far above
/// the cost of one read call.
const MERGE_READ: usize = 64 * 1024;
/// Bytes below which a merge never goes per run, however small the memory is.
const MIN_MERGE_READ: usize = 4 * 1024;

/// Takes records in any order.
pub struct Sorter<const N: usize> {
    dir: PathBuf,
    run_bytes: usize,
    records: Vec<[u8; N]>,
    spilled: Option<Spill>,
    count: u64,
}

/// Gives the records in ascending order, equal ones as often as they were pushed.
pub struct Sorted<const N: usize> {
    source: Source<N>,
    count: u64,
}

enum Source<const N: usize> {
    Memory(std::vec::IntoIter<[u8; N]>),
    Merge(Merge<N>),
}

/// The leading bits of a record as a number, which compares faster than bytes.
#[inline]
fn lead<const N: usize>(record: &[u8; N]) -> u64 {
    record.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// The order of whole byte strings; most records differ in their leading bits.
#[inline]
fn compare<const N: usize>(a: &[u8; N], b: &[u8; N]) -> Ordering {
    lead(a).cmp(&lead(b)).then_with(|| a.cmp(b))
}

/// Sorted runs, one behind the other in an unlinked file.
struct Spill {
    file: File,
    /// Where each run ends, in bytes.
    ends: Vec<u64>,
}

impl<const N: usize> Sorter<N> {
    /// Sorts in about `run_bytes` of memory; what is beyond is spilled into `dir`,
    /// which is not touched before that.
    pub fn new(dir: &Path, run_bytes: usize) -> Self {
        const { assert!(N > 0) };
        Sorter { dir: dir.into(), run_bytes, records: Vec::new(), spilled: None, count: 0 }
    }

    /// Adds a record.
    pub fn push(&mut self, record: &[u8; N]) -> Result<()> {
        if self.records.len() >= (self.run_bytes / N).max(1) {
            self.spill()?;
        }
        self.records.push(*record);
        self.count += 1;
        Ok(())
    }

    /// Records pushed so far.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether nothing was pushed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Ends the input.
    pub fn finish(mut self) -> Result<Sorted<N>> {
        let count = self.count;
        if self.spilled.is_none() {
            self.records.sort_unstable_by(compare);
            return Ok(Sorted { source: Source::Memory(self.records.into_iter()), count });
        }
        if !self.records.is_empty() {
            self.spill()?;
        }
        // The records' memory now serves the merge.
        drop(std::mem::take(&mut self.records));
        let Some(mut spill) = self.spilled.take() else {
            return Ok(Sorted { source: Source::Memory(Vec::new().into_iter()), count });
        };
        let fan_in = (self.run_bytes / MERGE_READ).clamp(2, MAX_FAN_IN);
        while spill.ends.len() > fan_in {
            spill = self.merge_level(spill, fan_in)?;
        }
        let merge = Merge::new(spill, usize::MAX, 0, self.run_bytes)?;
        Ok(Sorted { source: Source::Merge(merge), count })
    }

    /// Sorts what is in memory and appends it as a run.
    fn spill(&mut self) -> Result<()> {
        self.records.sort_unstable_by(compare);
        let mut spill = match self.spilled.take() {
            Some(spill) => spill,
            None => Spill::create(&self.dir)?,
        };
        spill
            .file
            .write_all(self.records.as_flattened())
            .context(|| format!("cannot write a sort run in {}", self.dir.display()))?;
        spill.ends.push(spill.end() + self.records.as_flattened().len() as u64);
        self.spilled = Some(spill);
        self.records.clear();
        Ok(())
    }

    /// Merges every `fan_in` runs into one.
    fn merge_level(&self, mut spill: Spill, fan_in: usize) -> Result<Spill> {
        let mut out = Spill::create(&self.dir)?;
        let runs = spill.ends.len();
        let mut buffer: Vec<u8> = Vec::with_capacity(MERGE_READ);
        for first in (0..runs).step_by(fan_in) {
            let mut merge = Merge::<N>::new(spill, fan_in, first, self.run_bytes)?;
            let mut end = out.end();
            while let Some(record) = merge.next()? {
                buffer.extend_from_slice(&record);
                end += N as u64;
                if buffer.len() + N > MERGE_READ {
                    out.write(&mut buffer, &self.dir)?;
                }
            }
            out.write(&mut buffer, &self.dir)?;
            out.ends.push(end);
            spill = merge.spill;
        }
        Ok(out)
    }
}

impl Spill {
    fn create(dir: &Path) -> Result<Spill> {
        let file = tempfile::tempfile_in(dir)
            .context(|| format!("cannot create a sort file in {}", dir.display()))?;
        Ok(Spill { file, ends: Vec::new() })
    }

    fn end(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    fn write(&mut self, buffer: &mut Vec<u8>, dir: &Path) -> Result<()> {
        self.file
            .write_all(buffer)
            .context(|| format!("cannot write a merged run in {}", dir.display()))?;
        buffer.clear();
        Ok(())
    }
}

/// A merge of some consecutive runs.
struct Merge<const N: usize> {
    spill: Spill,
    runs: Vec<RunReader<N>>,
    /// The next record of each run, behind its leading bits.
    heads: BinaryHeap<Reverse<(u64, [u8; N], usize)>>,
}

impl<const N: usize> Merge<N> {
    fn new(spill: Spill, fan_in: usize, first: usize, memory: usize) -> Result<Self> {
        let count = fan_in.min(spill.ends.len().saturating_sub(first));
        let each = (memory / count.max(1)).clamp(MIN_MERGE_READ, MERGE_READ);
        let mut runs = Vec::with_capacity(count);
        let mut start = if first == 0 { 0 } else { spill.ends[first - 1] };
        for &end in spill.ends.iter().skip(first).take(count) {
            runs.push(RunReader {
                at: start,
                end,
                read: (each / N).max(1),
                buffer: Vec::new(),
                next: 0,
            });
            start = end;
        }
        let mut heads = BinaryHeap::with_capacity(count);
        for (i, run) in runs.iter_mut().enumerate() {
            if let Some(record) = run.next(&spill.file)? {
                heads.push(Reverse((lead(&record), record, i)));
            }
        }
        Ok(Merge { spill, runs, heads })
    }

    fn next(&mut self) -> Result<Option<[u8; N]>> {
        let Some(mut head) = self.heads.peek_mut() else { return Ok(None) };
        let Reverse((_, record, run)) = *head;
        match self.runs[run].next(&self.spill.file)? {
            Some(following) => *head = Reverse((lead(&following), following, run)),
            None => drop(PeekMut::pop(head)),
        }
        Ok(Some(record))
    }
}

/// Reads one run piece by piece.
struct RunReader<const N: usize> {
    at: u64,
    end: u64,
    /// Records to read at a time.
    read: usize,
    buffer: Vec<[u8; N]>,
    next: usize,
}

impl<const N: usize> RunReader<N> {
    fn next(&mut self, file: &File) -> Result<Option<[u8; N]>> {
        if self.next == self.buffer.len() {
            let left = ((self.end - self.at) / N as u64).min(self.read as u64) as usize;
            if left == 0 {
                return Ok(None);
            }
            self.buffer.resize(left, [0; N]);
            file.read_exact_at(self.buffer.as_flattened_mut(), self.at)
                .context(|| format!("cannot read a sort run at {}", self.at))?;
            self.at += (left * N) as u64;
            self.next = 0;
        }
        self.next += 1;
        Ok(Some(self.buffer[self.next - 1]))
    }
}

impl<const N: usize> Sorted<N> {
    /// The next record.
    #[allow(clippy::should_implement_trait)] // It can fail.
    pub fn next(&mut self) -> Result<Option<[u8; N]>> {
        match &mut self.source {
            Source::Memory(records) => Ok(records.next()),
            Source::Merge(merge) => merge.next(),
        }
    }

    /// Records that there were in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether there were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn check<const N: usize>(count: usize, run_bytes: usize, seed: u64) {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let mut sorter = Sorter::<N>::new(dir.path(), run_bytes);
        let mut model = Vec::new();
        for _ in 0..count {
            let mut record = [0_u8; N];
            rng.fill(&mut record[..]);
            record[0] &= 3; // Equal records happen.
            sorter.push(&record).unwrap();
            model.push(record);
        }
        model.sort_unstable();
        let mut sorted = sorter.finish().unwrap();
        assert_eq!(sorted.len(), count as u64);
        for (i, record) in model.iter().enumerate() {
            assert_eq!(sorted.next().unwrap().as_ref(), Some(record), "record {i}, seed {seed}");
        }
        assert_eq!(sorted.next().unwrap(), None);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "runs are unlinked");
    }

    #[test]
    fn sorts_in_memory_in_one_merge_and_in_several_levels() {
        check::<1>(0, 1 << 20, 1);
        check::<1>(1000, 64, 2);
        check::<32>(1000, 1 << 20, 3);
        check::<32>(50_000, 256 * 1024, 4);
        check::<20>(50_000, 10_000, 5); // 100 runs, fan-in 2: seven levels.
        check::<32>(257, 1, 6); // Every record a run of its own.
    }
}
