//! The plugin or QEMU, killed at every moment of a live backup, each of them reached for certain: a
//! command of the monitor that is held, a stage that the engine reports, a store made slow. The guest
//! goes on (or boots again), the next backup needs no manual step, reads no more than the disks hold,
//! and is exact; what was committed before comes back bit for bit.

use std::time::Duration;

use qemu_tests::guest::Guest;
use qemu_tests::held::Brake;
use qemu_tests::process::Running;
use qemu_tests::proxy::{Hold, Proxy};
use qemu_tests::scenario::{Taken, with_a_snapshot};
use qemu_tests::wait::{LONG, SOON};
use qemu_tests::{Fixture, MIB, Machine, Result, take};
use serde_json::Value;

/// How long each creation of an object takes where the commit is to be met.
const SLOW: Duration = Duration::from_millis(400);

/// A moment of a backup.
#[derive(Clone, Copy)]
enum Moment {
    /// A command of the monitor: the first with this text.
    Command(&'static str, Hold),
    /// The plugin reads for the first time.
    Reading,
    /// The plugin reads again, and writes what is new.
    Writing,
    /// The manifest is being written.
    Committing,
}
use Moment::{Command, Committing, Reading, Writing};

/// All of them, in the order of a backup of two disks with filters.
const MOMENTS: [(&str, Moment); 14] = [
    ("the NBD server is asked for", Command("nbd-server-start", Hold::Before)),
    ("scratch is being added", Command("blockdev-add", Hold::Before)),
    ("the new bitmap is there", Command("block-dirty-bitmap-add", Hold::After)),
    ("a filter is made", Command("copy-before-write", Hold::After)),
    ("the guest stands still", Command("\"stop\"", Hold::After)),
    ("no filter is inserted", Command("qom-set", Hold::Before)),
    ("one of two filters is inserted", Command("qom-set", Hold::After)),
    ("filters are in, old bitmaps record", Command("block-dirty-bitmap-disable", Hold::Before)),
    ("old bitmaps are disabled", Command("block-dirty-bitmap-disable", Hold::After)),
    ("a view is exported", Command("block-export-add", Hold::After)),
    ("reading", Reading),
    ("writing", Writing),
    ("committing", Committing),
    ("committed, old bitmaps there", Command("block-dirty-bitmap-remove", Hold::Before)),
];

/// And the end of the view, after a commit.
const TEARING_DOWN: [(&str, Moment); 3] = [
    ("the export is gone", Command("block-export-del", Hold::After)),
    ("a node is to go", Command("blockdev-del", Hold::Before)),
    ("old bitmaps are dropped", Command("block-dirty-bitmap-remove", Hold::After)),
];

/// A backup at one moment, and what keeps it there.
struct Reached {
    running: Running,
    _proxy: Option<Proxy>,
    _brake: Option<Brake>,
}

fn reach(fixture: &mut Fixture, machine: &Machine, moment: Moment) -> Result<Reached> {
    let some = |name: &'static str| move |s: &Value| s[name].as_u64().is_some_and(|n| n > 0);
    let vm = machine.name.as_str();
    let (mut proxy, mut brake) = (None, None);
    let running = match moment {
        Command(text, hold) => {
            let held = Proxy::start(&fixture.path("proxy"), &machine.socket(), text, hold)?;
            let running = fixture.backup_through(held.path(), machine, &[])?;
            held.wait_held(SOON)?;
            proxy = Some(held);
            running
        }
        Reading => {
            let mut running = fixture.backup(machine, &["--read-limit", "2M"])?;
            fixture.wait_stage((vm, &mut running), "scan", some("read"))?;
            running
        }
        Writing => {
            // Long enough to be seen on a busy host.
            let mut running = fixture.backup(machine, &["--read-limit", "2M"])?;
            fixture.wait_stage((vm, &mut running), "write", some("new"))?;
            running
        }
        Committing => {
            brake = Some(Brake::calls(fixture.engine()?.pid(), "linkat", SLOW)?);
            let mut running = fixture.backup(machine, &[])?;
            fixture.wait_stage((vm, &mut running), "publish", |_| true)?;
            running
        }
    };
    Ok(Reached { running, _proxy: proxy, _brake: brake })
}

/// New content on every disk, more than the plugin keeps of what it read.
fn change(machine: &Machine, guest: &mut Guest, seed: usize) -> Result {
    for disk in &machine.disks {
        guest.obey(&format!("write {} {} {} {}", disk.name, 24 * MIB, 16 * MIB, 100 + seed))?;
    }
    Ok(())
}

/// What the disks of a machine hold together.
fn size(machine: &Machine) -> u64 {
    machine.disks.len() as u64 * 64 * MIB
}

#[test]
fn the_plugin() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "plugin", 2)?;
    let first = take(&fixture, &machine, &mut guest, "first")?;
    let mut before: Option<Taken> = None;
    for (round, (name, moment)) in MOMENTS.into_iter().chain(TEARING_DOWN).enumerate() {
        println!("killed while {name}");
        change(&machine, &mut guest, round)?;
        let reached = reach(&mut fixture, &machine, moment)?;
        reached.running.kill()?;
        drop((reached._proxy, reached._brake));
        guest.keeps_writing()?;
        guest.is_left_alone(&machine, 4)?;
        let taken = take(&fixture, &machine, &mut guest, &format!("after{round}"))?;
        taken.mentions("incremental since")?;
        taken.restores_exactly(&fixture)?;
        guest.is_left_alone(&machine, 2)?;
        assert!(fixture.bytes_read("plugin")? < size(&machine) / 2, "{name}: too much was read");
        if let Some(before) = before.replace(taken) {
            before.restores_exactly(&fixture)?;
        }
    }
    first.restores_exactly(&fixture)
}

#[test]
fn qemu() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = with_a_snapshot(&fixture, "qemu", 1)?;
    let first = take(&fixture, &machine, &mut guest, "first")?;
    let moments = [
        ("the filter is to be inserted", Command("qom-set", Hold::Before)),
        ("the old bitmap records", Command("block-dirty-bitmap-disable", Hold::Before)),
        ("reading", Reading),
        ("writing", Writing),
        ("committing", Committing),
        ("committed, old bitmap there", Command("block-dirty-bitmap-remove", Hold::Before)),
    ];
    for (round, (name, moment)) in moments.into_iter().enumerate() {
        println!("killed while {name}");
        change(&machine, &mut guest, round)?;
        let reached = reach(&mut fixture, &machine, moment)?;
        let Guest { qemu, .. } = guest;
        qemu.kill()?;
        drop(reached._brake);
        // It notices by itself; whether there is a snapshot depends on the moment.
        let finished = reached.running.finish(LONG)?;
        assert!(
            [0, 1, 3].contains(&finished.code),
            "{name}: {} {}",
            finished.code,
            finished.printed()
        );
        guest = machine.start()?;
        guest.obey(&format!("start {round} {MIB} {} 1 vda", 16 * MIB))?;
        let taken = take(&fixture, &machine, &mut guest, &format!("after{round}"))?;
        taken.restores_exactly(&fixture)?;
        guest.is_left_alone(&machine, 1)?;
        assert!(fixture.bytes_read("qemu")? <= size(&machine), "{name}: more than a full read");
    }
    first.restores_exactly(&fixture)
}
