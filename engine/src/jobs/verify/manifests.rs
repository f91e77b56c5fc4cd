//! Manifests, their copies, and the recipes below them.

use std::ops::Range;

use super::{Event, Reference, Scope, Verifier};
use crate::error::{Error, Kind, Result};
use crate::ids::{DiskId, VmId};
use crate::jobs::restore::is_damage;
use crate::store::commit::{SnapshotKey, Snapshots};
use crate::store::manifest::{Disk, Manifest, Record};
use crate::store::recipe::{NodeRef, Placement, RecipeReader, Run};

/// The snapshots of a scope, VM by VM, oldest first.
pub(super) struct InScope {
    manifests: crate::store::commit::Manifests,
    vms: std::vec::IntoIter<VmId>,
    one: Option<SnapshotKey>,
    current: Option<Snapshots>,
}

impl InScope {
    pub(super) fn next(&mut self) -> Result<Option<SnapshotKey>> {
        if let Some(one) = self.one.take() {
            return Ok(Some(one));
        }
        loop {
            if let Some(current) = &mut self.current
                && let Some(key) = current.next_key()?
            {
                return Ok(Some(key));
            }
            let Some(vm) = self.vms.next() else { return Ok(None) };
            self.current = Some(self.manifests.list(vm)?);
        }
    }
}

/// The disks of the snapshot before, whose nodes need not be read again.
#[derive(Default)]
struct Before {
    vm: Option<VmId>,
    disks: Vec<(DiskId, Option<NodeRef>)>,
}

impl Before {
    fn root(&self, vm: VmId, disk: DiskId) -> Option<NodeRef> {
        let of_vm = self.vm == Some(vm);
        self.disks.iter().find(|(id, _)| of_vm && *id == disk).and_then(|(_, root)| *root)
    }
}

impl Verifier<'_> {
    pub(super) fn snapshots(&self) -> Result<InScope> {
        let (vms, one) = match self.options.scope {
            Scope::All => (self.manifests.vms()?, None),
            Scope::Vm(vm) => (vec![vm], None),
            Scope::Snapshot(key) => (Vec::new(), Some(key)),
        };
        Ok(InScope { manifests: self.manifests.clone(), vms: vms.into_iter(), one, current: None })
    }

    /// The manifest at a key, from either copy; what is wrong was said before.
    pub(super) fn committed(&self, key: &SnapshotKey) -> Result<Option<Manifest>> {
        match self.manifests.read(key) {
            Ok(Record::Manifest(manifest)) => Ok(Some(*manifest)),
            Ok(Record::Tombstone(_)) => Ok(None),
            Err(error) if is_damage(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn check_manifests(&mut self) -> Result<()> {
        let mut list = self.snapshots()?;
        let mut before = Before::default();
        while let Some(key) = list.next()? {
            self.progress("snapshots", self.report.snapshots)?;
            let Some(Record::Manifest(manifest)) = self.check_record(&key)? else { continue };
            self.report.snapshots += 1;
            for disk in &manifest.disks {
                let old = before.root(manifest.vm, disk.uuid);
                self.check_recipe(&manifest, disk, old)?;
            }
            let disks = manifest.disks.iter().map(|disk| (disk.uuid, disk.root)).collect();
            before = Before { vm: Some(manifest.vm), disks };
        }
        if self.options.scope == Scope::All {
            self.check_copies()?;
        }
        Ok(())
    }

    /// Reads both copies of a record; makes the second one if a crash kept it from being made.
    fn check_record(&mut self, key: &SnapshotKey) -> Result<Option<Record>> {
        let first = self.readable(&key.manifest(), self.manifests.read_first(key))?;
        let copy = match self.manifests.read_copy(key) {
            Err(error) if error.kind() == Kind::NotFound && first.is_some() => {
                self.manifests.heal_copy(key)?;
                let message = "the second copy was missing, after a crash, and is there now";
                self.tell(&Event::Note { object: key.copy(), message: message.into() })?;
                None
            }
            copy => self.readable(&key.copy(), copy)?,
        };
        if let (Some(first), Some(copy)) = (&first, &copy)
            && first != copy
        {
            self.problem("manifest", &key.copy(), "the two copies of the manifest differ")?;
        }
        Ok(first.or(copy))
    }

    fn readable(&mut self, object: &str, record: Result<Record>) -> Result<Option<Record>> {
        match record {
            Ok(record) => Ok(Some(record)),
            Err(error) => {
                self.problem("manifest", object, &error.to_string())?;
                Ok(None)
            }
        }
    }

    /// A copy proves a commit: its first must be there.
    fn check_copies(&mut self) -> Result<()> {
        for vm in self.manifests.vms_with_copies()? {
            let (mut copies, mut firsts) =
                (self.manifests.list_copies(vm)?, self.manifests.list(vm)?);
            let mut first = firsts.next_key()?;
            while let Some(copy) = copies.next_key()? {
                while first.is_some_and(|first| first < copy) {
                    first = firsts.next_key()?;
                }
                if first != Some(copy) {
                    let message = "the manifest is gone, only its second copy is there";
                    self.problem("manifest", &copy.manifest(), message)?;
                }
            }
        }
        Ok(())
    }

    /// Walks what `old`, the same disk's tree in the snapshot before, does not share.
    fn check_recipe(
        &mut self,
        manifest: &Manifest,
        disk: &Disk,
        old: Option<NodeRef>,
    ) -> Result<()> {
        let name = format!("{}@{} {}", manifest.vm_name, manifest.snapshot, disk.name);
        let shape = disk.shape(self.store.block_size());
        let recipe = match RecipeReader::new(self.store.directories().clone(), disk.root, shape) {
            Ok(recipe) => recipe,
            Err(error) => return self.problem("recipe", &name, &error.to_string()),
        };
        recipe.visit_new(old, &mut |node, blocks, read| match read {
            Ok(runs) => self.note_node(node, runs),
            Err(error) => self.bad_node(&name, node, &blocks, &error),
        })
    }

    fn note_node(&mut self, node: &NodeRef, runs: &[Run]) -> Result<()> {
        self.report.nodes += 1;
        self.refer(node.address, 1, true)?;
        for run in runs {
            if let Placement::At(first) = run.placement {
                self.report.runs += 1;
                // A run is within a segment.
                self.refer(first, run.count as u16, false)?;
            }
        }
        Ok(())
    }

    fn bad_node(
        &mut self,
        name: &str,
        node: &NodeRef,
        blocks: &Range<u64>,
        error: &Error,
    ) -> Result<()> {
        let size = u64::from(self.store.block_size());
        let (from, to) = (blocks.start * size, blocks.end * size);
        self.problem("recipe", name, &format!("bytes {from} to {to} are unknown: {error}"))?;
        if is_damage(error) {
            let (container, slot) = (node.address.container, node.address.slot.0);
            self.damaged(container, slot, 1, &error.to_string())?;
        }
        Ok(())
    }
}

impl Reference {
    /// For messages.
    pub(super) fn what(&self) -> &'static str {
        if self.node { "a recipe node" } else { "blocks" }
    }
}
