//! The part `guest` of `ci/bench`: what fio sees in the guest without a backup, under ours, under ours that
//! is told not to mind the guest or hardly reads, and under QEMU's own `blockdev-backup` to a local file.

use std::fs::{self, File};
use std::io::{Write, copy};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use qemu_tests::bench::machine::version;
use qemu_tests::bench::report::number;
use qemu_tests::bench::{Bench, Table, Target, median};
use qemu_tests::wait::{SOON, wait_until};
use qemu_tests::{Fixture, Guest, MIB, Machine, Result, image, tools};

/// The guest's disk.
const DISK: u64 = 4096 * MIB;
/// How much of it is written before, so that a backup takes as long as fio, and fio's own part.
const SIZES: (u64, u64) = (2048 * MIB, 1024 * MIB);
/// The same for a quick run.
const QUICK: (u64, u64) = (128 * MIB, 64 * MIB);
/// Asked: the 99th percentile under ours, over that without a backup.
const TARGET: f64 = 1.5;
/// Exit code of a backup that was told to stop.
const INTERRUPTED: i32 = 130;
/// Writes after which fio is at work: it alone writes.
const AT_WORK: u64 = 100;
/// How long one backup may take.
const LIMIT: Duration = Duration::from_secs(900);

/// What happens while fio runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Idle,
    Ours,
    /// Ours, without a thought for the guest.
    Unpaced,
    /// Ours, reading so slowly that hardly anything of it is left but QEMU's copy-before-write.
    Copies,
    Qemu,
}

const WAYS: [(Way, &str); 5] = [
    (Way::Idle, "no backup"),
    (Way::Ours, "fleece backup --full"),
    (Way::Unpaced, "the same with --no-pacing"),
    (Way::Copies, "the same with --read-limit 1M: hardly more than QEMU's copy-before-write"),
    (Way::Qemu, "QEMU's blockdev-backup"),
];

/// What fio said, in microseconds and per second.
#[derive(Clone, Copy, Default)]
struct Seen {
    write: [f64; 2],
    read: [f64; 2],
    iops: f64,
    /// MiB of scratch at most, where there is any.
    scratch: f64,
    /// Backups that ended meanwhile.
    backups: f64,
}

fn main() -> Result {
    let bench = Bench::from_environment("guest")?;
    let (seconds, (written, area)) = if bench.quick { (5, QUICK) } else { (20, SIZES) };
    let fio = format!(
        "fio --name=mix --filename=/dev/vda --offset={} --size={area} --direct=1 --ioengine=psync --bs=4k \
         --rw=randrw --rwmixread=30 --fdatasync=8 --time_based --runtime={seconds} --randseed=7 \
         --percentile_list=50:99 --output-format=json",
        DISK - area
    );
    let folder = tempfile::Builder::new().prefix("fleece-guest").tempdir()?;
    let initramfs = initramfs(folder.path())?;
    let data = folder.path().join("data.raw");
    image::raw(&data, DISK, &[(0, written, 3), (DISK - area, area, 4)])?;

    let mut runs: [Vec<Seen>; 5] = Default::default();
    for run in 0..bench.runs() {
        for step in 0..WAYS.len() {
            // Another one begins each time.
            let at = (run + step) % WAYS.len();
            bench.step(&format!("{}, run {}", WAYS[at].1, run + 1));
            let seen = observe(WAYS[at].0, &data, &initramfs, &fio, seconds);
            runs[at].push(seen.with_context(|| WAYS[at].1)?);
        }
    }
    let mut report = bench.report("The guest during a backup")?;
    report.text(&format!(
        "A guest with one processor under {} without KVM (TCG): its times are those of a slow processor, so compare \
         the rows. Its qcow2 disk of 4 GiB holds {} MiB; fio's part is written before, so it overwrites. \
         Backups of the whole disk follow one another until fio ends; the one that hardly reads is stopped then. Medians of {} runs; a new guest for each.",
        version(tools::qemu("qemu-system-x86_64")?.arg("--version"))?,
        (written + area) >> 20,
        bench.runs()
    ));
    report.commands(&[fio]);
    let medians = runs.each_ref().map(|seen| middle(seen));
    report.plot("guest-latency", "latency of writes in the guest, microseconds");
    report.table(&table(&bench, &medians)?);
    report.heading("Targets");
    let [idle, ours, _, _, qemu] = medians;
    let over = |a: f64, b: f64| a / b;
    report.targets(&[
        Target::at_most("writes, p99 over idle", over(ours.write[1], idle.write[1]), TARGET, "×"),
        Target::at_most("reads, p99 over idle", over(ours.read[1], idle.read[1]), TARGET, "×"),
        Target::at_most(
            "writes, p99 over QEMU's own",
            over(ours.write[1], qemu.write[1]),
            1.0,
            "×",
        ),
        Target::at_least(
            "requests per second over QEMU's own",
            over(ours.iops, qemu.iops),
            1.0,
            "×",
        ),
    ]);
    bench.write(&report)
}

