//! Sealed objects, and stores of every released format, which must open for ever.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::error::Kind;
use crate::ids::{Address, ContainerId, Fingerprint, HostId, Incarnation, Slice, Slot};
use crate::store::container::{ContainerKind, Packer, SlotInfo};
use crate::store::journal::Position;
use crate::store::shards::{self, CheckpointId, Record};
use crate::store::{InitOptions, Location, Store, StoreLevel, StoreOptions};

fn sealer(encrypt: bool) -> Sealer {
    Sealer::new(Arc::new(StoreKey::generate("default").unwrap()), encrypt)
}

#[test]
fn sealed_objects_open_at_their_place_as_their_kind_only() {
    for encrypt in [true, false] {
        let ours = sealer(encrypt);
        for text in [&b""[..], b"x", &[7; 100_000]] {
            let bytes = ours.seal(ObjectKind::Manifest, "manifests/a/1", text).unwrap();
            assert_eq!(ours.open(ObjectKind::Manifest, "manifests/a/1", &bytes).unwrap(), text);
            let elsewhere = ours.open(ObjectKind::Manifest, "manifests/a/2", &bytes).unwrap_err();
            assert_eq!(elsewhere.kind(), Kind::Damaged);
            let as_other = ours.open(ObjectKind::Session, "manifests/a/1", &bytes).unwrap_err();
            assert_eq!(as_other.kind(), Kind::Damaged);
            let foreign =
                sealer(encrypt).open(ObjectKind::Manifest, "manifests/a/1", &bytes).unwrap_err();
            assert_eq!(foreign.kind(), Kind::NoStore);
            let other_way = Sealer::new(ours.key(), !encrypt);
            assert!(other_way.open(ObjectKind::Manifest, "manifests/a/1", &bytes).is_err());
        }
    }
}

#[test]
fn an_older_keyring_says_that_it_is_older() {
    let old = sealer(true);
    let before = old.seal(ObjectKind::Session, "s", b"before").unwrap();
    let new = Sealer::new(Arc::new(old.key().rotated().unwrap()), true);
    new.use_key(KeyId(2));
    let after = new.seal(ObjectKind::Session, "s", b"after").unwrap();
    assert_eq!(new.open(ObjectKind::Session, "s", &before).unwrap(), b"before");
    assert_eq!(new.open(ObjectKind::Session, "s", &after).unwrap(), b"after");
    let error = old.open(ObjectKind::Session, "s", &after).unwrap_err();
    assert_eq!(error.kind(), Kind::Key);
    assert!(error.to_string().contains("newest key file"), "{error}");
}

#[test]
fn pieces_of_plain_objects_cannot_be_shifted_into_their_labels() {
    let ours = sealer(false);
    let bytes = ours.seal(ObjectKind::Manifest, "ab", b"cd").unwrap();
    let mut shifted = bytes[..HEADER_LEN].to_vec();
    shifted.extend_from_slice(b"d");
    shifted.extend_from_slice(&bytes[HEADER_LEN + 2..]);
    assert!(ours.open(ObjectKind::Manifest, "abc", &shifted).is_err());
}

proptest! {
    #[test]
    fn any_change_is_noticed(text in prop::collection::vec(any::<u8>(), 0..200), place: prop::sample::Index, bit in 0..8_u32, encrypt: bool) {
        let ours = sealer(encrypt);
        let mut bytes = ours.seal(ObjectKind::Damage, "d", &text).unwrap();
        let place = place.index(bytes.len());
        bytes[place] ^= 1_u8 << bit;
        let error = ours.open(ObjectKind::Damage, "d", &bytes).unwrap_err();
        prop_assert_eq!(error.kind(), Kind::Damaged);
        prop_assert!(ours.open(ObjectKind::Damage, "d", &bytes[..place]).is_err());
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), magic: bool, crc: bool) {
        let mut bytes = bytes;
        if magic && bytes.len() >= HEADER_LEN {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&[1, 0, 7, 0]);
        }
        if crc && bytes.len() >= HEADER_LEN {
            let crc = crc32c::crc32c(&bytes[..76]);
            bytes[76..80].copy_from_slice(&crc.to_le_bytes());
        }
        let _ = sealer(true).open(ObjectKind::Manifest, "m", &bytes);
    }
}

