//! Whatever happens to a dirty bitmap or a disk, the next backup notices, reads what it must, and
//! restores bit for bit.

use qemu_tests::guest::Guest;
use qemu_tests::wait::SOON;
use qemu_tests::{Fixture, MIB, Machine, Result, image, take};
use serde_json::json;

fn filled(fixture: &Fixture, name: &str, format: &str) -> Result<(Machine, Guest)> {
    let machine = Machine::new(fixture.folder(), name)?.with_disk(format, 64 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {MIB} {} 1", 12 * MIB))?;
    Ok((machine, guest))
}

#[test]
fn qemu_killed_loses_the_bitmap() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = filled(&fixture, "killed", "qcow2")?;
    take(&fixture, &machine, &mut guest, "before")?;
    guest.obey(&format!("write vda {} {MIB} 2", 30 * MIB))?;
    let Guest { qemu, .. } = guest;
    qemu.kill()?;

    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {MIB} 3", 40 * MIB))?;
    let taken = take(&fixture, &machine, &mut guest, "after")?;
    taken.mentions("FULL READ")?;
    taken.restores_exactly(&fixture)?;
    // And from there on it is incremental again.
    guest.obey(&format!("write vda {} {MIB} 4", 50 * MIB))?;
    let taken = take(&fixture, &machine, &mut guest, "again")?;
    taken.mentions("incremental since")?;
    taken.restores_exactly(&fixture)
}

#[test]
fn a_disk_that_grew_or_shrank_and_regrew_is_read_in_full() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = filled(&fixture, "resized", "qcow2")?;
    take(&fixture, &machine, &mut guest, "before")?;
    guest.qmp.execute("block_resize", &json!({ "node-name": "vda-node", "size": 80 * MIB }))?;
    guest.obey(&format!("write vda {} {MIB} 2", 20 * MIB))?;
    let taken = take(&fixture, &machine, &mut guest, "grown")?;
    taken.mentions("FULL READ")?;
    taken.restores_exactly(&fixture)?;

    guest.qmp.execute("block_resize", &json!({ "node-name": "vda-node", "size": 48 * MIB }))?;
    let taken = take(&fixture, &machine, &mut guest, "shrunk")?;
    taken.mentions("FULL READ")?;
    taken.restores_exactly(&fixture)
}

#[test]
fn swapped_disks_are_recognised_by_what_they_are() -> Result {
    let fixture = Fixture::new()?;
    let mut machine = Machine::new(fixture.folder(), "swapped")?
        .with_disk("qcow2", 32 * MIB)?
        .with_disk("qcow2", 32 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {MIB} {} 1", 8 * MIB))?;
    guest.obey(&format!("write vdb {MIB} {} 2", 8 * MIB))?;
    take(&fixture, &machine, &mut guest, "before")?.restores_exactly(&fixture)?;
    guest.power_off()?;

    let first = machine.disks[0].path.clone();
    machine.disks[0].path = std::mem::replace(&mut machine.disks[1].path, first);
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {MIB} 3", 16 * MIB))?;
    take(&fixture, &machine, &mut guest, "swapped")?.restores_exactly(&fixture)
}

#[test]
fn an_image_put_back_from_an_old_copy_is_not_trusted() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = filled(&fixture, "put-back", "qcow2")?;
    take(&fixture, &machine, &mut guest, "first")?;
    guest.power_off()?;
    let old = fixture.path("old.qcow2");
    std::fs::copy(&machine.disks[0].path, &old)?;

    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {MIB} 2", 20 * MIB))?;
    take(&fixture, &machine, &mut guest, "second")?;
    guest.power_off()?;
    std::fs::copy(&old, &machine.disks[0].path)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {MIB} 3", 40 * MIB))?;
    take(&fixture, &machine, &mut guest, "third")?.restores_exactly(&fixture)
}

#[test]
fn a_raw_disk_is_incremental_until_qemu_ends() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = filled(&fixture, "raw", "raw")?;
    take(&fixture, &machine, &mut guest, "full")?.restores_exactly(&fixture)?;
    guest.obey(&format!("write vda {} {MIB} 2", 20 * MIB))?;
    take(&fixture, &machine, &mut guest, "next")?.restores_exactly(&fixture)?;
    guest.power_off()?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {MIB} 3", 30 * MIB))?;
    let taken = take(&fixture, &machine, &mut guest, "restarted")?;
    taken.mentions("FULL READ")?;
    taken.restores_exactly(&fixture)
}

#[test]
fn an_overlay_put_on_top_is_noticed() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = filled(&fixture, "overlaid", "qcow2")?;
    take(&fixture, &machine, &mut guest, "before")?;
    guest.obey(&format!("write vda {} {MIB} 2", 20 * MIB))?;
    let overlay = fixture.path("overlay.qcow2");
    guest.qmp.execute(
        "blockdev-snapshot-sync",
        &json!({ "node-name": "vda-node", "snapshot-file": overlay, "format": "qcow2",
                 "snapshot-node-name": "overlay-node" }),
    )?;
    guest.obey(&format!("write vda {} {MIB} 3", 30 * MIB))?;
    let mut top = machine.clone();
    top.disks[0].path = overlay;
    let taken = take(&fixture, &top, &mut guest, "after")?;
    taken.mentions("FULL READ")?;
    taken.restores_exactly(&fixture)?;
    guest.obey(&format!("write vda {} {MIB} 4", 40 * MIB))?;
    take(&fixture, &top, &mut guest, "again")?.restores_exactly(&fixture)
}

#[test]
fn a_bitmap_of_someone_else_is_left_alone() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = filled(&fixture, "shared", "qcow2")?;
    guest.qmp.execute(
        "block-dirty-bitmap-add",
        &json!({ "node": "vda-node", "name": "theirs", "persistent": true }),
    )?;
    take(&fixture, &machine, &mut guest, "full")?;
    guest.obey(&format!("write vda {} {MIB} 2", 20 * MIB))?;
    take(&fixture, &machine, &mut guest, "next")?.restores_exactly(&fixture)?;
    guest.is_left_alone(&machine, 1)?;
    let nodes = guest.qmp.execute("query-named-block-nodes", &json!({ "flat": true }))?;
    assert!(nodes.to_string().contains("\"theirs\""), "{nodes}");
    Ok(())
}

#[test]
fn full_on_demand_reads_everything_and_stores_nothing_twice() -> Result {
    let fixture = Fixture::new()?;
    let (machine, mut guest) = filled(&fixture, "demanded", "qcow2")?;
    take(&fixture, &machine, &mut guest, "first")?;
    let unique = fixture.figure("unique_blocks")?;
    let mut running = fixture.backup(&machine, &["--full"])?;
    running.wait_printed(SOON, "FULL READ")?;
    running.finish(qemu_tests::wait::LONG)?.code(0)?;
    assert_eq!(fixture.figure("unique_blocks")?, unique);
    let restored = fixture.restore("demanded", "vda")?;
    guest.pause()?;
    let truth = fixture.path("truth.raw");
    image::convert(&machine.disks[0].path, "qcow2", &truth, "raw")?;
    image::same(&truth, &restored)
}
