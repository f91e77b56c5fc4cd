//! Measures duplicate detection: builds an index of N entries, then passes batches of M requests.
//!
//! ```text
//! cargo run --release -p fleece-engine --example detect_speed -- DIR ENTRIES REQUESTS [NEW%] [BATCHES] [--cold] [--json] [--store=UUID]
//! ```
//!
//! DIR is left behind; where it is there already, its index is taken as it is, which must have been
//! built with the same ENTRIES. Per batch it prints the requests, how many were stored or granted,
//! fingerprints per second (from the first submit to the last verdict), what it took to learn the
//! new ones and to merge until nothing was left to merge, and the anonymous memory of the
//! process (`RssAnon`) and its peak resident size, which counts mapped pages of the index too.
//! `--cold` drops the index from the page cache before each batch. `--json`: a line for each batch.
//! `--store`: the store that the index belongs to, so that its engine takes it as its own.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use fleece_engine::detect::{DetectOptions, Detector, JournalPosition, Verdict, Watermark};
use fleece_engine::ids::{
    Address, ContainerId, Fingerprint, Incarnation, Sequence, SessionId, Slot, StoreId,
};
use rustix::fs::{Advice, fadvise};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// One that no engine of a new store has: its own journal is not taken for known.
const INCARNATION: Incarnation = Incarnation(1_000_000);
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

/// MiB that the process had read from and written to disks so far.
fn disk_mib() -> (f64, f64) {
    let text = fs::read_to_string("/proc/self/io").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        let bytes: f64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0.0);
        bytes / f64::from(1 << 20)
    };
    (field("read_bytes"), field("write_bytes"))
}

/// A field of /proc/self/status in MiB.
fn status_mib(field: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    let kib: f64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0.0);
    kib / 1024.0
}

/// Processor time of the main thread: on a busy machine the wall clock says little.
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
    eprintln!(
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
    json: bool,
}

/// What a batch took, in seconds where nothing else is said.
#[derive(Default)]
struct Took {
    stored: u64,
    granted: u64,
    same: u64,
    submitting: f64,
    /// From the first submit to the last verdict.
    detecting: f64,
    learning: f64,
    merging: f64,
    merge_steps: u64,
    longest_step: f64,
    processor: f64,
    /// The most that was seen at the ends of passes and merge steps, MiB.
    anonymous: f64,
}

impl Took {
    fn look_at_memory(&mut self) {
        self.anonymous = self.anonymous.max(status_mib("RssAnon"));
    }

    fn print(&self, load: &Load, number: u64, entries: u64, (read, written): (f64, f64)) {
        let Took { stored, granted, same, submitting, detecting, learning, merging, .. } = self;
        let Took { merge_steps, longest_step, processor, anonymous, .. } = self;
        let requests = load.requests;
        if load.json {
            println!(
                "{{\"batch\":{number},\"requests\":{requests},\"stored\":{stored},\"granted\":{granted},\
                 \"detecting\":{detecting},\"submitting\":{submitting},\"learning\":{learning},\
                 \"merging\":{merging},\"longest_step\":{longest_step},\"processor\":{processor},\
                 \"anonymous_mib\":{anonymous},\"entries\":{entries},\"read_mib\":{read},\
                 \"written_mib\":{written}}}"
            );
            return;
        }
        let rate = |seconds: f64| (requests as f64 / seconds) as u64;
        println!(
            "batch {number}: {requests} requests, {stored} stored, {granted} granted, {same} same: \
             {} fp/s ({detecting:.3} s, {submitting:.3} s of it submitting); learned in {learning:.3} s, \
             merged in {merging:.3} s ({merge_steps} steps, the longest {longest_step:.3} s): {} fp/s with \
             these; {processor:.3} s on the processor, read {read:.0} MiB, written {written:.0} MiB, \
             {entries} entries, {}",
            rate(*detecting),
            rate(detecting + learning + merging),
            memory(),
        );
    }
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
    let mut took = Took::default();
    let (start, ran, disk) = (Instant::now(), processor(), disk_mib());
    let mut asked = Vec::with_capacity(4096);
    for i in 0..load.requests {
        asked.push((fingerprint(of(i)), Sequence(i)));
        if asked.len() == asked.capacity() || i + 1 == load.requests {
            detector.submit(session, &asked)?;
            asked.clear();
        }
    }
    took.submitting = start.elapsed().as_secs_f64();
    let mut granted = Vec::new();
    while let Some(partition) = detector.due(Instant::now(), true) {
        detector.pass(partition, &|_| true, &mut |_, sequence, verdict| {
            match verdict {
                Verdict::Stored(_) => took.stored += 1,
                Verdict::Grant => granted.push(sequence.0),
                Verdict::SameAs(..) => took.same += 1,
            }
            Ok(())
        })?;
        took.look_at_memory();
    }
    took.detecting = start.elapsed().as_secs_f64();
    took.granted = granted.len() as u64;
    learn(detector, &granted, &|i| fingerprint(of(i)), journal, &mut took)?;
    detector.withdraw(session);
    took.processor = (processor() - ran).as_secs_f64();
    let (read, written) = disk_mib();
    took.print(load, number, detector.entries(), (read - disk.0, written - disk.1));
    Ok(())
}

/// Learns what was granted, and merges until there is nothing to merge.
fn learn(
    detector: &mut Detector,
    granted: &[u64],
    of: &dyn Fn(u64) -> Fingerprint,
    journal: &mut u64,
    took: &mut Took,
) -> Outcome<()> {
    let start = Instant::now();
    for part in granted.chunks(CONTAINER) {
        let mut entries: Vec<_> = part.iter().map(|i| (of(*i), address(*i))).collect();
        *journal += 1;
        detector.learn(&mut entries, JournalPosition { incarnation: INCARNATION, n: *journal })?;
    }
    took.learning = start.elapsed().as_secs_f64();
    let merging = Instant::now();
    loop {
        let start = Instant::now();
        if !detector.maintain()? {
            break;
        }
        took.merge_steps += 1;
        took.longest_step = took.longest_step.max(start.elapsed().as_secs_f64());
        took.look_at_memory();
    }
    took.merging = merging.elapsed().as_secs_f64();
    Ok(())
}

fn main() -> Outcome<()> {
    let (flags, words): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|word| word.starts_with("--"));
    let has = |wanted: &str| flags.iter().any(|flag| flag == wanted);
    let number = |i: usize, default: u64| -> Outcome<u64> {
        Ok(words.get(i).map_or(Ok(default), |word| word.parse())?)
    };
    let Some(dir) = words.first().map(Path::new) else {
        return Err(
            "usage: detect_speed DIR ENTRIES REQUESTS [NEW%] [BATCHES] [--cold] [--json]".into()
        );
    };
    let load = Load {
        entries: number(1, 1_000_000)?,
        requests: number(2, 100_000)?,
        new_percent: number(3, 20)?,
        json: has("--json"),
    };
    let built = dir.exists();
    let store = flags.iter().find_map(|flag| flag.strip_prefix("--store=")).map(str::parse);
    let options = DetectOptions::new(StoreId(store.transpose()?.unwrap_or_default()));
    let (mut detector, report) = Detector::open(dir, options)?;
    if !built {
        build(&mut detector, load.entries)?;
    } else if let Some(why) = report.set_aside {
        return Err(format!("the index in {} {why}", dir.display()).into());
    }
    let mut journal = detector.watermark().get(INCARNATION);
    for n in 0..number(4, 3)? {
        if has("--cold") {
            drop_cache(dir)?;
        }
        batch(&mut detector, &load, n, &mut journal)?;
    }
    Ok(())
}
