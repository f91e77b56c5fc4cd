//! The part `many` of `ci/bench`: 1, 4 and 16 VMs backed up at once into one engine.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use qemu_tests::bench::report::number;
use qemu_tests::bench::{Bench, Table, Target, blocks, cost, mib, rate};
use qemu_tests::memory::Watch;
use qemu_tests::{Fixture, Guest, MIB, Machine, Result, Running, image};

/// VMs at once.
const COUNTS: [usize; 3] = [1, 4, 16];
/// Asked: how much more memory every further VM may take, in all.
const MORE: f64 = 4.0;
/// How long one round may take.
const LIMIT: Duration = Duration::from_secs(3600);
/// The live guest's disk, and what is written on it.
const DISK: u64 = 512 * MIB;
const WRITTEN: u64 = 128 * MIB;

/// One round of backups.
struct Round {
    vms: usize,
    seconds: f64,
    cpu: f64,
    bytes: u64,
    /// Engine and all plugins at one instant.
    together: u64,
    engine: u64,
    /// The largest plugin, and all of them at their largest.
    plugin: u64,
    plugins: u64,
    /// QEMU's tools.
    helpers: u64,
    stored: u64,
}

fn main() -> Result {
    let bench = Bench::from_environment("many")?;
    let images = images(&bench)?;
    let mut report = bench.report("Many VMs at once")?;
    report.text(&format!(
        "One engine with its default budget of 32 MiB and a fresh store for each row; all `fleece backup` start \
         at once. The last VM of a row is a live guest that writes meanwhile, if there is more than one; the others \
         are shut-off, from raw images of {} guests and days (what they share is stored once). Bytes are those that \
         are not holes. Peaks of anonymous memory; `together` at one instant, looked at every 10 ms; `qemu-nbd`, \
         which reads the images of shut-off VMs, stands apart.",
        images.len()
    ));
    let mut rounds = Vec::new();
    for vms in COUNTS {
        bench.step(&format!("{vms} VMs"));
        rounds.push(round(&images, vms)?);
    }
    report.plot("many-memory", "peak anonymous memory over VMs at once, MiB");
    report.plot("many-rate", "MiB per second of all VMs over VMs at once");
    report.table(&table(&bench, &rounds)?);
    report.heading("Targets");
    let mut targets = Vec::new();
    if let Some((first, others)) = rounds.split_first() {
        targets.push(Target::at_most("one VM", mib(first.together), 64.0, "MiB"));
        for other in others {
            let more = (mib(other.together) - mib(first.together)) / (other.vms - first.vms) as f64;
            let what = format!("each further VM, {} at once", other.vms);
            targets.push(Target::at_most(&what, more, MORE, "MiB"));
        }
    }
    report.targets(&targets);
    bench.write(&report)
}

/// All days of all guests, days of one guest apart from one another.
fn images(bench: &Bench) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for day in 1..=3 {
        let mut names: Vec<_> = fs::read_dir(&bench.guests)?.collect::<std::io::Result<_>>()?;
        names.sort_by_key(fs::DirEntry::file_name);
        for name in names {
            let path = name.path().join(format!("day{day}.raw"));
            found.extend(path.exists().then_some(path));
        }
    }
    ensure!(!found.is_empty(), "no guests in {}", bench.guests.display());
    Ok(found)
}

fn round(images: &[PathBuf], vms: usize) -> Result<Round> {
    let mut fixture = Fixture::new()?;
    let mut live = None;
    let shut_off = if vms > 1 { vms - 1 } else { vms };
    if vms > shut_off {
        live = Some(start_guest(&fixture)?);
    }
    let mut bytes = if live.is_some() { WRITTEN } else { 0 };
    for n in 0..shut_off {
        bytes += blocks::warm(&images[n % images.len()])?;
    }
    rustix::fs::sync();
    let engine = fixture.engine()?.pid();
    let before = cost::cpu(engine)?;
    let start = Instant::now();
    let mut running = Vec::new();
    for n in 0..shut_off {
        let name = format!("vm{n}");
        let argument = format!("--image=vda={}", images[n % images.len()].display());
        let mut command = fixture.fleece_command(&["backup", &name, &argument])?;
        running.push(Running::start(&format!("backup of {name}"), &mut command)?);
    }
    if let Some((machine, _)) = &live {
        running.push(fixture.backup(machine, &[])?);
    }
    let pids: Vec<u32> = running.iter().map(Running::pid).collect();
    let together = cost::Watch::start([&[engine][..], &pids].concat());
    let engine_alone = Watch::start(engine);
    let plugins: Vec<Watch> = pids.iter().map(|pid| Watch::start(*pid)).collect();
    for one in running {
        one.finish(LIMIT)?.code(0)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let (together, helpers) = together.stop();
    let peaks: Vec<u64> = plugins.iter().map(Watch::peak).collect();
    let round = Round {
        vms,
        seconds,
        cpu: cost::cpu(engine)? - before,
        bytes,
        together,
        engine: engine_alone.peak(),
        plugin: peaks.iter().copied().max().unwrap_or(0),
        plugins: peaks.iter().sum(),
        helpers,
        stored: fixture.figure("stored_bytes")?,
    };
    if let Some((machine, mut guest)) = live {
        guest.is_left_alone(&machine, 1)?;
        guest.keeps_writing()?;
        guest.obey("stop")?;
        guest.power_off()?;
    }
    Ok(round)
}

/// A guest that writes numbered records until it is told to stop.
fn start_guest(fixture: &Fixture) -> Result<(Machine, Guest)> {
    let machine = Machine::new(fixture.folder(), "live")?.with_disk("qcow2", DISK)?;
    let raw = fixture.path("live.raw");
    image::raw(&raw, DISK, &[(MIB, WRITTEN, 99)])?;
    let disk = machine.disks.first().context("no disk")?;
    image::convert(&raw, "raw", &disk.path, "qcow2")?;
    fs::remove_file(raw)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("start 5 {} {} 50 vda", 256 * MIB, 64 * MIB))?;
    Ok((machine, guest))
}

fn table(bench: &Bench, rounds: &[Round]) -> Result<Table> {
    let mut memory = bench.csv("memory", &["VMs at once", "together", "engine", "all plugins"])?;
    let mut rates = bench.csv("rate", &["VMs at once", "MiB per second"])?;
    let mut table = Table::new(&[
        "VMs",
        "s",
        "MiB/s",
        "engine CPU s",
        "together MiB",
        "engine MiB",
        "largest plugin MiB",
        "all plugins MiB",
        "qemu-nbd MiB",
        "stored MiB",
    ]);
    for round in rounds {
        let rate = rate(round.bytes, round.seconds);
        let sizes = [round.together, round.engine, round.plugin, round.plugins, round.helpers];
        let sizes = sizes.map(|bytes| number(mib(bytes)));
        let vms = round.vms.to_string();
        memory.row(&[vms.as_str(), &sizes[0], &sizes[1], &sizes[3]])?;
        rates.row(&[vms.clone(), number(rate)])?;
        let mut row = vec![vms, number(round.seconds), number(rate), number(round.cpu)];
        row.extend(sizes);
        row.push(number(mib(round.stored)));
        table.row(&row);
    }
    Ok(table)
}
