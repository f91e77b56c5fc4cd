//! What a host says of itself to people, on its own and on any other host.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};

use crate::cluster::map::PartitionMap;
use crate::error::Result;
use crate::ids::{HostId, Slice, VmId};
use crate::session::Context;
use crate::session::registry::{Live, StageName};
use crate::store::StoreLevel;

/// How it is with a host; the same names in `--json`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostReport {
    /// Its name.
    pub name: String,
    /// Its number in the partition map.
    pub number: u16,
    /// Where its engine listens for the others.
    pub address: String,
    /// Its share beside the others'; 0 when it is drained.
    pub capacity: u32,
    /// Slices of the fingerprints that it owns, of 4096.
    pub slices: usize,
    /// Of them those that its index is being filled for.
    pub filling: usize,
    /// `here`, `answers`, `silent` or `revoked`; what follows is only known of one that [`answers`](Self::answers).
    pub state: String,
    /// Its engine's version.
    pub version: String,
    /// The level of the store that it goes by.
    #[serde(default)]
    pub level: StoreLevel,
    /// The newest level that it knows.
    #[serde(default)]
    pub newest_level: StoreLevel,
    /// The encryption key that it seals what is new under.
    #[serde(default)]
    pub key: u32,
    /// All encryption keys that it has: what tells whether another host's are the same.
    #[serde(default)]
    pub keys: BTreeMap<u32, String>,
    /// The partition map that it goes by.
    pub map_epoch: u64,
    /// The one that its index was filled for.
    pub index_epoch: u64,
    /// Distinct blocks in its part of the index.
    pub unique_blocks: u64,
    /// Blocks of it that were found stored a second time.
    pub double_blocks: u64,
    /// Bytes of its index.
    pub index_bytes: u64,
    /// Blocks of it that checkpoints in the store have, for whoever owns its part next.
    #[serde(default)]
    pub checkpointed_blocks: u64,
    /// Backups that run on it.
    pub sessions: usize,
    /// Its engine's memory budget.
    pub memory_budget: u64,
    /// The most anonymous memory that its engine took.
    pub peak_anonymous: u64,
    /// The partitions of its index.
    pub partitions: Vec<PartitionReport>,
}

impl HostReport {
    /// State of a host whose certificate is taken back.
    pub const REVOKED: &str = "revoked";

    /// Whether it said itself how it is.
    #[must_use]
    pub fn answers(&self) -> bool {
        matches!(self.state.as_str(), "here" | "answers")
    }
}

/// How it is with a partition of a host's index.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PartitionReport {
    /// Its number.
    pub partition: u16,
    /// Entries, those that are not sorted in yet by their mean.
    pub entries: u64,
    /// Bytes of its files, likewise.
    pub bytes: u64,
    /// Requests that wait for a pass.
    pub waiting: u64,
    /// Since the last pass, milliseconds; none if there was none.
    pub last_pass_ms: Option<u64>,
}

/// A backup that runs; the same names in `--json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SessionReport {
    /// The host whose engine it runs on.
    pub host: String,
    /// The VM's name.
    pub vm: String,
    /// The VM.
    pub vm_uuid: VmId,
    /// The snapshot it will be.
    pub snapshot: String,
    /// What it is doing.
    pub stage: String,
    /// Since when, milliseconds.
    pub age_ms: u64,
    /// Bytes the scan reported.
    pub read: u64,
    /// Of it zero.
    pub zero: u64,
    /// Of it fingerprinted: all that is not zero.
    pub hashed: u64,
    /// Of it as in the parent.
    pub unchanged: u64,
    /// Of it stored before.
    pub duplicate: u64,
    /// Of it new.
    pub new: u64,
    /// Bytes of containers written.
    pub stored: u64,
    /// Blocks asked about.
    pub requested: u64,
    /// Milliseconds that each stage took so far.
    pub stage_ms: BTreeMap<String, u64>,
}

