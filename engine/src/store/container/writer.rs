//! Packing: blocks go in, addresses come out at once, sealed containers some time later.

use std::sync::Arc;

use bytes::Bytes;

use super::directory::{
    CHUNK_SLOTS, Codec, FrameEntry, Section, SlotState, Trailer, encode_chunk, encode_lead,
    encode_table,
};
use super::{
    CONTAINER_BYTES, CONTAINER_FRAMES, CONTAINER_SLOTS, ContainerKind, FRAME_BYTES,
    NODE_FRAME_BYTES, NODE_MAX, NODES_PER_FRAME,
};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint, Slot};
use crate::pool::InOrder;
use crate::store::format::{Header, Piece, TAG_LEN};
use crate::store::journal::{Entry, Position};
use crate::store::names;
use crate::store::objects::{Finishing, ObjectWriter};
use crate::store::{Store, StoreLevel};

/// Bytes of the column that are written at once when a container is sealed.
const COLUMN_PIECE: usize = 64 << 10;

/// A container that is durable, and in the journal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedContainer {
    /// Its id.
    pub id: ContainerId,
    /// What its slots hold.
    pub kind: ContainerKind,
    /// 0, as first written.
    pub generation: u32,
    /// Bytes of its object.
    pub stored_bytes: u64,
    /// Bytes packed, before compression.
    pub raw_bytes: u64,
    /// Its place in the journal.
    pub position: Position,
    /// The fingerprint (or the node's tag) of each slot, from slot 0.
    pub fingerprints: Vec<Fingerprint>,
}

impl SealedContainer {
    /// Every slot's fingerprint with its slot, in slot order.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (Fingerprint, Slot)> + '_ {
        // Slots are less than 65,536.
        self.fingerprints
            .iter()
            .enumerate()
            .map(|(slot, fingerprint)| (*fingerprint, Slot(slot as u16)))
    }
}

/// Packs one session's blocks or nodes into containers, on the session's thread.
///
/// Frames are compressed and sealed on the CPU pool, and written in their order. After
/// the first error nothing more is written. What is not sealed when it is dropped never was.
pub struct Packer {
    store: Store,
    kind: ContainerKind,
    label: String,
    open: Option<Open>,
    frame: RawFrame,
    jobs: InOrder<Result<PackedFrame>>,
    finishing: Option<Finished>,
    sealed: Vec<SealedContainer>,
    failed: bool,
}

/// The container that is being filled.
struct Open {
    header: Header,
    section: Arc<Section>,
    writer: ObjectWriter,
    table: Vec<FrameEntry>,
    fingerprints: Vec<Fingerprint>,
    /// Bytes that its frames take or may take: those on the pool count as if they did not compress.
    reserved: u32,
    raw_bytes: u64,
}

/// The frame that is being filled.
#[derive(Default)]
pub(super) struct RawFrame {
    pub(super) bytes: Vec<u8>,
    pub(super) lengths: Vec<u32>,
    pub(super) first: u16,
}

struct PackedFrame {
    /// Its offset is still 0.
    entry: FrameEntry,
    stored: Vec<u8>,
    /// The raw buffer, to be used again.
    buffer: Vec<u8>,
    /// What was reserved for it.
    reserved: u32,
}

/// A container that is being made durable.
struct Finished {
    finishing: Finishing,
    copy: Finishing,
    id: ContainerId,
    raw_bytes: u64,
    fingerprints: Vec<Fingerprint>,
}

impl Packer {
    /// For one session, which `label` names in messages.
    #[must_use]
    pub fn new(store: &Store, kind: ContainerKind, label: impl Into<String>) -> Self {
        Packer {
            store: store.clone(),
            kind,
            label: label.into(),
            open: None,
            frame: RawFrame::default(),
            jobs: InOrder::new(store.pool().clone(), store.budget().frames_in_flight),
            finishing: None,
            sealed: Vec::new(),
            failed: false,
        }
    }

    /// Packs a block of the store's block size, or a node, and says where it will be. The
    /// address holds once its container comes out of [`take_sealed`](Self::take_sealed).
    ///
    /// # Errors
    /// When a container cannot be written; the packer is of no use after that.
    pub fn push(&mut self, fingerprint: Fingerprint, bytes: &[u8]) -> Result<Address> {
        self.check_length(bytes.len())?;
        self.guarded(|packer| packer.push_inner(fingerprint, bytes))
    }

