//! What the model of the full size needs: costs on indexes that are far larger than those of the
//! simulation, with the engine's own settings and passes as large as it makes them.

use std::path::Path;
use std::time::{Duration, Instant};

use fleece_engine::detect::{DetectOptions, Detector, JournalPosition, Verdict, Watermark};
use fleece_engine::fingerprint::{Fingerprinter, SECRET_LEN};
use fleece_engine::ids::{Address, ContainerId, Incarnation, Sequence, SessionId, Slot, StoreId};
use serde_json::json;

use crate::Outcome;
use crate::content::Content;
use crate::cost::processor;
use crate::engine::CONTAINER;

const INCARNATION: Incarnation = Incarnation(1);
/// Hosts that share a container's entries out.
const HOSTS: usize = 100;
/// Of so many requests of a batch one is new.
const NEW_OF: u64 = 5;
const BLOCK: usize = 4096;
/// Containers between two looks for something to merge, which is less than a young run holds.
const MERGE_EVERY: usize = 1000;

/// How large all this is.
pub(crate) struct Load {
    pub(crate) seed: u64,
    /// Entries of a small and of a large index.
    pub(crate) entries: [u64; 2],
    /// Requests of a pass over one partition.
    pub(crate) requests: u64,
}

/// An index of its own, and what is in it.
struct Probe {
    detector: Detector,
    seed: u64,
    entries: u64,
    journal: u64,
    sessions: u32,
}

fn address(n: u64) -> Address {
    let counter = (n / CONTAINER as u64) as u32 + 1;
    let container = ContainerId { incarnation: INCARNATION, counter };
    Address { container, slot: Slot((n % CONTAINER as u64) as u16) }
}

impl Probe {
    fn build(dir: &Path, seed: u64, entries: u64) -> Outcome<Self> {
        let options = DetectOptions::new(StoreId(uuid::Uuid::from_u128(2)));
        let (mut detector, _) = Detector::open(dir, options)?;
        let mut rebuild = detector.rebuild()?;
        for n in 0..entries {
            rebuild.feed(&[(Content(n as u32).fingerprint(seed), address(n))])?;
        }
        let mut watermark = Watermark::default();
        watermark.raise(INCARNATION, 1);
        detector.install(rebuild.build(watermark)?)?;
        Ok(Probe { detector, seed, entries, journal: 1, sessions: 0 })
    }

    /// Asks `requests` times, one in `new_of` about what is new; what logging and passing took, and what
    /// was granted.
    fn detect(&mut self, requests: u64, new_of: u64) -> Outcome<([Duration; 2], Vec<u32>)> {
        self.sessions += 1;
        let session = SessionId(self.sessions);
        let mut fresh = self.entries;
        let (mut logging, mut passing) = (Duration::ZERO, Duration::ZERO);
        let mut contents = Vec::with_capacity(requests as usize);
        for at in 0..requests {
            let known = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            contents.push(if at % new_of == new_of - 1 {
                fresh += 1;
                fresh - 1
            } else {
                known % self.entries
            } as u32);
        }
        for (n, batch) in contents.chunks(8192).enumerate() {
            let question = |(i, content): (usize, &u32)| {
                (Content(*content).fingerprint(self.seed), Sequence((n * 8192 + i) as u64))
            };
            let questions: Vec<_> = batch.iter().enumerate().map(question).collect();
            let begun = processor();
            self.detector.submit(session, &questions)?;
            logging += processor().saturating_sub(begun);
        }
        let mut granted = Vec::new();
        while let Some(partition) = self.detector.due(Instant::now(), true) {
            let begun = processor();
            self.detector.pass(partition, &|_| true, &mut |_, sequence, verdict| {
                if verdict == Verdict::Grant {
                    granted.push(contents[sequence.0 as usize]);
                }
                Ok(())
            })?;
            passing += processor().saturating_sub(begun);
        }
        self.detector.withdraw(session);
        Ok(([logging, passing], granted))
    }

    fn merge(&mut self) -> Outcome<Duration> {
        let begun = processor();
        while self.detector.maintain()? {}
        Ok(processor().saturating_sub(begun))
    }

    /// Learns these as one of many hosts does; what learning and merging took.
    fn learn(&mut self, granted: &[u32]) -> Outcome<[Duration; 2]> {
        let (mut learning, mut merging) = (Duration::ZERO, Duration::ZERO);
        for (n, part) in granted.chunks(CONTAINER / HOSTS).enumerate() {
            let entry = |content: &u32| {
                (Content(*content).fingerprint(self.seed), address(u64::from(*content)))
            };
            let mut entries: Vec<_> = part.iter().map(entry).collect();
            self.journal += 1;
            let position = JournalPosition { incarnation: INCARNATION, n: self.journal };
            let begun = processor();
            self.detector.learn(&mut entries, position)?;
            learning += processor().saturating_sub(begun);
            if n % MERGE_EVERY == 0 {
                merging += self.merge()?;
            }
        }
        merging += self.merge()?;
        self.entries += granted.len() as u64;
        Ok([learning, merging])
    }
}

/// Nanoseconds of a thing.
fn each(time: Duration, things: u64) -> f64 {
    time.as_secs_f64() * 1e9 / things as f64
}

/// The fingerprint of a block.
fn hashing() -> f64 {
    let fingerprinter = Fingerprinter::new(&[7; SECRET_LEN], BLOCK as u32);
    let (block, count) = (vec![5; BLOCK], 100_000);
    let begun = processor();
    for _ in 0..count {
        std::hint::black_box(fingerprinter.of(std::hint::black_box(&block)));
    }
    each(processor().saturating_sub(begun), count)
}

/// Measures everything.
pub(crate) fn measure(dir: &Path, load: &Load) -> Outcome<()> {
    let Load { seed, entries: [small, large], requests } = *load;
    let partitions = u64::from(DetectOptions::new(StoreId(uuid::Uuid::nil())).partitions());
    let requests = requests * partitions;
    let mut first = Probe::build(&dir.join("small"), seed, small)?;
    let ([_, few], _) = first.detect(requests, u64::MAX)?;
    // So many that bases are rewritten more than once, as their deltas become too heavy.
    let (mut learning, mut merging, mut new) = (Duration::ZERO, Duration::ZERO, 0);
    while new < small {
        let (_, granted) = first.detect(small / 2, NEW_OF)?;
        let [learned, merged] = first.learn(&granted)?;
        (learning, merging) = (learning + learned, merging + merged);
        new += granted.len() as u64;
    }
    let kept = (first.detector.entries(), first.detector.index_bytes());
    drop(first);
    std::fs::remove_dir_all(dir.join("small"))?;
    let mut second = Probe::build(&dir.join("large"), seed, large)?;
    let ([logging, many], _) = second.detect(requests, u64::MAX)?;
    let swept = each(many.saturating_sub(few), large - small);
    println!(
        "{}",
        json!({
            "kind": "constants",
            "entries": [small, large],
            "requests": requests,
            "log_ns": each(logging, requests),
            "sweep_ns_per_entry": swept,
            "pass_ns": each(few, requests) - swept * small as f64 / requests as f64,
            "learn_ns": each(learning, new),
            "merge_ns": each(merging, new),
            "learned": new,
            "bytes_per_entry": second.detector.index_bytes() as f64 / second.detector.entries() as f64,
            "bytes_per_entry_merging": kept.1 as f64 / kept.0 as f64,
            "hash_ns": hashing(),
        })
    );
    drop(second);
    std::fs::remove_dir_all(dir.join("large"))?;
    Ok(())
}
