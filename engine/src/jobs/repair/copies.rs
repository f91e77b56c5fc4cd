//! Good copies of what is lost, found in the directories of all containers.

use std::collections::HashMap;

use super::container::fingerprint;
use crate::error::Result;
use crate::ids::{Address, Fingerprint};
use crate::jobs::restore::is_damage;
use crate::store::Store;
use crate::store::container::{ContainerKind, SlotInfo};
use crate::store::damage::DamageMap;
use crate::store::names;

/// What is looked for, and where it was found.
#[derive(Default)]
pub(super) struct Copies {
    found: HashMap<(ContainerKind, Fingerprint), Option<Address>>,
}

impl Copies {
    /// Looks for this from now on.
    pub(super) fn want(&mut self, kind: ContainerKind, fingerprint: Fingerprint) {
        self.found.entry((kind, fingerprint)).or_default();
    }

    /// How many are looked for.
    pub(super) fn len(&self) -> usize {
        self.found.len()
    }

    /// Where one was found.
    pub(super) fn get(&self, kind: ContainerKind, fingerprint: Fingerprint) -> Option<Address> {
        self.found.get(&(kind, fingerprint)).copied().flatten()
    }

    /// Sweeps all directories; of each copy the first that is not marked is taken. No index is
    /// needed, and none is believed.
    pub(super) fn find(&mut self, store: &Store, damage: &DamageMap) -> Result<()> {
        let mut missing = self.found.len();
        store.objects().list(names::CONTAINERS, |key, _| {
            let Some((container, _)) = names::parse_container(key) else { return Ok(()) };
            if missing == 0 {
                return Ok(());
            }
            let swept = self.sweep(store, damage, container);
            match swept {
                Ok(found) => missing -= found,
                Err(error) if is_damage(&error) => {}
                Err(error) => return Err(error),
            }
            Ok(())
        })
    }

    fn sweep(
        &mut self,
        store: &Store,
        damage: &DamageMap,
        container: crate::ids::ContainerId,
    ) -> Result<usize> {
        let directories = store.directories();
        let Some(summary) = directories.summary(container)? else { return Ok(0) };
        let mut count = 0;
        directories.each_slot(container, |slot, info| {
            let address = Address { container, slot };
            if let SlotInfo::Present(fingerprint) = info
                && let Some(found @ None) = self.found.get_mut(&(summary.kind, fingerprint))
                && !damage.has(address)
            {
                *found = Some(address);
                count += 1;
            }
            Ok(())
        })?;
        Ok(count)
    }

    /// Reads a copy and makes sure that it is one; forgets it if it is not.
    pub(super) fn read(
        &mut self,
        store: &Store,
        kind: ContainerKind,
        wanted: Fingerprint,
    ) -> Result<Option<Vec<u8>>> {
        let Some(address) = self.get(kind, wanted) else { return Ok(None) };
        let read = match kind {
            ContainerKind::Blocks => {
                let mut block = vec![0; store.block_size() as usize];
                store.directories().read_block(address, &mut block).map(|()| block)
            }
            ContainerKind::Nodes => store.directories().read_node(address),
        };
        match read {
            Ok(bytes) if fingerprint(store, kind, &bytes) == wanted => return Ok(Some(bytes)),
            Ok(_) => {}
            Err(error) if is_damage(&error) => {}
            Err(error) => return Err(error),
        }
        self.found.insert((kind, wanted), None);
        Ok(None)
    }
}
