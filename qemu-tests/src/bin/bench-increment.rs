//! The part `increment` of `ci/bench`: what 64 MiB dirty cost on a disk of 1 TiB and on one of 4 GiB,
//! in one piece and scattered; and the merge of the extent maps of a disk of 10 TB.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};

use qemu_tests::bench::change::change;
use qemu_tests::bench::detect::program;
use qemu_tests::bench::report::number;
use qemu_tests::bench::{Bench, Cost, Table, Target, measure, median, mib};
use qemu_tests::content::{BLOCK, block, mix};
use qemu_tests::{Fixture, MIB, Result, image, tools};

/// What is dirty, in bytes.
const DIRTY: u64 = 64 * MIB;
/// Two disks: what they cost may differ by what they hold, not by their size.
const DISKS: [(&str, u64); 2] = [("4 GiB", 4096 * MIB), ("1 TiB", 1 << 40)];
/// How much longer the increment of the large disk may take: its scattered blocks lie in eight
/// times as many segments, the bitmap of 2 MiB is read, and two commands differ by some 10 ms.
const SLOWER: f64 = 1.5;
/// Bytes of metadata for a dirty block that lies alone in its segment: a segment node, and its
/// share of nodes above, with fingerprints, addresses and tags.
const PER_BLOCK: f64 = 256.0;
/// How much dearer an extent may be among eight times as many.
const LINEAR: f64 = 1.25;
/// Extents of each map of the 10 TB disk, times 1, 2, 4, 8.
const EXTENTS: u64 = 1_000_000;
/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(1800);

/// How the dirty blocks lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pattern {
    Piece,
    Scattered,
}

/// One increment.
struct Increment {
    disk: &'static str,
    pattern: Pattern,
    cost: Cost,
    data: u64,
    nodes: u64,
    /// Manifest, its copy, session, journal.
    others: u64,
}

fn main() -> Result {
    let bench = Bench::from_environment("increment")?;
    let dirty = if bench.quick { DIRTY / 8 } else { DIRTY };
    let mut report = bench.report("Cost of an increment")?;
    report.text(&format!(
        "A shut-off VM with an empty qcow2 disk, backed up once; then {} MiB of new content are written through QEMU, \
         in one piece or in single blocks of 4 KiB at random places, and it is backed up through its \
         bitmap, {} times. QEMU's bitmap has a granularity of 64 KiB, so the scattered blocks are read with 16 \
         times as many bytes around them. Metadata are bytes of new objects in the store by their kind, \
         nodes being the recipe.",
        dirty >> 20,
        bench.runs()
    ));
    let mut found = Vec::new();
    for (disk, size) in DISKS {
        for pattern in [Pattern::Piece, Pattern::Scattered] {
            bench.step(&format!("{disk}, {}", name(pattern)));
            found.push(increments(&bench, disk, size, pattern, dirty)?);
        }
    }
    report.table(&table(&bench, &found)?);
    let mut targets = targets(&found, dirty / BLOCK as u64);

    bench.step("extent maps");
    report.heading("Extent maps of a disk of 10 TB");
    report.commands(&[format!("extents_speed 10 {EXTENTS}")]);
    let mut table = Table::new(&["extents", "items of work", "s", "ns for an extent"]);
    let mut csv = bench.csv("extents", &["million extents", "ns per extent"])?;
    let mut each = Vec::new();
    for times in [1, 2, 4, 8] {
        let extents = EXTENTS * times / if bench.quick { 10 } else { 1 };
        let (work, seconds) = merge(&bench, extents)?;
        let nanoseconds = seconds * 1e9 / (2 * extents) as f64;
        each.push(nanoseconds);
        csv.row(&[number(2.0 * extents as f64 / 1e6), number(nanoseconds)])?;
        table.row(&[
            (2 * extents).to_string(),
            work.to_string(),
            number(seconds),
            number(nanoseconds),
        ]);
    }
    report.table(&table);
    let ratio =
        each.last().copied().unwrap_or(f64::NAN) / each.first().copied().unwrap_or(f64::NAN);
    targets.push(Target::at_most("an extent among 8 × as many", ratio, LINEAR, "×"));
    report.heading("Targets");
    report.text(
        "The issue asks that cost follows what is dirty and not the disk; the bounds are ours.",
    );
    report.targets(&targets);
    bench.write(&report)
}

fn name(pattern: Pattern) -> &'static str {
    if pattern == Pattern::Piece { "one piece" } else { "scattered" }
}

/// The increments of one disk; the median of their costs, the largest of their bytes.
fn increments(
    bench: &Bench,
    disk: &'static str,
    size: u64,
    pattern: Pattern,
    dirty: u64,
) -> Result<Increment> {
    let mut fixture = Fixture::new()?;
    let path = fixture.path("vda.qcow2");
    image::create(&path, "qcow2", size)?;
    backup(&mut fixture, &path)?;
    let (mut costs, mut bytes) = (Vec::new(), [0; 3]);
    for run in 0..bench.runs() as u64 {
        let before = objects(&fixture.path("store"))?;
        dirty_blocks(&path, size, pattern, dirty, run)?;
        let (cost, printed) = backup(&mut fixture, &path)?;
        ensure!(printed.contains("incremental since"), "this was no increment:\n{printed}");
        costs.push(cost);
        let mut new = [0; 3];
        for (object, (kind, length)) in objects(&fixture.path("store"))? {
            if !before.contains_key(&object) {
                new[kind as usize] += length;
            }
        }
        for (most, new) in bytes.iter_mut().zip(new) {
            *most = (*most).max(new);
        }
    }
    let [data, nodes, others] = bytes;
    Ok(Increment { disk, pattern, cost: Cost::median(&costs), data, nodes, others })
}

