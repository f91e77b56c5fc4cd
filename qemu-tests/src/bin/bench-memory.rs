//! The part `memory` of `ci/bench`: the most anonymous memory of engine and plugin together, alone
//! and in one control group of 128 MiB, and with indexes of any size.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};

use qemu_tests::bench::change::change;
use qemu_tests::bench::detect::{Detection, figure};
use qemu_tests::bench::report::number;
use qemu_tests::bench::{Bench, Cgroup, Cost, Csv, Table, Target, measure, mib};
use qemu_tests::content::{BLOCK, block};
use qemu_tests::{Fixture, MIB, Result, image};

/// Asked of engine and plugin together.
const TARGET: f64 = 64.0;
/// Aimed at: the paper's figure.
const AIM: f64 = 35.0;
/// Memory of everything in one group, page cache included.
const GROUP: u64 = 128 * MIB;
/// How much more than the smallest index a larger one may cost: what measuring varies by.
const SAME: f64 = 2.0;
/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(3600);
/// Bytes that an increment writes: more than the plugin keeps in memory.
const DIRTY: u64 = 64 * MIB;
/// Requests of a batch, where an index is passed alone.
const REQUESTS: u64 = 1_000_000;

/// A step and what it cost.
type Step = (&'static str, Cost);

fn main() -> Result {
    let bench = Bench::from_environment("memory")?;
    let guest = first_guest(&bench)?;
    let mut report = bench.report("Memory")?;
    report.text(
        "Peak of the anonymous memory (`RssAnon`) of engine and plugin together at one instant, looked at every \
         10 ms, the engine with its default budget of 32 MiB. `qemu-nbd`, which reads and writes images for \
         the plugin, stands apart. One VM at a time.",
    );
    let name = guest.strip_prefix(&bench.guests).unwrap_or(&guest).display();
    report.text(&format!("The guest is `{name}` of `ci/bench-guests`, as qcow2."));
    let mut csv = bench.csv("steps", &["step", "alone", "in 128 MiB"])?;

    bench.step("alone");
    let alone = steps(&bench, &guest, None)?;
    bench.step("in a group of 128 MiB");
    let group = Cgroup::limited("memory", GROUP)?;
    let confined = steps(&bench, &guest, Some(&group))?;
    report.heading("Each step");
    report.plot("memory-steps", "peak anonymous memory of each step, MiB");
    report.text(&format!(
        "`in a group`: engine, plugin and its `qemu-nbd` together in a {}. What is restored is compared with \
         the image.",
        group.describe()
    ));
    report.table(&compare(&alone, &confined, &mut csv)?);
    let mut targets = Vec::new();
    let peak = |steps: &[Step]| steps.iter().map(|(_, cost)| mib(cost.memory)).fold(0.0, f64::max);
    targets.push(Target::at_most("engine and plugin, all steps", peak(&alone), TARGET, "MiB"));
    targets.push(Target::at_most("the paper's figure", peak(&alone), AIM, "MiB"));
    targets.push(Target::at_most("in a group of 128 MiB", peak(&confined), TARGET, "MiB"));
    let killed = group.killed()? as f64;
    targets.push(Target::at_most("processes killed for memory in it", killed, 0.0, ""));

    report.heading("Any size of the index");
    report.text(&format!(
        "An index of made-up entries that belongs to the engine's store (built by `detect_speed`), then a full \
         backup of the guest into it; and the detector alone with {REQUESTS} requests, 20 % of them new, \
         with learning and merging.",
    ));
    let sizes: &[u64] = if bench.quick { &[1, 2] } else { &[1, 16, 64] };
    let mut table =
        Table::new(&["entries", "index MiB", "backup MiB", "backup s", "detector alone MiB"]);
    let mut csv =
        bench.csv("index", &["million entries", "engine and plugin", "detector alone"])?;
    let mut found = Vec::new();
    for millions in sizes {
        bench.step(&format!("index of {millions} M entries"));
        let one = with_index(&guest, millions * 1_000_000)?;
        let cells = [one.cost.memory, one.bytes].map(mib);
        csv.row(&[millions.to_string(), number(cells[0]), number(one.detector)])?;
        table.row(&[
            format!("{millions} M"),
            number(cells[1]),
            number(cells[0]),
            number(one.cost.wall),
            number(one.detector),
        ]);
        found.push((cells[0], one.detector));
    }
    report.table(&table);
    if let (Some(least), Some(most)) = (found.first(), found.last()) {
        let (backup, detector) = (most.0 - least.0, most.1 - least.1);
        targets.push(Target::at_most("largest index over smallest, backup", backup, SAME, "MiB"));
        targets.push(Target::at_most("largest over smallest, detector", detector, SAME, "MiB"));
    }
    report.heading("Targets");
    report.targets(&targets);
    bench.write(&report)
}

/// The first day of the first guest.
fn first_guest(bench: &Bench) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(&bench.guests)? {
        let path = entry?.path().join("day1.raw");
        found.extend(path.exists().then_some(path));
    }
    found.sort();
    found.into_iter().next().with_context(|| format!("no guest in {}", bench.guests.display()))
}

