//! A cluster with etcd and a store in S3, each host in a network namespace of its own: hosts join, are
//! drained, are killed and cut off; etcd goes and comes back. What is stored stays stored once, unless
//! a fault explains it, and every host restores every snapshot.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use qemu_tests::cluster::{Cluster, images, images_of, snapshot};
use qemu_tests::process::{Finished, Running};
use qemu_tests::wait::{LONG, wait_until};
use qemu_tests::wire::Conditions;
use qemu_tests::{MIB, Result, image};

/// Longer than an engine's lease.
const LEASE: Duration = Duration::from_secs(20);

/// A backup that finds everything stored already.
fn is_all_known(finished: &Finished) -> Result {
    let printed = finished.printed();
    ensure!(printed.contains("new 0 B") && printed.contains("undetected 0"), "{printed}");
    Ok(())
}

/// Backs every image up at once, one on each host.
fn all_at_once(cluster: &Cluster, round: &str, paths: &[PathBuf]) -> Result<Vec<Finished>> {
    let start = |(host, path): (usize, &PathBuf)| {
        let vm = format!("{round}{host}");
        cluster.backup(host, &vm, path)
    };
    let running: Vec<Running> = paths.iter().enumerate().map(start).collect::<Result<_>>()?;
    running.into_iter().map(|one| one.finish(LONG)?.code(0)).collect()
}

#[test]
fn hosts_join_and_are_drained_and_a_block_stays_stored_once() -> Result {
    let mut cluster = Cluster::of_etcd(3)?;
    let paths = images(cluster.fixture.folder(), 3)?;
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let mut snapshots = Vec::new();
    for (host, finished) in all_at_once(&cluster, "first", &paths)?.iter().enumerate() {
        ensure!(finished.printed().contains("undetected 0"), "{}", finished.printed());
        snapshots.push((snapshot(&format!("first{host}"), finished)?, all[host]));
    }
    let expected = image::distinct_blocks(&all)?;
    wait_until(LONG, "what the owners learn", || {
        Ok(cluster.figure(1, "unique_blocks")? == expected)
    })?;

    let fourth = cluster.join_by_bundle()?;
    cluster.wait_members(4)?;
    ensure!(cluster.figure(fourth, "unique_blocks")? == expected, "not exact after a join");
    let again = cluster.backup(fourth, "fourth", all[0])?.finish(LONG)?.code(0)?;
    is_all_known(&again)?;
    snapshots.push((snapshot("fourth", &again)?, all[0]));

    let planned = cluster.ask(0, &["rebalance", "--dry-run", "--without", "hv1"])?;
    cluster.begin(0, "fleecectl", &["rebalance"])?.finish(LONG)?.code(2)?;
    let nobody = ["rebalance", "--dry-run", "--without", "hv9"];
    cluster.begin(0, "fleecectl", &nobody)?.finish(LONG)?.code(14)?;
    let unmoved = cluster.ask(0, &["rebalance", "--dry-run"])?;
    let total = unmoved.last().context("no total")?;
    ensure!(total["slices_moving"] == 0, "the map does not fit: {total}");
    cluster.ask(0, &["drain", "hv1"])?;
    wait_until(LONG, "hv1 to own nothing", || {
        let hosts = cluster.ask(2, &["hosts"])?;
        let drained = hosts.iter().find(|host| host["name"] == "hv1").context("no hv1")?;
        Ok(drained["slices"] == 0 && drained["unique_blocks"] == 0)
    })?;
    cluster.wait_members(4)?;
    ensure!(cluster.figure(0, "unique_blocks")? == expected, "not exact after a drain");
    // All is as it was planned, and nothing else has changed the map.
    let hosts = cluster.ask(0, &["hosts"])?;
    for share in planned.iter().filter(|line| line["message_type"] == "share") {
        let host = hosts.iter().find(|host| host["name"] == share["name"]).context("no host")?;
        ensure!(host["slices"] == share["slices_then"], "{host} instead of {share}");
    }
    let epoch = hosts[0]["map_epoch"].as_u64().context("no epoch")?;
    let before = planned.last().and_then(|total| total["map_epoch"].as_u64());
    ensure!(before == Some(epoch - 1), "{before:?} before {epoch}");
    // Its backups go on.
    is_all_known(&cluster.backup(1, "drained", all[2])?.finish(LONG)?.code(0)?)?;
    ensure!(cluster.figure(0, "double_blocks")? == 0, "something was stored twice");
    cluster.must_be_whole(&snapshots)?;
    // Who asked for the drain is still a member when every lease of that time has ended.
    let begun = Instant::now();
    wait_until(LONG, "a lease's time", || {
        let hosts = cluster.ask(2, &["hosts"])?;
        ensure!(hosts.len() == 4 && hosts[0]["map_epoch"] == epoch, "the map has changed");
        Ok(begun.elapsed() > LEASE)
    })
}

