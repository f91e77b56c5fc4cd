//! Filling the index for what this host comes to own, while everything else goes on.

use std::time::Duration;

use crate::session::Context;
use crate::upkeep;

/// All hosts look for a new map every second: this long after we have it, whoever does not go by it yet
/// is not among the living, and what was stored by an older one is in the journals.
pub const SETTLE: Duration = Duration::from_secs(3);
/// Before what failed is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// Does that whenever the part of this host changes, until the engine ends. Blocks.
pub fn keep_filled(context: &Context, settle: Duration) {
    let Some(cluster) = context.owners.cluster() else { return };
    while let Some(map) = cluster.next_move(settle) {
        let (us, epoch) = (cluster.us(), map.epoch());
        let part = map.slices(us).digest();
        let owns = |fingerprint: &_| map.owner(fingerprint) == us;
        let filled = upkeep::rebuild_index_for(context, part, &owns)
            .and_then(|entries| cluster.filled(epoch).map(|()| entries));
        match filled {
            Ok(entries) => {
                eprintln!("fleece-engine: the index has {entries} blocks, by map {}", epoch.0);
            }
            Err(error) => {
                eprintln!("fleece-engine: the index is not filled yet: {error}");
                cluster.not_filled(&error);
                std::thread::park_timeout(AGAIN);
            }
        }
    }
}
