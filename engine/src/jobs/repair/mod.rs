//! Repair: puts good copies in the place of what is marked as damaged.
//!
//! 1. Manifests: one of the two copies is missing and the other is sound: it is made again.
//!    Claims and journals: what they lack is told from the objects that are there.
//! 2. Plan: each marked container is read as far as it can be (one that is gone has the second
//!    copy of its directory); of every slot that is lost the fingerprint is looked for in the
//!    directories of all other containers.
//! 3. Execute: the container is rewritten as its next generation, with the good copies in
//!    their old slots: recipes stay as they are, and so do all older objects. A mark takes
//!    the older marks back.
//! 4. What is left is named: snapshots, disks, ranges.
//!
//! It works on what is marked; `verify` marks what it finds. Memory is one container's
//! slots and [`WANTED`] fingerprints.

mod container;
mod copies;
mod journals;
mod manifests;
#[cfg(test)]
mod tests;

use serde::Serialize;

use self::container::{Examined, examine};
use self::copies::Copies;
use super::Options;
use super::affected::{Affected, affected};
use crate::error::Result;
use crate::ids::{Address, ContainerId, Fingerprint};
use crate::store::Store;
use crate::store::commit::Manifests;
use crate::store::damage::{ALL, DamageMap};
use crate::store::journal::Position;
use crate::store::manifest::Record;

/// Fingerprints that are looked for in one sweep over all directories: about 4 MiB.
const WANTED: usize = 65_536;

/// What repair says as it goes, one JSON object a line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "message_type", rename_all = "snake_case")]
pub enum Event {
    /// What was found out about an object, and what is to be done.
    Plan {
        /// The object.
        object: String,
        /// Slots that a good copy was found of.
        copies: u64,
        /// Slots that there is no good copy of.
        lost: u64,
        /// In words.
        message: String,
    },
    /// An object was repaired.
    Repaired {
        /// The object.
        object: String,
        /// In words.
        message: String,
    },
    /// A snapshot's disk that still cannot be restored whole.
    Affected(Affected),
    /// The end.
    Summary(Report),
}

/// What repair came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Report {
    /// Containers that have marks.
    pub marked_containers: u64,
    /// Containers that were rewritten, or would be.
    pub rewritten_containers: u64,
    /// Containers that were whole again without that.
    pub whole_containers: u64,
    /// Slots that hold a good copy now, or would.
    pub repaired_slots: u64,
    /// Slots that there is no good copy of.
    pub lost_slots: u64,
    /// Manifests or their copies that were made again, or would be.
    pub repaired_manifests: u64,
    /// Manifests that cannot be read from either copy.
    pub lost_manifests: u64,
    /// Snapshots that still cannot be restored whole.
    pub affected_snapshots: u64,
}

impl Report {
    /// Whether every snapshot can be restored whole.
    #[must_use]
    pub fn whole(&self) -> bool {
        self.affected_snapshots == 0 && self.lost_manifests == 0
    }
}

/// Takes what a rewrite was recorded as, with the blocks that it put back.
pub type Recorded<'r> = dyn FnMut(Position, Vec<(Fingerprint, Address)>) -> Result<()> + 'r;

/// Repairs what is marked. A crash at any point leaves objects too many, never too few.
///
/// # Errors
/// When the store cannot be read or written, or the first of the callbacks.
pub fn repair(
    store: &Store,
    options: &Options,
    events: &mut dyn FnMut(&Event) -> Result<()>,
    recorded: &mut Recorded<'_>,
) -> Result<Report> {
    let mut repairer = Repairer {
        store,
        manifests: Manifests::of(store, &options.scratch),
        damage: DamageMap::load(store.objects(), store.sealer())?,
        options,
        events,
        recorded,
        report: Report::default(),
    };
    repairer.repair_manifests()?;
    repairer.repair_journals()?;
    repairer.repair_containers()?;
    repairer.name_affected()?;
    let report = repairer.report;
    repairer.tell(&Event::Summary(report))?;
    Ok(report)
}

struct Repairer<'r> {
    store: &'r Store,
    manifests: Manifests,
    /// What is still damaged; in a dry run, what would be.
    damage: DamageMap,
    options: &'r Options,
    events: &'r mut dyn FnMut(&Event) -> Result<()>,
    recorded: &'r mut Recorded<'r>,
    report: Report,
}