#[test]
fn sessions_of_all_hosts_are_listed_on_any_host() -> Result {
    let mut cluster = Cluster::of_etcd(3)?;
    let path = images(cluster.fixture.folder(), 1)?.remove(0);
    // Slow enough to be seen.
    let disk = format!("--image=vda={}", path.display());
    let running = cluster.begin(1, "fleece", &["backup", "slow", &disk, "--read-limit", "4M"])?;
    wait_until(LONG, "the backup to be listed", || {
        let listed = cluster.ask(0, &["sessions"])?;
        Ok(listed.iter().any(|one| one["host"] == "hv1" && one["vm"] == "slow"))
    })?;
    let listed = cluster.begin(2, "fleecectl", &["sessions"])?.finish(LONG)?.code(0)?;
    ensure!(listed.printed().contains("hv1"), "{}", listed.printed());
    cluster.kill(2)?;
    let listed = cluster.ask(0, &["sessions"])?;
    let silent = |one: &serde_json::Value| one["message_type"] == "silent" && one["host"] == "hv2";
    ensure!(listed.iter().any(silent), "{listed:?}");
    let slow = running.finish(LONG)?.code(0)?;
    cluster.must_be_whole(&[(snapshot("slow", &slow)?, &path)])
}

#[test]
fn what_a_killed_host_answered_for_the_others_answer_for() -> Result {
    let mut cluster = Cluster::of_etcd(4)?;
    let paths = images(cluster.fixture.folder(), 4)?;
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let first = cluster.backup(2, "vm0", all[0])?.finish(LONG)?.code(0)?;
    cluster.kill(2)?;
    // At once: it waits for the dead host until its lease has ended, and commits.
    let during = cluster.backup(0, "vm1", all[1])?.finish(LONG)?.code(0)?;
    cluster.wait_members(3)?;
    for (host, vm, path) in [(1, "again0", all[0]), (3, "again1", all[1])] {
        is_all_known(&cluster.backup(host, vm, path)?.finish(LONG)?.code(0)?)?;
    }
    // It comes back, with an index that is old.
    cluster.start(2)?;
    cluster.wait_members(4)?;
    let back = cluster.backup(2, "back", all[1])?.finish(LONG)?.code(0)?;
    is_all_known(&back)?;
    let distinct = image::distinct_blocks(&all[..2])?;
    let unique = cluster.figure(3, "unique_blocks")?;
    ensure!(unique == distinct, "{unique} blocks, {distinct} are distinct");
    cluster.must_be_whole(&[
        (snapshot("vm0", &first)?, all[0]),
        (snapshot("vm1", &during)?, all[1]),
        (snapshot("back", &back)?, all[1]),
    ])
}

#[test]
fn what_a_lost_host_knew_its_checkpoint_has() -> Result {
    let mut cluster = Cluster::of_etcd(3)?;
    let path = cluster.fixture.path("large.raw");
    image::raw(&path, 320 * MIB, &[(0, 300 * MIB, 1)])?;
    let first = cluster.backup(0, "large", &path)?.finish(LONG)?.code(0)?;
    ensure!(first.printed().contains("undetected 0"), "{}", first.printed());
    wait_until(LONG, "checkpoints of all hosts", || {
        let hosts = cluster.ask(0, &["hosts"])?;
        Ok(hosts.iter().all(|host| host["checkpointed_blocks"].as_u64() > Some(0)))
    })?;
    cluster.kill(2)?;
    cluster.wait_members(2)?;
    for host in [0, 1] {
        let printed = cluster.printed(host);
        let filled = printed.lines().rfind(|line| line.contains("were read from checkpoints"));
        let filled = filled.with_context(|| printed.clone())?;
        ensure!(!filled.contains("; 0 entries"), "{filled}");
    }
    let distinct = image::distinct_blocks(&[&path])?;
    ensure!(cluster.figure(0, "unique_blocks")? == distinct, "not exact after a loss");
    is_all_known(&cluster.backup(1, "again", &path)?.finish(LONG)?.code(0)?)?;
    // It comes back, and reads checkpoints, too.
    cluster.start(2)?;
    cluster.wait_members(3)?;
    is_all_known(&cluster.backup(2, "back", &path)?.finish(LONG)?.code(0)?)?;
    ensure!(cluster.figure(1, "double_blocks")? == 0, "something was stored twice");
    cluster.must_be_whole(&[(snapshot("large", &first)?, &path)])
}

#[test]
fn a_second_engine_of_a_hosts_name_is_refused() -> Result {
    let cluster = Cluster::of_etcd(2)?;
    let refused = cluster.start_another(1)?.finish(LONG)?.code(11)?;
    ensure!(refused.printed().contains("another engine, at "), "{}", refused.printed());
    cluster.wait_members(2)?;
    let path = &images(cluster.fixture.folder(), 1)?[0];
    let made = cluster.backup(0, "vm", path)?.finish(LONG)?.code(0)?;
    ensure!(made.printed().contains("undetected 0"), "{}", made.printed());
    cluster.must_be_whole(&[(snapshot("vm", &made)?, path)])
}

