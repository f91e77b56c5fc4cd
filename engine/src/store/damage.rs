//! Damage marks: slots that were found damaged, for ever known.
//!
//! `damage/<container>/<n>`: body `D`, version 1, JSON. A marked slot is never deduplicated
//! against and never settles a comparison; the next session of a VM whose snapshot touches
//! it reads those ranges again.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::format::{ObjectKind, SEALED_MAX, Sealer};
use super::names;
use super::objects::{Created, Objects};
use super::recipe::{NodeSource, Placement, RecipeReader};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Slot};
use crate::store::Store;
use crate::store::container::Directories;

const MAGIC: [u8; 2] = *b"D\x01";
/// Containers that the marks in memory may name: a store with more damage than this has
/// lost a disk, and is treated as damaged throughout the containers beyond.
const MAX_CONTAINERS: usize = 16_384;
/// Ranges of one container in memory; beyond, all of it counts as damaged.
const MAX_RANGES: usize = 64;
/// Marks of one container: a second find of the same slots makes no second mark.
const MAX_MARKS: u32 = 1024;
/// Slots of a container.
const SLOTS: u32 = u16::MAX as u32;

/// One mark: what was found in a container.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DamageMark {
    /// Damaged slots as (first, count).
    pub slots: Vec<(u16, u16)>,
    /// When, Unix milliseconds.
    pub found_ms: i64,
    /// By what, and how it showed.
    pub how: String,
}

/// Slots that turned out to be damaged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// Their container.
    pub container: ContainerId,
    /// The first slot, and how many.
    pub slots: (u16, u16),
    /// How it showed.
    pub how: String,
}

/// All marks of a store, in memory: damage is rare, so this is small, and it is capped.
#[derive(Clone, Default, Debug)]
pub struct DamageMap {
    /// Disjoint ranges of slots, ascending.
    containers: BTreeMap<ContainerId, Vec<(u16, u16)>>,
    /// More containers are damaged than we keep: then every one may be.
    overflow: bool,
}

impl DamageMap {
    /// Reads all marks of a store.
    ///
    /// # Errors
    /// When they cannot be listed or read; an unreadable mark condemns its whole container.
    pub fn load(objects: &Objects, sealer: &Sealer) -> Result<Self> {
        let mut names: Vec<String> = Vec::new();
        let mut map = DamageMap::default();
        objects.list(names::DAMAGE, |name, _| {
            if names.len() < MAX_CONTAINERS {
                names.push(name.to_owned());
            } else {
                map.overflow = true;
            }
            Ok(())
        })?;
        for name in &names {
            let Some(container) = parse_container(name) else { continue };
            match read(objects, sealer, name) {
                Ok(mark) => mark.slots.iter().for_each(|(first, n)| map.add(container, *first, *n)),
                Err(error) if error.kind() == Kind::Damaged => map.add(container, 0, u16::MAX),
                Err(error) => return Err(error),
            }
        }
        Ok(map)
    }

    /// Tells the directories, so that no damaged slot is deduplicated against.
    pub fn apply(&self, directories: &Directories) {
        for (container, ranges) in &self.containers {
            for (first, count) in ranges.iter().filter(|(_, count)| *count > 0) {
                directories.mark_damaged(*container, *first..=*first + (count - 1));
            }
        }
    }

    /// Writes marks for what was found and not known; returns how many slots were new.
    ///
    /// # Errors
    /// When a mark cannot be written; what was written before stays.
    pub fn record(&mut self, store: &Store, found: &[Found], found_ms: i64) -> Result<u64> {
        let new: Vec<Found> =
            found.iter().filter(|found| self.note(store.directories(), found)).cloned().collect();
        write_marks(store, &new, found_ms)?;
        Ok(new.iter().map(|found| u64::from(found.slots.1)).sum())
    }

    /// Remembers what was found, here and in the directories; false if all of it was known.
    pub fn note(&mut self, directories: &Directories, found: &Found) -> bool {
        let (first, count) = found.slots;
        let known = (first..first.saturating_add(count))
            .all(|slot| self.has(Address { container: found.container, slot: Slot(slot) }));
        if known || count == 0 {
            return false;
        }
        self.add(found.container, first, count);
        directories.mark_damaged(found.container, first..=first + (count - 1));
        true
    }

