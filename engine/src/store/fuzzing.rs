//! The store's formats for the fuzzer: every decoder, and what works with what it decoded.
//!
//! Authentication hides nearly all bytes from a fuzzer, so each form is tried twice: as it comes,
//! and behind a seal that is made good first.

mod container;
mod recipe;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod seeds;

pub use container::container;
pub use recipe::recipe;

use std::sync::Arc;

use uuid::Uuid;

use super::agreed::Since;
use super::damage::{DamageMap, DamageMark};
use super::format::{HEADER_LEN, Header, KeyId, ObjectKind, SALT_LEN, Sealer, damaged, le32};
use super::info::StoreInfo;
use super::journal;
use super::keys::StoreKey;
use super::manifest::{Disk, Record};
use super::names;
use super::recipe::RecipeReader;
use super::sessions::SessionRecord;
use super::shards;
use super::{Location, options::is_block_size};
use crate::config::Config;
use crate::error::Result;
use crate::ids::{Address, ContainerId, Incarnation, Slot, SnapshotId, StoreId};
use crate::store::recipe::{NodeRef, NodeSource};

/// The store of [`fixed_key`].
const STORE: StoreId = StoreId(Uuid::from_bytes([7; 16]));

/// A header that is the same in every run.
pub(super) fn fixed_header(kind: ObjectKind, encrypted: bool) -> Header {
    Header { kind, encrypted, key_id: KeyId(1), store: STORE, salt: [3; SALT_LEN] }
}

/// A key that is the same in every run: version, store, no domain, secret, one encryption key.
pub(super) fn fixed_key() -> Result<StoreKey> {
    let mut body = vec![1, 0];
    body.extend([7; 16]);
    body.push(0);
    body.extend([1; 32]);
    body.extend([1, 1, 0, 0, 0]);
    body.extend([2; 32]);
    StoreKey::decode(&StoreKey::summed(&body))
}

/// Whatever stands in a small object. The first byte says as what the rest is read: sealed, or
/// the body of one kind.
pub fn small_objects(data: &[u8]) {
    let Some((what, data)) = data.split_first() else { return };
    match what % 12 {
        0 => sealed(data),
        1 => info(data),
        2 => manifest(data),
        3 => drop(SessionRecord::decode(data, "x")),
        4 => journal_entry(data),
        5 => damage(data),
        6 => key(data),
        7 => text(data),
        8 => wrapped(data),
        9 => checkpoint(data),
        10 => shard_part(data),
        _ => agreement(data),
    }
}

/// An object as it lies in the store, opened as every kind.
fn sealed(data: &[u8]) {
    if let Ok(header) = Header::decode(data, "x") {
        assert_eq!(header.encode()[..], data[..HEADER_LEN], "a header that has two forms");
    }
    let Ok(key) = fixed_key() else { return };
    let key = Arc::new(key);
    for encrypt in [false, true] {
        let sealer = Sealer::new(Arc::clone(&key), encrypt);
        for kind in ObjectKind::ALL {
            let opened = sealer.open(kind, "x", data);
            assert!(opened.is_err(), "what nobody sealed was opened");
        }
    }
}

fn info(data: &[u8]) {
    let location = Location::Directory("x".into());
    let whole = [&fixed_header(ObjectKind::Store, false).encode()[..], data].concat();
    for bytes in [data, &whole] {
        if let Ok(info) = StoreInfo::decode(bytes, &location) {
            assert!(is_block_size(info.block_size));
        }
    }
}

fn manifest(data: &[u8]) {
    let Ok(record) = Record::decode(data, "x") else { return };
    let Record::Manifest(manifest) = &record else { return };
    let again = manifest.encode().map(|body| Record::decode(&body, "x"));
    assert_eq!(again.ok().and_then(Result::ok).as_ref(), Some(&record), "it reads back as another");
    let _ = manifest.disk("");
    for disk in &manifest.disks {
        reads_as_damaged(disk);
    }
}

/// Nothing of the disk's recipe is there: whoever reads it hears so.
fn reads_as_damaged(disk: &Disk) {
    struct Nothing;
    impl NodeSource for Nothing {
        fn get(&self, node: &NodeRef) -> Result<Vec<u8>> {
            Err(damaged(&node.to_string(), "it is not there"))
        }
    }
    for block_size in [4096, 65536] {
        let Ok(reader) = RecipeReader::new(Nothing, disk.root, disk.shape(block_size)) else {
            continue;
        };
        let mut runs = reader.all_runs().tolerant();
        let run = runs.next();
        assert!(run.is_ok_and(|run| run.is_none_or(|run| run.count == reader.shape().blocks())));
        let lost: u64 = runs.take_lost().iter().map(|lost| lost.count).sum();
        assert!(lost == 0 || disk.root.is_some());
    }
}

