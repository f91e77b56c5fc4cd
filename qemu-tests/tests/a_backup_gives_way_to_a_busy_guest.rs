//! A backup and its guest share a slow disk: the backup reads slower while the guest's own requests take
//! longer, unless it is told not to mind; a guest that does nothing slows no backup down. A program of its own:
//! nothing runs beside it that would share the processors.

use anyhow::Context;
use qemu_tests::scenario::begin;
use qemu_tests::wait::LONG;
use qemu_tests::{Fixture, Guest, MIB, Machine, Result};

/// The pace beside a guest that is busy, at first.
const FIRST: u64 = 32 * MIB;
/// What the disk does in a second: less than that, so that the guest waits for what we read.
const DISK: u64 = 24 * MIB;

/// A full backup that must commit; what it says of its pace.
fn paced_to(fixture: &Fixture, machine: &Machine, more: &[&str]) -> Result<Option<u64>> {
    let arguments = [&["--full", "--json"], more].concat();
    let lines = fixture.backup(machine, &arguments)?.finish(LONG)?.code(0)?.json()?;
    let committed = lines.iter().find(|line| line["message_type"] == "committed");
    let pace = &committed.context("nothing was committed")?["paced_to"];
    assert!(pace.is_null() || pace.is_u64(), "{pace}");
    Ok(pace.as_u64())
}

fn busy(guest: &mut Guest) -> Result {
    // No pause between its writes, into what is not read by the backup first.
    guest.obey(&format!("start 7 {} {} 0 vda", 80 * MIB, 8 * MIB))?;
    guest.keeps_writing()
}

#[test]
fn a_backup_gives_way_to_a_busy_guest_unless_told_not_to() -> Result {
    let fixture = Fixture::new()?;
    let machine =
        Machine::new(fixture.folder(), "busy")?.with_disk("qcow2", 96 * MIB)?.throttled(DISK);
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {MIB} {} 1", 72 * MIB))?;
    assert_eq!(paced_to(&fixture, &machine, &[])?, None, "the guest does nothing");

    busy(&mut guest)?;
    let pace = paced_to(&fixture, &machine, &[])?.context("the guest was not noticed")?;
    assert!(pace < FIRST, "at {pace} bytes a second the guest waits for each read");
    guest.keeps_writing()?;
    assert_eq!(paced_to(&fixture, &machine, &["--no-pacing"])?, None);
    // What the operator allows counts where it is less.
    let limit = ["--read-limit", "20M"];
    assert!(paced_to(&fixture, &machine, &limit)?.is_some_and(|pace| pace < FIRST));

    let taken = begin(&fixture, &machine, &mut guest, "paced", &["--full"])?.commit()?;
    taken.mentions("paced: down to")?;
    taken.restores_exactly(&fixture)?;
    guest.is_left_alone(&machine, 1)?;
    guest.power_off()
}
