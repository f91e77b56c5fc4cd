//! Entries of a run in ascending order, by sequential reads that leave nothing in memory.
//!
//! A large run is walked by a thread of its own, some batches ahead of whoever takes them: waiting
//! for the disk, page faults and LMDB's cursor then cost a pass little where there is a second core.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Bound;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::fs::{Advice, fadvise};

use super::group::{self, Packed};
use super::memtable::{Entry, Lead};
use super::shard::{BATCH, RunReader, WINDOW};
use crate::error::{Context, Error, Kind, Result};
use crate::ids::{Address, Fingerprint};

/// Bytes after which a sweep renews its map, to let go what is behind it: so much of a run is
/// mapped at most. Renewing takes some 50 microseconds.
const MAPPED: u64 = 4 * WINDOW;
/// Bytes by which a place in the file may be guessed wrongly.
const WINDOW_SLACK: u64 = 256 << 10;
/// Batches of 32 KiB that a thread is ahead: enough that neither side waits for each of them.
const AHEAD: usize = 4;
/// Stack of such a thread: LMDB's cursor, and no recursion.
const STACK: usize = 128 << 10;

/// Entries of a run, ascending.
pub(super) struct Sweep {
    source: Source,
    batch: Vec<Packed>,
    taken: usize,
}

enum Source {
    /// A small run: it is in the page cache soon, and not worth a thread.
    Here(Box<Walk>),
    Thread(Walker),
}

impl Sweep {
    /// A sweep over the entries of `run` from `first` (or behind it) to `last`.
    pub(super) fn begin(
        run: RunReader,
        first: Bound<Fingerprint>,
        last: Fingerprint,
    ) -> Result<Self> {
        let small = run.is_small();
        let walk = Walk::begin(run, first, last)?;
        let source =
            if small { Source::Here(Box::new(walk)) } else { Source::Thread(Walker::start(walk)?) };
        Ok(Sweep { source, batch: Vec::new(), taken: 0 })
    }

    /// The next entry.
    #[allow(clippy::should_implement_trait)] // It can fail.
    #[inline]
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        if self.taken == self.batch.len() {
            self.fill()?;
        }
        let entry = self.batch.get(self.taken).map(group::unpack);
        self.taken += usize::from(entry.is_some());
        Ok(entry)
    }

    /// Steps over what is before `fingerprint`; where its block is, if it comes next.
    #[inline]
    pub(super) fn seek_forward(&mut self, fingerprint: &Fingerprint) -> Result<Option<Address>> {
        let wanted = fingerprint.lead();
        let before = |packed: &Packed| {
            let lead = group::lead(packed);
            lead < wanted || (lead == wanted && *group::key(packed) < fingerprint.0[..])
        };
        loop {
            let rest = self.batch.get(self.taken..).unwrap_or(&[]);
            if let Some(steps) = rest.iter().position(|packed| !before(packed)) {
                self.taken += steps;
                let found = rest.get(steps).filter(|p| *group::key(p) == fingerprint.0[..]);
                return Ok(found.map(|packed| group::unpack(packed).1));
            }
            self.fill()?;
            if self.batch.is_empty() {
                return Ok(None);
            }
        }
    }

    /// Takes the next batch; an empty one at the end.
    fn fill(&mut self) -> Result<()> {
        self.taken = 0;
        match &mut self.source {
            Source::Here(walk) => walk.fill(&mut self.batch),
            Source::Thread(walker) => {
                self.batch = walker.next()?;
                Ok(())
            }
        }
    }
}

/// A thread that walks a run.
struct Walker {
    /// `None` once it is told to end.
    batches: Option<Receiver<Result<Vec<Packed>>>>,
    thread: Option<JoinHandle<()>>,
}

impl Walker {
    fn start(walk: Walk) -> Result<Self> {
        let (sender, batches) = bounded(AHEAD);
        let thread = thread::Builder::new()
            .name("sweep".into())
            .stack_size(STACK)
            .spawn(move || send_all(walk, &sender))
            .map_err(|e| Error::caused(Kind::Failed, "cannot start a sweep's thread", e))?;
        Ok(Walker { batches: Some(batches), thread: Some(thread) })
    }

