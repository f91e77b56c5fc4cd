//! The frozen view of a VM's disks at one point in time, in one of three ways.

use crate::error::{Error, Kind, Result};
use crate::qmp::bitmap::DiskPlan;
use crate::qmp::disk::Disk;
use crate::qmp::guard::Guard;
use crate::qmp::session::Session;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How the point in time is held.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Way {
    /// Our own copy-before-write filter: a full scratch breaks the backup, not the guest.
    Filter,
    /// QEMU's backup job: a full scratch pauses the guest until we cancel.
    Job,
    /// Copied into a local scratch image first: an iothread on a QEMU that NBD clients would abort.
    Push,
}

impl Way {
    /// What it means for the guest, for people.
    #[must_use]
    pub fn means(self) -> &'static str {
        match self {
            Way::Filter => "a full scratch breaks the backup, not the guest",
            Way::Job => "a full scratch pauses the guest until the backup is cancelled",
            Way::Push => {
                "copied into scratch first; a full scratch pauses the guest until the backup is cancelled"
            }
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Filter => "filter",
            Way::Job => "job",
            Way::Push => "push",
        })
    }
}

/// fs-freeze around the point in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Freeze {
    /// Not asked for.
    #[default]
    No,
    /// If it fails, warn and go on.
    Try,
    /// If it fails, fail.
    Require,
}

/// What to open.
#[derive(Clone, Debug)]
pub struct Request {
    /// The store's id as it stands in bitmap names.
    pub store: String,
    /// The snapshot's id.
    pub snapshot: String,
    /// The disks with their plans.
    pub disks: Vec<(Disk, DiskPlan)>,
    /// Where scratch images and sockets go (a directory of ours is made in it).
    pub scratch_dir: PathBuf,
    /// The cap on all scratch together, bytes; none: 20 GiB or half of what is free.
    pub scratch_max: Option<u64>,
    /// fs-freeze.
    pub freeze: Freeze,
    /// A way to take instead of the best one (tests, and people who know why).
    pub way: Option<Way>,
}

/// Where one disk of the view is read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// The NBD server's UNIX socket.
    pub socket: PathBuf,
    /// The export's name.
    pub export: String,
    /// The meta context with what is dirty (`qemu:dirty-bitmap:…`); none for a full read.
    pub dirty_context: Option<String>,
    /// Bytes.
    pub size: u64,
    /// The way taken for this disk.
    pub way: Way,
}

/// How a backup ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The manifest is in the store: the old bitmaps go.
    Committed,
    /// It is not: the new bitmaps are merged back into the old ones.
    Failed,
}

/// An open view. It must be ended with [`View::teardown`]; the guard does it otherwise.
#[derive(Debug)]
pub struct View {
    targets: Vec<Target>,
    bitmaps: Vec<String>,
    point_in_time_ms: i64,
    stopped: Duration,
    frozen: Option<Duration>,
    warnings: Vec<String>,
}

impl View {
    /// Takes the point in time. On an error everything is as it was.
    ///
    /// # Errors
    /// `Busy`: QEMU's one NBD server is taken. `Failed`: no space for scratch, QEMU refused, freeze
    /// was required and failed.
    pub async fn open(_session: &Session, _guard: &mut Guard, _request: Request) -> Result<View> {
        Err(Error::new(Kind::Failed, "not built yet"))
    }

    /// One per disk, in the order of the request.
    #[must_use]
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// The new bitmaps' names, in the order of the request.
    #[must_use]
    pub fn bitmaps(&self) -> &[String] {
        &self.bitmaps
    }

    /// When it was, Unix milliseconds.
    #[must_use]
    pub fn point_in_time_ms(&self) -> i64 {
        self.point_in_time_ms
    }

    /// How long the guest's CPUs stood still for it.
    #[must_use]
    pub fn stopped(&self) -> Duration {
        self.stopped
    }

    /// How long the guest's file systems were frozen, if they were.
    #[must_use]
    pub fn frozen(&self) -> Option<Duration> {
        self.frozen
    }

    /// What did not go as asked, for people (exit code 3).
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The most that the scratch images took together so far, bytes.
    #[must_use]
    pub fn scratch_peak(&self) -> u64 {
        0
    }

    /// Watches the view beside the reading; returns only when it is broken (scratch full, QEMU
    /// gone, a guest stopped by it), after having set the guest going again.
    pub async fn broken(&self, _session: &Session) -> Error {
        Error::new(Kind::Failed, "not built yet")
    }

    /// Was everything that was read so far the point in time? To be asked after the last read.
    ///
    /// # Errors
    /// It was not: the backup must fail.
    pub async fn still_valid(&self, _session: &Session) -> Result<()> {
        Err(Error::new(Kind::Failed, "not built yet"))
    }

    /// Ends the view and settles the bitmaps. Can be called again, and after QEMU went away.
    ///
    /// # Errors
    /// Something is left; `fleece cleanup` can try again.
    pub async fn teardown(&mut self, _session: &Session, _outcome: Outcome) -> Result<()> {
        Err(Error::new(Kind::Failed, "not built yet"))
    }
}
