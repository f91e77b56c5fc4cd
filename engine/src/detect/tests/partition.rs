//! One partition is rebuilt from nothing, whatever it held at any level; the others stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{
    Journal, address, container, export, fingerprint, open, position, tempdir, tiny_options,
};
use crate::detect::{DetectOptions, Detector, Partition, Rebuild, Watermark};
use crate::ids::{Address, Fingerprint, Incarnation};

type Entries = BTreeMap<Fingerprint, Address>;

/// An index with wrong entries, and what is right.
struct World {
    rng: StdRng,
    options: DetectOptions,
    detector: Detector,
    journal: Journal,
    /// What the detector was told: the last address of each fingerprint.
    told: Entries,
}

impl World {
    fn new(dir: &std::path::Path, seed: u64) -> Self {
        println!("seed {seed}");
        let options = tiny_options();
        let (detector, _) = open(dir, &options, &Vec::new());
        let (journal, told) = (Vec::new(), Entries::new());
        let rng = StdRng::seed_from_u64(seed);
        World { rng, options, detector, journal, told }
    }

    /// A container is sealed. Of what it holds the index may miss entries, have other addresses, or have
    /// such that are nowhere.
    fn learn(&mut self, wrong: bool) {
        let number = self.journal.len() as u64 + 1;
        let entries = container(&mut self.rng, number);
        let mut told: Vec<_> = entries.clone();
        if wrong {
            told.retain(|_| self.rng.random_bool(0.8));
            for (_, at) in &mut told {
                if self.rng.random_bool(0.2) {
                    *at = address(number + 10_000, 1);
                }
            }
            for _ in 0..self.rng.random_range(0..5) {
                told.push((fingerprint(self.rng.random_range(1000..1100)), address(number, 77)));
            }
            told.sort_by_key(|(fingerprint, _)| *fingerprint);
            told.dedup_by_key(|(fingerprint, _)| *fingerprint);
        }
        self.detector.learn(&mut told.clone(), position(number)).unwrap();
        self.journal.push(entries);
        self.told.extend(told);
    }

    fn live(&mut self, wrong: bool) {
        for _ in 0..self.rng.random_range(10..60) {
            match self.rng.random_range(0..10) {
                0..5 => self.learn(wrong),
                5 => self.detector.flush().unwrap(),
                _ => drop(self.detector.maintain().unwrap()),
            }
        }
    }

    fn truth(&self) -> Entries {
        self.journal.iter().flatten().copied().collect()
    }

    fn any_partition(&mut self) -> Partition {
        Partition(self.rng.random_range(0..self.options.partitions()))
    }

    /// Begins it, while life goes on between its steps.
    fn begin(&mut self, partition: Partition) -> Rebuild {
        loop {
            if let Some(begun) = self.detector.rebuild_partition(partition).unwrap() {
                return begun;
            }
            if self.rng.random_bool(0.3) {
                self.learn(false);
            }
        }
    }

    /// Feeds all that the journal has, as the store's directories would; what is recorded later may be read
    /// or not.
    fn build(&mut self, mut rebuild: Rebuild) {
        let read = self.journal.len();
        for entries in &self.journal {
            rebuild.feed(entries).unwrap();
        }
        self.learn(false);
        assert!(!self.detector.maintain().unwrap());
        let mut watermark = Watermark::default();
        watermark.raise(Incarnation(3), read as u64);
        let rebuilt = rebuild.build(watermark).unwrap();
        self.learn(false);
        self.detector.install(rebuilt).unwrap();
    }

    fn rebuild(&mut self, partition: Partition) {
        let begun = self.begin(partition);
        self.build(begun);
    }
}

#[test]
fn what_was_wrong_in_a_partition_is_gone_and_the_others_are_untouched() {
    for _ in 0..12 {
        let dir = tempdir();
        let mut world = World::new(dir.path(), rand::random());
        world.live(true);
        let partition = world.any_partition();
        let applied = world.detector.applied().clone();
        world.rebuild(partition);
        let options = world.options.clone();
        let is_of_it = |entry: &(Fingerprint, Address)| options.partition_of(&entry.0) == partition;
        let (truth, told) = (world.truth(), world.told.clone());
        let right = truth.into_iter().filter(is_of_it);
        let expected: Entries =
            told.into_iter().filter(|entry| !is_of_it(entry)).chain(right).collect();
        let expected: Vec<_> = expected.into_iter().collect();
        assert_eq!(export(&mut world.detector).unwrap(), expected);
        // It goes no further back, and no further ahead than all partitions have it.
        let now = world.detector.applied().get(Incarnation(3));
        assert!(now > applied.get(Incarnation(3)));
        assert_eq!(now as usize, world.journal.len());
        // Merges and a restart change nothing of that.
        while world.detector.maintain().unwrap() {}
        assert_eq!(export(&mut world.detector).unwrap(), expected);
        let World { detector, journal, .. } = world;
        drop(detector);
        let (mut detector, report) = open(dir.path(), &options, &journal);
        assert_eq!(report.set_aside, None);
        assert_eq!(export(&mut detector).unwrap(), expected);
    }
}

#[test]
fn a_new_index_that_is_never_installed_leaves_nothing_on_the_disk() {
    let dir = tempdir();
    let mut world = World::new(dir.path(), rand::random());
    world.live(false);
    let runs = || {
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with("run-")).count()
    };
    let mut rebuild = world.detector.rebuild().unwrap();
    let before = runs();
    world.journal.iter().for_each(|entries| rebuild.feed(entries).unwrap());
    let rebuilt = rebuild.build(Watermark::default()).unwrap();
    assert!(runs() > before);
    drop(rebuilt);
    assert_eq!(runs(), before);
}

/// Unique and double blocks are counted exactly, partition by partition.
#[test]
fn what_is_counted_of_a_partition_is_counted_anew() {
    for _ in 0..8 {
        let dir = tempdir();
        let mut world = World::new(dir.path(), rand::random());
        world.live(true);
        for partition in world.detector.partitions().collect::<Vec<_>>() {
            // Nothing comes meanwhile: what did would be met when it is merged.
            let mut rebuild = loop {
                if let Some(begun) = world.detector.rebuild_partition(partition).unwrap() {
                    break begun;
                }
            };
            world.journal.iter().for_each(|entries| rebuild.feed(entries).unwrap());
            world.detector.install(rebuild.build(Watermark::default()).unwrap()).unwrap();
        }
        let (mut addresses, mut stored) = (BTreeSet::new(), 0);
        for (fingerprint, at) in world.journal.iter().flatten() {
            stored += u64::from(addresses.insert((*fingerprint, *at)));
        }
        let unique = world.truth().len() as u64;
        assert_eq!(
            (world.detector.entries(), world.detector.duplicates()),
            (unique, stored - unique)
        );
    }
}

#[test]
fn a_rebuild_of_a_partition_that_is_dropped_changes_nothing() {
    let dir = tempdir();
    let mut world = World::new(dir.path(), rand::random());
    world.live(true);
    let partition = world.any_partition();
    let mut rebuild = world.begin(partition);
    rebuild.feed(&world.journal.concat()).unwrap();
    drop(rebuild.build(Watermark::default()).unwrap());
    let told: Vec<_> = world.told.into_iter().collect();
    assert_eq!(export(&mut world.detector).unwrap(), told);
    while world.detector.maintain().unwrap() {}
    assert_eq!(export(&mut world.detector).unwrap(), told);
}
