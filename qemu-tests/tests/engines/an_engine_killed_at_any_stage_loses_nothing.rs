//! The engine, killed in every stage of a backup, before each of its durable steps, at random
//! moments, and in a restore. The plugin goes on in the next engine, or ends with a clear message where
//! it was told not to wait; an engine started anew needs no help, the next backup is exact and reads no
//! more than the disk holds, and what was committed comes back bit for bit.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use qemu_tests::content::mix;
use qemu_tests::fixture::{Places, snapshot_id};
use qemu_tests::held::{Brake, killed_at};
use qemu_tests::process::{Finished, Running};
use qemu_tests::scenario::POINT_IN_TIME;
use qemu_tests::wait::{LONG, stays, wait_until};
use qemu_tests::{Fixture, MIB, Result, image, tools};
use rustix::process::Signal;
use serde_json::Value;

/// What the image of a test holds.
const SIZE: u64 = 32 * MIB;
/// What of it changes between two backups: more than the plugin keeps of what it read.
const CHANGED: u64 = 12 * MIB;

/// A VM that is shut off, and its snapshots with what they must hold.
struct Vm {
    path: PathBuf,
    taken: Vec<(String, PathBuf)>,
}

impl Vm {
    /// With one snapshot.
    fn new(fixture: &Fixture, name: &str) -> Result<Self> {
        let path = fixture.path(&format!("{name}.qcow2"));
        image::create(&path, "qcow2", SIZE)?;
        let mut vm = Vm { path, taken: Vec::new() };
        vm.change(fixture, 1)?;
        vm.backs_up(fixture, name)?;
        Ok(vm)
    }

    /// New content in a part of it, where its dirty bitmap sees it.
    fn change(&self, fixture: &Fixture, seed: u64) -> Result {
        let source = fixture.path("content.raw");
        image::raw(&source, CHANGED, &[(0, CHANGED, seed)])?;
        let offset = mix(seed) % (SIZE - CHANGED) / MIB * MIB;
        let write = format!("write -q -s {} {offset} {CHANGED}", source.display());
        tools::run(tools::qemu("qemu-io")?.args(["-f", "qcow2", "-c", &write]).arg(&self.path))?;
        Ok(())
    }

    fn start(&self, fixture: &Fixture, name: &str, more: &[&str]) -> Result<Running> {
        let image = format!("--image=vda={}", self.path.display());
        let mut arguments = vec!["backup", name, &image];
        arguments.extend(more);
        Running::start(name, &mut fixture.fleece_command(&arguments)?)
    }

    /// The next backup, with no help.
    fn backs_up(&mut self, fixture: &Fixture, name: &str) -> Result {
        let finished = self.start(fixture, name, &[])?.finish(LONG)?;
        self.took(fixture, name, finished)
    }

    /// A backup that committed is exact, and no dearer than a full read.
    fn took(&mut self, fixture: &Fixture, name: &str, finished: Finished) -> Result {
        let printed = finished.code(0)?.printed();
        assert!(fixture.bytes_read(name)? <= SIZE, "more than a full read: {printed}");
        let truth = fixture.path(&format!("{name}-{}.raw", self.taken.len()));
        image::convert(&self.path, "qcow2", &truth, "raw")?;
        self.taken.push((format!("{name}@{}", snapshot_id(&printed)?), truth));
        self.newest_restores(fixture)
    }

    fn newest_restores(&self, fixture: &Fixture) -> Result {
        self.taken.last().map_or(Ok(()), |newest| restores(fixture, newest))
    }

    fn all_restore(&self, fixture: &Fixture) -> Result {
        self.taken.iter().try_for_each(|taken| restores(fixture, taken))
    }
}

fn restores(fixture: &Fixture, (snapshot, truth): &(String, PathBuf)) -> Result {
    let restored = fixture.restore(snapshot, "vda")?;
    image::same(truth, &restored)?;
    Ok(std::fs::remove_file(restored)?)
}

/// A plugin that is not to wait for its engine.
const AT_ONCE: [&str; 2] = ["--engine-wait", "0s"];

/// A plugin whose engine died says so, and never that it committed.
fn told(running: Running) -> Result {
    let finished = running.finish(LONG)?;
    assert!([1, 13].contains(&finished.code), "{} {}", finished.code, finished.printed());
    assert!(finished.printed().contains("engine"), "{}", finished.printed());
    Ok(())
}

