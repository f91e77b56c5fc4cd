//! What `ci/bench` measures: Fleece beside restic on the same images, as a table in Markdown.
//!
//! bench IMAGE… DAY2      raw images of guests; the last is the first one's second day.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};
use qemu_tests::memory::Watch;
use qemu_tests::process::Running;
use qemu_tests::{Fixture, MIB, Result, image, tools};

/// Runs of everything; the median counts.
const RUNS: usize = 3;

/// How long one step may take.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(1800);

/// One program's figures in one run.
#[derive(Default, Clone)]
struct Figures {
    first_day: f64,
    second_day: f64,
    restore: f64,
    stored_first: f64,
    stored_second: f64,
    backup_memory: f64,
    restore_memory: f64,
}

fn main() -> Result {
    let images: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    ensure!(images.len() >= 2, "usage: bench IMAGE… DAY2");
    let (guests, day2) = images.split_at(images.len() - 1);
    let day2 = &day2[0];
    let mut data = 0;
    for path in guests {
        data += nonzero(path)?;
    }
    let day2_data = nonzero(day2)?;
    let all: Vec<&Path> = images.iter().map(PathBuf::as_path).collect();
    let distinct = image::distinct_blocks(&all)? * 4096 / MIB;

    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for run in 1..=RUNS {
        ours.push(fleece(guests, day2).context("fleece")?);
        theirs.push(restic(guests, day2).context("restic")?);
        eprintln!("run {run} of {RUNS} done");
    }
    let (ours, theirs) = (median(&ours), median(&theirs));

    println!(
        "{} guests, {} MiB of non-zero blocks; second day of one: {} MiB; distinct blocks of all: {distinct} MiB.",
        guests.len(),
        data / MIB,
        day2_data / MIB
    );
    println!(
        "Medians of {RUNS} runs; images in the page cache; rates are non-zero bytes per second.\n"
    );
    println!("| | Fleece | {} |\n|---|---|---|", restic_version()?);
    let rate = |bytes: u64, seconds: f64| {
        format!("{seconds:.1} s ({:.0} MiB/s)", (bytes / MIB) as f64 / seconds)
    };
    let row = |what: &str, a: String, b: String| println!("| {what} | {a} | {b} |");
    row("first backup of all guests", rate(data, ours.first_day), rate(data, theirs.first_day));
    row(
        "second day of one guest, read in full",
        rate(day2_data, ours.second_day),
        rate(day2_data, theirs.second_day),
    );
    row("restore of one guest", rate(day2_data, ours.restore), rate(day2_data, theirs.restore));
    let mib = |value: f64| format!("{value:.0} MiB");
    row("stored after the first day", mib(ours.stored_first), mib(theirs.stored_first));
    row("stored after the second day", mib(ours.stored_second), mib(theirs.stored_second));
    row("peak anonymous memory, backup", mib(ours.backup_memory), mib(theirs.backup_memory));
    row("peak anonymous memory, restore", mib(ours.restore_memory), mib(theirs.restore_memory));
    println!("\nFleece's memory is engine and plugin together.");
    Ok(())
}

/// One run of Fleece: a fresh store, the guests one after the other, the second day, a restore.
fn fleece(guests: &[PathBuf], day2: &Path) -> Result<Figures> {
    let mut fixture = Fixture::new()?;
    let mut engine = Watch::start(fixture.engine()?.pid());
    let mut figures = Figures::default();
    let mut plugin = 0;
    let start = Instant::now();
    for path in guests {
        plugin = plugin.max(backup(&fixture, &name(path), path)?);
    }
    figures.first_day = start.elapsed().as_secs_f64();
    figures.stored_first = size(&fixture.path("store"))?;
    let start = Instant::now();
    plugin = plugin.max(backup(&fixture, &name(&guests[0]), day2)?);
    figures.second_day = start.elapsed().as_secs_f64();
    figures.stored_second = size(&fixture.path("store"))?;
    figures.backup_memory = mib(engine.peak() + plugin);

    fixture.stop_engine()?;
    fixture.start_engine()?;
    engine = Watch::start(fixture.engine()?.pid());
    let target = fixture.text("restored.raw");
    let vm = format!("{}@latest", name(&guests[0]));
    let start = Instant::now();
    let mut command = fixture.fleece_command(&["restore", &vm, "--to", &target, "-O", "raw"])?;
    let plugin = watched("fleece restore", &mut command)?;
    figures.restore = start.elapsed().as_secs_f64();
    figures.restore_memory = mib(engine.peak() + plugin);
    image::same(day2, Path::new(&target))?;
    Ok(figures)
}

