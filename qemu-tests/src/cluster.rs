//! Several engines on one store: on this machine's loopback by a fixed list, or each on a host of
//! its own with etcd and S3.

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::etcd::{Etcd, Proofs};
use crate::fixture::{Fixture, Places, snapshot_id};
use crate::network::Network;
use crate::process::{Finished, Running};
use crate::s3::{BUCKET, S3};
use crate::wait::{LONG, SOON, wait_until};
use crate::{MIB, Result, image, tools};

/// The port of every host that has an address of its own.
const PORT: u16 = 7420;

/// One host's engine.
struct Host {
    name: String,
    config: PathBuf,
    socket: PathBuf,
    /// The engine, where another version of it is to run.
    program: Option<PathBuf>,
    engine: Option<Running>,
}

/// A cluster.
pub struct Cluster {
    /// Its folder, its store, its CA.
    pub fixture: Fixture,
    /// Where hosts have addresses of their own.
    pub network: Option<Network>,
    /// Who is in it, if no list says that.
    pub etcd: Option<Etcd>,
    /// The store, if it is no directory.
    pub s3: Option<S3>,
    hosts: Vec<Host>,
    home: tempfile::TempDir,
}

impl Cluster {
    /// Hosts by a fixed list, each with a port of its own at the loopback.
    ///
    /// # Errors
    /// When one does not come up.
    pub fn of_a_list(count: usize) -> Result<Self> {
        // Held until all are known, so that no port comes twice.
        let ports: Vec<TcpListener> =
            (0..count).map(|_| Ok(TcpListener::bind("127.0.0.1:0")?)).collect::<Result<_>>()?;
        let addresses =
            ports.iter().map(|port| Ok(port.local_addr()?.to_string())).collect::<Result<Vec<_>>>();
        drop(ports);
        Self::listed(None, &addresses?)
    }

    /// The same, each in a namespace: what goes over their cables is what they say to one another.
    ///
    /// # Errors
    /// When one does not come up.
    pub fn of_a_list_on_hosts(count: usize) -> Result<Self> {
        let mut network = Network::new()?;
        (0..count).try_for_each(|_| network.add_host())?;
        let addresses: Vec<String> =
            (0..count).map(|host| format!("{}:{PORT}", network.address(host))).collect();
        Self::listed(Some(network), &addresses)
    }

    fn listed(network: Option<Network>, addresses: &[String]) -> Result<Self> {
        let (home, fixture) = (tempfile::tempdir()?, Fixture::without_engine()?);
        let (etcd, s3, hosts) = (None, None, Vec::new());
        let mut cluster = Cluster { fixture, network, etcd, s3, hosts, home };
        cluster.make_ca()?;
        let host = |(n, address)| format!("{{ name = \"hv{n}\", address = \"{address}\" }}");
        let list: Vec<String> = addresses.iter().enumerate().map(host).collect();
        let list = format!("static = [{}]", list.join(", "));
        addresses.iter().try_for_each(|_| cluster.describe(&list))?;
        (0..addresses.len()).try_for_each(|host| cluster.start(host))?;
        Ok(cluster)
    }

    /// Hosts in namespaces, with etcd and a store in S3.
    ///
    /// # Errors
    /// When one does not come up.
    pub fn of_etcd(count: usize) -> Result<Self> {
        let mut cluster = Self::with_etcd(true)?;
        (0..count).try_for_each(|_| cluster.join().map(drop))?;
        cluster.wait_members(count)?;
        Ok(cluster)
    }

    /// No host yet, with etcd and a store, in S3 or in a directory.
    ///
    /// # Errors
    /// When that does not come up.
    pub fn with_etcd(in_s3: bool) -> Result<Self> {
        let mut cluster = Self::without_etcd(in_s3)?;
        cluster.start_etcd(None)?;
        Ok(cluster)
    }

    /// The same with a directory and an etcd that speaks TLS, its certificate and its clients' of the
    /// cluster's CA.
    ///
    /// # Errors
    /// When that does not come up.
    pub fn with_secure_etcd() -> Result<Self> {
        let mut cluster = Self::without_etcd(false)?;
        let ip = cluster.network.as_ref().context("no network")?.ours();
        let identity = cluster.fixture.path("etcd.pem");
        let (ca, out) = (cluster.fixture.text("ca"), identity.display().to_string());
        cluster.fixture.fleecectl(&["cluster", "invite", &ip, "--dir", &ca, "--out", &out])?;
        let clients = Path::new(&ca).join("ca.pem");
        cluster.start_etcd(Some(Proofs { identity, clients, revoked: None }))?;
        Ok(cluster)
    }

