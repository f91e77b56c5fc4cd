//! Crashes between any two file operations, and damage to any file: the index opens, and once the
//! journal is learned it is what it was.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{
    Journal, address, container, export, fingerprint, open, position, refill, tempdir, tiny_options,
};
use crate::detect::current::Level;
use crate::detect::{DetectOptions, Detector, Partition, Rebuild, Rebuilt, Verdict, Watermark};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, Fingerprint, Incarnation, Sequence, SessionId, StoreId};

/// The files of a directory and of those in it, with their contents.
type Files = BTreeMap<String, Vec<u8>>;

fn files(dir: &Path) -> Files {
    let mut found = Files::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            for (inner, bytes) in files(&entry.path()) {
                found.insert(format!("{name}/{inner}"), bytes);
            }
        } else {
            found.insert(name, fs::read(entry.path()).unwrap());
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

/// The directories that a crash between the operations that led from `before` to `after` can leave:
/// files are written first (whole or torn), then CURRENT is replaced, then old files go.
fn crashes(rng: &mut StdRng, before: &Files, after: &Files) -> Vec<Files> {
    let mut states = Vec::new();
    let mut state = before.clone();
    let written = |(name, bytes): &(&String, &Vec<u8>)| {
        *name != "CURRENT" && before.get(*name) != Some(bytes)
    };
    for (name, bytes) in after.iter().filter(written) {
        let torn = bytes[..rng.random_range(0..=bytes.len())].to_vec();
        state.insert(name.clone(), torn);
        states.push(state.clone());
        state.insert(name.clone(), bytes.clone());
        states.push(state.clone());
    }
    let current = &after["CURRENT"];
    let torn = current[..rng.random_range(0..=current.len())].to_vec();
    state.insert("CURRENT.new".into(), torn);
    states.push(state.clone());
    state.remove("CURRENT.new");
    state.insert("CURRENT".into(), current.clone());
    states.push(state.clone());
    for name in before.keys().filter(|name| !after.contains_key(*name)) {
        state.remove(name);
        states.push(state.clone());
    }
    states
}

/// One detector's life: sessions ask, write and seal; merges go on; partitions are rebuilt.
struct Life {
    rng: StdRng,
    options: DetectOptions,
    detector: Detector,
    journal: Journal,
    rebuilding: Rebuilding,
}

/// How far the rebuild of a partition is.
enum Rebuilding {
    No,
    Begun(Rebuild),
    Built(Rebuilt),
}

impl Life {
    fn begin(dir: &Path, options: &DetectOptions, seed: u64) -> Self {
        println!("seed {seed}");
        let (detector, _) = open(dir, options, &Vec::new());
        let (rng, options) = (StdRng::seed_from_u64(seed), options.clone());
        Life { rng, options, detector, journal: Vec::new(), rebuilding: Rebuilding::No }
    }

    fn truth(&self) -> Vec<(Fingerprint, Address)> {
        let entries = self.journal.iter().flatten().copied();
        entries.collect::<BTreeMap<_, _>>().into_iter().collect()
    }

    fn learn(&mut self) {
        let number = self.journal.len() as u64 + 1;
        let entries = container(&mut self.rng, number);
        self.detector.learn(&mut entries.clone(), position(number)).unwrap();
        self.journal.push(entries);
    }

    fn ask(&mut self) {
        let requests: Vec<_> = (0..self.rng.random_range(0..50))
            .map(|i| (fingerprint(self.rng.random_range(0..500)), Sequence(i)))
            .collect();
        self.detector.submit(SessionId(self.rng.random_range(0..4)), &requests).unwrap();
    }

    /// One step of a rebuild.
    fn rebuild(&mut self) {
        self.rebuilding = match std::mem::replace(&mut self.rebuilding, Rebuilding::No) {
            Rebuilding::No => {
                let partition = Partition(self.rng.random_range(0..self.options.partitions()));
                let begun = self.detector.rebuild_partition(partition).unwrap();
                begun.map_or(Rebuilding::No, Rebuilding::Begun)
            }
            Rebuilding::Begun(mut rebuild) => {
                self.journal.iter().for_each(|entries| rebuild.feed(entries).unwrap());
                let mut watermark = Watermark::default();
                watermark.raise(Incarnation(3), self.journal.len() as u64);
                Rebuilding::Built(rebuild.build(watermark).unwrap())
            }
            Rebuilding::Built(rebuilt) => {
                self.detector.install(rebuilt).unwrap();
                Rebuilding::No
            }
        };
    }

    fn step(&mut self) {
        match self.rng.random_range(0..13) {
            0..3 => self.learn(),
            3 => self.ask(),
            4 => {
                for partition in self.detector.partitions().collect::<Vec<_>>() {
                    self.detector.pass(partition, &|_| true, &mut |_, _, _| Ok(())).unwrap();
                }
            }
            5 => self.detector.flush().unwrap(),
            6..9 => self.rebuild(),
            _ => drop(self.detector.maintain().unwrap()),
        }
    }
}

#[test]
fn a_crash_between_any_two_file_operations_leaves_the_old_or_the_new_index() {
    let dir = tempdir();
    let options = tiny_options();
    let mut life = Life::begin(dir.path(), &options, rand::random());
    let (mut tried, mut levels) = (0, [0; 3]);
    // Until merges have written to every level: young runs, deltas, bases.
    for step in 0.. {
        assert!(step < 600, "merges do not get to every level: {levels:?}");
        if step >= 60 && levels.iter().all(|runs| *runs > 0) {
            break;
        }
        let (before, old) = (files(dir.path()), life.detector.index.current.runs.clone());
        life.step();
        let after = files(dir.path());
        if before == after {
            continue;
        }
        for run in life.detector.index.current.runs.iter().filter(|run| !old.contains(run)) {
            levels[match run.level {
                Level::Young => 0,
                Level::Delta(_) => 1,
                Level::Base(_) => 2,
            }] += 1;
        }
        for state in crashes(&mut life.rng, &before, &after) {
            let copy = tempdir();
            put(copy.path(), &state);
            let (mut detector, report) = open(copy.path(), &options, &life.journal);
            assert_eq!(report.set_aside, None, "{:?}", state.keys());
            assert_eq!(export(&mut detector).unwrap(), life.truth(), "{:?}", state.keys());
            // No session survived, so nobody holds a grant.
            let fresh = fingerprint(1_000_000);
            detector.submit(SessionId(9), &[(fresh, Sequence(1))]).unwrap();
            let mut answers = Vec::new();
            let partition = detector.partition_of(&fresh);
            let mut take = |_, _, verdict| -> Result<()> {
                answers.push(verdict);
                Ok(())
            };
            detector.pass(partition, &|_| true, &mut take).unwrap();
            assert_eq!(answers, [Verdict::Grant]);
            // What CURRENT does not name is gone.
            let runs = |files: Files| files.keys().filter(|name| name.starts_with("run-")).count();
            assert_eq!(runs(files(copy.path())), detector.index.current.runs.len());
            tried += 1;
        }
    }
    assert!(tried > 50, "{tried}");
}

/// Everything still works on an index that may be damaged: what fails says `Damaged`, leaves an
/// empty watermark behind, and works after the journal is learned again.
fn heals(detector: &mut Detector, life: &Life) {
    let mut failed = 0;
    loop {
        let requests: Vec<_> = (0..400).map(|i| (fingerprint(i), Sequence(i))).collect();
        detector.submit(SessionId(1), &requests).unwrap();
        let mut stored = BTreeMap::new();
        let mut work = || -> Result<()> {
            for partition in detector.partitions().collect::<Vec<_>>() {
                detector.pass(partition, &|_| true, &mut |_, seq, verdict| {
                    stored.insert(seq, verdict);
                    Ok(())
                })?;
            }
            while detector.maintain()? {}
            assert_eq!(export(detector)?, life.truth());
            Ok(())
        };
        match work() {
            Ok(()) => {
                let truth: BTreeMap<_, _> = life.truth().into_iter().collect();
                for (seq, verdict) in stored {
                    match truth.get(&fingerprint(seq.0)) {
                        Some(address) => assert_eq!(verdict, Verdict::Stored(*address)),
                        None => assert_eq!(verdict, Verdict::Grant),
                    }
                }
                return;
            }
            Err(error) => {
                assert_eq!(error.kind(), Kind::Damaged, "{error}");
                assert!(detector.watermark().is_empty());
                refill(detector, &life.journal);
                failed += 1;
                assert!(failed < 2, "{error}");
            }
        }
    }
}

fn grown(dir: &Path, options: &DetectOptions) -> Life {
    let mut life = Life::begin(dir, options, rand::random());
    loop {
        life.step();
        if life.journal.len() > 40 && life.detector.index.current.runs.len() > 5 {
            life.detector.flush().unwrap();
            return life;
        }
    }
}

#[test]
fn any_damage_is_noticed_and_healed_from_the_journal() {
    let dir = tempdir();
    let options = tiny_options();
    let mut life = grown(dir.path(), &options);
    let healthy = files(dir.path());
    let names: Vec<_> = (healthy.keys())
        .filter(|name| *name == "CURRENT" || name.starts_with("run-"))
        .cloned()
        .collect();
    for round in 0..90 {
        let mut state = healthy.clone();
        let name = &names[life.rng.random_range(0..names.len())];
        let other = &names[life.rng.random_range(0..names.len())];
        let bytes = state.get_mut(name).unwrap();
        let at = life.rng.random_range(0..bytes.len());
        let what = match round % 6 {
            0 | 1 => {
                bytes[at] ^= 1 << life.rng.random_range(0..8);
                "flipped"
            }
            2 => {
                bytes.truncate(at);
                "truncated"
            }
            3 => {
                let end = bytes.len().min(at + 4096);
                bytes[at..end].fill(0);
                "zeroed"
            }
            4 => {
                let copy = healthy[other].clone();
                state.insert(name.clone(), copy);
                "replaced"
            }
            _ => {
                state.remove(name);
                "missing"
            }
        };
        println!("{name} {what} at {at}");
        let copy = tempdir();
        put(copy.path(), &state);
        let (mut detector, report) = open(copy.path(), &options, &life.journal);
        if name == "CURRENT" && state != healthy {
            assert!(report.set_aside.is_some());
        }
        if report.set_aside.is_some() {
            assert!(report.watermark.is_empty());
        }
        heals(&mut detector, &life);
    }
}

#[test]
fn a_run_damaged_while_a_merge_is_under_way_is_noticed() {
    let dir = tempdir();
    let options = DetectOptions { step_entries: 3, ..tiny_options() };
    let mut life = Life::begin(dir.path(), &options, rand::random());
    while life.journal.len() < 10 {
        life.learn();
    }
    life.detector.flush().unwrap();
    drop(life.detector);
    let (detector, _) = open(dir.path(), &options, &life.journal);
    life.detector = detector;
    for path in fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>() {
        if path.file_name().unwrap().to_str().unwrap().starts_with("run-") {
            let mut bytes = fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
            fs::write(&path, bytes).unwrap();
        }
    }
    let error = (0..100).find_map(|_| life.detector.maintain().err()).unwrap();
    assert_eq!(error.kind(), Kind::Damaged);
    refill(&mut life.detector, &life.journal);
    assert_eq!(export(&mut life.detector).unwrap(), life.truth());
    let kept = files(dir.path()).keys().any(|name| name.starts_with("aside/run-"));
    assert!(kept, "for whoever wants to see what happened");
}

#[test]
fn a_foreign_or_outdated_index_is_set_aside() {
    let dir = tempdir();
    let options = tiny_options();
    let life = grown(dir.path(), &options);
    let (truth, journal) = (life.truth(), life.journal);
    drop(life.detector);
    let mut reasons = Vec::new();
    let store = StoreId(uuid::Uuid::from_u128(8));
    let others = [
        DetectOptions { store, ..options.clone() },
        DetectOptions { store, partition_bits: 3, ..options.clone() },
        DetectOptions { store, partition_bits: 3, part: 1, ..options.clone() },
        DetectOptions { store, partition_bits: 3, part: 1, gc_epoch: 1, ..options },
    ];
    for other in others {
        let (mut detector, report) = open(dir.path(), &other, &journal);
        reasons.push(report.set_aside.unwrap());
        assert!(report.watermark.is_empty());
        assert_eq!(export(&mut detector).unwrap(), truth);
        detector.flush().unwrap();
    }
    assert!(reasons[0].contains("belongs to store"), "{reasons:?}");
    assert!(reasons[1].contains("partitions"), "{reasons:?}");
    assert!(reasons[2].contains("another part"), "{reasons:?}");
    assert!(reasons[3].contains("outdated"), "{reasons:?}");
}

#[test]
fn two_engines_do_not_share_an_index() {
    let dir = tempdir();
    let (detector, _) = Detector::open(dir.path(), tiny_options()).unwrap();
    let error = Detector::open(dir.path(), tiny_options()).err().unwrap();
    assert_eq!(error.kind(), Kind::Busy);
    drop(detector);
    Detector::open(dir.path(), tiny_options()).unwrap();
}

#[test]
fn damaged_scratch_files_are_forgotten() {
    let dir = tempdir();
    let (mut detector, _) = Detector::open(dir.path(), tiny_options()).unwrap();
    let block = fingerprint(1);
    let partition = detector.partition_of(&block);
    let ask = |detector: &mut Detector, session: u32, damage: &str| {
        detector.submit(SessionId(session), &[(block, Sequence(1))])?;
        // What is buffered is written when the log is closed: an interrupted pass does that.
        let refuse = &mut |_, _, _| Err(Error::new(Kind::Busy, "not now"));
        let refused = detector.pass(partition, &|_| true, refuse).unwrap_err();
        assert_eq!(refused.kind(), Kind::Busy);
        for (name, mut bytes) in files(dir.path()) {
            if !damage.is_empty() && name.contains(damage) {
                bytes[5] ^= 1;
                fs::write(dir.path().join(name), bytes).unwrap();
            }
        }
        let mut verdict = None;
        let report = detector.pass(partition, &|_| true, &mut |_, _, v| {
            verdict = Some(v);
            Ok(())
        })?;
        assert_eq!(report.pending, 1);
        Ok::<_, Error>(verdict)
    };
    let first = (SessionId(1), Sequence(1));
    assert_eq!(ask(&mut detector, 1, "").unwrap(), Some(Verdict::Grant));
    assert_eq!(ask(&mut detector, 2, "").unwrap(), Some(Verdict::SameAs(first.0, first.1)));
    assert_eq!(ask(&mut detector, 2, "/log-").unwrap_err().kind(), Kind::Damaged);
    assert_eq!(ask(&mut detector, 2, "").unwrap(), Some(Verdict::SameAs(first.0, first.1)));
    assert_eq!(ask(&mut detector, 2, "/pending-").unwrap_err().kind(), Kind::Damaged);
    // Forgotten: granted to whoever asks next, at worst a second time.
    assert_eq!(
        ask(&mut detector, 1, "").unwrap(),
        Some(Verdict::SameAs(SessionId(2), Sequence(1)))
    );
}

#[test]
fn the_watermark_is_what_a_restart_needs_not_refill() {
    let dir = tempdir();
    let options = tiny_options();
    let (mut detector, _) = open(dir.path(), &options, &Vec::new());
    let one = |n: u64| vec![(fingerprint(n), address(n, 0))];
    detector.learn(&mut one(1), position(1)).unwrap();
    detector.learn(&mut one(3), position(3)).unwrap();
    assert!(detector.watermark().is_empty(), "nothing is durable yet");
    detector.flush().unwrap();
    assert_eq!(detector.watermark().get(Incarnation(3)), 1, "2 is missing");
    detector.learn(&mut [], position(2)).unwrap();
    detector.flush().unwrap();
    assert_eq!(detector.watermark().get(Incarnation(3)), 3);
    drop(detector);
    let (mut detector, report) = Detector::open(dir.path(), options).unwrap();
    assert_eq!(report.watermark.get(Incarnation(3)), 3);
    assert_eq!(export(&mut detector).unwrap().len(), 2);
}
