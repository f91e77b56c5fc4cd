//! Checkpoints of a host's part of the index in the store, and what can be read from them.
//!
//! A checkpoint adds what the journals record since those before it, so an entry is written about
//! once. Whoever comes to own slices follows the chain of their checkpoints, whichever hosts wrote
//! them, and reads directories only for what came after. Where a checkpoint is missing or damaged the
//! chain ends, and directories are read instead: they are the truth, so that costs time only.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use crate::detect::{Partition, Watermark};
use crate::error::{Error, Kind, Result};
use crate::ids::{ContainerId, Fingerprint, HostId, Incarnation, Slice, Slices};
use crate::jobs::rebuild::Entries;
use crate::owner::Owner;
use crate::store::Store;
use crate::store::container::ContainerKind;
use crate::store::damage::DamageMap;
use crate::store::journal::Position;
use crate::store::shards::{self, CheckpointId, Record, Writer};

/// Containers that one checkpoint is of, at most: their ids take half a MiB while it is written. What
/// there is besides is of the next one.
const MAX_CONTAINERS: usize = 64 << 10;
/// Records that are kept in memory: about 2 KiB each with 100 hosts. Those of other slices are not kept at
/// all, so that some thirty of each host that owned ours are to be expected.
const MAX_RECORDS: usize = 1024;

/// A set of slices whose entries are in checkpoints up to a place in the journals.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Group {
    slices: Slices,
    up_to: Watermark,
}

/// What chains of checkpoints cover of the slices that somebody wants.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Covered {
    groups: Vec<Group>,
    /// Those that the chains are made of.
    chain: BTreeSet<CheckpointId>,
    /// Entries in them, those of other slices not counted: an estimate.
    entries: u64,
}

impl Covered {
    /// Follows the chains as far as they go.
    fn by(records: &[(CheckpointId, Record)], wanted: &Slices) -> Self {
        let mut covered = Covered::default();
        if !wanted.is_empty() {
            covered.groups.push(Group { slices: wanted.clone(), up_to: Watermark::default() });
        }
        while records.iter().fold(false, |any, (id, record)| covered.add(*id, record) || any) {}
        covered
    }

    /// Adds a checkpoint where it goes on from what is covered; false if it adds nothing.
    fn add(&mut self, id: CheckpointId, record: &Record) -> bool {
        let (mut groups, mut added) = (Vec::new(), 0);
        for group in std::mem::take(&mut self.groups) {
            let both = group.slices.and(&record.slices);
            if both.is_empty() || !goes_on(&group.up_to, record) {
                join(&mut groups, group);
                continue;
            }
            added += both.len();
            let rest = group.slices.without(&both);
            let mut up_to = group.up_to.clone();
            record.up_to.iter().for_each(|at| up_to.raise(at.incarnation, at.n.into()));
            join(&mut groups, Group { slices: both, up_to });
            if !rest.is_empty() {
                join(&mut groups, Group { slices: rest, up_to: group.up_to });
            }
        }
        self.groups = groups;
        if added > 0 {
            self.chain.insert(id);
            self.entries += record.entries * added as u64 / record.slices.len().max(1) as u64;
        }
        added > 0
    }

    /// Up to where all that is wanted is covered.
    fn up_to(&self) -> Vec<Position> {
        let Some((first, others)) = self.groups.split_first() else { return Vec::new() };
        let least = |(incarnation, n): (Incarnation, u64)| {
            let others = others.iter().map(|group| group.up_to.get(incarnation));
            Position { incarnation, n: others.fold(n, u64::min) as u32 }
        };
        first.up_to.iter().map(least).filter(|at| at.n > 0).collect()
    }
}

/// Adds a group to others, into one that is covered as far.
fn join(groups: &mut Vec<Group>, group: Group) {
    match groups.iter_mut().find(|other| other.up_to == group.up_to) {
        Some(same) => same.slices.extend(&group.slices),
        None => groups.push(group),
    }
}

/// Whether a checkpoint leaves no gap behind what is covered, and adds to it.
fn goes_on(covered: &Watermark, record: &Record) -> bool {
    record.after.iter().all(|at| u64::from(at.n) <= covered.get(at.incarnation))
        && record.up_to.iter().any(|at| u64::from(at.n) > covered.get(at.incarnation))
}

