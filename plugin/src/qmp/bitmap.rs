//! Dirty bitmaps: their names, and what becomes of each when a backup begins.
//!
//! A bitmap of ours is named after the snapshot at whose point in time it began to record. It is a
//! hint bound to one store, snapshot and disk; any doubt means a full read. The decision is a plain
//! function of what QEMU and the engine say: [`plan`].

use crate::error::Result;
use crate::qmp::command as cmd;
use crate::qmp::disk::Disk;
use crate::qmp::session::{Called, Session};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use uuid::Uuid;

/// The first word of our bitmaps' names; others' are left alone.
const PREFIX: &str = "fleece";
/// QEMU's limit is 1023 bytes; no id of ours comes near.
const MAX_PART: usize = 64;

/// `fleece:<store>:<snapshot>:<disk uuid>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct BitmapName {
    /// The store's id as text.
    pub store: String,
    /// The snapshot at whose point in time the bitmap began.
    pub snapshot: String,
    /// The disk.
    pub disk: Uuid,
}

impl BitmapName {
    /// Reads a name; `None` if it is not one of ours.
    #[must_use]
    pub fn parse(name: &str) -> Option<BitmapName> {
        let mut parts = name.split(':');
        if parts.next()? != PREFIX {
            return None;
        }
        let (store, snapshot, disk) = (parts.next()?, parts.next()?, parts.next()?);
        let word = |w: &str| !w.is_empty() && w.len() <= MAX_PART;
        if parts.next().is_some() || !word(store) || !word(snapshot) {
            return None;
        }
        let disk = Uuid::try_parse(disk).ok().filter(|u| u.hyphenated().to_string() == disk)?;
        Some(BitmapName { store: store.to_owned(), snapshot: snapshot.to_owned(), disk })
    }
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}:{}:{}:{}", self.store, self.snapshot, self.disk.hyphenated())
    }
}

/// A bitmap of ours on a disk's top node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bitmap {
    /// Its name, read.
    pub name: BitmapName,
    /// It records guest writes.
    pub recording: bool,
    /// QEMU was killed while it was loaded; only removing works.
    pub inconsistent: bool,
    /// An export or a job holds it.
    pub busy: bool,
    /// Dirty bytes (QEMU's count).
    pub dirty: u64,
}

/// What the engine says of a snapshot that a bitmap names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It is in the store.
    Committed,
    /// It never will be.
    Ended,
}

/// A disk of the VM's latest snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KnownDisk {
    /// Its identity.
    pub uuid: Uuid,
    /// The label that it had.
    pub label: String,
    /// The size that it had, bytes.
    pub size: u64,
}

/// What is known when a backup begins.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The store's id as it stands in bitmap names.
    pub store: &'a str,
    /// What became of the snapshots that bitmaps name ([`named_snapshots`]).
    pub fates: &'a BTreeMap<String, Fate>,
    /// The latest snapshot's id, empty for none.
    pub latest: &'a str,
    /// Its disks.
    pub known: &'a [KnownDisk],
}

/// What is to be read of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Base {
    /// What its valid bitmap has dirty since that snapshot.
    Incremental {
        /// The snapshot.
        parent: String,
    },
    /// Everything.
    Full {
        /// Why, for people.
        reason: String,
    },
}

/// The decision for one disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskPlan {
    /// Its identity.
    pub uuid: Uuid,
    /// What to read.
    pub base: Base,
    /// The valid bitmap that it has after recovery; dropped when this backup commits.
    pub bitmap: Option<String>,
}

impl DiskPlan {
    /// Reads everything after all: `--full`, or the engine refused the parent.
    pub fn make_full(&mut self, reason: impl Into<String>) {
        self.base = Base::Full { reason: reason.into() };
    }

    /// The parent snapshot, or "" for a full read.
    #[must_use]
    pub fn parent(&self) -> &str {
        match &self.base {
            Base::Incremental { parent } => parent,
            Base::Full { .. } => "",
        }
    }
}

/// One step of recovery, on the node of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Remove a bitmap that is of no use.
    Remove {
        /// The disk's node.
        node: String,
        /// The bitmap.
        name: String,
    },
    /// Merge bitmaps of dead backups into their parent's, let that one record again, remove them.
    MergeBack {
        /// The disk's node.
        node: String,
        /// The dead ones.
        from: Vec<String>,
        /// The parent's.
        into: String,
    },
}

