//! Two disks that a guest writes to in turn: the snapshot holds them at one instant.

use std::fs;
use std::path::Path;

use anyhow::Context;
use qemu_tests::content::{BLOCK, record_number};
use qemu_tests::fixture::snapshot_id;
use qemu_tests::scenario::begin;
use qemu_tests::wait::LONG;
use qemu_tests::{Fixture, Guest, MIB, Machine, Result, take};

/// The number of the record that a disk's first block holds.
fn number(image: &Path) -> Result<u64> {
    record_number(&fs::read(image)?[..BLOCK]).context("no intact record")
}

fn two_disks(fixture: &Fixture) -> Result<(Machine, Guest)> {
    let machine = Machine::new(fixture.folder(), "pair")?
        .with_disk("qcow2", 48 * MIB)?
        .with_disk("qcow2", 64 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {} 1", 24 * MIB, 8 * MIB))?;
    guest.obey(&format!("write vdb {} {} 2", 24 * MIB, 8 * MIB))?;
    guest.obey(&format!("start 4 {MIB} {} 0 vda vdb", 16 * MIB))?;
    guest.keeps_writing()?;
    Ok((machine, guest))
}

#[test]
fn records_written_in_turn_are_at_most_one_apart() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = two_disks(&fixture)?;
    for round in 0..4 {
        // The guest runs through the point in time: nobody stops it but the backup.
        let finished = fixture.backup(&machine, &[])?.finish(LONG)?.code(0)?;
        let snapshot = format!("pair@{}", snapshot_id(&finished.printed())?);
        let first = number(&fixture.restore(&snapshot, "vda")?)?;
        let second = number(&fixture.restore(&snapshot, "vdb")?)?;
        assert!(first - second <= 1, "round {round}: vda at {first}, vdb at {second}");
        guest.keeps_writing()?;
    }
    guest.is_left_alone(&machine, 2)
}

#[test]
fn both_disks_restore_exactly_while_the_guest_writes_on() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = two_disks(&fixture)?;
    for round in ["full", "first", "second"] {
        let taken = take(&fixture, &machine, &mut guest, round)?;
        assert_eq!(taken.truths.len(), 2);
        taken.restores_exactly(&fixture)?;
        guest.keeps_writing()?;
    }
    Ok(())
}

#[test]
fn what_the_guest_overwrites_before_it_is_read_is_the_old() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = two_disks(&fixture)?;
    for round in ["full", "next"] {
        let mut reading = begin(&fixture, &machine, &mut guest, round, &["--read-limit", "8M"])?;
        // All of it, from the end: most of it has not been read yet.
        for place in (0..4).rev() {
            let offset = (24 + place * 2) * MIB;
            guest.obey(&format!("write vda {offset} {} {place}9", 2 * MIB))?;
            guest.obey(&format!("zero vdb {offset} {MIB}"))?;
            guest.obey(&format!("trim vdb {} {MIB}", offset + MIB))?;
        }
        assert!(
            reading.running.ended()?.is_none(),
            "the backup was through before the guest overwrote"
        );
        reading.commit()?.restores_exactly(&fixture)?;
    }
    take(&fixture, &machine, &mut guest, "last")?.restores_exactly(&fixture)
}

#[test]
fn disks_can_be_chosen_and_left_out() -> Result {
    let fixture = Fixture::new()?;
    let (machine, _guest) = two_disks(&fixture)?;
    let one = fixture.backup(&machine, &["--disk", "vdb"])?.finish(LONG)?.code(0)?;
    let snapshot = format!("pair@{}", snapshot_id(&one.printed())?);
    fixture.restore(&snapshot, "vdb")?;
    let to = fixture.text("nowhere.raw");
    fixture.try_fleece(&["restore", &snapshot, "--disk", "vda", "--to", &to])?.code(14)?;

    let other = fixture.backup(&machine, &["--exclude-disk", "vdb"])?.finish(LONG)?.code(0)?;
    let snapshot = format!("pair@{}", snapshot_id(&other.printed())?);
    fixture.restore(&snapshot, "vda")?;
    fixture.try_fleece(&["restore", &snapshot, "--disk", "vdb", "--to", &to])?.code(14)?;
    Ok(())
}
