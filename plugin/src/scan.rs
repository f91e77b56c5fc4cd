//! Reads what may have changed, in disk order, and tells the engine its fingerprints.
//!
//! Reads overlap and hashing runs beside them; a queue of as many places as reads may be
//! in flight puts the answers back into disk order.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::cache::Cache;
use crate::engine::{BLOCKS_PER_SUBMIT, BackupSession, BlockExtent, DiskIndex};
use crate::error::{Context, Error, Kind, Result};
use crate::extents::{Action, PlanInput, Work};
use crate::fingerprint::FINGERPRINT_LEN;
use crate::hash_pool::{HashPool, Hashed, MAX_JOBS, push};
use crate::read_limit::ReadLimit;
use crate::source::{DiskSource, READ_SIZE, Scan};

/// What was scanned is handed over after this time at the latest, however little it is: whoever
/// looks at a slow scan shall see it go on.
const SUBMIT_AFTER: Duration = Duration::from_millis(500);

/// Blocks of data in the first window, each further one has twice as many: so the writing begins soon
/// and has about as much to do as the scan beside it, and the largest have few before them. What is
/// smaller, as most increments are, is detected at once. Under a limit the guest comes before the
/// hurry: it feels reads, hashing and compression less one after the other.
const FIRST_WINDOW: u64 = 64 << 10;

/// What scanning and writing share.
pub struct Shared {
    /// Bytes of a block.
    pub block_size: u32,
    /// Reads that the scan, and the writing, may each have in flight.
    pub depth: usize,
    /// Blocks of data in one window; [`crate::engine::BLOCKS_PER_WINDOW`] but for tests.
    pub window: u64,
    /// The hashing threads.
    pub pool: HashPool,
    /// Read blocks that may have to be written.
    pub cache: RefCell<Cache>,
    /// How fast it may be read.
    pub limit: Rc<ReadLimit>,
    /// Which disks were lent to the engine: it reads itself what it wants to have of them.
    pub lent: Vec<bool>,
    /// Bytes of disk looked at so far.
    pub scanned: Cell<u64>,
    /// Bytes read from the source so far, again or for the first time, by us or by the engine.
    pub read: Cell<u64>,
}

impl Shared {
    /// Whether the engine has this disk's image.
    pub(crate) fn is_lent(&self, disk: DiskIndex) -> bool {
        self.lent.get(usize::from(disk.0)).is_some_and(|lent| *lent)
    }

    /// Most blocks that one read may get now.
    pub(crate) fn blocks_per_read(&self) -> u32 {
        (self.limit.read_size() / self.block_size).max(1)
    }
}

/// How many reads the scan and the writing may each have in flight under a lease.
#[must_use]
pub fn depth_of(in_flight: u32) -> usize {
    let reads = (in_flight / READ_SIZE / 2).max(1) as usize;
    reads.min(MAX_JOBS)
}

/// A disk to scan.
pub struct ScanDisk<S> {
    /// Where to read.
    pub source: Rc<S>,
    /// What to read.
    pub input: PlanInput,
}

/// Scans all disks in their order, window by window, and says when it is through.
///
/// # Errors
/// Where the source or the engine fails.
pub async fn scan<S, B>(shared: &Rc<Shared>, session: &B, disks: &[ScanDisk<S>]) -> Result<()>
where
    S: DiskSource + 'static,
    B: BackupSession,
{
    let mut batch = Batch::new(session, shared);
    for (i, disk) in disks.iter().enumerate() {
        let index = u16::try_from(i).map_err(|_| Error::new(Kind::Usage, "too many disks"))?;
        scan_disk(shared, &mut batch, DiskIndex(index), disk).await?;
        batch.flush().await?;
    }
    session.end_scan().await
}

async fn scan_disk<S, B>(
    shared: &Rc<Shared>,
    batch: &mut Batch<'_, B>,
    index: DiskIndex,
    disk: &ScanDisk<S>,
) -> Result<()>
where
    S: DiskSource + 'static,
    B: BackupSession,
{
    batch.disk = index;
    let mut scan = Scan::new(&*disk.source, disk.input.clone())?;
    let mut queue = VecDeque::with_capacity(shared.depth);
    let mut rest: Option<Work> = None;
    loop {
        if queue.len() >= shared.depth {
            take_first(shared, batch, &mut queue).await?;
        }
        let work = match rest.take() {
            Some(work) => work,
            None => match scan.next().await.context(|| "cannot map the disk".to_owned())? {
                Some(work) => work,
                None => break,
            },
        };
        let (piece, left) = split(work, shared.blocks_per_read());
        rest = left;
        queue.push_back(begin(shared, index, &disk.source, piece));
    }
    while !queue.is_empty() {
        take_first(shared, batch, &mut queue).await?;
    }
    Ok(())
}

/// Cuts the first read off an item.
fn split(work: Work, most: u32) -> (Work, Option<Work>) {
    if work.action == Action::Zero || work.blocks <= most {
        return (work, None);
    }
    // Reads end where their size divides the disk: so parents and neighbours meet.
    let until_edge = most - (work.first_block % u64::from(most)) as u32;
    let first = Work { blocks: until_edge, ..work };
    let left = Work {
        first_block: work.first_block + u64::from(until_edge),
        blocks: work.blocks - until_edge,
        ..work
    };
    (first, Some(left))
}

