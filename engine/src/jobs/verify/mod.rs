//! Verify: reads everything that a restore would need, and more, and says what is wrong.
//!
//! 1. Manifests and their copies; recipes, walking only what the snapshot before does not
//!    share; every reference is noted in a sorted run.
//! 2. Small objects: store header, claims, sessions, marks. Journals: free of gaps, and what
//!    they record.
//! 3. Containers, each once, in order: directory, frames, fingerprints computed afresh; in
//!    step with them the sorted references: each must name a sound slot.
//! 4. If there is damage: marks are written, and every snapshot that it touches is named.
//!
//! Memory is a few sort runs and one container's slots, whatever the store's size.

mod containers;
mod event;
mod journals;
mod manifests;
mod small;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use self::event::{Event, Report};

use self::containers::ContainerKey;
use crate::error::Result;
use crate::ids::{Address, ContainerId, Fingerprint, VmId};
use crate::jobs::affected::affected;
use crate::jobs::rebuild::Entries;
use crate::sort::Sorter;
use crate::store::Store;
use crate::store::commit::{Manifests, SnapshotKey};
use crate::store::damage::{DamageMap, Found, write_marks};

/// Memory of the sort of references: a run of the recipe each.
const SORT_BYTES: usize = 4 << 20;
/// Memory of the sort of container ids.
const IDS_BYTES: usize = 512 << 10;
/// Between two events that tell how far it is.
const PROGRESS: Duration = Duration::from_secs(1);
/// Ranges of damaged slots that wait to be marked, so that a container gets one mark.
const MAX_UNMARKED: usize = 256;

/// Lost journal entries that are remembered to the end; more than these are problems at once.
const LOST_ENTRIES: usize = 1024;

/// What is verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// The whole store.
    All,
    /// All snapshots of a VM.
    Vm(VmId),
    /// One snapshot.
    Snapshot(SnapshotKey),
}

/// What to verify and where to sort.
#[derive(Clone, Debug)]
pub struct Options {
    /// What.
    pub scope: Scope,
    /// For sort runs.
    pub scratch: PathBuf,
    /// The time for damage marks, Unix milliseconds.
    pub now_ms: i64,
}

/// Verifies. Everything that is wrong goes to `events` as it is found; `entries` gets every
/// sound block of every container of blocks that is read, in batches, to be compared with
/// the index. Damage is marked in the store.
///
/// # Errors
/// When the store cannot be read at all, or the first of the callbacks.
pub fn verify(
    store: &Store,
    options: &Options,
    events: &mut dyn FnMut(&Event) -> Result<()>,
    entries: &mut Entries<'_>,
) -> Result<Report> {
    let mut verifier = Verifier {
        store,
        manifests: Manifests::of(store, &options.scratch),
        damage: DamageMap::load(store.objects(), store.sealer())?,
        options,
        events,
        entries,
        report: Report::default(),
        references: Sorter::new(&options.scratch, SORT_BYTES),
        containers: Sorter::new(&options.scratch, IDS_BYTES),
        told: Instant::now(),
        unmarked: Vec::new(),
        lost_entries: Vec::new(),
        unrecorded: 0,
    };
    verifier.run()?;
    Ok(verifier.report)
}

struct Verifier<'v> {
    store: &'v Store,
    manifests: Manifests,
    /// What was known, and what is found.
    damage: DamageMap,
    options: &'v Options,
    events: &'v mut dyn FnMut(&Event) -> Result<()>,
    entries: &'v mut Entries<'v>,
    report: Report,
    references: Sorter<{ Reference::LEN }>,
    containers: Sorter<{ ContainerKey::LEN }>,
    told: Instant,
    /// Damage that is not durable yet.
    unmarked: Vec<Found>,
    /// Journal entries that cannot be read, and why.
    lost_entries: Vec<(String, String)>,
    /// Containers that are there and in no journal.
    unrecorded: u64,
}

/// A run of slots that a recipe names.
#[derive(Clone, Copy, Debug)]
struct Reference {
    first: Address,
    count: u16,
    /// A node, not blocks.
    node: bool,
}

