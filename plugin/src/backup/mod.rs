//! A backup, from top to bottom as the design has it: point in time, scan, write, publish.

mod live;
mod messages;
mod offline;
mod resume;
mod stop;

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::cache::Cache;
use crate::engine::BLOCKS_PER_WINDOW;
use crate::engine::{
    self, BackupPlan, BackupRequest, BackupSession, DiskIndex, DiskRequest, Engine, Session,
    Snapshot, SnapshotId,
};
use crate::error::{Error, Kind, Result};
use crate::fingerprint::Fingerprinter;
use crate::hash_pool::HashPool;
use crate::progress::Report;
use crate::qmp::bitmap::DiskPlan;
use crate::qmp::view::Freeze;
use crate::read_limit::ReadLimit;
use crate::scan::{ScanDisk, Shared, depth_of, scan};
use crate::source::{DiskSource, READ_SIZE};
use crate::write::write;

pub use live::live;
pub use offline::{ImageOf, offline};
pub use resume::connect_again;
pub use stop::Stop;

/// How often the engine is asked how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// Least bytes of reads in flight for one disk: one read of the scan, and one of the writing. It is
/// what the engine leases to the last of many sessions.
const LEAST_IN_FLIGHT: u32 = 2 * READ_SIZE;

/// How often the engine hears of us while nothing is transferred: it ends silent sessions.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

/// Longest wait for the answer to a commit: the last container and the manifest, over a slow line.
const COMMIT_LIMIT: Duration = Duration::from_secs(600);

/// How long a commit may still be answered after Ctrl-C; `fleece abort` kills us after 2.5 s.
const LAST_WORD: Duration = Duration::from_secs(2);

/// An engine that does not take our goodbye in this time learns of it by the connection's end.
const GOODBYE: Duration = Duration::from_secs(5);

/// What the operator wants of a backup.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only these disks; all if empty.
    pub disks: Vec<String>,
    /// Not these.
    pub exclude: Vec<String>,
    /// fs-freeze around the point in time.
    pub freeze: Freeze,
    /// Where scratch images go.
    pub scratch_dir: PathBuf,
    /// Most bytes of scratch.
    pub scratch_max: Option<u64>,
    /// Most bytes per second read from the disks.
    pub read_limit: Option<u64>,
    /// Read no faster than a busy guest bears.
    pub pacing: bool,
    /// Read everything.
    pub full: bool,
    /// Longest time to hold the view.
    pub max_hold: Duration,
    /// Longest time to hold it for an engine that went away.
    pub engine_wait: Duration,
    /// Age of the last full read at which the next is due.
    pub max_age_full: Duration,
    /// Change nothing.
    pub dry_run: bool,
    /// Another name in the store.
    pub rename: Option<String>,
    /// Continue the snapshots of this VM.
    pub adopt: Option<Uuid>,
    /// Where locks, sockets and the guard's log are.
    pub run_dir: PathBuf,
}

/// What every step of a backup works with.
struct Context<'a> {
    report: &'a Report,
    engine: &'a Engine,
    options: &'a Options,
    stop: &'a Stop,
}

/// A session, and what the engine admitted it to.
struct Admitted {
    plan: BackupPlan,
    session: Session,
}

/// Who is backed up, as the store knows it.
#[derive(Clone, Debug)]
struct Identity {
    uuid: Uuid,
    name: String,
    adopt: bool,
}

impl Identity {
    /// `--as` and `--adopt` over what the VM says of itself.
    fn new(uuid: Uuid, name: &str, options: &Options) -> Identity {
        Identity {
            uuid: options.adopt.unwrap_or(uuid),
            name: options.rename.clone().unwrap_or_else(|| name.to_owned()),
            adopt: options.adopt.is_some(),
        }
    }

    fn request(
        &self,
        disks: Vec<DiskRequest>,
        config: Vec<u8>,
        hypervisor: String,
    ) -> BackupRequest {
        BackupRequest {
            vm: self.uuid,
            vm_name: self.name.clone(),
            adopt: self.adopt,
            disks,
            config,
            hypervisor,
        }
    }
}

