//! Reading containers: what a slot holds, frames, blocks and nodes, through bounded caches.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::codec::Codecs;
use super::directory::{
    CHUNK_LEN, CHUNK_SLOTS, Codec, ENTRY_LEN, FrameEntry, LEAD_LEN, SLOT_LEN, Section, SlotState,
    TRAILER_LEN, Trailer, decode_table, encode_lead,
};
use super::{CONTAINER_SLOTS, ContainerKind};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint, Slot};
use crate::store::format::{Piece, Sealer, TAG_LEN, damaged};
use crate::store::names;
use crate::store::objects::Objects;

/// The suffix that opens a container: trailer and the frame table of some 500 frames.
const TAIL_READ: u64 = 16 << 10;
/// Chunks read at once when look-ups go through a column in order.
const READ_AHEAD: u32 = 4;
/// Chunks read at once by [`Directories::each_slot`].
const SWEEP_CHUNKS: u32 = 32;
/// Absent containers that are remembered, so that a wrong hint costs one listing.
const ABSENT_KEPT: usize = 64;

/// What a slot is, to whoever wants to use it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotInfo {
    /// It holds what has this fingerprint (or, of a node, this tag).
    Present(Fingerprint),
    /// It was given up.
    Dead,
    /// What it held stands elsewhere.
    Forward(Address),
    /// It is known to be damaged.
    Damaged,
    /// There is no such container or slot.
    Missing,
}

/// A frame, and where to read it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameRef {
    /// Its container.
    pub container: ContainerId,
    /// The container's generation in which it was found.
    pub generation: u32,
    /// Its number in the container.
    pub number: u32,
    /// Its first slot.
    pub first: Slot,
    /// Slots from its first to its last, holes included.
    pub span: u16,
    /// Where it is in its object.
    pub offset: u64,
    /// Bytes there.
    pub stored_len: u32,
    /// Bytes after decompression.
    pub raw_len: u32,
    entry: FrameEntry,
}

impl FrameRef {
    /// Its bytes in its object.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.stored_len)
    }

    /// Where the block of a slot is in the decompressed frame of blocks of `block_size`.
    #[must_use]
    pub fn block_range(&self, slot: Slot, block_size: u32) -> Option<Range<usize>> {
        let start = self.entry.index_of(slot)? * block_size as usize;
        Some(start..start + block_size as usize)
    }
}

/// What a container is as a whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Summary {
    /// What its slots hold.
    pub kind: ContainerKind,
    /// The generation that was read.
    pub generation: u32,
    /// The object that holds it.
    pub object: String,
    /// Its slots.
    pub slots: u32,
    /// Its frames.
    pub frames: u32,
    /// Bytes of its section.
    pub stored_bytes: u64,
    /// Bytes of its frames before compression.
    pub raw_bytes: u64,
}

/// An open container.
struct Directory {
    object: String,
    trailer: Trailer,
    section: Section,
    frames: Vec<FrameEntry>,
}

/// The containers' directories and frames, behind bounded caches. A cheap handle.
#[derive(Clone)]
pub struct Directories {
    inner: Arc<Inner>,
}

struct Inner {
    objects: Objects,
    sealer: Sealer,
    codecs: Arc<Codecs>,
    block_size: u32,
    state: Mutex<State>,
}

struct State {
    directories: Cache<ContainerId, Directory>,
    chunks: Cache<(ContainerId, u32), Vec<u8>>,
    frames: Cache<(ContainerId, u32), Vec<u8>>,
    absent: Vec<ContainerId>,
    /// Marks from the damage records. Damage is rare; ranges are kept as they come.
    damaged: HashMap<ContainerId, Vec<RangeInclusive<u16>>>,
    last_chunk: (Option<ContainerId>, u32),
}

