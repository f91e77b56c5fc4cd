//! Whatever dies, the guest goes on: scratch full, worker killed, QEMU killed, view ended by someone.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod qmp_support;

use fleece::nbd::{ConnectOptions, Export, NbdTarget};
use fleece::qmp::bitmap::Base;
use fleece::qmp::recover;
use fleece::qmp::running::Lock;
use fleece::qmp::session::Session;
use fleece::qmp::view::{Outcome, Request, View, Way};
use fleece::vms::Vm;
use qmp_support::*;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const WORKER: &str = "FLEECE_TEST_WORKER";

/// Not a test: a worker to be killed. `socket`, `way`, and where to stop, from the environment.
#[tokio::test]
async fn worker() {
    let Ok(given) = std::env::var(WORKER) else { return };
    let mut given = given.split('|');
    let (dir, way, snapshot) = (
        PathBuf::from(given.next().unwrap()),
        way_of(given.next().unwrap()),
        given.next().unwrap().to_owned(),
    );
    let vm = Vm::at_socket(&dir.join("qmp.sock"), Some("test"));
    let _lock = Lock::take(&dir.join("run"), &vm.qmp).unwrap();
    let session = Session::connect(&vm).await.unwrap();
    let _vm_lock = Lock::of_vm(&dir.join("run"), session.identity().uuid).unwrap();
    let mut memory = Memory::default();
    let earlier: Vec<String> = given.map(str::to_owned).collect();
    for snapshot in earlier {
        memory.fates.insert(snapshot.clone(), fleece::qmp::bitmap::Fate::Committed);
        memory.latest = snapshot;
    }
    let disks = memory.plan(&session).await;
    let mut guard = guard(&dir, &vm);
    let _view = open(&session, &mut guard, request(&dir, &snapshot, disks, way)).await;
    std::fs::write(dir.join("open"), guard.pid().to_string()).unwrap();
    std::future::pending::<()>().await;
}

fn way_of(word: &str) -> Option<Way> {
    [Way::Filter, Way::Job, Way::Push].into_iter().find(|w| w.to_string() == word)
}

struct Worker(Child);

impl Worker {
    /// Starts one and waits until its view is open; the guard's process id is the second.
    fn start(dir: &Path, way: &str, snapshot: &str, earlier: &[&str]) -> (Worker, u32) {
        drop(std::fs::remove_file(dir.join("open")));
        let given = [&[dir.to_str().unwrap(), way, snapshot], earlier].concat().join("|");
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "worker", "--nocapture"])
            .env(WORKER, given)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut worker = Worker(child);
        let guard = wait_for("the view of the worker", || {
            assert!(worker.0.try_wait().unwrap().is_none(), "the worker ended");
            std::fs::read_to_string(dir.join("open")).ok()?.parse().ok()
        });
        (worker, guard)
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn ended(pid: u32) -> bool {
    // A zombie of another parent is gone too.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |s| s.contains(") Z "))
}

/// A committed first backup, so that there is something to merge back into.
async fn first_backup(qemu: &mut Qemu, snapshot: &str) -> Memory {
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let mut memory = Memory::default();
    let disks = memory.plan(&session).await;
    let mut guard = guard(&qemu.dir, &qemu.vm());
    let mut view =
        open(&session, &mut guard, request(&qemu.dir, snapshot, disks.clone(), None)).await;
    view.teardown(&session, Outcome::Committed).await.unwrap();
    guard.done();
    memory.committed(snapshot, &disks);
    memory
}