impl SessionReport {
    fn of(live: &Live, host: &str) -> Self {
        let (progress, counts) = (&live.progress, live.progress.counts());
        let times = progress.stage_times().map(|time| time.as_millis() as u64);
        SessionReport {
            host: host.to_owned(),
            vm: live.vm_name.clone(),
            vm_uuid: live.vm,
            snapshot: live.snapshot.to_string(),
            stage: progress.stage().into(),
            age_ms: live.since.elapsed().as_millis() as u64,
            read: counts.read,
            zero: counts.zero,
            hashed: counts.read.saturating_sub(counts.zero),
            unchanged: counts.unchanged,
            duplicate: counts.duplicate,
            new: counts.new,
            stored: counts.stored,
            requested: progress.requested.load(Relaxed),
            stage_ms: StageName::ALL
                .map(|stage| stage.name().to_owned())
                .into_iter()
                .zip(times)
                .collect(),
        }
    }
}

/// What another map would change; the same names in `--json`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Rebalance {
    /// The map that there is.
    pub map_epoch: u64,
    /// Every host of either map.
    pub hosts: Vec<Share>,
    /// Slices of the fingerprints that another host would own, of 4096.
    pub slices_moving: usize,
    /// Blocks whose entries would be in another host's index then, as far as can be told.
    pub blocks_moving: u64,
}

/// A host's share of the fingerprints, now and then.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Share {
    /// Its name.
    pub name: String,
    /// Its share beside the others' then; 0 when it would own nothing.
    pub capacity: u32,
    /// Slices that it owns.
    pub slices: usize,
    /// Slices that it would own.
    pub slices_then: usize,
    /// Slices that it would get from others.
    pub slices_gained: usize,
    /// Slices that it would give to others.
    pub slices_given: usize,
    /// Blocks in those that it would get, as far as can be told.
    pub blocks_gained: u64,
    /// Blocks in those that it would give.
    pub blocks_given: u64,
}

/// What becomes of everybody's share when the map `now` becomes `then`; blocks are estimated by what
/// the hosts that answer have in their slices: fingerprints fall evenly.
#[must_use]
pub fn rebalance(now: &PartitionMap, then: &PartitionMap, known: &[HostReport]) -> Rebalance {
    let answering = known.iter().filter(|host| host.answers());
    let (blocks, slices) = answering.fold((0_u128, 0_u128), |(blocks, slices), host| {
        (blocks + u128::from(host.unique_blocks), slices + host.slices as u128)
    });
    let blocks_in = |moving: usize| (blocks * moving as u128 / slices.max(1)) as u64;
    let moves: Vec<(HostId, HostId)> = Slice::all()
        .map(|slice| (now.owner_of(slice), then.owner_of(slice)))
        .filter(|(from, to)| from != to)
        .collect();
    let gone = now.members().iter().filter(|member| then.member(member.number).is_none());
    let hosts = then.members().iter().chain(gone).map(|member| {
        let number = member.number;
        let gained = moves.iter().filter(|(_, to)| *to == number).count();
        let given = moves.iter().filter(|(from, _)| *from == number).count();
        Share {
            name: member.name.clone(),
            capacity: then.member(number).map_or(0, |member| member.capacity),
            slices: now.slices(number).len(),
            slices_then: then.slices(number).len(),
            slices_gained: gained,
            slices_given: given,
            blocks_gained: blocks_in(gained),
            blocks_given: blocks_in(given),
        }
    });
    Rebalance {
        map_epoch: now.epoch().0,
        hosts: hosts.collect(),
        slices_moving: moves.len(),
        blocks_moving: blocks_in(moves.len()),
    }
}

/// The backups that run on this host.
#[must_use]
pub fn sessions(context: &Context) -> Vec<SessionReport> {
    let own = known(context).into_iter().next().unwrap_or_default();
    context.registry.list().iter().map(|live| SessionReport::of(live, &own.name)).collect()
}

/// What is known of all hosts, the own one first; nobody is asked.
#[must_use]
pub fn known(context: &Context) -> Vec<HostReport> {
    let Some(cluster) = context.owners.cluster() else {
        let alone = HostReport { name: context.host.clone(), capacity: 1, ..HostReport::default() };
        return vec![HostReport { slices: Slice::COUNT, ..alone }];
    };
    let report = |view: crate::cluster::HostView| HostReport {
        name: view.member.name,
        number: view.member.number.0,
        address: view.member.address,
        capacity: view.member.capacity,
        slices: view.slices,
        state: "silent".into(),
        ..HostReport::default()
    };
    let mut known: Vec<HostReport> = cluster.view().into_iter().map(report).collect();
    known.sort_by_key(|report| (report.number != cluster.us().0, report.number));
    known
}