fn backup(fixture: &mut Fixture, image: &Path) -> Result<(Cost, String)> {
    let engine = fixture.engine()?.pid();
    let argument = format!("--image=vda={}", image.display());
    let mut command = fixture.fleece_command(&["backup", "disk", &argument])?;
    let (cost, finished) = measure("fleece backup", &mut command, &[engine], LIMIT)?;
    Ok((cost, finished.printed()))
}

/// Writes blocks that no run wrote before.
fn dirty_blocks(image: &Path, size: u64, pattern: Pattern, dirty: u64, run: u64) -> Result {
    let blocks = dirty / BLOCK as u64;
    change(image, |client| {
        for n in 0..blocks {
            let place = match pattern {
                Pattern::Piece => size / 2 + run * dirty + n * BLOCK as u64,
                // Each in a stretch of its own, anywhere in it.
                Pattern::Scattered => {
                    let stretch = size / blocks;
                    let inside = mix((run << 32) | n) % (stretch / BLOCK as u64) * BLOCK as u64;
                    n * stretch + inside
                }
            };
            client.write(place, &block(1000 + run, n))?;
        }
        Ok(())
    })
}

/// What an object of the store counts as.
#[derive(Clone, Copy)]
enum Kind {
    Data,
    Nodes,
    Other,
}

/// The store's objects, their kinds and bytes. The kind is in the header, readable without a key.
fn objects(store: &Path) -> Result<BTreeMap<PathBuf, (Kind, u64)>> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![store.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let mut header = [0; 12];
            let read = File::open(&path)?.read(&mut header)?;
            let kind = match u16::from_le_bytes([header[10], header[11]]) {
                5 if read == header.len() => Kind::Data,
                6 if read == header.len() => Kind::Nodes,
                _ => Kind::Other,
            };
            let length = fs::metadata(&path)?.len();
            found.insert(path, (kind, length));
        }
    }
    Ok(found)
}

fn table(bench: &Bench, found: &[Increment]) -> Result<Table> {
    let mut csv = bench.csv("cost", &["disk", "seconds", "MiB of metadata", "MiB of memory"])?;
    let mut table = Table::new(&[
        "disk",
        "dirty",
        "s",
        "CPU s",
        "data MiB",
        "nodes MiB",
        "other metadata KiB",
        "memory MiB",
    ]);
    for one in found {
        let values = [one.cost.wall, mib(one.nodes + one.others), mib(one.cost.memory)].map(number);
        let label = format!("{}, {}", one.disk, name(one.pattern));
        csv.row(&[&[label][..], &values].concat())?;
        table.row(&[
            one.disk.to_owned(),
            name(one.pattern).to_owned(),
            number(one.cost.wall),
            number(one.cost.cpu),
            number(mib(one.data)),
            number(mib(one.nodes)),
            number(one.others as f64 / 1024.0),
            number(mib(one.cost.memory)),
        ]);
    }
    Ok(table)
}

fn targets(found: &[Increment], blocks: u64) -> Vec<Target> {
    let mut targets = Vec::new();
    for pattern in [Pattern::Piece, Pattern::Scattered] {
        let mut of = found.iter().filter(|one| one.pattern == pattern);
        let (Some(small), Some(large)) = (of.next(), of.next()) else { continue };
        let label = name(pattern);
        let time = large.cost.wall / small.cost.wall;
        targets.push(Target::at_most(
            &format!("{label}: 1 TiB over 4 GiB, time"),
            time,
            SLOWER,
            "×",
        ));
        let memory = mib(large.cost.memory) - mib(small.cost.memory);
        targets.push(Target::at_most(&format!("{label}: more memory"), memory, 2.0, "MiB"));
        let bytes = (large.nodes + large.others) as f64 / blocks as f64;
        let what = format!("{label}: metadata for a dirty block on 1 TiB");
        targets.push(Target::at_most(&what, bytes, PER_BLOCK, "bytes"));
    }
    targets
}

/// Items of work, and the median of the seconds of some runs.
fn merge(bench: &Bench, extents: u64) -> Result<(u64, f64)> {
    let (mut work, mut seconds) = (0, Vec::new());
    for _ in 0..bench.runs() {
        let mut command = Command::new(program("extents_speed")?);
        let text = tools::run(command.args(["10", &extents.to_string()]))?;
        let figures: serde_json::Value = serde_json::from_str(&text)?;
        work = figures["work"].as_u64().context("no work")?;
        seconds.push(figures["seconds"].as_f64().context("no seconds")?);
    }
    Ok((work, median(&seconds)))
}
