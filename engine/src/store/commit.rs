//! The commit point: manifests and tombstones at keys that are created once.
//!
//! Creating `manifests/<vm>/<seq>-<snapshot>` is the commit. Its copy is created after it,
//! so a copy proves a commit; a copy that is missing (a crash between the two) is made
//! good by `verify`. Whoever must end a dead session creates a tombstone at the same key.

use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::Store;
use super::format::{ObjectKind, SEALED_MAX, Sealer};
use super::manifest::{Manifest, Record, Tombstone};
use super::names;
use super::objects::{Created, Objects};
use crate::error::{Error, Kind, Result};
use crate::ids::{SnapshotId, VmId};
use crate::sort::{Sorted, Sorter};

/// Memory of a sorted listing; a VM with more than 18,000 snapshots spills.
const LIST_RUN_BYTES: usize = 256 * 1024;
/// Newest keys that one listing for the latest snapshot keeps: one suffices unless a row
/// of tombstones stands at the end.
const NEWEST: usize = 16;

/// What a commit key names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SnapshotKey {
    /// The VM.
    pub vm: VmId,
    /// The session's sequence within the VM.
    pub seq: u64,
    /// The snapshot.
    pub snapshot: SnapshotId,
}

/// What became of a commit.
#[derive(Debug)]
pub enum Commit {
    /// The snapshot is committed.
    Committed {
        /// The manifest's copy could not be written.
        warning: Option<Error>,
    },
    /// Someone ended the session before.
    Tombstoned,
}

/// What became of a tombstone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// The session will never commit.
    Tombstoned,
    /// It had committed.
    AlreadyCommitted,
}

/// What the store says about a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Committed, with its sequence.
    Committed(u64),
    /// Ended without a commit.
    Tombstoned(u64),
    /// Its session began and did not end.
    Open(u64),
    /// No session of that name ever began in this store.
    Unknown,
    /// Its record and the copy are damaged. A bitmap that waits for it is merged back,
    /// which is right in either case: it only makes more dirty.
    Unreadable(u64),
}

/// Commits, ends, reads and lists snapshots. A cheap handle.
#[derive(Clone)]
pub struct Manifests {
    objects: Objects,
    sealer: Sealer,
    scratch: PathBuf,
}

impl Manifests {
    /// Over the objects of a store; `scratch` is where a very long listing is sorted.
    #[must_use]
    pub fn new(objects: Objects, sealer: Sealer, scratch: &Path) -> Self {
        Manifests { objects, sealer, scratch: scratch.into() }
    }

    /// Of an open store.
    #[must_use]
    pub fn of(store: &Store, scratch: &Path) -> Self {
        Self::new(store.objects().clone(), store.sealer().clone(), scratch)
    }

    pub(super) fn objects(&self) -> &Objects {
        &self.objects
    }

    pub(super) fn sealer(&self) -> &Sealer {
        &self.sealer
    }

    /// Commits a snapshot: everything it names must be durable.
    ///
    /// # Errors
    /// When the manifest is certainly not committed, or nothing certain can be said;
    /// the same manifest may then be committed again.
    pub fn commit(&self, manifest: &Manifest) -> Result<Commit> {
        let key = SnapshotKey::of(manifest);
        let body = manifest.encode()?;
        let ours = Record::Manifest(Box::new(manifest.clone()));
        match self.decide(&key, &body, &ours)? {
            (Record::Manifest(_), Created::Ours) => {
                let warning = self.copy(&key, &body).err();
                Ok(Commit::Committed { warning })
            }
            // The engine that the session was in before had committed it after all.
            (Record::Manifest(_), Created::Exists) => {
                let warning = self.heal_copy(&key).err();
                Ok(Commit::Committed { warning })
            }
            (Record::Tombstone(_), _) => Ok(Commit::Tombstoned),
        }
    }

    /// Ends a session for good, unless it has committed.
    ///
    /// # Errors
    /// When neither is certain.
    pub fn tombstone(&self, tombstone: &Tombstone) -> Result<Ending> {
        let key =
            SnapshotKey { vm: tombstone.vm, seq: tombstone.seq, snapshot: tombstone.snapshot };
        let body = tombstone.encode()?;
        match self.decide(&key, &body, &Record::Tombstone(tombstone.clone()))? {
            (Record::Manifest(_), _) => Ok(Ending::AlreadyCommitted),
            (Record::Tombstone(_), _) => {
                // A tombstone without its copy is still one.
                let _ = self.copy(&key, &body);
                Ok(Ending::Tombstoned)
            }
        }
    }

