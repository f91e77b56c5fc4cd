//! The manifest: one committed snapshot of a VM; the tombstone: one that will never be.
//!
//! Both are sealed objects of one kind at the commit key. The body is a byte that tells
//! them apart (`M`, `T`), the version 1, the length of a JSON text (u32 little endian), the
//! text, and, of a manifest, the VM's configuration as it was given.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::recipe::{NodeRef, Shape};
use crate::error::{Error, Kind, Result};
use crate::ids::{DiskId, SnapshotId, VmId};

/// The largest VM configuration: a domain XML with NVRAM is below 200 KiB.
pub const MAX_CONFIG: usize = 256 * 1024;
/// Disks of a VM: above QEMU's practical limits, below what would crowd a manifest.
pub const MAX_DISKS: usize = 256;
/// Bytes of a disk: more than any image format holds (qcow2: 64 PiB), and offsets stay far from
/// where they would wrap.
pub const MAX_DISK_SIZE: u64 = 1 << 60;
/// Bytes of a name, a host, a version: a label, not a document.
const MAX_LABEL: usize = 1024;
/// Bytes of the JSON text: 256 disks with all labels at their limit.
const MAX_TEXT: usize = 2 << 20;

const MANIFEST: u8 = b'M';
const TOMBSTONE: u8 = b'T';
const VERSION: u8 = 1;

/// One committed snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Its id, of the session that made it.
    #[serde(with = "id_text")]
    pub snapshot: SnapshotId,
    /// The VM.
    pub vm: VmId,
    /// The VM's name at that time.
    pub vm_name: String,
    /// Ascends with every session of the VM.
    pub seq: u64,
    /// The snapshot that this one was made from, where there was one.
    #[serde(with = "optional_id_text")]
    pub parent: Option<SnapshotId>,
    /// Unix milliseconds.
    pub point_in_time_ms: i64,
    /// The VM's disks.
    pub disks: Vec<Disk>,
    /// Names of the dirty bitmaps that were left in QEMU, in the order of the disks.
    pub bitmaps: Vec<String>,
    /// The host of the engine.
    pub host: String,
    /// The engine's version.
    pub engine: String,
    /// The hypervisor and its version.
    pub hypervisor: String,
    /// What the session did.
    pub counts: Counts,
    /// From the session's start to its commit.
    pub duration_ms: u64,
    /// The epoch of garbage collection that the session began in.
    pub gc_epoch: u64,
    /// The VM's configuration, at most [`MAX_CONFIG`] bytes.
    #[serde(skip)]
    pub config: Vec<u8>,
}

/// A disk in a manifest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// The disk.
    pub uuid: DiskId,
    /// Its name at that time.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The recipe; `None` for a disk of zeros.
    pub root: Option<NodeRef>,
}

impl Disk {
    /// The shape of its recipe.
    #[must_use]
    pub fn shape(&self, block_size: u32) -> Shape {
        Shape::new(self.size, block_size)
    }
}

/// Bytes of disk, each byte read in one of them; `stored` is after compression.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Read from the disks.
    pub read: u64,
    /// Zeros among them.
    pub zero: u64,
    /// As in the parent at the same place.
    pub unchanged: u64,
    /// Stored already.
    pub duplicate: u64,
    /// Stored by this session.
    pub new: u64,
    /// What it added to the store.
    pub stored: u64,
    /// Stored again because another writer was silent.
    pub undetected: u64,
}

/// Says for good that a session will not commit.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Tombstone {
    /// The snapshot that never was.
    #[serde(with = "id_text")]
    pub snapshot: SnapshotId,
    /// The VM.
    pub vm: VmId,
    /// The session's sequence.
    pub seq: u64,
    /// Why, and on whose word.
    pub reason: String,
    /// Unix milliseconds.
    pub time_ms: i64,
}

/// What stands at a commit key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// The snapshot is committed.
    Manifest(Box<Manifest>),
    /// It never will be.
    Tombstone(Tombstone),
}

