//! What is done for the part of a host, beside everything else: the index is filled for what it comes
//! to own, and checkpointed to the store for whoever owns it next.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::cluster::map::PartitionMap;
use crate::cluster::{Cluster, Move};
use crate::error::Result;
use crate::jobs::checkpoint::{Checkpoints, OwnPart};
use crate::session::Context;
use crate::store::shards;
use crate::upkeep;

/// How long is waited for what.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// After a new map: whoever does not go by it then is not among the living, and what was stored by
    /// an older one is in the journals.
    pub settle: Duration,
    /// Between two looks whether a checkpoint is due.
    pub look: Duration,
    /// Entries that a checkpoint is written for, at least.
    pub least: u64,
}

/// All hosts look for a new map every second. What a checkpoint does not have is read from directories,
/// so little of it is not worth an object.
pub const PACE: Pace = Pace {
    settle: Duration::from_secs(3),
    look: Duration::from_secs(10),
    least: shards::PART_ENTRIES as u64,
};
/// Before what failed is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// Does that until the engine ends. Blocks.
pub fn keep_part(context: &Context, pace: Pace) {
    let Some(cluster) = context.owners.cluster() else { return };
    let mut checkpoints = Checkpoints::default();
    while let Some(next) = cluster.next_move(pace.settle, pace.look) {
        match next {
            Move::Fill(map) => fill(context, cluster, &map, &mut checkpoints),
            Move::None => {
                if let Err(error) = checkpoint(context, cluster, pace.least, &mut checkpoints) {
                    eprintln!("fleece-engine: no checkpoint of the index is written: {error}");
                }
            }
        }
    }
}

fn fill(context: &Context, cluster: &Cluster, map: &PartitionMap, checkpoints: &mut Checkpoints) {
    let (us, epoch) = (cluster.us(), map.epoch());
    let still = || cluster.is_still_ours(epoch);
    let filled = upkeep::fill_index(context, &map.slices(us), checkpoints, &still)
        .and_then(|filled| cluster.filled(epoch).map(|()| filled));
    match filled {
        Ok(filled) => eprintln!(
            "fleece-engine: the index has {} blocks, by map {}; {} entries were read from checkpoints",
            filled.entries, epoch.0, filled.from_checkpoints
        ),
        // It is filled for next.
        Err(_) if !still() => {}
        Err(error) => {
            eprintln!("fleece-engine: the index is not filled yet: {error}");
            cluster.not_filled(&error);
            std::thread::park_timeout(AGAIN);
        }
    }
}

/// Writes a checkpoint of our part if it is whole and one is due.
fn checkpoint(
    context: &Context,
    cluster: &Cluster,
    least: u64,
    checkpoints: &mut Checkpoints,
) -> Result<()> {
    let Some(map) = cluster.settled().filter(|_| cluster.is_sure()) else { return Ok(()) };
    let (host, epoch, slices) = (cluster.us(), map.epoch(), map.slices(cluster.us()));
    let part = OwnPart { host, map_epoch: epoch.0, slices: &slices };
    let figures = context.owners.figures();
    let entries = figures.unique_blocks.load(Ordering::Relaxed);
    if !slices.is_empty() && checkpoints.is_due(&context.store, &part, (entries, least))? {
        let now_ms = jiff::Timestamp::now().as_millisecond();
        let still = || cluster.is_still_ours(epoch);
        checkpoints.write(&context.store, context.owners.here(), &part, (now_ms, &still))?;
    }
    figures.checkpointed_blocks.store(checkpoints.written(), Ordering::Relaxed);
    Ok(())
}