fn journal_entry(data: &[u8]) {
    if let Some(entries) = journal::decode_entries(data) {
        assert_eq!(journal::encode_entries(&entries), data, "an entry that has two forms");
    }
}

fn damage(data: &[u8]) {
    let Ok(mark) = DamageMark::decode(data, "x") else { return };
    let container = ContainerId { incarnation: Incarnation(1), counter: 1 };
    let mut map = DamageMap::default();
    for (first, count) in mark.slots.iter().take(100) {
        map.add(container, *first, *count);
        if *count > 0 && *first < u16::MAX {
            assert!(map.has(Address { container, slot: Slot(*first) }), "a mark was lost");
        }
    }
    assert!(map.slots() <= u64::from(u16::MAX));
    if let Ok((objects, sealer)) = container::objects() {
        map.apply(container, &mark);
        container::directories(&objects, &sealer, 4096).change_damage(|known| *known = map.clone());
    }
}

fn checkpoint(data: &[u8]) {
    let Ok(record) = shards::Record::decode(data, "x") else { return };
    let again = record.encode().and_then(|body| shards::Record::decode(&body, "x"));
    assert_eq!(again.ok(), Some(record), "it reads back as another");
}

fn shard_part(data: &[u8]) {
    let Ok(entries) = shards::decode_entries(data, "x") else { return };
    assert_eq!(shards::encode_entries(&entries), data, "a part that has two forms");
}

fn agreement(data: &[u8]) {
    let Ok(since) = Since::decode(data, "x") else { return };
    let again = since.encode().and_then(|body| Since::decode(&body, "x"));
    assert_eq!(again.ok(), Some(since), "it reads back as another");
}

/// A key's binary form, as it comes and with its checksum made good.
fn key(data: &[u8]) {
    let _ = StoreKey::decode(data);
    if let Ok(key) = StoreKey::decode(&StoreKey::summed(data)) {
        assert!(StoreKey::decode(&key.encode()).is_ok_and(|again| again == key));
        let _ = (key.check_value(key.first()), key.fingerprinter(4096));
    }
}

/// What is text: key files, keys on paper, the state of the numbering, names of objects.
fn text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = StoreKey::from_text(text);
    let _ = StoreKey::from_paper(text);
    journal::decode_state(text);
    if let Some((container, generation)) = names::parse_container(text) {
        let again = names::parse_container(&names::container(container, generation));
        assert_eq!(again, Some((container, generation)));
    }
    if let Some(incarnation) = names::parse_incarnation(text) {
        let again = names::parse_incarnation(&names::incarnation(incarnation));
        assert_eq!(again, Some(incarnation));
    }
    if let Some((vm, seq, snapshot)) = names::parse_snapshot(text) {
        let again = names::parse_snapshot(&names::manifest(vm, seq, snapshot));
        assert_eq!(again, Some((vm, seq, snapshot)));
    }
    if let Some((host, n)) = names::parse_checkpoint(text) {
        let again = names::checkpoint(host, n);
        assert_eq!(names::parse_checkpoint(&again[names::SHARDS.len() + 1..]), Some((host, n)));
    }
    if let Some(n) = names::parse_number(names::LEVEL, text) {
        assert_eq!(names::parse_number(names::LEVEL, &names::level(n)), Some(n));
    }
    let _ = text.parse::<SnapshotId>();
    let _ = NodeRef::try_from(text.to_owned()).map(|node| {
        assert_eq!(NodeRef::try_from(String::from(node)), Ok(node));
    });
    let _ = toml::from_str::<Config>(text).map(|config| config.budget());
}

/// A key under a passphrase. Argon2 is dear on purpose: where it would be, the parameters are
/// made small.
fn wrapped(data: &[u8]) {
    let mut cheap = [&fixed_header(ObjectKind::WrappedKey, true).encode()[..], data].concat();
    if let Some(parameters) = cheap.get_mut(HEADER_LEN..HEADER_LEN + 8) {
        for (at, most) in [(0, 64_u32), (4, 2)] {
            let value = le32(parameters, at);
            // What is out of bounds stays: it must be refused before any work.
            if (most..1 << 14).contains(&value) {
                parameters[at..at + 4].copy_from_slice(&most.to_le_bytes());
            }
        }
    }
    assert!(StoreKey::unwrap(&cheap, "x").is_err(), "what nobody wrapped was unwrapped");
}