/// The checkpoints of a store, as one host uses them.
#[derive(Default)]
pub struct Checkpoints {
    /// Those that turned out to be damaged: no chain goes through them.
    damaged: BTreeSet<CheckpointId>,
    /// Entries of our slices that were in checkpoints when last looked at, and by which map.
    written: Option<(u64, u64)>,
}

/// What a host writes checkpoints of.
pub struct OwnPart<'p> {
    /// Its number.
    pub host: HostId,
    /// The map that it goes by.
    pub map_epoch: u64,
    /// What it owns by that.
    pub slices: &'p Slices,
}

impl Checkpoints {
    /// Calls `each` with entries of checkpoints, all of the `wanted` slices and some besides, but for
    /// damaged slots. Returns how many were read, and how far the journals need not be.
    ///
    /// # Errors
    /// When the store cannot be read, or the first of `each`.
    pub fn read(
        &mut self,
        store: &Store,
        wanted: &Slices,
        damage: &DamageMap,
        each: &mut Entries<'_>,
    ) -> Result<(u64, Vec<Position>)> {
        let mut records = self.records(store, wanted)?;
        let (mut done, mut entries) = (BTreeSet::new(), 0);
        loop {
            let covered = Covered::by(&records, wanted);
            let next =
                records.iter().find(|(id, _)| covered.chain.contains(id) && !done.contains(id));
            let Some((id, record)) = next else { return Ok((entries, covered.up_to())) };
            let (id, parts) = (*id, record.parts);
            match read_parts(store, id, parts, damage, each)? {
                Some(count) => {
                    entries += count;
                    done.insert(id);
                }
                None => {
                    // What was read of it does no harm, but nothing may go on from it.
                    self.damaged.insert(id);
                    records.retain(|(other, _)| *other != id);
                }
            }
        }
    }

    /// Records of complete checkpoints that have something of these slices.
    fn records(&mut self, store: &Store, wanted: &Slices) -> Result<Vec<(CheckpointId, Record)>> {
        let mut records = Vec::new();
        let mut ids = shards::list(store)?;
        // About as they were written: what a chain begins with comes first, of all hosts.
        ids.sort_unstable_by_key(|id| (id.n, id.host));
        for id in ids {
            if self.damaged.contains(&id) {
                continue;
            }
            match shards::read_record(store, id) {
                Ok(record) if record.slices.and(wanted).is_empty() => {}
                Ok(record) => records.push((id, record)),
                // It is being written, or nobody finished it.
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) if error.kind() == Kind::Damaged => {
                    eprintln!("fleece-engine: {error}; the journals are read instead");
                    self.damaged.insert(id);
                }
                Err(error) => return Err(error),
            }
            if records.len() == MAX_RECORDS {
                break;
            }
        }
        Ok(records)
    }

    /// Whether so much was learned since the last checkpoint that another one is worth its while: a
    /// quarter more entries, and at least `least`.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn is_due(
        &mut self,
        store: &Store,
        part: &OwnPart<'_>,
        (entries, least): (u64, u64),
    ) -> Result<bool> {
        let written = match self.written {
            Some((written, epoch)) if epoch == part.map_epoch => written,
            _ if entries < least => return Ok(false),
            _ => {
                let records = self.records(store, part.slices)?;
                Covered::by(&records, part.slices).entries
            }
        };
        self.written = Some((written, part.map_epoch));
        Ok(entries >= written + least.max(written / 4))
    }

    /// Writes what our part of the index has of the containers that are recorded since the last
    /// checkpoint of it. `still` says whether it is still to be written. Returns the entries, `None`
    /// if it was broken off or there is nothing to write.
    ///
    /// # Errors
    /// When the index or the journals cannot be read, or the store cannot be written.
    pub fn write(
        &mut self,
        store: &Store,
        owner: &Owner,
        part: &OwnPart<'_>,
        (written_ms, still): (i64, &dyn Fn() -> bool),
    ) -> Result<Option<u64>> {
        let before = Covered::by(&self.records(store, part.slices)?, part.slices);
        let after = before.up_to();
        let stretch = Stretch::of(store, &after, &owner.applied()?)?;
        if stretch.containers.is_empty() {
            // What the index has besides it has twice; nothing is due before it has more.
            let entries = owner.figures().unique_blocks.load(Ordering::Relaxed);
            self.written = Some((entries, part.map_epoch));
            return Ok(None);
        }
        let mut writer = Writer::begin(store, part.host)?;
        for partition in (0..owner.partitions()).map(Partition) {
            let mut last: Option<Fingerprint> = None;
            loop {
                if !still() {
                    return Ok(None);
                }
                let entries = owner.entries_after(partition, last)?;
                let Some((fingerprint, _)) = entries.last() else { break };
                last = Some(*fingerprint);
                let ours = entries.into_iter().filter(|(fingerprint, address)| {
                    part.slices.contains(Slice::of(fingerprint)) && stretch.has(address.container)
                });
                ours.into_iter().try_for_each(|entry| writer.push(entry))?;
            }
        }
        let (_, record) = writer.finish(Record {
            map_epoch: part.map_epoch,
            written_ms,
            after,
            up_to: stretch.up_to,
            slices: part.slices.clone(),
            parts: 0,
            entries: 0,
        })?;
        self.written = Some((before.entries + record.entries, part.map_epoch));
        Ok(Some(record.entries))
    }

    /// Entries of our slices that were in checkpoints when last looked at.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.map_or(0, |(entries, _)| entries)
    }
}

