//! Commits, tombstones, listings, marks, against a real directory.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use jiff::tz::TimeZone;
use uuid::Uuid;

use super::commit::{Commit, Ending, Fate, Manifests, SnapshotKey};
use super::damage::{DamageMap, DamageMark, mark};
use super::format::Sealer;
use super::keys::StoreKey;
use super::manifest::{Counts, Disk, MAX_CONFIG, Manifest, Record, Tombstone};
use super::objects::Objects;
use super::recipe::NodeRef;
use super::testing::session_of;
use crate::error::Kind;
use crate::ids::{Address, ContainerId, DiskId, Incarnation, Slot, SnapshotId, VmId};

struct Fixture {
    dir: tempfile::TempDir,
    objects: Objects,
    sealer: Sealer,
    manifests: Manifests,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let objects = Objects::local(dir.path()).unwrap();
    let sealer = Sealer::new(Arc::new(StoreKey::generate("test").unwrap()), true);
    let manifests = Manifests::new(objects.clone(), sealer.clone(), dir.path());
    Fixture { dir, objects, sealer, manifests }
}

fn id(n: u32) -> SnapshotId {
    SnapshotId::from_random(n.wrapping_mul(0x9e37_79b9))
}

fn vm(n: u128) -> VmId {
    VmId(Uuid::from_u128(n))
}

fn manifest(vm: VmId, name: &str, seq: u64) -> Manifest {
    let address = Address {
        container: ContainerId { incarnation: Incarnation(1), counter: 9 },
        slot: Slot(77),
    };
    let root = NodeRef { address, level: 1, tag: [7; 16] };
    let disk = |name: &str, root| Disk {
        uuid: DiskId(Uuid::from_u128(name.len() as u128)),
        name: name.into(),
        size: 40 << 30,
        root,
    };
    Manifest {
        snapshot: id(seq as u32),
        vm,
        vm_name: name.into(),
        seq,
        parent: (seq > 1).then(|| id(seq as u32 - 1)),
        // Twelve hours apart, from 2026-11-20 00:00 UTC on.
        point_in_time_ms: 1_795_132_800_000 + (seq as i64 - 1) * 43_200_000,
        disks: vec![disk("vda", Some(root)), disk("data", None)],
        bitmaps: vec!["fleece:x".into()],
        host: "hv3".into(),
        engine: "0.1.0".into(),
        hypervisor: "QEMU 7.2.22".into(),
        counts: Counts { read: 5, stored: 3, ..Counts::default() },
        duration_ms: 1234,
        gc_epoch: 0,
        config: vec![0xff; 5000],
    }
}

fn tombstone(of: &Manifest) -> Tombstone {
    let (snapshot, vm, seq) = (of.snapshot, of.vm, of.seq);
    Tombstone { snapshot, vm, seq, reason: "died".into(), time_ms: 5 }
}

fn committed(commit: &Commit) -> bool {
    matches!(commit, Commit::Committed { warning: None })
}