impl Reference {
    /// Container 8, slot 2, count 2, kind 1.
    const LEN: usize = 13;

    fn to_record(self) -> [u8; Self::LEN] {
        let mut record = [0; Self::LEN];
        record[..8].copy_from_slice(&super::rebuild::id_bytes(self.first.container));
        record[8..10].copy_from_slice(&self.first.slot.0.to_be_bytes());
        record[10..12].copy_from_slice(&self.count.to_be_bytes());
        record[12] = u8::from(self.node);
        record
    }

    fn from_record(record: &[u8; Self::LEN]) -> Self {
        let [id @ .., s, t, m, n, node] = *record;
        let slot = crate::ids::Slot(u16::from_be_bytes([s, t]));
        let first = Address { container: super::rebuild::read_id(&id), slot };
        Reference { first, count: u16::from_be_bytes([m, n]), node: node == 1 }
    }
}

impl Verifier<'_> {
    fn run(&mut self) -> Result<()> {
        self.check_manifests()?;
        if self.options.scope == Scope::All {
            self.check_small()?;
            self.check_journals()?;
        }
        self.check_containers()?;
        self.name_lost_entries()?;
        self.write_marks()?;
        self.name_affected()?;
        self.report.damaged_slots = self.damage.slots();
        let report = self.report;
        self.tell(&Event::Summary(report))
    }

    fn tell(&mut self, event: &Event) -> Result<()> {
        (self.events)(event)
    }

    /// Something is wrong.
    fn problem(&mut self, what: &'static str, object: &str, message: &str) -> Result<()> {
        self.report.problems += 1;
        self.tell(&Event::Problem { what, object: object.into(), message: message.into() })
    }

    /// Tells how far it is, not too often.
    fn progress(&mut self, stage: &'static str, done: u64) -> Result<()> {
        if self.told.elapsed() < PROGRESS {
            return Ok(());
        }
        self.told = Instant::now();
        self.tell(&Event::Progress { stage, done })
    }

    /// Remembers damage, to be marked by [`write_marks`](Self::write_marks); what was known
    /// is not marked again.
    fn damaged(&mut self, container: ContainerId, first: u16, count: u16, how: &str) -> Result<()> {
        let found = Found { container, slots: (first, count), how: format!("verify: {how}") };
        if !self.damage.note(self.store.directories(), &found) {
            return Ok(());
        }
        match self.unmarked.last_mut() {
            Some(last) if last.container == container && last.slots.0 + last.slots.1 == first => {
                last.slots.1 += count;
            }
            _ => self.unmarked.push(found),
        }
        if self.unmarked.len() >= MAX_UNMARKED { self.write_marks() } else { Ok(()) }
    }

    fn write_marks(&mut self) -> Result<()> {
        write_marks(self.store, &self.unmarked, self.options.now_ms)?;
        self.unmarked.clear();
        Ok(())
    }

    /// Names the snapshots that damage touches. Costs nothing where there is none.
    fn name_affected(&mut self) -> Result<()> {
        if self.damage.is_empty() {
            return Ok(());
        }
        let mut list = self.snapshots()?;
        while let Some(key) = list.next()? {
            let Some(manifest) = self.committed(&key)? else { continue };
            let affected = affected(self.store, &self.damage, &manifest)?;
            let touched = !affected.is_empty();
            affected.into_iter().try_for_each(|one| self.tell(&Event::Affected(one)))?;
            self.report.affected_snapshots += u64::from(touched);
        }
        Ok(())
    }

    /// Hands on the sound blocks of a container.
    fn hand_on(&mut self, batch: &mut Vec<(Fingerprint, Address)>) -> Result<()> {
        if !batch.is_empty() {
            (self.entries)(batch)?;
            batch.clear();
        }
        Ok(())
    }

    /// Notes what a recipe refers to.
    fn refer(&mut self, first: Address, count: u16, node: bool) -> Result<()> {
        self.references.push(&Reference { first, count, node }.to_record())
    }
}
