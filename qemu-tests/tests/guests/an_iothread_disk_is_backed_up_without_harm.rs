//! QEMU 7.2 aborts when an NBD client leaves an export of a disk with an iothread; QEMU 10 loses a
//! completion now and then when a guest with such a disk is stopped and goes on, with nothing of ours
//! in between. Fleece takes a way there that needs neither, and the guest lives.

use qemu_tests::guest::Guest;
use qemu_tests::scenario::begin_at_rest;
use qemu_tests::wait::LONG;
use qemu_tests::{Fixture, MIB, Machine, Result, tools};

/// Rounds on each machine: one in thirty stops was enough to hang a guest on 10.0.2.
const ROUNDS: usize = 8;

fn rounds(fixture: &Fixture, machine: &Machine, guest: &mut Guest, disks: &str) -> Result {
    let writer = format!("start 5 {MIB} {} 1 {disks}", 12 * MIB);
    guest.obey(&writer)?;
    for round in 0..ROUNDS {
        let reading = begin_at_rest(fixture, machine, guest, &writer, (&round.to_string(), &[]))?;
        let taken = reading.commit()?;
        taken.mentions(if round == 0 { "FULL READ" } else { "incremental since" })?;
        taken.restores_exactly(fixture)?;
        guest.keeps_writing()?;
        guest.is_left_alone(machine, machine.disks.len())?;
    }
    Ok(())
}

#[test]
fn a_disk_with_an_iothread_beside_one_without() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "threaded")?
        .with_disk("qcow2", 48 * MIB)?
        .with_iothread()
        .with_disk("qcow2", 32 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {} 1", 20 * MIB, 8 * MIB))?;
    guest.obey(&format!("write vdb {} {} 2", 20 * MIB, 4 * MIB))?;
    rounds(&fixture, &machine, &mut guest, "vda vdb")?;
    // The time limit holds while QEMU copies too, and the limit of the rate holds the copy up.
    let limits = ["--full", "--read-limit", "1M", "--max-hold", "2s"];
    let late = fixture.backup(&machine, &limits)?.finish(LONG)?.code(1)?;
    assert!(late.printed().contains("--max-hold"), "{}", late.printed());
    guest.keeps_writing()?;
    guest.is_left_alone(&machine, 2)?;
    guest.power_off()
}

#[test]
fn a_disk_with_an_iothread_alone() -> Result {
    let fixture = Fixture::new()?;
    let machine =
        Machine::new(fixture.folder(), "alone")?.with_disk("qcow2", 48 * MIB)?.with_iothread();
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {} 1", 20 * MIB, 8 * MIB))?;
    rounds(&fixture, &machine, &mut guest, "vda")?;
    let check =
        fixture.fleece(&["check", "alone", "--qmp", &machine.socket().display().to_string()])?;
    let way = if tools::qemu_version() == "7.2" { "push" } else { "filter" };
    assert!(check.printed().contains(way), "{}", check.printed());
    guest.power_off()
}

#[test]
fn a_disk_whose_guest_would_be_told_of_a_full_scratch_is_refused() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "told")?
        .with_disk("qcow2", 16 * MIB)?
        .with_iothread()
        .on_error("report")
        .with_disk("qcow2", 16 * MIB)?;
    let mut guest = machine.start()?;
    let refused = fixture.backup(&machine, &[])?.finish(LONG)?.code(2)?;
    let said = refused.printed();
    assert!(said.contains("vda") && said.contains("werror=report"), "{said}");
    guest.is_left_alone(&machine, 0)?;
    guest.power_off()
}