/// This host. Waits for its owner.
///
/// # Errors
/// When the engine is ending.
pub fn own(context: &Context) -> Result<HostReport> {
    let figures = context.owners.figures();
    let cluster = context.owners.cluster();
    let known = known(context).into_iter().next().unwrap_or_default();
    Ok(HostReport {
        filling: cluster.map_or(0, |cluster| cluster.filling()),
        state: "here".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        level: context.store.agreed().level,
        newest_level: StoreLevel::NEWEST,
        key: context.store.agreed().key.0,
        keys: context.store.sealer().key().checks(),
        map_epoch: cluster.map_or(0, |cluster| cluster.map().epoch().0),
        index_epoch: cluster.map_or(0, |cluster| cluster.index_epoch().0),
        unique_blocks: figures.unique_blocks.load(Relaxed),
        double_blocks: figures.double_blocks.load(Relaxed),
        index_bytes: figures.index_bytes.load(Relaxed),
        checkpointed_blocks: figures.checkpointed_blocks.load(Relaxed),
        sessions: context.registry.list().len(),
        memory_budget: context.budget.total,
        peak_anonymous: crate::memory::peak_anonymous(),
        partitions: context.owners.here().describe()?,
        ..known
    })
}

/// The number of the host that owns each slice.
#[must_use]
pub fn owners(context: &Context) -> Vec<u8> {
    let map = context.owners.cluster().map(|cluster| cluster.map());
    let owner = |slice| map.as_ref().map_or(0, |map| map.owner_of(slice).0 as u8);
    Slice::all().map(owner).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cluster::map::{MapEpoch, Member};

    fn map(epoch: u64, hosts: &[(u16, u32)]) -> PartitionMap {
        let member = |(number, capacity): &(u16, u32)| Member {
            number: HostId(*number),
            name: format!("hv{number}"),
            address: String::new(),
            capacity: *capacity,
        };
        PartitionMap::at(MapEpoch(epoch), hosts.iter().map(member).collect()).unwrap()
    }

    #[test]
    fn what_moves_is_what_one_host_gives_and_others_get() {
        let (now, joined) = (map(3, &[(0, 1), (1, 1)]), map(4, &[(0, 1), (1, 1), (2, 2)]));
        let report = |number: u16, state: &str| HostReport {
            slices: now.slices(HostId(number)).len(),
            unique_blocks: now.slices(HostId(number)).len() as u64 * 10,
            state: state.into(),
            ..HostReport::default()
        };
        // One that is silent says nothing of its blocks: as many as the others' are taken for granted.
        let known = [report(0, "here"), report(1, "silent")];
        let planned = rebalance(&now, &joined, &known);
        let [a, b, c] = &planned.hosts[..] else { panic!("{planned:?}") };
        assert_eq!((planned.map_epoch, planned.slices_moving), (3, joined.slices(HostId(2)).len()));
        assert_eq!(planned.blocks_moving, planned.slices_moving as u64 * 10);
        assert_eq!((c.slices, c.slices_then), (0, planned.slices_moving));
        assert_eq!(a.slices_given + b.slices_given, c.slices_gained);
        assert_eq!((a.slices_gained, b.slices_gained, c.slices_given), (0, 0, 0));
        assert_eq!(a.slices - a.slices_given, a.slices_then);
        assert_eq!(c.blocks_gained, planned.blocks_moving);
        // One that is gone gives all it had; the same map moves nothing.
        let left = rebalance(&joined, &now, &known);
        assert_eq!((left.hosts[2].name.as_str(), left.hosts[2].slices_then), ("hv2", 0));
        assert_eq!(rebalance(&now, &now, &known).slices_moving, 0);
    }

    #[test]
    fn a_map_without_a_host_is_that_of_one_that_is_drained() {
        let all = map(3, &[(0, 1), (1, 1), (2, 2)]);
        assert_eq!(all.without("hv1").unwrap(), map(3, &[(0, 1), (1, 0), (2, 2)]));
        assert!(all.without("hv3").is_err());
        assert!(map(1, &[(0, 1)]).without("hv0").is_err());
    }
}
