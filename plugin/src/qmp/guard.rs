//! The guard: a process of its own that sets the VM right if the worker dies.
//!
//! It is started before anything is changed in QEMU and told of every change before it is made,
//! through a pipe. When the pipe ends without a goodbye it does only this: thaw, `cont` if we had
//! stopped the guest, end the view, merge bitmaps back. It connects to QEMU only then: a monitor
//! takes one client, and the worker's end closes with the worker.

use crate::error::{Context, Error, Kind, Result};
use crate::qmp::end::Pair;
use crate::qmp::recover;
use crate::qmp::running::{Files, lock};
use crate::vms::Vm;
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use tokio::signal::unix::{SignalKind, signal};

/// The hidden subcommand that makes this program the guard.
pub const SUBCOMMAND: &str = "guard";
/// What it says when it watches.
const READY: &str = "ready\n";
/// A message is a state: a few hundred bytes per disk.
const MAX_MESSAGE: u64 = 1 << 20;

/// How to start one.
#[derive(Clone, Debug)]
pub struct Options {
    /// Our own program (`std::env::current_exe`).
    pub program: PathBuf,
    /// Where it writes what it does; made only if it has something to do.
    pub log: PathBuf,
    /// The run directory (`/run/fleece`).
    pub run_dir: PathBuf,
}

/// How far a backup got, as far as the VM is concerned.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct State {
    /// The snapshot; empty as long as nothing was changed.
    pub(crate) snapshot: String,
    /// Who listens at the monitor: another process, another QEMU.
    #[serde(default)]
    pub(crate) qemu: Option<i32>,
    /// Bitmaps begun.
    pub(crate) pairs: Vec<Pair>,
    /// File systems are (about to be) frozen, by the agent at this socket.
    pub(crate) frozen: Option<PathBuf>,
    /// The guest is (about to be) stopped by us.
    pub(crate) stopped: bool,
    /// The NBD server is ours.
    pub(crate) server: bool,
    /// Scratch and sockets.
    pub(crate) directory: Option<PathBuf>,
    /// Servers of pushed disks: their process ids.
    pub(crate) servers: Vec<u32>,
    /// The engine was asked to commit: only it knows what the bitmaps are worth now.
    pub(crate) committing: bool,
}

impl State {
    /// Notes it in a file for the next run; best effort, the guard is the promise. Killed half way, or
    /// without room for it, the file is what it was.
    pub(crate) fn note(&self, path: &Path) {
        let new = path.with_extension("state.new");
        let Ok(bytes) = serde_json::to_vec(self) else { return };
        drop(std::fs::write(&new, bytes).and_then(|()| std::fs::rename(&new, path)));
    }
}

#[derive(Serialize, Deserialize)]
enum Message {
    Start { vm: Vm, log: PathBuf, run_dir: PathBuf },
    State(State),
    Done,
}

/// The worker's end of the guard. Dropped without [`Guard::done`], the guard sets the VM right.
#[derive(Debug)]
pub struct Guard {
    child: Child,
    pipe: Option<ChildStdin>,
    state: State,
    files: Files,
}

impl Guard {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// It did not start.
    pub fn spawn(options: &Options, vm: &Vm) -> Result<Guard> {
        let failed = || format!("starting the guard ({} {SUBCOMMAND})", options.program.display());
        let mut command = Command::new(&options.program);
        command.arg(SUBCOMMAND).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context(failed)?;
        let pipe = child.stdin.take();
        let answer = child.stdout.take();
        let files = Files::new(&options.run_dir, &vm.qmp);
        let mut guard = Guard { child, pipe, state: State::default(), files };
        let start = Message::Start {
            vm: vm.clone(),
            log: options.log.clone(),
            run_dir: options.run_dir.clone(),
        };
        guard.send(&start).context(failed)?;
        let mut said = String::new();
        if let Some(answer) = answer {
            BufReader::new(answer).take(READY.len() as u64).read_line(&mut said).context(failed)?;
        }
        if said != READY {
            return Err(Error::new(Kind::Failed, format!("{}: it ended at once", failed())));
        }
        Ok(guard)
    }

    /// From here on only the engine knows whether the snapshot is committed: if we die now, the
    /// bitmaps are left as they are, and the next backup asks the engine what they are worth. To be
    /// called right before the engine is asked to commit.
    ///
    /// # Errors
    /// The guard died.
    pub fn committing(&mut self) -> Result<()> {
        self.tell(|state| state.committing = true)
    }

    /// The engine says that nothing was committed: the bitmaps would be merged back again.
    ///
    /// # Errors
    /// The guard died.
    pub fn not_committed(&mut self) -> Result<()> {
        self.tell(|state| state.committing = false)
    }

    /// All is well: it may go. Waits for its end.
    pub fn done(self) {
        let state = self.files.state.clone();
        if self.end() {
            drop(std::fs::remove_file(state));
        }
    }

