//! Connecting: to QEMU, to a monitor that someone else holds, to things that are not QEMU.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod qmp_support;

use fleece::error::Kind;
use fleece::qmp::check::check;
use fleece::qmp::disk;
use fleece::qmp::session::{Session, uuid_of_name};
use fleece::vms::Vm;
use qmp_support::*;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};

#[tokio::test]
async fn a_vm_says_who_it_is() {
    let qemu = Qemu::start(&[QCOW2]);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    assert_eq!(session.identity().uuid.to_string(), "5f2c8b1e-7a54-4d0f-9c53-000000000001");
    assert!(!session.identity().derived);
    let bare = Vm::at_socket(&qemu.dir.join("test.sock"), None);
    drop(session);
    let config: serde_json::Value = {
        let session = wait_connect(&qemu.vm()).await;
        serde_json::from_slice(&session.configuration().await.unwrap()).unwrap()
    };
    assert!(config["command-line"][0].as_str().unwrap().contains("qemu-system"), "{config}");
    assert_eq!(config["block"][0]["inserted"]["node-name"], "disk0");
    // The tests hold that one.
    assert_eq!(Session::connect(&bare).await.err().unwrap().kind(), Kind::Busy);
}

/// QEMU takes the next client as soon as it has seen the last one go.
async fn wait_connect(vm: &Vm) -> Session {
    Session::connect(vm).await.unwrap()
}

#[tokio::test]
async fn a_monitor_that_someone_holds_is_busy() {
    let qemu = Qemu::start(&[]);
    let _first = Session::connect(&qemu.vm()).await.unwrap();
    let error = Session::connect(&qemu.vm()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.to_string().contains("another program holds this monitor"), "{error}");
}

#[tokio::test]
async fn what_is_not_qemu_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.sock");
    let vm = Vm::at_socket(&path, Some("web1"));
    let absent = Session::connect(&vm).await.err().unwrap();
    assert_eq!(absent.kind(), Kind::NotFound);
    assert!(
        absent.to_string().contains("web1") && absent.to_string().contains("a.sock"),
        "{absent}"
    );
    for greeting in
        ["NBDMAGICIHAVEOPT", "QEMU 7.2.22 monitor - type 'help'\r\n", "{\"return\": 3}\n"]
    {
        drop(std::fs::remove_file(&path));
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || -> Option<UnixStream> {
            let (mut stream, _) = listener.accept().ok()?;
            stream.write_all(greeting.as_bytes()).ok()?;
            Some(stream)
        });
        let error = Session::connect(&vm).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Failed, "{error}");
        assert!(error.to_string().contains("is not a QMP monitor"), "{error}");
        drop(server.join());
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_does_no_harm() {
    let qemu = Qemu::start(&[QCOW2]);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    for _ in 0..50 {
        tokio::select! {
            biased;
            _ = disk::list(&session) => panic!("cannot be that fast"),
            () = tokio::task::yield_now() => {}
        }
    }
    assert_eq!(disk::list(&session).await.unwrap().disks.len(), 1);
}

#[tokio::test]
async fn qemu_going_away_is_noticed_at_once() {
    let mut qemu = Qemu::start(&[QCOW2]);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    qemu.kill();
    let error = disk::list(&session).await.unwrap_err();
    assert!(error.to_string().contains("went away"), "{error}");
}

#[tokio::test]
async fn check_changes_nothing_and_names_the_way() {
    let mut qemu =
        Qemu::start(&[QCOW2, Spec { format: "raw", ..QCOW2 }, Spec { iothread: true, ..QCOW2 }]);
    let report = check(&qemu.vm(), &qemu.dir).await.unwrap();
    let ways: Vec<&str> = report.disks.iter().map(|d| d.way.as_str()).collect();
    // Beside a disk with an iothread, which the instant must not stop.
    assert_eq!(ways[..2], ["job", "job"]);
    assert_eq!(report.status, "running");
    assert!(report.obstacles.iter().any(|o| o.contains("vdb: a raw disk")), "{report:?}");
    assert_eq!(report.agent, "none");
    qemu.assert_clean();
}

#[test]
fn a_name_gives_the_same_uuid_for_ever() {
    assert_eq!(uuid_of_name("web1").to_string(), uuid_of_name("web1").to_string());
    assert_ne!(uuid_of_name("web1"), uuid_of_name("web2"));
    assert_eq!(uuid_of_name("web1").get_version_num(), 5);
}