impl Directories {
    /// With `directory_bytes` for directories and `frame_bytes` for decompressed frames.
    pub(crate) fn new(
        objects: Objects,
        sealer: Sealer,
        codecs: Arc<Codecs>,
        block_size: u32,
        directory_bytes: usize,
        frame_bytes: usize,
    ) -> Self {
        let state = State {
            directories: Cache::new(directory_bytes / 2),
            chunks: Cache::new(directory_bytes / 2),
            frames: Cache::new(frame_bytes),
            absent: Vec::new(),
            damaged: HashMap::new(),
            last_chunk: (None, 0),
        };
        let inner = Inner { objects, sealer, codecs, block_size, state: Mutex::new(state) };
        Directories { inner: Arc::new(inner) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The caches hold whole values only: nothing is half done after a panic.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a slot holds, from its container's authenticated directory.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when the directory is; when it cannot be read.
    pub fn slot(&self, address: Address) -> Result<SlotInfo> {
        if self.is_marked(address) {
            return Ok(SlotInfo::Damaged);
        }
        let Some(directory) = self.directory(address.container)? else {
            return Ok(SlotInfo::Missing);
        };
        if u32::from(address.slot.0) >= directory.trailer.slots {
            return Ok(SlotInfo::Missing);
        }
        let chunk = self.chunk(&directory, u32::from(address.slot.0) / CHUNK_SLOTS)?;
        directory.slot(&chunk, address.slot)
    }

    /// What a run of slots holds; slots beyond the last possible one are left out.
    ///
    /// # Errors
    /// As [`slot`](Self::slot).
    pub fn run(&self, first: Address, count: u16) -> Result<Vec<SlotInfo>> {
        (0..count).map_while(|n| first.plus(n)).map(|address| self.slot(address)).collect()
    }

    /// Where what an address names stands now: a forward is followed, once.
    ///
    /// # Errors
    /// As [`slot`](Self::slot).
    pub fn resolve(&self, address: Address) -> Result<Address> {
        match self.slot(address)? {
            SlotInfo::Forward(there) => Ok(there),
            _ => Ok(address),
        }
    }

    /// Marks slots as damaged, from now on and until the engine ends.
    pub fn mark_damaged(&self, container: ContainerId, slots: RangeInclusive<u16>) {
        let mut state = self.state();
        let ranges = state.damaged.entry(container).or_default();
        if !ranges.contains(&slots) {
            ranges.push(slots);
        }
    }

    fn is_marked(&self, address: Address) -> bool {
        let state = self.state();
        let ranges = state.damaged.get(&address.container);
        ranges.is_some_and(|ranges| ranges.iter().any(|range| range.contains(&address.slot.0)))
    }

    /// What a container is; `None` when it is not in the store.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when its directory is; when it cannot be read.
    pub fn summary(&self, container: ContainerId) -> Result<Option<Summary>> {
        Ok(self.directory(container)?.map(|directory| Summary {
            kind: directory.trailer.kind,
            generation: directory.trailer.generation,
            object: directory.object.clone(),
            slots: directory.trailer.slots,
            frames: directory.trailer.frames,
            stored_bytes: directory.trailer.section_len(),
            raw_bytes: directory.trailer.raw_bytes,
        }))
    }

    /// Calls `each` for every slot of a container, in order, with what its directory says; reads
    /// the column front to back and past the caches. Marks of damage are not looked at.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`], or the first of `each`.
    pub fn each_slot(
        &self,
        container: ContainerId,
        mut each: impl FnMut(Slot, SlotInfo) -> Result<()>,
    ) -> Result<()> {
        let directory = self.present(container)?;
        for first in (0..directory.trailer.chunks()).step_by(SWEEP_CHUNKS as usize) {
            let last = (first + SWEEP_CHUNKS).min(directory.trailer.chunks());
            for (chunk, bytes) in (first..last).zip(self.read_chunks(&directory, first..last)?) {
                let slots =
                    chunk * CHUNK_SLOTS..directory.trailer.slots.min((chunk + 1) * CHUNK_SLOTS);
                for slot in slots {
                    let slot = Slot(slot as u16);
                    each(slot, directory.slot(&bytes, slot)?)?;
                }
            }
        }
        Ok(())
    }

    /// Every frame of a container, in order.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn frames(&self, container: ContainerId) -> Result<Vec<FrameRef>> {
        let directory = self.present(container)?;
        Ok((0..directory.frames.len()).map(|number| directory.frame(number)).collect())
    }

    /// The frame that holds a slot; `None` when no frame does.
    ///
    /// # Errors
    /// [`Kind::NotFound`] without the container, [`Kind::Damaged`].
    pub fn frame_of(&self, address: Address) -> Result<Option<FrameRef>> {
        Ok(self.present(address.container)?.frame_of(address.slot))
    }

    /// A frame as it is stored, to be given to [`decode_frame`](Self::decode_frame).
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn fetch_frame(&self, frame: &FrameRef) -> Result<Bytes> {
        let directory = self.present(frame.container)?;
        self.inner.objects.read(&directory.object, frame.range())
    }

    /// Frames of one container as they are stored, in their order; near ones are read together,
    /// up to 16 reads at a time. The caller bounds their number.
    ///
    /// # Errors
    /// As [`fetch_frame`](Self::fetch_frame); for all when one cannot be read.
    pub fn fetch_frames(&self, frames: &[FrameRef]) -> Result<Vec<Bytes>> {
        let Some(first) = frames.first() else { return Ok(Vec::new()) };
        let directory = self.present(first.container)?;
        if frames.iter().any(|frame| frame.container != first.container) {
            return Err(Error::new(Kind::Failed, "frames of two containers in one read (a bug)"));
        }
        let ranges: Vec<_> = frames.iter().map(FrameRef::range).collect();
        self.inner.objects.read_many(&directory.object, &ranges)
    }

    /// Authenticates and decompresses a fetched frame; for the CPU pool.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when it is not what was sealed.
    pub fn decode_frame(&self, frame: &FrameRef, stored: &[u8]) -> Result<Vec<u8>> {
        let directory = self.present(frame.container)?;
        if directory.trailer.generation != frame.generation {
            let what = format!("container {} was rewritten while it was read", frame.container);
            return Err(Error::new(Kind::Busy, format!("{what}: try again")));
        }
        let bad = |what: &str| {
            let (number, first) = (frame.number, frame.first.0);
            let place =
                format!("frame {number} (from slot {first}) of container {}", frame.container);
            damaged(&directory.object, &format!("{place}: {what}"))
        };
        let mut bytes = stored.to_vec();
        let extra = Section::frame_extra(&frame.entry);
        if !directory.section.open(Piece::Frame, frame.number, &extra, &mut bytes) {
            return Err(bad("its authentication failed"));
        }
        let raw_len = frame.raw_len as usize;
        match frame.entry.codec {
            Codec::Raw if bytes.len() == raw_len => Ok(bytes),
            Codec::Raw => Err(bad("its length is wrong")),
            Codec::Zstd => self
                .inner
                .codecs
                .decompress(&bytes, raw_len)?
                .ok_or_else(|| bad("it does not decompress")),
        }
    }

    /// A whole frame, decompressed, past the cache.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn read_frame(&self, frame: &FrameRef) -> Result<Vec<u8>> {
        self.decode_frame(frame, &self.fetch_frame(frame)?)
    }