fn damage_file(f: &Fixture, name: &str) {
    let path = f.dir.path().join(name);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn the_first_of_commit_and_tombstone_decides() {
    let f = fixture();
    let (one, two) = (manifest(vm(1), "web1", 1), manifest(vm(1), "web1", 2));
    assert!(committed(&f.manifests.commit(&one).unwrap()));
    assert_eq!(f.manifests.tombstone(&tombstone(&one)).unwrap(), Ending::AlreadyCommitted);
    assert_eq!(f.manifests.tombstone(&tombstone(&two)).unwrap(), Ending::Tombstoned);
    assert!(matches!(f.manifests.commit(&two).unwrap(), Commit::Tombstoned));
    // Asked again, the answers stay.
    assert!(committed(&f.manifests.commit(&one).unwrap()));
    assert_eq!(f.manifests.tombstone(&tombstone(&two)).unwrap(), Ending::Tombstoned);
    assert_eq!(f.manifests.fate(vm(1), id(1)).unwrap(), Fate::Committed(1));
    assert_eq!(f.manifests.fate(vm(1), id(2)).unwrap(), Fate::Tombstoned(2));
    assert_eq!(f.manifests.fate(vm(1), id(3)).unwrap(), Fate::Unknown);
    assert_eq!(f.manifests.fate(vm(2), id(1)).unwrap(), Fate::Unknown);
    let read = f.manifests.read(&SnapshotKey::of(&one)).unwrap();
    assert_eq!(read, Record::Manifest(Box::new(one.clone())));
    let mut list = f.manifests.list(vm(1)).unwrap();
    assert_eq!(list.next().unwrap(), Some(one));
    assert_eq!(list.next().unwrap(), None);
}

#[test]
fn a_damaged_manifest_is_read_from_its_copy() {
    let f = fixture();
    let one = manifest(vm(1), "web1", 1);
    f.manifests.commit(&one).unwrap();
    let key = SnapshotKey::of(&one);
    damage_file(&f, &key.manifest());
    assert_eq!(f.manifests.read_first(&key).unwrap_err().kind(), Kind::Damaged);
    assert_eq!(f.manifests.read(&key).unwrap(), Record::Manifest(Box::new(one.clone())));
    assert_eq!(f.manifests.latest(vm(1)).unwrap(), Some(one));
    damage_file(&f, &key.copy());
    assert_eq!(f.manifests.read(&key).unwrap_err().kind(), Kind::Damaged);
    assert_eq!(f.manifests.fate(vm(1), id(1)).unwrap(), Fate::Unreadable(1));
    assert_eq!(f.manifests.latest(vm(1)).unwrap(), None);
    assert!(f.manifests.list(vm(1)).unwrap().next().is_err());
}

#[test]
fn a_copy_proves_a_commit_and_what_is_missing_is_healed() {
    let f = fixture();
    let one = manifest(vm(1), "web1", 1);
    f.manifests.commit(&one).unwrap();
    let key = SnapshotKey::of(&one);
    std::fs::remove_file(f.dir.path().join(key.copy())).unwrap();
    assert!(f.manifests.heal_copy(&key).unwrap());
    assert!(!f.manifests.heal_copy(&key).unwrap());
    assert_eq!(f.manifests.read_copy(&key).unwrap(), Record::Manifest(Box::new(one.clone())));
    std::fs::remove_file(f.dir.path().join(key.manifest())).unwrap();
    // Not found by name, but never taken for one that did not commit.
    assert_eq!(f.manifests.fate(vm(1), id(1)).unwrap(), Fate::Committed(1));
    assert_eq!(f.manifests.latest(vm(1)).unwrap(), None);
    assert_eq!(f.manifests.read_first(&key).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(f.manifests.read(&key).unwrap(), Record::Manifest(Box::new(one)));
    assert!(f.manifests.heal_first(&key).unwrap());
    assert!(!f.manifests.heal_first(&key).unwrap());
    assert_eq!(f.manifests.latest(vm(1)).unwrap().map(|m| m.snapshot), Some(id(1)));
}

#[test]
fn a_manifest_cannot_pass_for_another() {
    let f = fixture();
    let (one, two) = (manifest(vm(1), "web1", 1), manifest(vm(1), "web1", 2));
    f.manifests.commit(&one).unwrap();
    let (from, to) = (SnapshotKey::of(&one).manifest(), SnapshotKey::of(&two).manifest());
    std::fs::copy(f.dir.path().join(from), f.dir.path().join(to)).unwrap();
    assert_eq!(f.manifests.read(&SnapshotKey::of(&two)).unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn sessions_are_open_until_their_commit_key_exists() {
    let f = fixture();
    let all: Vec<Manifest> = (1..=4).map(|seq| manifest(vm(1), "web1", seq)).collect();
    for m in &all {
        assert_eq!(f.manifests.next_seq(vm(1)).unwrap(), m.seq);
        assert!(f.manifests.begin_session(&session_of(m)).unwrap());
        assert!(!f.manifests.begin_session(&session_of(m)).unwrap());
    }
    f.manifests.commit(&all[1]).unwrap();
    f.manifests.tombstone(&tombstone(&all[2])).unwrap();
    f.manifests.begin_reader(&session_of(&all[1])).unwrap();
    let open = f.manifests.open_sessions(vm(1)).unwrap();
    assert_eq!(open, [SnapshotKey::of(&all[0]), SnapshotKey::of(&all[3])]);
    assert_eq!(f.manifests.session(&open[1]).unwrap(), session_of(&all[3]));
    assert_eq!(f.manifests.fate(vm(1), id(4)).unwrap(), Fate::Open(4));
    assert!(!f.manifests.settle(vm(1), id(4), "host rebooted", 7).unwrap());
    assert_eq!(f.manifests.fate(vm(1), id(4)).unwrap(), Fate::Tombstoned(4));
    assert!(f.manifests.settle(vm(1), id(2), "", 7).unwrap());
    assert!(!f.manifests.settle(vm(1), id(99), "", 7).unwrap());
}

#[test]
fn the_latest_is_found_behind_many_tombstones() {
    let f = fixture();
    for seq in 1..=40 {
        let m = manifest(vm(1), "web1", seq);
        if seq == 3 {
            f.manifests.commit(&m).unwrap();
        } else {
            f.manifests.tombstone(&tombstone(&m)).unwrap();
        }
    }
    assert_eq!(f.manifests.latest(vm(1)).unwrap().unwrap().seq, 3);
    assert_eq!(f.manifests.latest(vm(2)).unwrap(), None);
    assert_eq!(f.manifests.vms().unwrap(), [vm(1)]);
}

#[test]
fn vms_and_snapshots_are_found_by_what_people_call_them() {
    let f = fixture();
    let none = f.manifests.find_vm("web1").unwrap_err();
    assert_eq!(none.kind(), Kind::NotFound);
    for seq in 1..=6 {
        f.manifests.commit(&manifest(vm(1), if seq < 3 { "old" } else { "web1" }, seq)).unwrap();
    }
    f.manifests.commit(&manifest(vm(2), "db", 1)).unwrap();
    f.manifests.commit(&manifest(vm(3), "db", 1)).unwrap();
    assert_eq!(f.manifests.find_vm("web1").unwrap(), vm(1));
    assert_eq!(f.manifests.find_vm(&vm(2).to_string()).unwrap(), vm(2));
    for bad in ["old", "nope", "db", &vm(9).to_string()] {
        let error = f.manifests.find_vm(bad).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
    }
    let both = f.manifests.find_vm("db").unwrap_err().to_string();
    assert!(both.contains(&vm(2).to_string()) && both.contains(&vm(3).to_string()), "{both}");
    f.manifests.check_name(vm(1), "web1").unwrap();
    f.manifests.check_name(vm(4), "web2").unwrap();
    let taken = f.manifests.check_name(vm(4), "web1").unwrap_err();
    assert_eq!(taken.kind(), Kind::NotPermitted);
    assert!(taken.to_string().contains(&format!("--adopt {}", vm(1))), "{taken}");

    let find = |which: &str| f.manifests.find_snapshot(vm(1), which, &TimeZone::UTC);
    assert_eq!(find("").unwrap().seq, 6);
    assert_eq!(find("latest").unwrap().seq, 6);
    assert_eq!(find(id(4).as_str()).unwrap().seq, 4);
    assert_eq!(find("2026-11-20").unwrap().seq, 2);
    assert_eq!(find("2026-11-22").unwrap().seq, 6);
    for bad in ["2026-11-23", "2026-11-19", "zzzzzz", "uuuuuu", "2026-13-01"] {
        assert_eq!(find(bad).unwrap_err().kind(), Kind::NotFound, "{bad}");
    }
    let last = find("").unwrap();
    assert_eq!(last.disk("vda").unwrap().name, "vda");
    assert_eq!(last.disk(&last.disks[1].uuid.to_string()).unwrap().name, "data");
    assert_eq!(last.disk("").unwrap_err().kind(), Kind::NotFound);
    assert_eq!(last.disk("vdx").unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_manifest_beyond_its_limits_is_refused() {
    let f = fixture();
    let mut m = manifest(vm(1), "web1", 1);
    m.config = vec![0; MAX_CONFIG + 1];
    assert_eq!(f.manifests.commit(&m).unwrap_err().kind(), Kind::Usage);
    m.config.truncate(MAX_CONFIG);
    m.vm_name = "x".repeat(2000);
    assert_eq!(f.manifests.commit(&m).unwrap_err().kind(), Kind::Usage);
}

#[test]
fn damage_marks_add_up_and_survive() {
    let f = fixture();
    assert!(DamageMap::load(&f.objects, &f.sealer).unwrap().is_empty());
    let container = ContainerId { incarnation: Incarnation(2), counter: 3 };
    let at = |slot| Address { container, slot: Slot(slot) };
    for slots in [vec![(5, 3), (100, 1)], vec![(7, 4)], vec![(60_000, 5_535)]] {
        let how = "verify: a tag did not match".into();
        let found = DamageMark { slots, found_ms: 1, how, healed: None };
        mark(&f.objects, &f.sealer, container, &found).unwrap();
    }
    let map = DamageMap::load(&f.objects, &f.sealer).unwrap();
    assert_eq!(map.containers().collect::<Vec<_>>(), [container]);
    assert_eq!(map.slots(), 6 + 1 + 5_535);
    for (slot, damaged) in [(4, false), (5, true), (10, true), (11, false), (100, true)] {
        assert_eq!(map.has(at(slot)), damaged, "slot {slot}");
    }
    assert!(map.touches(at(0), 6) && !map.touches(at(0), 5));
    let other = ContainerId { incarnation: Incarnation(2), counter: 4 };
    assert!(!map.has(Address { container: other, slot: Slot(5) }));
    // A later mark takes an earlier one back, and says where the container stands now.
    let healed =
        DamageMark { slots: vec![(6, 60_000)], found_ms: 2, how: "repair".into(), healed: Some(1) };
    mark(&f.objects, &f.sealer, container, &healed).unwrap();
    let map = DamageMap::load(&f.objects, &f.sealer).unwrap();
    assert!(map.has(at(5)) && !map.has(at(7)) && !map.has(at(100)));
    assert_eq!((map.generation(container), map.generation(other)), (1, 0));
    // A mark that cannot be read condemns the container.
    damage_file(&f, &super::names::damage(container, 4));
    assert!(DamageMap::load(&f.objects, &f.sealer).unwrap().has(at(50)));
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(
        kind in proptest::sample::select(vec![b'M', b'T', b'X']),
        length in proptest::num::u32::ANY,
        body in proptest::collection::vec(proptest::num::u8::ANY, 0..100),
    ) {
        for length in [length, body.len() as u32, 2] {
            let mut bytes = vec![kind, 1];
            bytes.extend(length.to_le_bytes());
            bytes.extend(&body);
            proptest::prop_assert!(Record::decode(&bytes, "some object").is_err());
        }
    }
}