impl Action {
    /// The disk's node.
    #[must_use]
    pub fn node(&self) -> &str {
        let (Action::Remove { node, .. } | Action::MergeBack { node, .. }) = self;
        node
    }
}

/// Decisions for all disks, in their order, and what must be done first.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// One per disk.
    pub disks: Vec<DiskPlan>,
    /// To be carried out before anything else ([`carry_out`]).
    pub recovery: Vec<Action>,
}

/// The snapshots of `store` that bitmaps of these disks name: what to ask the engine about.
#[must_use]
pub fn named_snapshots(disks: &[Disk], store: &str) -> Vec<String> {
    let named = disks.iter().flat_map(|d| &d.bitmaps).filter(|b| b.name.store == store);
    named.map(|b| b.name.snapshot.clone()).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Decides for every disk who it is and what is to be read. `fresh` gives random UUIDs.
#[must_use]
pub fn plan(disks: &[Disk], known: Known<'_>, mut fresh: impl FnMut() -> Uuid) -> Plan {
    let identities = identify(disks, known, &mut fresh);
    let mut plan = Plan::default();
    for (disk, uuid) in disks.iter().zip(identities) {
        plan.disks.push(decide(disk, uuid, known, &mut plan.recovery));
    }
    plan
}

/// Who each disk is: its bitmap says so; else the label, if no other disk claims that identity.
fn identify(disks: &[Disk], known: Known<'_>, fresh: &mut impl FnMut() -> Uuid) -> Vec<Uuid> {
    let label_of =
        |uuid: Uuid| known.known.iter().find(|k| k.uuid == uuid).map(|k| k.label.as_str());
    let claims: Vec<Option<Uuid>> = disks.iter().map(|d| claimed(d, known)).collect();
    let mut taken: BTreeSet<Uuid> = BTreeSet::new();
    let mut result: Vec<Option<Uuid>> = vec![None; disks.len()];
    // Two disks with one identity are copies of one image: the one at the old place keeps it.
    for at_old_place in [true, false] {
        for (i, disk) in disks.iter().enumerate() {
            let Some(uuid) = claims[i].filter(|_| result[i].is_none()) else { continue };
            let here = label_of(uuid).is_some_and(|label| label == disk.label);
            if here == at_old_place && taken.insert(uuid) {
                result[i] = Some(uuid);
            }
        }
    }
    for (i, disk) in disks.iter().enumerate() {
        if result[i].is_none() && claims[i].is_none() {
            let same_label =
                known.known.iter().find(|k| k.label == disk.label && !taken.contains(&k.uuid));
            result[i] = same_label.map(|k| k.uuid).filter(|u| taken.insert(*u));
        }
    }
    result.into_iter().map(|uuid| uuid.unwrap_or_else(&mut *fresh)).collect()
}

/// The identity that a disk's bitmaps give it, if they agree. Those of committed snapshots count
/// before those of dead runs.
fn claimed(disk: &Disk, known: Known<'_>) -> Option<Uuid> {
    let of_fate = |fate| {
        let mine = disk.bitmaps.iter().filter(|b| b.name.store == known.store);
        let uuids: BTreeSet<Uuid> = mine
            .filter(|b| known.fates.get(&b.name.snapshot) == Some(&fate))
            .map(|b| b.name.disk)
            .collect();
        (uuids.len() == 1).then(|| uuids.into_iter().next()).flatten()
    };
    of_fate(Fate::Committed).or_else(|| of_fate(Fate::Ended))
}

fn decide(disk: &Disk, uuid: Uuid, known: Known<'_>, recovery: &mut Vec<Action>) -> DiskPlan {
    let full = |reason: String| DiskPlan { uuid, base: Base::Full { reason }, bitmap: None };
    // Bitmaps whose fate nobody knows, or that someone uses, are neither used nor touched.
    let settled: Vec<&Bitmap> = disk
        .bitmaps
        .iter()
        .filter(|b| {
            b.name.store == known.store && !b.busy && known.fates.contains_key(&b.name.snapshot)
        })
        .collect();
    let keep = choose(&settled, uuid, known);
    let newer: Vec<&Bitmap> =
        settled.iter().copied().filter(|b| is_dead(b, known) && !b.inconsistent).collect();
    // A parent's bitmap that stopped recording needs a later one that went on.
    let complete = keep
        .is_some_and(|k| k.recording || newer.iter().any(|b| b.recording && b.name.disk == uuid));
    let keep = keep.filter(|_| complete);
    // Also into one that records: it may have been set going before it was given what it lacks.
    let merge: Vec<&Bitmap> = match keep {
        Some(_) => newer.iter().copied().filter(|b| b.name.disk == uuid).collect(),
        None => Vec::new(),
    };
    if let (Some(k), false) = (keep, merge.is_empty()) {
        let from = merge.iter().map(|b| b.name.to_string()).collect();
        recovery.push(Action::MergeBack {
            node: disk.node.clone(),
            from,
            into: k.name.to_string(),
        });
    }
    for bitmap in &settled {
        let kept = keep.is_some_and(|k| k.name == bitmap.name)
            || merge.iter().any(|m| m.name == bitmap.name);
        if !kept {
            recovery
                .push(Action::Remove { node: disk.node.clone(), name: bitmap.name.to_string() });
        }
    }
    let Some(keep) = keep else { return full(why_full(disk, uuid, known, &settled)) };
    let bitmap = Some(keep.name.to_string());
    let before = known.known.iter().find(|k| k.uuid == uuid);
    if let Some(before) = before.filter(|k| k.size != disk.size) {
        let reason = format!("its size changed from {} to {} bytes", before.size, disk.size);
        return DiskPlan { bitmap, ..full(reason) };
    }
    if disk.external_data {
        return DiskPlan {
            bitmap,
            ..full("it has an external data file, which others can write to".into())
        };
    }
    DiskPlan { uuid, base: Base::Incremental { parent: keep.name.snapshot.clone() }, bitmap }
}

fn is_dead(bitmap: &Bitmap, known: Known<'_>) -> bool {
    known.fates.get(&bitmap.name.snapshot) == Some(&Fate::Ended)
}

/// The bitmap to build on: of a committed snapshot, the latest's first, then one that records.
fn choose<'a>(bitmaps: &[&'a Bitmap], uuid: Uuid, known: Known<'_>) -> Option<&'a Bitmap> {
    let usable = bitmaps.iter().copied().filter(|b| {
        b.name.disk == uuid
            && !b.inconsistent
            && known.fates.get(&b.name.snapshot) == Some(&Fate::Committed)
    });
    usable.max_by_key(|b| (b.name.snapshot == known.latest, b.recording))
}

