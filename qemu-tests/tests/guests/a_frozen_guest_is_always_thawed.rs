//! fs-freeze by the guest agent around the point in time: the file system in the snapshot is
//! clean and complete, and the guest thaws whatever happens.

use std::path::Path;
use std::process::Command;

use qemu_tests::fixture::snapshot_id;
use qemu_tests::guest::Guest;
use qemu_tests::proxy::{Hold, Proxy};
use qemu_tests::wait::{LONG, SOON, wait_until};
use qemu_tests::{Fixture, MIB, Machine, Result, tools};
use serde_json::json;

/// A guest with a mounted ext4 and an agent that answers.
fn mounted(fixture: &Fixture, name: &str) -> Result<(Machine, Guest)> {
    let mut machine =
        Machine::new(fixture.folder(), name)?.with_disk("raw", 64 * MIB)?.with_agent();
    tools::run(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&machine.disks[0].path))?;
    // A second disk: the point in time then needs its moment of standstill.
    machine = machine.with_disk("qcow2", 16 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey("mount vda")?;
    wait_until(SOON, "the agent opening its port", || {
        let chardevs = guest.qmp.execute("query-chardev", &json!({}))?;
        let agent =
            chardevs.as_array().into_iter().flatten().find(|one| one["label"] == "qga0").cloned();
        Ok(agent.is_some_and(|one| one["frontend-open"] == true))
    })?;
    Ok((machine, guest))
}

/// The file system in an image needs no repair and holds the file whole.
fn is_clean(image: &Path, file: &str, length: u64, seed: u64) -> Result {
    tools::run(Command::new("e2fsck").args(["-f", "-n"]).arg(image))?;
    let out = image.with_extension("file");
    tools::run(
        Command::new("debugfs").arg("-R").arg(format!("dump /{file} {}", out.display())).arg(image),
    )?;
    let expected = out.with_extension("expected");
    qemu_tests::image::raw(&expected, length, &[(0, length, seed)])?;
    qemu_tests::image::same(&expected, &out)
}

#[test]
fn the_snapshot_of_a_frozen_file_system_is_clean() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = mounted(&fixture, "frozen")?;
    for round in 1..=3 {
        guest.obey(&format!("file data {} {round}", 6 * MIB))?;
        let finished = fixture.backup(&machine, &["--freeze=require"])?.finish(LONG)?.code(0)?;
        assert!(finished.printed().contains("frozen"), "{}", finished.printed());
        // Thawed: it writes on.
        guest.obey("file other 1048576 9")?;
        guest.obey("sync")?;
        let snapshot = format!("frozen@{}", snapshot_id(&finished.printed())?);
        is_clean(&fixture.restore(&snapshot, "vda")?, "data", 6 * MIB, round)?;
    }
    Ok(())
}

#[test]
fn a_plugin_killed_while_the_guest_is_frozen() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = mounted(&fixture, "killed")?;
    let proxy = Proxy::start(&fixture.path("proxy"), &machine.socket(), "\"stop\"", Hold::After)?;
    let running = fixture.backup_through(proxy.path(), &machine, &["--freeze=require"])?;
    proxy.wait_held(SOON)?;
    running.kill()?;
    wait_until(SOON, "the guard letting the guest go on", || guest.qmp.runs())?;
    // Blocks until thawed.
    guest.obey("file data 1048576 1")?;
    guest.obey("sync")?;
    guest.is_left_alone(&machine, 0)
}

#[test]
fn a_guest_without_an_agent() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "agentless")?.with_disk("qcow2", 16 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey("write vda 0 1048576 1")?;
    fixture.backup(&machine, &["--freeze=require"])?.finish(LONG)?.code(1)?;
    assert_eq!(fixture.figure("snapshots")?, 0);
    let warned = fixture.backup(&machine, &["--freeze"])?.finish(LONG)?.code(3)?;
    assert!(warned.printed().contains("agent"), "{}", warned.printed());
    guest.is_left_alone(&machine, 1)
}
