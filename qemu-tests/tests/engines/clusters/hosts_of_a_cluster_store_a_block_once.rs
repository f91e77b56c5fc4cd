//! Three engines on one store, each of which answers for a part of the fingerprints: what any VM of
//! any host has is stored once, and every host restores every snapshot.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qemu_tests::cluster::{Cluster, images, snapshot};
use qemu_tests::process::Running;
use qemu_tests::wait::{LONG, SOON, wait_until};
use qemu_tests::{Result, image};

/// Three hosts are the fewest of which one can be away while two talk.
const HOSTS: usize = 3;

#[test]
fn what_all_hosts_have_at_once_is_stored_once_and_restored_everywhere() -> Result {
    let cluster = Cluster::of_a_list(HOSTS)?;
    let paths = images(cluster.fixture.folder(), HOSTS as u64)?;
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let expected = image::distinct_blocks(&all)?;
    let running: Vec<Running> = (0..HOSTS)
        .map(|host| cluster.backup(host, &format!("vm{host}"), &paths[host]))
        .collect::<Result<_>>()?;
    let mut snapshots = Vec::new();
    for (host, one) in running.into_iter().enumerate() {
        let finished = one.finish(LONG)?.code(0)?;
        ensure!(finished.printed().contains("undetected 0"), "{}", finished.printed());
        snapshots.push((snapshot(&format!("vm{host}"), &finished)?, all[host]));
    }
    wait_until(SOON, "what the owners learn", || {
        Ok(cluster.figure(0, "unique_blocks")? == expected)
    })?;
    // Whatever host has it now, nothing of it is new.
    for (host, path) in all.iter().enumerate() {
        let vm = format!("other{host}");
        let finished = cluster.backup((host + 1) % HOSTS, &vm, path)?.finish(LONG)?.code(0)?;
        ensure!(finished.printed().contains("new 0 B"), "{}", finished.printed());
        snapshots.push((snapshot(&vm, &finished)?, path));
    }
    cluster.must_be_whole(&snapshots)
}

#[test]
fn a_host_that_is_killed_holds_up_nobody_for_long_and_comes_back() -> Result {
    let mut cluster = Cluster::of_a_list(HOSTS)?;
    let paths = images(cluster.fixture.folder(), HOSTS as u64)?;
    let first = cluster.backup(0, "vm0", &paths[0])?.finish(LONG)?.code(0)?;
    cluster.kill(2)?;
    // What the dead host would answer for is stored anew, and said so.
    let second = cluster.backup(1, "vm1", &paths[1])?.finish(LONG)?.code(0)?;
    ensure!(!second.printed().contains("undetected 0"), "{}", second.printed());
    cluster.start(2)?;
    let mut snapshots =
        vec![(snapshot("vm0", &first)?, &*paths[0]), (snapshot("vm1", &second)?, &*paths[1])];
    // It has read in the journals what was stored meanwhile.
    let third = cluster.backup(2, "vm2", &paths[1])?.finish(LONG)?.code(0)?;
    ensure!(third.printed().contains("new 0 B"), "{}", third.printed());
    snapshots.push((snapshot("vm2", &third)?, &*paths[1]));
    cluster.must_be_whole(&snapshots)
}

#[test]
fn hosts_that_gave_each_other_up_talk_again() -> Result {
    let cluster = Cluster::of_a_list_on_hosts(HOSTS)?;
    let network = cluster.network.as_ref().context("no network")?;
    let paths = images(cluster.fixture.folder(), HOSTS as u64)?;
    network.plug(2, false)?;
    // On both sides somebody waits for the other, until each has given it up.
    let running: Vec<Running> = [0, 2]
        .map(|host| cluster.backup(host, &format!("cut{host}"), &paths[host]))
        .into_iter()
        .collect::<Result<_>>()?;
    let mut snapshots = Vec::new();
    for (host, one) in [0, 2].into_iter().zip(running) {
        let cut = one.finish(LONG)?.code(0)?;
        ensure!(!cut.printed().contains("undetected 0"), "{}", cut.printed());
        snapshots.push((snapshot(&format!("cut{host}"), &cut)?, &*paths[host]));
    }
    network.plug(2, true)?;
    let mut n = 0;
    wait_until(LONG, "hosts that answer one another", || {
        n += 1;
        let asked = [0, 2].map(|host| {
            let again = cluster.backup(host, &format!("again{n}-{host}"), &paths[1])?;
            Ok(again.finish(LONG)?.code(0)?.printed().contains("undetected 0"))
        });
        asked.into_iter().try_fold(true, |all, one: Result<bool>| Ok(all && one?))
    })?;
    let last = cluster.backup(1, "last", &paths[1])?.finish(LONG)?.code(0)?;
    ensure!(last.printed().contains("new 0 B"), "{}", last.printed());
    snapshots.push((snapshot("last", &last)?, &*paths[1]));
    cluster.must_be_whole(&snapshots)
}

