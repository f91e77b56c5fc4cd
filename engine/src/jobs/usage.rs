//! What the store holds, by streaming listings.

use serde::Serialize;

use crate::error::{Kind, Result};
use crate::store::Store;
use crate::store::commit::Manifests;

/// The store's numbers that need no index.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Usage {
    /// Sizes of all disks of all snapshots.
    pub logical_bytes: u64,
    /// Committed snapshots.
    pub snapshots: u64,
    /// VMs with a snapshot.
    pub vms: u64,
    /// All objects of the store.
    pub stored_bytes: u64,
    /// Bytes of disk that were stored although they may have been there already.
    pub undetected: u64,
}

/// Counts; a manifest that is damaged is left out.
///
/// # Errors
/// When the store cannot be listed.
pub fn usage(store: &Store, manifests: &Manifests) -> Result<Usage> {
    let mut usage = Usage::default();
    store.objects().list("", |_, size| {
        usage.stored_bytes += size;
        Ok(())
    })?;
    for vm in manifests.vms()? {
        let before = usage.snapshots;
        let mut snapshots = manifests.list(vm)?;
        loop {
            match snapshots.next() {
                Ok(None) => break,
                Ok(Some(manifest)) => {
                    usage.snapshots += 1;
                    usage.undetected += manifest.counts.undetected;
                    for disk in &manifest.disks {
                        usage.logical_bytes = usage.logical_bytes.saturating_add(disk.size);
                    }
                }
                Err(error) if error.kind() == Kind::Damaged => {}
                Err(error) => return Err(error),
            }
        }
        usage.vms += u64::from(usage.snapshots > before);
    }
    Ok(usage)
}