#[test]
fn in_every_stage() -> Result {
    let mut fixture = Fixture::new()?;
    let mut vm = Vm::new(&fixture, "vm")?;
    let other = fixture.path("other.qcow2");
    let some = |name: &'static str| move |s: &Value| s[name].as_u64().is_some_and(|n| n > MIB);
    for (round, stage) in
        ["scan", "detect", "write", "settle", "publish"].into_iter().cycle().take(10).enumerate()
    {
        let waits = round >= 5;
        println!("killed in {stage}, waits: {waits}");
        vm.change(&fixture, 10 + round as u64)?;
        let pid = fixture.engine()?.pid();
        let mut brake = None;
        let mut silent = None;
        match stage {
            "detect" => brake = Some(Brake::thread(pid, "owner")?),
            "publish" => {
                brake = Some(Brake::calls(pid, "linkat", Duration::from_millis(300))?);
            }
            "settle" => silent = Some(silent_writer(&fixture, (&vm.path, &other), waits)?),
            _ => {}
        }
        let limit: &[&str] = match stage {
            "scan" => &["--read-limit", "2M"],
            "write" => &["--read-limit", "6M"],
            _ => &[],
        };
        let wait: &[&str] = if waits { &[] } else { &AT_ONCE };
        let mut running = vm.start(&fixture, "vm", &[limit, wait].concat())?;
        match stage {
            "scan" => fixture.wait_stage(("vm", &mut running), stage, some("read"))?,
            "write" => fixture.wait_stage(("vm", &mut running), stage, some("new"))?,
            _ => fixture.wait_stage(("vm", &mut running), stage, |_| true)?,
        }
        // A thread that strace holds keeps a dead process from its end.
        fixture.engine()?.signal(Signal::KILL)?;
        drop(brake);
        fixture.kill_engine()?;
        if waits {
            fixture.start_engine()?;
            vm.took(&fixture, "vm", running.finish(LONG)?)?;
        } else {
            told(running)?;
        }
        if let Some(silent) = silent {
            silent.signal(Signal::CONT)?;
            match waits {
                true => drop(silent.finish(LONG)?.code(0)?),
                false => told(silent)?,
            }
        }
        if !waits {
            fixture.start_engine()?;
        }
        vm.backs_up(&fixture, "vm")?;
    }
    vm.all_restore(&fixture)
}

/// A backup of the same blocks that was granted all of them, and says nothing from there on.
fn silent_writer(fixture: &Fixture, (path, other): (&Path, &Path), waits: bool) -> Result<Running> {
    image::convert(path, "qcow2", other, "qcow2")?;
    let image = format!("--image=vda={}", other.display());
    let mut arguments = vec!["backup", "other", &image, "--full", "--read-limit", "8M"];
    arguments.extend(AT_ONCE.iter().filter(|_| !waits));
    let mut running = Running::start("other", &mut fixture.fleece_command(&arguments)?)?;
    let writes = |session: &Value| session["new"].as_u64().is_some_and(|new| new > 0);
    fixture.wait_stage(("other", &mut running), "write", writes)?;
    running.signal(Signal::STOP)?;
    Ok(running)
}

/// What makes something durable, or visible, or gone.
const DURABLE: &str = "fsync,fdatasync,linkat,rename,renameat,renameat2,unlink,unlinkat";
/// More such steps than a thread of an engine makes in one small backup.
const STEPS: u32 = 80;