    /// Seals what is packed, waits until it is durable and in the journal.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn seal(&mut self) -> Result<()> {
        self.guarded(|packer| {
            packer.close()?;
            packer.settle_finishing()
        })
    }

    /// The containers that have become durable since the last call.
    ///
    /// # Errors
    /// When one could not be made durable.
    pub fn take_sealed(&mut self) -> Result<Vec<SealedContainer>> {
        self.guarded(|packer| {
            if packer.finishing.as_ref().is_some_and(|finished| finished.finishing.is_done()) {
                packer.settle_finishing()?;
            }
            Ok(std::mem::take(&mut packer.sealed))
        })
    }

    /// What became durable and was not taken, also after a failure.
    pub fn take_leftovers(&mut self) -> Vec<SealedContainer> {
        std::mem::take(&mut self.sealed)
    }

    /// Slots of the container that is open, not sealed.
    #[must_use]
    pub fn unsealed(&self) -> u32 {
        self.open.as_ref().map_or(0, |open| open.fingerprints.len() as u32)
    }

    fn guarded<T>(&mut self, act: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.failed {
            let what = format!("{}: a container could not be written before", self.label);
            return Err(Error::new(Kind::Failed, what));
        }
        let result = act(self);
        self.failed = result.is_err();
        result
    }

    fn check_length(&self, length: usize) -> Result<()> {
        let fits = match self.kind {
            ContainerKind::Blocks => length == self.store.block_size() as usize,
            ContainerKind::Nodes => (1..=NODE_MAX).contains(&length),
        };
        if fits {
            return Ok(());
        }
        let what =
            format!("{}: {length} bytes cannot be packed as one of {:?}", self.label, self.kind);
        Err(Error::new(Kind::Failed, what))
    }

    fn push_inner(&mut self, fingerprint: Fingerprint, bytes: &[u8]) -> Result<Address> {
        if self.frame.lengths.is_empty() {
            self.begin_frame()?;
        }
        let open = match &mut self.open {
            Some(open) => open,
            None => return Err(Error::new(Kind::Failed, "no container is open (a bug)")),
        };
        let slot = Slot(open.fingerprints.len() as u16);
        let address = Address { container: open.section.container, slot };
        open.fingerprints.push(fingerprint);
        self.frame.bytes.extend_from_slice(bytes);
        self.frame.lengths.push(bytes.len() as u32);
        let full = open.fingerprints.len() as u32 >= self.max_slots();
        if full || self.frame.is_full(self.kind, self.store.block_size()) {
            self.end_frame()?;
        }
        Ok(address)
    }

    fn max_slots(&self) -> u32 {
        self.store.budget().container_slots.min(CONTAINER_SLOTS)
    }

    /// A frame stays in the container in which it begins, so that addresses are known at once.
    fn begin_frame(&mut self) -> Result<()> {
        self.drain_ready()?;
        let limit = self.store.budget().container_bytes.min(CONTAINER_BYTES);
        let full = self.open.as_ref().is_some_and(|open| {
            open.fingerprints.len() as u32 >= self.max_slots()
                || open.table.len() + self.jobs.len() >= CONTAINER_FRAMES as usize
                || open.reserved + frame_max(self.kind, self.store.block_size()) > limit
        });
        if full {
            self.close()?;
        }
        if self.open.is_none() {
            self.open = Some(self.open_container()?);
        }
        self.frame.first = self.unsealed() as u16;
        Ok(())
    }

    fn open_container(&self) -> Result<Open> {
        let id = self.unused_number()?;
        let (header, cipher) = self.store.sealer().begin(self.kind.object())?;
        let mut writer = self.store.objects().writer(&names::container(id, 0))?;
        let block_size = block_size_of(self.kind, self.store.block_size());
        writer.write(encode_lead(&header, id, 0, block_size).into())?;
        Ok(Open {
            header,
            section: Arc::new(Section::new(&header, cipher, id, 0)),
            writer,
            table: Vec::new(),
            fingerprints: Vec::new(),
            reserved: 0,
            raw_bytes: 0,
        })
    }

    /// A number that the store has not seen. A crash before the journal entry, and a state
    /// directory that was set back to before it, would give one out again.
    fn unused_number(&self) -> Result<ContainerId> {
        let objects = self.store.objects();
        loop {
            let id = self.store.journal()?.next_container()?;
            if !objects.exists(&names::container(id, 0))?
                && !objects.exists(&names::directory(id, 0))?
            {
                return Ok(id);
            }
        }
    }

    /// Gives the frame to the pool.
    fn end_frame(&mut self) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        if self.frame.lengths.is_empty() {
            return Ok(());
        }
        let raw = self.frame.take(self.kind);
        let reserved = (raw.bytes.len() + TAG_LEN) as u32;
        open.reserved += reserved;
        open.raw_bytes += raw.bytes.len() as u64;
        let number = (open.table.len() + self.jobs.len()) as u32;
        let (store, section) = (self.store.clone(), open.section.clone());
        let job = move || {
            let (entry, stored) = pack(&store, &section, number, &raw)?;
            Ok(PackedFrame { entry, stored, buffer: raw.bytes, reserved })
        };
        if let Some(packed) = self.jobs.push(job)? {
            self.write_frame(packed?)?;
        }
        Ok(())
    }

    fn drain_ready(&mut self) -> Result<()> {
        while let Some(packed) = self.jobs.ready()? {
            self.write_frame(packed?)?;
        }
        Ok(())
    }

    fn write_frame(&mut self, packed: PackedFrame) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let offset = open.writer.written() as u32;
        open.reserved = open.reserved - packed.reserved + packed.entry.stored_len;
        open.table.push(FrameEntry { offset, ..packed.entry });
        open.writer.write(packed.stored.into())?;
        self.frame.reuse(packed.buffer);
        Ok(())
    }

    /// Writes the rest of the open container and begins to make it durable.
    fn close(&mut self) -> Result<()> {
        self.end_frame()?;
        while let Some(packed) = self.jobs.next()? {
            self.write_frame(packed?)?;
        }
        let Some(mut open) = self.open.take() else { return Ok(()) };
        let states = open.fingerprints.iter().map(|fingerprint| SlotState::Present(*fingerprint));
        let column = match self.kind {
            ContainerKind::Blocks if self.store.agreed().level >= StoreLevel::COLUMN_APART => {
                Column::Apart
            }
            _ => Column::Within,
        };
        let copy = write_directory(
            &self.store,
            &mut open.writer,
            (self.kind, &open.header, &open.section),
            (&open.table, open.raw_bytes),
            (column, states),
        )?;
        // One at a time is made durable while the next one is filled.
        self.settle_finishing()?;
        self.finishing = Some(Finished {
            id: open.section.container,
            raw_bytes: open.raw_bytes,
            fingerprints: open.fingerprints,
            copy: copy.finish_in_background()?,
            finishing: open.writer.finish_in_background()?,
        });
        Ok(())
    }

    /// Waits for the container that is being made durable and enters it into the journal:
    /// whatever refers to a container finds it there.
    fn settle_finishing(&mut self) -> Result<()> {
        let Some(finished) = self.finishing.take() else { return Ok(()) };
        let Finished { finishing, copy, id, raw_bytes, fingerprints } = finished;
        let stored_bytes = finishing.wait()?;
        copy.wait()?;
        let entry = Entry {
            container: id,
            generation: 0,
            kind: self.kind,
            slots: fingerprints.len() as u32,
            last_in_object: id.counter,
            stored_bytes,
        };
        let position = self.store.journal()?.record(entry)?;
        self.store.directories().forget(id);
        let kind = self.kind;
        let sealed = SealedContainer {
            id,
            kind,
            generation: 0,
            stored_bytes,
            raw_bytes,
            position,
            fingerprints,
        };
        self.sealed.push(sealed);
        Ok(())
    }
}

