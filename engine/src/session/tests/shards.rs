//! The index is a hint: whatever becomes of its files, an engine that starts with them builds
//! what it needs anew, stores nothing twice and restores exactly.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::config::Config;
use crate::detect::{JournalPosition, Partition};
use crate::ids::Fingerprint;
use crate::start::{Started, start};

/// An engine that is stopped and started.
struct Engine {
    dir: tempfile::TempDir,
    config: Config,
    started: Option<Started>,
}

impl Engine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (store, key) = (dir.path().join("store"), dir.path().join("key"));
        let location = Location::Directory(store.clone());
        Store::init(&location, &InitOptions::default(), |made| made.save(&key)).unwrap();
        let mut config = Config::new(store.to_string_lossy().into_owned(), key);
        config.state_dir = dir.path().join("state");
        let started = Some(start(&config).unwrap());
        Engine { dir, config, started }
    }

    fn context(&self) -> &Context {
        &self.started.as_ref().unwrap().context
    }

    fn backup(&self, vm: u128, image: &[u8]) -> Manifest {
        let manifest = begin_in(self.context(), vm, "", image).unwrap().run().unwrap();
        assert!(restore_in(self.context(), &manifest).unwrap() == image);
        manifest
    }

    fn stop(&mut self) {
        let context = self.context().clone();
        wait_until("the sessions' end", || context.registry.list().is_empty());
        self.started.take().unwrap().stop();
    }

    fn start(&mut self) {
        self.started = Some(start(&self.config).unwrap());
    }

    fn index(&self) -> PathBuf {
        self.config.state_dir.join("index")
    }

    /// The files of runs.
    fn runs(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.index()).unwrap().map(|entry| entry.unwrap().path());
        let is_run =
            |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("run-");
        let mut runs: Vec<PathBuf> = files.filter(is_run).collect();
        runs.sort();
        assert!(!runs.is_empty());
        runs
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(started) = self.started.take() {
            started.stop();
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

fn replace(index: &Path, with: &Path) {
    fs::remove_dir_all(index).unwrap();
    copy(with, index);
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// A third of the way into every page of a file: keys and values are met alike.
fn flip_in_every_page(bytes: &mut [u8], seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    for page in bytes.chunks_mut(4096) {
        let at = random.random_range(0..page.len());
        page[at] ^= 1 << random.random_range(0..8);
    }
}

type Harm = Box<dyn Fn(&Engine)>;

fn harms(outdated: PathBuf, foreign: PathBuf) -> Vec<(&'static str, Harm)> {
    let current = |engine: &Engine| engine.index().join("CURRENT");
    let mut harms: Vec<(&'static str, Harm)> = vec![
        ("the index is gone", Box::new(|e| fs::remove_dir_all(e.index()).unwrap())),
        ("a run is gone", Box::new(|e| fs::remove_file(&e.runs()[0]).unwrap())),
        ("a run is cut", Box::new(|e| change(&e.runs()[0], |b| b.truncate(b.len() / 2)))),
        ("a run is empty", Box::new(|e| change(&e.runs()[0], Vec::clear))),
        ("CURRENT is gone", Box::new(move |e| fs::remove_file(current(e)).unwrap())),
        ("CURRENT is torn", Box::new(move |e| change(&current(e), |b| b.truncate(b.len() - 9)))),
        ("CURRENT is empty", Box::new(move |e| change(&current(e), Vec::clear))),
        ("the index is outdated", Box::new(move |e| replace(&e.index(), &outdated))),
        ("the index is of another store", Box::new(move |e| replace(&e.index(), &foreign))),
    ];
    for seed in 0..4 {
        let flip = move |e: &Engine| {
            e.runs().iter().for_each(|run| change(run, |b| flip_in_every_page(b, seed)));
        };
        harms.push(("bits of runs are flipped", Box::new(flip)));
        let flip = move |e: &Engine| change(&current(e), |b| flip_in_every_page(b, seed));
        harms.push(("bits of CURRENT are flipped", Box::new(flip)));
    }
    harms
}

#[test]
fn whatever_becomes_of_the_index_nothing_is_stored_twice_and_no_byte_is_wrong() {
    let mut foreign = Engine::new();
    foreign.backup(1, &image(90, 900, 500));
    foreign.stop();
    let mut engine = Engine::new();
    let (first, second) = (image(91, 1500, 700), image(92, 1500, 900));
    let one = engine.backup(1, &first);
    engine.stop();
    let outdated = engine.dir.path().join("outdated");
    copy(&engine.index(), &outdated);
    engine.start();
    let two = engine.backup(2, &second);
    let known = distinct(&[&first, &second]);
    for (n, (what, harm)) in harms(outdated, foreign.index()).into_iter().enumerate() {
        engine.stop();
        harm(&engine);
        engine.start();
        // A new VM has no parent to compare with: all it has is found in the index, or not.
        let again = engine.backup(100 + n as u128, &second);
        assert_eq!((again.counts.new, again.counts.undetected), (0, 0), "{what} ({n})");
        for (manifest, image) in [(&one, &first), (&two, &second)] {
            assert!(restore_in(engine.context(), manifest).unwrap() == *image, "{what}");
        }
        let (clean, said) = verify_in(engine.context());
        assert!(clean, "{what} ({n}): {said}");
        let figures = engine.context().owners.figures();
        let unique = figures.unique_blocks.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(unique as usize, known, "{what} ({n})");
        assert_eq!(stored_slots_in(engine.context()), known, "{what} ({n})");
    }
}

fn rebuild(engine: &Engine, partition: u16) -> Result<u64> {
    upkeep::rebuild_index(engine.context(), Some(Partition(partition)), &mut |_| Ok(()))
}

#[test]
fn wrong_entries_are_named_with_their_partition_and_gone_once_it_is_rebuilt() {
    let engine = Engine::new();
    let image = image(93, 1500, 900);
    engine.backup(1, &image);
    let owner = engine.context().owners.here();
    let held = |partition| owner.entries_after(Partition(partition), None).unwrap();
    let before: Vec<_> = (0..owner.partitions()).map(held).collect();
    // As a fault of the index would leave them: right fingerprints elsewhere, and some of no block.
    let elsewhere = before[0][0].1;
    let mut wrong: Vec<_> = before[3].iter().take(5).map(|entry| (entry.0, elsewhere)).collect();
    wrong.extend([0x30, 0x50].map(|first| (Fingerprint([first; Fingerprint::LEN]), elsewhere)));
    let known = JournalPosition { incarnation: elsewhere.container.incarnation, n: 1 };
    owner.learn(wrong, known).unwrap();

    let (clean, said) = verify_in(engine.context());
    assert!(!clean && said.contains("--partition 3 ") && said.contains("--partition 5 "), "{said}");
    assert_eq!(rebuild(&engine, 3).unwrap(), before[3].len() as u64);
    assert_eq!(held(3), before[3]);
    let (clean, said) = verify_in(engine.context());
    assert!(
        !clean && !said.contains("--partition 3 ") && said.contains("--partition 5 "),
        "{said}"
    );
    assert_eq!(rebuild(&engine, 5).unwrap(), before[5].len() as u64);
    let (clean, said) = verify_in(engine.context());
    assert!(clean, "{said}");
    let figures = engine.context().owners.figures();
    let read =
        |figure: &std::sync::atomic::AtomicU64| figure.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(read(&figures.unique_blocks) as usize, distinct(&[&image]));
    assert_eq!(read(&figures.double_blocks), 0);
    let refused = rebuild(&engine, owner.partitions()).unwrap_err();
    assert_eq!(refused.kind(), Kind::Usage);
    assert!(refused.to_string().contains("0 to 15"), "{refused}");
    // Nothing of it is stored again.
    assert_eq!(engine.backup(2, &image).counts.new, 0);
}

#[test]
fn an_index_whose_damage_is_met_by_a_look_at_it_is_filled_again() {
    let mut engine = Engine::new();
    let image = image(94, 1500, 900);
    engine.backup(1, &image);
    engine.stop();
    engine.runs().iter().for_each(|run| change(run, |bytes| flip_in_every_page(bytes, 1)));
    engine.start();
    // As verify and checkpoints look.
    let owner = engine.context().owners.here();
    let met = (0..owner.partitions()).filter_map(|n| owner.entries_after(Partition(n), None).err());
    assert_eq!(met.map(|error| error.kind()).collect::<Vec<_>>(), [Kind::Damaged]);
    assert_eq!(engine.backup(2, &image).counts.new, 0);
    assert!(verify_in(engine.context()).0);
}