    /// Reads one block into `out`, which must be of the block size. A forward is followed once.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none, [`Kind::Damaged`].
    pub fn read_block(&self, address: Address, out: &mut [u8]) -> Result<()> {
        let (address, frame) = self.locate(address, ContainerKind::Blocks)?;
        let bytes = self.cached_frame(&frame)?;
        let range = frame.block_range(address.slot, self.inner.block_size);
        let block =
            range.and_then(|range| bytes.get(range)).filter(|block| block.len() == out.len());
        out.copy_from_slice(block.ok_or_else(|| gone(address))?);
        Ok(())
    }

    /// Reads one recipe node. A forward is followed once.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none, [`Kind::Damaged`].
    pub fn read_node(&self, address: Address) -> Result<Vec<u8>> {
        let (address, frame) = self.locate(address, ContainerKind::Nodes)?;
        let bytes = self.cached_frame(&frame)?;
        frame
            .node(&bytes, address.slot)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| damaged(&address.to_string(), "its frame's list of lengths is wrong"))
    }

    /// Every node of a frame, with its slot; for whoever reads containers of nodes whole.
    #[must_use]
    pub fn nodes_of<'a>(frame: &FrameRef, raw: &'a [u8]) -> Option<Vec<(Slot, &'a [u8])>> {
        (0..frame.span)
            .map(|n| Slot(frame.first.0 + n))
            .filter(|slot| frame.entry.index_of(*slot).is_some())
            .map(|slot| frame.node(raw, slot).map(|node| (slot, node)))
            .collect()
    }

    /// The frame of a slot that is there, after at most one forward.
    fn locate(&self, address: Address, kind: ContainerKind) -> Result<(Address, FrameRef)> {
        let address = match self.slot(address)? {
            SlotInfo::Present(_) => address,
            SlotInfo::Forward(there) if matches!(self.slot(there)?, SlotInfo::Present(_)) => there,
            SlotInfo::Damaged => {
                return Err(damaged(&address.to_string(), "the block was found damaged before"));
            }
            _ => return Err(gone(address)),
        };
        let directory = self.present(address.container)?;
        if directory.trailer.kind != kind {
            let what = format!("it holds {:?}, not {kind:?}", directory.trailer.kind);
            return Err(damaged(&directory.object, &what));
        }
        let frame = directory.frame_of(address.slot).ok_or_else(|| {
            damaged(&directory.object, &format!("no frame holds {address}, which is present"))
        })?;
        Ok((address, frame))
    }

    fn cached_frame(&self, frame: &FrameRef) -> Result<Arc<Vec<u8>>> {
        let key = (frame.container, frame.number);
        if let Some(bytes) = self.state().frames.get(&key) {
            return Ok(bytes);
        }
        let bytes = Arc::new(self.read_frame(frame)?);
        self.state().frames.put(key, bytes.clone(), bytes.len());
        Ok(bytes)
    }

    /// Compares a container's lead, which normal reading never needs, with its trailer.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn check_lead(&self, container: ContainerId) -> Result<()> {
        let directory = self.present(container)?;
        let trailer = &directory.trailer;
        let start = trailer.section_start;
        let found = self.inner.objects.read(&directory.object, start..start + LEAD_LEN as u64)?;
        let lead = encode_lead(&trailer.header, container, trailer.generation, trailer.block_size);
        if found == lead {
            Ok(())
        } else {
            Err(damaged(&directory.object, "its lead is not what was written"))
        }
    }

    /// Forgets what is cached of a container: it has just appeared, or was rewritten.
    pub fn forget(&self, container: ContainerId) {
        let mut state = self.state();
        state.absent.retain(|absent| *absent != container);
        state.directories.remove_if(|id| *id == container);
        state.chunks.remove_if(|(id, _)| *id == container);
        state.frames.remove_if(|(id, _)| *id == container);
    }

    fn present(&self, container: ContainerId) -> Result<Arc<Directory>> {
        let missing =
            || Error::new(Kind::NotFound, format!("container {container} is not in the store"));
        self.directory(container)?.ok_or_else(missing)
    }

    fn directory(&self, container: ContainerId) -> Result<Option<Arc<Directory>>> {
        {
            let mut state = self.state();
            if let Some(directory) = state.directories.get(&container) {
                return Ok(Some(directory));
            }
            if state.absent.contains(&container) {
                return Ok(None);
            }
        }
        let found = self.inner.open(container)?.map(Arc::new);
        let mut state = self.state();
        match &found {
            Some(directory) => {
                state.directories.put(container, directory.clone(), directory.memory())
            }
            None => {
                if state.absent.len() >= ABSENT_KEPT {
                    state.absent.remove(0);
                }
                state.absent.push(container);
            }
        }
        Ok(found)
    }

    fn chunk(&self, directory: &Directory, chunk: u32) -> Result<Arc<Vec<u8>>> {
        let id = directory.trailer.container;
        let in_order = {
            let mut state = self.state();
            if let Some(bytes) = state.chunks.get(&(id, chunk)) {
                return Ok(bytes);
            }
            let last = std::mem::replace(&mut state.last_chunk, (Some(id), chunk));
            chunk > 0
                && last.0 == Some(id)
                && (chunk - READ_AHEAD.min(chunk)..chunk).contains(&last.1)
        };
        let count = if in_order { READ_AHEAD } else { 1 };
        let end = (chunk + count).min(directory.trailer.chunks());
        let mut wanted = None;
        for (number, bytes) in (chunk..end).zip(self.read_chunks(directory, chunk..end)?) {
            let bytes = Arc::new(bytes);
            wanted = wanted.or_else(|| Some(bytes.clone()));
            let mut state = self.state();
            state.last_chunk = (Some(id), number);
            state.chunks.put((id, number), bytes, CHUNK_LEN);
        }
        wanted.ok_or_else(|| damaged(&directory.object, "a chunk of its column is missing"))
    }

    /// Reads and authenticates chunks of the column.
    fn read_chunks(&self, directory: &Directory, chunks: Range<u32>) -> Result<Vec<Vec<u8>>> {
        if chunks.is_empty() {
            return Ok(Vec::new());
        }
        let trailer = &directory.trailer;
        let whole =
            trailer.chunk_range(chunks.start).start..trailer.chunk_range(chunks.end - 1).end;
        let bytes = self.inner.objects.read(&directory.object, whole.clone())?;
        let extra = Section::chunk_extra(trailer.slots);
        chunks
            .map(|chunk| {
                let range = trailer.chunk_range(chunk);
                let mut bytes = bytes
                    [(range.start - whole.start) as usize..(range.end - whole.start) as usize]
                    .to_vec();
                if directory.section.open(Piece::Chunk, chunk, &extra, &mut bytes) {
                    return Ok(bytes);
                }
                let what = format!(
                    "chunk {chunk} of container {}'s column: its authentication failed",
                    trailer.container
                );
                Err(damaged(&directory.object, &what))
            })
            .collect()
    }
}

