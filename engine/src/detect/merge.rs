//! A merge of ascending entries in which the newest of equal fingerprints wins.

use std::ops::Bound;

use super::lookup::OpenRun;
use super::memtable::{Entry, Lead};
use super::sweep::Sweep;
use crate::error::Result;
use crate::ids::Fingerprint;

/// One input with its first entry.
struct Input<'r> {
    head: Option<Entry>,
    rest: Source<'r>,
}

enum Source<'r> {
    Memory(&'r [Entry]),
    Run(Sweep),
}

/// Entries of a memtable and of runs.
pub(super) struct Merge<'r> {
    /// Newest first.
    inputs: Vec<Input<'r>>,
    duplicates: u64,
}

impl<'r> Merge<'r> {
    /// Over `memtable` and `runs`, newest first, from `first` (or behind it) to `last`.
    pub(super) fn new(
        memtable: &'r [Entry],
        runs: Vec<OpenRun>,
        first: Bound<Fingerprint>,
        last: Fingerprint,
    ) -> Result<Self> {
        let mut inputs = Vec::with_capacity(runs.len() + 1);
        let memtable = from(memtable, first);
        if !memtable.is_empty() {
            inputs.push(Input { head: None, rest: Source::Memory(memtable) });
        }
        for run in runs {
            let rest = Source::Run(Sweep::begin(run.reader, first, last)?);
            inputs.push(Input { head: None, rest });
        }
        for input in &mut inputs {
            input.advance()?;
        }
        inputs.retain(|input| input.head.is_some());
        Ok(Merge { inputs, duplicates: 0 })
    }

    /// The next entry. Linear in the inputs, which are a base and a dozen others at most.
    #[allow(clippy::should_implement_trait)] // It can fail.
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        let mut best: Option<Entry> = None;
        for input in &self.inputs {
            if let Some(head) = input.head
                && best.is_none_or(|(fingerprint, _)| head.0.is_before(&fingerprint))
            {
                best = Some(head);
            }
        }
        let Some(best) = best else { return Ok(None) };
        let mut ended = false;
        for input in &mut self.inputs {
            if let Some((fingerprint, address)) = input.head
                && fingerprint == best.0
            {
                self.duplicates += u64::from(address != best.1);
                input.advance()?;
                ended |= input.head.is_none();
            }
        }
        if ended {
            self.inputs.retain(|input| input.head.is_some());
        }
        Ok(Some(best))
    }

    /// The next entries, at most `limit`.
    pub(super) fn take(&mut self, limit: usize) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        while entries.len() < limit
            && let Some(entry) = self.next()?
        {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// Fingerprints seen so far that had an older entry with another address.
    pub(super) fn duplicates(&self) -> u64 {
        self.duplicates
    }
}

impl Input<'_> {
    fn advance(&mut self) -> Result<()> {
        self.head = match &mut self.rest {
            Source::Memory(entries) => match entries.split_first() {
                Some((first, rest)) => {
                    *entries = rest;
                    Some(*first)
                }
                None => None,
            },
            Source::Run(entries) => entries.next()?,
        };
        Ok(())
    }
}

/// The part of sorted entries that begins at or behind `first`.
fn from(entries: &[Entry], first: Bound<Fingerprint>) -> &[Entry] {
    let start = entries.partition_point(|(fingerprint, _)| match first {
        Bound::Included(first) => *fingerprint < first,
        Bound::Excluded(first) => *fingerprint <= first,
        Bound::Unbounded => false,
    });
    entries.get(start..).unwrap_or(&[])
}
