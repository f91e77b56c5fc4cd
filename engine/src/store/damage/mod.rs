//! Damage marks: slots that were found damaged, and which of them are whole again.
//!
//! `damage/<container>/<n>`: body `D`, version 1, JSON. A marked slot is never deduplicated
//! against and never settles a comparison; the next session of a VM whose snapshot touches
//! it reads those ranges again. Marks are never deleted: a later one takes an earlier one
//! back (`healed`), and says in which generation the container stands since then. They
//! count in the order of `n`.

mod map;

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use self::map::{ALL, DamageMap, all_but};

use super::format::{ObjectKind, SEALED_MAX, Sealer};
use super::names;
use super::objects::{Created, Objects};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Slot};
use crate::store::Store;
use crate::store::container::Directories;

const MAGIC: [u8; 2] = *b"D\x01";
/// Marks of all containers that are read: 12 bytes of memory each while they are.
const MAX_MARKS: usize = 65_536;
/// Creations tried where others mark the same container at the same time.
const TRIES: u32 = 64;

/// One mark: what was found in a container.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DamageMark {
    /// Slots as (first, count).
    pub slots: Vec<(u16, u16)>,
    /// When, Unix milliseconds.
    pub found_ms: i64,
    /// By what, and how it showed.
    pub how: String,
    /// The slots are not damaged but whole again, in this generation of the container. A
    /// program that does not know this field takes them for damaged, which costs only work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healed: Option<u32>,
}

/// Slots that turned out to be damaged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// Their container.
    pub container: ContainerId,
    /// The first slot, and how many: none for a container that has lost nothing and is
    /// worth rewriting.
    pub slots: (u16, u16),
    /// How it showed.
    pub how: String,
}

impl Found {
    /// What a failed look at one slot says of the slots around it.
    #[must_use]
    pub fn around(directories: &Directories, address: Address, how: &str) -> Self {
        let slots = directories.lost_with(address);
        Found { container: address.container, slots, how: how.to_owned() }
    }
}

/// The names of the marks of a store. A mark never changes, so these say whether there is news.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Marks {
    each: BTreeSet<(ContainerId, u32)>,
    /// There are more than are read.
    more: bool,
}

impl Marks {
    /// Lists them.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn list(objects: &Objects) -> Result<Self> {
        let mut marks = Marks::default();
        objects.list(names::DAMAGE, |name, _| {
            match names::parse_damage(name) {
                Some(mark) if marks.each.len() < MAX_MARKS => drop(marks.each.insert(mark)),
                Some(_) => marks.more = true,
                None => {}
            }
            Ok(())
        })?;
        Ok(marks)
    }

    /// Containers with marks that were not among `before`.
    #[must_use]
    pub fn news(&self, before: &Self) -> BTreeSet<ContainerId> {
        self.each.difference(&before.each).map(|(container, _)| *container).collect()
    }

    /// Reads those of the containers that are `wanted`, in their order.
    ///
    /// # Errors
    /// When one cannot be read; a damaged one condemns its whole container.
    pub fn read(
        &self,
        objects: &Objects,
        sealer: &Sealer,
        wanted: impl Fn(ContainerId) -> bool,
    ) -> Result<DamageMap> {
        let mut map = DamageMap::default();
        if self.more {
            map.overflow();
        }
        for &(container, n) in self.each.iter().filter(|(container, _)| wanted(*container)) {
            match read(objects, sealer, &names::damage(container, n)) {
                Ok(mark) => map.apply(container, &mark),
                Err(error) if error.kind() == Kind::Damaged => map.add(container, ALL.0, ALL.1),
                Err(error) => return Err(error),
            }
        }
        Ok(map)
    }
}

impl DamageMap {
    /// Reads all marks of a store.
    ///
    /// # Errors
    /// When they cannot be listed or read; a damaged one condemns its whole container.
    pub fn load(objects: &Objects, sealer: &Sealer) -> Result<Self> {
        Marks::list(objects)?.read(objects, sealer, |_| true)
    }

    pub(super) fn apply(&mut self, container: ContainerId, mark: &DamageMark) {
        for (first, count) in &mark.slots {
            match mark.healed {
                None => self.add(container, *first, *count),
                Some(_) => self.heal(container, *first, *count),
            }
        }
        self.rewrite(container, mark.healed.unwrap_or(0));
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
        if known && self.names(found.container) {
            return false;
        }
        self.add(found.container, first, count);
        directories.mark_damaged(found.container, first, count);
        true
    }

    /// Takes marks back, in the store, here and in the directories: `slots` of the container
    /// are whole in this generation.
    ///
    /// # Errors
    /// When that cannot be recorded.
    pub fn take_back(
        &mut self,
        store: &Store,
        container: ContainerId,
        generation: u32,
        slots: Vec<(u16, u16)>,
        found_ms: i64,
        how: &str,
    ) -> Result<()> {
        let healed = Some(generation);
        let record = DamageMark { slots, found_ms, how: how.to_owned(), healed };
        let before = self.only(container);
        let mut after = before.clone();
        after.apply(container, &record);
        if after == before {
            // Nothing new; or more ranges are left than are kept, as before.
            return Ok(());
        }
        mark(store.objects(), store.sealer(), container, &record)?;
        self.apply(container, &record);
        store.directories().change_damage(|map| map.apply(container, &record));
        Ok(())
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
        let record = DamageMark { slots, found_ms, how, healed: None };
        mark(store.objects(), store.sealer(), group[0].container, &record)?;
    }
    Ok(())
}

/// Writes a mark behind all others of its container, durable when it returns.
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
    let mut last = 0;
    objects.list(&names::damage_of(container), |name, _| {
        last = last.max(names::parse_damage(name).map_or(0, |(_, n)| n));
        Ok(())
    })?;
    for n in (last..u32::MAX).take(TRIES as usize) {
        let name = names::damage(container, n + 1);
        let sealed = sealer.seal(ObjectKind::Damage, &name, &body)?;
        if objects.create(&name, Bytes::from(sealed))? == Created::Ours {
            return Ok(());
        }
    }
    let what = format!("cannot mark the container {container}: others mark it all the time");
    Err(Error::new(Kind::Failed, what))
}

/// Reads a mark.
///
/// # Errors
/// [`Kind::NotFound`], [`Kind::Damaged`].
pub fn read(objects: &Objects, sealer: &Sealer, name: &str) -> Result<DamageMark> {
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
