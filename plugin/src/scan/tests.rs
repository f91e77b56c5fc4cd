//! Scan and write together against an engine that lives in memory.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use super::*;
use crate::engine::{BLOCKS_PER_WINDOW, Grant, MAX_LENT, MAX_WRITE};
use crate::extents::{Extent, Flags, Wanted};
use crate::fingerprint::{Fingerprinter, is_zero};
use crate::nbd::{Buffer, NbdError, NbdErrorKind, wire};
use crate::pace::Reads;
use crate::write::write;

const BLOCK: usize = 4096;
const STATE: [u32; 5] = [1, 2, 3, 4, 5];

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// A disk in memory. Reads end in any order.
struct Memory {
    bytes: Vec<u8>,
    dirty: Vec<bool>,
    random: RefCell<Random>,
    in_flight: Cell<u64>,
    gap: u64,
    most_in_flight: Cell<u64>,
    reads: Cell<u64>,
    /// Clean blocks cannot be read; how often that was tried.
    clean_is_bad: bool,
    failed: Cell<u64>,
}

impl Memory {
    /// Few distinct blocks, so that many are duplicates; some zero; holes as extents.
    fn new(blocks: usize, tail: usize, seed: u64) -> Memory {
        let mut random = Random(seed);
        let mut bytes = vec![0; blocks * BLOCK + tail];
        for block in bytes.chunks_mut(BLOCK) {
            match random.next(4) {
                0 => {}
                _ => block.fill(random.next(200) as u8 + 1),
            }
        }
        bytes[100 * BLOCK..200 * BLOCK].fill(0);
        let dirty = (0..bytes.len().div_ceil(BLOCK)).map(|_| random.next(3) == 0).collect();
        Memory {
            bytes,
            dirty,
            random: RefCell::new(random),
            in_flight: Cell::new(0),
            gap: [0, 4096, 32 << 10][seed as usize % 3],
            most_in_flight: Cell::new(0),
            reads: Cell::new(0),
            clean_is_bad: false,
            failed: Cell::new(0),
        }
    }

    fn map(&self, wanted: Wanted, flags: impl Fn(usize) -> u32) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = wanted.from;
        while at < wanted.until.min(self.bytes.len() as u64) {
            let block = at as usize / BLOCK;
            let end = ((block + 1) * BLOCK).min(self.bytes.len()) as u64;
            extents.push(Extent { offset: at, length: end - at, flags: Flags(flags(block)) });
            at = end;
        }
        extents
    }
}

impl DiskSource for Memory {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    async fn read(&self, offset: u64, length: u32) -> std::result::Result<Buffer, NbdError> {
        assert!(length <= READ_SIZE);
        let cost = u64::from(length);
        self.in_flight.set(self.in_flight.get() + cost);
        self.reads.set(self.reads.get() + 1);
        self.most_in_flight.set(self.most_in_flight.get().max(self.in_flight.get()));
        let pause = self.random.borrow_mut().next(500);
        tokio::time::sleep(Duration::from_micros(pause)).await;
        self.in_flight.set(self.in_flight.get() - cost);
        let at = offset as usize;
        let mut blocks = at / BLOCK..(at + length as usize).div_ceil(BLOCK);
        // The plan forces the first ones.
        if self.clean_is_bad && blocks.any(|block| !self.dirty[block] && block > 3) {
            self.failed.set(self.failed.get() + 1);
            return Err(NbdError::new(NbdErrorKind::Io(5), "a read", "a bad sector"));
        }
        Ok(Buffer::from_vec(self.bytes[at..at + length as usize].to_vec()))
    }

    fn gap(&self) -> u64 {
        self.gap
    }

    async fn allocation(&self, wanted: Wanted) -> std::result::Result<Vec<Extent>, NbdError> {
        let hole = |block| {
            if (120..180).contains(&block) { wire::STATE_HOLE | wire::STATE_ZERO } else { 0 }
        };
        Ok(self.map(wanted, hole))
    }

    async fn dirty(&self, wanted: Wanted) -> std::result::Result<Vec<Extent>, NbdError> {
        Ok(self.map(wanted, |block| if self.dirty[block] { wire::STATE_DIRTY } else { 0 }))
    }
}

