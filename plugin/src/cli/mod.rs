//! The command line of `fleece`: one file per verb.

mod abort;
mod backup;
mod check;
mod cleanup;
mod completions;
mod man;
mod restore;
mod serve;
mod snapshots;
mod status;
mod table;
mod vms;

use std::cell::Cell;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use crate::engine::{DEFAULT_SOCKET, Engine};
use crate::error::{Context, Error, Kind, Result};
use crate::progress::Report;
use crate::vms::{self as vms_file, Vm};

/// Stack of a helper thread: our own frames are small, the default is 2 MiB.
const THREAD_STACK: usize = 512 << 10;

/// Helper threads for file system calls that may block: as many as read a raw image or write a
/// restored one at once; a sync that takes long leaves three.
const BLOCKING_THREADS: usize = 4;

/// Exit code of a verb that did its work, but had to warn.
const EXIT_WARNINGS: u8 = 3;

/// Backs up live QEMU/KVM virtual machines, with deduplication across all of them.
#[derive(Parser)]
#[command(name = "fleece", version, propagate_version = true, after_help = EXIT_CODES)]
#[command(disable_help_subcommand = true, max_term_width = 100)]
pub struct Cli {
    /// Socket of this host's engine.
    #[arg(long, global = true, value_name = "SOCK", env = "FLEECE_ENGINE", default_value = DEFAULT_SOCKET)]
    engine: PathBuf,

    /// Folder of the files that describe this host's VMs.
    #[arg(long, global = true, value_name = "DIR", env = "FLEECE_VMS_DIR", default_value = DEFAULT_VMS_DIR)]
    vms_dir: PathBuf,

    /// Folder for locks, sockets and the guard's log.
    #[arg(long, global = true, value_name = "DIR", env = "FLEECE_RUN_DIR", default_value = DEFAULT_RUN_DIR, hide = true)]
    run_dir: PathBuf,

    /// Write JSON lines, each with a `message_type`.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    verb: Verb,
}

/// Where VMs are described unless told otherwise.
const DEFAULT_VMS_DIR: &str = "/etc/fleece/vms.d";

/// Where locks and sockets are unless told otherwise.
const DEFAULT_RUN_DIR: &str = "/run/fleece";

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed and nothing committed, 2 usage, 3 done with warnings, \
10 no store, 11 busy, 12 key, 13 no engine, 14 not found, 15 restore target, 16 damaged data, \
17 not permitted, 130 interrupted.";

#[derive(Subcommand)]
enum Verb {
    Vms(vms::Args),
    Check(check::Args),
    Backup(Box<backup::Args>),
    Abort(abort::Args),
    Cleanup(cleanup::Args),
    Snapshots(snapshots::Args),
    Status(status::Args),
    Restore(restore::Args),
    Serve(serve::Args),
    Completions(completions::Args),
    Man(man::Args),
    /// Puts a VM right if the backup that started it dies.
    #[command(name = crate::qmp::guard::SUBCOMMAND, hide = true)]
    Guard,
}

/// What every verb gets besides its own options.
pub(crate) struct Session {
    /// The engine's socket.
    pub(crate) engine: PathBuf,
    /// Where VMs are described.
    pub(crate) vms_dir: PathBuf,
    /// Where locks and sockets are.
    pub(crate) run_dir: PathBuf,
    /// Where messages go.
    pub(crate) report: Report,
    /// Exit code of failures that were reported already.
    pub(crate) failed: Cell<u8>,
}

impl Session {
    /// Connects to this host's engine.
    pub(crate) async fn engine(&self) -> Result<Engine> {
        Engine::connect(&self.engine).await
    }

    /// Reports a failure; the first one's exit code stays, unless we were interrupted.
    pub(crate) fn fail(&self, error: &Error) {
        self.report.fail(error);
        let code = error.kind().exit_code();
        if self.failed.get() == 0 || error.kind() == Kind::Interrupted {
            self.failed.set(code);
        }
    }

    /// A VM by its name, or by a monitor socket given by hand.
    pub(crate) fn vm(&self, name: Option<&str>, qmp: Option<&Path>) -> Result<Vm> {
        match (name, qmp) {
            (name, Some(socket)) => Ok(Vm::at_socket(socket, name)),
            (Some(name), None) => vms_file::find(&self.vms_dir, name),
            (None, None) => Err(Error::new(Kind::Usage, "name a VM, or its monitor with --qmp")),
        }
    }
}

/// What a backup adds to its niceness: where processors are scarce, a guest's gets nine times its
/// share. Where one is free it changes nothing.
const NICE: i32 = 10;

/// Parses the command line and does what it says; returns the process's exit code.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    // A core file would hold what the guests' disks hold. Lowering a limit is always allowed.
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    // A `core_pattern` that pipes to a program heeds no limit.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // `--help` and `--version` come this way too, with code 0.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1));
        }
    };
    let report = Report::new(cli.json, cli.verb.writes_data());
    if matches!(cli.verb, Verb::Guard) {
        return crate::qmp::guard::main();
    }
    if matches!(cli.verb, Verb::Backup(_)) {
        // Before there are threads: they inherit it. Where it is refused, we are as nice as before.
        let _ = rustix::process::nice(NICE);
    }
    let session = Session {
        engine: cli.engine,
        vms_dir: cli.vms_dir,
        run_dir: cli.run_dir,
        report,
        failed: Cell::new(0),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(THREAD_STACK)
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .context(|| "cannot start".to_owned());
    let result = runtime.and_then(|runtime| {
        let local = tokio::task::LocalSet::new();
        let result = local.block_on(&runtime, cli.verb.run(&session));
        // Tasks hold temporary files and connections: they go first.
        drop(local);
        // A helper thread may hang in a file system; the exit need not wait for it.
        runtime.shutdown_background();
        result
    });
    ExitCode::from(exit_code(result, &session))
}