#[test]
fn a_host_that_is_cut_off_holds_up_nobody_for_long() -> Result {
    let cluster = Cluster::of_etcd(3)?;
    let network = cluster.network.as_ref().context("no network")?;
    let paths = images(cluster.fixture.folder(), 3)?;
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    network.plug(2, false)?;
    let during = cluster.backup(0, "vm0", all[0])?.finish(LONG)?.code(0)?;
    // Without its store it can do nothing; it fails and says so.
    let cut = cluster.backup(2, "vm2", all[2])?;
    let cut = cut.finish(LONG)?;
    ensure!(cut.code == 1, "{}", cut.printed());
    network.plug(2, true)?;
    cluster.wait_members(3)?;
    let after = cluster.backup(2, "vm2", all[0])?.finish(LONG)?.code(0)?;
    is_all_known(&after)?;
    cluster
        .must_be_whole(&[(snapshot("vm0", &during)?, all[0]), (snapshot("vm2", &after)?, all[0])])
}

#[test]
fn without_etcd_everything_goes_on_and_engines_start() -> Result {
    let mut cluster = Cluster::of_etcd(3)?;
    let paths = images(cluster.fixture.folder(), 3)?;
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    cluster.etcd.as_mut().context("no etcd")?.kill()?;
    let first = cluster.backup(0, "vm0", all[0])?.finish(LONG)?.code(0)?;
    ensure!(first.printed().contains("undetected 0"), "{}", first.printed());
    cluster.kill(1)?;
    cluster.start(1)?;
    let second = cluster.backup(1, "vm1", all[0])?.finish(LONG)?.code(0)?;
    is_all_known(&second)?;
    cluster.etcd.as_mut().context("no etcd")?.start_again()?;
    cluster.wait_members(3)?;
    let third = cluster.backup(2, "vm2", all[1])?.finish(LONG)?.code(0)?;
    ensure!(third.printed().contains("undetected 0"), "{}", third.printed());
    cluster.must_be_whole(&[
        (snapshot("vm0", &first)?, all[0]),
        (snapshot("vm1", &second)?, all[0]),
        (snapshot("vm2", &third)?, all[1]),
    ])
}

/// Backups on all hosts at once store each block once, and every host restores them.
fn backups_are_exact(cluster: &Cluster, paths: &[PathBuf]) -> Result {
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let mut snapshots = Vec::new();
    for (host, finished) in all_at_once(cluster, "vm", paths)?.iter().enumerate() {
        ensure!(finished.printed().contains("undetected 0"), "{}", finished.printed());
        snapshots.push((snapshot(&format!("vm{host}"), finished)?, all[host]));
    }
    let expected = image::distinct_blocks(&all)?;
    wait_until(LONG, "what the owners learn", || {
        Ok(cluster.figure(0, "unique_blocks")? == expected)
    })?;
    cluster.must_be_whole(&snapshots)
}

#[test]
fn a_link_that_is_slow_and_loses_packets_changes_nothing() -> Result {
    let cluster = Cluster::of_etcd(3)?;
    let network = cluster.network.as_ref().context("no network")?;
    network.slow(1, "100mbit")?;
    network.slow(2, "20mbit")?;
    backups_are_exact(&cluster, &images(cluster.fixture.folder(), 3)?)
}

#[test]
fn a_link_that_delays_loses_and_reorders_packets_changes_nothing() -> Result {
    let mut cluster = Cluster::of_etcd(3)?;
    let network = cluster.network.as_mut().context("no network")?;
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    println!("seed {seed}");
    let ms = Duration::from_millis;
    let far = Conditions { delay: ms(20), jitter: ms(5), loss: 0.01 };
    let poor = Conditions { delay: ms(2), jitter: ms(0), loss: 0.03 };
    network.replace_cable(1, far, seed)?;
    network.replace_cable(2, poor, seed + 1)?;
    let begun = Instant::now();
    // Small images: over such links TCP is slow, some kinds of it very much so.
    backups_are_exact(&cluster, &images_of(cluster.fixture.folder(), 3, MIB)?)?;
    let network = cluster.network.as_ref().context("no network")?;
    let counts = [network.counts(1)?, network.counts(2)?];
    println!("{:.1} s, {counts:?}", begun.elapsed().as_secs_f64());
    ensure!(counts.iter().all(|one| one.lost > 0), "nothing was lost: {counts:?}");
    ensure!(counts[0].overtaken > 0, "nothing was overtaken: {counts:?}");
    Ok(())
}
