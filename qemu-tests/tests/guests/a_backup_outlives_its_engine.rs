//! The engine is killed, or stopped for an upgrade, in the middle of a backup. The plugin keeps the point
//! in time, and the same backup goes on in the next engine: it ends with success, its snapshot is the
//! guest at the point in time before the engine went, the next one is incremental. Where no engine comes
//! back, or the wrong one, or the operator or the guest cannot wait, it ends as any backup that failed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use qemu_tests::guest::Guest;
use qemu_tests::held::Brake;
use qemu_tests::process::Running;
use qemu_tests::scenario::{
    POINT_IN_TIME, Reading, Taken, begin, begin_at_rest, truths, with_a_snapshot,
};
use qemu_tests::wait::{LONG, SOON, wait_until};
use qemu_tests::{Fixture, MIB, Machine, Result, image, take, tools};
use rustix::process::Signal;
use serde_json::Value;

/// What is printed when the engine went away.
const GONE: &str = "the point in time is kept";
/// How long each creation of an object takes where the commit is to be met.
const SLOW: Duration = Duration::from_millis(700);

/// Brings the engine to a moment of the backup and sends it a signal there.
fn hit(fixture: &mut Fixture, vm: &str, running: &mut Running, at: &str, signal: Signal) -> Result {
    let some = |name: &'static str| move |s: &Value| s[name].as_u64().is_some_and(|n| n > 2 * MIB);
    let mut brake = None;
    match at {
        "scan" => fixture.wait_stage((vm, running), at, some("read"))?,
        "write" => fixture.wait_stage((vm, running), at, some("new"))?,
        _ => {
            brake = Some(Brake::calls(fixture.engine()?.pid(), "linkat", SLOW)?);
            let before = manifests(&fixture.store())?;
            fixture.wait_stage((vm, running), "publish", |_| true)?;
            if at == "committed" {
                // The answer comes only after its second copy.
                let committed = || Ok(manifests(&fixture.store())? > before);
                wait_until(SOON, "the manifest", committed)?;
            }
        }
    }
    // A thread that strace holds keeps a dead process from its end.
    fixture.engine()?.signal(signal)?;
    drop(brake);
    match signal {
        Signal::TERM => fixture.stop_engine(),
        _ => fixture.kill_engine(),
    }
}

fn manifests(store: &Path) -> Result<usize> {
    let mut count = 0;
    for vm in fs::read_dir(store.join("manifests"))? {
        let names = fs::read_dir(vm?.path())?.flatten().map(|entry| entry.file_name());
        // What is being written has a name of its own.
        count += names.filter(|name| !name.to_string_lossy().contains('#')).count();
    }
    Ok(count)
}

/// New content, more than the plugin keeps of what it read.
fn change(guest: &mut Guest, seed: usize) -> Result {
    guest.obey(&format!("write vda {} {} {}", 24 * MIB, 16 * MIB, 100 + seed)).map(drop)
}

fn killed_in_mid_backup(
    fixture: &mut Fixture,
    machine: &Machine,
    guest: &mut Guest,
    more: &[&str],
) -> Result<Reading> {
    let more = [&["--read-limit", "1M"], more].concat();
    let mut reading = begin(fixture, machine, guest, "killed", &more)?;
    fixture.kill_engine()?;
    reading.running.wait_printed(SOON, GONE)?;
    Ok(reading)
}

/// Nothing of a backup that failed is left, and the next one is exact and incremental.
fn goes_on(fixture: &mut Fixture, machine: &Machine, guest: &mut Guest) -> Result {
    guest.keeps_writing()?;
    guest.is_left_alone(machine, 1)?;
    fixture.start_engine()?;
    let taken = take(fixture, machine, guest, "next")?;
    taken.mentions("incremental since")?;
    taken.restores_exactly(fixture)
}

#[test]
fn killed_or_stopped_at_any_stage_the_backup_goes_on_in_the_next_engine() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "outlives", 1)?;
    let moments = ["scan", "write", "publish", "committed"];
    let kinds = [Signal::KILL, Signal::TERM];
    let cases = moments.into_iter().flat_map(|at| kinds.map(|signal| (at, signal)));
    for (round, (at, signal)) in cases.enumerate() {
        println!("{signal:?} in {at}");
        change(&mut guest, round)?;
        let limit: &[&str] = match at {
            "scan" => &["--read-limit", "2M"],
            "write" => &["--read-limit", "6M"],
            _ => &[],
        };
        let name = format!("{at}{round}");
        let mut reading = begin(&fixture, &machine, &mut guest, &name, limit)?;
        hit(&mut fixture, "outlives", &mut reading.running, at, signal)?;
        reading.running.wait_printed(SOON, GONE)?;
        guest.keeps_writing()?;
        fixture.start_engine()?;
        let taken = reading.commit()?;
        taken.mentions("the engine answers again")?;
        if at == "committed" {
            taken.mentions("the snapshot was there before it went")?;
        }
        taken.restores_exactly(&fixture)?;
        guest.is_left_alone(&machine, 1)?;
        let next = take(&fixture, &machine, &mut guest, &format!("after-{name}"))?;
        next.mentions(&format!("incremental since {}", &taken.snapshot["outlives@".len()..]))?;
        next.restores_exactly(&fixture)?;
    }
    Ok(())
}

