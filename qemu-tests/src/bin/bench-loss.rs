//! The part `loss` of `ci/bench`: one of four hosts is killed, whose part of the index is large.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use qemu_tests::bench::detect::program;
use qemu_tests::bench::report::number;
use qemu_tests::bench::{Bench, Table, Target};
use qemu_tests::cluster::Cluster;
use qemu_tests::process::Running;
use qemu_tests::wait::wait_until;
use qemu_tests::{MIB, Result, image};

const HOSTS: usize = 4;
/// The one that is killed.
const VICTIM: usize = 3;
/// How long a step may take.
const LIMIT: Duration = Duration::from_secs(3600);
/// Asked: its part is served again so long after its lease has ended.
const TARGET: f64 = 60.0;
/// The backup that runs when it is killed.
const SMALL: u64 = 64 * MIB;

fn main() -> Result {
    let bench = Bench::from_environment("loss")?;
    let blocks: u64 = if bench.quick { 2_000_000 } else { 64_000_000 };
    let mut report = bench.report("Loss of a host")?;
    bench.step(&format!("a store of {blocks} blocks"));
    let mut cluster = Cluster::with_etcd(false)?;
    fill(&cluster, blocks)?;
    bench.step("four hosts, and their checkpoints");
    let filled = join_all(&mut cluster, blocks)?;
    bench.step("a host is killed");
    let loss = lose(&mut cluster, blocks)?;
    report.text(&format!(
        "Four hosts, each a network namespace on the same two cores, with etcd; a directory as the store, with \
         {blocks} distinct blocks that are nearly empty (`engine/examples/fill_store.rs`): directories, journals and \
         indexes are as large as they would be. One host is killed (SIGKILL) while another one backs up {} MiB of \
         new blocks. Its lease ends 15 s later; the other three then fill their indexes for its part, all on the \
         same two cores.",
        SMALL / MIB,
    ));
    let mut table = Table::new(&["step", "s"]);
    let rows = [
        ("four hosts fill their indexes from directories", filled.0),
        ("until all have written checkpoints", filled.1),
        ("after the kill: a map without it", loss.map),
        ("after that map: its part is served again", loss.served),
        ("after the kill: the backup that was running has committed", loss.backup),
    ];
    rows.iter().for_each(|(what, seconds)| table.row(&[*what, &number(*seconds)]));
    report.table(&table);
    report.text(&format!(
        "The part of the killed host had {} entries. The hosts that are left know {} blocks, {} are distinct, and a \
         backup of what was stored before finds all of it.",
        loss.entries, loss.known, loss.distinct
    ));
    report.heading("Targets");
    report.targets(&[
        Target::at_least("entries of the part", loss.entries as f64 / 1e6, 16.0 * 0.9, "M"),
        Target::at_most("served again after the lease's end", loss.served, TARGET, "s"),
        Target::at_most(
            "blocks not known, or twice",
            loss.known.abs_diff(loss.distinct) as f64,
            0.0,
            "",
        ),
    ]);
    bench.write(&report)
}

fn fill(cluster: &Cluster, blocks: u64) -> Result {
    let mut command = Command::new(program("fill_store")?);
    let (config, state) = (cluster.fixture.text("engine.toml"), cluster.fixture.text("filler"));
    command.args([&config, &state, &blocks.to_string()]);
    Running::start("fill_store", &mut command)?.finish(LIMIT)?.code(0).map(drop)
}

/// Starts all hosts. Seconds until their indexes are whole, and then until checkpoints have nearly all.
fn join_all(cluster: &mut Cluster, blocks: u64) -> Result<(f64, f64)> {
    let start = Instant::now();
    (0..HOSTS).try_for_each(|_| cluster.join().map(drop))?;
    cluster.wait_members_for(HOSTS, LIMIT)?;
    wait_until(LIMIT, "all blocks", || Ok(cluster.figure(0, "unique_blocks")? == blocks))?;
    let (filled, start) = (start.elapsed().as_secs_f64(), Instant::now());
    wait_until(LIMIT, "checkpoints", || {
        let hosts = cluster.ask(0, &["hosts"])?;
        let written = hosts.iter().filter_map(|host| host["checkpointed_blocks"].as_u64());
        Ok(written.sum::<u64>() >= blocks / 100 * 99)
    })?;
    Ok((filled, start.elapsed().as_secs_f64()))
}

struct Loss {
    map: f64,
    served: f64,
    backup: f64,
    entries: u64,
    known: u64,
    distinct: u64,
}

fn lose(cluster: &mut Cluster, blocks: u64) -> Result<Loss> {
    let hosts = cluster.ask(VICTIM, &["hosts"])?;
    let entries = hosts[0]["unique_blocks"].as_u64().context("no unique_blocks")?;
    let epoch = hosts[0]["map_epoch"].as_u64().context("no map_epoch")?;
    let path = cluster.fixture.path("small.raw");
    image::raw(&path, SMALL, &[(0, SMALL, 1)])?;
    let start = Instant::now();
    cluster.kill(VICTIM)?;
    let backup = cluster.backup(0, "small", &path)?;
    let backup = std::thread::spawn(move || {
        let finished = backup.finish(LIMIT).and_then(|finished| finished.code(0));
        finished.map(|_| start.elapsed().as_secs_f64())
    });
    wait_until(LIMIT, "the next map", || {
        Ok(cluster.ask(0, &["hosts"])?[0]["map_epoch"].as_u64() > Some(epoch))
    })?;
    let map = start.elapsed().as_secs_f64();
    cluster.wait_members_for(HOSTS - 1, LIMIT)?;
    let served = start.elapsed().as_secs_f64() - map;
    let backup = backup.join().ok().context("the backup's thread")??;
    let distinct = blocks + image::distinct_blocks(&[&path])?;
    // What was learned of the backup's own blocks is on its way at most.
    let known = || cluster.figure(0, "unique_blocks");
    wait_until(Duration::from_secs(60), "what the owners learn", || Ok(known()? >= distinct))?;
    let again = cluster.backup(1, "again", &path)?.finish(LIMIT)?.code(0)?.printed();
    ensure!(again.contains("new 0 B"), "{again}");
    Ok(Loss { map, served, backup, entries, known: known()?, distinct })
}
