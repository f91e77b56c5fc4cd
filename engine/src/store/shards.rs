//! Checkpoints: what a host's part of the index had of a stretch of the journals, for whoever comes
//! to own it.
//!
//! `shards/<host>-<n>/<part>`: body `E`, version 1, entries of 30 bytes (fingerprint, address), ascending
//! over all parts. `shards/<host>-<n>/record`: body `C`, version 1, JSON. The record is created
//! last: without it there is no checkpoint. Entries are hints, as in the index itself.

use serde::{Deserialize, Serialize};

use super::Store;
use super::format::{ObjectKind, SEALED_MAX, damaged};
use super::journal::Position;
use super::names;
use super::objects::Created;
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, Fingerprint, HostId, Slices};

const RECORD_MAGIC: [u8; 2] = *b"C\x01";
const PART_MAGIC: [u8; 2] = *b"E\x01";
/// Bytes of an entry.
const ENTRY_LEN: usize = Fingerprint::LEN + Address::LEN;
/// Entries of a part: 480 KiB, which writer and reader have in memory twice, sealed and plain.
pub const PART_ENTRIES: usize = 16 << 10;
/// Parts of one checkpoint: 2^34 entries are more than any host has.
const MAX_PARTS: u32 = 1 << 20;

const _: () = assert!((PART_ENTRIES * ENTRY_LEN) as u64 + 128 < SEALED_MAX);

/// A checkpoint: whose, and the number that it gave it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CheckpointId {
    /// The host that wrote it.
    pub host: HostId,
    /// Its number among those of this host, from 1.
    pub n: u32,
}

/// What a checkpoint is of: all blocks with a fingerprint in `slices` of all containers that the
/// journals record after `after`, up to `up_to`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The partition map that the host went by.
    pub map_epoch: u64,
    /// Unix milliseconds.
    pub written_ms: i64,
    /// Where the journals were before; an incarnation that is not named, at its beginning.
    pub after: Vec<Position>,
    /// Where they are covered up to.
    pub up_to: Vec<Position>,
    /// Which fingerprints.
    pub slices: Slices,
    /// Parts, numbered from 0.
    pub parts: u32,
    /// Entries of all of them.
    pub entries: u64,
}

impl Record {
    /// The body of the object.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut body = RECORD_MAGIC.to_vec();
        serde_json::to_writer(&mut body, self)
            .map_err(|e| Error::caused(Kind::Failed, "cannot encode a checkpoint's record", e))?;
        Ok(body)
    }

    /// Reads a body; `name` is the object's, for messages.
    ///
    /// # Errors
    /// [`Kind::Damaged`].
    pub fn decode(body: &[u8], name: &str) -> Result<Self> {
        let text = body.strip_prefix(&RECORD_MAGIC);
        let text = text.ok_or_else(|| damaged(name, "it is no checkpoint of this version"))?;
        let record: Self = serde_json::from_slice(text)
            .map_err(|_| damaged(name, "it does not read as a checkpoint"))?;
        if record.parts > MAX_PARTS {
            return Err(damaged(name, "it has more parts than there can be"));
        }
        Ok(record)
    }
}

pub(super) fn encode_entries(entries: &[(Fingerprint, Address)]) -> Vec<u8> {
    let mut body = Vec::with_capacity(PART_MAGIC.len() + entries.len() * ENTRY_LEN);
    body.extend(PART_MAGIC);
    for (fingerprint, address) in entries {
        body.extend(fingerprint.0);
        body.extend(address.to_bytes());
    }
    body
}

pub(super) fn decode_entries(body: &[u8], name: &str) -> Result<Vec<(Fingerprint, Address)>> {
    let wrong = || damaged(name, "it does not read as a checkpoint's part");
    let (entries, rest) =
        body.strip_prefix(&PART_MAGIC).ok_or_else(wrong)?.as_chunks::<ENTRY_LEN>();
    if !rest.is_empty() {
        return Err(wrong());
    }
    let entry = |bytes: &[u8; ENTRY_LEN]| {
        let (fingerprint, address) = bytes.split_first_chunk()?;
        Some((Fingerprint(*fingerprint), Address::from_bytes(*address.first_chunk()?)))
    };
    entries.iter().map(|bytes| entry(bytes).ok_or_else(wrong)).collect()
}

/// All checkpoints, ascending; also those that are not complete.
///
/// # Errors
/// When they cannot be listed.
pub fn list(store: &Store) -> Result<Vec<CheckpointId>> {
    let folders = store.objects().list_dirs(names::SHARDS)?;
    let id =
        |folder: &String| names::parse_checkpoint(folder).map(|(host, n)| CheckpointId { host, n });
    let mut all: Vec<CheckpointId> = folders.iter().filter_map(id).collect();
    all.sort_unstable();
    Ok(all)
}

/// What a checkpoint is of.
///
/// # Errors
/// [`Kind::NotFound`] for one that is not complete, [`Kind::Damaged`].
pub fn read_record(store: &Store, id: CheckpointId) -> Result<Record> {
    let name = names::checkpoint_record(id.host, id.n);
    Record::decode(&store.read_sealed(ObjectKind::Checkpoint, &name)?, &name)
}

/// Entries of one part.
///
/// # Errors
/// [`Kind::NotFound`], [`Kind::Damaged`].
pub fn read_part(
    store: &Store,
    id: CheckpointId,
    part: u32,
) -> Result<Vec<(Fingerprint, Address)>> {
    let name = names::checkpoint_part(id.host, id.n, part);
    decode_entries(&store.read_sealed(ObjectKind::ShardPart, &name)?, &name)
}

/// Writes a checkpoint; one that is not finished is none.
pub struct Writer<'s> {
    store: &'s Store,
    id: CheckpointId,
    waiting: Vec<(Fingerprint, Address)>,
    parts: u32,
    entries: u64,
}