#[test]
fn of_several_disks_and_several_times() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "twice", 2)?;
    let more = ["--read-limit", "6M", "--full"];
    let mut reading = begin(&fixture, &machine, &mut guest, "twice", &more)?;
    for at in ["scan", "write", "write"] {
        hit(&mut fixture, "twice", &mut reading.running, at, Signal::KILL)?;
        fixture.start_engine()?;
    }
    let taken = reading.commit()?;
    assert_eq!(taken.printed.printed().matches(GONE).count(), 3, "{}", taken.printed.printed());
    taken.restores_exactly(&fixture)?;
    guest.is_left_alone(&machine, 2)?;
    let next = take(&fixture, &machine, &mut guest, "after")?;
    next.mentions("incremental since")?;
    next.restores_exactly(&fixture)
}

/// A job's view and, on QEMU 7.2, a copy in scratch.
#[test]
fn by_the_other_ways_too() -> Result {
    let mut fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "ways")?
        .with_disk("qcow2", 48 * MIB)?
        .with_iothread()
        .with_disk("qcow2", 32 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {} 1", 20 * MIB, 8 * MIB))?;
    guest.obey(&format!("write vdb {} {} 2", 8 * MIB, 20 * MIB))?;
    let writer = format!("start 5 {MIB} {} 1 vda vdb", 12 * MIB);
    guest.obey(&writer)?;
    for round in ["full", "increment"] {
        let more = (round, &["--read-limit", "6M"][..]);
        let mut reading = begin_at_rest(&fixture, &machine, &mut guest, &writer, more)?;
        hit(&mut fixture, "ways", &mut reading.running, "scan", Signal::KILL)?;
        guest.keeps_writing()?;
        fixture.start_engine()?;
        reading.commit()?.restores_exactly(&fixture)?;
        guest.is_left_alone(&machine, 2)?;
        guest.obey(&format!("write vdb {} {} 3", 8 * MIB, 20 * MIB))?;
    }
    guest.power_off()
}

/// The engine has a raw image open while it reads from it what is new; the next engine gets it anew.
#[test]
fn a_raw_image_is_lent_to_each_engine() -> Result {
    let mut fixture = Fixture::new()?;
    let path = fixture.path("lent.raw");
    // More than the first window, so that the write stage meets the scan of the next one.
    image::raw(&path, 384 * MIB, &[(0, 380 * MIB, 1)])?;
    let of = format!("--image=vda={}", path.display());
    let arguments = ["backup", "lent", &of];
    let mut running = Running::start("lent", &mut fixture.fleece_command(&arguments)?)?;
    for _ in 0..2 {
        let some = |s: &Value| s["new"].as_u64().is_some_and(|n| n > 2 * MIB);
        fixture.wait_stage(("lent", &mut running), "write", some)?;
        ensure!(has_open(fixture.engine()?.pid(), &path)?, "the image is not lent");
        fixture.engine()?.signal(Signal::KILL)?;
        fixture.kill_engine()?;
        running.wait_printed(SOON, GONE)?;
        fixture.start_engine()?;
    }
    let finished = running.finish(LONG)?.code(0)?;
    ensure!(finished.printed().contains("undetected 0"), "{}", finished.printed());
    ensure!(!has_open(fixture.engine()?.pid(), &path)?, "the engine keeps the image open");
    image::same(&path, &fixture.restore("lent@latest", "vda")?)
}

/// Whether a process has a file open.
fn has_open(process: u32, path: &Path) -> Result<bool> {
    let open = fs::read_dir(format!("/proc/{process}/fd"))?.flatten();
    Ok(open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|target| target == path))
}

/// One call for two VMs: the first one is switched off while it waits for an engine, then it is the other one's turn.
#[test]
fn the_next_vm_waits_for_an_engine_too() -> Result {
    let mut fixture = Fixture::new()?;
    let (_machine, early) = with_a_snapshot(&fixture, "early", 1)?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "later", 1)?;
    guest.pause()?;
    let truths = truths(&fixture, &machine, "waited")?;
    let both = |fixture: &mut Fixture, more: &[&str]| -> Result<Running> {
        let scratch = fixture.text("scratch");
        let both = ["backup", "early", "later", "--scratch-dir", &scratch, "--read-limit", "4M"];
        let mut command = fixture.fleece_command(&[&both, more].concat())?;
        let mut both = Running::start("fleece backup", &mut command)?;
        both.wait_printed(SOON, POINT_IN_TIME)?;
        fixture.kill_engine()?;
        both.wait_printed(SOON, GONE)?;
        Ok(both)
    };
    // Once is enough for all.
    let in_vain = both(&mut fixture, &["--engine-wait", "1s"])?.finish(SOON)?.code(13)?.printed();
    assert!(!in_vain.contains("later: the engine of"), "{in_vain}");
    fixture.start_engine()?;
    let mut both = both(&mut fixture, &[])?;
    early.power_off()?;
    both.wait_printed(SOON, "later: the engine of")?;
    fixture.start_engine()?;
    let printed = both.finish(LONG)?.code(1)?;
    let said = printed.printed();
    let id = said.split("committed later@").nth(1).and_then(|rest| rest.split_whitespace().next());
    let snapshot = format!("later@{}", id.with_context(|| said.clone())?);
    Taken { snapshot, truths, printed }.restores_exactly(&fixture)?;
    guest.go_on()?;
    guest.keeps_writing()?;
    guest.is_left_alone(&machine, 1)?;
    take(&fixture, &machine, &mut guest, "next")?.restores_exactly(&fixture)
}

