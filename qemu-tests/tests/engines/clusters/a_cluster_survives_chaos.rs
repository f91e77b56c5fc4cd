//! Backups on all hosts of a cluster, one of them of a guest that goes on writing, while a seed chooses
//! what goes wrong: engines and plugins killed, cables pulled, links cut one way, etcd gone, disks full. In
//! the end the guest lives, everything that committed restores from every host, every distinct block is
//! known once, and every block that is stored twice is counted.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use qemu_tests::cluster::{Cluster, images, snapshot};
use qemu_tests::content::mix;
use qemu_tests::live::{Live, ended_with_reason};
use qemu_tests::mount::Tmpfs;
use qemu_tests::process::Running;
use qemu_tests::wait::{LONG, wait_until};
use qemu_tests::{MIB, Result, image};

const HOSTS: usize = 3;
/// VMs that are shut off, several on each host.
const VMS: usize = 5;
/// The host that the guest runs on: the first, which is met most.
const HOME: usize = 0;
/// Things that go wrong: each of them at least once.
const FAULTS: usize = 8;
/// Between two of them, in milliseconds, at most.
const PAUSE: u64 = 6000;
/// Slow enough for a backup of an image to be met by something.
const READ_LIMIT: &str = "--read-limit=16M";

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

    /// One of so many, the first of them twice as often as any other.
    fn one_of(&mut self, count: usize) -> usize {
        self.below(count as u64 + 1) as usize % count
    }
}

/// One VM that is shut off, and its backup if one runs.
struct Vm {
    name: String,
    path: PathBuf,
    running: Option<Running>,
    snapshots: Vec<String>,
}

struct Chaos {
    cluster: Cluster,
    vms: Vec<Vm>,
    live: Live,
    /// Each host's disk, for its engine's state.
    disks: Vec<Tmpfs>,
    /// What is to be mended on which host, and when.
    broken: Vec<(usize, Fault, Instant)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    Engine,
    Cable,
    /// To the next host; what that one begins goes on.
    OneWay,
    Disk,
    Etcd,
    Plugin,
}

impl Fault {
    const ALL: [Fault; 6] =
        [Fault::Engine, Fault::Cable, Fault::OneWay, Fault::Disk, Fault::Etcd, Fault::Plugin];
}

impl Chaos {
    fn new() -> Result<Self> {
        let mut cluster = Cluster::with_etcd(true)?;
        let mut disks = Vec::new();
        for host in 0..HOSTS {
            let disk = Tmpfs::new(48 * MIB)?;
            symlink(disk.path(), cluster.state(host))?;
            disks.push(disk);
            cluster.join()?;
        }
        cluster.wait_members(HOSTS)?;
        let folder = cluster.fixture.folder();
        let paths = images(folder, VMS as u64)?;
        let vm =
            |(n, path)| Vm { name: format!("vm{n}"), path, running: None, snapshots: Vec::new() };
        let vms = paths.into_iter().enumerate().map(vm).collect();
        let live = Live::start(folder, "live")?;
        Ok(Chaos { cluster, vms, live, disks, broken: Vec::new() })
    }

    /// Backs up whatever is not being backed up, on hosts that are there.
    fn keep_busy(&mut self, chance: &mut Chance) -> Result {
        let up = self.cluster.running();
        if self.live.idle()? && up.contains(&HOME) {
            self.live.begin(&self.cluster, HOME)?;
        }
        for n in 0..VMS {
            if let Some(running) = &mut self.vms[n].running {
                if running.ended()?.is_none() {
                    continue;
                }
                self.reap(n)?;
            }
            let Some(host) = up.get(chance.below(up.len().max(1) as u64) as usize) else {
                continue;
            };
            self.back_up(n, *host)?;
        }
        Ok(())
    }