    /// Whether there is no damage at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.containers.is_empty() && !self.overflow
    }

    /// Containers with damage.
    pub fn containers(&self) -> impl Iterator<Item = ContainerId> + '_ {
        self.containers.keys().copied()
    }

    /// Damaged slots.
    #[must_use]
    pub fn slots(&self) -> u64 {
        self.containers.values().flatten().map(|(_, count)| u64::from(*count)).sum()
    }

    /// Whether a slot is damaged.
    #[must_use]
    pub fn has(&self, address: Address) -> bool {
        self.touches(address, 1)
    }

    /// Whether any of `count` slots from `address` on is damaged.
    #[must_use]
    pub fn touches(&self, address: Address, count: u64) -> bool {
        let Some(ranges) = self.containers.get(&address.container) else { return self.overflow };
        let first = u64::from(address.slot.0);
        ranges.iter().any(|(from, n)| {
            let from = u64::from(*from);
            from < first + count && first < from + u64::from(*n)
        })
    }

    /// Adds `count` slots from `first` on.
    pub fn add(&mut self, container: ContainerId, first: u16, count: u16) {
        if self.containers.len() >= MAX_CONTAINERS && !self.containers.contains_key(&container) {
            self.overflow = true;
            return;
        }
        let ranges = self.containers.entry(container).or_default();
        ranges.push((first, count.min(u16::MAX - first)));
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
        for &(first, count) in ranges.iter() {
            match merged.last_mut() {
                Some(last) if u32::from(first) <= u32::from(last.0) + u32::from(last.1) => {
                    let end = (u32::from(first) + u32::from(count))
                        .max(u32::from(last.0) + u32::from(last.1));
                    last.1 = (end.min(SLOTS) - u32::from(last.0)) as u16;
                }
                _ => merged.push((first, count)),
            }
        }
        if merged.len() > MAX_RANGES {
            merged = vec![(0, u16::MAX)];
        }
        *ranges = merged;
    }

    /// The ranges of blocks, as (first, count), whose runs touch damage, or that are unknown
    /// because a node of the recipe is damaged: the next session reads them again. Costs
    /// nothing while there is no damage.
    ///
    /// # Errors
    /// When the recipe cannot be read for another reason than damage.
    pub fn forced_ranges<S: NodeSource>(
        &self,
        recipe: &RecipeReader<S>,
    ) -> Result<Vec<(u64, u64)>> {
        let mut forced: Vec<(u64, u64)> = Vec::new();
        if self.is_empty() {
            return Ok(forced);
        }
        let mut add = |first: u64, count: u64| match forced.last_mut() {
            Some(last) if last.0 + last.1 == first => last.1 += count,
            _ => forced.push((first, count)),
        };
        let mut runs = recipe.all_runs().tolerant();
        loop {
            let run = runs.next()?;
            for lost in runs.take_lost() {
                if lost.error.kind() != Kind::Damaged && lost.error.kind() != Kind::NotFound {
                    return Err(lost.error);
                }
                add(lost.first_block, lost.count);
            }
            let Some(run) = run else { break };
            if let Placement::At(address) = run.placement
                && self.touches(address, run.count)
            {
                (0..run.count).for_each(|i| {
                    if let Placement::At(address) = run.placement.skip(i)
                        && self.has(address)
                    {
                        add(run.first_block + i, 1);
                    }
                });
            }
        }
        forced.sort_unstable();
        Ok(forced)
    }
}

/// Writes marks, one for what stands in a row of the same container.
///
/// # Errors
/// When a mark cannot be written; what was written before stays.
pub fn write_marks(store: &Store, found: &[Found], found_ms: i64) -> Result<()> {
    for group in found.chunk_by(|a, b| a.container == b.container) {
        let slots = group.iter().map(|found| found.slots).collect();
        let how = group[0].how.clone();
        let record = DamageMark { slots, found_ms, how };
        mark(store.objects(), store.sealer(), group[0].container, &record)?;
    }
    Ok(())
}

/// Writes a mark, durable when it returns.
///
/// # Errors
/// When it cannot be created.
pub fn mark(
    objects: &Objects,
    sealer: &Sealer,
    container: ContainerId,
    mark: &DamageMark,
) -> Result<()> {
    let mut body = MAGIC.to_vec();
    serde_json::to_writer(&mut body, mark)
        .map_err(|error| Error::caused(Kind::Failed, "cannot encode a damage mark", error))?;
    for n in 1..=MAX_MARKS {
        let name = names::damage(container, n);
        if objects.exists(&name)? {
            continue;
        }
        let sealed = sealer.seal(ObjectKind::Damage, &name, &body)?;
        if objects.create(&name, Bytes::from(sealed))? == Created::Ours {
            return Ok(());
        }
    }
    // The container's damage has been said often enough.
    Ok(())
}

fn read(objects: &Objects, sealer: &Sealer, name: &str) -> Result<DamageMark> {
    let bytes = objects.read_all(name, SEALED_MAX)?;
    DamageMark::decode(&sealer.open(ObjectKind::Damage, name, &bytes)?, name)
}

impl DamageMark {
    /// Reads a body; `name` is the object's, for messages.
    pub(super) fn decode(body: &[u8], name: &str) -> Result<Self> {
        let damaged = || Error::new(Kind::Damaged, format!("object {name} is no damage mark"));
        let text = body.strip_prefix(&MAGIC).ok_or_else(damaged)?;
        serde_json::from_slice(text).map_err(|error| {
            Error::caused(Kind::Damaged, format!("object {name} is no damage mark"), error)
        })
    }
}

/// The container that a mark's key names.
fn parse_container(name: &str) -> Option<ContainerId> {
    let folder = name.strip_prefix(names::DAMAGE)?.strip_prefix('/')?.split('/').next()?;
    let (incarnation, counter) = folder.split_once('-')?;
    Some(ContainerId {
        incarnation: crate::ids::Incarnation(u32::from_str_radix(incarnation, 16).ok()?),
        counter: u32::from_str_radix(counter, 16).ok()?,
    })
}
