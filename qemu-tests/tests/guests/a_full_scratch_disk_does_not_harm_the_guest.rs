//! The scratch space runs out while the guest overwrites everything: the backup ends, the guest
//! goes on, whether the plugin is alive, hung or dead.

use qemu_tests::guest::Guest;
use qemu_tests::scenario::{Reading, begin};
use qemu_tests::wait::LONG;
use qemu_tests::{Fixture, MIB, Machine, Result, take};
use rustix::process::Signal;

/// A backup that reads slowly with little scratch, and a guest that has something to overwrite.
fn slow_backup(fixture: &Fixture, name: &str) -> Result<(Machine, Guest, Reading)> {
    let machine = Machine::new(fixture.folder(), name)?.with_disk("qcow2", 64 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda 0 {} 1", 48 * MIB))?;
    let reading = begin(
        fixture,
        &machine,
        &mut guest,
        "slow",
        &["--read-limit", "1M", "--scratch-max", "4M"],
    )?;
    Ok((machine, guest, reading))
}

/// Overwrites far more than the scratch holds; every write must succeed.
fn overwrite(guest: &mut Guest) -> Result {
    for part in 0..8 {
        guest.obey(&format!("write vda {} {} {}", part * 6 * MIB, 6 * MIB, 50 + part))?;
    }
    guest.obey(&format!("start 6 {MIB} {} 1 vda", 16 * MIB))?;
    guest.keeps_writing()
}

#[test]
fn with_the_plugin_alive() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest, reading) = slow_backup(&fixture, "alive")?;
    overwrite(&mut guest)?;
    let finished = reading.running.finish(LONG)?.code(1)?;
    assert!(finished.printed().contains("scratch"), "{}", finished.printed());
    guest.is_left_alone(&machine, 1)?;
    assert_eq!(fixture.figure("snapshots")?, 0);
    take(&fixture, &machine, &mut guest, "next")?.restores_exactly(&fixture)
}

#[test]
fn with_the_plugin_killed() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest, reading) = slow_backup(&fixture, "killed")?;
    reading.running.kill()?;
    overwrite(&mut guest)?;
    guest.is_left_alone(&machine, 1)?;
    take(&fixture, &machine, &mut guest, "next")?.restores_exactly(&fixture)
}

#[test]
fn with_the_plugin_hung() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest, reading) = slow_backup(&fixture, "hung")?;
    reading.running.signal(Signal::STOP)?;
    overwrite(&mut guest)?;
    reading.running.kill()?;
    guest.keeps_writing()?;
    guest.is_left_alone(&machine, 1)?;
    take(&fixture, &machine, &mut guest, "next")?.restores_exactly(&fixture)
}