fn backup(fixture: &Fixture, vm: &str, path: &Path) -> Result<u64> {
    let disk = format!("--image=vda={}", path.display());
    watched("fleece backup", &mut fixture.fleece_command(&["backup", vm, &disk])?)
}

/// The same with restic: one file a snapshot, under one path per guest.
fn restic(guests: &[PathBuf], day2: &Path) -> Result<Figures> {
    let folder = tempfile::tempdir()?;
    let repository = folder.path().join("repository");
    let run = |arguments: &[&str]| -> Result<u64> {
        let mut command = Command::new("restic");
        command
            .env("RESTIC_PASSWORD", "bench")
            .env("RESTIC_CACHE_DIR", folder.path().join("cache"));
        command
            .arg("--repo")
            .arg(&repository)
            .arg("--quiet")
            .args(arguments)
            .current_dir(folder.path());
        watched("restic", &mut command)
    };
    run(&["init"])?;
    let mut figures = Figures::default();
    let mut peak = 0;
    let start = Instant::now();
    for path in guests {
        peak = peak.max(run(&["backup", &path.display().to_string()])?);
    }
    figures.first_day = start.elapsed().as_secs_f64();
    figures.stored_first = size(&repository)?;
    let start = Instant::now();
    peak = peak.max(run(&["backup", "--tag", "day2", &day2.display().to_string()])?);
    figures.second_day = start.elapsed().as_secs_f64();
    figures.stored_second = size(&repository)?;
    figures.backup_memory = mib(peak);
    let start = Instant::now();
    figures.restore_memory =
        mib(run(&["restore", "latest", "--tag", "day2", "--target", "restored"])?);
    figures.restore = start.elapsed().as_secs_f64();
    let day2 = fs::canonicalize(day2)?;
    image::same(&day2, &folder.path().join("restored").join(day2.strip_prefix("/")?))?;
    Ok(figures)
}

/// Runs a command to its end; its peak of anonymous memory.
fn watched(name: &str, command: &mut Command) -> Result<u64> {
    let running = Running::start(name, command)?;
    let watch = Watch::start(running.pid());
    running.finish(LIMIT)?.code(0)?;
    Ok(watch.peak())
}

fn restic_version() -> Result<String> {
    let text = tools::run(Command::new("restic").arg("version"))?;
    Ok(text.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
}

fn name(path: &Path) -> String {
    path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// Bytes of all files below a folder, in MiB.
fn size(folder: &Path) -> Result<f64> {
    let text = tools::run(Command::new("du").args(["-s", "--apparent-size", "-B1"]).arg(folder))?;
    Ok(text.split_whitespace().next().context("du said nothing")?.parse::<f64>()? / MIB as f64)
}

/// Bytes of blocks that are not zero.
fn nonzero(path: &Path) -> Result<u64> {
    let mut bytes = 0;
    image::each_block(path, |block| {
        bytes += if block.iter().any(|byte| *byte != 0) { 4096 } else { 0 }
    })?;
    Ok(bytes)
}

fn median(runs: &[Figures]) -> Figures {
    let of = |field: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(field).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Figures {
        first_day: of(|run| run.first_day),
        second_day: of(|run| run.second_day),
        restore: of(|run| run.restore),
        stored_first: of(|run| run.stored_first),
        stored_second: of(|run| run.stored_second),
        backup_memory: of(|run| run.backup_memory),
        restore_memory: of(|run| run.restore_memory),
    }
}
