//! Real objects of a small store, as seeds.

use super::recipe::Tree;
use crate::ids::{Address, ContainerId, Fingerprint, Incarnation, Slice, Slot, SnapshotId, VmId};
use crate::jobs::fixture::{Fixture, image};
use crate::store::agreed::Since;
use crate::store::container::{ContainerKind, Packer};
use crate::store::journal::Position;
use crate::store::manifest::Tombstone;
use crate::store::recipe::{Placement, RecipeEditor, Shape, fingerprint};
use crate::store::sessions::SessionRecord;
use crate::store::testing::TestStore;
use crate::store::{InitOptions, StoreLevel, StoreOptions, damage, journal, names, shards};

type Seeds = Vec<(&'static str, Vec<u8>)>;

fn with(what: u8, bytes: &[u8]) -> Vec<u8> {
    [&[what][..], bytes].concat()
}

/// For `small_objects`.
pub(crate) fn objects() -> Seeds {
    let mut fixture = Fixture::new(4096);
    let manifest = fixture.backup(1, &image(1, 200_000), None);
    let sealer = fixture.store.sealer();
    let tombstone = Tombstone {
        snapshot: SnapshotId::from_random(9),
        vm: manifest.vm,
        seq: 3,
        reason: "its session died".into(),
        time_ms: 1,
    };
    let session = SessionRecord {
        snapshot: manifest.snapshot,
        vm: manifest.vm,
        vm_name: manifest.vm_name.clone(),
        seq: 1,
        parent: Some(tombstone.snapshot),
        host: "hv3".into(),
        engine: "0".into(),
        gc_epoch: 0,
        started_ms: 1,
        expires_ms: None,
    };
    let session = [b"S\x01", &serde_json::to_vec(&session).unwrap()[..]].concat();
    let mark = damage::DamageMark {
        slots: vec![(3, 5), (9, 1)],
        found_ms: 1,
        how: "read".into(),
        healed: None,
    };
    let mark = [b"D\x01", &serde_json::to_vec(&mark).unwrap()[..]].concat();
    let mut entries = Vec::new();
    let journals = fixture.store.journals();
    let each = |_, found: &[journal::Entry]| {
        entries.extend_from_slice(found);
        Ok(())
    };
    journals.each_after(journals.incarnations().unwrap()[0], 0, each).unwrap();
    let info = std::fs::read(fixture.path(names::STORE)).unwrap();
    let state = std::fs::read(fixture.dir.path().join("state/incarnation.toml")).unwrap();
    let key = super::fixed_key().unwrap();
    let binary = key.encode();
    let config = "store = '/s'\nkey = '/k'\nmemory_budget = '32M'\nallowed_uids = [7]\n";
    vec![
        ("sealed", with(0, &sealer.seal(super::ObjectKind::Manifest, "x", b"M").unwrap())),
        ("info", with(1, &info[super::HEADER_LEN..])),
        ("info-whole", with(1, &info)),
        ("manifest", with(2, &manifest.encode().unwrap())),
        ("tombstone", with(2, &tombstone.encode().unwrap())),
        ("session", with(3, &session)),
        ("journal", with(4, &journal::encode_entries(&entries))),
        ("damage", with(5, &mark)),
        ("key", with(6, &binary[..binary.len() - 8])),
        ("key-file", with(7, key.to_text().as_bytes())),
        ("key-paper", with(7, key.to_paper().as_bytes())),
        ("state", with(7, &state)),
        ("config", with(7, config.as_bytes())),
        ("name-container", with(7, names::container(entries[0].container, 1).as_bytes())),
        ("name-manifest", with(7, name_of(&manifest.vm).as_bytes())),
        ("name-node", with(7, manifest.disks[0].root.unwrap().to_string().as_bytes())),
        ("wrapped", with(8, &key.wrap("secret").unwrap()[super::HEADER_LEN..])),
        ("checkpoint", with(9, &checkpoint().encode().unwrap())),
        ("shard-part", with(10, &shards::encode_entries(&entries_of(entries[0].container)))),
        ("name-checkpoint", with(7, b"000a-00000002")),
        ("agreement", with(11, &agreement().encode().unwrap())),
        ("name-level", with(7, names::level(2).as_bytes())),
    ]
}

fn agreement() -> Since {
    Since { made_ms: 7, version: "0.1.0".into() }
}

fn checkpoint() -> shards::Record {
    let at = |n| Position { incarnation: Incarnation(1), n };
    shards::Record {
        map_epoch: 3,
        written_ms: 7,
        after: vec![at(1)],
        up_to: vec![at(9), Position { incarnation: Incarnation(2), n: 4 }],
        slices: Slice::all().filter(|slice| slice.0 % 3 == 0).collect(),
        parts: 2,
        entries: 20_000,
    }
}

fn entries_of(container: ContainerId) -> Vec<(Fingerprint, Address)> {
    let entry = |n: u8| (Fingerprint([n; 20]), Address { container, slot: Slot(n.into()) });
    (0..3).map(entry).collect()
}

fn name_of(vm: &VmId) -> String {
    names::manifest(*vm, 1, SnapshotId::from_random(5))
}

/// For `container`: of a store that does not encrypt, so that a fuzzer sees what it changes.
pub(crate) fn containers() -> Seeds {
    let options = InitOptions { encrypt: false, ..InitOptions::default() };
    let mut packed = Vec::new();
    // The last one is longer than its column, as which the harness takes its beginning.
    for (kind, level, count) in [
        (ContainerKind::Blocks, StoreLevel::KEYS, 40),
        (ContainerKind::Nodes, StoreLevel::NEWEST, 40),
        (ContainerKind::Blocks, StoreLevel::COLUMN_APART, 8_u8),
    ] {
        let test = TestStore::at(level, &options, StoreOptions::default());
        let mut packer = Packer::new(&test.store, kind, "test");
        for n in 0..count {
            let length = if kind == ContainerKind::Blocks { 4096 } else { 30 + usize::from(n) };
            let bytes = vec![n; length];
            let name = match kind {
                ContainerKind::Blocks => test.store.fingerprinter().of(&bytes),
                ContainerKind::Nodes => fingerprint(&bytes),
            };
            packer.push(name, &bytes).unwrap();
        }
        packer.seal().unwrap();
        let object = names::container(packer.take_sealed().unwrap()[0].id, 0);
        packed.push(std::fs::read(test.path(&object)).unwrap());
    }
    let both = packed[..2].concat();
    vec![
        ("blocks", with(0, &packed[0])),
        ("nodes", with(0, &packed[1])),
        ("two-sections", with(2, &both)),
        ("as-it-comes", with(4, &packed[0])),
        ("column-apart", with(8, &packed[2])),
    ]
}

/// For `recipe`.
pub(crate) fn recipes() -> Seeds {
    let sizes = [("segment", 1_u64 << 20), ("two-levels", 64 << 20), ("three-levels", 1 << 30)];
    sizes.map(|(name, size)| (name, recipe(size))).into()
}

fn recipe(size: u64) -> Vec<u8> {
    let shape = Shape::new(size, 4096);
    let mut tree = Tree::default();
    let mut editor = RecipeEditor::new(&mut tree, None, shape).unwrap();
    for n in 0..6_u64 {
        let container = ContainerId { incarnation: Incarnation(1), counter: 1 + n as u32 % 2 };
        let address = Address { container, slot: Slot(20 * n as u16) };
        editor.put(n * 30, 10 + n, Placement::At(address)).unwrap();
    }
    editor.finish().unwrap();
    let mut bytes = vec![0];
    bytes.extend(size.to_le_bytes());
    bytes.extend([shape.height(), 0]);
    // The root was written last; the input has it first.
    for node in tree.nodes.iter().rev() {
        bytes.extend((node.len() as u16).to_le_bytes());
        bytes.extend(node);
    }
    // What an edit puts: (distance, blocks, slot, container and zero, shift).
    bytes.extend([3, 0, 40, 0, 9, 0, 1, 0, 200, 0, 8, 0, 7, 0, 0x82, 2]);
    bytes
}
