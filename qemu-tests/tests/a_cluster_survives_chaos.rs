//! Backups on all hosts of a cluster while a seed chooses what goes wrong: engines and plugins killed,
//! cables pulled, etcd gone. In the end everything that committed restores from every host, every
//! distinct block is known once, and every block that is stored twice is counted.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use qemu_tests::cluster::{Cluster, images, snapshot};
use qemu_tests::content::mix;
use qemu_tests::process::Running;
use qemu_tests::wait::LONG;
use qemu_tests::{Result, image};

const HOSTS: usize = 3;
/// Several on each host.
const VMS: usize = 5;
/// Things that go wrong.
const FAULTS: u64 = 6;
/// Between two of them, in milliseconds, at most.
const PAUSE: u64 = 4000;

/// What chance chooses.
struct Chance {
    seed: u64,
    drawn: u64,
}

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.drawn += 1;
        mix(self.seed ^ self.drawn.wrapping_mul(0x9e37_79b9_7f4a_7c15)) % limit
    }
}

/// One VM, and its backup if one runs.
struct Vm {
    name: String,
    path: PathBuf,
    running: Option<Running>,
    snapshots: Vec<String>,
}

struct Chaos {
    cluster: Cluster,
    vms: Vec<Vm>,
    /// Hosts whose engine or cable is to come back, and when.
    broken: Vec<(usize, Fault, Instant)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    Engine,
    Cable,
    Etcd,
    Plugin,
}

impl Chaos {
    /// Backs up whatever does not run, on hosts that are there.
    fn keep_busy(&mut self, chance: &mut Chance) -> Result {
        for n in 0..self.vms.len() {
            if let Some(running) = &mut self.vms[n].running {
                if running.ended()?.is_none() {
                    continue;
                }
                self.reap(n)?;
            }
            let up = self.cluster.running();
            let Some(host) = up.get(chance.below(up.len().max(1) as u64) as usize) else {
                continue;
            };
            let vm = &self.vms[n];
            let running = self.cluster.backup(*host, &vm.name, &vm.path)?;
            self.vms[n].running = Some(running);
        }
        Ok(())
    }

    /// Takes a backup's outcome; whatever it is, it is one that has a reason.
    fn reap(&mut self, n: usize) -> Result {
        let vm = &mut self.vms[n];
        let Some(running) = vm.running.take() else { return Ok(()) };
        let finished = running.finish(LONG)?;
        match finished.code {
            0 | 3 => vm.snapshots.push(snapshot(&vm.name, &finished)?),
            // Failed, still busy elsewhere, no engine, or killed.
            1 | 11 | 13 | -1 => {}
            other => anyhow::bail!("{} ended with {other}: {}", vm.name, finished.printed()),
        }
        Ok(())
    }

    fn break_something(&mut self, fault: Fault, chance: &mut Chance) -> Result {
        let host = chance.below(HOSTS as u64) as usize;
        let until = Instant::now() + Duration::from_millis(500 + chance.below(2 * PAUSE));
        println!("{fault:?} {host}");
        match fault {
            Fault::Engine if self.cluster.running().contains(&host) => {
                self.cluster.kill(host)?;
                self.broken.push((host, fault, until));
            }
            Fault::Cable => {
                self.cluster.network.as_ref().context("no network")?.plug(host, false)?;
                self.broken.push((host, fault, until));
            }
            Fault::Etcd if !self.broken.iter().any(|(_, other, _)| *other == Fault::Etcd) => {
                self.cluster.etcd.as_mut().context("no etcd")?.kill()?;
                self.broken.push((host, fault, until));
            }
            Fault::Plugin => {
                let n = chance.below(VMS as u64) as usize;
                if let Some(running) = self.vms[n].running.take() {
                    running.kill()?;
                }
            }
            Fault::Engine | Fault::Etcd => {}
        }
        Ok(())
    }

    /// Mends what has been broken for long enough.
    fn mend(&mut self, now: Instant) -> Result {
        let (over, still) =
            std::mem::take(&mut self.broken).into_iter().partition(|one| one.2 <= now);
        self.broken = still;
        let mut over: Vec<(usize, Fault, Instant)> = over;
        // Cables before the engines that need them.
        over.sort_by_key(|(_, fault, _)| *fault == Fault::Engine);
        for (host, fault, _) in over {
            match fault {
                // An engine on a host without its store cannot start: it comes back with the cable.
                Fault::Engine if self.broken.iter().any(|b| b.0 == host && b.1 == Fault::Cable) => {
                    let later = now + Duration::from_secs(1);
                    self.broken.push((host, fault, later));
                }
                Fault::Engine => self.cluster.start(host)?,
                Fault::Cable => {
                    self.cluster.network.as_ref().context("no network")?.plug(host, true)?;
                }
                Fault::Etcd => self.cluster.etcd.as_mut().context("no etcd")?.start_again()?,
                Fault::Plugin => {}
            }
        }
        Ok(())
    }
}