/// What the engine keeps, checked at every call.
#[derive(Default)]
struct Model {
    state: RefCell<State>,
    news: Notify,
    /// What it can read itself, of disks that are lent.
    images: Vec<Rc<Memory>>,
}

#[derive(Default)]
struct State {
    /// What each place holds: a fingerprint, or zero.
    places: BTreeMap<(u16, u64), Option<[u8; 20]>>,
    blocks: HashMap<[u8; 20], Vec<u8>>,
    asked: HashSet<[u8; 20]>,
    /// Grants not yet handed out: those of closed windows.
    ready: Vec<Grant>,
    open: Vec<Grant>,
    /// Handed out and not yet written, in their order.
    expected: VecDeque<(u16, u64)>,
    last: Option<(u16, u64)>,
    window: u64,
    windows: u64,
    ended: bool,
    writes: usize,
    /// Blocks that it read itself.
    read: usize,
    granted: Vec<(u16, u64)>,
}

impl Model {
    fn close(&self) {
        let mut state = self.state.borrow_mut();
        let open = std::mem::take(&mut state.open);
        state.ready.extend(open);
        state.window = 0;
        state.windows += 1;
        self.news.notify_one();
    }
}

const WINDOW: u64 = 700;

impl BackupSession for Model {
    async fn submit(&self, disk: DiskIndex, extents: &[BlockExtent], prints: &[u8]) -> Result<()> {
        tokio::time::sleep(Duration::from_micros(100)).await;
        let mut state = self.state.borrow_mut();
        let mut prints = prints.chunks(FINGERPRINT_LEN);
        assert!(extents.len() <= BLOCKS_PER_SUBMIT);
        for extent in extents {
            for block in extent.first..extent.first + u64::from(extent.blocks) {
                let place = (disk.0, block);
                assert!(state.last < Some(place), "{:?} then {place:?}", state.last);
                state.last = Some(place);
                if extent.zero {
                    state.places.insert(place, None);
                    continue;
                }
                let print: [u8; 20] = prints.next().unwrap().try_into().unwrap();
                state.places.insert(place, Some(print));
                state.window += 1;
                if state.asked.insert(print) {
                    state.open.push(Grant { disk, first: block, blocks: 1 });
                }
            }
        }
        assert!(prints.next().is_none() && state.window <= WINDOW);
        Ok(())
    }

    async fn end_window(&self) -> Result<()> {
        self.close();
        Ok(())
    }

    async fn end_scan(&self) -> Result<()> {
        self.close();
        self.state.borrow_mut().ended = true;
        Ok(())
    }

    async fn grants(&self) -> Result<(Vec<Grant>, bool)> {
        loop {
            {
                let mut state = self.state.borrow_mut();
                assert!(state.expected.is_empty(), "asked for more before writing");
                let grants = std::mem::take(&mut state.ready);
                if !grants.is_empty() || state.ended {
                    state.expected =
                        grants.iter().map(|grant| (grant.disk.0, grant.first)).collect();
                    let granted = state.expected.clone();
                    state.granted.extend(granted);
                    return Ok((grants, state.ended));
                }
            }
            self.news.notified().await;
        }
    }

    async fn write(&self, blocks: &[(Grant, Bytes)]) -> Result<()> {
        let length: usize = blocks.iter().map(|(_, data)| data.len()).sum();
        assert!(length <= MAX_WRITE as usize);
        self.state.borrow_mut().writes += 1;
        self.take(blocks);
        Ok(())
    }

    async fn lend(&self, _: DiskIndex, _: &File) -> Result<bool> {
        unreachable!("memory is no file")
    }

    async fn write_lent(&self, grants: &[Grant]) -> Result<()> {
        tokio::time::sleep(Duration::from_micros(100)).await;
        let read = |grant: &Grant| {
            let image = &self.images[usize::from(grant.disk.0)].bytes;
            let (from, length) = (grant.first as usize * BLOCK, grant.blocks as usize * BLOCK);
            let mut data = image[from..image.len().min(from + length)].to_vec();
            data.resize(length, 0);
            (*grant, Bytes::from(data))
        };
        let blocks: Vec<_> = grants.iter().map(read).collect();
        let length: usize = blocks.iter().map(|(_, data)| data.len()).sum();
        assert!(length <= MAX_LENT as usize);
        self.state.borrow_mut().read += length / BLOCK;
        self.take(&blocks);
        Ok(())
    }
}

