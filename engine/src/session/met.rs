//! Damage that a session meets: recorded, so that whoever comes next knows of it.

use super::stages::Session;
use crate::error::{Error, Kind};
use crate::ids::Address;
use crate::store::container::Directories;
use crate::store::damage::Found;
use crate::store::recipe::{Lost, RecipeReader};

/// Finds that are kept until they are recorded; beyond, `verify` finds the rest.
const KEPT: usize = 1024;

/// What was found and is not recorded yet.
#[derive(Default)]
pub(super) struct Met {
    found: Vec<Found>,
}

impl Met {
    /// A slot cannot be looked up: what is lost with it is marked, and not looked up again.
    pub(super) fn note(&mut self, directories: &Directories, address: Address, error: &Error) {
        self.add(Found::around(directories, address, &error.to_string()));
    }

    /// A node of a recipe cannot be read.
    pub(super) fn note_node(&mut self, lost: &Lost) {
        if matches!(lost.error.kind(), Kind::Damaged | Kind::NotFound) {
            let address = lost.node.address;
            self.add(Found {
                container: address.container,
                slots: (address.slot.0, 1),
                how: lost.error.to_string(),
            });
        }
    }

    fn add(&mut self, found: Found) {
        let has = |(first, count): (u16, u16), other: (u16, u16)| {
            first <= other.0 && other.0 + other.1 <= first + count
        };
        let known =
            |before: &Found| before.container == found.container && has(before.slots, found.slots);
        if self.found.len() < KEPT && !self.found.iter().any(known) {
            self.found.push(found);
        }
    }
}

impl Session {
    /// Records what was met. A store that cannot be written fails the backup elsewhere.
    pub(super) fn record_met(&mut self) {
        if self.met.found.is_empty() {
            return;
        }
        let found = std::mem::take(&mut self.met.found);
        let who = format!("the backup {}@{}", self.request.vm_name, self.snapshot);
        self.context.damage.met(&self.context.store, &found, &who);
    }

    /// A recipe could not be changed, because a node of it is damaged that nobody had marked:
    /// all such nodes are marked, so that the next backup, by whatever engine, reads what is
    /// below them again and builds them anew.
    pub(super) fn recipe_is_lost(&mut self) {
        self.context.registry.mistrust(self.request.vm);
        for state in &self.disks {
            for (root, shape) in
                [(state.root, state.shape), (state.parent_root, state.parent_shape)]
            {
                let nodes = self.context.store.directories();
                let Ok(recipe) = RecipeReader::new(nodes, root, shape) else { continue };
                let mut runs = recipe.all_runs().tolerant();
                while let Ok(Some(_)) = runs.next() {
                    runs.take_lost().iter().for_each(|lost| self.met.note_node(lost));
                }
                runs.take_lost().iter().for_each(|lost| self.met.note_node(lost));
            }
        }
    }
}
