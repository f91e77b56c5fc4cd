//! A cluster that is upgraded host by host while its backups go on: engines of this version and of the one
//! before it work together, and new formats wait until all hosts know them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qemu_tests::cluster::{Cluster, snapshot};
use qemu_tests::process::{Finished, Running};
use qemu_tests::wait::{LONG, wait_until};
use qemu_tests::{MIB, NEWEST_LEVEL, Result, image, tools};

/// The fewest of which some time two of the one version talk to one another, some time two of the other.
const HOSTS: usize = 3;

/// An image per host, with blocks that all rounds have, that all hosts of a round have, and its own.
fn images(folder: &Path, round: u64) -> Result<Vec<PathBuf>> {
    (0..HOSTS as u64)
        .map(|host| {
            let path = folder.join(format!("round{round}-{host}.raw"));
            let ranges = [
                (host * 2 * MIB, 8 * MIB, 1),
                (20 * MIB, 6 * MIB, 100 + round),
                (32 * MIB, 4 * MIB, 200 + round * 10 + host),
            ];
            image::raw(&path, 40 * MIB, &ranges)?;
            Ok(path)
        })
        .collect()
}

/// What was backed up so far.
#[derive(Default)]
struct Stored {
    snapshots: Vec<(String, PathBuf)>,
}

impl Stored {
    fn add(&mut self, vm: &str, finished: &Finished, path: PathBuf) -> Result {
        ensure!(finished.printed().contains("undetected 0"), "{}", finished.printed());
        self.snapshots.push((snapshot(vm, finished)?, path));
        Ok(())
    }

    /// All hosts back up at once; whatever their versions, a block is stored once.
    fn round(&mut self, cluster: &Cluster, round: u64) -> Result {
        let paths = images(cluster.fixture.folder(), round)?;
        let start = |host: usize| cluster.backup(host, &format!("vm{round}-{host}"), &paths[host]);
        let running: Vec<Running> = (0..HOSTS).map(start).collect::<Result<_>>()?;
        for (host, (one, path)) in running.into_iter().zip(paths).enumerate() {
            self.add(&format!("vm{round}-{host}"), &one.finish(LONG)?.code(0)?, path)?;
        }
        let all: Vec<&Path> = self.snapshots.iter().map(|(_, path)| path.as_path()).collect();
        let expected = image::distinct_blocks(&all)?;
        wait_until(LONG, "what the owners learn", || {
            Ok(cluster.figure(0, "unique_blocks")? == expected)
        })?;
        ensure!(cluster.figure(0, "double_blocks")? == 0, "something was stored twice");
        Ok(())
    }

    /// Everything comes back, through whatever engines there are.
    fn must_come_back(&self, cluster: &Cluster) -> Result {
        let all: Vec<(String, &Path)> =
            self.snapshots.iter().map(|(id, path)| (id.clone(), path.as_path())).collect();
        cluster.must_restore(&all)
    }
}

/// The store is not raised while a host does not know what comes then, and that one is named.
fn is_refused_until_all_know(cluster: &Cluster, upgraded: usize) -> Result {
    let refused = cluster.begin(0, "fleecectl", &["upgrade", "--finalize"])?.finish(LONG)?;
    let said = refused.code(1)?.printed();
    for host in 0..HOSTS {
        let named = said.contains(&format!("hv{host}"));
        ensure!(named == (host >= upgraded), "{upgraded} hosts are upgraded: {said}");
    }
    ensure!(!cluster.fixture.store().join("agreed").exists(), "raised all the same");
    Ok(())
}

#[test]
fn a_cluster_is_upgraded_host_by_host_and_backups_go_on() -> Result {
    let previous = tools::previous_engine()?;
    let mut cluster = Cluster::with_etcd(false)?;
    // As the version before left it.
    fs::remove_dir_all(cluster.fixture.store().join("agreed"))?;
    for _ in 0..HOSTS {
        cluster.join_with(Some(previous.clone()))?;
    }
    cluster.wait_members(HOSTS)?;
    let mut stored = Stored::default();
    stored.round(&cluster, 0)?;
    // That version sends what it restores, where this one writes into the file it gets.
    stored.must_come_back(&cluster)?;
    for host in 0..HOSTS {
        // A backup that runs meanwhile goes on in the new engine.
        let vm = format!("upgraded{host}");
        let path = images(cluster.fixture.folder(), 50 + host as u64)?.swap_remove(host);
        let disk = format!("--image=vda={}", path.display());
        let slow = ["backup", &vm, &disk, "--read-limit", "4M"];
        let running = cluster.begin(host, "fleece", &slow)?;
        wait_until(LONG, "the backup to be listed", || {
            Ok(cluster.ask(host, &["sessions"])?.iter().any(|one| one["vm"] == vm.as_str()))
        })?;
        cluster.kill(host)?;
        cluster.upgrade(host);
        cluster.start(host)?;
        cluster.wait_members(HOSTS)?;
        let finished = running.finish(LONG)?.code(0)?;
        ensure!(finished.printed().contains("engine answers again"), "{}", finished.printed());
        stored.add(&vm, &finished, path)?;
        stored.round(&cluster, 1 + host as u64)?;
        if host + 1 < HOSTS {
            is_refused_until_all_know(&cluster, host + 1)?;
        }
    }
    cluster.begin(0, "fleecectl", &["upgrade", "--finalize"])?.finish(LONG)?.code(0)?;
    let raised = cluster.ask(0, &["hosts"])?;
    ensure!(raised.iter().all(|host| host["level"] == NEWEST_LEVEL), "not all follow: {raised:?}");
    stored.round(&cluster, 9)?;
    let newest = stored.snapshots.last().context("nothing was stored")?.clone();
    stored.must_come_back(&cluster)?;
    cluster.must_be_whole(&[(newest.0, &newest.1)])
}