    /// The view is ended, but only the engine knows what the bitmaps are worth: it may go, and
    /// `cleanup` and `abort` leave the bitmaps to the next backup.
    ///
    /// # Errors
    /// That cannot be noted for them.
    pub fn done_but_unsettled(mut self) -> Result<()> {
        let State { frozen, stopped, .. } = std::mem::take(&mut self.state);
        let noted = self.tell(|state| {
            *state = State { frozen, stopped, committing: true, ..State::default() };
        });
        self.end();
        noted
    }

    /// Whether nothing is left to it.
    fn end(mut self) -> bool {
        // If it cannot be told, it has died: nothing is left to tell it.
        drop(self.send(&Message::Done));
        self.pipe = None;
        // It may need the monitor, which is ours as long as we wait, to set the guest going.
        let settled = self.state.frozen.is_none() && !self.state.stopped;
        if settled {
            drop(self.child.wait());
        }
        settled
    }

    /// Tells of a change that is about to be made, or was undone.
    pub(crate) fn tell(&mut self, change: impl FnOnce(&mut State)) -> Result<()> {
        change(&mut self.state);
        let message = Message::State(self.state.clone());
        self.send(&message)
            .context(|| "the guard died: the backup cannot go on without it".to_owned())?;
        // For whoever comes next after both died.
        self.state.note(&self.files.state);
        Ok(())
    }

    /// What it was told last.
    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// Its process id (tests kill it).
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn send(&mut self, message: &Message) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        match &mut self.pipe {
            Some(pipe) => pipe.write_all(&line),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// The guard's `main`, for the hidden subcommand: reads messages until the pipe ends.
#[must_use]
pub fn main() -> ExitCode {
    // Ctrl-C and a closed terminal are for the worker.
    let _ = rustix::process::setsid();
    // A backup is nice to guests; when it is the guard's turn, a guest waits for it. Where that is
    // refused, it is as nice as the backup.
    let _ = rustix::process::setpriority_process(None, 0);
    match watch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(error.kind().exit_code()),
    }
}

fn watch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context(|| "the guard's runtime".to_owned())?;
    outlive_signals(&runtime)?;
    let mut lines = BufReader::new(std::io::stdin().lock());
    let Some(Message::Start { vm, log, run_dir }) = next(&mut lines) else {
        return Err(Error::new(Kind::Usage, "this subcommand is for fleece itself"));
    };
    let files = Files::new(&run_dir, &vm.qmp);
    let held = lock(&run_dir, &files.guard)?;
    if held.is_none() {
        return Err(Error::new(Kind::Busy, "another guard of this VM is at work"));
    }
    let mut out = std::io::stdout();
    out.write_all(READY.as_bytes())
        .and_then(|()| out.flush())
        .context(|| "the worker went away".to_owned())?;
    let mut state = State::default();
    while let Some(message) = next(&mut lines) {
        match message {
            Message::State(new) => state = new,
            // The view is ended and the bitmaps settled; a guest that stands still comes first.
            Message::Done => {
                let State { frozen, stopped, committing, .. } = state;
                state = State { frozen, stopped, ..State::default() };
                if state != State::default() {
                    state.committing = committing;
                }
            }
            Message::Start { .. } => {}
        }
    }
    if state == State::default() {
        return Ok(());
    }
    set_right(&runtime, &vm, &mut state, &files, &log)
}

/// Whoever ends all our processes (a service manager, a terminal) ends the worker with them: then
/// is when the guard is needed. The handlers stay as long as the process.
fn outlive_signals(runtime: &tokio::runtime::Runtime) -> Result<()> {
    let _inside = runtime.enter();
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()] {
        drop(signal(kind).context(|| "the guard cannot watch for signals".to_owned())?);
    }
    Ok(())
}

fn next(lines: &mut impl BufRead) -> Option<Message> {
    let mut line = Vec::new();
    lines.by_ref().take(MAX_MESSAGE).read_until(b'\n', &mut line).ok()?;
    // Half a message means that the worker died writing it: the one before counts, and what this
    // one announced was not begun.
    serde_json::from_slice(&line).ok()
}

fn set_right(
    runtime: &tokio::runtime::Runtime,
    vm: &Vm,
    state: &mut State,
    files: &Files,
    log: &Path,
) -> Result<()> {
    // What is done is noted, so that nobody does it again should we be killed.
    let note = |state: &State| state.note(&files.state);
    let result = runtime.block_on(recover::after_death(vm, state, note));
    let text = match &result {
        Ok(report) => {
            format!("{}: {}; left: {}\n", vm.name, report.done.join(", "), report.left.join("; "))
        }
        Err(error) => format!("{}: failed: {error}\n", vm.name),
    };
    let mut options = OpenOptions::new();
    if let Ok(mut file) = options.create(true).append(true).mode(0o600).open(log) {
        drop(file.write_all(text.as_bytes()));
    }
    if result.as_ref().is_ok_and(|report| report.left.is_empty()) {
        // While nobody knows whether the backup committed, the file keeps `cleanup` off its bitmaps.
        match state.committing {
            true => note(&State { committing: true, ..State::default() }),
            false => drop(std::fs::remove_file(&files.state)),
        }
    }
    result.map(drop)
}
