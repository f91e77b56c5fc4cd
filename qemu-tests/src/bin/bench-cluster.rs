//! The part `cluster` of `ci/bench`: several engines on one store, each on a host of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use qemu_tests::bench::report::{Report, number};
use qemu_tests::bench::{Bench, Table, Target, blocks, median, mib, rate};
use qemu_tests::cluster::Cluster;
use qemu_tests::memory::Watch;
use qemu_tests::wait::{LONG, wait_until};
use qemu_tests::{Fixture, MIB, Result, Running, image};

/// Hosts of most of it.
const HOSTS: usize = 4;
/// Hosts at whose number memory is looked at.
const PEERS: [usize; 3] = [3, 30, 100];
/// Of them those that back up at once; all answer.
const BUSY: usize = 3;
/// What each of these backs up.
const BUSY_IMAGE: u64 = 192 * MIB;
/// Asked: bytes over the network for a request at 20 % new.
const BYTES: f64 = 44.0;
/// The lone small backup.
const SMALL: u64 = 64 * MIB;
/// How long one backup may take.
const LIMIT: Duration = Duration::from_secs(1800);
const BLOCK: u64 = 4096;

fn main() -> Result {
    let bench = Bench::from_environment("cluster")?;
    let mut report = bench.report("Several hosts")?;
    report.text(
        "Every host is a network namespace with an address of its own, all at one bridge and on the same two \
         cores; a fixed list of hosts, and a directory as the store, so that what goes over their cables is what \
         engines say to one another: TCP, TLS and all headers counted. Engines have their default budget of \
         32 MiB.",
    );
    let mut targets = Vec::new();
    guests(&bench, &mut report, &mut targets)?;
    network(&bench, &mut report, &mut targets)?;
    small(&bench, &mut report, &mut targets)?;
    memory(&bench, &mut report, &mut targets)?;
    report.heading("Targets");
    report.targets(&targets);
    bench.write(&report)
}

/// Bytes that all hosts have sent.
fn sent(cluster: &Cluster, hosts: usize) -> Result<u64> {
    let network = cluster.network.as_ref().context("no network")?;
    (0..hosts).map(|host| network.sent(host)).sum()
}

/// Blocks that a backup asked about, and those that were new.
fn asked_and_new(cluster: &Cluster, host: usize, vm: &str) -> Result<(u64, u64)> {
    let arguments = ["snapshots", vm, "--last", "1", "--json"];
    let listed = cluster.begin(host, "fleece", &arguments)?.finish(LONG)?.code(0)?.json()?;
    let counts = &listed.last().context("no snapshot")?["counts"];
    let figure = |name: &str| counts[name].as_u64().with_context(|| format!("no {name}: {counts}"));
    let asked = figure("read")? - figure("zero")? - figure("unchanged")?;
    ensure!(figure("undetected")? == 0, "undetected blocks without a fault: {counts}");
    Ok((asked / BLOCK, figure("new")? / BLOCK))
}

/// Debian guests on all hosts at once, day by day: nothing is stored twice.
fn guests(bench: &Bench, report: &mut Report, targets: &mut Vec<Target>) -> Result {
    bench.step("guests on four hosts");
    let cluster = Cluster::of_a_list_on_hosts(HOSTS)?;
    let mut names: Vec<_> = fs::read_dir(&bench.guests)?.collect::<std::io::Result<_>>()?;
    names.sort_by_key(fs::DirEntry::file_name);
    let mut table = Table::new(&[
        "day",
        "GiB read",
        "s",
        "MiB/s",
        "asked, thousands",
        "new",
        "bytes a request",
    ]);
    let mut all = Vec::new();
    for day in 1..=3 {
        let paths: Vec<PathBuf> = names
            .iter()
            .map(|name| name.path().join(format!("day{day}.raw")))
            .filter(|path| path.exists())
            .collect();
        let mut row = vec![day.to_string()];
        row.extend(one_day(&cluster, &paths)?);
        table.row(&row);
        all.extend(paths);
    }
    let paths: Vec<&Path> = all.iter().map(PathBuf::as_path).collect();
    let distinct = image::distinct_blocks(&paths)?;
    wait_until(LONG, "what the owners learn", || {
        Ok(cluster.figure(0, "unique_blocks")? == distinct)
    })?;
    let doubles = cluster.figure(0, "double_blocks")?;
    for host in 0..HOSTS {
        cluster.begin(host, "fleecectl", &["verify"])?.finish(LIMIT)?.code(0)?;
    }
    report.heading("Guests on four hosts");
    report.text(&format!(
        "The guests of the other parts, spread over four hosts and backed up at once, day by day. {distinct} blocks \
         are distinct, as counted with SHA-256 beside Fleece; as many are known to the four hosts, each to one, \
         and {doubles} were stored twice. One request in four is the asking host's own and goes over no cable; the \
         others' bytes are divided by all.",
    ));
    report.table(&table);
    targets.push(Target::at_most(
        "blocks stored twice, four hosts, no fault",
        doubles as f64,
        0.0,
        "",
    ));
    Ok(())
}

