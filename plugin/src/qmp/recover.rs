//! What dead runs left behind in a VM, and how it is ended: `cleanup`, `abort`, the guard.

use crate::error::{Context, Error, Kind, Result};
use crate::qmp::agent;
use crate::qmp::bitmap::{Action, carry_out};
use crate::qmp::disk;
use crate::qmp::end;
pub use crate::qmp::end::Report;
use crate::qmp::guard::State;
use crate::qmp::names::PREFIX;
use crate::qmp::running::{Files, Lock, holder};
use crate::qmp::session::Session;
use crate::vms::Vm;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// The worker's monitor connection closes with it; another client can hold the monitor for long.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// How long `abort` lets the worker end by itself.
const TERM_LIMIT: Duration = Duration::from_millis(2500);
/// And, after a kill, its guard.
const GUARD_LIMIT: Duration = Duration::from_millis(2000);
/// Between two looks at something that has no event.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long the next run waits for the guard of one that ended: longer than setting a VM right
/// takes that answers; [`Lock::take`] says who is still at work after that.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(10);
/// Between two tries of the guard, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long the guard tries to reach QEMU if the guest runs: long enough for a monitor that someone
/// else uses, short enough not to hold up the next backup, which can do the same.
const AGAIN_LIMIT: Duration = Duration::from_secs(600);
/// How long it tries what QEMU refuses: what is refused for longer needs a person.
const REFUSED_LIMIT: Duration = Duration::from_secs(5);
/// How often a thaw is tried.
const THAW_TRIES: usize = 3;

/// Before a backup: sets right what the last run noted and did not live to undo (a guest that stands
/// still or is frozen, our NBD server, servers of pushed disks), and ends views of dead runs, noted
/// or not. Bitmaps are left to the plan of the backup, which asks the engine what they are worth.
/// What was done is in `report` even if the rest fails.
///
/// # Errors
/// The guest cannot be set going, or may be frozen: what is noted of that stays noted, and a backup
/// would write over it. QEMU went away.
pub async fn end_leftovers(run_dir: &Path, session: &Session, report: &mut Report) -> Result<()> {
    let files = Files::new(run_dir, &session.vm().qmp);
    let mut state = read_state(&files);
    report.done.extend(kill_servers(&mut state));
    let ended = end_noted_view(session, &mut state, report).await;
    if ended.is_ok() {
        // `cleanup` must know of the bitmaps until they are settled.
        let State { qemu, frozen, pairs, committing, .. } = state;
        let settled = frozen.is_none() && pairs.is_empty() && !committing;
        let qemu = qemu.filter(|_| !settled);
        state = State { qemu, frozen, pairs, committing, ..State::default() };
    }
    match state == State::default() {
        true => drop(std::fs::remove_file(&files.state)),
        false => state.note(&files.state),
    }
    ended?;
    let Some(agent) = &state.frozen else { return Ok(()) };
    let text = format!(
        "VM {}: a backup died while its file systems were frozen, and its agent at {} does not thaw \
         them: see to the agent and try again; if they are not frozen, remove {}",
        session.identity().name,
        agent.display(),
        files.state.display()
    );
    Err(Error::new(Kind::Failed, text))
}

/// `fleece cleanup VM`: as [`end_leftovers`], and bitmaps of dead runs merged back without an engine:
/// the newer into the older, so that the older covers everything since its own snapshot.
///
/// # Errors
/// `Busy`: a backup of this VM runs. Otherwise as [`Session::connect`].
pub async fn cleanup(run_dir: &Path, vm: &Vm) -> Result<Report> {
    wait_for_guard(run_dir, vm).await?;
    let _lock = Lock::take(run_dir, &vm.qmp)?;
    let files = Files::new(run_dir, &vm.qmp);
    let mut state = read_state(&files);
    // Before anything that needs QEMU, which may be gone.
    let mut report = Report { done: kill_servers(&mut state), left: Vec::new() };
    let session = Session::connect(vm).await?;
    let _vm_lock = Lock::of_vm(run_dir, session.identity().uuid)?;
    set_right(&session, &mut state, &mut report).await?;
    // A backup died while it was committed: its bitmaps are for the next one, who asks the engine.
    if state.committing {
        let State { qemu, frozen, committing, .. } = state;
        let unsettled = State { qemu, frozen, committing, ..State::default() };
        unsettled.note(&files.state);
        return Ok(report);
    }
    merge_unknown(&session, &mut report).await?;
    match report.left.is_empty() {
        true => drop(std::fs::remove_file(&files.state)),
        // What was done is not to be done again: someone else may stop the guest until then.
        false => state.note(&files.state),
    }
    Ok(report)
}