/// A whole life of a guest's backups, each step with its cost.
fn steps(bench: &Bench, guest: &Path, group: Option<&Cgroup>) -> Result<Vec<Step>> {
    let mut fixture = Fixture::without_engine()?;
    let disk = fixture.path("vda.qcow2");
    image::convert(guest, "raw", &disk, "qcow2")?;
    rustix::fs::sync();
    fixture.confine(group);
    fixture.start_engine()?;
    let argument = format!("--image=vda={}", disk.display());
    let target = fixture.text("restored.raw");
    let mut steps = Vec::new();
    let mut run = |fixture: &mut Fixture, name: &'static str, words: &[&str]| {
        bench.step(name);
        let pid = fixture.engine()?.pid();
        let mut command = fixture.fleece_command(words)?;
        let (cost, finished) = measure(name, &mut command, &[pid], LIMIT)?;
        steps.push((name, cost));
        Ok::<_, anyhow::Error>(finished.printed())
    };
    run(&mut fixture, "first backup", &["backup", "guest", &argument])?;
    change(&disk, |client| {
        for at in (0..DIRTY).step_by(BLOCK) {
            // In pieces of 64 KiB, each in the next 512 KiB.
            let offset = at / 65_536 * 524_288 + at % 65_536;
            client.write(offset % (client.size() - 65_536), &block(77, at / BLOCK as u64))?;
        }
        Ok(())
    })?;
    let printed = run(&mut fixture, "increment", &["backup", "guest", &argument])?;
    ensure!(printed.contains("incremental since"), "this was no increment:\n{printed}");
    run(
        &mut fixture,
        "restore",
        &["restore", "guest@latest", "--to", &target, "-O", "raw", "--force"],
    )?;
    let pid = fixture.engine()?.pid();
    let mut verify = fixture.fleecectl_command(&["verify"])?;
    steps.push(("verify", measure("verify", &mut verify, &[pid], LIMIT)?.0));
    image::same_as_qemu_reads(Path::new(&target), &disk, "qcow2")?;
    fixture.stop_engine()?;
    fixture.confine(None);
    Ok(steps)
}

fn compare(alone: &[Step], confined: &[Step], csv: &mut Csv) -> Result<Table> {
    let mut table =
        Table::new(&["step", "alone MiB", "s", "in a group MiB", "s in a group", "qemu-nbd MiB"]);
    for ((name, one), (_, other)) in alone.iter().zip(confined) {
        let cells = [mib(one.memory), one.wall, mib(other.memory), other.wall, mib(one.helpers)];
        let cells = cells.map(number);
        csv.row(&[name, cells[0].as_str(), cells[2].as_str()])?;
        let mut row = vec![(*name).to_owned()];
        row.extend(cells);
        table.row(&row);
    }
    Ok(table)
}

/// What an index of some size does to memory.
struct WithIndex {
    cost: Cost,
    bytes: u64,
    /// The detector alone, MiB.
    detector: f64,
}

fn with_index(guest: &Path, entries: u64) -> Result<WithIndex> {
    let mut fixture = Fixture::new()?;
    // Its index names blocks that no store has: verify says so.
    fixture.leave_damaged();
    let store = fixture.status()?["store_id"].as_str().context("no store_id")?.to_owned();
    fixture.stop_engine()?;
    let index = fixture.path("state").join("index");
    fs::remove_dir_all(&index)?;
    let of = |requests, new| Detection {
        index: &index,
        entries,
        requests,
        new,
        batches: 1,
        store: Some(&store),
    };
    of(1, 0).run(None)?;
    fixture.start_engine()?;
    let known = fixture.figure("unique_blocks")?;
    ensure!(known == entries, "the engine has an index of {known} entries, not {entries}");
    let bytes = fixture.figure("index_bytes")?;
    let pid = fixture.engine()?.pid();
    let argument = format!("--image=vda={}", guest.display());
    let mut command = fixture.fleece_command(&["backup", "guest", &argument])?;
    let (cost, _) = measure("backup", &mut command, &[pid], LIMIT)?;
    fixture.stop_engine()?;
    let batches = of(REQUESTS.min(entries), 20).run(None)?;
    let batch = batches.first().context("no batch")?;
    Ok(WithIndex { cost, bytes, detector: figure(batch, "anonymous_mib")? })
}
