//! Which snapshots damage touches, and where.

use serde::Serialize;

use crate::error::Result;
use crate::ids::VmId;
use crate::store::Store;
use crate::store::damage::DamageMap;
use crate::store::manifest::Manifest;
use crate::store::recipe::RecipeReader;

/// Ranges of a disk that are named.
const MAX_RANGES: usize = 64;

/// A snapshot's disk that cannot be restored whole.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Affected {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub vm_name: String,
    /// The snapshot.
    pub snapshot: String,
    /// The disk.
    pub disk: String,
    /// Damaged bytes.
    pub bytes: u64,
    /// The first of the damaged ranges: offset and length.
    pub ranges: Vec<(u64, u64)>,
}

/// The disks of a snapshot that damage touches; costs nothing while there is none.
///
/// # Errors
/// When a recipe cannot be read for another reason than damage.
pub fn affected(store: &Store, damage: &DamageMap, manifest: &Manifest) -> Result<Vec<Affected>> {
    let mut affected = Vec::new();
    if damage.is_empty() {
        return Ok(affected);
    }
    for disk in &manifest.disks {
        let shape = disk.shape(store.block_size());
        let ranges = match RecipeReader::new(store.directories().clone(), disk.root, shape) {
            Ok(recipe) => damage.forced_ranges(&recipe)?,
            Err(_) => vec![(0, shape.blocks())],
        };
        if ranges.is_empty() {
            continue;
        }
        let block_size = u64::from(store.block_size());
        let named = ranges.iter().take(MAX_RANGES);
        affected.push(Affected {
            vm: manifest.vm,
            vm_name: manifest.vm_name.clone(),
            snapshot: manifest.snapshot.to_string(),
            disk: disk.name.clone(),
            bytes: ranges.iter().map(|(_, count)| count * block_size).sum(),
            ranges: named.map(|(at, n)| (at * block_size, n * block_size)).collect(),
        });
    }
    Ok(affected)
}
