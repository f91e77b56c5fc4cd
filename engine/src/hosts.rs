//! What a host says of itself to people, on its own and on any other host.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::session::Context;

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
    /// `here`, `answers` or `silent`; what follows is only known of one that is not silent.
    pub state: String,
    /// Its engine's version.
    pub version: String,
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

/// What is known of all hosts, the own one first; nobody is asked.
#[must_use]
pub fn known(context: &Context) -> Vec<HostReport> {
    let Some(cluster) = context.owners.cluster() else {
        let alone = HostReport { name: context.host.clone(), capacity: 1, ..HostReport::default() };
        return vec![HostReport { slices: crate::ids::Slice::COUNT, ..alone }];
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
    use std::sync::atomic::Ordering::Relaxed;
    let figures = context.owners.figures();
    let cluster = context.owners.cluster();
    let known = known(context).into_iter().next().unwrap_or_default();
    Ok(HostReport {
        filling: cluster.map_or(0, |cluster| cluster.filling()),
        state: "here".into(),
        version: env!("CARGO_PKG_VERSION").into(),
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
    crate::ids::Slice::all().map(owner).collect()
}