#[tokio::test]
async fn a_killed_worker_is_cleaned_up_by_its_guard() {
    for (way, specs) in [
        ("filter", vec![QCOW2, QCOW2]),
        ("job", vec![QCOW2, QCOW2]),
        ("push", vec![Spec { iothread: true, ..QCOW2 }]),
    ] {
        let mut qemu = Qemu::start(&specs);
        let mut memory = first_backup(&mut qemu, "first").await;
        qemu.write(0, 1, 0, MIB);
        let (worker, guard_pid) = Worker::start(&qemu.dir, way, "second", &["first"]);
        qemu.write(0, 2, 2 * MIB, MIB);
        // A service that is stopped ends all its processes; the guard has to outlive that.
        for signal in ["-TERM", "-INT", "-HUP"] {
            run("kill", &[signal, &guard_pid.to_string()]);
        }
        worker.kill();
        wait_for("the guard's end", || ended(guard_pid).then_some(()));
        qemu.assert_clean();
        assert_eq!(qemu.bitmaps(0), [("first".to_owned(), true)], "{way}");
        let log = std::fs::read_to_string(qemu.dir.join("guard.log")).unwrap();
        assert!(log.ends_with("left: \n"), "{log}");
        assert!(!qemu.dir.join("fleece-second").exists());
        // Both writes are dirty: before and during the dead backup.
        let session = Session::connect(&qemu.vm()).await.unwrap();
        let disks = memory.plan(&session).await;
        assert_eq!(disks[0].1.base, Base::Incremental { parent: "first".into() });
        let mut guard = guard(&qemu.dir, &qemu.vm());
        let mut view =
            open(&session, &mut guard, request(&qemu.dir, "third", disks.clone(), way_of(way)))
                .await;
        assert_eq!(dirty(&view.targets()[0]), [(0, MIB), (2 * MIB, MIB)], "{way}");
        view.teardown(&session, Outcome::Failed).await.unwrap();
        guard.done();
    }
}

#[tokio::test]
async fn cleanup_does_what_a_dead_guard_could_not() {
    let mut qemu = Qemu::start(&[QCOW2]);
    let mut memory = first_backup(&mut qemu, "first").await;
    let run = qemu.dir.join("run");
    let (worker, guard_pid) = Worker::start(&qemu.dir, "filter", "second", &["first"]);
    let busy = recover::cleanup(&run, &qemu.vm()).await.unwrap_err();
    assert_eq!(busy.kind(), fleece::error::Kind::Busy, "{busy}");
    let uuid = uuid::Uuid::parse_str("5f2c8b1e-7a54-4d0f-9c53-000000000001").unwrap();
    assert_eq!(Lock::of_vm(&run, uuid).unwrap_err().kind(), fleece::error::Kind::Busy);
    qemu.write(0, 2, 2 * MIB, MIB);
    Command::new("kill").args(["-9", &guard_pid.to_string()]).status().unwrap();
    worker.kill();
    wait_for("the guard's end", || ended(guard_pid).then_some(()));
    // What a guest stopped by us would look like.
    let report = recover::cleanup(&run, &qemu.vm()).await.unwrap();
    assert!(report.left.is_empty() && !report.done.is_empty(), "{report:?}");
    qemu.assert_clean();
    assert_eq!(qemu.bitmaps(0), [("first".to_owned(), true)]);
    assert!(!qemu.dir.join("fleece-second").exists());
    let again = recover::cleanup(&run, &qemu.vm()).await.unwrap();
    assert!(again.done.is_empty() && again.left.is_empty(), "{again:?}");
    let session = Session::connect(&qemu.vm()).await.unwrap();
    assert_eq!(memory.plan(&session).await[0].1.parent(), "first");
}

/// The file with what a run noted for the next one.
fn noted(qemu: &Qemu) -> PathBuf {
    std::fs::read_dir(qemu.dir.join("run"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "state"))
        .unwrap()
}

/// Changes what is noted.
fn note(state: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(state).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(state, text.replace(from, to)).unwrap();
}

/// A run that is dead, and its guard too: that one first, so that it cannot help.
fn both_dead(qemu: &Qemu, way: &str) -> PathBuf {
    let (worker, guard_pid) = Worker::start(&qemu.dir, way, "second", &[]);
    Command::new("kill").args(["-9", &guard_pid.to_string()]).status().unwrap();
    worker.kill();
    noted(qemu)
}

/// As if they had died between `stop` and `cont`.
fn dead_and_stopped() -> (Qemu, PathBuf) {
    let mut qemu = Qemu::start(&[QCOW2]);
    let state = both_dead(&qemu, "filter");
    qemu.monitor.call("stop", json!({}));
    note(&state, "\"stopped\":false", "\"stopped\":true");
    (qemu, state)
}

