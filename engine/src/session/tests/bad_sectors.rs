//! What a disk cannot read any more (EIO) is damage like any other: one bad sector stops nobody else, and
//! what is there twice, or can be had again, is had.

use super::damage::{address_in, different};
use super::*;
use crate::store::commit::SnapshotKey;
use crate::store::names;
use crate::store::objects::recording::Record;

/// A host on a store whose disk may wear out.
fn worn_host() -> (Host, Record, String) {
    let dir = tempfile::tempdir().unwrap();
    let location = Location::Directory(dir.path().join("store"));
    let key = init_at(&location, &InitOptions::default(), StoreLevel::NEWEST);
    let text = key.to_text().to_string();
    let record = Record::default();
    let objects = Objects::recorded(&dir.path().join("store"), &record, |_| {});
    let host = Host::open(dir, objects, key, StoreOptions::default(), DetectOptions::new);
    (host, record, text)
}

fn keys(host: &Host, prefix: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut each = |key: &str, _| {
        all.push(key.to_owned());
        Ok(())
    };
    host.context.store.objects().list(prefix, &mut each).unwrap();
    all
}

#[test]
fn a_bad_sector_under_a_manifest_stops_no_other_vm_and_its_copy_serves() {
    let (host, record, _) = worn_host();
    let image = different(1, 300);
    let full = host.begin(1, "", &image).unwrap().run().unwrap();
    record.wear_out(&SnapshotKey::of(&full).manifest());

    // A new VM's name is compared with that of every other.
    let other = different(5000, 100);
    let another = host.begin(2, "", &other).unwrap().run().unwrap();
    host.must_restore(&another, &other);
    let client = host.begin(1, full.snapshot.as_str(), &image).unwrap();
    assert!(client.begun.disks[0].incremental);
    let next = client.run_increment([]).unwrap();
    host.must_restore(&next, &image);
    host.must_restore(&full, &image);
}

/// A snapshot whose blocks are in one container, under which there are bad sectors.
fn worn_snapshot(host: &Host, record: &Record, image: &[u8]) -> Manifest {
    let full = host.begin(1, "", image).unwrap().run().unwrap();
    let address = address_in(&host.context, &full, 300);
    let summary = host.context.store.directories().summary(address.container).unwrap().unwrap();
    record.wear_out(&summary.object);
    host.context.store.directories().forget(address.container);
    full
}

#[test]
fn blocks_on_bad_sectors_are_stored_again_and_old_snapshots_healed() {
    let (host, record, _) = worn_host();
    let image = different(1, 600);
    let full = worn_snapshot(&host, &record, &image);
    // A restore that fails leaves a mark.
    assert_eq!(host.restore(&full).unwrap_err().kind(), Kind::Damaged);
    let again = host.begin(2, "", &image).unwrap().run().unwrap();
    assert_eq!(again.counts.new, image.len() as u64, "none of them can be read");
    host.must_restore(&again, &image);
    assert!(!host.verify().0);
    let whole = upkeep::repair(&host.context, false, 5, &mut |_| Ok(())).unwrap();
    assert!(whole, "there is a good copy of every block");
    host.must_restore(&full, &image);
}

#[test]
fn where_nobody_can_read_what_a_container_has_backups_go_on() {
    let (host, record, _) = worn_host();
    let image = different(1, 600);
    worn_snapshot(&host, &record, &image);
    for directory in keys(&host, names::DIRECTORIES) {
        record.wear_out(&directory);
    }
    let again = host.begin(2, "", &image).unwrap().run().unwrap();
    assert_eq!(again.counts.new, image.len() as u64);
    host.must_restore(&again, &image);
}

#[test]
fn a_new_host_starts_whatever_of_the_journals_its_disk_cannot_read() {
    let (host, record, text) = worn_host();
    let image = different(1, 300);
    let full = host.begin(1, "", &image).unwrap().run().unwrap();
    for entry in keys(&host, names::JOURNAL) {
        record.wear_out(&entry);
    }
    // Another machine: the same store, without state and index.
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(host.dir.path().join("store"), dir.path().join("store")).unwrap();
    let objects = Objects::recorded(&dir.path().join("store"), &record, |_| {});
    let key = StoreKey::from_text(&text).unwrap();
    let another = Host::open(dir, objects, key, StoreOptions::default(), DetectOptions::new);
    another.must_restore(&full, &image);
    let next = another.begin(1, full.snapshot.as_str(), &image).unwrap();
    next.run_increment([]).unwrap();
}
