//! What needs both the store and the index: refill at the start, rebuild, verify; and
//! restore, which notes the damage that it meets.

use crate::detect::{Detector, Watermark};
use crate::error::{Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint};
use crate::jobs::restore::{Options, Outcome, Restorer, Sink};
use crate::session::Context;
use crate::store::Store;
use crate::store::container::{ContainerKind, SlotInfo};
use crate::store::journal::Position;
use crate::store::manifest::{Disk, Manifest};
use crate::store::recipe::RecipeReader;

/// Restores with this engine's means.
#[must_use]
pub fn restorer(context: &Context) -> Restorer {
    Restorer {
        directories: context.store.directories().clone(),
        pool: context.store.pool().clone(),
        damage: context.damage.map(),
        scratch: context.work_dir.clone(),
        block_size: context.store.block_size(),
    }
}

/// Restores a disk into `sink`. Damage that it meets is recorded, so that the next backup
/// reads these ranges again.
///
/// # Errors
/// Those of [`Restorer::restore`].
pub fn restore(
    context: &Context,
    disk: &Disk,
    what: &str,
    options: Options,
    sink: &mut Sink<'_>,
) -> Result<Outcome> {
    let outcome = restorer(context).restore(disk, options, sink);
    if let Ok(outcome) = &outcome
        && let Err(error) = context.damage.record(&context.store, &outcome.found)
    {
        eprintln!("fleece-engine: damage met by the restore of {what} is not recorded: {error}");
    }
    outcome
}

/// Learns what the journals list after the index's watermark.
///
/// # Errors
/// When the journals cannot be read or the index cannot be written. A damaged container
/// is passed over: nothing is deduplicated against it.
pub fn refill(store: &Store, detector: &mut Detector, after: &Watermark) -> Result<()> {
    each_container(store, after, &mut |position, mut entries| {
        detector.learn(&mut entries, crate::session::position(position))?;
        while detector.maintain()? {}
        Ok(())
    })
}

/// Builds the index anew, while backups go on with the present one.
///
/// # Errors
/// When the journals cannot be read or the index cannot be written.
pub fn rebuild_index(context: &Context, emit: &mut dyn FnMut(String) -> Result<()>) -> Result<u64> {
    let mut rebuild = context.owner.begin_rebuild()?;
    let mut watermark = Watermark::default();
    let mut containers = 0_u64;
    each_container(&context.store, &Watermark::default(), &mut |at, entries| {
        let at = crate::session::position(at);
        watermark.raise(at.incarnation, at.n);
        containers += 1;
        if containers.is_multiple_of(PROGRESS_CONTAINERS) {
            let line = serde_json::json!({ "message_type": "progress", "containers": containers });
            emit(line.to_string())?;
        }
        rebuild.feed(&entries)
    })?;
    let rebuilt = rebuild.build(watermark)?;
    let entries = rebuilt.entries();
    context.owner.install(rebuilt)?;
    Ok(entries)
}

/// Between two lines of progress: some seconds.
const PROGRESS_CONTAINERS: u64 = 500;

/// What the containers of blocks that are journaled after a watermark hold, one container
/// at a time: at most 65,535 entries.
fn each_container(
    store: &Store,
    after: &Watermark,
    each: &mut dyn FnMut(Position, Vec<(Fingerprint, Address)>) -> Result<()>,
) -> Result<()> {
    let journals = store.journals();
    for incarnation in journals.incarnations()? {
        let from = u32::try_from(after.get(incarnation)).unwrap_or(u32::MAX);
        journals.each_after(incarnation, from, |position, containers| {
            let mut entries = Vec::new();
            for entry in containers.iter().filter(|e| e.kind == ContainerKind::Blocks) {
                if let Err(error) = read_entries(store, entry.container, &mut entries) {
                    match error.kind() {
                        Kind::Damaged | Kind::NotFound => {
                            eprintln!("fleece-engine: {error}; nothing is deduplicated against it");
                        }
                        _ => return Err(error),
                    }
                }
            }
            each(position, entries)
        })?;
    }
    Ok(())
}

fn read_entries(
    store: &Store,
    container: ContainerId,
    entries: &mut Vec<(Fingerprint, Address)>,
) -> Result<()> {
    let before = entries.len();
    let read = store.directories().each_slot(container, |slot, info| {
        if let SlotInfo::Present(fingerprint) = info {
            entries.push((fingerprint, Address { container, slot }));
        }
        Ok(())
    });
    if read.is_err() {
        entries.truncate(before);
    }
    read
}

/// The snapshots of a VM (name or UUID), or of all for "", oldest first; the newest
/// `limit` of each VM.
///
/// # Errors
/// [`Kind::NotFound`] for an unknown VM; when the store cannot be read.
pub fn snapshots(context: &Context, which: &str, limit: usize) -> Result<Vec<Manifest>> {
    let manifests = &context.manifests;
    let vms = if which.is_empty() { manifests.vms()? } else { vec![manifests.find_vm(which)?] };
    let mut found = std::collections::VecDeque::new();
    for vm in vms {
        let mut all = manifests.list(vm)?;
        while let Some(record) = all.next()? {
            if found.len() == limit {
                found.pop_front();
            }
            found.push_back(record);
        }
    }
    Ok(found.into())
}

/// Whether something that this snapshot needs is known to be damaged, or cannot be read.
#[must_use]
pub fn is_damaged(context: &Context, manifest: &Manifest) -> bool {
    let damage = context.damage.map();
    if damage.is_empty() {
        return false;
    }
    manifest.disks.iter().any(|disk| {
        let shape = disk.shape(context.store.block_size());
        RecipeReader::new(context.store.directories(), disk.root, shape)
            .and_then(|reader| damage.forced_ranges(&reader))
            .map_or(true, |ranges| !ranges.is_empty())
    })
}

/// What the store takes and holds.
#[derive(Default)]
pub struct Usage {
    #[allow(missing_docs)]
    pub logical_bytes: u64,
    #[allow(missing_docs)]
    pub stored_bytes: u64,
    #[allow(missing_docs)]
    pub snapshots: u64,
    #[allow(missing_docs)]
    pub vms: u64,
    #[allow(missing_docs)]
    pub undetected_bytes: u64,
}
/// temp
pub fn usage(context: &Context) -> Result<Usage> {
    let mut u = Usage::default();
    context.store.objects().list("", |_, n| {
        u.stored_bytes += n;
        Ok(())
    })?;
    for vm in context.manifests.vms()? {
        let before = u.snapshots;
        let mut all = context.manifests.list(vm)?;
        while let Some(m) = all.next()? {
            u.snapshots += 1;
            u.logical_bytes += m.disks.iter().map(|d| d.size).sum::<u64>();
            u.undetected_bytes += m.counts.undetected;
        }
        if u.snapshots > before {
            u.vms += 1;
        }
    }
    Ok(u)
}
/// temp
pub fn verify(
    _c: &Context,
    _vm: &str,
    _s: &str,
    _now: i64,
    _emit: &mut dyn FnMut(String) -> Result<()>,
) -> Result<bool> {
    Ok(true)
}
