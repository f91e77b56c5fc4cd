//! Measures duplicate detection: builds an index of N entries, then passes batches of M requests.
//!
//! ```text
//! cargo run --release -p fleece-engine --example detect_speed -- DIR ENTRIES REQUESTS [NEW%] [BATCHES] [--cold]
//! ```
//!
//! DIR must not exist; it is left behind for another look. Per batch it prints the requests, how
//! many were stored or granted, fingerprints per second (from the first submit to the last
//! verdict), what it took to learn the new ones and to merge, and the anonymous memory of the
//! process (`RssAnon`) and its peak resident size, which counts mapped pages of the index too.
//! `--cold` drops the index from the page cache before each batch.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use fleece_engine::detect::{DetectOptions, Detector, JournalPosition, Verdict, Watermark};
use fleece_engine::ids::{
    Address, ContainerId, Fingerprint, Incarnation, Sequence, SessionId, Slot, StoreId,
};
use rustix::fs::{Advice, fadvise};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const INCARNATION: Incarnation = Incarnation(1);
/// Entries of a container, which are learned at once.
const CONTAINER: usize = 4096;

fn fingerprint(n: u64) -> Fingerprint {
    let mut bytes = [0; Fingerprint::LEN];
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    for chunk in bytes.chunks_mut(8) {
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
        chunk.copy_from_slice(&state.to_be_bytes()[..chunk.len()]);
    }
    Fingerprint(bytes)
}

fn address(n: u64) -> Address {
    let counter = (n / 60_000) as u32;
    let container = ContainerId { incarnation: INCARNATION, counter };
    Address { container, slot: Slot((n % 60_000) as u16) }
}

/// A field of /proc/self/status in MiB.
fn status_mib(field: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    let kib: f64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0.0);
    kib / 1024.0
}

/// Processor time of the (only) thread: on a busy machine the wall clock says little.
fn processor() -> Duration {
    let schedule = fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let ran = schedule.split_whitespace().next().and_then(|ns| ns.parse().ok());
    Duration::from_nanos(ran.unwrap_or(0))
}

fn memory() -> String {
    format!("RssAnon {:.1} MiB, peak RSS {:.1} MiB", status_mib("RssAnon"), status_mib("VmHWM"))
}

fn per_second(count: u64, time: Duration) -> u64 {
    (count as f64 / time.as_secs_f64()) as u64
}

fn build(detector: &mut Detector, entries: u64) -> Outcome<()> {
    let start = Instant::now();
    let mut rebuild = detector.rebuild()?;
    for n in 0..entries {
        rebuild.feed(&[(fingerprint(n), address(n))])?;
    }
    let mut watermark = Watermark::default();
    watermark.raise(INCARNATION, 1);
    let sorted = start.elapsed();
    detector.install(rebuild.build(watermark)?)?;
    println!(
        "built {entries} entries in {:.1} s ({} entries/s; fed in {:.1} s), {:.1} bytes each, {}",
        start.elapsed().as_secs_f64(),
        per_second(entries, start.elapsed()),
        sorted.as_secs_f64(),
        detector.index_bytes() as f64 / entries.max(1) as f64,
        memory(),
    );
    Ok(())
}

fn drop_cache(dir: &Path) -> Outcome<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fadvise(&File::open(entry.path())?, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}

struct Load {
    entries: u64,
    requests: u64,
    new_percent: u64,
}

fn batch(detector: &mut Detector, load: &Load, number: u64, journal: &mut u64) -> Outcome<()> {
    let session = SessionId(number as u32);
    let first_new = load.entries + number * load.requests;
    let of = |i: u64| {
        let pick = (i + number * 7_919).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        match pick % 100 < load.new_percent {
            true => first_new + i,
            false => (pick >> 8) % load.entries.max(1),
        }
    };
    let (start, ran) = (Instant::now(), processor());
    let mut asked = Vec::with_capacity(4096);
    for i in 0..load.requests {
        asked.push((fingerprint(of(i)), Sequence(i)));
        if asked.len() == asked.capacity() || i + 1 == load.requests {
            detector.submit(session, &asked)?;
            asked.clear();
        }
    }
    let submitted = start.elapsed();
    let (mut stored, mut same) = (0, 0);
    let mut granted = Vec::new();
    while let Some(partition) = detector.due(Instant::now(), true) {
        detector.pass(partition, &|_| true, &mut |_, sequence, verdict| {
            match verdict {
                Verdict::Stored(_) => stored += 1,
                Verdict::Grant => granted.push(sequence.0),
                Verdict::SameAs(..) => same += 1,
            }
            Ok(())
        })?;
    }
    let (passed, ran) = (start.elapsed(), processor() - ran);
    println!(
        "batch {number}: {} requests, {stored} stored, {} granted, {same} same: {} fp/s ({:.3} s, {:.3} s of it submitting), {:.3} s on the processor, {}",
        load.requests,
        granted.len(),
        per_second(load.requests, passed),
        passed.as_secs_f64(),
        submitted.as_secs_f64(),
        ran.as_secs_f64(),
        memory(),
    );
    learn(detector, &granted, &|i| fingerprint(of(i)), journal)?;
    detector.withdraw(session);
    Ok(())
}

fn learn(
    detector: &mut Detector,
    granted: &[u64],
    of: &dyn Fn(u64) -> Fingerprint,
    journal: &mut u64,
) -> Outcome<()> {
    let start = Instant::now();
    for part in granted.chunks(CONTAINER) {
        let mut entries: Vec<_> = part.iter().map(|i| (of(*i), address(*i))).collect();
        *journal += 1;
        detector.learn(&mut entries, JournalPosition { incarnation: INCARNATION, n: *journal })?;
    }
    let learned = start.elapsed();
    let (mut steps, mut longest) = (0, Duration::ZERO);
    loop {
        let start = Instant::now();
        if !detector.maintain()? {
            break;
        }
        steps += 1;
        longest = longest.max(start.elapsed());
    }
    println!(
        "  learned in {:.3} s; merged in {:.3} s ({steps} steps, the longest {:.3} s); {} entries, {}",
        learned.as_secs_f64(),
        (start.elapsed() - learned).as_secs_f64(),
        longest.as_secs_f64(),
        detector.entries(),
        memory(),
    );
    Ok(())
}

fn main() -> Outcome<()> {
    let (flags, words): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|word| word.starts_with("--"));
    let number = |i: usize, default: u64| -> Outcome<u64> {
        Ok(words.get(i).map_or(Ok(default), |word| word.parse())?)
    };
    let Some(dir) = words.first().map(Path::new) else {
        return Err("usage: detect_speed DIR ENTRIES REQUESTS [NEW%] [BATCHES] [--cold]".into());
    };
    let load = Load {
        entries: number(1, 1_000_000)?,
        requests: number(2, 100_000)?,
        new_percent: number(3, 20)?,
    };
    fs::create_dir(dir)?;
    let options = DetectOptions::new(StoreId(uuid::Uuid::nil()));
    let (mut detector, _) = Detector::open(dir, options)?;
    build(&mut detector, load.entries)?;
    let mut journal = 1;
    for n in 0..number(4, 3)? {
        if flags.iter().any(|flag| flag == "--cold") {
            drop_cache(dir)?;
        }
        batch(&mut detector, &load, n, &mut journal)?;
    }
    Ok(())
}
