//! The power fails in any of the operations that make backups and repairs durable: what is there
//! then is a store that has every snapshot whose manifest is in it, and works.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::*;
use crate::store::names;
use crate::store::objects::recording::{Operation, Record, cut};

/// A directory in memory where there is one: power fails in the record, not in here.
fn tempdir() -> tempfile::TempDir {
    let memory = tempfile::tempdir_in("/dev/shm");
    memory.or_else(|_| tempfile::tempdir()).unwrap()
}

/// Several containers from little data.
fn options() -> StoreOptions {
    let mut options = StoreOptions::default();
    options.budget.container_slots = 60;
    options
}

/// Runs and merges of the index from little data.
fn detect(store: StoreId) -> DetectOptions {
    DetectOptions {
        partition_bits: 1,
        memtable_entries: 40,
        young_runs: 2,
        delta_runs: 1,
        delta_fraction: 2,
        step_entries: 50,
        ..DetectOptions::new(store)
    }
}

type Files = BTreeMap<String, Vec<u8>>;

/// The files below a directory; what goes while it is looked at is not there.
fn files(dir: &Path) -> Files {
    let mut found = Files::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            let below = files(&entry.path());
            found.extend(below.into_iter().map(|(inner, b)| (format!("{name}/{inner}"), b)));
        } else if let Ok(bytes) = fs::read(entry.path()) {
            found.insert(name, bytes);
        }
    }
    found
}