    /// The next batch; an empty one at the end.
    fn next(&mut self) -> Result<Vec<Packed>> {
        if let Some(Ok(batch)) = self.batches.as_ref().map(Receiver::recv) {
            return batch;
        }
        // An end that the thread did not mean must not pass for the run's.
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(Error::new(Kind::Failed, "the thread of a sweep panicked")),
            _ => Ok(Vec::new()),
        }
    }
}

impl Drop for Walker {
    fn drop(&mut self) {
        self.batches = None;
        // LMDB opens a run once at a time: who opens it next must find it closed.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends all batches, or an error, until nobody wants more.
fn send_all(mut walk: Walk, batches: &Sender<Result<Vec<Packed>>>) {
    loop {
        let mut batch = Vec::new();
        let filled = walk.fill(&mut batch);
        if filled.is_ok() && batch.is_empty() {
            return;
        }
        let failed = filled.is_err();
        if batches.send(filled.map(|()| batch)).is_err() || failed {
            return;
        }
    }
}

/// Reads a run batch by batch, so that between two of them the map can be renewed: pages that are
/// mapped cannot be let go, and a large run would fill the memory with pages of no more use.
struct Walk {
    run: Option<RunReader>,
    file: File,
    small: bool,
    /// Where the next batch begins.
    next: Bound<Fingerprint>,
    last: Fingerprint,
    /// Bytes of the file up to which the kernel was asked to read.
    ahead: u64,
    /// Bytes of the file up to which the kernel was told to forget.
    behind: u64,
    /// Where the sweep ends in the file.
    end: u64,
}

impl Walk {
    fn begin(run: RunReader, first: Bound<Fingerprint>, last: Fingerprint) -> Result<Self> {
        let file =
            File::open(run.path()).context(|| format!("cannot open {}", run.path().display()))?;
        let at = place(&run, &first);
        let end = run.place(&last).saturating_add(WINDOW_SLACK).min(run.bytes());
        let small = run.is_small();
        Ok(Walk { run: Some(run), file, small, next: first, last, ahead: at, behind: at, end })
    }

    /// Reads the next batch; an empty one at the end.
    fn fill(&mut self, batch: &mut Vec<Packed>) -> Result<()> {
        batch.clear();
        self.slide()?;
        let Some(run) = &self.run else { return Ok(()) };
        batch.reserve_exact(BATCH);
        run.read(self.next, &self.last, batch)?;
        match batch.last() {
            Some(packed) => self.next = Bound::Excluded(group::unpack(packed).0),
            None => {
                self.run = None;
                self.forget(self.end);
            }
        }
        Ok(())
    }

    /// Keeps a window ahead of us in flight, and lets go what is behind us.
    fn slide(&mut self) -> Result<()> {
        let Some(run) = &self.run else { return Ok(()) };
        let at = place(run, &self.next);
        while self.ahead < self.end.min(at + WINDOW) {
            // Advice only: if the kernel does not take it, the sweep is slower.
            let _ = fadvise(&self.file, self.ahead, NonZeroU64::new(WINDOW), Advice::WillNeed);
            self.ahead += WINDOW;
        }
        if !self.small && at > self.behind + MAPPED {
            let (path, range) = (run.path().to_owned(), run.range());
            self.run = None;
            self.forget(at);
            self.run = Some(RunReader::open(&path, range)?);
        }
        Ok(())
    }

    /// Lets the page cache before `at` go, which must not be mapped. Small runs stay.
    fn forget(&mut self, at: u64) {
        if let Some(length) = NonZeroU64::new(at.saturating_sub(self.behind))
            && !self.small
        {
            // Advice only: if the kernel does not take it, the page cache is fatter.
            let _ = fadvise(&self.file, self.behind, Some(length), Advice::DontNeed);
            self.behind = at;
        }
    }
}

/// About where in the file of `run` a sweep from `first` on begins.
fn place(run: &RunReader, first: &Bound<Fingerprint>) -> u64 {
    match first {
        Bound::Included(first) | Bound::Excluded(first) => run.place(first),
        Bound::Unbounded => 0,
    }
}