#[tokio::test]
async fn a_guest_that_we_stopped_goes_on_when_both_are_dead() {
    let (mut qemu, state) = dead_and_stopped();
    recover::abort(&qemu.dir.join("run"), &qemu.vm()).await.unwrap();
    qemu.assert_clean();
    assert!(qemu.bitmaps(0).is_empty());
    assert!(!state.exists());
}

#[tokio::test]
async fn what_the_next_backup_cannot_set_right_stays_noted() {
    let (mut qemu, state) = dead_and_stopped();
    let run = qemu.dir.join("run");
    note(&state, "\"frozen\":null", "\"frozen\":\"/nowhere\"");
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let mut report = recover::Report::default();
    let error = recover::end_leftovers(&run, &session, &mut report).await.unwrap_err();
    assert!(error.to_string().contains("agent at /nowhere does not thaw"), "{error}");
    assert!(report.done.iter().any(|what| what == "let the guest go on"), "{report:?}");
    qemu.assert_clean();
    // Its operator may stop the guest now. What the bitmap is worth, only the engine knows.
    let text = std::fs::read_to_string(&state).unwrap();
    assert!(text.contains("/nowhere") && text.contains("\"stopped\":false"), "{text}");
    assert_eq!(qemu.bitmaps(0), [("second".to_owned(), true)]);
    note(&state, "\"/nowhere\"", "null");
    Memory::default().plan(&session).await;
    drop(session);
    qemu.assert_clean();
    assert!(qemu.bitmaps(0).is_empty());
    let report = recover::cleanup(&run, &qemu.vm()).await.unwrap();
    assert!(report.done.is_empty() && report.left.is_empty(), "{report:?}");
    assert!(!state.exists());
}

#[tokio::test]
async fn what_was_noted_of_another_qemu_is_not_undone_in_this_one() {
    let (mut qemu, state) = dead_and_stopped();
    let text = std::fs::read_to_string(&state).unwrap();
    let noted: serde_json::Value = serde_json::from_str(&text).unwrap();
    note(&state, &format!("\"qemu\":{}", noted["qemu"]), "\"qemu\":1");
    note(&state, "\"frozen\":null", "\"frozen\":\"/nowhere\"");
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let mut report = recover::Report::default();
    recover::end_leftovers(&qemu.dir.join("run"), &session, &mut report).await.unwrap();
    assert!(!report.done.iter().any(|what| what.contains("go on")), "{report:?}");
    assert_eq!(qemu.monitor.call("query-status", json!({}))["status"], "paused");
}

#[tokio::test]
async fn the_server_of_a_pushed_disk_dies_with_its_run() {
    let mut qemu = Qemu::start(&[Spec { iothread: true, ..QCOW2 }]);
    let state = both_dead(&qemu, "push");
    let text = std::fs::read_to_string(state).unwrap();
    let state: serde_json::Value = serde_json::from_str(&text).unwrap();
    let server = u32::try_from(state["servers"][0].as_u64().unwrap()).unwrap();
    wait_for("the server's end", || ended(server).then_some(()));
    recover::cleanup(&qemu.dir.join("run"), &qemu.vm()).await.unwrap();
    qemu.assert_clean();
    assert!(qemu.bitmaps(0).is_empty());
}

#[tokio::test]
async fn abort_ends_a_running_backup_in_time() {
    let mut qemu = Qemu::start(&[QCOW2]);
    let (mut worker, _) = Worker::start(&qemu.dir, "job", "second", &[]);
    // Ours does not handle SIGTERM: it dies, and the guard does the work. Reaped here, as a shell does.
    let begin = std::time::Instant::now();
    let reaper = std::thread::spawn(move || worker.0.wait());
    let report = recover::abort(&qemu.dir.join("run"), &qemu.vm()).await.unwrap();
    assert!(begin.elapsed().as_secs() < 5, "{report:?}");
    reaper.join().unwrap().unwrap();
    qemu.assert_clean();
    assert!(qemu.bitmaps(0).is_empty());
}

/// Why the view broke; it must, within 30 s.
async fn broken(view: &View, session: &Session) -> String {
    let limit = std::time::Duration::from_secs(30);
    tokio::time::timeout(limit, view.broken(session))
        .await
        .expect("the view does not break")
        .to_string()
}