impl Model {
    fn take(&self, blocks: &[(Grant, Bytes)]) {
        let fingerprinter = Fingerprinter::from_state(STATE, BLOCK as u32);
        let mut state = self.state.borrow_mut();
        for (grant, data) in blocks {
            assert_eq!(data.len(), grant.blocks as usize * BLOCK);
            for (i, block) in data.chunks(BLOCK).enumerate() {
                let place = (grant.disk.0, grant.first + i as u64);
                assert_eq!(state.expected.pop_front(), Some(place), "the order of the grants");
                let print = fingerprinter.of(block);
                assert_eq!(state.places[&place], Some(print), "{place:?}");
                state.blocks.insert(print, block.to_vec());
            }
        }
    }
}

fn shared(cache: usize, depth: usize) -> Rc<Shared> {
    let fingerprinter = Fingerprinter::from_state(STATE, BLOCK as u32);
    Rc::new(Shared {
        block_size: BLOCK as u32,
        depth,
        window: WINDOW,
        pool: HashPool::start(&fingerprinter, BLOCK as u32).unwrap(),
        cache: RefCell::new(Cache::new(cache, BLOCK as u32)),
        limit: Rc::new(ReadLimit::new(None)),
        lent: Vec::new(),
        scanned: Cell::new(0),
        read: Cell::new(0),
    })
}