impl Repairer<'_> {
    fn tell(&mut self, event: &Event) -> Result<()> {
        (self.events)(event)
    }

    fn repaired(&mut self, object: &str, message: &str) -> Result<()> {
        self.tell(&Event::Repaired { object: object.into(), message: message.into() })
    }

    /// All marked containers, as many at a time as their lost slots can be looked for together.
    fn repair_containers(&mut self) -> Result<()> {
        let marked: Vec<ContainerId> = self.damage.containers().collect();
        self.report.marked_containers = marked.len() as u64;
        let (mut group, mut copies) = (Vec::new(), Copies::default());
        for container in marked {
            // What the engine has in its caches says nothing about the store.
            self.store.directories().forget(container);
            let Some(examined) = examine(self.store, container)? else {
                self.lost_container(container)?;
                continue;
            };
            examined
                .wanted()
                .for_each(|(_, fingerprint)| copies.want(examined.kind(), fingerprint));
            group.push(container);
            if copies.len() >= WANTED {
                self.repair_group(&mut group, &mut copies)?;
            }
        }
        self.repair_group(&mut group, &mut copies)
    }

    /// A container that cannot be opened at all.
    fn lost_container(&mut self, container: ContainerId) -> Result<()> {
        let object = format!("container {container}");
        let message = "it is missing, or its end is damaged, and so is the second copy of its \
                       directory: what its slots held is not known. \
                       The next backup of each affected VM reads these ranges again, so that new \
                       snapshots are whole; restore --damaged=zero rescues the rest of old ones";
        self.tell(&Event::Plan { object, copies: 0, lost: 0, message: message.into() })
    }

    fn repair_group(&mut self, group: &mut Vec<ContainerId>, copies: &mut Copies) -> Result<()> {
        if group.is_empty() {
            return Ok(());
        }
        copies.find(self.store, &self.damage)?;
        for container in group.drain(..) {
            // Read again, so that only one container's slots are in memory.
            if let Some(examined) = examine(self.store, container)? {
                self.repair_container(&examined, copies)?;
            }
        }
        *copies = Copies::default();
        Ok(())
    }

    fn repair_container(&mut self, examined: &Examined, copies: &mut Copies) -> Result<()> {
        let found = examined
            .wanted()
            .filter(|(_, fingerprint)| copies.get(examined.kind(), *fingerprint).is_some())
            .count() as u64;
        let lost = examined.bad().count() as u64 - found;
        let message = match (examined.is_whole(), found, lost) {
            (true, ..) => "it is whole: its marks are taken back",
            (_, 0, 1..) if !examined.is_worth_it() => {
                "no good copy is in the store; the next backup of each affected VM stores anew \
                 what its disks still hold, then repair finds that"
            }
            _ => "it is rewritten with every good copy in its old slot",
        };
        let object = format!("container {}", examined.container);
        self.tell(&Event::Plan { object, copies: found, lost, message: message.into() })?;
        self.report.lost_slots += lost;
        if examined.is_whole() {
            self.report.whole_containers += 1;
            return self.take_back(examined, examined.generation(), &examined.bad_slots(), "whole");
        }
        if found == 0 && !examined.is_worth_it() {
            return Ok(());
        }
        self.rewrite(examined, copies, found)
    }

    fn rewrite(&mut self, examined: &Examined, copies: &mut Copies, found: u64) -> Result<()> {
        self.report.rewritten_containers += 1;
        if self.options.dry_run {
            self.report.repaired_slots += found;
            let hopeless = examined.bad().filter(|(_, fingerprint)| {
                fingerprint.is_none_or(|f| copies.get(examined.kind(), f).is_none())
            });
            let hopeless: Vec<_> = hopeless.map(|(slot, _)| slot).collect();
            return self.take_back(examined, examined.next_generation(), &hopeless, "");
        }
        let rewritten = examined.rewrite(self.store, copies)?;
        self.report.repaired_slots += rewritten.put_back.len() as u64;
        self.report.lost_slots += found - rewritten.put_back.len() as u64;
        (self.recorded)(rewritten.position, rewritten.indexed(examined))?;
        let how = "rewritten with good copies";
        self.take_back(examined, rewritten.generation, &rewritten.still_bad, how)?;
        let message = format!(
            "rewritten as generation {}: {} slots hold good copies again, {} are lost",
            rewritten.generation,
            rewritten.put_back.len(),
            rewritten.still_bad.len()
        );
        self.repaired(&format!("container {}", examined.container), &message)
    }

    /// Everything of a container but these slots is whole in a generation.
    fn take_back(
        &mut self,
        examined: &Examined,
        generation: u32,
        bad: &[crate::ids::Slot],
        how: &str,
    ) -> Result<()> {
        let container = examined.container;
        let whole = crate::store::damage::all_but(bad.iter().copied());
        if self.options.dry_run {
            whole.iter().for_each(|(first, count)| self.damage.heal(container, *first, *count));
            return Ok(());
        }
        // First what is bad, then what is whole: a crash between the two loses no mark.
        let found: Vec<_> = bad
            .iter()
            .map(|slot| crate::store::damage::Found {
                container,
                slots: (slot.0, 1),
                how: "repair: no good copy".into(),
            })
            .collect();
        self.damage.record(self.store, &found, self.options.now_ms)?;
        let now = self.options.now_ms;
        let how = format!("repair: {how}");
        self.damage.take_back(self.store, container, generation, whole, now, &how)
    }

    /// Names the snapshots that damage still touches.
    fn name_affected(&mut self) -> Result<()> {
        for vm in self.manifests.vms()? {
            let mut list = self.manifests.list(vm)?;
            while let Some(key) = list.next_key()? {
                let Ok(Record::Manifest(manifest)) = self.manifests.read(&key) else { continue };
                let left = affected(self.store, &self.damage, &manifest)?;
                self.report.affected_snapshots += u64::from(!left.is_empty());
                left.into_iter().try_for_each(|one| self.tell(&Event::Affected(one)))?;
            }
        }
        Ok(())
    }
}

const _: () = assert!(ALL.1 as usize <= WANTED);
