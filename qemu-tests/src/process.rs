//! A child whose output is collected as it comes, and which does not outlive its owner.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::Result;
use crate::wait::{wait_for, wait_until};

/// The lines of one output, shared with the thread that reads it.
type Lines = Arc<Mutex<Vec<String>>>;

/// A running child.
pub struct Running {
    name: String,
    child: Child,
    out: Lines,
    err: Lines,
    readers: Vec<JoinHandle<()>>,
}

/// What a child left behind.
#[derive(Debug)]
pub struct Finished {
    /// Which it was.
    pub name: String,
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Running {
    /// Starts a command with its outputs collected and no input.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let (out, err) = (Lines::default(), Lines::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(collect(pipe, out.clone()));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(collect(pipe, err.clone()));
        }
        Ok(Running { name: name.into(), child, out, err, readers })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process that it started with this argument.
    ///
    /// # Errors
    /// When there is none.
    pub fn child(&self, argument: &str) -> Result<u32> {
        let given = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&byte| byte == 0).any(|word| word == argument.as_bytes())
        };
        let found = children(self.pid()).into_iter().find(given);
        found.with_context(|| format!("{} started no process with '{argument}'", self.name))
    }

    /// Everything it has printed so far, standard output first.
    #[must_use]
    pub fn printed(&self) -> String {
        format!("{}\n{}", text(&self.out), text(&self.err))
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// The system's.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it has printed a text.
    ///
    /// # Errors
    /// When it ends or the time does before that, with what it printed.
    pub fn wait_printed(&mut self, limit: Duration, wanted: &str) -> Result {
        let name = self.name.clone();
        let waited = wait_for(limit, &format!("{name} printing '{wanted}'"), || {
            // The status first: what was printed before the end must be seen.
            let ended = self.child.try_wait()?;
            if self.printed().contains(wanted) {
                return Ok(Some(()));
            }
            match ended {
                Some(_)
                    if self.readers.iter().all(JoinHandle::is_finished)
                        && !self.printed().contains(wanted) =>
                {
                    bail!("{name} ended without printing '{wanted}'")
                }
                _ => Ok(None),
            }
        });
        waited.with_context(|| format!("{name} printed:\n{}", self.printed()))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// The system's.
    pub fn signal(&self, signal: Signal) -> Result {
        send(self.pid(), signal)
    }

    /// Waits for its end and gives all it printed.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn finish(mut self, limit: Duration) -> Result<Finished> {
        let name = self.name.clone();
        let waited = wait_for(limit, &format!("{name} ending"), || Ok(self.child.try_wait()?));
        let status = waited.with_context(|| format!("{name} printed:\n{}", self.printed()))?;
        for reader in std::mem::take(&mut self.readers) {
            // A grandchild may hold the pipe open: what it prints later is not waited for.
            let _ =
                wait_until(Duration::from_secs(2), "the pipe's end", || Ok(reader.is_finished()));
        }
        Ok(Finished {
            name,
            code: status.code().unwrap_or(-1),
            out: text(&self.out),
            err: text(&self.err),
        })
    }

    /// SIGKILL, and waits for the end.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(mut self) -> Result {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- {} printed:\n{}", self.name, self.printed());
        }
    }
}

impl Finished {
    /// Itself, when its exit code is as wanted.
    ///
    /// # Errors
    /// Another exit code, with what was printed.
    pub fn code(self, wanted: i32) -> Result<Self> {
        if self.code != wanted {
            bail!(
                "{} ended with {} and not {wanted}:\n{}\n{}",
                self.name,
                self.code,
                self.out,
                self.err
            );
        }
        Ok(self)
    }

    /// The lines of standard output as JSON.
    ///
    /// # Errors
    /// When one is not JSON.
    pub fn json(&self) -> Result<Vec<Value>> {
        self.out
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
            .collect()
    }

    /// Both outputs.
    #[must_use]
    pub fn printed(&self) -> String {
        format!("{}\n{}", self.out, self.err)
    }
}

/// The processes that a process started.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|line| line.split_whitespace().flat_map(str::parse).collect::<Vec<u32>>())
        .collect()
}

/// Sends a signal to a process by its id.
///
/// # Errors
/// The system's.
pub fn send(pid: u32, signal: Signal) -> Result {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process id")?;
    kill_process(pid, signal).with_context(|| format!("cannot signal {}", pid.as_raw_nonzero()))
}

fn collect(pipe: impl Read + Send + 'static, lines: Lines) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_string();
            lines.lock().unwrap_or_else(PoisonError::into_inner).push(text);
            line.clear();
        }
    })
}

fn text(lines: &Lines) -> String {
    lines.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
}
