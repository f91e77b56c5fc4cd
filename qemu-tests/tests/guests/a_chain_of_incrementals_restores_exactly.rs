//! Eight incrementals of a guest that keeps writing: one round fails and is merged back, one
//! lies behind a restart of the guest. Every snapshot restores bit for bit, then and at the end.

use qemu_tests::scenario::begin;
use qemu_tests::wait::{LONG, SOON};
use qemu_tests::{Fixture, Guest, MIB, Machine, Result, take};
use rustix::process::Signal;

/// What changes between two rounds: new content, old content elsewhere, zeros, a discard.
fn change(guest: &mut Guest, round: u64) -> Result {
    let base = (4 + round * 5) * MIB;
    guest.obey(&format!("write vda {base} {} {}", 3 * MIB, 100 + round))?;
    guest.obey(&format!("write vda {} {MIB} 1", base + 3 * MIB + 4096))?;
    guest.obey(&format!("zero vda {} 262144", base + 65536))?;
    guest.obey(&format!("trim vda {} 524288", base + MIB))?;
    Ok(())
}

#[test]
fn eight_rounds_with_a_failed_one_and_a_restart() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "chain")?.with_disk("qcow2", 96 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {} 1", 4 * MIB, 40 * MIB))?;
    let writer = format!("start 9 {} {} 1 vda", 64 * MIB, 24 * MIB);
    guest.obey(&writer)?;

    let full = take(&fixture, &machine, &mut guest, "full")?;
    full.mentions("FULL READ")?;
    full.restores_exactly(&fixture)?;
    let mut chain = vec![full];
    for round in 1..=8 {
        change(&mut guest, round)?;
        if round == 3 {
            let reading = begin(&fixture, &machine, &mut guest, "failed", &["--read-limit", "1M"])?;
            reading.running.signal(Signal::INT)?;
            reading.running.finish(LONG)?.code(130)?;
            guest.is_left_alone(&machine, 1)?;
        }
        if round == 5 {
            guest.power_off()?;
            guest = machine.start()?;
            guest.obey(&writer)?;
        }
        let taken = take(&fixture, &machine, &mut guest, &round.to_string())?;
        taken.mentions("incremental since")?;
        taken.restores_exactly(&fixture)?;
        guest.keeps_writing()?;
        chain.push(taken);
    }
    guest.is_left_alone(&machine, 1)?;
    for taken in &chain {
        taken.restores_exactly(&fixture)?;
    }
    assert_eq!(fixture.figure("snapshots")?, 9);
    Ok(())
}

#[test]
fn an_incremental_reads_only_what_changed() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "little")?.with_disk("qcow2", 256 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda 0 {} 1", 32 * MIB))?;
    take(&fixture, &machine, &mut guest, "full")?.restores_exactly(&fixture)?;
    let stored = fixture.figure("stored_bytes")?;
    let unique = fixture.figure("unique_blocks")?;

    guest.obey(&format!("write vda {} {} 2", 8 * MIB, 2 * MIB))?;
    let mut running = fixture.backup(&machine, &["--json"])?;
    running.wait_printed(SOON, "committed")?;
    running.finish(LONG)?.code(0)?.json()?;
    assert_eq!(fixture.figure("unique_blocks")?, unique + 512);
    let growth = fixture.figure("stored_bytes")? - stored;
    assert!(growth < 3 * MIB, "2 MiB of changes cost {growth} bytes");
    Ok(())
}