impl<'s> Writer<'s> {
    /// The next one of a host.
    ///
    /// # Errors
    /// When those that are there cannot be listed.
    pub fn begin(store: &'s Store, host: HostId) -> Result<Self> {
        let all = list(store)?;
        let last = all.iter().filter(|id| id.host == host).map(|id| id.n).max().unwrap_or(0);
        let used_up = || Error::new(Kind::Failed, "all numbers of checkpoints are used up");
        let id = CheckpointId { host, n: last.checked_add(1).ok_or_else(used_up)? };
        let waiting = Vec::with_capacity(PART_ENTRIES);
        Ok(Writer { store, id, waiting, parts: 0, entries: 0 })
    }

    /// Adds an entry; they come ascending.
    ///
    /// # Errors
    /// When a part cannot be created.
    pub fn push(&mut self, entry: (Fingerprint, Address)) -> Result<()> {
        self.waiting.push(entry);
        self.entries += 1;
        if self.waiting.len() < PART_ENTRIES { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<()> {
        if self.parts == MAX_PARTS {
            return Err(Error::new(Kind::Failed, "a checkpoint of too many parts (a bug)"));
        }
        let name = names::checkpoint_part(self.id.host, self.id.n, self.parts);
        self.create(ObjectKind::ShardPart, &name, &encode_entries(&self.waiting))?;
        self.waiting.clear();
        self.parts += 1;
        Ok(())
    }

    fn create(&self, kind: ObjectKind, name: &str, body: &[u8]) -> Result<()> {
        match self.store.create_sealed(kind, name, body)? {
            Created::Ours => Ok(()),
            Created::Exists => Err(Error::new(
                Kind::Busy,
                format!("{name} exists already: another engine writes as this host"),
            )),
        }
    }

    /// Makes it one; `parts` and `entries` of the record are set here.
    ///
    /// # Errors
    /// When the last part or the record cannot be created.
    pub fn finish(mut self, record: Record) -> Result<(CheckpointId, Record)> {
        if !self.waiting.is_empty() {
            self.flush()?;
        }
        let record = Record { parts: self.parts, entries: self.entries, ..record };
        let name = names::checkpoint_record(self.id.host, self.id.n);
        self.create(ObjectKind::Checkpoint, &name, &record.encode()?)?;
        Ok((self.id, record))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ids::{ContainerId, Incarnation, Slice, Slot};
    use crate::store::testing::TestStore;

    fn entry(n: u32) -> (Fingerprint, Address) {
        let mut bytes = [7; Fingerprint::LEN];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        let container = ContainerId { incarnation: Incarnation(3), counter: n / 1000 };
        (Fingerprint(bytes), Address { container, slot: Slot((n % 1000) as u16) })
    }

    fn record() -> Record {
        Record {
            map_epoch: 5,
            written_ms: 9,
            after: Vec::new(),
            up_to: vec![Position { incarnation: Incarnation(3), n: 8 }],
            slices: Slice::all().filter(|slice| slice.0 % 5 == 0).collect(),
            parts: 0,
            entries: 0,
        }
    }

    #[test]
    fn what_is_written_is_read_and_what_is_not_finished_is_none() {
        let test = TestStore::new();
        let (store, host) = (&test.store, HostId(4));
        let entries: Vec<_> = (0..PART_ENTRIES as u32 + 100).map(entry).collect();
        let mut unfinished = Writer::begin(store, host).unwrap();
        entries.iter().for_each(|entry| unfinished.push(*entry).unwrap());
        drop(unfinished);
        let mut writer = Writer::begin(store, host).unwrap();
        entries.iter().for_each(|entry| writer.push(*entry).unwrap());
        let (id, written) = writer.finish(record()).unwrap();
        assert_eq!((written.parts, written.entries), (2, entries.len() as u64));
        assert_eq!(list(store).unwrap(), [CheckpointId { host, n: 1 }, id]);
        let kind = |id| read_record(store, id).unwrap_err().kind();
        assert_eq!(kind(CheckpointId { host, n: 1 }), Kind::NotFound);
        assert_eq!(read_record(store, id).unwrap(), written);
        let parts = (0..2).flat_map(|part| read_part(store, id, part).unwrap());
        assert!(parts.eq(entries));
        assert_eq!(read_part(store, id, 2).unwrap_err().kind(), Kind::NotFound);
        let empty = Writer::begin(store, HostId(0)).unwrap().finish(record()).unwrap();
        assert_eq!((empty.0.n, empty.1.parts), (1, 0));
    }

    #[test]
    fn two_writers_as_one_host_do_not_mix() {
        let test = TestStore::new();
        let [mut first, mut second] =
            [(), ()].map(|()| Writer::begin(&test.store, HostId(1)).unwrap());
        first.push(entry(1)).unwrap();
        second.push(entry(2)).unwrap();
        first.finish(record()).unwrap();
        assert_eq!(second.finish(record()).unwrap_err().kind(), Kind::Busy);
    }

    #[test]
    fn what_is_no_checkpoint_is_damaged() {
        let many = Record { parts: MAX_PARTS + 1, ..record() }.encode().unwrap();
        for wrong in [&b"C\x01{}"[..], b"C\x02{}", b"", &many] {
            assert_eq!(Record::decode(wrong, "x").unwrap_err().kind(), Kind::Damaged);
        }
        for wrong in [&b"E\x01123"[..], b"", b"E\x02"] {
            assert_eq!(decode_entries(wrong, "x").unwrap_err().kind(), Kind::Damaged);
        }
        assert_eq!(decode_entries(b"E\x01", "x").unwrap(), []);
    }
}