fn gone(address: Address) -> Error {
    Error::new(Kind::NotFound, format!("there is no block at {address}"))
}

impl FrameRef {
    fn node<'a>(&self, raw: &'a [u8], slot: Slot) -> Option<&'a [u8]> {
        let count = self.entry.count() as usize;
        let (lengths, bodies) = raw.split_at_checked(4 * count)?;
        let index = self.entry.index_of(slot)?;
        let mut lengths =
            lengths.as_chunks::<4>().0.iter().map(|l| u32::from_le_bytes(*l) as usize);
        let start: usize = lengths.by_ref().take(index).sum();
        bodies.get(start..start.checked_add(lengths.next()?)?)
    }
}

impl Directory {
    fn memory(&self) -> usize {
        self.frames.len() * size_of::<FrameEntry>() + size_of::<Directory>() + self.object.len()
    }

    fn slot(&self, chunk: &[u8], slot: Slot) -> Result<SlotInfo> {
        let at = (u32::from(slot.0) % CHUNK_SLOTS) as usize * SLOT_LEN;
        let entry = chunk.get(at..).and_then(|bytes| bytes.first_chunk());
        match entry.and_then(SlotState::decode) {
            Some(SlotState::Present(fingerprint)) => Ok(SlotInfo::Present(fingerprint)),
            Some(SlotState::Dead) => Ok(SlotInfo::Dead),
            Some(SlotState::Forward(there)) => Ok(SlotInfo::Forward(there)),
            Some(SlotState::Damaged(_)) => Ok(SlotInfo::Damaged),
            None => Err(damaged(&self.object, &format!("slot {} has no known state", slot.0))),
        }
    }

