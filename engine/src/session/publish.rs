//! The end of the way: places into recipes, recipes and the rest into the manifest.

use super::begin::DiskSpec;
use super::lent::LentImage;
use super::spool::Position;
use super::stages::Session;
use super::window::{Placed, Window};
use crate::error::{Error, Kind, Result};
use crate::store::commit::{Commit, Ending, Manifests};
use crate::store::manifest::{Counts, Disk, Manifest};
use crate::store::recipe::{NodeRef, NodeStore, Owed, Placement, RecipeEditor, Shape};

/// A disk of the session on its way into the manifest.
pub(super) struct DiskState {
    pub(super) spec: DiskSpec,
    pub(super) shape: Shape,
    pub(super) incremental: bool,
    /// The parent's recipe of this disk: what is compared with.
    pub(super) parent_root: Option<NodeRef>,
    pub(super) parent_shape: Shape,
    /// The recipe as far as it is built.
    pub(super) root: Option<NodeRef>,
    /// What the windows to come must bring, because nodes of the parent's recipe are lost.
    pub(super) owed: Vec<Owed>,
    /// The block after the last one that the scan reported.
    pub(super) covered: u64,
    /// Where its bytes can be read.
    pub(super) lent: Option<LentImage>,
}

impl DiskState {
    /// A disk of which nothing is known yet, without a parent.
    pub(super) fn new(spec: &DiskSpec, shape: Shape) -> Self {
        DiskState {
            spec: spec.clone(),
            shape,
            incremental: false,
            parent_root: None,
            parent_shape: shape,
            root: None,
            owed: Vec::new(),
            covered: 0,
            lent: None,
        }
    }

    /// Fails where a block before `end` would have to be put for the recipe to be whole.
    fn expect_nothing_before(&mut self, end: u64) -> Result<()> {
        let Some(at) = self.owed.iter().position(|owed| owed.blocks.end <= end) else {
            return Ok(());
        };
        let Owed { blocks, why, .. } = self.owed.swap_remove(at);
        let (first, last) = (blocks.start, blocks.end - 1);
        let disk = &self.spec.name;
        let what = format!(
            "where the blocks {first} to {last} of disk {disk} are is lost, and not all of them were read"
        );
        Err(Error::caused(why.kind(), what, why))
    }
}

/// Puts a settled window into the recipes of its disks.
pub(super) fn place_window<N: NodeStore>(
    window: Window,
    disks: &mut [DiskState],
    nodes: &mut N,
) -> Result<()> {
    let mut placements = window.placements()?;
    let mut next = placements.next()?;
    while let Some((Position { disk, .. }, _)) = next {
        let Some(state) = disks.get_mut(usize::from(disk)) else { break };
        let mut editor = RecipeEditor::new(nodes, state.root, state.shape)?;
        let mut end = 0;
        while let Some((at, placed)) = next.filter(|(at, _)| at.disk == disk) {
            let (count, placement) = match placed {
                Placed::Zero(count) => (count, Placement::Zero),
                Placed::At(address, count) => (count, Placement::At(address)),
            };
            editor.put(at.block, count, placement)?;
            end = at.block + count;
            state.owed.iter_mut().for_each(|owed| owed.pay(at.block..end));
            next = placements.next()?;
        }
        let (root, owed) = editor.finish_part()?;
        state.root = root;
        state.owed.retain(|owed| !owed.is_paid());
        state.owed.extend(owed);
        // Blocks ascend: what is behind us does not come any more.
        state.expect_nothing_before(end)?;
    }
    Ok(())
}

impl Session {
    /// Commits the snapshot: nodes durable, then the manifest, once.
    pub(super) fn commit(
        &mut self,
        point_in_time_ms: i64,
        bitmaps: Vec<String>,
    ) -> Result<Manifest> {
        if !self.scan_ended || !self.windows.is_empty() {
            return Err(Error::new(Kind::Usage, "commit comes before everything was written"));
        }
        for state in &self.disks {
            if !state.incremental && state.covered < state.shape.blocks() {
                return Err(Error::new(
                    Kind::Usage,
                    format!(
                        "disk {} was to be read in full, but ends at block {} of {}",
                        state.spec.name,
                        state.covered,
                        state.shape.blocks()
                    ),
                ));
            }
        }
        let whole =
            self.disks.iter_mut().try_for_each(|state| state.expect_nothing_before(u64::MAX));
        whole.inspect_err(|_| self.recipe_is_lost())?;
        self.seal_nodes()?;
        let manifest = self.manifest(point_in_time_ms, bitmaps);
        if let Err(error) = publish(&self.context.manifests, &manifest) {
            // The create may have gone through although its answer did not.
            match self.end_record("its commit failed") {
                Ok(Ending::AlreadyCommitted) => {}
                Ok(Ending::Tombstoned) => return Err(error),
                Err(_) => {
                    let what = format!(
                        "whether {}@{} is committed is not known; the next backup finds out",
                        manifest.vm_name, manifest.snapshot
                    );
                    return Err(Error::caused(error.kind(), what, error));
                }
            }
        }
        self.over = true;
        self.context.registry.trust(self.request.vm);
        Ok(manifest)
    }

    fn manifest(&self, point_in_time_ms: i64, bitmaps: Vec<String>) -> Manifest {
        let disk = |state: &DiskState| Disk {
            uuid: state.spec.uuid,
            name: state.spec.name.clone(),
            size: state.spec.size,
            root: state.root,
        };
        let request = &self.request;
        Manifest {
            snapshot: self.snapshot,
            vm: request.vm,
            vm_name: request.vm_name.clone(),
            seq: self.seq,
            parent: self.parent,
            point_in_time_ms,
            disks: self.disks.iter().map(disk).collect(),
            bitmaps,
            host: self.context.host.clone(),
            engine: env!("CARGO_PKG_VERSION").into(),
            hypervisor: request.hypervisor.clone(),
            counts: self.counts(),
            duration_ms: self.began.elapsed().as_millis() as u64,
            gc_epoch: 0,
            config: request.config.clone(),
        }
    }

    pub(super) fn counts(&self) -> Counts {
        self.progress.counts()
    }
}

fn publish(manifests: &Manifests, manifest: &Manifest) -> Result<()> {
    match manifests.commit(manifest)? {
        Commit::Committed { warning } => {
            if let Some(warning) = warning {
                eprintln!(
                    "fleece-engine: {}@{} is committed, but without a second copy of its manifest \
                     (verify makes it): {warning}",
                    manifest.vm_name, manifest.snapshot
                );
            }
            Ok(())
        }
        Commit::Tombstoned => Err(Error::new(
            Kind::Failed,
            format!(
                "{}@{} was ended by someone else (abort, or a later backup); nothing is committed",
                manifest.vm_name, manifest.snapshot
            ),
        )),
    }
}