    fn back_up(&mut self, n: usize, host: usize) -> Result {
        let vm = &mut self.vms[n];
        let image = format!("--image=vda={}", vm.path.display());
        let arguments = ["backup", &vm.name, &image, READ_LIMIT];
        vm.running = Some(self.cluster.begin(host, "fleece", &arguments)?);
        Ok(())
    }

    /// Takes a backup's outcome; whatever it is, it is one that has a reason.
    fn reap(&mut self, n: usize) -> Result {
        let vm = &mut self.vms[n];
        let Some(running) = vm.running.take() else { return Ok(()) };
        let finished = running.finish(LONG)?;
        println!("{}: {} {}", vm.name, finished.code, finished.err);
        if ended_with_reason(&finished)? {
            vm.snapshots.push(snapshot(&vm.name, &finished)?);
        }
        Ok(())
    }

    fn is_broken(&self, host: usize, fault: Fault) -> bool {
        self.broken.iter().any(|broken| broken.0 == host && broken.1 == fault)
    }

    fn break_something(&mut self, fault: Fault, chance: &mut Chance) -> Result {
        let which = match fault {
            Fault::Etcd => 0,
            Fault::Plugin => chance.one_of(VMS + 1),
            _ => chance.one_of(HOSTS),
        };
        let until = Instant::now() + Duration::from_millis(500 + chance.below(2 * PAUSE));
        println!("{fault:?} {which}");
        if self.is_broken(which, fault) {
            return Ok(());
        }
        match fault {
            Fault::Engine => self.cluster.kill(which)?,
            Fault::Cable => self.plug(which, false)?,
            Fault::OneWay => self.cluster.cut(which, (which + 1) % HOSTS, true)?,
            Fault::Disk => self.disks[which].fill()?,
            Fault::Etcd => self.cluster.etcd.as_mut().context("no etcd")?.kill()?,
            Fault::Plugin => return self.kill_plugin(which),
        }
        self.broken.push((which, fault, until));
        Ok(())
    }

    /// The guest's is the first one.
    fn kill_plugin(&mut self, n: usize) -> Result {
        match n.checked_sub(1) {
            None => self.live.kill(),
            Some(n) => {
                let Some(mut running) = self.vms[n].running.take() else { return Ok(()) };
                if running.ended()?.is_none() {
                    return running.kill();
                }
                // One that has ended meanwhile has an outcome.
                self.vms[n].running = Some(running);
                self.reap(n)
            }
        }
    }

    fn plug(&self, host: usize, plugged: bool) -> Result {
        self.cluster.network.as_ref().context("no network")?.plug(host, plugged)
    }