/// The most that a frame can take in a container.
pub(super) fn frame_max(kind: ContainerKind, block_size: u32) -> u32 {
    let raw = match kind {
        ContainerKind::Blocks => FRAME_BYTES.max(2 * block_size as usize),
        ContainerKind::Nodes => NODE_FRAME_BYTES + NODE_MAX + 4 * usize::from(NODES_PER_FRAME),
    };
    (raw + TAG_LEN) as u32
}

impl RawFrame {
    pub(super) fn is_full(&self, kind: ContainerKind, block_size: u32) -> bool {
        match kind {
            ContainerKind::Blocks => self.bytes.len() >= FRAME_BYTES.max(2 * block_size as usize),
            ContainerKind::Nodes => {
                self.bytes.len() >= NODE_FRAME_BYTES
                    || self.lengths.len() >= usize::from(NODES_PER_FRAME)
            }
        }
    }

    /// The frame to pack; what is left can be filled anew.
    pub(super) fn take(&mut self, kind: ContainerKind) -> RawFrame {
        let mut full = std::mem::take(self);
        if kind == ContainerKind::Nodes {
            // The payload of nodes says how long each is.
            let lengths = full.lengths.iter().flat_map(|length| length.to_le_bytes());
            full.bytes.splice(..0, lengths);
        }
        full
    }