    fn start_etcd(&mut self, proofs: Option<Proofs>) -> Result {
        let ip = self.network.as_ref().context("no network")?.ours();
        self.etcd = Some(Etcd::start(&self.home.path().join("etcd"), &ip, proofs)?);
        Ok(())
    }

    fn without_etcd(in_s3: bool) -> Result<Self> {
        let home = tempfile::Builder::new().prefix("fleece-cluster").tempdir()?;
        let network = Network::new()?;
        let (mut places, mut s3) = (Places::default(), None);
        if in_s3 {
            let server = S3::start_at(&home.path().join("s3"), &network.ours())?;
            let credentials = home.path().join("credentials.toml");
            S3::write_credentials(&credentials)?;
            places.store = Some(PathBuf::from(format!("s3://{BUCKET}/cluster")));
            places.init = vec![
                "--s3-endpoint".to_owned(),
                format!("http://{}", server.address()),
                "--s3-region=us-east-1".to_owned(),
                format!("--s3-credentials={}", credentials.display()),
            ];
            s3 = Some(server);
        }
        let (fixture, network, etcd) = (Fixture::at(places)?, Some(network), None);
        let cluster = Cluster { fixture, network, etcd, s3, hosts: Vec::new(), home };
        cluster.make_ca()?;
        Ok(cluster)
    }

    fn make_ca(&self) -> Result {
        let ca = self.fixture.text("ca");
        self.fixture.fleecectl(&["cluster", "init", "--dir", &ca]).map(drop)
    }