/// Which of the disks are meant; their places.
///
/// # Errors
/// [`Kind::NotFound`] where a word names none.
fn choose(
    vm: &str,
    labels: &[&str],
    options: &Options,
    is_called: impl Fn(usize, &str) -> bool,
) -> Result<Vec<usize>> {
    for word in options.disks.iter().chain(&options.exclude) {
        if !(0..labels.len()).any(|i| is_called(i, word)) {
            let known = labels.join(", ");
            return Err(Error::new(
                Kind::NotFound,
                format!("{vm} has no disk {word}; it has {known}"),
            ));
        }
    }
    let called = |i, words: &[String]| words.iter().any(|word| is_called(i, word));
    let chosen: Vec<usize> = (0..labels.len())
        .filter(|i| options.disks.is_empty() || called(*i, &options.disks))
        .filter(|i| !called(*i, &options.exclude))
        .collect();
    if chosen.is_empty() {
        return Err(Error::new(Kind::NotFound, format!("{vm} has no disk to back up")));
    }
    Ok(chosen)
}

/// Why every disk has to be read in full, bitmap or not.
async fn full_for_all(
    engine: &Engine,
    vm: Uuid,
    latest: Option<&Snapshot>,
    options: &Options,
) -> Result<Option<String>> {
    if options.full {
        return Ok(Some("asked for".to_owned()));
    }
    let Some(latest) = latest else { return Ok(None) };
    let snapshots = engine.snapshots(&vm.to_string()).await?;
    let age = crate::units::now_ms().saturating_sub(last_full(&snapshots, latest));
    let age = Duration::from_millis(u64::try_from(age).unwrap_or(0));
    Ok((age > options.max_age_full)
        .then(|| format!("the last full read was {} days ago", age.as_secs() / 86_400)))
}

/// When the chain of increments that ends in `latest` began, Unix milliseconds.
fn last_full(snapshots: &[Snapshot], latest: &Snapshot) -> i64 {
    let mut at = latest;
    // Oldest first, and a parent is older than its child: one pass from the end.
    for snapshot in snapshots.iter().rev() {
        match &at.parent {
            None => break,
            Some(parent) if *parent == snapshot.id => at = snapshot,
            Some(_) => {}
        }
    }
    at.time_ms
}

/// Scan and write, one window overlapping the next, until everything is settled.
async fn transfer<S: DiskSource + 'static>(
    context: &Context<'_>,
    Admitted { plan, session }: &Admitted,
    disks: Vec<ScanDisk<S>>,
    total: u64,
    limit: &Rc<ReadLimit>,
) -> Result<()> {
    let Context { report, engine, options, .. } = *context;
    let info = engine.info();
    let fingerprinter = Fingerprinter::from_state(info.fingerprint_state, info.block_size);
    let shared = Rc::new(Shared {
        block_size: info.block_size,
        depth: depth_of(plan.in_flight),
        window: BLOCKS_PER_WINDOW,
        pool: HashPool::start(&fingerprinter, info.block_size)?,
        cache: RefCell::new(Cache::new(plan.cache as usize, info.block_size)),
        limit: Rc::clone(limit),
        lent: lend(session, &disks, options).await?,
        scanned: Cell::new(0),
        read: Cell::new(0),
    });
    let sources: Vec<Rc<S>> = disks.iter().map(|disk| Rc::clone(&disk.source)).collect();
    let work = async {
        futures::try_join!(scan(&shared, session, &disks), write(&shared, session, &sources),)
    };
    let progress = report.progress("backup", total);
    let watch = async {
        loop {
            tokio::time::sleep(PROGRESS_INTERVAL).await;
            // Progress is for people; where it fails the work fails too, and says why.
            let counts = session.progress().await.map(|(counts, _)| counts).ok();
            progress.update(shared.scanned.get(), counts);
        }
    };
    tokio::select! {
        result = work => result.map(drop),
        () = watch => Ok(()),
    }
}

/// Lends to the engine the disks whose bytes are in files, so that it reads itself what it wants to
/// have of them; which it took. Under a limit all reads are ours.
async fn lend<S: DiskSource>(
    session: &Session,
    disks: &[ScanDisk<S>],
    options: &Options,
) -> Result<Vec<bool>> {
    let mut lent = Vec::with_capacity(disks.len());
    for (index, disk) in (0..).zip(disks) {
        let Some(image) = disk.source.file().filter(|_| options.read_limit.is_none()) else {
            lent.push(false);
            continue;
        };
        let taken = session.lend(DiskIndex(index), image).await?;
        lent.push(taken);
        if !taken {
            // It will take none, and those that no call took wait in it.
            break;
        }
    }
    Ok(lent)
}

