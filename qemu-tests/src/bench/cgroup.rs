//! A control group that limits memory, page cache included, for programs put in it as they start.
//! Of version 1 or 2, whatever this machine has; making one needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::Result;
use crate::wait::{SOON, wait_until};

/// A group of its own below the root of the memory controller; it goes when this is dropped.
pub struct Cgroup {
    folder: PathBuf,
    version: u8,
    limit: u64,
}

impl Cgroup {
    /// A group of at most `limit` bytes.
    ///
    /// # Errors
    /// When there is no memory controller, or it may not be used.
    pub fn limited(name: &str, limit: u64) -> Result<Self> {
        let (root, version) = controller()?;
        let folder = root.join(format!("fleece-{name}-{}", std::process::id()));
        if version == 2 {
            fs::write(root.join("cgroup.subtree_control"), "+memory")
                .context("cannot hand the memory controller down")?;
        }
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let group = Cgroup { folder, version, limit };
        group.write(["memory.limit_in_bytes", "memory.max"], &limit.to_string())?;
        Ok(group)
    }

    fn name(&self, [first, second]: [&'static str; 2]) -> PathBuf {
        self.folder.join(if self.version == 1 { first } else { second })
    }

    fn write(&self, names: [&'static str; 2], value: &str) -> Result {
        let path = self.name(names);
        fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The command that runs another one in this group, from its first instruction on.
    #[must_use]
    pub fn within(&self, command: &Command) -> Command {
        within(&self.processes(), command)
    }

    /// The file to write a process's id to.
    #[must_use]
    pub fn processes(&self) -> PathBuf {
        self.folder.join("cgroup.procs")
    }

    /// Most bytes that were ever used, page cache included; the kernel frees none before it must,
    /// so this is near the limit when much is read.
    ///
    /// # Errors
    /// The system's.
    pub fn peak(&self) -> Result<u64> {
        let text = fs::read_to_string(self.name(["memory.max_usage_in_bytes", "memory.peak"]))?;
        Ok(text.trim().parse()?)
    }

    /// Processes that the kernel killed because they did not fit.
    ///
    /// # Errors
    /// The system's.
    pub fn killed(&self) -> Result<u64> {
        let text = fs::read_to_string(self.name(["memory.oom_control", "memory.events"]))?;
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(line.context("no oom_kill")?.trim().parse()?)
    }

    /// What it is, for the report.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("cgroup v{} limited to {} MiB, page cache included", self.version, self.limit >> 20)
    }
}

/// Runs `command` as a member of the group whose `cgroup.procs` is given.
#[must_use]
pub fn within(processes: &Path, command: &Command) -> Command {
    let mut wrapped = Command::new("/bin/sh");
    wrapped.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]).arg(processes);
    wrapped.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    wrapped
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its last process may still be ending.
        let gone = wait_until(SOON, "the control group being empty", || {
            Ok(fs::remove_dir(&self.folder).is_ok())
        });
        if let Err(error) = gone {
            eprintln!("{} is left behind: {error:#}", self.folder.display());
        }
    }
}

/// Where the memory controller is mounted, and its version.
fn controller() -> Result<(PathBuf, u8)> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut unified = None;
    for line in mounts.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, folder, kind, options, ..] = words[..] else { continue };
        if kind == "cgroup" && options.split(',').any(|option| option == "memory") {
            return Ok((folder.into(), 1));
        }
        if kind == "cgroup2" {
            unified = Some(PathBuf::from(folder));
        }
    }
    let root = unified.context("no control groups are mounted")?;
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    ensure!(controllers.split_whitespace().any(|one| one == "memory"), "no memory controller");
    Ok((root, 2))
}