fn why_full(disk: &Disk, uuid: Uuid, known: Known<'_>, settled: &[&Bitmap]) -> String {
    let since = known.latest;
    if since.is_empty() {
        return "first backup of this VM".into();
    }
    if !known.known.iter().any(|k| k.uuid == uuid) {
        return format!("disk is new since {since}");
    }
    if settled.iter().any(|b| b.inconsistent) {
        return "its dirty bitmap is inconsistent (QEMU was killed)".into();
    }
    if disk.bitmap_beneath {
        return "an overlay was put on top of it (external snapshot)".into();
    }
    if disk.bitmaps.iter().any(|b| b.name.store == known.store && b.busy) {
        return "its dirty bitmap is in use by another program".into();
    }
    if settled.iter().any(|b| b.name.disk == uuid && !is_dead(b, known)) {
        return "its dirty bitmap does not reach until now".into();
    }
    if !disk.persistent {
        return format!("a {} disk's dirty bitmap does not outlive QEMU", disk.format);
    }
    "it has no dirty bitmap of ours (image replaced, or QEMU was killed)".into()
}

/// The transaction actions that make `into` cover what `from` recorded and remove `from`.
#[must_use]
pub(crate) fn merge_back_actions(node: &str, from: &[String], into: &str) -> Vec<Value> {
    let mut actions = vec![
        json!({"type": "block-dirty-bitmap-enable", "data": {"node": node, "name": into}}),
        json!({"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": into, "bitmaps": from}}),
    ];
    for name in from {
        actions.push(
            json!({"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": name}}),
        );
    }
    actions
}

/// Carries out recovery; each action is atomic, and doing one again after a crash is harmless
/// because the next plan starts from what is there then.
///
/// # Errors
/// QEMU refused, or went away.
pub async fn carry_out(session: &Session, recovery: &[Action]) -> Result<()> {
    for action in recovery {
        perform(session, action).await?;
    }
    Ok(())
}

async fn perform(session: &Session, action: &Action) -> Called<()> {
    match action {
        Action::Remove { node, name } => {
            session.call(cmd::BitmapRemove(json!({"node": node, "name": name})), name).await?;
        }
        Action::MergeBack { node, from, into } => {
            let actions = merge_back_actions(node, from, into);
            session.call(cmd::Transaction(json!({"actions": actions})), into).await?;
        }
    }
    Ok(())
}