/// Work that holds a view or the images, until they were held for as long as the operator allows.
async fn within<T>(
    options: &Options,
    held_since: Instant,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let limit = options.max_hold;
    tokio::time::timeout_at((held_since + limit).into(), work).await.unwrap_or_else(|_| {
        let held = crate::units::human_duration(limit);
        let what = format!("the view was held for {held}; give it more with --max-hold");
        Err(Error::new(Kind::Failed, what))
    })
}

/// Work that may take long without a word to the engine, such as a push; it is told that we are there.
async fn alive<T>(session: &Session, work: impl Future<Output = T>) -> T {
    let tell = async {
        loop {
            tokio::time::sleep(SIGN_OF_LIFE).await;
            // An engine that is gone is noticed by the transfer.
            let _ = session.progress().await;
        }
    };
    tokio::select! {
        done = work => done,
        done = tell => done,
    }
}

/// Why there is no snapshot, as far as we know.
struct Failure {
    error: Error,
    /// There may be one: the engine did not say. No bitmap may be touched then; the next backup asks
    /// the engine, and settles them.
    ambiguous: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, ambiguous: false }
    }
}

impl Failure {
    /// The engine that went away, and may have committed before, is not asked any more for this reason.
    fn followed_by(&self, error: Error) -> Failure {
        if !self.ambiguous {
            return error.into();
        }
        let error = match error.kind() {
            Kind::Interrupted => {
                Error::new(Kind::Interrupted, "interrupted while the engine was away")
            }
            _ => error,
        };
        Failure { error: uncertain(error), ambiguous: true }
    }

    /// Ends a session that will have no snapshot; best effort.
    async fn give_up(&self, session: &Session) {
        if !self.ambiguous {
            let reason = self.error.to_string();
            let _ = tokio::time::timeout(GOODBYE, session.abort(&reason)).await;
        }
    }
}

/// Asks the engine to commit, and waits for its word: not for ever, and not long once somebody wants
/// us to end.
async fn commit(
    session: &Session,
    (time_ms, bitmaps): (i64, &[String]),
    stop: &Stop,
) -> std::result::Result<Snapshot, Failure> {
    let impatient = async {
        stop.requested().await;
        tokio::time::sleep(LAST_WORD).await;
        Error::new(Kind::Interrupted, "interrupted before the engine's answer")
    };
    let result = tokio::select! {
        result = session.commit(time_ms, bitmaps) => result,
        error = impatient => Err(error),
        () = tokio::time::sleep(COMMIT_LIMIT) => {
            let what = format!("the engine did not answer for {} s", COMMIT_LIMIT.as_secs());
            Err(Error::new(Kind::NoEngine, what))
        }
    };
    result.map_err(|error| match error.kind() {
        Kind::NoEngine | Kind::EngineGone | Kind::Interrupted => {
            Failure { error: uncertain(error), ambiguous: true }
        }
        _ => error.into(),
    })
}

fn uncertain(error: Error) -> Error {
    Error::caused(error.kind(), "the snapshot may be committed; the next backup finds out", error)
}

/// What is to be read of a disk whatever its bitmap says.
fn forced(decided: &engine::DiskPlan) -> Vec<std::ops::Range<u64>> {
    decided.forced.iter().map(|range| range.offset..range.offset + range.length).collect()
}

/// The same after a restart of the engine, which must plan as it did: the point in time cannot be
/// taken otherwise any more.
fn forced_again(plans: &[DiskPlan], again: &BackupPlan) -> Result<Vec<Vec<std::ops::Range<u64>>>> {
    let disks = plans.iter().zip(&again.disks);
    disks
        .map(|(plan, decided)| match decided.incremental != plan.parent().is_empty() {
            true => Ok(forced(decided)),
            false => {
                let what = format!(
                    "the engine that came back would read a disk otherwise ({})",
                    decided.reason
                );
                Err(Error::new(Kind::Failed, what))
            }
        })
        .collect()
}

fn parent(id: &str) -> Option<SnapshotId> {
    (!id.is_empty()).then(|| SnapshotId(id.to_owned()))
}

#[cfg(test)]
mod tests;
