//! `fleece serve`: a guest boots at once from a snapshot, with an overlay for what it writes, and
//! every NBD client reads the same bytes.

use std::path::Path;
use std::process::Command;

use qemu_tests::content::sum;
use qemu_tests::process::Running;
use qemu_tests::wait::{LONG, SOON};
use qemu_tests::{Fixture, MIB, Machine, Result, image, take, tools};
use rustix::process::Signal;

fn serve(fixture: &Fixture, snapshot: &str, socket: &Path) -> Result<Running> {
    let path = socket.display().to_string();
    let arguments = ["serve", snapshot, "--disk", "vda", "--socket", &path];
    let mut running = Running::start("fleece serve", &mut fixture.fleece_command(&arguments)?)?;
    running.wait_printed(SOON, "nbd+unix://")?;
    Ok(running)
}

#[test]
fn with_an_overlay_while_the_original_runs_on() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "original")?.with_disk("qcow2", 64 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {} 1", 24 * MIB, 16 * MIB))?;
    guest.obey(&format!("start 9 {MIB} {} 1 vda", 16 * MIB))?;
    guest.keeps_writing()?;
    let taken = take(&fixture, &machine, &mut guest, "full")?;
    let truth = &taken.truths[0].1;

    let socket = fixture.path("nbd.sock");
    let server = serve(&fixture, &taken.snapshot, &socket)?;
    let overlay = fixture.path("overlay.qcow2");
    let uri = format!("nbd+unix:///vda?socket={}", socket.display());
    let mut create = tools::qemu("qemu-img")?;
    create.args(["create", "-q", "-f", "qcow2", "-b", &uri, "-F", "raw"]).arg(&overlay);
    tools::run(&mut create)?;

    let copy = Machine::new(fixture.folder(), "copy")?.with_image(&overlay, "qcow2");
    let mut second = copy.start()?;
    let bytes = std::fs::read(truth)?;
    let expected = sum(&bytes[..32 * MIB as usize]).to_string();
    assert_eq!(second.obey(&format!("sum vda 0 {}", 32 * MIB))?, expected);
    second.obey(&format!("write vda {} {} 5", 24 * MIB, 2 * MIB))?;
    second.power_off()?;

    // The snapshot has not moved: read again through qemu-img.
    let mut convert = tools::qemu("qemu-img")?;
    let again = fixture.path("again.raw");
    tools::run(convert.args(["convert", "-f", "raw", "-O", "raw", &uri]).arg(&again))?;
    image::same(truth, &again)?;
    server.signal(Signal::TERM)?;
    let ended = server.finish(LONG)?;
    assert!([0, 130].contains(&ended.code), "{}", ended.printed());
    guest.keeps_writing()
}

#[test]
fn libnbd_reads_the_same_over_several_connections() -> Result {
    let fixture = Fixture::new()?;
    let path = fixture.path("plain.raw");
    image::raw(&path, 200 * MIB, &[(MIB, 40 * MIB, 1), (150 * MIB, 9 * MIB, 2)])?;
    let (id, _) = fixture.backup_images("plain", &[("vda", &path)])?;
    let socket = fixture.path("nbd.sock");
    let _server = serve(&fixture, &format!("plain@{id}"), &socket)?;
    let uri = format!("nbd+unix:///vda?socket={}", socket.display());

    let info = tools::run(Command::new("nbdinfo").arg(&uri))?;
    assert!(info.contains("is_read_only: true"), "{info}");
    let copy = fixture.path("copied.raw");
    tools::run(
        Command::new("nbdcopy").args(["--connections=4", "--requests=16", &uri]).arg(&copy),
    )?;
    image::same(&path, &copy)?;
    let map = tools::run(Command::new("nbdinfo").args(["--map", "--totals", &uri]))?;
    assert!(map.contains("hole") || map.contains("zero"), "holes are told: {map}");
    Ok(())
}
