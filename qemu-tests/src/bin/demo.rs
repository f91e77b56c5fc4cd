//! What `ci/demo` shows: a live VM in, a restored image out, byte for byte.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use qemu_tests::memory::Watch;
use qemu_tests::process::Running;
use qemu_tests::scenario::begin;
use qemu_tests::wait::SOON;
use qemu_tests::{Fixture, Guest, MIB, Machine, Result, Taken, image, tools};

/// The guest's disk: enough for the figures to mean something, little enough for two minutes.
const DISK: u64 = 1024 * MIB;

fn main() -> Result {
    let version = tools::run(tools::qemu("qemu-system-x86_64")?.arg("--version"))?;
    println!("{}", version.lines().next().unwrap_or_default());
    let mut fixture = Fixture::new()?;
    println!("store and engine in {}, memory budget 32 MiB", fixture.folder().display());
    let engine = Watch::start(fixture.engine()?.pid());

    heading("A guest boots, fills its disk and keeps writing");
    let machine = Machine::new(fixture.folder(), "demo")?.with_disk("qcow2", DISK)?;
    let mut guest = machine.start()?;
    // New blocks, the same blocks again elsewhere, and zeros.
    guest.obey(&format!("write vda {} {} 1", 64 * MIB, 128 * MIB))?;
    guest.obey(&format!("write vda {} {} 2", 256 * MIB, 32 * MIB))?;
    tell_twice(&mut guest)?;
    guest.obey(&format!("zero vda {} {}", 512 * MIB, 32 * MIB))?;
    guest.obey(&format!("start 3 {MIB} {} 1 vda", 32 * MIB))?;
    println!("1 GiB disk, 256 MiB written, one record after the other with fsync");

    heading("Full backup of the running guest");
    let full = backup(&fixture, &machine, &mut guest, "full")?;
    heading("The guest writes on; an incremental backup");
    guest.obey(&format!("write vda {} {} 4", 300 * MIB, 8 * MIB))?;
    guest.obey(&format!("write vda {} {} 1", 64 * MIB, 4 * MIB))?;
    guest.keeps_writing()?;
    let next = backup(&fixture, &machine, &mut guest, "next")?;

    heading("Both restored and compared with the truth of their point in time");
    for taken in [&full, &next] {
        let start = Instant::now();
        let restored = fixture.restore(&taken.snapshot, "vda")?;
        let seconds = start.elapsed().as_secs_f64();
        image::same(&taken.truths[0].1, &restored)?;
        println!("{}: restored in {seconds:.1} s, identical", taken.snapshot);
        fs::remove_file(restored)?;
    }

    heading("The first one served over NBD, read by libnbd");
    serve(&fixture, &full)?;

    heading("The guest and the store");
    println!("the guest has written {} records and met no error", guest.written()?);
    report(&fixture, &engine)?;
    fixture.verify()?;
    println!("fleecectl verify: clean");
    println!("\nci/demo: all identical");
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text} ==");
}

/// The same 64 MiB at another place of the disk.
fn tell_twice(guest: &mut Guest) -> Result {
    // A block's content depends on its place in the disk: copied inside the guest, block for block.
    guest.obey("shell dd if=/dev/vda of=/dev/vda bs=1M skip=64 seek=400 count=64 conv=notrunc,fsync 2>/dev/null")?;
    Ok(())
}

fn backup(fixture: &Fixture, machine: &Machine, guest: &mut Guest, round: &str) -> Result<Taken> {
    let start = Instant::now();
    let reading = begin(fixture, machine, guest, round, &[])?;
    let plugin = Watch::start(reading.running.pid());
    let taken = reading.commit()?;
    let seconds = start.elapsed().as_secs_f64();
    print!("{}", indent(&taken.printed.out));
    println!(
        "in all {seconds:.1} s (the copy of the truth included); plugin's peak {} MiB",
        plugin.peak() / MIB
    );
    Ok(taken)
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

fn serve(fixture: &Fixture, taken: &Taken) -> Result {
    let socket = fixture.path("nbd.sock");
    let path = socket.display().to_string();
    let arguments = ["serve", &taken.snapshot, "--disk", "vda", "--socket", &path];
    let mut server = Running::start("fleece serve", &mut fixture.fleece_command(&arguments)?)?;
    server.wait_printed(SOON, "nbd+unix://")?;
    let copy = fixture.path("served.raw");
    let start = Instant::now();
    let uri = format!("nbd+unix:///vda?socket={path}");
    tools::run(Command::new("nbdcopy").arg(&uri).arg(&copy))?;
    image::same(&taken.truths[0].1, &copy)?;
    println!("{uri}: read in {:.1} s, identical", start.elapsed().as_secs_f64());
    Ok(())
}

fn report(fixture: &Fixture, engine: &Watch) -> Result {
    let status = fixture.status()?;
    let figure =
        |name: &str| status[name].as_u64().with_context(|| format!("no {name} in {status}"));
    let (logical, unique, stored) =
        (figure("logical_bytes")?, figure("unique_bytes")?, figure("stored_bytes")?);
    let on_disk = tools::run(Command::new("du").arg("-sb").arg(fixture.path("store")))?;
    println!(
        "disks of all snapshots {} MiB, unique blocks {} ({} MiB)",
        logical / MIB,
        figure("unique_blocks")?,
        unique / MIB
    );
    println!(
        "stored {:.1} MiB ({} bytes in the store's folder), ratio {:.1} to 1",
        stored as f64 / MIB as f64,
        on_disk.split_whitespace().next().unwrap_or("?"),
        logical as f64 / stored as f64
    );
    println!("engine's peak memory {:.1} MiB (anonymous)", engine.peak() as f64 / MIB as f64);
    Ok(())
}
