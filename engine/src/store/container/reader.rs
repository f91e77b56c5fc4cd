//! Reading containers: what a slot holds, frames, blocks and nodes, through bounded caches.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::cache::Cache;
use super::codec::Codecs;
use super::directory::{CHUNK_LEN, CHUNK_SLOTS, Codec, LEAD_LEN, Section, encode_lead};
use super::frame::FrameRef;
use super::open::{Directory, Finder, SlotInfo};
use super::{CONTAINER_SLOTS, ContainerKind};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Slot};
use crate::store::damage::{ALL, DamageMap};
use crate::store::format::{Piece, Sealer, damaged};
use crate::store::objects::Objects;

/// Chunks read at once when look-ups go through a column in order.
const READ_AHEAD: u32 = 4;
/// Chunks read at once by [`Directories::each_slot`].
pub(super) const SWEEP_CHUNKS: u32 = 32;
/// Absent and broken containers that are remembered, so that a wrong hint costs one listing.
const ABSENT_KEPT: usize = 64;

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

/// The containers' directories and frames, behind bounded caches. A cheap handle.
#[derive(Clone)]
pub struct Directories {
    inner: Arc<Inner>,
}

struct Inner {
    finder: Finder,
    codecs: Arc<Codecs>,
    state: Mutex<State>,
}

struct State {
    directories: Cache<ContainerId, Directory>,
    /// By container, generation and number, as are frames.
    chunks: Cache<(ContainerId, u32, u32), Vec<u8>>,
    frames: Cache<(ContainerId, u32, u32), Vec<u8>>,
    absent: Vec<ContainerId>,
    /// Counts [`Directories::forget`]: what was looked up before is not remembered after.
    forgotten: u64,
    /// Containers that could not be opened, and why, so that each costs one listing.
    broken: Vec<(ContainerId, String)>,
    /// What the damage records say.
    damage: Arc<DamageMap>,
    last_chunk: (Option<ContainerId>, u32),
}

