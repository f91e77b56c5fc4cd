//! Plugin, engine, guest: each dies at the worst moment. The guest that remains goes on, nothing
//! of ours stays in it, and the next backup restores bit for bit.

use qemu_tests::fixture::snapshot_id;
use qemu_tests::guest::Guest;
use qemu_tests::process::send;
use qemu_tests::proxy::{Hold, Proxy};
use qemu_tests::scenario::{Taken, begin, truths, with_a_snapshot};
use qemu_tests::wait::{LONG, SOON, wait_until};
use qemu_tests::{Fixture, MIB, Machine, Result, take};
use rustix::process::Signal;

fn goes_on(fixture: &Fixture, machine: &Machine, guest: &mut Guest) -> Result {
    guest.keeps_writing()?;
    guest.is_left_alone(machine, machine.disks.len())?;
    let taken = take(fixture, machine, guest, "next")?;
    taken.mentions("incremental since")?;
    taken.restores_exactly(fixture)
}

#[test]
fn the_guest_powers_off_in_mid_backup() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "powered", 1)?;
    let reading = begin(&fixture, &machine, &mut guest, "off", &["--read-limit", "1M"])?;
    guest.power_off()?;
    reading.running.finish(LONG)?.code(1)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("start 8 {MIB} {} 1 vda", 16 * MIB))?;
    // QEMU stored both bitmaps when it ended; the next backup merges them.
    guest.is_left_alone(&machine, 2)?;
    let taken = take(&fixture, &machine, &mut guest, "merged")?;
    taken.mentions("incremental since")?;
    taken.restores_exactly(&fixture)?;
    goes_on(&fixture, &machine, &mut guest)
}

#[test]
fn the_plugin_is_killed_in_mid_backup() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "orphaned", 1)?;
    let reading = begin(&fixture, &machine, &mut guest, "killed", &["--read-limit", "1M"])?;
    reading.running.kill()?;
    goes_on(&fixture, &machine, &mut guest)
}

#[test]
fn the_plugin_is_killed_while_it_has_the_guest_stopped() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "stopped", 2)?;
    let proxy = Proxy::start(&fixture.path("proxy"), &machine.socket(), "\"stop\"", Hold::After)?;
    let running = fixture.backup_through(proxy.path(), &machine, &[])?;
    proxy.wait_held(SOON)?;
    assert_eq!(guest.qmp.status()?, "paused");
    running.kill()?;
    wait_until(SOON, "the guard letting the guest go on", || guest.qmp.runs())?;
    goes_on(&fixture, &machine, &mut guest)
}

/// Kills a plugin and its guard after a command of the monitor. The guard first: the end of its worker
/// is what it waits for. Gives the monitor, whose name what is noted of the VM goes by.
fn both_killed_after(command: &str, fixture: &Fixture, machine: &Machine) -> Result<Proxy> {
    let proxy = Proxy::start(&fixture.path("proxy"), &machine.socket(), command, Hold::After)?;
    let running = fixture.backup_through(proxy.path(), machine, &[])?;
    proxy.wait_held(SOON)?;
    send(running.child("guard")?, Signal::KILL)?;
    running.kill()?;
    Ok(proxy)
}

#[test]
fn the_plugin_and_its_guard_are_killed_and_the_next_backup_sets_it_right() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "forsaken", 2)?;
    for (command, status, done) in [
        ("\"stop\"", "paused", "set right: let the guest go on"),
        ("nbd-server-start", "running", "set right: stopped the NBD server"),
    ] {
        println!("killed after {command}");
        // Its writer rests: the truth is the same before the guest goes on and after.
        guest.obey("stop")?;
        guest.obey("sync")?;
        let proxy = both_killed_after(command, &fixture, &machine)?;
        assert_eq!(guest.qmp.status()?, status);
        let truths = truths(&fixture, &machine, status)?;
        let next = fixture.backup_through(proxy.path(), &machine, &[])?;
        let printed = next.finish(LONG)?.code(0)?;
        let snapshot = format!("{}@{}", machine.name, snapshot_id(&printed.printed())?);
        let taken = Taken { snapshot, truths, printed };
        taken.mentions(done)?;
        taken.mentions("incremental since")?;
        taken.restores_exactly(&fixture)?;
        guest.is_left_alone(&machine, 2)?;
        guest.obey(&format!("start 9 {MIB} {} 1 vda", 16 * MIB))?;
        goes_on(&fixture, &machine, &mut guest)?;
    }
    Ok(())
}

#[test]
fn a_guest_that_its_operator_paused_stays_paused() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "paused", 2)?;
    guest.pause()?;
    fixture.backup(&machine, &[])?.finish(LONG)?.code(0)?;
    assert_eq!(guest.qmp.status()?, "paused");
    guest.go_on()?;
    goes_on(&fixture, &machine, &mut guest)
}

#[test]
fn the_engine_is_killed_in_mid_backup() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "engineless", 1)?;
    let more = ["--read-limit", "1M", "--engine-wait", "0s"];
    let reading = begin(&fixture, &machine, &mut guest, "killed", &more)?;
    fixture.kill_engine()?;
    let finished = reading.running.finish(LONG)?;
    assert!([1, 13].contains(&finished.code), "{} {}", finished.code, finished.printed());
    assert!(finished.printed().contains("engine"), "{finished:?}");
    guest.keeps_writing()?;
    guest.is_left_alone(&machine, 1)?;
    fixture.start_engine()?;
    goes_on(&fixture, &machine, &mut guest)
}

#[test]
fn a_crash_between_manifest_and_bitmap_drop() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "between", 1)?;
    let hold = "block-dirty-bitmap-remove";
    let proxy = Proxy::start(&fixture.path("proxy"), &machine.socket(), hold, Hold::Before)?;
    let running = fixture.backup_through(proxy.path(), &machine, &[])?;
    proxy.wait_held(SOON)?;
    running.kill()?;
    assert_eq!(fixture.figure("snapshots")?, 2, "the manifest is the commit");
    guest.keeps_writing()?;
    let mut taken = take(&fixture, &machine, &mut guest, "next")?;
    taken.restores_exactly(&fixture)?;
    guest.is_left_alone(&machine, 1)?;
    taken = take(&fixture, &machine, &mut guest, "after")?;
    taken.mentions("incremental since")?;
    taken.restores_exactly(&fixture)
}

#[test]
fn abort_ends_a_backup_and_cleanup_needs_no_engine() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "aborted", 1)?;
    let reading = begin(&fixture, &machine, &mut guest, "aborted", &["--read-limit", "1M"])?;
    let start = std::time::Instant::now();
    fixture.fleece(&["abort", "aborted"])?;
    assert!(start.elapsed().as_secs() < 6, "abort took {:?}", start.elapsed());
    assert_ne!(reading.running.finish(LONG)?.code, 0);
    guest.keeps_writing()?;
    guest.is_left_alone(&machine, 1)?;

    fixture.stop_engine()?;
    fixture.fleece(&["cleanup", "aborted"])?;
    guest.is_left_alone(&machine, 1)?;
    fixture.start_engine()?;
    goes_on(&fixture, &machine, &mut guest)
}

#[test]
fn an_interrupted_first_backup_leaves_no_bitmap() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "first")?.with_disk("qcow2", 64 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda 0 {} 1", 16 * MIB))?;
    let reading = begin(&fixture, &machine, &mut guest, "cut", &["--read-limit", "1M"])?;
    reading.running.signal(Signal::TERM)?;
    reading.running.finish(LONG)?.code(130)?;
    guest.is_left_alone(&machine, 0)
}
