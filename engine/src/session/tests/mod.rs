//! Whole sessions against a real store and a real owner, with clients that behave well,
//! slowly, or not at all.
#![allow(clippy::unwrap_used)]

mod bad_sectors;
mod checkpoints;
mod cluster;
mod damage;
mod lent;
mod power_cut;
mod resume;
mod shards;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::Context;
use super::begin::{Begun, DiskSpec, Request, begin};
use super::event::{Event, Extent, GrantExtent, Grants, Reply};
use super::spool::Position;
use crate::budget::Budget;
use crate::damage::Damage;
use crate::detect::{DetectOptions, Detector};
use crate::error::{Kind, Result};
use crate::ids::{DiskId, StoreId, VmId};
use crate::owner::Owner;
use crate::routing::Owners;
use crate::store::commit::Manifests;
use crate::store::keys::StoreKey;
use crate::store::manifest::Manifest;
use crate::store::objects::Objects;
use crate::store::testing::init_at;
use crate::store::{InitOptions, Location, Store, StoreLevel, StoreOptions, objects_at};
use crate::upkeep;

const BLOCK: usize = 4096;

struct Host {
    dir: tempfile::TempDir,
    context: Context,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Host {
    fn new() -> Self {
        Self::at(StoreLevel::NEWEST)
    }

    /// With a store of a level.
    fn at(level: StoreLevel) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let location = Location::Directory(dir.path().join("store"));
        let key = init_at(&location, &InitOptions::default(), level);
        let objects = objects_at(&location, dir.path()).unwrap();
        Self::open(dir, objects, key, StoreOptions::default(), DetectOptions::new)
    }

    /// On the store, the state and the index in `dir`, whatever state they are in.
    fn open(
        dir: tempfile::TempDir,
        objects: Objects,
        key: StoreKey,
        options: StoreOptions,
        detect: impl FnOnce(StoreId) -> DetectOptions,
    ) -> Self {
        let location = Location::Directory(dir.path().join("store"));
        let work_dir = dir.path().join("sessions");
        std::fs::create_dir_all(&work_dir).unwrap();
        let state = dir.path().join("state");
        let store = Store::open_objects(objects, &location, key, Some(&state), options).unwrap();
        let (mut detector, report) =
            Detector::open(&dir.path().join("index"), detect(store.id())).unwrap();
        upkeep::refill(&store, &mut detector, &report.watermark, &|_| true).unwrap();
        let (owner, thread) = Owner::start(detector, Box::new(|_| Ok(()))).unwrap();
        let context = Context {
            manifests: Manifests::of(&store, &work_dir),
            damage: Arc::new(Damage::load(&store).unwrap()),
            store,
            owners: Owners::alone(owner),
            registry: Arc::default(),
            budget: Budget::new(32 << 20).unwrap(),
            work_dir,
            host: "test".into(),
            rebuilding: Arc::default(),
            tidying: Arc::default(),
            patience: Duration::from_millis(300),
        };
        Host { dir, context, thread: Some(thread) }
    }

    fn begin(&self, vm: u128, parent: &str, image: &[u8]) -> Result<Client> {
        begin_in(&self.context, vm, parent, image)
    }

    fn must_restore(&self, manifest: &Manifest, image: &[u8]) {
        assert!(self.restore(manifest).unwrap() == image, "restored image differs");
    }

    fn restore(&self, manifest: &Manifest) -> Result<Vec<u8>> {
        restore_in(&self.context, manifest)
    }

    /// Everything is stored, everything is found, nothing twice.
    fn must_be_exact(&self, images: &[&[u8]]) {
        assert_eq!(self.stored_slots(), distinct(images));
        self.must_be_clean();
    }

    fn must_be_clean(&self) {
        let (clean, said) = self.verify();
        assert!(clean, "{said}");
    }

    fn verify(&self) -> (bool, String) {
        verify_in(&self.context)
    }