/// `fleece abort VM`: ends a running backup (or what one left) within 5 s; the guest goes on.
///
/// # Errors
/// Something is left; what, is in the message.
pub async fn abort(run_dir: &Path, vm: &Vm) -> Result<Report> {
    let files = Files::new(run_dir, &vm.qmp);
    let mut done = Vec::new();
    if let Some(pid) = holder(&files.worker)? {
        // The kernel has just told that this process holds the lock: it is the worker.
        signal(pid, Signal::TERM)?;
        let mut how = "ended";
        if !wait_free(&files.worker, TERM_LIMIT).await? {
            signal(pid, Signal::KILL)?;
            how = "killed";
        }
        done.push(format!("{how} the backup (process {})", pid.as_raw_nonzero()));
        wait_free(&files.worker, GUARD_LIMIT).await?;
    }
    // A guard that tries again and again makes room: we do what it does, and tell what is left.
    if !wait_free(&files.guard, GUARD_LIMIT).await?
        && let Some(pid) = holder(&files.guard)?
    {
        signal(pid, Signal::KILL)?;
    }
    let rest = cleanup(run_dir, vm).await?;
    if !rest.left.is_empty() {
        return Err(Error::new(
            Kind::Failed,
            format!("VM {}: left over: {}", vm.name, rest.left.join("; ")),
        ));
    }
    done.extend(rest.done);
    Ok(Report { done, left: Vec::new() })
}

