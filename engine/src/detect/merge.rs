//! A merge of ascending entries in which the newest of equal fingerprints wins.

use std::ops::Bound;

use super::lookup::OpenRun;
use super::memtable::Entry;
use super::shard::Sweep;
use crate::error::Result;
use crate::ids::Fingerprint;

/// One input with its first entry.
struct Input<'r> {
    head: Option<Entry>,
    rest: Source<'r>,
}

enum Source<'r> {
    Memory(&'r [Entry]),
    Run(Sweep<'r>),
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
        runs: &'r [OpenRun],
        first: Bound<Fingerprint>,
        last: Fingerprint,
    ) -> Result<Self> {
        let mut inputs = Vec::with_capacity(runs.len() + 1);
        if !memtable.is_empty() {
            inputs.push(Input { head: None, rest: Source::Memory(memtable) });
        }
        for run in runs {
            let rest = Source::Run(run.reader.sweep(first, last)?);
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
                && best.is_none_or(|(fingerprint, _)| head.0 < fingerprint)
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
