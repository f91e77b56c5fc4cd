//! Several engines on one store that answer for a part of the fingerprints each; frames go from one
//! to the other by hand.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::damage::{address_in, different};
use super::*;
use crate::cluster::map::{MapEpoch, Member, PartitionMap};
use crate::cluster::outbox::FrameNumber;
use crate::cluster::{Caller, Cluster, Here, Instance, SILENCE};
use crate::detect::Partition;
use crate::ids::{HostId, Slice};
use crate::moving::{self, Pace};
use crate::session::registry::Registry;
use crate::store::damage::Found;

/// One of the engines.
pub(super) struct Engine {
    pub(super) context: Context,
    pub(super) cluster: Arc<Cluster>,
    thread: Option<std::thread::JoinHandle<()>>,
    mover: Option<std::thread::JoinHandle<()>>,
    /// Seconds that its clock is ahead.
    late: Arc<AtomicU64>,
}

/// All of them, and what carries their frames.
pub(super) struct Hosts {
    pub(super) engines: Vec<Arc<Engine>>,
    /// Whether frames of one host come to another.
    links: Arc<Vec<Vec<AtomicBool>>>,
    stop: Arc<AtomicBool>,
    wire: Option<std::thread::JoinHandle<()>>,
    dir: tempfile::TempDir,
}

/// All hosts go by a new map `settle` after one of them at the latest.
pub(super) const PACE: Pace =
    Pace { settle: Duration::from_millis(100), look: Duration::from_millis(50), least: 500 };

/// A map of these hosts.
pub(super) fn map(epoch: u64, hosts: &[u16]) -> PartitionMap {
    let member = |n: &u16| Member {
        number: HostId(*n),
        name: format!("hv{n}"),
        address: String::new(),
        capacity: 1,
    };
    PartitionMap::at(MapEpoch(epoch), hosts.iter().map(member).collect()).unwrap()
}

