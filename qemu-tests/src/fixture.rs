//! A store, its engine, and the programs that speak to them, in a folder that goes with the test.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::bench::cgroup::{self, Cgroup};
use crate::guest::Machine;
use crate::process::{Finished, Running};
use crate::wait::{LONG, SOON, wait_until};
use crate::{Result, tools};

/// A store with its engine. Whatever the scenario, it ends with `fleecectl verify`: when the
/// fixture is dropped and the test has not failed already, a damaged store fails it.
pub struct Fixture {
    folder: TempDir,
    engine: Option<Running>,
    budget: &'static str,
    places: Places,
    verify_at_end: bool,
    /// `cgroup.procs` of the group that programs are started in.
    group: Option<PathBuf>,
}

/// Where a fixture has what can be elsewhere than in its folder.
#[derive(Clone, Default)]
pub struct Places {
    /// The store; it is made there.
    pub store: Option<PathBuf>,
    /// What `fleecectl init` is told of it besides.
    pub init: Vec<String>,
    /// The engine's state.
    pub state: Option<PathBuf>,
    /// What the engine is started by, such as `setpriv …`; nothing for directly.
    pub by: Vec<String>,
    /// The engine, where another copy of it is to run.
    pub program: Option<PathBuf>,
}

impl Fixture {
    /// A fresh store and a running engine.
    ///
    /// # Errors
    /// When either fails.
    pub fn new() -> Result<Self> {
        let mut fixture = Self::without_engine()?;
        fixture.start_engine()?;
        Ok(fixture)
    }

    /// A fresh store, no engine yet.
    ///
    /// # Errors
    /// When `fleecectl init` fails.
    pub fn without_engine() -> Result<Self> {
        Self::at(Places::default())
    }

