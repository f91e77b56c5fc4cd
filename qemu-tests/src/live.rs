//! A guest that goes on writing while it is backed up again and again, whatever becomes of its backups:
//! what its disk held at each point in time is known.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::process::{Finished, Running};
use crate::wait::{LONG, SOON, wait_until};
use crate::{Guest, MIB, Machine, Result, image};

/// Slow enough that a backup takes some seconds, in which something can go wrong.
const READ_LIMIT: &str = "--read-limit=12M";
/// How often the content of a place changes: in each of so many rounds another place.
const PLACES: u64 = 12;

/// A snapshot, and what its disk held at the point in time.
pub type Truth = (String, PathBuf);

/// The guest, and its backup if one runs.
pub struct Live {
    machine: Machine,
    guest: Guest,
    attempt: Option<Attempt>,
    attempts: u64,
    /// What the disk held at the points in time that were reached, by the snapshot's id.
    truths: Vec<Truth>,
    /// Backups that said that they committed.
    committed: usize,
}

struct Attempt {
    running: Running,
    truth: PathBuf,
    /// The guest stands still until the point in time is taken, or never will be.
    still: bool,
}

impl Live {
    /// A guest with some content that [`crate::cluster::images`] have too, and a writer.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(folder: &Path, name: &str) -> Result<Self> {
        let machine = Machine::new(folder, name)?.with_disk("qcow2", 48 * MIB)?;
        let mut guest = machine.start()?;
        guest.obey(&format!("write vda {} {} 1", 4 * MIB, 12 * MIB))?;
        guest.obey(&format!("start 7 {} {} 5 vda", 40 * MIB, 8 * MIB))?;
        let (attempt, attempts, truths, committed) = (None, 0, Vec::new(), 0);
        Ok(Live { machine, guest, attempt, attempts, truths, committed })
    }

    /// Begins a backup on a host; the guest stands still until [`Live::idle`] sees its point in time.
    ///
    /// # Errors
    /// When the guest is not well, or the backup cannot start.
    pub fn begin(&mut self, cluster: &Cluster, host: usize) -> Result {
        let round = self.attempts;
        self.attempts += 1;
        let place = (18 + round % PLACES) * MIB;
        self.guest.obey(&format!("write vda {place} {MIB} {}", 100 + round))?;
        self.guest.obey(&format!("trim vda {} {}", place + MIB / 2, MIB / 4))?;
        ensure!(self.guest.qmp.runs()?, "the guest is {}", self.guest.qmp.status()?);
        self.guest.pause()?;
        let truth = self.machine.folder.join(format!("truth{round}.raw"));
        let disk = &self.machine.disks[0];
        image::convert(&disk.path, &disk.format, &truth, "raw")?;
        let (qmp, scratch) = (self.machine.socket(), cluster.fixture.text("scratch"));
        let (name, qmp) = (&self.machine.name, qmp.display().to_string());
        let backup =
            ["backup", name, "--qmp", &qmp, "--scratch-dir", &scratch, READ_LIMIT, "--json"];
        let running = cluster.begin(host, "fleece", &backup)?;
        self.attempt = Some(Attempt { running, truth, still: true });
        Ok(())
    }

    /// SIGKILLs `fleece` if a backup runs.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&self) -> Result {
        self.attempt.as_ref().map_or(Ok(()), |attempt| attempt.running.signal(Signal::KILL))
    }

    /// Whether no backup runs. Lets the guest go on once that needs no truth any more, and takes the
    /// outcome of what has ended.
    ///
    /// # Errors
    /// An outcome that has no reason, or the guest's.
    pub fn idle(&mut self) -> Result<bool> {
        let Some(attempt) = &mut self.attempt else { return Ok(true) };
        // The status first: what was printed before the end must be seen.
        let ended = attempt.running.ended()?.is_some();
        if attempt.still && (ended || attempt.running.printed().contains("point_in_time")) {
            self.guest.go_on()?;
            attempt.still = false;
        }
        if ended && let Some(Attempt { running, truth, .. }) = self.attempt.take() {
            self.reap(&running.finish(SOON)?, truth)?;
        }
        Ok(ended)
    }

    fn reap(&mut self, finished: &Finished, truth: PathBuf) -> Result {
        // The last line of one that was killed may be half a line.
        let lines = finished.out.lines();
        let said: Vec<Value> = lines.filter_map(|line| serde_json::from_str(line).ok()).collect();
        let message = |kind: &str| said.iter().find(|message| message["message_type"] == kind);
        match message("point_in_time").map(|point| &point["snapshot"]) {
            Some(id) => self.truths.push((id.as_str().context("no id")?.to_owned(), truth)),
            None => fs::remove_file(truth)?,
        }
        println!("{}: {} {}", self.machine.name, finished.code, finished.err);
        if !ended_with_reason(finished)? {
            return Ok(());
        }
        // Nothing but the first backup may need a full read, whatever happened to those between.
        let plan = message("plan").context("no plan")?;
        let incremental = plan["disks"][0]["incremental"] == true;
        ensure!(incremental || self.committed == 0, "a full read: {}", finished.printed());
        self.committed += 1;
        Ok(())
    }

    /// After whatever happened the guest lives, and its next backups commit and leave nothing behind.
    ///
    /// # Errors
    /// What is wrong.
    pub fn must_live(&mut self, cluster: &Cluster, host: usize) -> Result {
        self.guest.keeps_writing()?;
        // The first one may be the first of all, a full one.
        for _ in 0..2 {
            let before = self.committed;
            self.begin(cluster, host)?;
            wait_until(LONG, "the guest's next backup", || self.idle())?;
            ensure!(self.committed > before, "the guest's next backup did not commit");
            self.guest.is_left_alone(&self.machine, 1)?;
        }
        self.guest.keeps_writing()
    }

    /// The snapshots that a host lists, each with its truth; and the truths of points in time that did
    /// not become snapshots.
    ///
    /// # Errors
    /// A snapshot of no known point in time.
    pub fn outcome(&self, cluster: &Cluster, host: usize) -> Result<(Vec<Truth>, Vec<PathBuf>)> {
        let name = &self.machine.name;
        let list = cluster.begin(host, "fleece", &["snapshots", name, "--json"])?;
        let listed = list.finish(LONG)?.code(0)?.json()?;
        let listed: Vec<&str> = listed.iter().filter_map(|one| one["id"].as_str()).collect();
        let (kept, lost): (Vec<_>, Vec<_>) =
            self.truths.iter().cloned().partition(|(id, _)| listed.contains(&id.as_str()));
        // More may be there than said so: the word was lost.
        ensure!(kept.len() == listed.len(), "{listed:?} are listed, known are {kept:?}");
        ensure!(kept.len() >= self.committed, "{} committed, {listed:?}", self.committed);
        let kept = kept.into_iter().map(|(id, truth)| (format!("{name}@{id}"), truth));
        Ok((kept.collect(), lost.into_iter().map(|(_, truth)| truth).collect()))
    }
}

/// Whether a backup committed; if not, there is a reason for that where things go wrong.
///
/// # Errors
/// When there is none.
pub fn ended_with_reason(finished: &Finished) -> Result<bool> {
    match finished.code {
        0 | 3 => Ok(true),
        // Failed, still busy elsewhere, no engine, or killed.
        1 | 11 | 13 | -1 => Ok(false),
        other => anyhow::bail!("{} ended with {other}: {}", finished.name, finished.printed()),
    }
}