impl State {
    fn forget(&mut self, container: ContainerId) {
        self.forgotten += 1;
        self.absent.retain(|absent| *absent != container);
        self.broken.retain(|(broken, _)| *broken != container);
        self.directories.remove_if(|id| *id == container);
        self.chunks.remove_if(|(id, ..)| *id == container);
        self.frames.remove_if(|(id, ..)| *id == container);
    }
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
            forgotten: 0,
            broken: Vec::new(),
            damage: Arc::default(),
            last_chunk: (None, 0),
        };
        let fingerprinter = sealer.key().fingerprinter(block_size);
        let finder = Finder { objects, sealer, fingerprinter, block_size };
        let inner = Inner { finder, codecs, state: Mutex::new(state) };
        Directories { inner: Arc::new(inner) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The caches hold whole values only: nothing is half done after a panic.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are cached: of directories, and of decompressed frames.
    #[must_use]
    pub fn cached_bytes(&self) -> (usize, usize) {
        let state = self.state();
        (state.directories.used() + state.chunks.used(), state.frames.used())
    }

    /// What a slot holds, from its container's authenticated directory.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when the directory is; when it cannot be read.
    pub fn slot(&self, address: Address) -> Result<SlotInfo> {
        match self.damage().suspects(address) {
            true => Ok(SlotInfo::Damaged),
            false => self.look_up(address),
        }
    }

    /// The same, whatever is suspected: for whoever authenticates what it reads.
    fn unsuspected(&self, address: Address) -> Result<SlotInfo> {
        match self.damage().has(address) {
            true => Ok(SlotInfo::Damaged),
            false => self.look_up(address),
        }
    }

    /// What the directory says, whatever is marked.
    fn look_up(&self, address: Address) -> Result<SlotInfo> {
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
    pub fn mark_damaged(&self, container: ContainerId, first: u16, count: u16) {
        Arc::make_mut(&mut self.state().damage).add(container, first, count);
    }

    /// What is known of damage.
    #[must_use]
    pub fn damage(&self) -> Arc<DamageMap> {
        self.state().damage.clone()
    }

    /// Replaces what is known of damage. Containers that were rewritten are opened anew.
    pub fn set_damage(&self, damage: DamageMap) {
        self.change_damage(|map| *map = damage);
    }

    /// Changes what is known of damage.
    pub fn change_damage(&self, change: impl FnOnce(&mut DamageMap)) {
        let mut state = self.state();
        let before = state.damage.clone();
        change(Arc::make_mut(&mut state.damage));
        let rewritten: Vec<ContainerId> = state.damage.rewritten_since(&before).collect();
        rewritten.into_iter().for_each(|container| state.forget(container));
    }

    /// The slots that are lost with one that cannot be read: itself; those of its chunk of the
    /// column when that is damaged; all when the container cannot be opened.
    #[must_use]
    pub fn lost_with(&self, address: Address) -> (u16, u16) {
        let first = address.slot.0 - address.slot.0 % CHUNK_SLOTS as u16;
        match (self.unsuspected(address), self.directory(address.container)) {
            (Ok(_), Ok(Some(_))) => (address.slot.0, 1),
            (Ok(SlotInfo::Damaged), _) => (address.slot.0, 1),
            (_, Ok(Some(_))) => (first, (CHUNK_SLOTS as u16).min(u16::MAX - first)),
            _ => ALL,
        }
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
        let directory = self.directory_of(frame)?;
        self.inner.finder.objects.read(&directory.object, frame.range())
    }

    /// Frames of one container as they are stored, in their order; near ones are read together,
    /// up to 16 reads at a time. The caller bounds their number.
    ///
    /// # Errors
    /// As [`fetch_frame`](Self::fetch_frame); for all when one cannot be read.
    pub fn fetch_frames(&self, frames: &[FrameRef]) -> Result<Vec<Bytes>> {
        let Some(first) = frames.first() else { return Ok(Vec::new()) };
        let directory = self.directory_of(first)?;
        let same = |frame: &FrameRef| {
            (frame.container, frame.generation) == (first.container, first.generation)
        };
        if !frames.iter().all(same) {
            return Err(Error::new(Kind::Failed, "frames of two containers in one read (a bug)"));
        }
        let ranges: Vec<_> = frames.iter().map(FrameRef::range).collect();
        self.inner.finder.objects.read_many(&directory.object, &ranges)
    }

    /// Authenticates and decompresses a fetched frame; for the CPU pool.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when it is not what was sealed.
    pub fn decode_frame(&self, frame: &FrameRef, stored: &[u8]) -> Result<Vec<u8>> {
        let directory = self.directory_of(frame)?;
        let bytes = self.unseal(&directory, frame, stored)?;
        self.inflate(&directory, frame, &bytes)
    }

    /// A frame of a directory, as it was compressed and decompressed.
    pub(super) fn read_parts(
        &self,
        directory: &Directory,
        frame: &FrameRef,
    ) -> Result<(Vec<u8>, Vec<u8>)> {
        let stored = self.finder().objects.read(&directory.object, frame.range())?;
        let compressed = self.unseal(directory, frame, &stored)?;
        let raw = self.inflate(directory, frame, &compressed)?;
        Ok((compressed, raw))
    }

    /// Authenticates and decrypts a frame of a directory.
    fn unseal(&self, directory: &Directory, frame: &FrameRef, stored: &[u8]) -> Result<Vec<u8>> {
        let mut bytes = stored.to_vec();
        let extra = Section::frame_extra(&frame.entry);
        if directory.section.open(Piece::Frame, frame.number, &extra, &mut bytes) {
            Ok(bytes)
        } else {
            Err(bad_frame(directory, frame, "its authentication failed"))
        }
    }

    /// Decompresses a frame of a directory.
    fn inflate(&self, directory: &Directory, frame: &FrameRef, bytes: &[u8]) -> Result<Vec<u8>> {
        let raw_len = frame.raw_len as usize;
        match frame.entry.codec {
            Codec::Raw if bytes.len() == raw_len => Ok(bytes.to_vec()),
            Codec::Raw => Err(bad_frame(directory, frame, "its length is wrong")),
            Codec::Zstd => self
                .inner
                .codecs
                .decompress(bytes, raw_len)?
                .ok_or_else(|| bad_frame(directory, frame, "it does not decompress")),
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
        let range = frame.block_range(address.slot, self.inner.finder.block_size);
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
        let address = if self.is_as_written(address)? { address } else { self.standing(address)? };
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

    /// Whether it is one of blocks as first written, which are all there: no column has to be asked.
    fn is_as_written(&self, address: Address) -> Result<bool> {
        if self.damage().has(address) {
            return Ok(false);
        }
        Ok(self.directory(address.container)?.is_some_and(|directory| {
            directory.trailer.column_is_apart() && directory.frame_of(address.slot).is_some()
        }))
    }

    /// Where what an address names stands, as columns say it; a forward is followed once.
    fn standing(&self, address: Address) -> Result<Address> {
        match self.unsuspected(address)? {
            SlotInfo::Present(_) => Ok(address),
            SlotInfo::Forward(there)
                if matches!(self.unsuspected(there)?, SlotInfo::Present(_)) =>
            {
                Ok(there)
            }
            SlotInfo::Damaged => {
                Err(damaged(&address.to_string(), "the block was found damaged before"))
            }
            _ => Err(gone(address)),
        }
    }

    fn cached_frame(&self, frame: &FrameRef) -> Result<Arc<Vec<u8>>> {
        let key = (frame.container, frame.generation, frame.number);
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
        self.check_lead_of(&*self.present(container)?)
    }

    pub(super) fn check_lead_of(&self, directory: &Directory) -> Result<()> {
        let trailer = &directory.trailer;
        let start = trailer.section_start;
        let found =
            self.inner.finder.objects.read(&directory.object, start..start + LEAD_LEN as u64)?;
        let (container, generation) = (trailer.container, trailer.generation);
        let lead = encode_lead(&trailer.header, container, generation, trailer.block_size);
        if found == lead {
            Ok(())
        } else {
            Err(damaged(&directory.object, "its lead is not what was written"))
        }
    }

    pub(super) fn finder(&self) -> &Finder {
        &self.inner.finder
    }

    /// Forgets what is cached of a container: it has just appeared, or was rewritten.
    pub fn forget(&self, container: ContainerId) {
        self.state().forget(container);
    }

    pub(super) fn present(&self, container: ContainerId) -> Result<Arc<Directory>> {
        let missing =
            || Error::new(Kind::NotFound, format!("container {container} is not in the store"));
        self.directory(container)?.ok_or_else(missing)
    }

    /// The directory that a frame was found in: another one, if its container was rewritten
    /// since. What is being read is read to its end; old generations stay.
    fn directory_of(&self, frame: &FrameRef) -> Result<Arc<Directory>> {
        let directory = self.present(frame.container)?;
        if directory.trailer.generation == frame.generation {
            return Ok(directory);
        }
        let found = self.inner.finder.open_generation(frame.container, frame.generation)?;
        found.map(Arc::new).ok_or_else(|| {
            let (container, generation) = (frame.container, frame.generation);
            let what = format!("container {container} in its generation {generation}");
            Error::new(Kind::NotFound, format!("{what} is not in the store"))
        })
    }

    fn directory(&self, container: ContainerId) -> Result<Option<Arc<Directory>>> {
        let (before, generation) = {
            let mut state = self.state();
            let generation = state.damage.generation(container);
            if let Some(directory) = state.directories.get(&container) {
                return Ok(Some(directory));
            }
            if state.absent.contains(&container) {
                return Ok(None);
            }
            if let Some((_, why)) = state.broken.iter().find(|(broken, _)| *broken == container) {
                return Err(Error::new(Kind::Damaged, why.clone()));
            }
            (state.forgotten, generation)
        };
        let found = self.inner.finder.open(container, generation).map(|found| found.map(Arc::new));
        let mut state = self.state();
        if state.forgotten != before {
            // It may have appeared or been rewritten since it was looked for.
            return found;
        }
        match &found {
            Ok(Some(directory)) => {
                state.directories.put(container, directory.clone(), directory.memory());
            }
            Ok(None) => keep(&mut state.absent, container),
            Err(error) if error.kind() == Kind::Damaged => {
                keep(&mut state.broken, (container, error.to_string()));
            }
            Err(_) => {}
        }
        found
    }

    fn chunk(&self, directory: &Directory, chunk: u32) -> Result<Arc<Vec<u8>>> {
        let (id, generation) = (directory.trailer.container, directory.trailer.generation);
        let in_order = {
            let mut state = self.state();
            if let Some(bytes) = state.chunks.get(&(id, generation, chunk)) {
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
            state.chunks.put((id, generation, number), bytes, CHUNK_LEN);
        }
        wanted.ok_or_else(|| damaged(&directory.object, "a chunk of its column is missing"))
    }
}

/// Remembers one more, and forgets the oldest beyond the limit.
fn keep<T>(kept: &mut Vec<T>, one: T) {
    if kept.len() >= ABSENT_KEPT {
        kept.remove(0);
    }
    kept.push(one);
}

/// Takes damage for nothing.
pub(super) fn sound<T>(read: Result<T>) -> Result<Option<T>> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

fn bad_frame(directory: &Directory, frame: &FrameRef, what: &str) -> Error {
    let (number, first) = (frame.number, frame.first.0);
    let place = format!("frame {number} (from slot {first}) of container {}", frame.container);
    damaged(&directory.object, &format!("{place}: {what}"))
}

fn gone(address: Address) -> Error {
    Error::new(Kind::NotFound, format!("there is no block at {address}"))
}

const _: () = assert!(CONTAINER_SLOTS.div_ceil(CHUNK_SLOTS) as usize * CHUNK_LEN < 2 << 20);