    fn frame_of(&self, slot: Slot) -> Option<FrameRef> {
        let number = self.frames.partition_point(|entry| entry.first <= slot.0).checked_sub(1)?;
        self.frames[number].index_of(slot).map(|_| self.frame(number))
    }

    fn frame(&self, number: usize) -> FrameRef {
        let entry = self.frames[number];
        FrameRef {
            container: self.trailer.container,
            generation: self.trailer.generation,
            number: number as u32,
            first: Slot(entry.first),
            span: entry.span,
            offset: self.trailer.section_start + u64::from(entry.offset),
            stored_len: entry.stored_len,
            raw_len: entry.raw_len,
            entry,
        }
    }
}

impl Inner {
    /// Finds a container: under its own key, as most are, or in whatever object holds it now.
    fn open(&self, container: ContainerId) -> Result<Option<Directory>> {
        match self.open_in(&names::container(container, 0), container) {
            Err(error) if error.kind() == Kind::NotFound => {}
            other => return other,
        }
        let Some(key) = self.find(container)? else { return Ok(None) };
        match self.open_in(&key, container) {
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            other => other,
        }
    }

    /// The object with the smallest last container that is not before this one, newest generation.
    fn find(&self, container: ContainerId) -> Result<Option<String>> {
        let mut best: Option<(u32, u32)> = None;
        self.objects.list(&names::containers_of(container.incarnation), |key, _| {
            if let Some((last, generation)) = names::parse_container(key)
                && last.counter >= container.counter
                && best.is_none_or(|(counter, newest)| {
                    last.counter < counter || (last.counter == counter && generation > newest)
                })
            {
                best = Some((last.counter, generation));
            }
            Ok(())
        })?;
        let last = |counter| ContainerId { counter, ..container };
        Ok(best.map(|(counter, generation)| names::container(last(counter), generation)))
    }

