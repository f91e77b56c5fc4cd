//! strace as a brake: one thread of a program held where it is, or system calls made slow, so that
//! a moment of microseconds lasts as long as a test needs.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::process::Running;
use crate::wait::{SOON, wait_until};
use crate::{Result, tools};

/// Longer than any test waits: microseconds.
const FOR_EVER: &str = "600000000";

/// A brake; it is let go with this value.
pub struct Brake {
    _strace: Running,
}

impl Brake {
    /// Holds the thread called `name` of a process at its next system call.
    ///
    /// # Errors
    /// When there is no such thread, or it cannot be traced.
    pub fn thread(pid: u32, name: &str) -> Result<Self> {
        let thread = thread(pid, name)?;
        let mut command = strace();
        command.args(["-e", "trace=all", "-e", &format!("inject=all:delay_enter={FOR_EVER}")]);
        let mut brake = Brake::start(command.args(["-p", &thread.to_string()]))?;
        let status = PathBuf::from(format!("/proc/{pid}/task/{thread}/status"));
        brake.wait("the thread being held", || {
            let text = fs::read_to_string(&status)?;
            Ok(text.lines().any(|line| line.starts_with("State:") && line.contains("tracing stop")))
        })?;
        Ok(brake)
    }

    /// Delays each of some system calls (`linkat,fsync`) of a process.
    ///
    /// # Errors
    /// When it cannot be traced.
    pub fn calls(pid: u32, calls: &str, delay: Duration) -> Result<Self> {
        let inject = format!("inject={calls}:delay_enter={}", delay.as_micros());
        let mut command = strace();
        command.args(["-f", "-e", &format!("trace={calls}"), "-e", &inject]);
        let mut brake = Brake::start(command.args(["-p", &pid.to_string()]))?;
        let tasks = PathBuf::from(format!("/proc/{pid}/task"));
        brake.wait("all threads being traced", || {
            for task in fs::read_dir(&tasks)? {
                let text = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
                if text.lines().any(|line| line == "TracerPid:\t0") {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(brake)
    }

    fn start(command: &mut Command) -> Result<Self> {
        Ok(Brake { _strace: Running::start("strace", command)? })
    }

    fn wait(&mut self, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result {
        let strace = &mut self._strace;
        wait_until(SOON, what, || {
            ensure!(strace.ended()?.is_none(), "strace ended: {}", strace.printed());
            condition()
        })
    }
}

/// The command line that starts a program and kills it at the `n`-th of some system calls that one
/// of its threads makes, before the call is done. The program keeps its process id.
#[must_use]
pub fn killed_at(calls: &str, n: u32) -> Vec<String> {
    let inject = format!("inject={calls}:signal=KILL:when={n}");
    ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={calls}"), "-e", &inject]
        .map(str::to_owned)
        .to_vec()
}

fn strace() -> Command {
    let mut command = tools::as_root("strace");
    command.args(["-qq", "-o", "/dev/null"]);
    command
}

fn thread(pid: u32, name: &str) -> Result<u32> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        if fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name) {
            let number = path.file_name().and_then(|name| name.to_str()).context("no thread id")?;
            return Ok(number.parse()?);
        }
    }
    anyhow::bail!("process {pid} has no thread {name}")
}