/// The test guest's initramfs with fio and its libraries behind it: the kernel unpacks both.
fn initramfs(folder: &Path) -> Result<PathBuf> {
    let (top, path) = (folder.join("top"), folder.join("initramfs"));
    let fio = tools::run(Command::new("sh").args(["-c", "command -v fio"]))
        .context("fio is missing: call ci/bench")?;
    let fio = fio.trim();
    fs::create_dir_all(top.join("bin"))?;
    fs::copy(fio, top.join("bin/fio"))?;
    for word in tools::run(Command::new("ldd").arg(fio))?.split_whitespace() {
        if word.starts_with('/') {
            let place = top.join(word.trim_start_matches('/'));
            fs::create_dir_all(place.parent().context("no folder")?)?;
            fs::copy(word, place)?;
        }
    }
    let archive = folder.join("fio.cpio");
    let pack = "find . | cpio --quiet -o -H newc -R 0:0 >\"$0\"";
    tools::run(Command::new("sh").args(["-c", pack]).arg(&archive).current_dir(&top))?;
    fs::remove_dir_all(&top)?;
    let mut whole = File::create(&path)?;
    copy(&mut File::open(tools::cache().join("guest/initramfs"))?, &mut whole)?;
    // Archives begin at multiples of four bytes.
    let length = whole.metadata()?.len();
    whole.write_all(&vec![0; (length.next_multiple_of(4) - length) as usize])?;
    copy(&mut File::open(&archive)?, &mut whole)?;
    fs::remove_file(archive)?;
    Ok(path)
}

/// A new guest, fio in it, and backups meanwhile.
fn observe(way: Way, data: &Path, initramfs: &Path, fio: &str, seconds: u64) -> Result<Seen> {
    let fixture = Fixture::new()?;
    let mut machine = Machine::new(fixture.folder(), "busy")?.with_disk("qcow2", DISK)?;
    machine.initramfs = Some(initramfs.to_owned());
    machine.memory = 512;
    let disk = machine.disks.first().context("no disk")?.path.clone();
    image::convert(data, "raw", &disk, "qcow2")?;
    rustix::fs::sync();
    let mut guest = machine.start()?;
    let line = format!("shell {fio}");
    guest.send(&line)?;
    // A backup begins beside a guest that is at work.
    wait_until(SOON, "fio at work", || {
        let devices = guest.qmp.execute("query-blockstats", &json!({}))?;
        Ok(devices[0]["stats"]["wr_operations"].as_u64().context("no count")? > AT_WORK)
    })?;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut seen = Seen::default();
    let limit: &[&str] = match way {
        Way::Unpaced => &["--no-pacing"],
        Way::Copies => &["--read-limit", "1M"],
        Way::Idle | Way::Ours | Way::Qemu => &[],
    };
    if way == Way::Copies {
        let mut running = fixture.backup(&machine, &[&["--full"], limit].concat())?;
        thread::sleep(end.saturating_duration_since(Instant::now()));
        ensure!(running.ended()?.is_none(), "it ended before fio did");
        running.signal(Signal::TERM)?;
        running.finish(LIMIT)?.code(INTERRUPTED)?;
    }
    while matches!(way, Way::Ours | Way::Unpaced | Way::Qemu) && Instant::now() < end {
        if way != Way::Qemu {
            let running = fixture.backup(&machine, &[&["--full", "--json"], limit].concat())?;
            for line in running.finish(LIMIT)?.code(0)?.json()? {
                let peak = line["scratch_peak"].as_u64().unwrap_or(0);
                seen.scratch = seen.scratch.max(peak as f64 / MIB as f64);
            }
        } else {
            blockdev_backup(&mut guest, &fixture.path("copy.qcow2"))?;
        }
        seen.backups += 1.0;
    }
    thread::sleep(end.saturating_duration_since(Instant::now()));
    let answer = guest.answer(&line)?;
    read(&answer, &mut seen)?;
    guest.power_off()?;
    Ok(seen)
}