    /// Mends what has been broken for long enough.
    fn mend(&mut self, now: Instant) -> Result {
        let (mut over, still): (Vec<_>, _) =
            std::mem::take(&mut self.broken).into_iter().partition(|one| one.2 <= now);
        self.broken = still;
        // What an engine needs before the engine.
        over.sort_by_key(|(_, fault, _)| *fault == Fault::Engine);
        for (host, fault, _) in over {
            match fault {
                // Without its store or room an engine cannot start: it comes back with them.
                Fault::Engine
                    if self.is_broken(host, Fault::Cable) || self.is_broken(host, Fault::Disk) =>
                {
                    self.broken.push((host, fault, now + Duration::from_secs(1)));
                }
                Fault::Engine => self.cluster.start(host)?,
                Fault::Cable => self.plug(host, true)?,
                Fault::OneWay => self.cluster.cut(host, (host + 1) % HOSTS, false)?,
                Fault::Disk => self.disks[host].free()?,
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
    let mut chaos = Chaos::new()?;
    let mut ahead = Vec::new();
    for _ in 0..FAULTS {
        let next = Instant::now() + Duration::from_millis(200 + chance.below(PAUSE));
        while Instant::now() < next {
            chaos.keep_busy(&mut chance)?;
            chaos.mend(Instant::now())?;
            // Load of its own would only slow down what is to be hit.
            thread::sleep(Duration::from_millis(50));
        }
        if ahead.is_empty() {
            ahead.extend(Fault::ALL);
        }
        let fault = ahead.swap_remove(chance.below(ahead.len() as u64) as usize);
        chaos.break_something(fault, &mut chance)?;
    }
    chaos.mend(Instant::now() + Duration::from_secs(3600))?;
    ensure!(chaos.broken.is_empty(), "{:?}", chaos.broken);
    wait_until(LONG, "the guest's backup ending", || chaos.live.idle())?;
    for n in 0..VMS {
        chaos.reap(n)?;
    }
    chaos.cluster.wait_members(HOSTS)?;
    for host in 0..HOSTS {
        let said = chaos.cluster.printed(host);
        ensure!(!said.contains("panicked"), "the engine of host {host}:\n{said}");
    }
    must_be_right(chaos)
}

/// What must hold after whatever went wrong.
fn must_be_right(mut chaos: Chaos) -> Result {
    // Every VM has a snapshot in the end, from whatever host.
    for n in 0..VMS {
        chaos.back_up(n, n % HOSTS)?;
    }
    for n in 0..VMS {
        chaos.reap(n)?;
        ensure!(!chaos.vms[n].snapshots.is_empty(), "{} has no snapshot", chaos.vms[n].name);
    }
    chaos.live.must_live(&chaos.cluster, HOME)?;
    let (of_guest, lost) = chaos.live.outcome(&chaos.cluster, HOME)?;
    println!("the guest: {} snapshots, {} points in time lost", of_guest.len(), lost.len());
    // What backups that failed have stored of the guest is counted with snapshots of all they saw.
    for (n, truth) in lost.iter().enumerate() {
        chaos.cluster.backup(n % HOSTS, &format!("lost{n}"), truth)?.finish(LONG)?.code(0)?;
    }

    // The newest ones of each VM from every host; all of them from one.
    let of_vm = |vm: &Vm| vm.snapshots.iter().map(|id| (id.clone(), vm.path.clone())).collect();
    let mut chains: Vec<Vec<(String, PathBuf)>> = chaos.vms.iter().map(of_vm).collect();
    chains.push(of_guest);
    let newest: Vec<(String, &Path)> =
        chains.iter().filter_map(|chain| chain.last()).map(by_path).collect();
    chaos.cluster.must_be_whole(&newest)?;
    let all: Vec<(String, &Path)> = chains.iter().flatten().map(by_path).collect();
    println!("{} snapshots", all.len());
    chaos.cluster.must_restore(&all)?;
    let lost = lost.iter().map(PathBuf::as_path);
    let mut truths: Vec<&Path> = all.iter().map(|(_, truth)| *truth).chain(lost).collect();
    // Images that are shut off do not change.
    truths.dedup();
    blocks_must_be_right(&chaos.cluster, &truths)
}

fn by_path((id, truth): &(String, PathBuf)) -> (String, &Path) {
    (id.clone(), truth)
}

/// Every distinct block is known once, and what is stored more than once is counted.
fn blocks_must_be_right(cluster: &Cluster, truths: &[&Path]) -> Result {
    // From the store alone, so that what is double is found wherever it is.
    for host in 0..HOSTS {
        cluster.ask(host, &["rebuild-index"])?;
    }
    let distinct = image::distinct_blocks(truths)?;
    let (unique, doubles) =
        (cluster.figure(0, "unique_blocks")?, cluster.figure(0, "double_blocks")?);
    let lines = cluster.ask(0, &["verify"])?;
    let summary = lines.iter().rev().find_map(|line| line["blocks"].as_u64());
    let stored = summary.context("verify counted no blocks")?;
    println!("{distinct} distinct, {unique} unique, {stored} stored, {doubles} double");
    ensure!(unique == distinct, "{unique} blocks are known, {distinct} are distinct");
    ensure!(stored - unique == doubles, "{stored} stored, {unique} unique, {doubles} double");
    Ok(())
}
