//! What the plugin and the engine tell each other, free of the wire's types.

use std::fmt;

use serde::Serialize;
use uuid::Uuid;

/// Six characters that name a snapshot among those of its VM.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct SnapshotId(pub String);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What `hello` told us about the engine and its store.
#[derive(Clone, Debug)]
pub struct EngineInfo {
    /// The engine's version.
    pub version: String,
    /// The store's id; part of our bitmaps' names.
    pub store: Uuid,
    /// Bytes of a block.
    pub block_size: u32,
    /// Bytes of a segment.
    pub segment_size: u32,
    /// SHA-1's state after the secret.
    pub fingerprint_state: [u32; 5],
    /// The engine's host.
    pub host: String,
    /// Whether the store is encrypted.
    pub encrypted: bool,
    /// Whether files may be handed over to it.
    pub takes_files: bool,
}

/// What became of a snapshot that a dirty bitmap names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It can be restored: its bitmap is the newest.
    Committed,
    /// It will never exist: its bitmap must be merged back.
    Ended,
}

/// A disk of a snapshot.
#[derive(Clone, Debug, Serialize)]
pub struct Disk {
    /// Its identity within the VM.
    pub uuid: Uuid,
    /// Its label, `vda`.
    pub name: String,
    /// Bytes.
    pub size: u64,
}

/// Bytes of disk, each byte read in one of them; `stored` is after compression.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Counts {
    /// Read from the source, zeros included.
    pub read: u64,
    /// Nothing but zeros.
    pub zero: u64,
    /// Equal to the parent snapshot at the same place.
    pub unchanged: u64,
    /// Found in the store.
    pub duplicate: u64,
    /// Stored by this backup.
    pub new: u64,
    /// What `new` became on disk.
    pub stored: u64,
    /// Stored again because another writer was silent.
    pub undetected: u64,
}

/// One committed point in time of a VM.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// Its id among those of the VM.
    pub id: SnapshotId,
    /// The VM.
    pub vm: Uuid,
    /// The VM's label.
    pub vm_name: String,
    /// The point in time, Unix milliseconds.
    pub time_ms: i64,
    /// The snapshot that it was an increment to.
    pub parent: Option<SnapshotId>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// What its backup counted.
    pub counts: Counts,
    /// Where it was made.
    pub host: String,
    /// How long its backup took, milliseconds.
    pub duration_ms: u64,
    /// Whether some of its data is known to be damaged.
    pub damaged: bool,
}

/// What we want to back up.
#[derive(Clone, Debug)]
pub struct BackupRequest {
    /// The VM.
    pub vm: Uuid,
    /// Its label.
    pub vm_name: String,
    /// Take over the snapshots of `vm` although its name was another.
    pub adopt: bool,
    /// Its disks, in the order of all later calls.
    pub disks: Vec<DiskRequest>,
    /// The VM's configuration (at most 256 KiB).
    pub config: Vec<u8>,
    /// `QEMU 7.2.22`.
    pub hypervisor: String,
}

/// A disk that we want to back up.
#[derive(Clone, Debug)]
pub struct DiskRequest {
    /// Its identity within the VM.
    pub uuid: Uuid,
    /// Its label.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The snapshot that its valid dirty bitmap names; none for a full read.
    pub parent: Option<SnapshotId>,
}

/// What the engine admits.
#[derive(Clone, Debug)]
pub struct BackupPlan {
    /// The id that the snapshot will have.
    pub snapshot: SnapshotId,
    /// One for each disk of the request.
    pub disks: Vec<DiskPlan>,
    /// Bytes of reads that may be in flight.
    pub in_flight: u32,
    /// Bytes of read blocks that may be kept instead of being read again.
    pub cache: u32,
}

/// How a disk is to be read.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    /// Only what is dirty.
    pub incremental: bool,
    /// Why not, where a parent was asked for and refused.
    pub reason: String,
    /// Damaged in the parent: to be read though the bitmap is clean.
    pub forced: Vec<Range>,
}

/// Bytes of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// A disk of the request, by its place there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DiskIndex(pub u16);

/// A run of blocks, all zero or all data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockExtent {
    /// Its first block.
    pub first: u64,
    /// Blocks.
    pub blocks: u32,
    /// Nothing but zeros.
    pub zero: bool,
}

/// Blocks that are ours to write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    /// Which disk.
    pub disk: DiskIndex,
    /// The first block.
    pub first: u64,
    /// Blocks.
    pub blocks: u32,
}

/// A run of bytes of a stored disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ImageExtent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Nothing but zeros.
    pub zero: bool,
}

/// What the engine and its store hold.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The engine's version.
    pub version: String,
    /// The engine's host.
    pub host: String,
    /// Where the store is.
    pub store: String,
    /// The store's id.
    pub store_id: Uuid,
    /// Whether the store is encrypted.
    pub encrypted: bool,
    /// Sizes of all disks of all snapshots.
    pub logical_bytes: u64,
    /// Distinct fingerprints.
    pub unique_blocks: u64,
    /// Their bytes before compression.
    pub unique_bytes: u64,
    /// The store's objects, all of them.
    pub stored_bytes: u64,
    /// Committed snapshots.
    pub snapshots: u64,
    /// VMs that have one.
    pub vms: u64,
    /// The local index.
    pub index_bytes: u64,
    /// What the engine may use.
    pub memory_budget: u64,
    /// Most anonymous memory that it was seen to use.
    pub peak_anonymous: u64,
    /// Blocks stored twice because a writer was silent.
    pub undetected_blocks: u64,
    /// Blocks known to be damaged.
    pub damaged_blocks: u64,
    /// Backups that run.
    pub sessions: Vec<SessionStatus>,
}

/// A backup that runs.
#[derive(Clone, Debug, Serialize)]
pub struct SessionStatus {
    /// The VM.
    pub vm: Uuid,
    /// Its label.
    pub vm_name: String,
    /// The id that the snapshot will have.
    pub snapshot: SnapshotId,
    /// What it does at the moment.
    pub stage: String,
    /// What it counted so far.
    pub counts: Counts,
    /// Since it began, milliseconds.
    pub age_ms: u64,
    /// Blocks whose fingerprint was asked.
    pub requested: u64,
}