    /// The same with other places.
    ///
    /// # Errors
    /// When `fleecectl init` fails.
    pub fn at(places: Places) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("fleece").tempdir()?;
        fs::create_dir(folder.path().join("scratch"))?;
        let (engine, budget, verify_at_end, group) = (None, "32M", true, None);
        let fixture = Fixture { folder, engine, budget, places, verify_at_end, group };
        let (store, config) = (fixture.store().display().to_string(), fixture.text("engine.toml"));
        let mut init = vec!["init", "--store", &store, "--config", &config];
        init.extend(fixture.places.init.iter().map(String::as_str));
        fixture.fleecectl(&init)?;
        Ok(fixture)
    }

    /// For a scenario that damages the store on purpose: no verify at the end.
    pub fn leave_damaged(&mut self) {
        self.verify_at_end = false;
    }

    /// From here on the engine and `fleece` are started in a control group; `None`: no longer.
    pub fn confine(&mut self, group: Option<&Cgroup>) {
        self.group = group.map(Cgroup::processes);
    }

    fn confined(&self, command: Command) -> Command {
        match &self.group {
            Some(processes) => cgroup::within(processes, &command),
            None => command,
        }
    }

    /// The folder of everything.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path in the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// A path in the folder, as an argument.
    #[must_use]
    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The engine's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("engine.sock")
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.places.store.clone().unwrap_or_else(|| self.path("store"))
    }

    /// The engine's state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.places.state.clone().unwrap_or_else(|| self.path("state"))
    }

    /// What the engine is started by from now on; nothing for directly.
    pub fn start_engine_by(&mut self, by: Vec<String>) {
        self.places.by = by;
    }

    /// Another copy of the engine, which runs from now on.
    pub fn use_engine(&mut self, program: &Path) {
        self.places.program = Some(program.into());
    }

    /// Starts the engine and waits until it answers.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_engine(&mut self) -> Result {
        let built = tools::fleece("fleece-engine")?;
        let engine = self.places.program.clone().unwrap_or_else(|| built.get_program().into());
        let mut command = match self.places.by.split_first() {
            None => Command::new(engine),
            Some((program, arguments)) => {
                let mut by = Command::new(program);
                by.args(arguments).arg(engine);
                by
            }
        };
        let (config, socket) = (self.text("engine.toml"), self.text("engine.sock"));
        command.args(["--config", &config, "--socket", &socket]);
        command.arg("--state-dir").arg(self.state()).args(["--memory-budget", self.budget]);
        let mut engine = Running::start("fleece-engine", &mut self.confined(command))?;
        let socket = self.socket();
        wait_until(SOON, "the engine's socket", || {
            Ok(engine.ended()?.is_some() || UnixStream::connect(&socket).is_ok())
        })?;
        if engine.ended()?.is_some() {
            // Its last words are whole only once it is waited for.
            bail!("the engine ended: {}", engine.finish(SOON)?.printed());
        }
        self.engine = Some(engine);
        Ok(())
    }

    /// The engine's process.
    ///
    /// # Errors
    /// When none runs.
    pub fn engine(&mut self) -> Result<&mut Running> {
        self.engine.as_mut().context("no engine runs")
    }

    /// SIGKILLs the engine.
    ///
    /// # Errors
    /// When none runs.
    pub fn kill_engine(&mut self) -> Result {
        self.engine.take().context("no engine runs")?.kill()
    }

    /// Ends the engine with SIGTERM; it must end cleanly.
    ///
    /// # Errors
    /// When it does not.
    pub fn stop_engine(&mut self) -> Result {
        let engine = self.engine.take().context("no engine runs")?;
        engine.signal(Signal::TERM)?;
        engine.finish(SOON)?.code(0)?;
        Ok(())
    }

    /// A command of `fleece` towards this engine.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn fleece_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = tools::fleece("fleece")?;
        command.env("FLEECE_ENGINE", self.socket()).env("FLEECE_VMS_DIR", self.path("vms.d"));
        command.args(arguments);
        Ok(self.confined(command))
    }

    /// Runs `fleece` to its end, whatever its exit code.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn try_fleece(&self, arguments: &[&str]) -> Result<Finished> {
        let name = format!("fleece {}", arguments.join(" "));
        Running::start(&name, &mut self.fleece_command(arguments)?)?.finish(LONG)
    }

    /// Runs `fleece`, which must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub fn fleece(&self, arguments: &[&str]) -> Result<Finished> {
        self.try_fleece(arguments)?.code(0)
    }

    /// Runs `fleecectl` to its end, whatever its exit code.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn try_fleecectl(&self, arguments: &[&str]) -> Result<Finished> {
        let name = format!("fleecectl {}", arguments.join(" "));
        Running::start(&name, &mut self.fleecectl_command(arguments)?)?.finish(LONG)
    }

    /// A command of `fleecectl` towards this engine.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn fleecectl_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = tools::fleece("fleecectl")?;
        command.env("FLEECE_ENGINE", self.socket()).args(arguments);
        Ok(self.confined(command))
    }

    /// Runs `fleecectl`, which must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub fn fleecectl(&self, arguments: &[&str]) -> Result<Finished> {
        self.try_fleecectl(arguments)?.code(0)
    }

    /// Describes a machine where `fleece` looks for VMs by name.
    ///
    /// # Errors
    /// The system's.
    pub fn describe(&self, machine: &Machine) -> Result {
        let text =
            format!("name = \"{}\"\nqmp = \"{}\"\n", machine.name, machine.socket().display());
        fs::create_dir_all(self.path("vms.d"))?;
        Ok(fs::write(self.path("vms.d").join(format!("{}.toml", machine.name)), text)?)
    }

    /// Starts a live backup of a machine.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn backup(&self, machine: &Machine, more: &[&str]) -> Result<Running> {
        self.backup_through(&machine.socket(), machine, more)
    }

    /// The same through another socket that leads to its monitor.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn backup_through(
        &self,
        socket: &Path,
        machine: &Machine,
        more: &[&str],
    ) -> Result<Running> {
        let (qmp, scratch) = (socket.display().to_string(), self.text("scratch"));
        let mut arguments = vec!["backup", &machine.name, "--qmp", &qmp, "--scratch-dir", &scratch];
        arguments.extend(more);
        Running::start(
            &format!("fleece {}", arguments.join(" ")),
            &mut self.fleece_command(&arguments)?,
        )
    }

    /// Backs up a shut-off machine from its images; gives the snapshot's id and what was printed.
    ///
    /// # Errors
    /// When the backup fails.
    pub fn backup_images(
        &self,
        name: &str,
        images: &[(&str, &Path)],
    ) -> Result<(String, Finished)> {
        let images: Vec<String> = images
            .iter()
            .map(|(disk, path)| format!("--image={disk}={}", path.display()))
            .collect();
        let mut arguments = vec!["backup", name];
        arguments.extend(images.iter().map(String::as_str));
        let finished = self.fleece(&arguments)?;
        Ok((snapshot_id(&finished.printed())?, finished))
    }

    /// Restores one disk of a snapshot (`VM@ID`) to a raw file and gives its path.
    ///
    /// # Errors
    /// When the restore fails.
    pub fn restore(&self, snapshot: &str, disk: &str) -> Result<PathBuf> {
        let target = self.path(&format!("restored-{}-{disk}.raw", snapshot.replace('/', "_")));
        let to = target.display().to_string();
        self.fleece(&["restore", snapshot, "--disk", disk, "--to", &to, "-O", "raw", "--force"])?;
        Ok(target)
    }

    /// `fleecectl status --json`.
    ///
    /// # Errors
    /// When it fails or is not JSON.
    pub fn status(&self) -> Result<Value> {
        self.fleecectl(&["status", "--json"])?.json()?.pop().context("status printed nothing")
    }

    /// A figure of `fleecectl status --json`.
    ///
    /// # Errors
    /// When it is not there.
    pub fn figure(&self, name: &str) -> Result<u64> {
        let status = self.status()?;
        status[name].as_u64().with_context(|| format!("no {name} in {status}"))
    }

    /// Waits until the session of a VM is in a stage and `enough` of its figures; its plugin must
    /// not have ended before.
    ///
    /// # Errors
    /// When it ends, or the stage does not come in time.
    pub fn wait_stage(
        &self,
        (vm, plugin): (&str, &mut Running),
        stage: &str,
        enough: impl Fn(&Value) -> bool,
    ) -> Result {
        let mut seen = Vec::new();
        let waited = wait_until(SOON, &format!("{vm} being in stage {stage}"), || {
            let sessions = self.fleecectl(&["sessions", "--json"])?.json()?;
            let Some(session) = sessions.iter().find(|session| session["vm"] == vm) else {
                ensure!(plugin.ended()?.is_none(), "the backup ended: {}", plugin.printed());
                return Ok(false);
            };
            let now = session["stage"].as_str().unwrap_or_default().to_owned();
            if seen.last() != Some(&now) {
                seen.push(now);
            }
            Ok(session["stage"] == stage && enough(session))
        });
        waited.with_context(|| format!("stages seen: {}", seen.join(", ")))
    }

    /// Bytes that the newest backup of a VM read.
    ///
    /// # Errors
    /// When there is none.
    pub fn bytes_read(&self, vm: &str) -> Result<u64> {
        let listed = self.fleece(&["snapshots", vm, "--last", "1", "--json"])?.json()?;
        let newest = listed.last().context("no snapshot")?;
        newest["counts"]["read"].as_u64().with_context(|| format!("no figure: {newest}"))
    }

    /// The store must be whole.
    ///
    /// # Errors
    /// What `fleecectl verify` found.
    pub fn verify(&self) -> Result<Finished> {
        self.fleecectl(&["verify"])
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if thread::panicking() {
            if let Some(engine) = &self.engine {
                eprintln!("--- fleece-engine printed:\n{}", engine.printed());
            }
            return;
        }
        if !self.verify_at_end {
            return;
        }
        let clean = if self.engine.is_some() { Ok(()) } else { self.start_engine() };
        if let Err(error) = clean.and_then(|()| self.verify().map(drop)) {
            panic!("the store is not whole at the end of the scenario: {error:#}");
        }
    }
}

/// The id in the line `committed NAME@ID …`.
///
/// # Errors
/// When there is no such line.
pub fn snapshot_id(printed: &str) -> Result<String> {
    let line = printed
        .lines()
        .find(|line| line.contains("committed "))
        .with_context(|| format!("no line 'committed NAME@ID' in:\n{printed}"))?;
    let after = line.split('@').nth(1).with_context(|| format!("no id in '{line}'"))?;
    Ok(after.chars().take_while(char::is_ascii_alphanumeric).collect())
}