    /// Adds a host to a cluster of etcd, and starts its engine. Gives its number.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn join(&mut self) -> Result<usize> {
        self.join_with(None)
    }

    /// The same with another version of the engine.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn join_with(&mut self, program: Option<PathBuf>) -> Result<usize> {
        let host = self.hosts.len();
        let network = self.network.as_mut().context("hosts of a list cannot join")?;
        network.add_host()?;
        let address = format!("{}:{PORT}", network.address(host));
        let etcd = self.etcd.as_ref().context("there is no etcd")?.endpoint();
        let more = format!("etcd = [\"{etcd}\"]\naddress = \"{address}\"");
        self.describe(&more)?;
        self.hosts[host].program = program;
        self.start(host)?;
        Ok(host)
    }

    /// A host's engine is of this version from its next start on.
    pub fn upgrade(&mut self, host: usize) {
        self.hosts[host].program = None;
    }

    /// Adds a host by a bundle of the first one: all that the new one is given.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn join_by_bundle(&mut self) -> Result<usize> {
        let (host, fixture) = (self.hosts.len(), &self.fixture);
        let network = self.network.as_mut().context("hosts of a list cannot join")?;
        network.add_host()?;
        let name = format!("hv{host}");
        let (passphrase, bundle) = (fixture.text("passphrase"), fixture.text("bundle"));
        fs::write(&passphrase, "correct horse\n")?;
        let ca = fixture.text("ca");
        let from = self.hosts[0].config.display().to_string();
        let invite =
            ["--config", &from, "cluster", "invite", &name, "--dir", &ca, "--out", &bundle];
        fixture.fleecectl(&[&invite[..], &["--passphrase-file", &passphrase]].concat())?;
        let config = fixture.path(&format!("{name}/engine.toml"));
        let (to, address) =
            (config.display().to_string(), format!("{}:{PORT}", network.address(host)));
        let join = ["--config", &to, "cluster", "join", &bundle, "--passphrase-file", &passphrase];
        fixture.fleecectl(&[&join[..], &["--address", &address]].concat())?;
        // Nothing is replaced.
        fixture.try_fleecectl(&[&join[..], &["--address", &address]].concat())?.code(2)?;
        let socket = fixture.path(&format!("{name}.sock"));
        self.hosts.push(Host { name, config, socket, program: None, engine: None });
        self.start(host)?;
        Ok(host)
    }

    /// Writes the configuration of the next host.
    fn describe(&mut self, cluster: &str) -> Result {
        let (fixture, name) = (&self.fixture, format!("hv{}", self.hosts.len()));
        let (ca, identity) = (fixture.text("ca"), fixture.text(&format!("{name}.pem")));
        fixture.fleecectl(&["cluster", "invite", &name, "--dir", &ca, "--out", &identity])?;
        let config = fixture.path(&format!("{name}.toml"));
        let base = fs::read_to_string(fixture.path("engine.toml"))?;
        let own = format!("[cluster]\nname = \"{name}\"\nidentity = \"{identity}\"");
        fs::write(&config, format!("{base}\n{own}\n{cluster}\n"))?;
        let socket = fixture.path(&format!("{name}.sock"));
        self.hosts.push(Host { name, config, socket, program: None, engine: None });
        Ok(())
    }

    /// A host's configuration.
    #[must_use]
    pub fn config(&self, host: usize) -> &Path {
        &self.hosts[host].config
    }

    /// A host's state directory; it need not be there yet, nor the host.
    #[must_use]
    pub fn state(&self, host: usize) -> PathBuf {
        self.fixture.path(&format!("state-hv{host}"))
    }

    /// Starts a host's engine and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(&mut self, host: usize) -> Result {
        let here = &self.hosts[host];
        let mut command = match &here.program {
            None => tools::fleece("fleece-engine")?,
            Some(program) => Command::new(program),
        };
        command.arg("--config").arg(&here.config).arg("--socket").arg(&here.socket);
        command.arg("--state-dir").arg(self.state(host));
        let mut command = match &self.network {
            Some(network) => network.on(host, &command),
            None => command,
        };
        let mut engine = Running::start(&here.name, &mut command)?;
        let socket = here.socket.clone();
        wait_until(SOON, "the engine's socket", || {
            Ok(engine.ended()?.is_some() || UnixStream::connect(&socket).is_ok())
        })?;
        ensure!(engine.ended()?.is_none(), "{}", engine.finish(SOON)?.printed());
        self.hosts[host].engine = Some(engine);
        Ok(())
    }

    /// Starts another engine by a host's configuration, on host 0, at another port and with a state of its own.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn start_another(&self, host: usize) -> Result<Running> {
        let config = self.fixture.path("another.toml");
        let own = fs::read_to_string(&self.hosts[host].config)?;
        fs::write(&config, format!("{own}listen = \"0.0.0.0:{}\"\n", PORT + 1))?;
        let mut command = tools::fleece("fleece-engine")?;
        command.arg("--config").arg(&config);
        command.arg("--socket").arg(self.fixture.path("another.sock"));
        command.arg("--state-dir").arg(self.fixture.path("another-state"));
        let network = self.network.as_ref().context("no network")?;
        Running::start("another engine", &mut network.on(0, &command))
    }

    /// SIGKILLs a host's engine.
    ///
    /// # Errors
    /// When none runs.
    pub fn kill(&mut self, host: usize) -> Result {
        let mut engine = self.hosts[host].engine.take().context("no engine runs")?;
        // One that is gone by itself, or lost a thread, must not pass for one that was killed.
        let said = engine.printed();
        ensure!(engine.ended()?.is_none(), "the engine of host {host} has ended:\n{said}");
        ensure!(!said.contains("panicked"), "the engine of host {host}:\n{said}");
        engine.kill()
    }

    /// The process of a host's engine.
    ///
    /// # Errors
    /// When none runs.
    pub fn pid(&self, host: usize) -> Result<u32> {
        Ok(self.hosts[host].engine.as_ref().context("no engine runs")?.pid())
    }

    /// What a host's engine has printed since it was started.
    #[must_use]
    pub fn printed(&self, host: usize) -> String {
        self.hosts[host].engine.as_ref().map(Running::printed).unwrap_or_default()
    }

    /// Hosts whose engines run.
    #[must_use]
    pub fn running(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|host| self.hosts[*host].engine.is_some()).collect()
    }

    /// Starts a program that talks to a host's engine.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn begin(&self, host: usize, program: &str, arguments: &[&str]) -> Result<Running> {
        let mut command = tools::fleece(program)?;
        command.env("FLEECE_ENGINE", &self.hosts[host].socket).args(arguments);
        let name = format!("{program} {} on hv{host}", arguments.join(" "));
        Running::start(&name, &mut command)
    }

    /// Runs `fleecectl` on a host; gives its lines of JSON.
    ///
    /// # Errors
    /// When it fails.
    pub fn ask(&self, host: usize, arguments: &[&str]) -> Result<Vec<Value>> {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        self.begin(host, "fleecectl", &arguments)?.finish(LONG)?.code(0)?.json()
    }

    /// Starts a backup of an image on a host.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn backup(&self, host: usize, vm: &str, path: &Path) -> Result<Running> {
        let disk = format!("--image=vda={}", path.display());
        self.begin(host, "fleece", &["backup", vm, &disk])
    }

    /// A figure of a host's `fleecectl status`, which is of all hosts.
    ///
    /// # Errors
    /// When it is not there.
    pub fn figure(&self, host: usize, name: &str) -> Result<u64> {
        let status = self.ask(host, &["status"])?;
        let status = status.first().context("status printed nothing")?;
        status[name].as_u64().with_context(|| format!("no {name} in {status}"))
    }

    /// Waits until every running host goes by one map of so many hosts, and has filled its index.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn wait_members(&self, count: usize) -> Result {
        self.wait_members_for(count, LONG)
    }

    /// The same, where it takes longer.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn wait_members_for(&self, count: usize, limit: std::time::Duration) -> Result {
        let mut seen = Vec::new();
        let waited = wait_until(limit, &format!("a map of {count} hosts"), || {
            for host in self.running() {
                let hosts = self.ask(host, &["hosts"])?;
                seen.clone_from(&hosts);
                let of_one_map = |other: &Value| {
                    ["here", "answers"].iter().any(|state| other["state"] == *state)
                        && other["map_epoch"] == hosts[0]["map_epoch"]
                };
                let settled = |other: &Value| other["index_epoch"] == other["map_epoch"];
                if hosts.len() != count || !hosts.iter().all(|one| of_one_map(one) && settled(one))
                {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        waited.with_context(|| format!("hosts: {seen:?}"))
    }

    /// A host can begin nothing with another one's engine from here on, or can again; the other one with it can.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn cut(&self, from: usize, to: usize, cut: bool) -> Result {
        self.network.as_ref().context("no network")?.cut(from, (to, PORT), cut)
    }

    /// A host restores a snapshot, bit for bit.
    ///
    /// # Errors
    /// When it differs.
    pub fn restores(&self, host: usize, snapshot: &str, truth: &Path) -> Result {
        let to = self.fixture.text(&format!("restored-{host}.raw"));
        let arguments = ["restore", snapshot, "--to", &to, "-O", "raw", "--force"];
        self.begin(host, "fleece", &arguments)?.finish(LONG)?.code(0)?;
        image::same(truth, Path::new(&to))
    }

    /// Every snapshot is restored by one of the running hosts.
    ///
    /// # Errors
    /// When one differs.
    pub fn must_restore(&self, snapshots: &[(String, &Path)]) -> Result {
        let next = AtomicUsize::new(0);
        self.side_by_side(|host| {
            while let Some((snapshot, truth)) = snapshots.get(next.fetch_add(1, Ordering::Relaxed))
            {
                self.restores(host, snapshot, truth)?;
            }
            Ok(())
        })
    }

    /// Every running host restores every snapshot, bit for bit, and finds nothing wrong.
    ///
    /// # Errors
    /// What is wrong.
    pub fn must_be_whole(&self, snapshots: &[(String, &Path)]) -> Result {
        self.side_by_side(|host| {
            let mut all = snapshots.iter();
            all.try_for_each(|(snapshot, truth)| self.restores(host, snapshot, truth))?;
            self.begin(host, "fleecectl", &["verify"])?.finish(LONG)?.code(0)?;
            Ok(())
        })
    }

    /// The same work on all running hosts at once.
    fn side_by_side(&self, work: impl Fn(usize) -> Result + Sync) -> Result {
        let work = &work;
        thread::scope(|scope| {
            let hosts = self.running().into_iter();
            let all: Vec<_> = hosts.map(|host| scope.spawn(move || work(host))).collect();
            all.into_iter().try_for_each(|one| match one.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            for host in &self.hosts {
                let printed = host.engine.as_ref().map(Running::printed).unwrap_or_default();
                eprintln!("--- {} printed:\n{printed}", host.name);
            }
        }
    }
}

/// `VM@ID` of a backup that has ended.
///
/// # Errors
/// When it did not commit.
pub fn snapshot(vm: &str, finished: &Finished) -> Result<String> {
    Ok(format!("{vm}@{}", snapshot_id(&finished.printed())?))
}

/// An image per host: blocks that all have, that two have, and its own.
///
/// # Errors
/// The system's.
pub fn images(folder: &Path, count: u64) -> Result<Vec<PathBuf>> {
    images_of(folder, count, 4 * MIB)
}

/// The same, 24 times as large as `unit`, of which 13 are allocated.
///
/// # Errors
/// The system's.
pub fn images_of(folder: &Path, count: u64, unit: u64) -> Result<Vec<PathBuf>> {
    (0..count)
        .map(|n| {
            let path = folder.join(format!("image{n}.raw"));
            let ranges = [
                (n * unit, 5 * unit, 1),
                (10 * unit, 3 * unit, 10 + n),
                (14 * unit, 3 * unit, 10 + (n + 1) % count),
                (18 * unit, 2 * unit, 20 + n),
            ];
            image::raw(&path, 24 * unit, &ranges)?;
            Ok(path)
        })
        .collect()
}
