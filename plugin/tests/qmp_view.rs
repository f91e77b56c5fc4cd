//! The three ways to a point in time, against a real QEMU: what is read is what was there, whatever
//! the guest writes meanwhile; success and failure leave the VM as it was; nothing dirty is lost.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod qmp_support;

use fleece::nbd::{ConnectOptions, Export, NbdTarget};
use fleece::qmp::bitmap::Base;
use fleece::qmp::session::Session;
use fleece::qmp::view::{Outcome, View, Way};
use qmp_support::*;
use std::time::Duration;

/// A few writes that differ from round to round; some over old ones, some not aligned.
fn write_some(qemu: &mut Qemu, round: u8) {
    for disk in 0..qemu.images.len() {
        let shift = u64::from(round % 10 + round / 100) * 192 * 1024 + disk as u64 * 4096;
        qemu.write(disk, round, shift, 128 * 1024);
        qemu.write(disk, round ^ 0x55, 4 * MIB + 512, 1024);
        qemu.write(disk, round ^ 0xAA, 7 * MIB - shift, 70_000 / 512 * 512);
    }
}

/// Eight rounds: each reads a view while the guest goes on, every third fails, one restart.
async fn rounds(mut qemu: Qemu, way: Way) {
    let dir = qemu.dir.clone();
    let mut memory = Memory::default();
    let mut replicas = vec![Vec::new(); qemu.images.len()];
    write_some(&mut qemu, 1);
    for round in 2..10u8 {
        if round == 7 {
            qemu = qemu.restart(true);
        }
        let session = Session::connect(&qemu.vm()).await.unwrap();
        let disks = memory.plan(&session).await;
        for (disk, plan) in &disks {
            let incremental = matches!(plan.base, Base::Incremental { .. });
            assert_eq!(
                incremental,
                round > 2 && (disk.format == "qcow2" || round != 7),
                "{plan:?}"
            );
        }
        let snapshot = format!("snap{round}");
        let mut guard = guard(&dir, &qemu.vm());
        write_some(&mut qemu, round);
        let truth = qemu.contents();
        let mut view =
            open(&session, &mut guard, request(&dir, &snapshot, disks.clone(), Some(way))).await;
        write_some(&mut qemu, round + 100);
        let fails = round % 3 == 0;
        for (i, target) in view.targets().iter().enumerate() {
            assert_eq!(target.way, way);
            if way != Way::Push || target.dirty_context.is_none() {
                assert_same("view", &read_all(&dir, target), &truth[i]);
            }
            if !fails {
                update(&dir, &mut replicas[i], target, &disks[i].1);
                assert_same("replica", &replicas[i], &truth[i]);
            }
        }
        view.still_valid(&session).await.unwrap();
        let outcome = if fails { Outcome::Failed } else { Outcome::Committed };
        view.teardown(&session, outcome).await.unwrap();
        view.teardown(&session, outcome).await.unwrap();
        guard.done();
        if !fails {
            memory.committed(&snapshot, &disks);
        }
        qemu.assert_clean();
        for i in 0..qemu.images.len() {
            let latest = memory.latest.clone();
            assert_eq!(qemu.bitmaps(i), [(latest, true)], "one bitmap, of the latest snapshot");
        }
        assert!(!dir.join(format!("fleece-{snapshot}")).exists());
    }
}

#[tokio::test]
async fn filter_is_exact() {
    rounds(Qemu::start(&[QCOW2]), Way::Filter).await;
}

#[tokio::test]
async fn filter_of_two_disks_is_exact() {
    rounds(Qemu::start(&[QCOW2, QCOW2]), Way::Filter).await;
}

#[tokio::test]
async fn job_is_exact() {
    rounds(Qemu::start(&[QCOW2, QCOW2]), Way::Job).await;
}

#[tokio::test]
async fn push_is_exact() {
    rounds(Qemu::start(&[QCOW2, Spec { iothread: true, ..QCOW2 }]), Way::Push).await;
}