#[test]
fn who_has_no_certificate_of_the_cluster_gets_nothing() -> Result {
    let cluster = Cluster::of_a_list(HOSTS)?;
    // A host of the right name, and of another CA.
    let (ca, identity) = (cluster.fixture.text("other"), cluster.fixture.text("stranger.pem"));
    cluster.fixture.fleecectl(&["cluster", "init", "--dir", &ca])?;
    let invite = ["cluster", "invite", "hv2", "--dir", &ca, "--out", &identity];
    cluster.fixture.fleecectl(&invite)?;
    let mut cluster = cluster;
    cluster.kill(2)?;
    let config = cluster.config(2).to_owned();
    let text = fs::read_to_string(&config)?;
    fs::write(&config, text.replace(&cluster.fixture.text("hv2.pem"), &identity))?;
    cluster.start(2)?;
    let paths = images(cluster.fixture.folder(), HOSTS as u64)?;
    let finished = cluster.backup(0, "vm0", &paths[0])?.finish(LONG)?.code(0)?;
    // Nobody talks to it, so its part is missed.
    ensure!(!finished.printed().contains("undetected 0"), "{}", finished.printed());
    Ok(())
}

#[test]
fn of_two_engines_of_a_name_the_one_at_its_address_stays() -> Result {
    let mut cluster = Cluster::of_a_list_on_hosts(HOSTS)?;
    let refused = cluster.start_another(1)?.finish(LONG)?.code(11)?;
    ensure!(refused.printed().contains("another engine, at "), "{}", refused.printed());
    // While the right one is away, the other one is not taken for it.
    cluster.kill(1)?;
    let mut other = cluster.start_another(1)?;
    wait_until(SOON, "the other engine to look for itself", || {
        ensure!(other.ended()?.is_none(), "it ended: {}", other.printed());
        Ok(other.printed().contains("not found at this host's own address"))
    })?;
    // Not even when it is asked to.
    let socket = cluster.fixture.text("another.sock");
    let hosts = ["--engine", &socket, "hosts", "--json"];
    let hosts = cluster.fixture.fleecectl(&hosts)?.json()?;
    let silent = hosts.iter().filter(|host| host["state"] == "silent").count();
    ensure!(hosts.len() == HOSTS && silent == HOSTS - 1, "{hosts:?}");
    for host in [0, 2] {
        let said = cluster.printed(host);
        ensure!(!said.contains("was started anew"), "hv{host} took it for hv1: {said}");
    }
    cluster.start(1)?;
    let ended = other.finish(LONG)?.code(11)?;
    ensure!(ended.printed().contains("another engine, at "), "{}", ended.printed());
    let paths = images(cluster.fixture.folder(), HOSTS as u64)?;
    let mut snapshots = Vec::new();
    for (host, path) in paths.iter().enumerate() {
        let vm = format!("vm{host}");
        let finished = cluster.backup(host, &vm, path)?.finish(LONG)?.code(0)?;
        ensure!(finished.printed().contains("undetected 0"), "{}", finished.printed());
        snapshots.push((snapshot(&vm, &finished)?, path.as_path()));
    }
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let expected = image::distinct_blocks(&all)?;
    wait_until(SOON, "what the owners learn", || {
        Ok(cluster.figure(0, "unique_blocks")? == expected)
    })?;
    cluster.must_be_whole(&snapshots)
}