    /// Creates the commit key or reads what stands there.
    fn decide(&self, key: &SnapshotKey, body: &[u8], ours: &Record) -> Result<(Record, Created)> {
        let name = key.manifest();
        let sealed = self.sealer.seal(ObjectKind::Manifest, &name, body)?;
        match self.objects.create(&name, Bytes::from(sealed))? {
            Created::Ours => Ok((ours.clone(), Created::Ours)),
            Created::Exists => {
                let record = self.read(key)?;
                // The one that created it may not have got so far.
                self.objects.sync(&name)?;
                Ok((record, Created::Exists))
            }
        }
    }

    /// Creates the copy of what stands at a commit key; an existing one is left alone.
    fn copy(&self, key: &SnapshotKey, body: &[u8]) -> Result<Created> {
        let name = key.copy();
        let sealed = self.sealer.seal(ObjectKind::Manifest, &name, body)?;
        self.objects.create(&name, Bytes::from(sealed))
    }

    /// Creates the copy that a crash kept from being made; true if it was missing.
    ///
    /// # Errors
    /// When the manifest cannot be read, or the copy not be created.
    pub fn heal_copy(&self, key: &SnapshotKey) -> Result<bool> {
        let body = self.body(&key.manifest())?;
        Ok(self.copy(key, &body)? == Created::Ours)
    }

    /// Creates the record that is missing at a commit key from its copy, which proves that
    /// it once stood there; true if it was missing.
    ///
    /// # Errors
    /// When the copy cannot be read, or the record not be created.
    pub fn heal_first(&self, key: &SnapshotKey) -> Result<bool> {
        // Checked: only a record of this very snapshot may stand there.
        self.read_copy(key)?;
        let name = key.manifest();
        let sealed = self.sealer.seal(ObjectKind::Manifest, &name, &self.body(&key.copy())?)?;
        Ok(self.objects.create(&name, Bytes::from(sealed))? == Created::Ours)
    }

    /// What stands at a commit key, from the copy if the first is damaged or lost: a copy proves that it stood
    /// there.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when nothing does, [`Kind::Damaged`] when both are damaged.
    pub fn read(&self, key: &SnapshotKey) -> Result<Record> {
        match self.read_first(key) {
            Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => {
                self.read_copy(key).map_err(|copy| match copy.kind() {
                    Kind::NotFound | Kind::Damaged => error,
                    _ => copy,
                })
            }
            other => other,
        }
    }