#[test]
fn whatever_goes_wrong_in_whatever_order() -> Result {
    let seed = match std::env::var("FLEECE_TEST_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs(),
    };
    println!("seed {seed} (FLEECE_TEST_SEED)");
    let mut chance = Chance { seed, drawn: 0 };
    let cluster = Cluster::of_etcd(HOSTS)?;
    let paths = images(cluster.fixture.folder(), VMS as u64)?;
    let vm = |(n, path): (usize, &PathBuf)| Vm {
        name: format!("vm{n}"),
        path: path.clone(),
        running: None,
        snapshots: Vec::new(),
    };
    let vms = paths.iter().enumerate().map(vm).collect();
    let mut chaos = Chaos { cluster, vms, broken: Vec::new() };
    for _ in 0..FAULTS {
        let next = Instant::now() + Duration::from_millis(200 + chance.below(PAUSE));
        while Instant::now() < next {
            chaos.keep_busy(&mut chance)?;
            chaos.mend(Instant::now())?;
            // Load of its own would only slow down what is to be hit.
            thread::sleep(Duration::from_millis(50));
        }
        let faults = [Fault::Engine, Fault::Cable, Fault::Etcd, Fault::Plugin];
        let fault = faults[chance.below(faults.len() as u64) as usize];
        chaos.break_something(fault, &mut chance)?;
    }
    chaos.mend(Instant::now() + Duration::from_secs(3600))?;
    ensure!(chaos.broken.is_empty(), "{:?}", chaos.broken);
    for n in 0..VMS {
        chaos.reap(n)?;
    }
    chaos.cluster.wait_members(HOSTS)?;
    must_be_right(chaos)
}

/// What must hold after whatever went wrong.
fn must_be_right(mut chaos: Chaos) -> Result {
    // Every VM has a snapshot in the end, from whatever host.
    for n in 0..VMS {
        let vm = &chaos.vms[n];
        let backup = chaos.cluster.backup(n % HOSTS, &vm.name, &vm.path)?;
        chaos.vms[n].running = Some(backup);
        chaos.reap(n)?;
        ensure!(!chaos.vms[n].snapshots.is_empty(), "{} has no snapshot", chaos.vms[n].name);
    }
    let snapshots: Vec<(String, &Path)> = chaos
        .vms
        .iter()
        .flat_map(|vm| vm.snapshots.iter().map(|snapshot| (snapshot.clone(), &*vm.path)))
        .collect();
    println!("{} snapshots", snapshots.len());
    // The newest ones of each VM from every host; all of them from one.
    let newest: Vec<_> =
        chaos.vms.iter().filter_map(|vm| Some((vm.snapshots.last()?.clone(), &*vm.path))).collect();
    chaos.cluster.must_be_whole(&newest)?;
    for (snapshot, path) in &snapshots {
        let to = chaos.cluster.fixture.text("restored.raw");
        let arguments = ["restore", snapshot, "--to", &to, "-O", "raw", "--force"];
        chaos.cluster.begin(0, "fleece", &arguments)?.finish(LONG)?.code(0)?;
        image::same(path, Path::new(&to))?;
    }
    // From the store alone, so that what is double is found wherever it is.
    for host in 0..HOSTS {
        chaos.cluster.ask(host, &["rebuild-index"])?;
    }
    let paths: Vec<&Path> = chaos.vms.iter().map(|vm| &*vm.path).collect();
    let distinct = image::distinct_blocks(&paths)?;
    let (unique, doubles) =
        (chaos.cluster.figure(0, "unique_blocks")?, chaos.cluster.figure(0, "double_blocks")?);
    let lines = chaos.cluster.ask(0, &["verify"])?;
    let summary = lines.iter().rev().find_map(|line| line["blocks"].as_u64());
    let stored = summary.context("verify counted no blocks")?;
    println!("{distinct} distinct, {unique} unique, {stored} stored, {doubles} double");
    ensure!(unique == distinct, "{unique} blocks are known, {distinct} are distinct");
    ensure!(stored - unique == doubles, "{stored} stored, {unique} unique, {doubles} double");
    Ok(())
}