fn put(dir: &Path, files: &Files) {
    for (name, bytes) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// What an engine keeps on its own disk.
#[derive(Clone, Default)]
struct Local {
    state: Files,
    index: Files,
}

impl Local {
    fn of(dir: &Path) -> Self {
        Local { state: files(&dir.join("state")), index: files(&dir.join("index")) }
    }

    fn put(&self, dir: &Path) {
        put(&dir.join("state"), &self.state);
        put(&dir.join("index"), &self.index);
    }
}

/// A history: what was done, the engine's own disk after each, and what was committed.
struct History {
    /// The store before the first operation.
    store: Files,
    key: String,
    operations: Vec<Operation>,
    locals: Vec<Local>,
    snapshots: Vec<(Manifest, Vec<u8>)>,
}

/// The `n`th state of a VM's image: a tenth of its blocks is new each time, some of them the
/// other VM's.
fn image_of(vm: u128, n: u64) -> Vec<u8> {
    let mut disk = image(100 + vm as u64, 200, 150);
    for step in 1..=n {
        for block in (step as usize..200).step_by(10) {
            let kind =
                1000 * step + block as u64 + if block % 3 == 0 { 0 } else { 500 * vm as u64 };
            disk[block * BLOCK..][..BLOCK].copy_from_slice(&block_of(kind));
        }
    }
    disk
}

fn dirty(before: &[u8], after: &[u8]) -> Vec<u64> {
    let blocks = before.chunks(BLOCK).zip(after.chunks(BLOCK)).enumerate();
    blocks.filter(|(_, (a, b))| a != b).map(|(block, _)| block as u64).collect()
}

/// Two VMs, a full backup and two increments of each.
fn history() -> History {
    let dir = tempdir();
    let location = Location::Directory(dir.path().join("store"));
    let key = Store::init(&location, &InitOptions::default(), |_| Ok(())).unwrap();
    let text = key.to_text().to_string();
    let store = files(&dir.path().join("store"));
    let (record, locals) = (Record::default(), Arc::new(Mutex::new(Vec::new())));
    let (path, seen) = (dir.path().to_owned(), Arc::clone(&locals));
    let look = move |_: &Operation| seen.lock().unwrap().push(Local::of(&path));
    let objects = Objects::recorded(&dir.path().join("store"), &record, look);
    let host = Host::open(dir, objects, key, options(), detect);
    let mut snapshots: Vec<(Manifest, Vec<u8>)> = Vec::new();
    let mut last: BTreeMap<u128, usize> = BTreeMap::new();
    for n in 0..3 {
        for vm in [1, 2] {
            let disk = image_of(vm, n);
            let parent = last.get(&vm).map(|at| &snapshots[*at]);
            let name = parent.map_or("", |(manifest, _)| manifest.snapshot.as_str());
            let client = host.begin(vm, name, &disk).unwrap();
            match parent {
                None => client.scan_all().unwrap(),
                Some((_, before)) => {
                    assert!(client.begun.disks[0].incremental);
                    client.scan(dirty(before, &disk).into_iter()).unwrap();
                    client.call(Event::EndScan).unwrap();
                }
            }
            client.write_all().unwrap();
            snapshots.push((client.commit().unwrap(), disk));
            last.insert(vm, snapshots.len() - 1);
        }
    }
    drop(host);
    let locals = locals.lock().unwrap().clone();
    History { store, key: text, operations: record.operations(), locals, snapshots }
}

/// Another snapshot of the first VM. What is known to be damaged is read and stored again.
fn store_lost_blocks_again(host: &Host, disk: &[u8]) -> Manifest {
    let id = VmId(Uuid::from_u128(1));
    for open in host.context.manifests.open_sessions(id).unwrap() {
        host.context.manifests.settle(id, open.snapshot, "power cut", 0).unwrap();
    }
    let parent = host.context.manifests.latest(id).unwrap().unwrap();
    let client = host.begin(1, parent.snapshot.as_str(), disk).unwrap();
    client.run_increment([]).unwrap()
}

/// Two VMs with a backup each; a frame of theirs is damaged, found, stored again by another backup,
/// and put back by a repair. The history begins with the damage.
fn history_of_a_repair() -> History {
    let dir = tempdir();
    let location = Location::Directory(dir.path().join("store"));
    let key = Store::init(&location, &InitOptions::default(), |_| Ok(())).unwrap();
    let text = key.to_text().to_string();
    let objects = objects_at(&location, dir.path()).unwrap();
    let host = Host::open(dir, objects, key, options(), detect);
    let mut snapshots: Vec<(Manifest, Vec<u8>)> = Vec::new();
    for vm in [1, 2] {
        let disk = image_of(vm, 0);
        snapshots.push((host.begin(vm, "", &disk).unwrap().run().unwrap(), disk));
    }
    let mut store = files(&host.dir.path().join("store"));
    let local = Local::of(host.dir.path());
    drop(host);
    // Blocks do not compress: the middle of the first container is in a frame.
    let container = store.iter_mut().find(|(name, _)| names::parse_container(name).is_some());
    let bytes = container.unwrap().1;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;

    let dir = tempdir();
    put(&dir.path().join("store"), &store);
    local.put(dir.path());
    let (record, locals) = (Record::default(), Arc::new(Mutex::new(Vec::new())));
    let (path, seen) = (dir.path().to_owned(), Arc::clone(&locals));
    let look = move |_: &Operation| seen.lock().unwrap().push(Local::of(&path));
    let objects = Objects::recorded(&dir.path().join("store"), &record, look);
    let host = Host::open(dir, objects, StoreKey::from_text(&text).unwrap(), options(), detect);
    assert!(!host.verify().0, "the damage is found");
    let disk = image_of(1, 0);
    snapshots.push((store_lost_blocks_again(&host, &disk), disk));
    assert!(upkeep::repair(&host.context, false, 0, &mut |_| Ok(())).unwrap());
    snapshots.iter().for_each(|(manifest, disk)| host.must_restore(manifest, disk));
    drop(host);
    let locals = locals.lock().unwrap().clone();
    History { store, key: text, operations: record.operations(), locals, snapshots }
}

impl History {
    /// The host after a power cut in operation `n`.
    fn cut(&self, n: usize) -> Host {
        let dir = tempdir();
        let store = dir.path().join("store");
        put(&store, &self.store);
        cut(&store, &self.operations[..n], self.operations.get(n), n % 2 == 1);
        // Its own disk is as it was, or a new one, or one that was set back.
        match n % 3 {
            0 if n > 0 => self.locals[n - 1].put(dir.path()),
            1 => self.locals[0].put(dir.path()),
            _ => {}
        }
        let objects = objects_at(&Location::Directory(store), dir.path()).unwrap();
        let key = StoreKey::from_text(&self.key).unwrap();
        Host::open(dir, objects, key, options(), detect)
    }

    /// The snapshots whose manifests are there after `n` operations.
    fn committed(&self, n: usize) -> impl Iterator<Item = &(Manifest, Vec<u8>)> {
        let done: BTreeSet<&str> = self.operations[..n]
            .iter()
            .filter(|operation| matches!(operation, Operation::Create { .. }))
            .map(Operation::key)
            .chain(self.store.keys().map(String::as_str))
            .collect();
        self.snapshots.iter().filter(move |(manifest, _)| {
            let key = names::manifest(manifest.vm, manifest.seq, manifest.snapshot);
            done.contains(key.as_str())
        })
    }

    /// Exactly what was committed is there, bit for bit, and nothing is damaged.
    fn check(&self, host: &Host, n: usize) {
        let mut expected = BTreeSet::new();
        for (manifest, disk) in self.committed(n) {
            expected.insert(manifest.snapshot);
            host.must_restore(manifest, disk);
        }
        let listed = upkeep::snapshots(&host.context, "", 100).unwrap();
        assert_eq!(listed.iter().map(|m| m.snapshot).collect::<BTreeSet<_>>(), expected);
        host.must_be_clean();
    }

    /// What was committed comes back or is refused, never wrong; and one more backup and repair
    /// make all of it whole.
    fn repair(&self, host: &Host, n: usize) {
        let store = host.dir.path().join("store");
        let before = files(&store);
        for (manifest, disk) in self.committed(n) {
            match host.restore(manifest) {
                Ok(restored) => assert!(restored == *disk, "restored image differs"),
                Err(error) => assert_eq!(error.kind(), Kind::Damaged, "{error}"),
            }
        }
        host.verify();
        store_lost_blocks_again(host, &image_of(1, 0));
        let mut said = Vec::new();
        let repaired = upkeep::repair(&host.context, false, 0, &mut |line| {
            said.push(line);
            Ok(())
        });
        assert!(repaired.unwrap(), "{said:?}");
        self.check_kept(&before, &files(&store));
        self.committed(n).for_each(|(manifest, disk)| host.must_restore(manifest, disk));
        host.must_be_clean();
    }

    fn check_kept(&self, before: &Files, after: &Files) {
        for (name, bytes) in before {
            assert!(after.get(name) == Some(bytes), "{name} was written again");
        }
    }

    /// The sessions that the cut ended are ended for good, and the next backups are exact.
    fn go_on(&self, host: &Host, n: usize) {
        let store = host.dir.path().join("store");
        let before = files(&store);
        for vm in [1, 2] {
            let id = VmId(Uuid::from_u128(vm));
            for open in host.context.manifests.open_sessions(id).unwrap() {
                let settled = host.context.manifests.settle(id, open.snapshot, "power cut", 0);
                assert!(!settled.unwrap(), "a session without a manifest has committed");
            }
            let parent = host.context.manifests.latest(id).unwrap();
            let disk = image_of(vm, 3);
            let name = parent.as_ref().map_or("", |parent| parent.snapshot.as_str());
            let client = host.begin(vm, name, &disk).unwrap();
            assert_eq!(client.begun.disks[0].incremental, parent.is_some());
            client.scan_all().unwrap();
            client.write_all().unwrap();
            host.must_restore(&client.commit().unwrap(), &disk);
        }
        self.check_names(&before, &files(&store), n);
        host.must_be_clean();
    }

    /// Nothing that was there has changed, and no container's name was ever used before.
    fn check_names(&self, before: &Files, after: &Files, n: usize) {
        self.check_kept(before, after);
        let used: BTreeSet<&str> = self.operations[..self.operations.len().min(n + 1)]
            .iter()
            .map(Operation::key)
            .filter(|key| names::parse_container(key).is_some())
            .collect();
        let new = after.keys().filter(|name| !before.contains_key(*name));
        let again: Vec<_> = new.filter(|name| used.contains(name.as_str())).collect();
        assert!(again.is_empty(), "{again:?} were used before");
    }
}

#[test]
fn a_power_cut_in_any_durable_operation_of_backups_leaves_what_was_committed() {
    let history = history();
    let kinds =
        |kind: fn(&Operation) -> bool| history.operations.iter().filter(|o| kind(o)).count();
    let completed = kinds(|o| matches!(o, Operation::Complete { .. }));
    println!("{} operations, {completed} containers", history.operations.len());
    assert!(completed > 12, "{completed}");
    for n in 0..=history.operations.len() {
        println!("cut in operation {n}: {:?}", history.operations.get(n).map(Operation::key));
        let host = history.cut(n);
        history.check(&host, n);
        history.go_on(&host, n);
    }
}

#[test]
fn a_power_cut_in_any_durable_operation_of_a_repair_loses_nothing() {
    let history = history_of_a_repair();
    let rewritten = |o: &&Operation| {
        let container = names::parse_container(o.key());
        matches!(o, Operation::Complete { .. }) && container.is_some_and(|(_, n)| n > 0)
    };
    let rewritten = history.operations.iter().filter(rewritten).count();
    println!("{} operations, {rewritten} containers rewritten", history.operations.len());
    assert!(rewritten > 0);
    for n in 0..=history.operations.len() {
        println!("cut in operation {n}: {:?}", history.operations.get(n).map(Operation::key));
        history.repair(&history.cut(n), n);
    }
}