/// A piece of the disk in its place of the queue.
enum Piece {
    Zero(Work),
    Reading(Work, AbortOnDrop<Result<Hashed>>),
}

fn begin<S: DiskSource + 'static>(
    shared: &Rc<Shared>,
    index: DiskIndex,
    source: &Rc<S>,
    work: Work,
) -> Piece {
    if work.action == Action::Zero {
        return Piece::Zero(work);
    }
    let (shared, source) = (Rc::clone(shared), Rc::clone(source));
    let task = async move { read_and_hash(&shared, index, &*source, work).await };
    Piece::Reading(work, AbortOnDrop(tokio::task::spawn_local(task)))
}

async fn read_and_hash<S: DiskSource>(
    shared: &Shared,
    index: DiskIndex,
    source: &S,
    work: Work,
) -> Result<Hashed> {
    let block_size = u64::from(shared.block_size);
    let offset = work.first_block * block_size;
    let length = (u64::from(work.blocks) * block_size).min(source.size() - offset);
    shared.limit.admit(length).await;
    let data = source
        .read(offset, length as u32)
        .await
        .context(|| format!("cannot read {length} bytes at {offset}"))?;
    shared.read.set(shared.read.get() + length);
    let (data, hashed) = shared.pool.hash(data, work.first_block).await?;
    if shared.is_lent(index) {
        return Ok(hashed);
    }
    let mut cache = shared.cache.borrow_mut();
    for run in hashed.extents.iter().filter(|run| !run.zero) {
        let from = (run.first - work.first_block) as usize * shared.block_size as usize;
        let to = from + run.blocks as usize * shared.block_size as usize;
        // A short last block is left to be read again: entries hold whole ones.
        if let Some(whole) = data.get(from..to) {
            cache.offer((index, run.first), whole);
        }
    }
    Ok(hashed)
}

async fn take_first<B: BackupSession>(
    shared: &Shared,
    batch: &mut Batch<'_, B>,
    queue: &mut VecDeque<Piece>,
) -> Result<()> {
    let work = match queue.pop_front() {
        None => return Ok(()),
        Some(Piece::Zero(work)) => {
            let zeros = BlockExtent { first: work.first_block, blocks: work.blocks, zero: true };
            batch.add(&[zeros], &[]).await?;
            work
        }
        Some(Piece::Reading(work, mut task)) => {
            let hashed = (&mut task.0)
                .await
                .map_err(|error| Error::caused(Kind::Failed, "a read was lost", error))??;
            batch.add(&hashed.extents, &hashed.fingerprints).await?;
            work
        }
    };
    let bytes = u64::from(work.blocks) * u64::from(shared.block_size);
    shared.scanned.set(shared.scanned.get() + bytes);
    Ok(())
}

/// A local task that ends with its owner.
pub(crate) struct AbortOnDrop<T>(pub(crate) JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Collects what the engine is told in one call, and counts its windows.
struct Batch<'a, B> {
    session: &'a B,
    disk: DiskIndex,
    extents: Vec<BlockExtent>,
    fingerprints: Vec<u8>,
    /// When the engine was told last.
    told: Instant,
    /// Blocks of data in the open window.
    window: u64,
    /// Blocks of data that the open window may hold.
    most: u64,
    /// And those of the largest.
    largest: u64,
    /// Most blocks of data that one addition can bring.
    piece: usize,
}

impl<'a, B: BackupSession> Batch<'a, B> {
    fn new(session: &'a B, shared: &Shared) -> Self {
        Batch {
            session,
            disk: DiskIndex(0),
            extents: Vec::new(),
            fingerprints: Vec::with_capacity(BLOCKS_PER_SUBMIT * FINGERPRINT_LEN),
            told: Instant::now(),
            window: 0,
            most: match shared.limit.is_set() {
                true => shared.window,
                false => FIRST_WINDOW.min(shared.window),
            },
            largest: shared.window,
            piece: (READ_SIZE / shared.block_size) as usize,
        }
    }

    async fn add(&mut self, extents: &[BlockExtent], fingerprints: &[u8]) -> Result<()> {
        let blocks = (fingerprints.len() / FINGERPRINT_LEN) as u64;
        if self.window + blocks > self.most {
            self.flush().await?;
            self.session.end_window().await?;
            self.window = 0;
            self.most = (2 * self.most).min(self.largest);
        }
        self.window += blocks;
        extents.iter().for_each(|extent| push(&mut self.extents, *extent));
        self.fingerprints.extend_from_slice(fingerprints);
        let data = self.fingerprints.len() / FINGERPRINT_LEN;
        let full = data.max(self.extents.len()) + self.piece > BLOCKS_PER_SUBMIT;
        if full || self.told.elapsed() >= SUBMIT_AFTER {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        if !self.extents.is_empty() {
            self.session.submit(self.disk, &self.extents, &self.fingerprints).await?;
            self.extents.clear();
            self.fingerprints.clear();
            self.told = Instant::now();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