#[test]
fn an_engine_that_does_not_come_back_is_waited_for_as_long_as_was_said() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "alone", 1)?;
    let more = ["--engine-wait", "2s"];
    let reading = killed_in_mid_backup(&mut fixture, &machine, &mut guest, &more)?;
    let finished = reading.running.finish(LONG)?.code(13)?;
    assert!(finished.printed().contains("did not come back within 2.00 s"), "{finished:?}");
    goes_on(&mut fixture, &machine, &mut guest)
}

#[test]
fn whoever_cannot_wait_can_interrupt_it() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "hurried", 1)?;
    for abort in [false, true] {
        let reading = killed_in_mid_backup(&mut fixture, &machine, &mut guest, &[])?;
        match abort {
            true => drop(fixture.fleece(&["abort", "hurried"])?),
            false => reading.running.signal(Signal::INT)?,
        }
        reading.running.finish(SOON)?.code(130)?;
        goes_on(&mut fixture, &machine, &mut guest)?;
    }
    Ok(())
}

#[test]
fn the_guest_and_the_view_come_before_the_waiting() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "first", 1)?;
    let more = ["--max-hold", "4s"];
    let reading = killed_in_mid_backup(&mut fixture, &machine, &mut guest, &more)?;
    let finished = reading.running.finish(LONG)?.code(1)?;
    assert!(finished.printed().contains("--max-hold"), "{finished:?}");
    goes_on(&mut fixture, &machine, &mut guest)?;

    let more = ["--scratch-max", "4M"];
    let reading = killed_in_mid_backup(&mut fixture, &machine, &mut guest, &more)?;
    for part in 0..4 {
        guest.obey(&format!("write vda {} {} {}", (24 + part * 6) * MIB, 6 * MIB, 50 + part))?;
    }
    let finished = reading.running.finish(LONG)?.code(1)?;
    assert!(finished.printed().contains("scratch"), "{finished:?}");
    goes_on(&mut fixture, &machine, &mut guest)
}

#[test]
fn an_engine_of_another_store_is_refused_by_name() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "foreign", 1)?;
    let reading = killed_in_mid_backup(&mut fixture, &machine, &mut guest, &[])?;
    let other = Fixture::without_engine()?;
    let mut command = tools::fleece("fleece-engine")?;
    command.args(["--config", &other.text("engine.toml"), "--socket"]).arg(fixture.socket());
    command.arg("--state-dir").arg(other.state());
    let foreign = Running::start("a foreign engine", &mut command)?;
    let finished = reading.running.finish(LONG)?.code(10)?;
    assert!(finished.printed().contains("has another store now"), "{finished:?}");
    foreign.kill()?;
    goes_on(&mut fixture, &machine, &mut guest)
}

#[test]
fn programs_are_told_of_it() -> Result {
    let mut fixture = Fixture::new()?;
    let path = fixture.path("told.raw");
    image::raw(&path, 32 * MIB, &[(0, 32 * MIB, 1)])?;
    let of = format!("--image=vda={}", path.display());
    let arguments = ["backup", "told", &of, "--json", "--read-limit", "4M"];
    let mut running = Running::start("told", &mut fixture.fleece_command(&arguments)?)?;
    hit(&mut fixture, "told", &mut running, "scan", Signal::KILL)?;
    running.wait_printed(SOON, "engine_gone")?;
    fixture.start_engine()?;
    let lines = running.finish(LONG)?.code(0)?.json()?;
    let line = |kind: &str| lines.iter().find(|line| line["message_type"] == kind);
    let (gone, back) = (line("engine_gone").unwrap(), line("engine_back").unwrap());
    let committed = line("committed").unwrap();
    assert_eq!((&gone["vm"], &gone["snapshot"]), (&"told".into(), &committed["snapshot"]));
    assert_eq!(gone["wait_seconds"], 600.0);
    assert_eq!((&back["committed"], &back["snapshot"]), (&false.into(), &committed["snapshot"]));
    image::same(&path, &fixture.restore("told@latest", "vda")?)
}