/// Stores of each form that was ever written, which every later version must read.
const FIXTURES: [(&str, StoreLevel); 2] =
    [("store-v1", StoreLevel::FIRST), ("store-v1-level3", StoreLevel::COLUMN_APART)];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The blocks of the fixture.
fn blocks() -> Vec<Vec<u8>> {
    (0..40_u32).map(|n| (0..4096_u32).map(|i| (i / (n + 1)) as u8 ^ n as u8).collect()).collect()
}

/// The nodes of the fixture.
fn nodes() -> Vec<Vec<u8>> {
    (1..20_u8).map(|n| vec![n; usize::from(n) * 13]).collect()
}

const PASSPHRASE: &str = "a fixture's passphrase";

/// Writes a fixture as this version makes stores; run with `FLEECE_WRITE_FIXTURES=1` once a new one is named.
fn write_fixture(root: &Path) {
    let location = Location::Directory(root.join("store"));
    let init = InitOptions {
        passphrase: Some(PASSPHRASE.into()),
        now_ms: 1_700_000_000_000,
        ..InitOptions::default()
    };
    let key = Store::init(&location, &init, |_| Ok(())).unwrap();
    std::fs::write(root.join("key"), key.to_text().as_bytes()).unwrap();
    let state = tempfile::tempdir().unwrap();
    let store = Store::open(&location, key, state.path(), StoreOptions::default()).unwrap();
    for (kind, pieces) in [(ContainerKind::Blocks, blocks()), (ContainerKind::Nodes, nodes())] {
        let mut packer = Packer::new(&store, kind, "fixture");
        for piece in &pieces {
            packer.push(fingerprint_of(&store, kind, piece), piece).unwrap();
        }
        packer.seal().unwrap();
    }
    store.create_sealed(ObjectKind::Session, "sessions/x", b"a sealed object").unwrap();
    write_checkpoint(&store);
}

fn entries() -> Vec<(Fingerprint, Address)> {
    let container = ContainerId { incarnation: Incarnation(1), counter: 2 };
    let entry = |n: u8| (Fingerprint([n; 20]), Address { container, slot: Slot(n.into()) });
    (0..200).map(entry).collect()
}

fn checkpoint() -> Record {
    let at = |n, incarnation| Position { incarnation: Incarnation(incarnation), n };
    Record {
        map_epoch: 3,
        written_ms: 1_700_000_000_000,
        after: vec![at(1, 1)],
        up_to: vec![at(2, 1), at(7, 9)],
        slices: Slice::all().filter(|slice| slice.0 % 3 == 0).collect(),
        parts: 1,
        entries: 200,
    }
}

fn write_checkpoint(store: &Store) {
    let mut writer = shards::Writer::begin(store, HostId(5)).unwrap();
    entries().into_iter().for_each(|entry| writer.push(entry).unwrap());
    writer.finish(checkpoint()).unwrap();
}

fn fingerprint_of(store: &Store, kind: ContainerKind, piece: &[u8]) -> Fingerprint {
    match kind {
        ContainerKind::Blocks => store.fingerprinter().of(piece),
        ContainerKind::Nodes => Fingerprint([piece[0]; 20]),
    }
}