/// All guests of a day at once; gives the cells of a row.
fn one_day(cluster: &Cluster, paths: &[PathBuf]) -> Result<[String; 6]> {
    let bytes = paths.iter().map(|path| blocks::warm(path)).sum::<Result<u64>>()?;
    let (before, start) = (sent(cluster, HOSTS)?, Instant::now());
    let begin = |(n, path): (usize, &PathBuf)| cluster.backup(n % HOSTS, &format!("vm{n}"), path);
    let running: Vec<Running> = paths.iter().enumerate().map(begin).collect::<Result<_>>()?;
    for one in running {
        one.finish(LIMIT)?.code(0)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let bytes_sent = sent(cluster, HOSTS)? - before;
    let (mut asked, mut new) = (0, 0);
    for n in 0..paths.len() {
        let (a, b) = asked_and_new(cluster, n % HOSTS, &format!("vm{n}"))?;
        (asked, new) = (asked + a, new + b);
    }
    Ok([
        number(bytes as f64 / f64::from(1 << 30)),
        number(seconds),
        number(rate(bytes, seconds)),
        number(asked as f64 / 1000.0),
        format!("{:.0} %", new as f64 * 100.0 / asked.max(1) as f64),
        number(bytes_sent as f64 / asked.max(1) as f64),
    ])
}

/// The network's cost at exactly 20 % new.
fn network(bench: &Bench, report: &mut Report, targets: &mut Vec<Target>) -> Result {
    bench.step("network");
    let cluster = Cluster::of_a_list_on_hosts(HOSTS)?;
    let size = 1024 * MIB;
    let (old, mixed) = (cluster.fixture.path("old.raw"), cluster.fixture.path("mixed.raw"));
    image::raw(&old, size, &[(0, size, 1)])?;
    // Its last fifth is new.
    image::raw(&mixed, size, &[(0, size / 5 * 4, 1), (size / 5 * 4, size - size / 5 * 4, 2)])?;
    cluster.backup(0, "old", &old)?.finish(LIMIT)?.code(0)?;
    let before = sent(&cluster, HOSTS)?;
    cluster.backup(1, "mixed", &mixed)?.finish(LIMIT)?.code(0)?;
    let bytes = sent(&cluster, HOSTS)? - before;
    let (asked, new) = asked_and_new(&cluster, 1, "mixed")?;
    let shares = cluster.ask(1, &["hosts"])?;
    let own = shares[0]["slices"].as_u64().context("no share")?;
    let elsewhere = asked as f64 * (4096 - own) as f64 / 4096.0;
    let each = bytes as f64 / elsewhere;
    report.heading("Network");
    report.text(&format!(
        "A disk of 1 GiB on one host of four, of which a fifth is new ({new} of {asked} blocks). {elsewhere:.0} requests \
         went to other hosts; all hosts sent {bytes} bytes meanwhile, both directions, with what was learned of new \
         blocks: {each:.1} bytes for each of these requests.",
    ));
    targets.push(Target::at_most("network, 20 % new", each, BYTES, "B a request"));
    Ok(())
}

/// A lone small backup, on one host and in a cluster of four, in turns.
fn small(bench: &Bench, report: &mut Report, targets: &mut Vec<Target>) -> Result {
    bench.step("a lone small backup");
    let mut alone = Fixture::new()?;
    alone.engine()?;
    let cluster = Cluster::of_a_list_on_hosts(HOSTS)?;
    let (mut one, mut four) = (Vec::new(), Vec::new());
    for run in 0..bench.runs().max(3) as u64 {
        let path = alone.path(&format!("small{run}.raw"));
        image::raw(&path, SMALL, &[(0, SMALL, 100 + run)])?;
        let start = Instant::now();
        alone.backup_images(&format!("vm{run}"), &[("vda", &path)])?;
        one.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        cluster.backup(0, &format!("vm{run}"), &path)?.finish(LIMIT)?.code(0)?;
        four.push(start.elapsed().as_secs_f64());
    }
    let (one, four) = (median(&one), median(&four));
    report.heading("A lone small backup");
    report.text(&format!(
        "64 MiB of new blocks from a raw image, to the end of the command: {one:.2} s with one engine, {four:.2} s on \
         one of four hosts (medians, in turns).",
    ));
    targets.push(Target::at_most("small backup, four hosts to one", four / one, 1.5, "x"));
    Ok(())
}

/// Backs up at once on few of so many hosts: how long that takes, and what the busiest engine and the mean of all
/// peak at.
fn busy(hosts: usize) -> Result<[f64; 3]> {
    let cluster = Cluster::of_a_list(hosts)?;
    let watches: Vec<Watch> =
        (0..hosts).map(|host| Ok(Watch::start(cluster.pid(host)?))).collect::<Result<_>>()?;
    let mut running = Vec::new();
    let start = Instant::now();
    for host in 0..BUSY {
        let path = cluster.fixture.path(&format!("busy{host}.raw"));
        let shared = BUSY_IMAGE / 2;
        let ranges = [(0, shared, 1), (shared, BUSY_IMAGE - shared, 2 + host as u64)];
        image::raw(&path, BUSY_IMAGE, &ranges)?;
        running.push(cluster.backup(host, &format!("vm{host}"), &path)?);
    }
    for one in running {
        let printed = one.finish(LIMIT)?.code(0)?.printed();
        ensure!(printed.contains("undetected 0"), "{printed}");
    }
    let seconds = start.elapsed().as_secs_f64();
    let seen: Vec<f64> = watches.iter().map(|watch| mib(watch.peak())).collect();
    let busiest = seen.iter().copied().fold(0.0, f64::max);
    Ok([seconds, busiest, seen.iter().sum::<f64>() / seen.len() as f64])
}

/// Anonymous memory of engines that talk to few or to many others.
fn memory(bench: &Bench, report: &mut Report, targets: &mut Vec<Target>) -> Result {
    let mut table = Table::new(&["hosts", "s", "busiest engine MiB", "mean of all MiB"]);
    let mut csv = bench.csv("memory", &["hosts", "busiest engine", "mean"])?;
    let mut peaks = Vec::new();
    for hosts in PEERS {
        bench.step(&format!("memory with {hosts} hosts"));
        let runs: Vec<[f64; 3]> = (0..bench.runs()).map(|_| busy(hosts)).collect::<Result<_>>()?;
        let of = |n: usize| median(&runs.iter().map(|run| run[n]).collect::<Vec<_>>());
        let (seconds, busiest, mean) = (of(0), of(1), of(2));
        table.row(&[hosts.to_string(), number(seconds), number(busiest), number(mean)]);
        csv.row(&[hosts.to_string(), number(busiest), number(mean)])?;
        peaks.push(busiest);
    }
    report.heading("Memory over hosts");
    report.text(&format!(
        "{BUSY} hosts back up {} MiB each at once, half of it common; all hosts answer. Peaks of anonymous memory, \
         looked at every 5 ms; medians of {} runs.",
        BUSY_IMAGE / MIB,
        bench.runs(),
    ));
    report.plot("cluster-memory", "peak anonymous memory of an engine over hosts, MiB");
    report.table(&table);
    let [few, .., many] = peaks[..] else { return Ok(()) };
    targets.push(Target::at_most("busiest engine, 100 hosts to 3", many / few, 1.1, "x"));
    targets.push(Target::at_most("busiest engine, 100 hosts", many, 32.0, "MiB"));
    Ok(())
}