/// What the guard does when the worker died, again and again until nothing is left to do: as long
/// as QEMU lives if the guest stands still because of us. `note` is told how far it is.
pub(crate) async fn after_death(
    vm: &Vm,
    state: &mut State,
    note: impl Fn(&State),
) -> Result<Report> {
    let begin = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let result = try_after_death(vm, state).await;
        note(state);
        let limit = match &result {
            Ok(report) if report.left.is_empty() => return result,
            _ if state.frozen.is_some() || state.stopped => None,
            Ok(_) => Some(REFUSED_LIMIT),
            Err(_) => Some(AGAIN_LIMIT),
        };
        if limit.is_some_and(|limit| begin.elapsed() + pause > limit) {
            return result;
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn try_after_death(vm: &Vm, state: &mut State) -> Result<Report> {
    let mut report = Report { done: kill_servers(state), left: Vec::new() };
    // Before the monitor: a frozen guest hurts most, and the agent needs no QMP. But the agent
    // of a stopped guest cannot answer: that one is thawed once it goes on.
    if !state.stopped {
        thaw(state, &mut report.done, &mut Vec::new()).await;
        if *state == (State { committing: state.committing, ..State::default() }) {
            return Ok(report);
        }
    }
    let session = match connect_patiently(vm).await {
        Ok(session) => session,
        Err(error) if error.kind() == Kind::NotFound => {
            remove_directory(state);
            report.done.push("QEMU is gone".to_owned());
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    set_right(&session, state, &mut report).await?;
    Ok(report)
}

async fn connect_patiently(vm: &Vm) -> Result<Session> {
    let end = Instant::now() + CONNECT_LIMIT;
    loop {
        match Session::connect(vm).await {
            Err(error) if error.kind() == Kind::Busy && Instant::now() < end => {
                sleep(LOOK_AGAIN).await;
            }
            other => return other,
        }
    }
}

/// Go on, thaw, end the view, merge bitmaps back.
async fn set_right(session: &Session, state: &mut State, report: &mut Report) -> Result<()> {
    end_noted_view(session, state, report).await?;
    if !state.committing {
        let bitmaps = end::merge_back(session, &state.pairs).await?;
        report.done.extend(bitmaps.done);
        report.left.extend(bitmaps.left);
    }
    Ok(())
}

/// The part of it that is right whatever became of the backup: all but the bitmaps.
async fn end_noted_view(session: &Session, state: &mut State, report: &mut Report) -> Result<()> {
    // What stands still, is frozen, or serves in a QEMU that was started since is not our doing.
    let now = session.peer().and_then(|peer| peer.pid);
    if state.qemu.is_some() && now.is_some() && state.qemu != now {
        (state.stopped, state.frozen, state.server) = (false, None, false);
    }
    if state.stopped {
        let gone_on = end::let_guest_go_on(session, true).await.context(|| {
            let name = &session.identity().name;
            format!("VM {name}: a backup stopped it and died; it cannot be set going (try `cont`)")
        })?;
        if gone_on {
            report.done.push("let the guest go on".to_owned());
        }
    }
    state.stopped = false;
    thaw(state, &mut report.done, &mut report.left).await;
    let view = end::end_views(session, PREFIX, state.server).await?;
    // From here on it can be someone else's.
    state.server = false;
    let had_view = !view.done.is_empty() || !state.snapshot.is_empty();
    report.done.extend(view.done);
    report.left.extend(view.left);
    // A full scratch of a job's view pauses the guest; that view is gone now.
    if had_view && end::let_guest_go_on(session, false).await? {
        report.done.push("let the guest go on".to_owned());
    }
    remove_directory(state);
    Ok(())
}

/// Thaws what is frozen, and notes that.
async fn thaw(state: &mut State, done: &mut Vec<String>, left: &mut Vec<String>) {
    let Some(path) = state.frozen.clone() else { return };
    let mut last = None;
    for _ in 0..THAW_TRIES {
        match agent::thaw_at(&path).await {
            Ok(_) => {
                done.push("thawed the guest's file systems".to_owned());
                state.frozen = None;
                return;
            }
            Err(error) => last = Some(error),
        }
    }
    if let Some(error) = last {
        left.push(format!("the guest's file systems may be frozen: {error}"));
    }
}

fn remove_directory(state: &State) {
    if let Some(directory) = &state.directory {
        drop(std::fs::remove_dir_all(directory));
    }
}

/// Ends the servers of pushed disks, if those processes are still what they were; in words.
fn kill_servers(state: &mut State) -> Vec<String> {
    let mut done = Vec::new();
    let servers = std::mem::take(&mut state.servers);
    let Some(directory) = &state.directory else { return done };
    for pid in servers {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { continue };
        // Before it is looked at: the one that was looked at is the one that is killed.
        let Ok(handle) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let number = pid.as_raw_nonzero();
        if serves_from(number.get(), directory)
            && rustix::process::pidfd_send_signal(&handle, Signal::KILL).is_ok()
        {
            done.push(format!("ended the server of a pushed disk (process {number})"));
        }
    }
    done
}

/// Is it a `qemu-nbd` with its socket in that view's directory? Process ids are given again, what was
/// noted can be days old, and other programs start servers too; no two views have one directory.
fn serves_from(pid: i32, directory: &Path) -> bool {
    let read = |what: &str| std::fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
    let line = read("cmdline");
    let mut words = line.split(|&byte| byte == 0).map(|word| Path::new(OsStr::from_bytes(word)));
    read("comm").trim_ascii() == b"qemu-nbd" && words.any(|word| word.starts_with(directory))
}

fn signal(pid: Pid, signal: Signal) -> Result<()> {
    match kill_process(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => {
            let text = format!("ending the backup (process {})", pid.as_raw_nonzero());
            Err(Error::caused(Kind::NotPermitted, text, e))
        }
    }
}

/// Waits until the guard of a run that ended just now is done, within [`PREDECESSOR_LIMIT`].
///
/// # Errors
/// `NotPermitted`: the run directory is not ours.
pub async fn wait_for_guard(run_dir: &Path, vm: &Vm) -> Result<()> {
    wait_free(&Files::new(run_dir, &vm.qmp).guard, PREDECESSOR_LIMIT).await.map(drop)
}

async fn wait_free(path: &Path, limit: Duration) -> Result<bool> {
    let end = Instant::now() + limit;
    while holder(path)?.is_some() {
        if Instant::now() >= end {
            return Ok(false);
        }
        sleep(LOOK_AGAIN).await;
    }
    Ok(true)
}

fn read_state(files: &Files) -> State {
    std::fs::read(&files.state)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

/// Bitmaps of runs that nobody remembers: where one stopped recording and others of the same disk
/// and store went on, those go into it.
async fn merge_unknown(session: &Session, report: &mut Report) -> Result<()> {
    let mut actions = Vec::new();
    for disk in disk::list(session).await?.disks {
        let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for bitmap in disk.bitmaps.iter().filter(|b| !b.inconsistent && !b.busy) {
            groups.entry((&bitmap.name.store, bitmap.name.disk)).or_default().push(bitmap);
        }
        for group in groups.values() {
            let older: Vec<_> = group.iter().filter(|b| !b.recording).collect();
            let newer: Vec<_> =
                group.iter().filter(|b| b.recording).map(|b| b.name.to_string()).collect();
            if let ([older], false) = (older.as_slice(), newer.is_empty()) {
                report.done.push(format!("merged {} into {}", newer.join(", "), older.name));
                let into = older.name.to_string();
                actions.push(Action::MergeBack { node: disk.node.clone(), from: newer, into });
            }
        }
    }
    carry_out(session, &actions).await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};

    /// A process of that name which was given that socket; it ends with its input.
    fn pretend(dir: &Path, name: &str, socket: &Path) -> Child {
        let program = dir.join(name);
        if !program.exists() {
            std::os::unix::fs::symlink("/bin/sh", &program).unwrap();
        }
        let mut command = Command::new(program);
        command.args(["-c", "read line", "-k"]).arg(socket).stdin(Stdio::piped()).spawn().unwrap()
    }

    #[test]
    fn only_the_server_of_that_view_is_ended() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        let (directory, another) = (dir.join("fleece-abc"), dir.join("fleece-abcd"));
        let mut ours = pretend(dir, "qemu-nbd", &directory.join("0.sock"));
        let mut others = [
            pretend(dir, "qemu-nbd", &another.join("0.sock")),
            pretend(dir, "other", &directory.join("0.sock")),
        ];
        let servers = others.iter().map(Child::id).chain([ours.id(), u32::MAX]).collect();
        let mut state = State { directory: Some(directory), servers, ..State::default() };
        let done = kill_servers(&mut state);
        assert_eq!(done, [format!("ended the server of a pushed disk (process {})", ours.id())]);
        assert!(state.servers.is_empty());
        assert_eq!(ours.wait().unwrap().signal(), Some(9));
        for other in &mut others {
            assert!(other.try_wait().unwrap().is_none());
            other.kill().unwrap();
            other.wait().unwrap();
        }
    }
}