    fn stored_slots(&self) -> usize {
        stored_slots_in(&self.context)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.context.owners.here().stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn request(vm: u128, parent: &str, size: u64) -> Request {
    Request {
        vm: VmId(Uuid::from_u128(vm)),
        vm_name: format!("vm{vm}"),
        adopt: false,
        disks: vec![DiskSpec {
            uuid: DiskId(Uuid::from_u128(vm + 1000)),
            name: "vda".into(),
            size,
            parent: parent.into(),
        }],
        config: Vec::new(),
        hypervisor: "test".into(),
    }
}

fn begin_in(context: &Context, vm: u128, parent: &str, image: &[u8]) -> Result<Client> {
    let begun = begin(context, request(vm, parent, image.len() as u64), 0)?;
    Ok(Client { begun, image: image.to_vec(), context: context.clone() })
}

fn stored_slots_in(context: &Context) -> usize {
    let mut slots = 0;
    let journals = context.store.journals();
    for incarnation in journals.incarnations().unwrap() {
        let count = |_, entries: &[crate::store::journal::Entry]| {
            let blocks = crate::store::container::ContainerKind::Blocks;
            slots += entries.iter().filter(|e| e.kind == blocks).map(|e| e.slots).sum::<u32>();
            Ok(())
        };
        journals.each_after(incarnation, 0, count).unwrap();
    }
    slots as usize
}

fn restore_in(context: &Context, manifest: &Manifest) -> Result<Vec<u8>> {
    let disk = manifest.disk("").unwrap();
    let mut restored = vec![0; disk.size as usize];
    upkeep::restore(context, disk, "test", Default::default(), &mut restored)?;
    Ok(restored)
}

fn verify_in(context: &Context) -> (bool, String) {
    let mut said = String::new();
    let clean = upkeep::verify(context, "", "", 0, &mut |line| {
        said = format!("{said}{line}\n");
        Ok(())
    });
    (clean.unwrap(), said)
}

/// A plugin, reduced to its calls.
struct Client {
    begun: Begun,
    image: Vec<u8>,
    context: Context,
}

impl Client {
    fn call<T>(&self, event: impl FnOnce(Reply<T>) -> Event) -> Result<T> {
        call(&self.begun.client.events, event)
    }

    fn block(&self, block: u64) -> &[u8] {
        &self.image[block as usize * BLOCK..][..BLOCK]
    }

    /// Scans blocks, which ascend.
    fn scan(&self, blocks: impl Iterator<Item = u64>) -> Result<()> {
        let (mut extents, mut fingerprints) = (Vec::new(), Vec::new());
        for block in blocks {
            let zero = self.block(block).iter().all(|byte| *byte == 0);
            extents.push(Extent { first_block: block, blocks: 1, zero });
            if !zero {
                fingerprints.push(self.context.store.fingerprinter().of(self.block(block)));
            }
        }
        self.call(|reply| Event::Submit { disk: 0, extents, fingerprints, reply })
    }

    fn scan_all(&self) -> Result<()> {
        let blocks = (self.image.len() / BLOCK) as u64;
        for first in (0..blocks).step_by(1000) {
            self.scan(first..(first + 1000).min(blocks))?;
        }
        self.call(Event::EndScan)
    }

    fn grants(&self) -> Result<Grants> {
        self.call(Event::Grants)
    }

    fn write(&self, at: Position, blocks: u64) -> Result<()> {
        for block in at.block..at.block + blocks {
            let run = GrantExtent { at: Position { block, ..at }, blocks: 1 };
            let data = self.block(block).to_vec();
            self.call(|reply| Event::Write { runs: vec![run], data, reply })?;
        }
        Ok(())
    }

    /// Writes until nothing more is granted.
    fn write_all(&self) -> Result<()> {
        loop {
            let grants = self.grants()?;
            // Several runs in one message, as the plugin does.
            for extents in grants.extents.chunks(3) {
                let of_run = |run: &GrantExtent| run.at.block..run.at.block + u64::from(run.blocks);
                let blocks = extents.iter().flat_map(of_run);
                let data = blocks.flat_map(|block| self.block(block).to_vec()).collect();
                self.call(|reply| Event::Write { runs: extents.to_vec(), data, reply })?;
            }
            if grants.done {
                return Ok(());
            }
        }
    }

    fn commit(&self) -> Result<Manifest> {
        self.call(|reply| Event::Commit { point_in_time_ms: 1, bitmaps: Vec::new(), reply })
    }

    fn run(&self) -> Result<Manifest> {
        self.scan_all()?;
        self.write_all()?;
        self.commit()
    }

    /// Scans what an incremental plan forces and `dirty`, and goes on to the commit.
    fn run_increment(&self, dirty: impl IntoIterator<Item = u64>) -> Result<Manifest> {
        let plan = &self.begun.disks[0];
        assert!(plan.incremental, "{}", plan.reason);
        let forced = plan
            .forced
            .iter()
            .flat_map(|(offset, length)| offset / BLOCK as u64..(offset + length) / BLOCK as u64);
        let blocks: std::collections::BTreeSet<u64> = forced.chain(dirty).collect();
        self.scan(blocks.into_iter())?;
        self.call(Event::EndScan)?;
        self.write_all()?;
        self.commit()
    }

    fn die(self) {
        drop(self.begun);
    }
}

fn call<T>(events: &Sender<Event>, event: impl FnOnce(Reply<T>) -> Event) -> Result<T> {
    let (reply, answer) = oneshot::channel();
    let over = || crate::error::Error::new(Kind::Failed, "the session is over");
    events.send(event(reply)).map_err(|_| over())?;
    answer.blocking_recv().unwrap_or_else(|_| Err(over()))
}

/// An image whose blocks come from a small set: many duplicates, some zeros.
fn image(seed: u64, blocks: usize, kinds: u64) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut image = Vec::with_capacity(blocks * BLOCK);
    for _ in 0..blocks {
        match random.random_range(0..kinds + 1) {
            0 => image.extend([0; BLOCK]),
            kind => image.extend(block_of(kind)),
        }
    }
    image
}

fn block_of(kind: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    StdRng::seed_from_u64(kind).fill(&mut block[..]);
    block
}

fn distinct(images: &[&[u8]]) -> usize {
    let blocks = images.iter().flat_map(|image| image.chunks(BLOCK));
    blocks.filter(|block| block.iter().any(|byte| *byte != 0)).collect::<HashSet<_>>().len()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

#[test]
fn a_full_backup_and_increments_restore_exactly() {
    let host = Host::new();
    let first = image(1, 3000, 700);
    let full = host.begin(1, "", &first).unwrap().run().unwrap();
    host.must_restore(&full, &first);
    host.must_be_exact(&[&first]);

    let mut second = first.clone();
    let dirty: Vec<u64> = (0..3000).step_by(37).collect();
    for block in &dirty {
        let at = *block as usize * BLOCK;
        second[at..at + BLOCK].copy_from_slice(&block_of(5000 + block % 50));
    }
    let client = host.begin(1, full.snapshot.as_str(), &second).unwrap();
    assert!(client.begun.disks[0].incremental);
    client.scan(dirty.iter().copied()).unwrap();
    client.call(Event::EndScan).unwrap();
    client.write_all().unwrap();
    assert_eq!(client.begun.progress.stage(), "write", "there is nothing to scan any more");
    let increment = client.commit().unwrap();
    assert_eq!(increment.counts.new, 50 * BLOCK as u64);
    assert_eq!((full.parent, increment.parent), (None, Some(full.snapshot)));
    host.must_restore(&increment, &second);
    host.must_restore(&full, &first);
    host.must_be_exact(&[&first, &second]);

    // A rebuilt index has every block once, too.
    let entries = upkeep::rebuild_index(&host.context, None, &mut |_| Ok(())).unwrap();
    assert_eq!(entries as usize, distinct(&[&first, &second]));
    let unique = &host.context.owners.figures().unique_blocks;
    assert_eq!(unique.load(std::sync::atomic::Ordering::Relaxed), entries);
    host.must_be_exact(&[&first, &second]);
}

#[test]
fn what_the_parent_has_is_settled_without_a_question() {
    let host = Host::new();
    let image = image(2, 2000, 900);
    host.begin(1, "", &image).unwrap().run().unwrap();
    let again = host.begin(1, "", &image).unwrap().run().unwrap();
    let zero = again.counts.zero;
    assert_eq!(again.counts.unchanged, again.counts.read - zero);
    assert_eq!((again.counts.new, again.counts.duplicate), (0, 0));
    assert_eq!(again.parent, None, "it was read in full");
    host.must_restore(&again, &image);
    host.must_be_exact(&[&image]);
}

#[test]
fn many_sessions_at_once_store_every_block_once() {
    let host = Host::new();
    let images: Vec<Vec<u8>> = (0..6).map(|seed| image(seed, 2500, 1500)).collect();
    let manifests: BTreeMap<usize, Manifest> = std::thread::scope(|scope| {
        let run = |n: usize| host.begin(n as u128 + 1, "", &images[n]).unwrap().run().unwrap();
        let threads: Vec<_> = (0..6).map(|n| scope.spawn(move || (n, run(n)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (n, manifest) in &manifests {
        host.must_restore(manifest, &images[*n]);
        assert_eq!(manifest.counts.undetected, 0);
    }
    let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    host.must_be_exact(&images);
}

#[test]
fn crossed_orders_end_and_store_nothing_twice() {
    let host = Host::new();
    let forth: Vec<u8> = (1..=400).flat_map(block_of).collect();
    let back: Vec<u8> = (1..=400).rev().flat_map(block_of).collect();
    let (a, b) = (host.begin(1, "", &forth).unwrap(), host.begin(2, "", &back).unwrap());
    // Each asks for a half first, so that each holds what the other one needs.
    a.scan(0..200).unwrap();
    b.scan(0..200).unwrap();
    a.scan(200..400).unwrap();
    b.scan(200..400).unwrap();
    a.call(Event::EndScan).unwrap();
    b.call(Event::EndScan).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| a.write_all().unwrap());
        b.write_all().unwrap();
    });
    host.must_restore(&a.commit().unwrap(), &forth);
    host.must_restore(&b.commit().unwrap(), &back);
    host.must_be_exact(&[&forth]);
}

#[test]
fn a_writer_that_dies_is_replaced() {
    let host = Host::new();
    let image = image(3, 1500, 600);
    let (writer, waiter) = (host.begin(1, "", &image).unwrap(), host.begin(2, "", &image).unwrap());
    writer.scan_all().unwrap();
    // It holds all grants, and writes some of them.
    let grants = writer.grants().unwrap();
    for extent in &grants.extents[..grants.extents.len() / 3] {
        writer.write(extent.at, extent.blocks.into()).unwrap();
    }
    waiter.scan_all().unwrap();
    std::thread::scope(|scope| {
        let done = scope.spawn(|| waiter.write_all());
        writer.die();
        done.join().unwrap().unwrap();
    });
    let manifest = waiter.commit().unwrap();
    assert_eq!(manifest.counts.undetected, 0);
    host.must_restore(&manifest, &image);
    host.must_be_clean();
}

#[test]
fn a_writer_that_is_slow_gives_up_what_it_has_not_packed() {
    let host = Host::new();
    let image = image(4, 1500, 600);
    let (slow, quick) = (host.begin(1, "", &image).unwrap(), host.begin(2, "", &image).unwrap());
    slow.scan_all().unwrap();
    let grants = slow.grants().unwrap();
    let (some, rest) = grants.extents.split_at(grants.extents.len() / 3);
    for extent in some {
        slow.write(extent.at, extent.blocks.into()).unwrap();
    }
    // The quick one takes the rest over, although the slow one lives and holds the grants.
    let manifest = quick.run().unwrap();
    assert_eq!(manifest.counts.undetected, 0);
    host.must_restore(&manifest, &image);
    // The slow one goes on with what it was granted long ago, and ends, too.
    for extent in rest {
        slow.write(extent.at, extent.blocks.into()).unwrap();
    }
    slow.write_all().unwrap();
    host.must_restore(&slow.commit().unwrap(), &image);
    host.must_be_exact(&[&image]);
}

#[test]
fn a_session_that_ends_without_commit_leaves_the_vm_free_and_a_tombstone() {
    let host = Host::new();
    let image = image(5, 300, 100);
    let client = host.begin(1, "", &image).unwrap();
    let snapshot = client.begun.snapshot;
    assert_eq!(host.begin(1, "", &image).err().unwrap().kind(), Kind::Busy);
    client.scan_all().unwrap();
    client.die();
    wait_until("the session's end", || host.context.registry.list().is_empty());
    let vm = VmId(Uuid::from_u128(1));
    let fate = host.context.manifests.fate(vm, snapshot).unwrap();
    assert!(matches!(fate, crate::store::commit::Fate::Tombstoned(_)), "{fate:?}");
    let manifest = host.begin(1, "", &image).unwrap().run().unwrap();
    host.must_restore(&manifest, &image);
    host.must_be_exact(&[&image]);
}

#[test]
fn a_client_that_lies_is_refused_and_harms_nobody() {
    let host = Host::new();
    let image = image(6, 300, 100);
    let refused = |break_it: &dyn Fn(&Client) -> Result<()>| {
        let client = host.begin(9, "", &image).unwrap();
        assert!(break_it(&client).is_err());
        assert!(client.commit().is_err(), "a broken session must not commit");
        client.die();
        wait_until("the session's end", || host.context.registry.list().is_empty());
    };
    refused(&|client| client.scan(1..5));
    refused(&|client| client.scan([5, 3].into_iter()));
    refused(&|client| client.write(Position { disk: 0, block: 0 }, 1));
    refused(&|client| client.commit().map(drop));
    let short = vec![crate::ids::Fingerprint([7; 20])];
    refused(&|client| {
        let extents = vec![Extent { first_block: 0, blocks: 2, zero: false }];
        let fingerprints = short.clone();
        client.call(|reply| Event::Submit { disk: 0, extents, fingerprints, reply })
    });
    // A block that is not what its fingerprint says must never enter.
    refused(&|client| {
        client.scan_all()?;
        let first = GrantExtent { blocks: 1, ..client.grants()?.extents[0] };
        let data = vec![0x55; BLOCK];
        client.call(|reply| Event::Write { runs: vec![first], data, reply })
    });
    // Bytes for more or fewer blocks than the runs name, and runs of nothing.
    for (blocks, bytes) in [(2, BLOCK), (1, 2 * BLOCK), (0, BLOCK), (0, 0)] {
        refused(&|client| {
            client.scan_all()?;
            let run = GrantExtent { blocks, ..client.grants()?.extents[0] };
            let data = vec![0x55; bytes];
            client.call(|reply| Event::Write { runs: vec![run], data, reply })
        });
    }
    assert_eq!(host.stored_slots(), 0);
    let manifest = host.begin(1, "", &image).unwrap().run().unwrap();
    host.must_restore(&manifest, &image);
    host.must_be_exact(&[&image]);
}

#[test]
fn a_disk_larger_than_any_can_be_is_refused() {
    let host = Host::new();
    let refused = begin(&host.context, request(1, "", u64::MAX), 0).err().unwrap();
    assert_eq!(refused.kind(), Kind::Usage, "{refused}");
    assert!(host.context.registry.list().is_empty());
}

#[test]
fn a_shard_that_points_at_a_wrong_slot_harms_nothing() {
    let host = Host::new();
    let first = image(7, 500, 200);
    let manifest = host.begin(1, "", &first).unwrap().run().unwrap();
    // Every fingerprint of a second image is said to be at a slot that holds another block,
    // at one that does not exist, or in a container that does not.
    let second: Vec<u8> = (1000..1300).flat_map(block_of).collect();
    let container = |counter| crate::ids::ContainerId {
        incarnation: host.context.store.journal().unwrap().incarnation(),
        counter,
    };
    let wrong = |n: usize| crate::ids::Address {
        container: container(if n % 3 == 2 { 4711 } else { 1 }),
        slot: crate::ids::Slot(if n % 3 == 1 { 60_000 } else { n as u16 % 100 }),
    };
    let entries = second
        .chunks(BLOCK)
        .enumerate()
        .map(|(n, block)| (host.context.store.fingerprinter().of(block), wrong(n)));
    let nowhere = crate::detect::JournalPosition { incarnation: crate::ids::Incarnation(99), n: 1 };
    host.context.owners.learn(entries.collect(), nowhere).unwrap();
    let other = host.begin(2, "", &second).unwrap().run().unwrap();
    assert_eq!(other.counts.undetected, 300 * BLOCK as u64);
    host.must_restore(&other, &second);
    host.must_restore(&manifest, &first);
    // What was written took the place of the lies.
    host.must_be_exact(&[&first, &second]);
}