/// Hands the entries of a checkpoint on; `None` if one of its parts is missing or damaged.
fn read_parts(
    store: &Store,
    id: CheckpointId,
    parts: u32,
    damage: &DamageMap,
    each: &mut Entries<'_>,
) -> Result<Option<u64>> {
    let mut count = 0;
    for part in 0..parts {
        let mut entries = match shards::read_part(store, id, part) {
            Ok(entries) => entries,
            Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => {
                eprintln!("fleece-engine: {error}; the journals are read instead");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        count += entries.len() as u64;
        entries.retain(|(_, address)| !damage.has(*address));
        each(&entries)?;
    }
    Ok(Some(count))
}

/// A stretch of the journals, and the containers of blocks that it records.
struct Stretch {
    up_to: Vec<Position>,
    /// Ascending.
    containers: Vec<ContainerId>,
}

impl Stretch {
    /// What comes after a place, as far as the index has `applied` it and [`MAX_CONTAINERS`] allow.
    /// An entry that cannot be read ends its incarnation's stretch until it is repaired.
    fn of(store: &Store, after: &[Position], applied: &Watermark) -> Result<Self> {
        let (mut up_to, mut containers) = (Vec::new(), Vec::new());
        for (incarnation, end) in applied.iter() {
            let begin = after.iter().find(|at| at.incarnation == incarnation).map_or(0, |at| at.n);
            let mut n = begin;
            while u64::from(n) < end && containers.len() < MAX_CONTAINERS {
                let next = Position { incarnation, n: n + 1 };
                match store.journals().read(next) {
                    Ok(Some(entries)) => {
                        let blocks = entries.iter().filter(|e| e.kind == ContainerKind::Blocks);
                        containers.extend(blocks.map(|entry| entry.container));
                    }
                    Ok(None) => break,
                    Err(error) if error.kind() == Kind::Damaged => break,
                    Err(error) => return Err(error),
                }
                n = next.n;
            }
            if n > 0 {
                up_to.push(Position { incarnation, n });
            }
        }
        containers.sort_unstable();
        containers.dedup();
        Ok(Stretch { up_to, containers })
    }

    fn has(&self, container: ContainerId) -> bool {
        self.containers.binary_search(&container).is_ok()
    }
}

/// The end of all journals: who owns nothing needs nothing of them.
///
/// # Errors
/// When they cannot be listed.
pub fn journal_ends(store: &Store) -> Result<Vec<Position>> {
    let end = |incarnation| {
        let n = super::journals::last_entry(store, incarnation)?;
        Ok::<_, Error>(Position { incarnation, n })
    };
    store.journals().incarnations()?.into_iter().map(end).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn positions(ends: [u32; 3]) -> Vec<Position> {
        let at = |(n, end): (usize, &u32)| Position { incarnation: Incarnation(n as u32), n: *end };
        ends.iter().enumerate().map(at).filter(|at| at.n > 0).collect()
    }

    fn record(after: [u32; 3], more: [u32; 3], slices: &[u16]) -> Record {
        let up_to = [0, 1, 2].map(|n| after[n] + more[n]);
        Record {
            map_epoch: 1,
            written_ms: 0,
            after: positions(after),
            up_to: positions(up_to),
            slices: slices.iter().map(|slice| Slice(*slice)).collect(),
            parts: 1,
            entries: 10,
        }
    }

    fn id(n: usize) -> CheckpointId {
        CheckpointId { host: HostId(1), n: n as u32 }
    }

    /// For each wanted slice and incarnation: up to which entry all are in what may be used.
    fn obviously_covered(records: &[Record], wanted: &[u16]) -> BTreeMap<u16, [u32; 3]> {
        let mut covered: BTreeMap<u16, [u32; 3]> = wanted.iter().map(|s| (*s, [0; 3])).collect();
        let n = |at: &[Position], i: usize| {
            at.iter().find(|at| at.incarnation.0 as usize == i).map_or(0, |at| at.n)
        };
        for _ in 0..=records.len() {
            for record in records {
                for (slice, ends) in &mut covered {
                    let fits = (0..3).all(|i| n(&record.after, i) <= ends[i]);
                    if record.slices.contains(Slice(*slice)) && fits {
                        (0..3).for_each(|i| ends[i] = ends[i].max(n(&record.up_to, i)));
                    }
                }
            }
        }
        covered
    }

    fn any_record() -> impl Strategy<Value = Record> {
        let slices = prop::collection::vec(0..6_u16, 1..6);
        (prop::array::uniform3(0..6_u32), prop::array::uniform3(0..4_u32), slices)
            .prop_map(|(after, more, slices)| record(after, more, &slices))
    }

    proptest! {
        #[test]
        fn chains_cover_what_they_obviously_cover(
            records in prop::collection::vec(any_record(), 0..12),
            wanted in prop::collection::btree_set(0..6_u16, 0..6),
        ) {
            let wanted: Vec<u16> = wanted.into_iter().collect();
            let expected = obviously_covered(&records, &wanted);
            let named: Vec<_> = records.iter().cloned().enumerate()
                .map(|(n, record)| (id(n), record)).collect();
            let set: Slices = wanted.iter().map(|slice| Slice(*slice)).collect();
            let covered = Covered::by(&named, &set);
            for (slice, ends) in &expected {
                let mut groups = covered.groups.iter();
                let group = groups.find(|group| group.slices.contains(Slice(*slice))).unwrap();
                for (i, end) in ends.iter().enumerate() {
                    let got = group.up_to.get(Incarnation(i as u32));
                    prop_assert_eq!(got, u64::from(*end), "slice {} incarnation {}", slice, i);
                }
            }
            let all: usize = covered.groups.iter().map(|group| group.slices.len()).sum();
            prop_assert_eq!(all, wanted.len());
            let least = |i: usize| expected.values().map(|ends| ends[i]).min().unwrap_or(0);
            prop_assert_eq!(covered.up_to(), positions([0, 1, 2].map(least)));
            // What the chain is made of is enough.
            let only: Vec<_> = named.iter()
                .filter(|(id, _)| covered.chain.contains(id)).cloned().collect();
            prop_assert_eq!(Covered::by(&only, &set).up_to(), covered.up_to());
        }
    }

    #[test]
    fn a_gap_or_another_part_ends_a_chain() {
        let first = record([0, 0, 0], [4, 0, 2], &[1, 2, 3]);
        let second = record([4, 0, 2], [3, 5, 0], &[2, 3, 4]);
        let behind_a_gap = record([8, 0, 0], [1, 0, 0], &[2, 3]);
        let all = [(id(1), first), (id(2), second), (id(3), behind_a_gap)];
        let up_to = |slices: &[u16]| {
            let covered = Covered::by(&all, &slices.iter().map(|s| Slice(*s)).collect());
            (covered.up_to(), covered.chain.len(), covered.entries)
        };
        assert_eq!(up_to(&[2, 3]), (positions([7, 5, 2]), 2, 12));
        assert_eq!(up_to(&[1, 2]), (positions([4, 0, 2]), 2, 9));
        assert_eq!(up_to(&[4]), (Vec::new(), 0, 0));
        assert_eq!(up_to(&[]), (Vec::new(), 0, 0));
    }
}