impl Engine {
    fn open(
        (dir, location): (&Path, &Location),
        key: StoreKey,
        us: HostId,
        map: PartitionMap,
        pace: Pace,
    ) -> Self {
        let home = dir.join(format!("hv{}", us.0));
        let work_dir = home.join("sessions");
        std::fs::create_dir_all(&work_dir).unwrap();
        let objects = objects_at(location, dir).unwrap();
        let state = home.join("state");
        let store =
            Store::open_objects(objects, location, key, Some(&state), StoreOptions::default())
                .unwrap();
        let part = map.slices(us).digest();
        let options = DetectOptions { part, ..DetectOptions::new(store.id()) };
        let (mut detector, report) = Detector::open(&home.join("index"), options).unwrap();
        let ours = map.clone();
        let owns = move |fingerprint: &_| ours.owner(fingerprint) == us;
        upkeep::refill(&store, &mut detector, &report.watermark, &owns).unwrap();
        let refilled = store.clone();
        let refill = move |detector: &mut Detector| {
            let watermark = detector.watermark();
            upkeep::refill(&refilled, detector, &watermark, &owns)
        };
        let (owner, thread) = Owner::start(detector, Box::new(refill)).unwrap();
        static STARTS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
        let start = STARTS.fetch_add(1, Ordering::Relaxed);
        let registry = Arc::new(Registry::on(us, start * 1000));
        let late = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&late);
        let here = Here {
            owner: Box::new(owner.clone()),
            registry: Arc::clone(&registry),
            clock: Box::new(move || {
                Instant::now() + Duration::from_secs(clock.load(Ordering::Acquire))
            }),
        };
        let instance = Instance(u64::from(start) << 32);
        let spill = (work_dir.as_path(), 64 << 10);
        let place = (map, us, true);
        let cluster = Cluster::new(place, instance, here, spill, |_| Box::new(|| ()));
        let context = Context {
            manifests: Manifests::of(&store, &work_dir),
            damage: Arc::new(Damage::load(&store).unwrap()),
            store,
            owners: Owners::among(owner, Arc::clone(&cluster)),
            registry,
            budget: Budget::new(32 << 20).unwrap(),
            work_dir,
            host: format!("hv{}", us.0),
            rebuilding: Arc::default(),
            tidying: Arc::default(),
            patience: Duration::from_millis(300),
        };
        let moved = context.clone();
        let mover = std::thread::spawn(move || moving::keep_part(&moved, pace));
        Engine { context, cluster, thread: Some(thread), mover: Some(mover), late }
    }

    pub(super) fn backup(&self, vm: u128, image: &[u8]) -> Manifest {
        begin_in(&self.context, vm, "", image).unwrap().run().unwrap()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.cluster.end_moves();
        self.mover.take().unwrap().join().unwrap();
        self.context.owners.here().stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Carries the frames that wait, from one host to another, and says how many these were.
fn carry(from: &Engine, to: &Engine) -> usize {
    let (a, b) = (from.cluster.us(), to.cluster.us());
    if !to.cluster.others().contains(&a) || !from.cluster.others().contains(&b) {
        return 0;
    }
    let caller = Caller { host: a, instance: from.cluster.instance(b) };
    let welcome = to.cluster.greeted(caller);
    if welcome.unreached {
        from.cluster.unreached(b, to.cluster.instance(a));
        return 0;
    }
    let ours = (b, caller.instance);
    let Ok(mut next) = from.cluster.connected(ours, to.cluster.instance(a), welcome.received)
    else {
        return 0;
    };
    let mut carried = 0;
    while let Some((number, frame)) = from.cluster.next(ours, next).unwrap_or(None) {
        if to.cluster.take(caller, number, &frame).is_err() {
            break;
        }
        if from.cluster.taken(ours, number).is_err() {
            break;
        }
        next = FrameNumber(number.0 + 1);
        carried += 1;
    }
    carried
}

impl Hosts {
    pub(super) fn new(count: usize) -> Self {
        let all: Vec<u16> = (0..count as u16).collect();
        Self::with(&vec![map(1, &all); count])
    }

    /// Hosts that begin with a map each.
    fn with(maps: &[PartitionMap]) -> Self {
        Self::paced(maps, PACE)
    }

    pub(super) fn paced(maps: &[PartitionMap], pace: Pace) -> Self {
        let count = maps.len();
        let dir = tempfile::tempdir().unwrap();
        let location = Location::Directory(dir.path().join("store"));
        let key = Store::init(&location, &InitOptions::default(), |_| Ok(())).unwrap();
        let text = key.to_text().to_string();
        let key = || StoreKey::from_text(&text).unwrap();
        let engine = |(n, map): (usize, &PartitionMap)| {
            let place = (dir.path(), &location);
            Engine::open(place, key(), HostId(n as u16), map.clone(), pace)
        };
        let engines: Vec<_> = maps.iter().enumerate().map(|n| Arc::new(engine(n))).collect();
        let up = || (0..count).map(|_| AtomicBool::new(true)).collect();
        let links: Arc<Vec<Vec<AtomicBool>>> = Arc::new((0..count).map(|_| up()).collect());
        let stop = Arc::new(AtomicBool::new(false));
        let wire = std::thread::spawn({
            let (engines, links, stop) = (engines.clone(), Arc::clone(&links), Arc::clone(&stop));
            move || {
                while !stop.load(Ordering::Acquire) {
                    let mut carried = 0;
                    for (a, from) in engines.iter().enumerate() {
                        for (b, to) in engines.iter().enumerate() {
                            if a != b && links[a][b].load(Ordering::Acquire) {
                                carried += carry(from, to);
                            } else if a != b {
                                from.cluster.disconnected(HostId(b as u16));
                            }
                        }
                    }
                    if carried == 0 {
                        std::thread::park_timeout(Duration::from_millis(1));
                    }
                }
            }
        });
        Hosts { engines, links, stop, wire: Some(wire), dir }
    }

    pub(super) fn store(&self) -> std::path::PathBuf {
        self.dir.path().join("store")
    }

    /// Breaks or mends the links of a host with all others, both ways.
    fn link(&self, host: usize, up: bool) {
        for other in 0..self.engines.len() {
            self.links[host][other].store(up, Ordering::Release);
            self.links[other][host].store(up, Ordering::Release);
        }
    }

    /// Every host restores every snapshot, and finds nothing wrong.
    pub(super) fn must_be_whole(&self, snapshots: &[(Manifest, &[u8])]) {
        for engine in &self.engines {
            for (manifest, image) in snapshots {
                assert!(restore_in(&engine.context, manifest).unwrap() == *image, "it differs");
            }
            let (clean, said) = verify_in(&engine.context);
            assert!(clean, "{said}");
        }
    }

    /// Every block of these images is stored once, and known to one host.
    pub(super) fn must_be_exact(&self, images: &[&[u8]]) {
        assert_eq!(stored_slots_in(&self.engines[0].context), distinct(images));
        let unique = |engine: &Arc<Engine>| {
            engine.context.owners.figures().unique_blocks.load(Ordering::Relaxed)
        };
        let expected = distinct(images) as u64;
        wait_until("what was learned", || self.engines.iter().map(unique).sum::<u64>() == expected);
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.wire.take().unwrap().join().unwrap();
    }
}

#[test]
fn what_any_host_has_stored_no_other_one_stores_again() {
    let hosts = Hosts::new(3);
    let images = [image(1, 3000, 2000), image(2, 3000, 2000), image(3, 2000, 2500)];
    let mut done = Vec::new();
    for (host, image) in images.iter().enumerate() {
        done.push((hosts.engines[host].backup(host as u128 + 1, image), &image[..]));
    }
    let all: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    assert!(done.iter().all(|(manifest, _)| manifest.counts.undetected == 0));
    hosts.must_be_exact(&all);
    hosts.must_be_whole(&done);
    // Each host knows its own part, and no other.
    for engine in &hosts.engines {
        let here = engine.context.owners.figures().unique_blocks.load(Ordering::Relaxed);
        let share = engine.cluster.map().slices(engine.cluster.us()).len();
        let fair = distinct(&all) * share / Slice::COUNT;
        assert!(here.abs_diff(fair as u64) < fair as u64 / 4, "{here} instead of {fair}");
    }
}

#[test]
fn backups_on_all_hosts_at_once_store_a_common_block_once() {
    let hosts = Hosts::new(4);
    let images: Vec<_> = (0..8).map(|n| image(n, 1500, 1000)).collect();
    let done: Vec<Manifest> = std::thread::scope(|scope| {
        let run = |(n, image): (usize, &'_ Vec<u8>)| {
            let (engine, image) = (&hosts.engines[n % 4], image.clone());
            scope.spawn(move || engine.backup(n as u128 + 1, &image))
        };
        let threads: Vec<_> = images.iter().enumerate().map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(done.iter().all(|manifest| manifest.counts.undetected == 0));
    let all: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    hosts.must_be_exact(&all);
    hosts.must_be_whole(&done.into_iter().zip(all).collect::<Vec<_>>());
}

#[test]
fn a_writer_on_another_host_that_is_slow_gives_up_what_it_has_not_packed() {
    let hosts = Hosts::new(2);
    let common = image(7, 1200, 5000);
    let slow = begin_in(&hosts.engines[0].context, 1, "", &common).unwrap();
    slow.scan_all().unwrap();
    // It has its grants, and does not write.
    let grants = slow.grants().unwrap();
    assert!(!grants.extents.is_empty());
    let quick = hosts.engines[1].backup(2, &common);
    assert_eq!(quick.counts.undetected, 0);
    for extent in grants.extents {
        slow.write(extent.at, extent.blocks.into()).unwrap();
    }
    slow.write_all().unwrap();
    let slow = slow.commit().unwrap();
    hosts.must_be_exact(&[&common]);
    hosts.must_be_whole(&[(quick, &common), (slow, &common)]);
}

#[test]
fn a_host_that_is_silent_is_given_up_and_comes_back() {
    let hosts = Hosts::new(3);
    let before = image(11, 1500, 1200);
    let first = hosts.engines[0].backup(1, &before);
    hosts.must_be_exact(&[&before]);
    hosts.link(2, false);
    // A session that waits for it goes on once it is given up, as do all that begin later.
    let during = image(12, 1500, 1500);
    let second = std::thread::scope(|scope| {
        let backup = scope.spawn(|| hosts.engines[1].backup(2, &during));
        wait_until("the end of the backup", || {
            for engine in &hosts.engines {
                engine.cluster.look();
                engine.late.fetch_add(SILENCE.as_secs() + 1, Ordering::AcqRel);
                engine.cluster.look();
            }
            backup.is_finished()
        });
        backup.join().unwrap()
    });
    assert!(second.counts.undetected > 0);
    let done = [(first, &before[..]), (second, &during[..])];
    done.iter().for_each(|(manifest, image)| {
        assert!(restore_in(&hosts.engines[0].context, manifest).unwrap() == *image);
    });
    // It is back, and learns from the journals what it was not told: nothing is stored again.
    hosts.link(2, true);
    wait_until("the links", || {
        hosts.engines.iter().all(|engine| engine.cluster.view().iter().all(|host| !host.lost))
    });
    let stored = stored_slots_in(&hosts.engines[0].context);
    wait_until("what it missed", || {
        let again = hosts.engines[0].backup(3, &during);
        again.counts.new == 0 && again.counts.undetected == 0
    });
    let doubles = stored - distinct(&[&before, &during]);
    assert!(doubles as u64 * BLOCK as u64 <= done[1].0.counts.undetected, "{doubles}");
    hosts.must_be_whole(&done);
}

pub(super) fn wait_filled(hosts: &[&Arc<Engine>]) {
    wait_until("the indexes", || hosts.iter().all(|engine| engine.cluster.filling() == 0));
}

#[test]
fn a_host_that_joins_takes_over_its_share_and_nothing_is_stored_twice() {
    let (two, three) = (map(1, &[0, 1]), map(2, &[0, 1, 2]));
    let hosts = Hosts::with(&[two.clone(), two.clone(), two]);
    let [first, second, third] = [0, 1, 2].map(|n| &hosts.engines[n]);
    let old = image(31, 3000, 2500);
    let before = first.backup(1, &old);
    assert_eq!(before.counts.undetected, 0);
    // One is under way while the others come to know the map; its questions come back to it.
    let during = image(32, 3000, 2500);
    let running = begin_in(&second.context, 2, "", &during).unwrap();
    std::thread::scope(|scope| {
        third.cluster.adopt(three.clone()).unwrap();
        first.cluster.adopt(three.clone()).unwrap();
        let scan = scope.spawn(|| running.scan_all().unwrap());
        second.cluster.adopt(three.clone()).unwrap();
        scan.join().unwrap();
    });
    running.write_all().unwrap();
    let running = running.commit().unwrap();
    assert_eq!(running.counts.undetected, 0);
    wait_filled(&[first, second, third]);
    // All that is known is known: whoever has it now.
    for (vm, (engine, image)) in
        [(third, &old), (first, &during), (second, &old)].iter().enumerate()
    {
        let again = engine.backup(10 + vm as u128, image);
        assert_eq!((again.counts.new, again.counts.undetected), (0, 0), "{vm}");
    }
    hosts.must_be_exact(&[&old, &during]);
    hosts.must_be_whole(&[(before, &old), (running, &during)]);
}

#[test]
fn what_a_host_that_left_answered_for_the_others_answer_for() {
    let hosts = Hosts::new(3);
    let [first, second, third] = [0, 1, 2].map(|n| &hosts.engines[n]);
    let old = image(41, 3000, 2500);
    let before = third.backup(1, &old);
    hosts.must_be_exact(&[&old]);
    hosts.link(2, false);
    let left = map(2, &[0, 1]);
    // A session that waits for it goes on as soon as the map says that it is gone.
    let waiting = image(42, 2000, 1500);
    let during = std::thread::scope(|scope| {
        let backup = scope.spawn(|| first.backup(2, &waiting));
        wait_until("its questions", || first.cluster.needs(HostId(2)));
        first.cluster.adopt(left.clone()).unwrap();
        second.cluster.adopt(left).unwrap();
        backup.join().unwrap()
    });
    wait_filled(&[first, second]);
    for (vm, engine) in [first, second].iter().enumerate() {
        let again = engine.backup(10 + vm as u128, &old);
        assert_eq!((again.counts.new, again.counts.undetected), (0, 0), "{vm}");
        let again = engine.backup(20 + vm as u128, &waiting);
        assert_eq!((again.counts.new, again.counts.undetected), (0, 0), "{vm}");
    }
    // What nobody answered was written without an answer, and nothing else.
    let doubles = stored_slots_in(&first.context) - distinct(&[&old, &waiting]);
    assert!(doubles as u64 * BLOCK as u64 <= during.counts.undetected, "{doubles}");
    for engine in [first, second] {
        for (manifest, image) in [(&before, &old), (&during, &waiting)] {
            assert!(restore_in(&engine.context, manifest).unwrap() == *image, "it differs");
        }
        let (clean, said) = verify_in(&engine.context);
        assert!(clean, "{said}");
    }
}

#[test]
fn a_host_that_missed_a_map_fills_its_index_again() {
    let hosts = Hosts::new(3);
    let [first, second, third] = [0, 1, 2].map(|n| &hosts.engines[n]);
    // It is out and back, and never heard of that; others answered for its part meanwhile.
    hosts.link(2, false);
    let without = map(2, &[0, 1]);
    first.cluster.adopt(without.clone()).unwrap();
    second.cluster.adopt(without).unwrap();
    wait_filled(&[first, second]);
    let during = image(51, 2000, 1500);
    let made = first.backup(1, &during);
    assert_eq!(made.counts.undetected, 0);
    let back = map(3, &[0, 1, 2]);
    for engine in [third, first, second] {
        engine.cluster.adopt(back.clone()).unwrap();
    }
    hosts.link(2, true);
    wait_filled(&[first, second, third]);
    let again = third.backup(2, &during);
    assert_eq!((again.counts.new, again.counts.undetected), (0, 0));
    hosts.must_be_exact(&[&during]);
    hosts.must_be_whole(&[(made, &during)]);
}

#[test]
fn for_a_writer_that_is_cut_off_nobody_waits() {
    let hosts = Hosts::new(3);
    let common = image(71, 1500, 1500);
    let slow = begin_in(&hosts.engines[0].context, 1, "", &common).unwrap();
    slow.scan_all().unwrap();
    let grants = slow.grants().unwrap();
    assert!(!grants.extents.is_empty());
    // It holds the grants of the others' parts, too; then nobody hears of it any more.
    hosts.link(0, false);
    let quick = std::thread::scope(|scope| {
        let backup = scope.spawn(|| hosts.engines[1].backup(2, &common));
        wait_until("the end of the backup", || {
            for engine in &hosts.engines[1..] {
                engine.cluster.look();
                engine.late.fetch_add(SILENCE.as_secs() + 1, Ordering::AcqRel);
                engine.cluster.look();
                engine.cluster.look();
            }
            backup.is_finished()
        });
        backup.join().unwrap()
    });
    hosts.link(0, true);
    for extent in grants.extents {
        slow.write(extent.at, extent.blocks.into()).unwrap();
    }
    slow.write_all().unwrap();
    let slow = slow.commit().unwrap();
    for engine in &hosts.engines {
        for manifest in [&quick, &slow] {
            assert!(restore_in(&engine.context, manifest).unwrap() == common, "it differs");
        }
    }
    let (clean, said) = verify_in(&hosts.engines[2].context);
    assert!(clean, "{said}");
}

#[test]
fn what_one_host_found_damaged_no_other_one_deduplicates_against() {
    let hosts = Hosts::new(2);
    let [first, second] = [0, 1].map(|n| &hosts.engines[n]);
    let content = different(1, 600);
    let before = first.backup(1, &content);
    hosts.must_be_exact(&[&content]);
    // Both have started, and only one meets the damage.
    let victim = address_in(&first.context, &before, 300);
    let slots = (victim.slot.0, 1);
    let found = Found { container: victim.container, slots, how: "test".into() };
    first.context.damage.record(&first.context.store, &[found]).unwrap();
    assert!(!second.context.damage.map().has(victim));
    let again = second.backup(2, &content);
    assert!(second.context.damage.map().has(victim));
    assert_eq!(again.counts.new, BLOCK as u64, "the damaged block is stored again, nothing else");
    assert_ne!(address_in(&second.context, &again, 300), victim);
    // A later mark takes it back, for the other one as well: the slot was whole.
    let (clean, said) = verify_in(&first.context);
    assert!(clean, "{said}");
    let third = second.backup(3, &content);
    assert!(!second.context.damage.map().has(victim));
    assert_eq!(third.counts.new, 0);
    hosts.must_be_whole(&[(before, &content), (again, &content), (third, &content)]);
}

#[test]
fn a_host_rebuilds_its_share_of_a_partition_and_names_the_others() {
    // The third one was drained.
    let members = map(1, &[0, 1, 2]).without("hv2").unwrap();
    let hosts = Hosts::with(&vec![members; 3]);
    let image = image(61, 3000, 2000);
    let done = hosts.engines[0].backup(1, &image);
    hosts.must_be_exact(&[&image]);
    let rebuild = |host: usize| {
        let mut said = String::new();
        let context = &hosts.engines[host].context;
        let here = context.owners.here();
        let held = here.entries_after(Partition(7), None).unwrap();
        let built = upkeep::rebuild_index(context, Some(Partition(7)), &mut |line| {
            said += &line;
            Ok(())
        })?;
        assert_eq!(here.entries_after(Partition(7), None).unwrap(), held);
        assert_eq!(built, held.len() as u64);
        Ok::<_, crate::error::Error>(said)
    };
    assert!(rebuild(0).unwrap().contains("hv1: the rest of partition 7"));
    assert!(rebuild(1).unwrap().contains("hv0: the rest of partition 7"));
    let refused = rebuild(2).unwrap_err();
    assert_eq!(refused.kind(), Kind::Usage);
    assert!(refused.to_string().contains("is of hv0, hv1"), "{refused}");
    hosts.must_be_exact(&[&image]);
    hosts.must_be_whole(&[(done, &image)]);
}