/// One full copy of the disk by QEMU itself.
fn blockdev_backup(guest: &mut Guest, target: &Path) -> Result {
    image::create(target, "qcow2", DISK)?;
    let file = json!({ "driver": "file", "filename": target });
    let node = json!({ "driver": "qcow2", "node-name": "copy", "file": file });
    guest.qmp.patience(LIMIT)?;
    guest.qmp.execute("blockdev-add", &node)?;
    let job = json!({ "job-id": "copy", "device": "vda-node", "target": "copy", "sync": "full" });
    guest.qmp.execute("blockdev-backup", &job)?;
    let ended = guest.qmp.wait_event("BLOCK_JOB_COMPLETED")?;
    ensure!(ended["data"]["error"].is_null(), "QEMU's own backup failed: {ended}");
    guest.qmp.execute("blockdev-del", &json!({ "node-name": "copy" }))?;
    Ok(fs::remove_file(target)?)
}

/// Takes the figures out of fio's JSON, whose lines the guest joined by ` | `.
fn read(answer: &str, seen: &mut Seen) -> Result {
    let text = answer.replace(" | ", "\n");
    let start = text.find('{').with_context(|| format!("fio said: {text}"))?;
    let end = text.rfind('}').with_context(|| format!("fio said: {text}"))?;
    let all: Value =
        serde_json::from_str(&text[start..=end]).with_context(|| format!("fio said: {text}"))?;
    let job = &all["jobs"][0];
    let figure = |value: &Value| value.as_f64().with_context(|| format!("not in: {job}"));
    for (kind, place) in [("write", &mut seen.write), ("read", &mut seen.read)] {
        let percentiles = &job[kind]["clat_ns"]["percentile"];
        *place = [
            figure(&percentiles["50.000000"])? / 1000.0,
            figure(&percentiles["99.000000"])? / 1000.0,
        ];
        seen.iops += figure(&job[kind]["iops"])?;
    }
    Ok(())
}

fn middle(seen: &[Seen]) -> Seen {
    let of = |field: fn(&Seen) -> f64| median(&seen.iter().map(field).collect::<Vec<_>>());
    Seen {
        write: [of(|seen| seen.write[0]), of(|seen| seen.write[1])],
        read: [of(|seen| seen.read[0]), of(|seen| seen.read[1])],
        iops: of(|seen| seen.iops),
        scratch: of(|seen| seen.scratch),
        backups: of(|seen| seen.backups),
    }
}

fn table(bench: &Bench, medians: &[Seen; 5]) -> Result<Table> {
    let columns = ["way", "write p50", "write p99", "read p50", "read p99"];
    let mut csv = bench.csv("latency", &columns)?;
    let mut table = Table::new(&[
        "during",
        "write p50 µs",
        "write p99 µs",
        "read p50 µs",
        "read p99 µs",
        "requests/s",
        "scratch MiB",
        "backups meanwhile",
    ]);
    for ((way, name), seen) in WAYS.iter().zip(medians) {
        let latency = [seen.write, seen.read].concat();
        let latency: Vec<String> = latency.into_iter().map(number).collect();
        csv.row(&[&[(*name).to_owned()][..], &latency].concat())?;
        let mut others = [seen.iops, seen.scratch, seen.backups].map(number);
        if *way == Way::Copies {
            // It never ends by itself, and so does not say.
            others[1..].fill("–".to_owned());
        }
        table.row(&[&[(*name).to_owned()][..], &latency, &others].concat());
    }
    Ok(table)
}