fn back_up(shared: &Rc<Shared>, disks: &[ScanDisk<Memory>]) -> State {
    let sources: Vec<Rc<Memory>> = disks.iter().map(|disk| Rc::clone(&disk.source)).collect();
    let model = Model { images: sources.clone(), ..Model::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local
        .block_on(&runtime, async {
            futures::try_join!(scan(shared, &model, disks), write(shared, &model, &sources))
        })
        .unwrap();
    model.state.into_inner()
}

fn disk(blocks: usize, tail: usize, seed: u64, incremental: bool) -> ScanDisk<Memory> {
    let source = Memory::new(blocks, tail, seed);
    let size = source.size();
    let dirty_until = incremental.then_some(size);
    let input = PlanInput {
        size,
        block_size: BLOCK as u32,
        dirty_until,
        forced: std::iter::once(BLOCK as u64..3 * BLOCK as u64).collect(),
    };
    ScanDisk { source: Rc::new(source), input }
}

/// Every place must say what the disk holds there, and every block must have been written.
fn check(state: &State, disks: &[ScanDisk<Memory>]) {
    for (i, disk) in disks.iter().enumerate() {
        for (block, bytes) in disk.source.bytes.chunks(BLOCK).enumerate() {
            let place = (i as u16, block as u64);
            let said = state.places.get(&place);
            let forced = (1..3).contains(&block);
            if disk.input.dirty_until.is_some() && !disk.source.dirty[block] && !forced {
                assert_eq!(said, None, "{place:?} is clean");
            } else if is_zero(bytes) {
                assert_eq!(said, Some(&None), "{place:?} is zero");
            } else {
                let stored = &state.blocks[&said.unwrap().unwrap()];
                assert!(
                    stored[..bytes.len()] == *bytes && is_zero(&stored[bytes.len()..]),
                    "{place:?}"
                );
            }
        }
    }
}

#[test]
fn everything_arrives_in_order_whatever_the_order_of_reads() {
    for seed in 0..8 {
        let disks = [disk(2000, 1536, seed, false), disk(3000, 0, seed + 100, seed % 2 == 0)];
        let depth = 1 + seed as usize * 3;
        let shared = shared(64 << 10, depth);
        let state = back_up(&shared, &disks);
        check(&state, &disks);
        assert!(state.windows > 3, "{} windows", state.windows);
        for disk in &disks {
            let most = disk.source.most_in_flight.get();
            assert!(most <= 2 * depth as u64 * u64::from(READ_SIZE), "{most} bytes in flight");
        }
        // Small runs share their messages.
        let blocks = state.blocks.len();
        assert!(state.writes < blocks / 2, "{} messages of {blocks} blocks", state.writes);
        assert_eq!(shared.scanned.get() % BLOCK as u64, 0);
    }
}

#[test]
fn disks_that_are_lent_are_read_by_the_engine_and_others_are_sent() {
    for lent in [[true, true], [true, false], [false, true]] {
        // The first one is too small to have every content.
        let disks = [disk(250, 1536, 3, false), disk(3000, 512, 4, true)];
        let mut shared = shared(8 << 20, 4);
        Rc::get_mut(&mut shared).unwrap().lent = lent.to_vec();
        let state = back_up(&shared, &disks);
        check(&state, &disks);
        assert_eq!(state.writes > 0, lent != [true, true]);
        let of =
            |disk: usize| state.granted.iter().filter(|(d, _)| usize::from(*d) == disk).count();
        assert!(of(0) > 0 && of(1) > 0);
        let expected: usize = (0..2).filter(|disk| lent[*disk]).map(of).sum();
        assert_eq!(state.read, expected);
    }
}

#[test]
fn a_small_backup_reads_once() {
    let disks = [disk(600, 0, 77, true)];
    let cached = shared(8 << 20, 8);
    let state = back_up(&cached, &disks);
    check(&state, &disks);
    let dirty: u64 = state.places.len() as u64 * BLOCK as u64;
    assert!(cached.read.get() <= dirty, "{} bytes read of {dirty}", cached.read.get());

    let again = [disk(600, 0, 77, true)];
    let uncached = shared(0, 8);
    check(&back_up(&uncached, &again), &again);
    assert!(uncached.read.get() > cached.read.get());
}

#[test]
fn a_gap_that_cannot_be_read_fails_nothing_and_a_limit_reads_none() {
    let failed = |limit| {
        let mut disk = disk(2000, 0, 5, true);
        Rc::get_mut(&mut disk.source).unwrap().clean_is_bad = true;
        let mut shared = shared(0, 4);
        Rc::get_mut(&mut shared).unwrap().limit = Rc::new(ReadLimit::new(limit));
        let disks = [disk];
        check(&back_up(&shared, &disks), &disks);
        disks[0].source.failed.get()
    };
    assert!(failed(None) > 0, "no gap was read");
    assert_eq!(failed(Some(1 << 30)), 0);
}

#[test]
fn the_first_window_is_small_unless_there_is_a_limit() {
    let most = |limit| {
        let mut shared = shared(0, 4);
        let inner = Rc::get_mut(&mut shared).unwrap();
        (inner.window, inner.limit) = (BLOCKS_PER_WINDOW, Rc::new(ReadLimit::new(limit)));
        Batch::new(&Model::default(), &shared).most
    };
    assert_eq!(most(None), FIRST_WINDOW);
    assert_eq!(most(Some(1 << 20)), BLOCKS_PER_WINDOW);
}

#[test]
fn reads_are_smaller_beside_a_busy_guest() {
    let shared = shared(0, 4);
    assert_eq!(shared.blocks_per_read(), 64);
    shared.limit.pace(std::time::Instant::now(), Reads::At(1 << 20), Duration::ZERO);
    assert_eq!(shared.blocks_per_read(), 16);
}

#[test]
fn pieces_end_where_reads_meet() {
    let work = Work { first_block: 10, blocks: 200, action: Action::Read };
    let (first, rest) = split(work, 64);
    assert_eq!((first.first_block, first.blocks), (10, 54));
    let (second, rest) = split(rest.unwrap(), 64);
    assert_eq!((second.first_block, second.blocks), (64, 64));
    let (third, rest) = split(rest.unwrap(), 64);
    assert_eq!((third.first_block, third.blocks), (128, 64));
    assert_eq!(rest.unwrap().blocks, 18);
}

#[test]
fn leases_become_depths() {
    assert_eq!(depth_of(0), 1);
    assert_eq!(depth_of(4 << 20), 8);
    assert_eq!(depth_of(u32::MAX), MAX_JOBS);
}