impl Manifest {
    /// The body to seal.
    ///
    /// # Errors
    /// [`Kind::Usage`] when something in it is beyond its limit.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.check().map_err(|what| {
            Error::new(Kind::Usage, format!("a snapshot of the VM {} {what}", self.vm_name))
        })?;
        encode(MANIFEST, self, &self.config)
    }

    /// The disk that `which` names by UUID or name; "" for the only one.
    ///
    /// # Errors
    /// [`Kind::NotFound`] with the disks that there are.
    pub fn disk(&self, which: &str) -> Result<&Disk> {
        let by_uuid = which.parse().ok().map(|uuid: Uuid| DiskId(uuid));
        let found = match (which, self.disks.as_slice()) {
            ("", [only]) => Some(only),
            _ => self.disks.iter().find(|disk| Some(disk.uuid) == by_uuid || disk.name == which),
        };
        found.ok_or_else(|| {
            let names: Vec<&str> = self.disks.iter().map(|disk| disk.name.as_str()).collect();
            let names = names.join(", ");
            let what = if which.is_empty() {
                format!("has several disks ({names}): say which")
            } else {
                format!("has no disk {which:?}; it has {names}")
            };
            Error::new(Kind::NotFound, format!("{}@{} {what}", self.vm_name, self.snapshot))
        })
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.config.len() > MAX_CONFIG {
            return Err(format!("has a configuration of more than {MAX_CONFIG} bytes"));
        }
        if self.disks.len() > MAX_DISKS || self.bitmaps.len() > MAX_DISKS {
            return Err(format!("has more than {MAX_DISKS} disks or bitmaps"));
        }
        if let Some(disk) = self.disks.iter().find(|disk| disk.size > MAX_DISK_SIZE) {
            return Err(format!("has a disk {} of {} bytes", disk.name, disk.size));
        }
        let labels = [&self.vm_name, &self.host, &self.engine, &self.hypervisor];
        let names = self.disks.iter().map(|disk| &disk.name);
        if let Some(long) =
            labels.into_iter().chain(names).chain(&self.bitmaps).find(|l| l.len() > MAX_LABEL)
        {
            let start: String = long.chars().take(40).collect();
            return Err(format!("has a name of more than {MAX_LABEL} bytes ({start}…)"));
        }
        Ok(())
    }
}

impl Tombstone {
    /// The body to seal.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        encode(TOMBSTONE, self, &[])
    }
}

impl Record {
    /// Reads a body; `name` is the object's, for messages.
    ///
    /// # Errors
    /// [`Kind::Damaged`], or [`Kind::NoStore`] for a newer version.
    pub fn decode(body: &[u8], name: &str) -> Result<Self> {
        let damaged = || Error::new(Kind::Damaged, format!("object {name} is no manifest"));
        let (&[kind, version, a, b, c, d], rest) =
            body.split_first_chunk::<6>().ok_or_else(damaged)?;
        if version != VERSION {
            let message =
                format!("manifest {name} was written by a newer Fleece: upgrade this one");
            return Err(Error::new(Kind::NoStore, message));
        }
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        let (text, config) = rest.split_at_checked(length).ok_or_else(damaged)?;
        let bad =
            |error| Error::caused(Kind::Damaged, format!("object {name} is no manifest"), error);
        match kind {
            MANIFEST => {
                let mut manifest: Manifest = serde_json::from_slice(text).map_err(bad)?;
                manifest.config = config.to_vec();
                manifest.check().map_err(|_| damaged())?;
                Ok(Record::Manifest(Box::new(manifest)))
            }
            TOMBSTONE => Ok(Record::Tombstone(serde_json::from_slice(text).map_err(bad)?)),
            _ => Err(damaged()),
        }
    }

    /// Whether it is of this snapshot, as its key says.
    pub(super) fn is_of(&self, vm: VmId, seq: u64, snapshot: SnapshotId) -> bool {
        match self {
            Record::Manifest(m) => (m.vm, m.seq, m.snapshot) == (vm, seq, snapshot),
            Record::Tombstone(t) => (t.vm, t.seq, t.snapshot) == (vm, seq, snapshot),
        }
    }
}

fn encode(kind: u8, text: &impl Serialize, config: &[u8]) -> Result<Vec<u8>> {
    let text = serde_json::to_vec(text)
        .map_err(|error| Error::caused(Kind::Failed, "cannot encode a manifest", error))?;
    if text.len() > MAX_TEXT {
        return Err(Error::new(
            Kind::Usage,
            "a manifest is too long: fewer disks or shorter names",
        ));
    }
    let mut body = Vec::with_capacity(6 + text.len() + config.len());
    body.extend([kind, VERSION]);
    body.extend((text.len() as u32).to_le_bytes());
    body.extend(text);
    body.extend(config);
    Ok(body)
}

/// Snapshot ids as text.
pub(super) mod id_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::ids::SnapshotId;

    pub(in crate::store) fn serialize<S: Serializer>(
        id: &SnapshotId,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.serialize_str(id.as_str())
    }

    pub(in crate::store) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<SnapshotId, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(|()| D::Error::custom(format!("{text:?} is no snapshot id")))
    }
}

/// Snapshot ids as text, none as null.
pub(super) mod optional_id_text {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use crate::ids::SnapshotId;

    #[allow(clippy::ref_option)] // serde's signature
    pub(in crate::store) fn serialize<S: Serializer>(
        id: &Option<SnapshotId>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        id.as_ref().map(SnapshotId::as_str).serialize(to)
    }

    pub(in crate::store) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<SnapshotId>, D::Error> {
        let Some(text) = Option::<String>::deserialize(from)? else { return Ok(None) };
        text.parse().map(Some).map_err(|()| D::Error::custom(format!("{text:?} is no snapshot id")))
    }
}
