//! Three engines on one store, each of which answers for a part of the fingerprints: what any VM of
//! any host has is stored once, and every host restores every snapshot.

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qemu_tests::fixture::snapshot_id;
use qemu_tests::process::{Finished, Running};
use qemu_tests::wait::{LONG, SOON, wait_until};
use qemu_tests::{Fixture, MIB, Result, image, tools};

/// Three hosts are the fewest of which one can be away while two talk.
const HOSTS: usize = 3;

/// One host's engine.
struct Host {
    name: String,
    config: PathBuf,
    socket: PathBuf,
    engine: Option<Running>,
}

/// A cluster on this machine, each host with a port of its own.
struct Cluster {
    fixture: Fixture,
    hosts: Vec<Host>,
}

impl Cluster {
    fn new() -> Result<Self> {
        let fixture = Fixture::without_engine()?;
        let ca = fixture.text("ca");
        fixture.fleecectl(&["cluster", "init", "--dir", &ca])?;
        // Held until all are known, so that no port comes twice.
        let ports: Vec<TcpListener> =
            (0..HOSTS).map(|_| Ok(TcpListener::bind("127.0.0.1:0")?)).collect::<Result<_>>()?;
        let mut list = String::new();
        for (n, port) in ports.iter().enumerate() {
            let address = port.local_addr()?;
            list += &format!("{{ name = \"hv{n}\", address = \"{address}\" }}, ");
        }
        let base = fs::read_to_string(fixture.path("engine.toml"))?;
        let mut hosts = Vec::new();
        for n in 0..HOSTS {
            let name = format!("hv{n}");
            let identity = fixture.text(&format!("{name}.pem"));
            fixture.fleecectl(&["cluster", "invite", &name, "--dir", &ca, "--out", &identity])?;
            let config = fixture.path(&format!("{name}.toml"));
            let cluster = format!(
                "\n[cluster]\nname = \"{name}\"\nidentity = \"{identity}\"\nstatic = [{list}]\n"
            );
            fs::write(&config, base.clone() + &cluster)?;
            let socket = fixture.path(&format!("{name}.sock"));
            hosts.push(Host { name, config, socket, engine: None });
        }
        drop(ports);
        let mut cluster = Cluster { fixture, hosts };
        (0..HOSTS).try_for_each(|host| cluster.start(host))?;
        Ok(cluster)
    }

    fn start(&mut self, host: usize) -> Result {
        let host = &mut self.hosts[host];
        let mut command = tools::fleece("fleece-engine")?;
        command.arg("--config").arg(&host.config).arg("--socket").arg(&host.socket);
        command.arg("--state-dir").arg(self.fixture.path(&format!("state-{}", host.name)));
        let mut engine = Running::start(&host.name, &mut command)?;
        wait_until(SOON, "the engine's socket", || {
            Ok(engine.ended()?.is_some() || UnixStream::connect(&host.socket).is_ok())
        })?;
        ensure!(engine.ended()?.is_none(), "{}", engine.finish(SOON)?.printed());
        host.engine = Some(engine);
        Ok(())
    }

    fn kill(&mut self, host: usize) -> Result {
        self.hosts[host].engine.take().context("no engine runs")?.kill()
    }

    fn begin(&self, host: usize, program: &str, arguments: &[&str]) -> Result<Running> {
        let mut command = tools::fleece(program)?;
        command.env("FLEECE_ENGINE", &self.hosts[host].socket).args(arguments);
        let name = format!("{program} {} on hv{host}", arguments.join(" "));
        Running::start(&name, &mut command)
    }

    fn backup(&self, host: usize, vm: &str, path: &Path) -> Result<Running> {
        let disk = format!("--image=vda={}", path.display());
        self.begin(host, "fleece", &["backup", vm, &disk])
    }

    /// Distinct fingerprints that all hosts know together.
    fn unique_blocks(&self) -> Result<u64> {
        let mut sum = 0;
        for host in 0..HOSTS {
            let lines = self.begin(host, "fleecectl", &["status", "--json"])?.finish(LONG)?;
            let lines = lines.code(0)?.json()?;
            let status = lines.first().context("status printed nothing")?;
            sum += status["unique_blocks"].as_u64().context("no unique_blocks")?;
        }
        Ok(sum)
    }

    /// Every host restores a snapshot, bit for bit, and finds nothing wrong.
    fn must_be_whole(&self, snapshots: &[(String, &Path)]) -> Result {
        for host in 0..HOSTS {
            for (snapshot, path) in snapshots {
                let to = self.fixture.text("restored.raw");
                let arguments = ["restore", snapshot, "--to", &to, "-O", "raw", "--force"];
                self.begin(host, "fleece", &arguments)?.finish(LONG)?.code(0)?;
                image::same(path, Path::new(&to))?;
            }
            self.begin(host, "fleecectl", &["verify"])?.finish(LONG)?.code(0)?;
        }
        Ok(())
    }
}

fn snapshot(vm: &str, finished: &Finished) -> Result<String> {
    Ok(format!("{vm}@{}", snapshot_id(&finished.printed())?))
}

/// An image per host: blocks that all have, that two have, and its own.
fn images(folder: &Path) -> Result<Vec<PathBuf>> {
    (0..HOSTS as u64)
        .map(|n| {
            let path = folder.join(format!("image{n}.raw"));
            let ranges = [
                (n * 4 * MIB, 20 * MIB, 1),
                (40 * MIB, 12 * MIB, 10 + n),
                (56 * MIB, 12 * MIB, 10 + (n + 1) % HOSTS as u64),
                (72 * MIB, 8 * MIB, 20 + n),
            ];
            image::raw(&path, 96 * MIB, &ranges)?;
            Ok(path)
        })
        .collect()
}

#[test]
fn what_all_hosts_have_at_once_is_stored_once_and_restored_everywhere() -> Result {
    let cluster = Cluster::new()?;
    let paths = images(cluster.fixture.folder())?;
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
    wait_until(SOON, "what the owners learn", || Ok(cluster.unique_blocks()? == expected))?;
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
    let mut cluster = Cluster::new()?;
    let paths = images(cluster.fixture.folder())?;
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
fn who_has_no_certificate_of_the_cluster_gets_nothing() -> Result {
    let cluster = Cluster::new()?;
    // A host of the right name, and of another CA.
    let (ca, identity) = (cluster.fixture.text("other"), cluster.fixture.text("stranger.pem"));
    cluster.fixture.fleecectl(&["cluster", "init", "--dir", &ca])?;
    let invite = ["cluster", "invite", "hv2", "--dir", &ca, "--out", &identity];
    cluster.fixture.fleecectl(&invite)?;
    let mut cluster = cluster;
    cluster.kill(2)?;
    let config = cluster.hosts[2].config.clone();
    let text = fs::read_to_string(&config)?;
    fs::write(&config, text.replace(&cluster.fixture.text("hv2.pem"), &identity))?;
    cluster.start(2)?;
    let paths = images(cluster.fixture.folder())?;
    let finished = cluster.backup(0, "vm0", &paths[0])?.finish(LONG)?.code(0)?;
    // Nobody talks to it, so its part is missed.
    ensure!(!finished.printed().contains("undetected 0"), "{}", finished.printed());
    Ok(())
}