fn exit_code(result: Result<()>, session: &Session) -> u8 {
    if let Err(error) = result {
        session.fail(&error);
    }
    match session.failed.get() {
        0 if session.report.warnings() > 0 => EXIT_WARNINGS,
        code => code,
    }
}

impl Verb {
    /// Whether standard output carries a disk or a script rather than messages.
    fn writes_data(&self) -> bool {
        match self {
            Verb::Restore(args) => args.to_stdout(),
            _ => false,
        }
    }

    async fn run(self, session: &Session) -> Result<()> {
        match self {
            Verb::Vms(args) => vms::run(session, args).await,
            Verb::Check(args) => check::run(session, args).await,
            Verb::Backup(args) => Box::pin(backup::run(session, *args)).await,
            Verb::Abort(args) => abort::run(session, args).await,
            Verb::Cleanup(args) => cleanup::run(session, args).await,
            Verb::Snapshots(args) => snapshots::run(session, args).await,
            Verb::Status(args) => status::run(session, args).await,
            Verb::Restore(args) => Box::pin(restore::run(session, args)).await,
            Verb::Serve(args) => serve::run(session, args).await,
            Verb::Completions(args) => completions::run(&args),
            Verb::Man(args) => man::run(&args),
            // Handled before the runtime starts: it has one of its own.
            Verb::Guard => Ok(()),
        }
    }
}

/// `VM`, `VM@ID`, `VM@latest` or `VM@2026-11-20`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SnapshotName {
    /// The VM's name or UUID.
    pub(crate) vm: String,
    /// What stands behind the `@`; "" for the latest.
    pub(crate) snapshot: String,
}

impl std::str::FromStr for SnapshotName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (vm, snapshot) = match text.rsplit_once('@') {
            Some((_, "")) => return Err(format!("nothing follows the @ in {text:?}")),
            Some((vm, snapshot)) => (vm, snapshot),
            None => (text, ""),
        };
        if vm.is_empty() {
            return Err(format!("{text:?} names no VM"));
        }
        Ok(SnapshotName { vm: vm.to_owned(), snapshot: snapshot.to_owned() })
    }
}

/// Completes when the operator (Ctrl-C) or the system (SIGTERM) wants us to end.
pub(crate) async fn interrupted() -> Error {
    let wait = async {
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let mut hang_up = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result?,
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
        }
        Ok::<(), std::io::Error>(())
    };
    match wait.await {
        Ok(()) => Error::new(Kind::Interrupted, "interrupted"),
        Err(error) => Error::caused(Kind::Failed, "cannot watch for signals", error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn snapshot_names() {
        let name: SnapshotName = "web1@8d4x1c".parse().unwrap();
        assert_eq!((name.vm.as_str(), name.snapshot.as_str()), ("web1", "8d4x1c"));
        let name: SnapshotName = "web1".parse().unwrap();
        assert_eq!((name.vm.as_str(), name.snapshot.as_str()), ("web1", ""));
        let name: SnapshotName = "a@b@latest".parse().unwrap();
        assert_eq!((name.vm.as_str(), name.snapshot.as_str()), ("a@b", "latest"));
        assert!("@x".parse::<SnapshotName>().is_err());
        assert!("web1@".parse::<SnapshotName>().is_err());
    }

    fn usage_error(arguments: &[&str]) -> bool {
        match Cli::try_parse_from(arguments) {
            Ok(_) => false,
            Err(error) => error.exit_code() == 2,
        }
    }

    #[test]
    fn bad_input_is_refused_before_anything_is_touched() {
        assert!(usage_error(&["fleece", "backup", "web1", "--read-limit", "200"]));
        assert!(usage_error(&["fleece", "backup", "web1", "--max-hold", "2"]));
        assert!(usage_error(&["fleece", "backup"]));
        assert!(usage_error(&["fleece", "backup", "web1", "--image", "vda"]));
        assert!(usage_error(&[
            "fleece",
            "backup",
            "web1",
            "--as",
            "x",
            "--adopt",
            "00000000-0000-0000-0000-000000000001"
        ]));
        assert!(usage_error(&["fleece", "restore", "web1"]));
        assert!(usage_error(&["fleece", "restore", "web1", "--to", "a", "--to-dir", "b"]));
        assert!(usage_error(&["fleece", "restore", "web1", "--to", "a", "-O", "vmdk"]));
        assert!(!usage_error(&["fleece", "backup", "web1", "--read-limit", "200M", "--json"]));
        assert!(!usage_error(&["fleece", "restore", "web1@latest", "--to", "-"]));
        assert!(!usage_error(&["fleece", "backup", "web1", "--freeze=require"]));
        assert!(!usage_error(&["fleece", "backup", "web1", "--image", "vda=a=b.raw"]));
        assert!(usage_error(&["fleece", "backup", "web1", "--freeze", "--image", "vda=a.raw"]));
    }
}
