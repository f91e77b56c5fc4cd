//! The method of every exactness test: the truth is copied while the guest stands still, the
//! backup's point in time is taken before it moves again, and everything after that is written
//! while the backup reads.

use std::path::PathBuf;

use anyhow::Context;

use crate::fixture::{Fixture, snapshot_id};
use crate::guest::{Guest, Machine};
use crate::process::{Finished, Running};
use crate::wait::{LONG, SOON};
use crate::{MIB, Result, image};

/// A committed backup and what its disks held at the point in time.
pub struct Taken {
    /// `VM@ID`.
    pub snapshot: String,
    /// The disk's name and its truth, a raw image.
    pub truths: Vec<(String, PathBuf)>,
    /// What `fleece backup` printed.
    pub printed: Finished,
}

/// A backup that has its point in time and still reads.
pub struct Reading {
    /// `fleece backup`.
    pub running: Running,
    /// The disk's name and its truth.
    pub truths: Vec<(String, PathBuf)>,
    vm: String,
}

/// What the plugin prints once the point in time is taken.
pub const POINT_IN_TIME: &str = "point in time";

/// Copies the disks of a guest that stands still.
///
/// # Errors
/// qemu-img's.
pub fn truths(fixture: &Fixture, machine: &Machine, round: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut copies = Vec::new();
    for disk in &machine.disks {
        let copy = fixture.path(&format!("truth-{}-{}-{round}.raw", machine.name, disk.name));
        image::convert(&disk.path, &disk.format, &copy, "raw")?;
        copies.push((disk.name.clone(), copy));
    }
    Ok(copies)
}

/// Brings a backup to its point in time; the guest runs on when this returns.
///
/// # Errors
/// When the backup fails before that.
pub fn begin(
    fixture: &Fixture,
    machine: &Machine,
    guest: &mut Guest,
    round: &str,
    more: &[&str],
) -> Result<Reading> {
    guest.pause()?;
    let truths = truths(fixture, machine, round)?;
    let mut running = fixture.backup(machine, more)?;
    running.wait_printed(SOON, POINT_IN_TIME)?;
    guest.go_on()?;
    Ok(Reading { running, truths, vm: machine.name.clone() })
}

/// The same where the guest's processors must not be stopped (a disk with an iothread on QEMU 10,
/// which loses completions then): its writer rests instead.
///
/// # Errors
/// When the backup fails before that.
pub fn begin_at_rest(
    fixture: &Fixture,
    machine: &Machine,
    guest: &mut Guest,
    writer: &str,
    (round, more): (&str, &[&str]),
) -> Result<Reading> {
    guest.obey("stop")?;
    guest.obey("sync")?;
    let truths = truths(fixture, machine, round)?;
    let mut running = fixture.backup(machine, more)?;
    running.wait_printed(SOON, POINT_IN_TIME)?;
    guest.obey(writer)?;
    Ok(Reading { running, truths, vm: machine.name.clone() })
}

impl Reading {
    /// Waits for the commit.
    ///
    /// # Errors
    /// When the backup fails.
    pub fn commit(self) -> Result<Taken> {
        let printed = self.running.finish(LONG)?.code(0)?;
        let snapshot = format!("{}@{}", self.vm, snapshot_id(&printed.printed())?);
        Ok(Taken { snapshot, truths: self.truths, printed })
    }
}

/// A machine of some disks of 64 MiB with a committed full backup, 8 MiB of changes on each since, and
/// a writer.
///
/// # Errors
/// When one of that fails.
pub fn with_a_snapshot(fixture: &Fixture, name: &str, disks: u64) -> Result<(Machine, Guest)> {
    let mut machine = Machine::new(fixture.folder(), name)?;
    for _ in 0..disks {
        machine = machine.with_disk("qcow2", 64 * MIB)?;
    }
    fixture.describe(&machine)?;
    let mut guest = machine.start()?;
    for disk in &machine.disks {
        guest.obey(&format!("write {} {} {} 1", disk.name, 24 * MIB, 16 * MIB))?;
    }
    take(fixture, &machine, &mut guest, "full")?;
    for disk in &machine.disks {
        guest.obey(&format!("write {} {} {} 2", disk.name, 28 * MIB, 8 * MIB))?;
    }
    guest.obey(&format!("start 7 {MIB} {} 1 vda", 16 * MIB))?;
    Ok((machine, guest))
}

/// One whole backup with its truth.
///
/// # Errors
/// When it fails.
pub fn take(fixture: &Fixture, machine: &Machine, guest: &mut Guest, round: &str) -> Result<Taken> {
    begin(fixture, machine, guest, round, &[])?.commit().with_context(|| format!("round {round}"))
}

impl Taken {
    /// Restores every disk and compares it with the truth, byte by byte.
    ///
    /// # Errors
    /// When one differs.
    pub fn restores_exactly(&self, fixture: &Fixture) -> Result {
        for (disk, truth) in &self.truths {
            let restored = fixture.restore(&self.snapshot, disk)?;
            image::same(truth, &restored)
                .with_context(|| format!("{} of {}", disk, self.snapshot))?;
            std::fs::remove_file(restored)?;
        }
        Ok(())
    }

    /// What `fleece backup` printed must contain a text.
    ///
    /// # Errors
    /// When it does not.
    pub fn mentions(&self, wanted: &str) -> Result {
        anyhow::ensure!(
            self.printed.printed().contains(wanted),
            "no '{wanted}' in:\n{}",
            self.printed.printed()
        );
        Ok(())
    }
}