#[test]
fn stores_of_every_version_still_open() {
    for (name, level) in FIXTURES {
        let root = fixture(name);
        if std::env::var_os("FLEECE_WRITE_FIXTURES").is_some() && !root.exists() {
            write_fixture(&root);
        }
        let location = Location::Directory(root.join("store"));
        let key = StoreKey::from_text(&std::fs::read_to_string(root.join("key")).unwrap()).unwrap();
        assert_eq!(*Store::recover_key(&location, PASSPHRASE).unwrap(), key);
        let store = Store::open_to_read(&location, key, StoreOptions::default()).unwrap();
        assert_eq!(store.info().created_ms, 1_700_000_000_000);
        assert_eq!(store.agreed().level, level);
        let incarnations = store.journals().incarnations().unwrap();
        let mut containers = Vec::new();
        store
            .journals()
            .each_after(incarnations[0], 0, |_, entries| {
                containers.extend_from_slice(entries);
                Ok(())
            })
            .unwrap();
        for (entry, pieces) in containers.iter().zip([blocks(), nodes()]) {
            assert_eq!(entry.slots as usize, pieces.len());
            // The first version had none.
            if level > StoreLevel::FIRST {
                store.directories().check_copy(entry.container, 0).unwrap();
            }
            for (slot, piece) in pieces.iter().enumerate() {
                let address = Address { container: entry.container, slot: Slot(slot as u16) };
                let present = SlotInfo::Present(fingerprint_of(&store, entry.kind, piece));
                assert_eq!(store.directories().slot(address).unwrap(), present);
                let mut out = vec![0; 4096];
                match entry.kind {
                    ContainerKind::Blocks => {
                        store.directories().read_block(address, &mut out).unwrap();
                    }
                    ContainerKind::Nodes => out = store.directories().read_node(address).unwrap(),
                }
                assert_eq!(out, *piece);
            }
        }
        assert_eq!(containers.len(), 2);
        let id = CheckpointId { host: HostId(5), n: 1 };
        assert_eq!(shards::list(&store).unwrap(), [id]);
        assert_eq!(shards::read_record(&store, id).unwrap(), checkpoint());
        assert_eq!(shards::read_part(&store, id, 0).unwrap(), entries());
        assert_eq!(
            store.read_sealed(ObjectKind::Session, "sessions/x").unwrap(),
            b"a sealed object"
        );
    }
}

/// A store whose level was raised and whose key was changed.
#[test]
fn a_store_with_two_encryption_keys_still_opens() {
    let root = fixture("store-v1-level2");
    let location = Location::Directory(root.join("store"));
    let (before, after) = ("sessions/before", "sessions/after");
    if std::env::var_os("FLEECE_WRITE_FIXTURES").is_some() && !root.exists() {
        let now_ms = 1_700_000_000_000;
        let init = InitOptions { now_ms, ..InitOptions::default() };
        let key = Store::init(&location, &init, |_| Ok(())).unwrap();
        let next = key.rotated().unwrap();
        let store = Store::open_to_read(&location, key, StoreOptions::default()).unwrap();
        store.create_sealed(ObjectKind::Session, before, b"under the first").unwrap();
        std::fs::write(root.join("key"), next.to_text().as_bytes()).unwrap();
        Store::keep_key(&location, &next, PASSPHRASE).unwrap();
        store.take_key(next).unwrap();
        store.use_newest_of(&store.sealer().key(), now_ms).unwrap();
        store.create_sealed(ObjectKind::Session, after, b"under the second").unwrap();
    }
    let key = StoreKey::from_text(&std::fs::read_to_string(root.join("key")).unwrap()).unwrap();
    assert_eq!(*Store::recover_key(&location, PASSPHRASE).unwrap(), key);
    let store = Store::open_to_read(&location, key, StoreOptions::default()).unwrap();
    assert_eq!((store.agreed().level, store.agreed().key), (StoreLevel(2), KeyId(2)));
    for (name, id, text) in [(before, 1, &b"under the first"[..]), (after, 2, b"under the second")]
    {
        let bytes = store.objects().read_all(name, SEALED_MAX).unwrap();
        assert_eq!(Header::decode(&bytes, name).unwrap().key_id, KeyId(id));
        assert_eq!(store.read_sealed(ObjectKind::Session, name).unwrap(), text);
    }
    for (name, kind) in [
        ("agreed/level-00000002", ObjectKind::Level),
        ("agreed/key-00000002", ObjectKind::KeyInUse),
    ] {
        store.check_agreed(kind, name).unwrap();
        let body = store.read_sealed(kind, name).unwrap();
        assert!(body.starts_with(b"A\x01{\"made_ms\":1700000000000,"), "{body:?}");
    }
}