#[test]
fn before_every_durable_step() -> Result {
    let mut fixture = Fixture::at(Places::default())?;
    fixture.start_engine()?;
    let mut vm = Vm::new(&fixture, "vm")?;
    let (mut at_start, mut in_backup) = (0, 0);
    for step in 1..=STEPS {
        fixture.kill_engine()?;
        vm.change(&fixture, 100 + u64::from(step))?;
        fixture.start_engine_by(killed_at(DURABLE, step));
        let survived = match fixture.start_engine() {
            Err(_) => {
                at_start += 1;
                fixture.start_engine_by(Vec::new());
                fixture.start_engine()?;
                false
            }
            Ok(()) => {
                let mut running = vm.start(&fixture, "vm", &[])?;
                let engine = fixture.engine()?;
                wait_until(LONG, "the end of either", || {
                    Ok(running.ended()?.is_some() || engine.ended()?.is_some())
                })?;
                let died = engine.ended()?.is_some();
                in_backup += u32::from(died);
                fixture.kill_engine()?;
                fixture.start_engine_by(Vec::new());
                fixture.start_engine()?;
                let finished = running.finish(LONG)?;
                // Before it has a point in time there is nothing to wait with.
                match died && finished.code != 0 && !finished.printed().contains(POINT_IN_TIME) {
                    true => assert!(finished.printed().contains("engine"), "{finished:?}"),
                    false => vm.took(&fixture, "vm", finished)?,
                }
                !died
            }
        };
        vm.backs_up(&fixture, "vm")?;
        if survived {
            println!("killed {at_start} times while it started, {in_backup} times in a backup");
            assert!(in_backup >= 3, "the steps of a backup were not met");
            return vm.all_restore(&fixture);
        }
    }
    panic!("an engine still died at step {STEPS}");
}

#[test]
fn at_random_moments() -> Result {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    println!("seed {seed}");
    let mut fixture = Fixture::new()?;
    let mut vm = Vm::new(&fixture, "vm")?;
    for round in 0..12 {
        let random = mix(seed + round);
        vm.change(&fixture, 1000 + round)?;
        let mut running = vm.start(&fixture, "vm", &["--read-limit", "24M"])?;
        // The moment is the test's input: nothing is waited for.
        stays(Duration::from_millis(random % 1500), "time passing", || Ok(true))?;
        let (plugin, engine) =
            [(true, false), (false, true), (true, true)][(random >> 32) as usize % 3];
        println!("round {round}: after {} ms, plugin {plugin}, engine {engine}", random % 1500);
        if engine {
            fixture.kill_engine()?;
        }
        let ended = running.ended()?.is_some();
        if plugin && !ended {
            running.kill()?;
            if engine {
                fixture.start_engine()?;
            }
        } else {
            if engine {
                fixture.start_engine()?;
            }
            let finished = running.finish(LONG)?;
            match finished.code != 0 && !finished.printed().contains(POINT_IN_TIME) {
                true => assert!([1, 13].contains(&finished.code), "{finished:?}"),
                false => vm.took(&fixture, "vm", finished)?,
            }
        }
        vm.backs_up(&fixture, "vm")?;
    }
    vm.all_restore(&fixture)
}

/// What an engine does for each piece of a restore: it reads, and writes to a raw file itself.
const PIECE: &str = "pread64,pwrite64";

/// What a restore to `restored` writes to until it is whole.
fn half_restored(fixture: &Fixture) -> Result<Option<PathBuf>> {
    for entry in std::fs::read_dir(fixture.folder())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(".restored.fleece-") {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

#[test]
fn in_a_restore() -> Result {
    let mut fixture = Fixture::new()?;
    let vm = Vm::new(&fixture, "vm")?;
    let target = fixture.path("restored");
    for format in ["raw", "qcow2"] {
        println!("killed in a restore to {format}");
        let brake = Brake::calls(fixture.engine()?.pid(), PIECE, Duration::from_millis(500))?;
        let to = fixture.text("restored");
        let arguments = ["restore", "vm@latest", "--to", &to, "-O", format];
        let mut running = Running::start("restore", &mut fixture.fleece_command(&arguments)?)?;
        wait_until(LONG, "the first bytes in the target", || {
            ensure!(running.ended()?.is_none(), "it ended: {}", running.printed());
            let allocated = half_restored(&fixture)?.map(|begun| image::allocated(&begun));
            Ok(allocated.is_some_and(|bytes| bytes.is_ok_and(|bytes| bytes > MIB)))
        })?;
        fixture.engine()?.signal(Signal::KILL)?;
        drop(brake);
        fixture.kill_engine()?;
        let finished = running.finish(LONG)?.code(13)?;
        assert!(finished.printed().contains("engine"), "{}", finished.printed());
        let left = half_restored(&fixture)?;
        assert!(!target.exists() && left.is_none(), "something half restored is left: {left:?}");
        fixture.start_engine()?;
        vm.newest_restores(&fixture)?;
    }
    Ok(())
}