    /// The container's section in an object, which may hold several: they are found from the last one back.
    fn open_in(&self, key: &str, container: ContainerId) -> Result<Option<Directory>> {
        let (tail, size) = self.objects.read_tail(key, TAIL_READ)?;
        let tail_start = size - tail.len() as u64;
        let mut end = size;
        loop {
            let Some(start) = end.checked_sub(TRAILER_LEN as u64) else {
                return Err(damaged(key, "it is too short for a container"));
            };
            let bytes = self.within(key, &tail, tail_start, start..end)?;
            let trailer = Trailer::decode(&bytes, end, key)?;
            if trailer.container == container {
                return self.open_section(key, trailer, &bytes, &tail, tail_start).map(Some);
            }
            if trailer.section_start == 0 {
                return Ok(None);
            }
            end = trailer.section_start;
        }
    }

    fn open_section(
        &self,
        key: &str,
        trailer: Trailer,
        bytes: &[u8],
        tail: &Bytes,
        tail_start: u64,
    ) -> Result<Directory> {
        let cipher = self.sealer.cipher(&trailer.header, trailer.kind.object(), key)?;
        let section = Section::new(&trailer.header, cipher, trailer.container, trailer.generation);
        if !Trailer::is_authentic(&section, bytes) {
            return Err(damaged(key, "its trailer's authentication failed"));
        }
        if trailer.kind == ContainerKind::Blocks && trailer.block_size != self.block_size {
            return Err(damaged(key, "its block size is not the store's"));
        }
        let start = trailer.section_start + u64::from(trailer.table_offset);
        let table =
            self.within(key, tail, tail_start, start..start + u64::from(trailer.table_len()))?;
        let frames = decode_table(&section, &trailer, &table)
            .ok_or_else(|| damaged(key, "its frame table's authentication failed"))?;
        Ok(Directory { object: key.to_owned(), trailer, section, frames })
    }

    /// Bytes of an object, from what was read of its end where they lie in it.
    fn within(&self, key: &str, tail: &Bytes, tail_start: u64, range: Range<u64>) -> Result<Bytes> {
        match range.start.checked_sub(tail_start) {
            Some(from) if range.end - tail_start <= tail.len() as u64 => {
                Ok(tail.slice(from as usize..(range.end - tail_start) as usize))
            }
            _ => self.objects.read(key, range),
        }
    }
}

/// Values up to a number of bytes; the least recently used go first.
struct Cache<K, V> {
    limit: usize,
    used: usize,
    clock: u64,
    entries: HashMap<K, Cached<V>>,
}

struct Cached<V> {
    value: Arc<V>,
    bytes: usize,
    used_at: u64,
}

impl<K: Copy + Eq + Hash, V> Cache<K, V> {
    fn new(limit: usize) -> Self {
        Cache { limit, used: 0, clock: 0, entries: HashMap::new() }
    }

    fn get(&mut self, key: &K) -> Option<Arc<V>> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used_at = self.clock;
        Some(entry.value.clone())
    }

    fn put(&mut self, key: K, value: Arc<V>, bytes: usize) {
        self.clock += 1;
        if let Some(old) = self.entries.insert(key, Cached { value, bytes, used_at: self.clock }) {
            self.used -= old.bytes;
        }
        self.used += bytes;
        // Entries are some hundreds: looking through them is cheaper than keeping a list in order.
        while self.used > self.limit && self.entries.len() > 1 {
            let oldest =
                self.entries.iter().min_by_key(|(_, entry)| entry.used_at).map(|(key, _)| *key);
            let Some(old) = oldest.and_then(|oldest| self.entries.remove(&oldest)) else { break };
            self.used -= old.bytes;
        }
    }

    fn remove_if(&mut self, condition: impl Fn(&K) -> bool) {
        let used = &mut self.used;
        self.entries.retain(|key, entry| {
            let remove = condition(key);
            if remove {
                *used -= entry.bytes;
            }
            !remove
        });
    }
}

const _: () = assert!(CONTAINER_SLOTS.div_ceil(CHUNK_SLOTS) as usize * CHUNK_LEN < 2 << 20);
const _: () = assert!(TAIL_READ as usize > TRAILER_LEN + 400 * ENTRY_LEN + TAG_LEN);