#[tokio::test]
async fn raw_disks_are_exact_until_a_restart() {
    rounds(Qemu::start(&[Spec { format: "raw", ..QCOW2 }]), Way::Filter).await;
}

#[tokio::test]
async fn an_iothread_decides_the_way() {
    let qemu = Qemu::start(&[QCOW2, Spec { iothread: true, ..QCOW2 }]);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let disks = Memory::default().plan(&session).await;
    assert_eq!(disks.iter().map(|(d, _)| d.iothread).collect::<Vec<_>>(), [false, true]);
    let mut guard = guard(&qemu.dir, &qemu.vm());
    let mut view = open(&session, &mut guard, request(&qemu.dir, "mixed", disks, None)).await;
    let ways: Vec<Way> = view.targets().iter().map(|t| t.way).collect();
    // Neither may be stopped, which filters would need; 7.2 would abort when a client leaves.
    let expected = match session.features().iothread_safe {
        false => [Way::Job, Way::Push],
        true => [Way::Job, Way::Job],
    };
    assert_eq!(ways, expected);
    for (target, content) in view.targets().iter().zip(qemu.contents()) {
        assert_same("view", &read_all(&qemu.dir, target), &content);
    }
    view.teardown(&session, Outcome::Failed).await.unwrap();
    guard.done();
    let mut qemu = qemu;
    qemu.assert_clean();
}

#[tokio::test]
async fn the_view_has_as_many_connections_as_many_disks_need() {
    let mut qemu = Qemu::start(&[QCOW2]);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let disks = Memory::default().plan(&session).await;
    let mut guard = guard(&qemu.dir, &qemu.vm());
    let mut view = open(&session, &mut guard, request(&qemu.dir, "many", disks, None)).await;
    let target = &view.targets()[0];
    let place = NbdTarget::unix(&target.socket, target.export.as_str());
    // Those of 30 disks. One that is not greeted in time would be done without.
    let options = ConnectOptions {
        connections: 120,
        connect_timeout: Duration::from_secs(60),
        ..ConnectOptions::default()
    };
    let export = Export::connect(&place, &options).await.unwrap();
    assert_eq!(export.connections(), 120);
    drop(export);
    view.teardown(&session, Outcome::Failed).await.unwrap();
    guard.done();
    qemu.assert_clean();
}

#[tokio::test]
async fn a_second_nbd_server_is_busy_and_stays() {
    let mut qemu = Qemu::start(&[QCOW2]);
    let socket = qemu.dir.join("other.sock");
    let address = serde_json::json!({"addr": {"type": "unix", "data": {"path": socket}}});
    qemu.monitor.call("nbd-server-start", address);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let disks = Memory::default().plan(&session).await;
    let mut guard = guard(&qemu.dir, &qemu.vm());
    let error = View::open(&session, &mut guard, request(&qemu.dir, "busy", disks, None))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), fleece::error::Kind::Busy, "{error}");
    guard.done();
    // It is not ours to stop.
    qemu.monitor.call("nbd-server-stop", serde_json::json!({}));
    qemu.assert_clean();
    assert!(qemu.bitmaps(0).is_empty());
}

#[tokio::test]
async fn an_external_snapshot_after_the_plan_is_noticed() {
    let mut qemu = Qemu::start(&[QCOW2]);
    let session = Session::connect(&qemu.vm()).await.unwrap();
    let disks = Memory::default().plan(&session).await;
    let overlay = serde_json::json!({
        "node-name": disks[0].0.node, "snapshot-node-name": "over",
        "snapshot-file": qemu.dir.join("over.qcow2"), "format": "qcow2",
    });
    qemu.monitor.call("blockdev-snapshot-sync", overlay);
    let mut guard = guard(&qemu.dir, &qemu.vm());
    let error = View::open(&session, &mut guard, request(&qemu.dir, "over", disks, None))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), fleece::error::Kind::Busy, "{error}");
    assert!(error.to_string().contains("changed while the backup began"), "{error}");
    guard.done();
    assert!(qemu.bitmaps(0).is_empty());
}