    fn reuse(&mut self, mut buffer: Vec<u8>) {
        if self.bytes.capacity() == 0 {
            buffer.clear();
            self.bytes = buffer;
        }
    }
}

/// Where a container's fingerprint column is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    /// Into the container and into the directory's own object.
    Within,
    /// Into the directory's own object alone: the frames say the same.
    Apart,
}

/// Writes column, table and trailer behind the frames, and into an object of their own, which is
/// left to be finished.
pub(super) fn write_directory(
    store: &Store,
    writer: &mut ObjectWriter,
    (kind, header, section): (ContainerKind, &Header, &Section),
    (table, raw_bytes): (&[FrameEntry], u64),
    (column, mut states): (Column, impl ExactSizeIterator<Item = SlotState>),
) -> Result<ObjectWriter> {
    let mut own =
        store.objects().writer(&names::directory(section.container, section.generation))?;
    let slots = states.len() as u32;
    let column_offset = writer.written() as u32;
    let mut piece = Vec::with_capacity(COLUMN_PIECE);
    for number in 0..slots.div_ceil(CHUNK_SLOTS) {
        let chunk = states.by_ref().take(CHUNK_SLOTS as usize);
        piece.extend_from_slice(&encode_chunk(section, number, slots, chunk)?);
        if piece.len() >= COLUMN_PIECE || states.len() == 0 {
            let written = Bytes::copy_from_slice(&piece);
            if column == Column::Within {
                writer.write(written.clone())?;
            }
            own.write(written)?;
            piece.clear();
        }
    }
    let trailer = Trailer {
        header: *header,
        kind,
        container: section.container,
        generation: section.generation,
        block_size: block_size_of(kind, store.block_size()),
        section_start: 0,
        column_offset,
        slots,
        table_offset: writer.written() as u32,
        frames: table.len() as u32,
        raw_bytes,
    };
    let mut rest = encode_table(section, table)?;
    rest.extend_from_slice(&trailer.encode(section)?);
    let rest = Bytes::from(rest);
    writer.write(rest.clone())?;
    own.write(rest)?;
    Ok(own)
}

/// What a lead and a trailer say of the size of blocks.
pub(super) fn block_size_of(kind: ContainerKind, block_size: u32) -> u32 {
    match kind {
        ContainerKind::Blocks => block_size,
        ContainerKind::Nodes => 0,
    }
}

/// Compresses and seals a frame; its offset is left open.
pub(super) fn pack(
    store: &Store,
    section: &Section,
    number: u32,
    raw: &RawFrame,
) -> Result<(FrameEntry, Vec<u8>)> {
    let (codec, mut stored) = match store.codecs().compress(&raw.bytes)? {
        Some(compressed) => (Codec::Zstd, compressed),
        None => {
            let mut copy = Vec::with_capacity(raw.bytes.len() + TAG_LEN);
            copy.extend_from_slice(&raw.bytes);
            (Codec::Raw, copy)
        }
    };
    let span = raw.lengths.len() as u16;
    let entry = FrameEntry {
        first: raw.first,
        span,
        present: FrameEntry::full(span),
        codec,
        offset: 0,
        stored_len: (stored.len() + TAG_LEN) as u32,
        raw_len: raw.bytes.len() as u32,
    };
    section.seal(Piece::Frame, number, &Section::frame_extra(&entry), &mut stored)?;
    Ok((entry, stored))
}
