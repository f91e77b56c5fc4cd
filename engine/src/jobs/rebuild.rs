//! What the index can be rebuilt from: every block that stands in a container's directory.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint, Incarnation};
use crate::jobs::journals::walk;
use crate::sort::{Sorted, Sorter};
use crate::store::Store;
use crate::store::container::{ContainerKind, SlotInfo};
use crate::store::damage::DamageMap;
use crate::store::journal::Position;
use crate::store::names;

/// Memory of the sort of container ids: more than 60,000 containers (1 TiB) spill.
const SORT_BYTES: usize = 512 << 10;
/// Entries of a batch: 32 bytes each.
const BATCH: usize = 4096;

/// Takes what directories say.
pub type Entries<'e> = dyn FnMut(&[(Fingerprint, Address)]) -> Result<()> + 'e;

/// What was read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rebuilt {
    /// Blocks that are there and sound.
    pub entries: u64,
    /// Containers of blocks.
    pub containers: u64,
    /// How far each incarnation's journal was read: what the index has now seen.
    pub watermark: Vec<Position>,
    /// Containers that are recorded and cannot be read, or journal entries; each is a message.
    pub problems: Vec<String>,
}

/// Problems that are kept: more than these are one problem, and `verify` lists them all.
const MAX_PROBLEMS: usize = 100;

/// Calls `each` with every sound block of every container of blocks that was recorded after
/// `after` (nothing: from the beginning), in batches. Dead, forwarded and damaged slots are
/// passed over; so is, with a message, what is damaged: an index without it only costs space.
///
/// # Errors
/// When the store cannot be read, or the first of `each`.
pub fn each_entry(
    store: &Store,
    damage: &DamageMap,
    scratch: &Path,
    after: &[Position],
    each: &mut Entries<'_>,
) -> Result<Rebuilt> {
    let mut rebuilt = Rebuilt::default();
    let mut containers = recorded(store, scratch, after, &mut rebuilt)?;
    let mut batch = Vec::with_capacity(BATCH);
    let mut last = None;
    while let Some(record) = containers.next()? {
        let id = read_id(&record);
        if last.replace(id) == Some(id) {
            continue; // Rewritten: recorded once for every generation.
        }
        match read_container(store, damage, id, &mut batch, each) {
            Ok(count) => {
                rebuilt.containers += 1;
                rebuilt.entries += count;
            }
            // What cannot be read now, but later: whoever takes the index for whole would miss it for ever.
            Err(Failure::Store(error))
                if matches!(error.kind(), Kind::Failed | Kind::NotPermitted | Kind::Busy) =>
            {
                return Err(error);
            }
            Err(Failure::Store(error)) => rebuilt.problem(&error),
            Err(Failure::Callback(error)) => return Err(error),
        }
    }
    if !batch.is_empty() {
        each(&batch)?;
    }
    Ok(rebuilt)
}

impl Rebuilt {
    fn problem(&mut self, error: &Error) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(error.to_string());
        }
    }
}

/// Whose error it is.
enum Failure {
    Store(Error),
    Callback(Error),
}

fn read_container(
    store: &Store,
    damage: &DamageMap,
    id: ContainerId,
    batch: &mut Vec<(Fingerprint, Address)>,
    each: &mut Entries<'_>,
) -> std::result::Result<u64, Failure> {
    let (mut count, mut failed) = (0, None);
    match store.directories().summary(id).map_err(Failure::Store)? {
        Some(summary) if summary.kind == ContainerKind::Blocks => {}
        Some(_) => return Ok(0),
        None => {
            let message = format!("the container {id} is recorded and not in the store");
            return Err(Failure::Store(Error::new(Kind::NotFound, message)));
        }
    }
    let read = store.directories().each_slot(id, |slot, info| {
        let address = Address { container: id, slot };
        if let SlotInfo::Present(fingerprint) = info
            && !damage.has(address)
        {
            batch.push((fingerprint, address));
            count += 1;
            if batch.len() == BATCH {
                let full = each(batch);
                batch.clear();
                if let Err(error) = full {
                    failed = Some(error);
                    return Err(Error::new(Kind::Failed, "stopped"));
                }
            }
        }
        Ok(())
    });
    match (failed, read) {
        (Some(error), _) => Err(Failure::Callback(error)),
        (None, Err(error)) => Err(Failure::Store(error)),
        (None, Ok(())) => Ok(count),
    }
}

/// The recorded containers of blocks, sorted; a container stands once for every record.
fn recorded(
    store: &Store,
    scratch: &Path,
    after: &[Position],
    rebuilt: &mut Rebuilt,
) -> Result<Sorted<8>> {
    let mut sorter = Sorter::new(scratch, SORT_BYTES);
    let mut gaps = false;
    for incarnation in store.journals().incarnations()? {
        let seen = after.iter().find(|position| position.incarnation == incarnation);
        let from = seen.map_or(0, |position| position.n);
        let n = walk(store, incarnation, from, &mut |_, read| match read {
            Ok(entries) => {
                let blocks = entries.iter().filter(|entry| entry.kind == ContainerKind::Blocks);
                blocks.map(|entry| id_bytes(entry.container)).try_for_each(|id| sorter.push(&id))
            }
            Err(error) => {
                rebuilt.problem(&error);
                gaps = true;
                Ok(())
            }
        })?;
        rebuilt.watermark.push(Position { incarnation, n });
    }
    if gaps {
        // What the lost entries recorded can only be told from the objects themselves.
        listed(store, &mut sorter)?;
    }
    sorter.finish()
}

/// The containers that objects' keys name, of whatever kind.
fn listed(store: &Store, sorter: &mut Sorter<8>) -> Result<()> {
    store.objects().list(names::CONTAINERS, |key, _| match names::parse_container(key) {
        Some((last, _)) => sorter.push(&id_bytes(last)),
        None => Ok(()),
    })
}

/// A container's id so that byte order is its order.
pub(in crate::jobs) fn id_bytes(id: ContainerId) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&id.incarnation.0.to_be_bytes());
    bytes[4..].copy_from_slice(&id.counter.to_be_bytes());
    bytes
}

pub(in crate::jobs) fn read_id(bytes: &[u8; 8]) -> ContainerId {
    let [a, b, c, d, e, f, g, h] = *bytes;
    ContainerId {
        incarnation: Incarnation(u32::from_be_bytes([a, b, c, d])),
        counter: u32::from_be_bytes([e, f, g, h]),
    }
}