    /// The record at the commit key itself.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn read_first(&self, key: &SnapshotKey) -> Result<Record> {
        self.record(&key.manifest(), key)
    }

    /// The second copy.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn read_copy(&self, key: &SnapshotKey) -> Result<Record> {
        self.record(&key.copy(), key)
    }

    fn record(&self, name: &str, key: &SnapshotKey) -> Result<Record> {
        let record = Record::decode(&self.body(name)?, name)?;
        if record.is_of(key.vm, key.seq, key.snapshot) {
            Ok(record)
        } else {
            Err(Error::new(Kind::Damaged, format!("object {name} is of another snapshot")))
        }
    }

    fn body(&self, name: &str) -> Result<Vec<u8>> {
        let bytes = self.objects.read_all(name, SEALED_MAX)?;
        self.sealer.open(ObjectKind::Manifest, name, &bytes)
    }

    /// What became of a snapshot of a VM.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn fate(&self, vm: VmId, snapshot: SnapshotId) -> Result<Fate> {
        if let Some(key) = self.find(names::MANIFESTS, vm, snapshot)? {
            // Where the first is damaged the copy says it, if that can be read.
            return match self.ended(&key, self.read_first(&key), &key.manifest()) {
                Ok(Fate::Unreadable(_)) => self.ended(&key, self.read_copy(&key), &key.copy()),
                ended => ended,
            };
        }
        // A copy is made after the record: it proves what stood at a commit key that is missing.
        if let Some(key) = self.find(names::MANIFEST_COPIES, vm, snapshot)? {
            return self.ended(&key, self.read_copy(&key), &key.copy());
        }
        let session = self.find(names::SESSIONS, vm, snapshot)?;
        Ok(session.map_or(Fate::Unknown, |key| Fate::Open(key.seq)))
    }

    /// The fate that a record says, once the object with it is durable: who hears that a snapshot is
    /// committed lets go of what it was made of.
    fn ended(&self, key: &SnapshotKey, record: Result<Record>, object: &str) -> Result<Fate> {
        match record {
            Ok(Record::Manifest(_)) => {
                self.objects.sync(object)?;
                Ok(Fate::Committed(key.seq))
            }
            Ok(Record::Tombstone(_)) => Ok(Fate::Tombstoned(key.seq)),
            Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => {
                Ok(Fate::Unreadable(key.seq))
            }
            Err(error) => Err(error),
        }
    }

    /// Decides the fate of a snapshot whose session is known to be dead: true if it is
    /// committed, false if it never will be (with a tombstone, where it had begun).
    ///
    /// # Errors
    /// When that cannot be made certain.
    pub fn settle(
        &self,
        vm: VmId,
        snapshot: SnapshotId,
        reason: &str,
        time_ms: i64,
    ) -> Result<bool> {
        let seq = match self.fate(vm, snapshot)? {
            Fate::Committed(_) => return Ok(true),
            Fate::Tombstoned(_) | Fate::Unreadable(_) | Fate::Unknown => return Ok(false),
            Fate::Open(seq) => seq,
        };
        let tombstone = Tombstone { snapshot, vm, seq, reason: reason.into(), time_ms };
        Ok(self.tombstone(&tombstone)? == Ending::AlreadyCommitted)
    }

    fn find(&self, folder: &str, vm: VmId, snapshot: SnapshotId) -> Result<Option<SnapshotKey>> {
        let mut found = None;
        self.each_key(folder, vm, |key| {
            if key.snapshot == snapshot {
                found = found.max(Some(key));
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// All that stands at the VM's commit keys, in ascending order.
    ///
    /// # Errors
    /// When the keys cannot be listed.
    pub fn list(&self, vm: VmId) -> Result<Snapshots> {
        self.sorted_keys(names::MANIFESTS, vm)
    }

    /// The keys of the VM's second copies, in ascending order.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn list_copies(&self, vm: VmId) -> Result<Snapshots> {
        self.sorted_keys(names::MANIFEST_COPIES, vm)
    }

    pub(super) fn sorted_keys(&self, folder: &str, vm: VmId) -> Result<Snapshots> {
        let mut sorter = Sorter::new(&self.scratch, LIST_RUN_BYTES);
        self.each_key(folder, vm, |key| sorter.push(&key.to_record()))?;
        Ok(Snapshots { manifests: self.clone(), vm, keys: sorter.finish()? })
    }

    /// The newest committed snapshot that can be read.
    ///
    /// # Errors
    /// When the store cannot be read; a damaged manifest is passed over.
    pub fn latest(&self, vm: VmId) -> Result<Option<Manifest>> {
        let mut below = None;
        loop {
            let newest = self.newest(vm, below)?;
            for key in &newest {
                match self.read(key) {
                    Ok(Record::Manifest(manifest)) => return Ok(Some(*manifest)),
                    Ok(Record::Tombstone(_)) => {}
                    Err(error) if error.kind() == Kind::Damaged => {}
                    Err(error) => return Err(error),
                }
            }
            match newest.last() {
                Some(last) if newest.len() == NEWEST => below = Some(*last),
                _ => return Ok(None),
            }
        }
    }

    /// The greatest keys below a key, descending.
    pub(super) fn newest(&self, vm: VmId, below: Option<SnapshotKey>) -> Result<Vec<SnapshotKey>> {
        let mut newest = BinaryHeap::new();
        self.each_key(names::MANIFESTS, vm, |key| {
            if below.is_none_or(|below| key < below) {
                newest.push(std::cmp::Reverse(key));
                if newest.len() > NEWEST {
                    newest.pop();
                }
            }
            Ok(())
        })?;
        Ok(newest.into_sorted_vec().into_iter().map(|key| key.0).collect())
    }

    /// A sequence above all that the VM's sessions and snapshots had.
    ///
    /// # Errors
    /// When the keys cannot be listed.
    pub fn next_seq(&self, vm: VmId) -> Result<u64> {
        let mut greatest = 0;
        // Copies, too: the record may be lost, and the session's registration tidied away.
        for folder in [names::MANIFESTS, names::MANIFEST_COPIES, names::SESSIONS] {
            self.each_key(folder, vm, |key| {
                greatest = greatest.max(key.seq);
                Ok(())
            })?;
        }
        Ok(greatest.saturating_add(1))
    }

    /// The VMs that have a commit key, in order.
    ///
    /// # Errors
    /// When the folders cannot be listed.
    pub fn vms(&self) -> Result<Vec<VmId>> {
        self.vms_in(names::MANIFESTS)
    }

    /// The VMs that have a second copy of a record, in order.
    ///
    /// # Errors
    /// When the folders cannot be listed.
    pub fn vms_with_copies(&self) -> Result<Vec<VmId>> {
        self.vms_in(names::MANIFEST_COPIES)
    }

    /// Calls `each` with every commit key and every key of a second copy, once, VM by VM and ascending.
    ///
    /// # Errors
    /// When they cannot be listed, or the first of `each`.
    pub fn each_of_both(&self, mut each: impl FnMut(SnapshotKey) -> Result<()>) -> Result<()> {
        let mut vms = self.vms()?;
        vms.extend(self.vms_with_copies()?);
        vms.sort_unstable();
        vms.dedup();
        for vm in vms {
            // In step through both.
            let (mut firsts, mut copies) = (self.list(vm)?, self.list_copies(vm)?);
            let (mut first, mut copy) = (firsts.next_key()?, copies.next_key()?);
            while let Some(key) = [first, copy].into_iter().flatten().min() {
                each(key)?;
                if first == Some(key) {
                    first = firsts.next_key()?;
                }
                if copy == Some(key) {
                    copy = copies.next_key()?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn vms_in(&self, folder: &str) -> Result<Vec<VmId>> {
        let mut vms: Vec<VmId> = self
            .objects
            .list_dirs(folder)?
            .iter()
            .filter_map(|name| name.parse().ok().map(VmId))
            .collect();
        vms.sort_unstable();
        Ok(vms)
    }

    /// Calls `each` with what the keys in a folder of a VM name, in no order. It must not
    /// use the store.
    pub(super) fn each_key(
        &self,
        folder: &str,
        vm: VmId,
        mut each: impl FnMut(SnapshotKey) -> Result<()>,
    ) -> Result<()> {
        self.objects.list(&format!("{folder}/{vm}"), |name, _| {
            match names::parse_snapshot(name) {
                Some((vm, seq, snapshot)) => each(SnapshotKey { vm, seq, snapshot }),
                // Not ours: left alone.
                None => Ok(()),
            }
        })
    }
}

impl SnapshotKey {
    /// Of a manifest.
    #[must_use]
    pub fn of(manifest: &Manifest) -> Self {
        SnapshotKey { vm: manifest.vm, seq: manifest.seq, snapshot: manifest.snapshot }
    }

    /// The commit key.
    #[must_use]
    pub fn manifest(&self) -> String {
        names::manifest(self.vm, self.seq, self.snapshot)
    }

    /// The copy's key.
    #[must_use]
    pub fn copy(&self) -> String {
        names::manifest_copy(self.vm, self.seq, self.snapshot)
    }

    fn to_record(self) -> [u8; 14] {
        let mut record = [0; 14];
        record[..8].copy_from_slice(&self.seq.to_be_bytes());
        record[8..].copy_from_slice(self.snapshot.as_str().as_bytes());
        record
    }

    fn from_record(vm: VmId, record: &[u8; 14]) -> Option<Self> {
        let (seq, id) = record.split_first_chunk::<8>()?;
        let snapshot = std::str::from_utf8(id).ok()?.parse().ok()?;
        Some(SnapshotKey { vm, seq: u64::from_be_bytes(*seq), snapshot })
    }
}

/// A VM's commit keys in ascending order; see [`Manifests::list`].
pub struct Snapshots {
    manifests: Manifests,
    vm: VmId,
    keys: Sorted<14>,
}

impl Snapshots {
    /// The next key.
    ///
    /// # Errors
    /// When a spilled listing cannot be read.
    pub fn next_key(&mut self) -> Result<Option<SnapshotKey>> {
        let vm = self.vm;
        Ok(self.keys.next()?.and_then(|record| SnapshotKey::from_record(vm, &record)))
    }

    /// The next committed snapshot.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when a record cannot be read; the call after it goes on behind it.
    #[allow(clippy::should_implement_trait, reason = "it is fallible")]
    pub fn next(&mut self) -> Result<Option<Manifest>> {
        while let Some(key) = self.next_key()? {
            if let Record::Manifest(manifest) = self.manifests.read(&key)? {
                return Ok(Some(*manifest));
            }
        }
        Ok(None)
    }
}
