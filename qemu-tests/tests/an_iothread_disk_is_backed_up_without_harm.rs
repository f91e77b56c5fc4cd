//! QEMU 7.2 aborts when an NBD client leaves an export of a disk with an iothread: Fleece takes
//! another way there, and the guest lives. The scenario is of 7.2 alone: on 10.0.2 guests hung in
//! a write by other ways, and whether push is free of it is an open question (README, limits).

use qemu_tests::wait::LONG;
use qemu_tests::{Fixture, MIB, Machine, Result, take, tools};

#[test]
fn a_disk_with_an_iothread_beside_one_without() -> Result {
    if tools::qemu_version() != "7.2" {
        return Ok(());
    }
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "threaded")?
        .with_disk("qcow2", 48 * MIB)?
        .with_iothread()
        .with_disk("qcow2", 32 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {} 1", 20 * MIB, 8 * MIB))?;
    guest.obey(&format!("write vdb {} {} 2", 20 * MIB, 4 * MIB))?;
    guest.obey(&format!("start 5 {MIB} {} 1 vda vdb", 12 * MIB))?;
    for round in ["full", "first", "second"] {
        take(&fixture, &machine, &mut guest, round)?.restores_exactly(&fixture)?;
        guest.keeps_writing()?;
        guest.is_left_alone(&machine, 2)?;
    }
    // The time limit holds while QEMU copies too, and the limit of the rate holds the copy up.
    let limits = ["--full", "--read-limit", "1M", "--max-hold", "2s"];
    let late = fixture.backup(&machine, &limits)?.finish(LONG)?.code(1)?;
    assert!(late.printed().contains("--max-hold"), "{}", late.printed());
    guest.keeps_writing()?;
    guest.is_left_alone(&machine, 2)?;
    take(&fixture, &machine, &mut guest, "after")?.restores_exactly(&fixture)?;
    guest.power_off()
}