#[tokio::test]
async fn a_full_scratch_spares_the_guest() {
    // The way job needs a real guest for this: the pause is the device's doing.
    let mut qemu = Qemu::start(&[QCOW2]);
    qemu.write(0, 9, 0, 8 * MIB);
    let truth = qemu.contents();
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let disks = Memory::default().plan(&session).await;
    let mut guard = guard(&qemu.dir, &qemu.vm());
    let cap = Some(2 * MIB);
    let small =
        Request { scratch_max: cap, ..request(&qemu.dir, "small", disks, Some(Way::Filter)) };
    let mut view = open(&session, &mut guard, small).await;
    assert_same("view", &read_all(&qemu.dir, &view.targets()[0]), &truth[0]);
    qemu.write(0, 3, 0, 6 * MIB);
    let target = &view.targets()[0];
    let place = NbdTarget::unix(&target.socket, target.export.as_str());
    let export = Export::connect(&place, &ConnectOptions::default()).await.unwrap();
    let failed = export.read(0, 4096).await.expect_err("a broken snapshot must not be read");
    assert!(failed.is_view_broken(), "{failed}");
    drop(export);
    let failed = fleece::error::Error::caused(fleece::error::Kind::Failed, "a read", failed);
    let error = view.explain(&session, failed).await.to_string();
    assert!(error.contains("scratch") && error.contains("full"), "{error}");
    assert!(error.contains("a read: NBD export"), "what was answered is told, too: {error}");
    assert!(view.scratch_peak() <= 2 * MIB, "{}", view.scratch_peak());
    view.teardown(&session, Outcome::Failed).await.unwrap();
    guard.done();
    qemu.assert_clean();
    qemu.write(0, 4, 0, MIB);
}

#[tokio::test]
async fn a_killed_qemu_makes_a_full_read() {
    let mut qemu = Qemu::start(&[QCOW2, QCOW2]);
    let mut memory = first_backup(&mut qemu, "first").await;
    // Stored once, so that it is there, in use, after the kill.
    let mut qemu = qemu.restart(true).restart(false);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let disks = memory.plan(&session).await;
    for (disk, plan) in &disks {
        assert!(disk.bitmaps[0].inconsistent);
        let Base::Full { reason } = &plan.base else { panic!("{plan:?}") };
        assert!(reason.contains("inconsistent"), "{reason}");
        assert_eq!(plan.uuid, memory.known.iter().find(|k| k.label == disk.label).unwrap().uuid);
    }
    assert!(qemu.bitmaps(0).is_empty());
}

#[tokio::test]
async fn qemu_ending_under_a_view_is_no_error_of_the_teardown() {
    let mut qemu = Qemu::start(&[QCOW2]);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let disks = Memory::default().plan(&session).await;
    let mut guard = guard(&qemu.dir, &qemu.vm());
    let mut view = open(&session, &mut guard, request(&qemu.dir, "gone", disks, None)).await;
    qemu.kill();
    assert!(broken(&view, &session).await.contains("powered off"));
    assert!(view.still_valid(&session).await.is_err());
    view.teardown(&session, Outcome::Failed).await.unwrap();
    guard.done();
}

#[tokio::test]
async fn a_view_that_someone_ends_is_not_valid() {
    let mut qemu = Qemu::start(&[QCOW2]);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    for (way, command, arguments) in [
        (Way::Filter, "block-export-del", json!({"id": "fleece-x-0-export", "mode": "hard"})),
        (Way::Job, "block-job-cancel", json!({"device": "fleece-x-0-job"})),
    ] {
        let disks = Memory::default().plan(&session).await;
        let mut guard = guard(&qemu.dir, &qemu.vm());
        let mut view = open(&session, &mut guard, request(&qemu.dir, "x", disks, Some(way))).await;
        view.still_valid(&session).await.unwrap();
        qemu.monitor.call(command, arguments);
        assert!(broken(&view, &session).await.contains("the frozen view is lost"), "{command}");
        assert!(view.still_valid(&session).await.is_err(), "{command}");
        view.teardown(&session, Outcome::Failed).await.unwrap();
        guard.done();
        qemu.assert_clean();
    }
}
