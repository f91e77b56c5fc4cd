//! The forms of a container's lead, frame table, fingerprint column and trailer.
//!
//! Decoding believes nothing: every number is checked against the others before it is used.

use std::ops::Range;

use super::{
    CONTAINER_BYTES, CONTAINER_FRAMES, CONTAINER_SLOTS, ContainerKind, FRAME_RAW_MAX,
    NODES_PER_FRAME,
};
use crate::error::Result;
use crate::ids::{Address, ContainerId, Fingerprint, Incarnation, Slot};
use crate::store::format::{
    HEADER_LEN, Header, ObjectCipher, Piece, TAG_LEN, damaged, le16, le32, le64,
};

/// Bytes of a section's lead: header, container 8, generation u32, block size u32, zero 4, crc32c u32.
pub(crate) const LEAD_LEN: usize = HEADER_LEN + 24;
/// Bytes of the trailer: header, container 8, generation u32, block size u32, section start u64,
/// column offset u32, slots u32, table offset u32, frames u32, raw bytes u64, zero 16, tag 16. Where the
/// table's offset is the column's, the column is apart.
pub(crate) const TRAILER_LEN: usize = 160;
/// Bytes of a frame table's entry: first slot u16, span u16, codec u8, zero 3, present u64,
/// offset u32, stored length u32, raw length u32, zero 4.
pub(crate) const ENTRY_LEN: usize = 32;
/// Bytes of a column's entry: fingerprint 20 (or the address forwarded to), state u8.
pub(crate) const SLOT_LEN: usize = Fingerprint::LEN + 1;
/// Bytes of a chunk of the column with its tag.
pub(crate) const CHUNK_LEN: usize = 4096;
/// Slots in a chunk.
pub(crate) const CHUNK_SLOTS: u32 = ((CHUNK_LEN - TAG_LEN) / SLOT_LEN) as u32;
/// Slots of a frame that can have holes: the bits of its bitmap.
const BITMAP_SLOTS: u16 = 64;

const _: () = assert!(HEADER_LEN + 8 + 4 + 4 + 8 + 4 + 4 + 4 + 4 + 8 + 16 + TAG_LEN == TRAILER_LEN);
const _: () = assert!(2 + 2 + 1 + 3 + 8 + 4 + 4 + 4 + 4 == ENTRY_LEN);
const _: () = assert!(CHUNK_SLOTS == 194);
const _: () = assert!(Address::LEN <= Fingerprint::LEN);

/// What a slot is, as its directory says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotState {
    /// It holds what has this fingerprint (or, of a node, this tag).
    Present(Fingerprint),
    /// It was given up; its bytes are gone or may go.
    Dead,
    /// What it held stands elsewhere.
    Forward(Address),
    /// It held what has this fingerprint, and is known to be damaged.
    Damaged(Fingerprint),
}

impl SlotState {
    /// The column's entry.
    #[must_use]
    pub fn encode(self) -> [u8; SLOT_LEN] {
        let mut bytes = [0; SLOT_LEN];
        let code = match self {
            SlotState::Dead => 0,
            SlotState::Present(fingerprint) => {
                bytes[..Fingerprint::LEN].copy_from_slice(&fingerprint.0);
                1
            }
            SlotState::Forward(address) => {
                bytes[..Address::LEN].copy_from_slice(&address.to_bytes());
                2
            }
            SlotState::Damaged(fingerprint) => {
                bytes[..Fingerprint::LEN].copy_from_slice(&fingerprint.0);
                3
            }
        };
        bytes[Fingerprint::LEN] = code;
        bytes
    }

    /// The `n`th entry of a chunk.
    pub(crate) fn nth(chunk: &[u8], n: usize) -> Option<Self> {
        chunk.get(n * SLOT_LEN..).and_then(|bytes| bytes.first_chunk()).and_then(Self::decode)
    }

    /// Reads a column's entry; `None` for a state that this version does not know.
    #[must_use]
    pub fn decode(bytes: &[u8; SLOT_LEN]) -> Option<Self> {
        let (fingerprint, code) = bytes.split_first_chunk::<{ Fingerprint::LEN }>()?;
        match code[0] {
            0 => Some(SlotState::Dead),
            1 => Some(SlotState::Present(Fingerprint(*fingerprint))),
            2 => fingerprint.first_chunk().map(|a| SlotState::Forward(Address::from_bytes(*a))),
            3 => Some(SlotState::Damaged(Fingerprint(*fingerprint))),
            _ => None,
        }
    }
}

/// How a frame's bytes were made smaller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Codec {
    Raw = 0,
    Zstd = 1,
}

/// A frame table's entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FrameEntry {
    /// Its first slot.
    pub(crate) first: u16,
    /// Slots from the first to the last, holes included.
    pub(crate) span: u16,
    /// A bit per slot of the span that is there; all ones for a span beyond 64, which has no holes.
    pub(crate) present: u64,
    pub(crate) codec: Codec,
    /// From the section's start.
    pub(crate) offset: u32,
    /// With the tag.
    pub(crate) stored_len: u32,
    pub(crate) raw_len: u32,
}

impl FrameEntry {
    /// The bitmap of a span without holes.
    pub(crate) fn full(span: u16) -> u64 {
        if span >= BITMAP_SLOTS { u64::MAX } else { (1 << span) - 1 }
    }

    /// The place of a slot among those that are there.
    pub(crate) fn index_of(&self, slot: Slot) -> Option<usize> {
        let n = slot.0.checked_sub(self.first).filter(|n| *n < self.span)?;
        if self.span > BITMAP_SLOTS {
            return Some(usize::from(n));
        }
        let bit = 1_u64 << n;
        (self.present & bit != 0).then(|| (self.present & (bit - 1)).count_ones() as usize)
    }

    /// Slots that are there.
    pub(crate) fn count(&self) -> u32 {
        if self.span > BITMAP_SLOTS { u32::from(self.span) } else { self.present.count_ones() }
    }

    pub(crate) fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..2].copy_from_slice(&self.first.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.span.to_le_bytes());
        bytes[4] = self.codec as u8;
        bytes[8..16].copy_from_slice(&self.present.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.offset.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.stored_len.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.raw_len.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let codec = match bytes.get(4)? {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            _ => return None,
        };
        Some(FrameEntry {
            first: le16(bytes, 0),
            span: le16(bytes, 2),
            present: le64(bytes, 8),
            codec,
            offset: le32(bytes, 16),
            stored_len: le32(bytes, 20),
            raw_len: le32(bytes, 24),
        })
    }

    /// Whether it fits its section and begins behind `after` (the slot and the byte where the last ended).
    fn fits(&self, trailer: &Trailer, after: (u32, u32)) -> bool {
        let end = self.offset.checked_add(self.stored_len);
        let slots_end = u32::from(self.first) + u32::from(self.span);
        let raw_fits = match trailer.kind {
            ContainerKind::Blocks => {
                u64::from(self.raw_len) == u64::from(self.count()) * u64::from(trailer.block_size)
            }
            ContainerKind::Nodes => self.span <= NODES_PER_FRAME,
        };
        self.span > 0
            && u32::from(self.first) >= after.0
            && slots_end <= trailer.slots
            && self.present != 0
            && self.present & !Self::full(self.span) == 0
            && (self.span <= BITMAP_SLOTS || self.present == u64::MAX)
            && self.offset >= after.1
            && end.is_some_and(|end| end <= trailer.column_offset)
            && self.stored_len >= TAG_LEN as u32
            && self.raw_len <= FRAME_RAW_MAX
            && raw_fits
    }
}

/// Which container's section it is, and the cipher of its pieces.
pub(crate) struct Section {
    pub(crate) container: ContainerId,
    pub(crate) generation: u32,
    cipher: ObjectCipher,
    /// Header, container and generation: what every piece's tag covers.
    associated: [u8; HEADER_LEN + 12],
}

impl Section {
    pub(crate) fn new(
        header: &Header,
        cipher: ObjectCipher,
        container: ContainerId,
        generation: u32,
    ) -> Self {
        let mut associated = [0; HEADER_LEN + 12];
        associated[..HEADER_LEN].copy_from_slice(&header.encode());
        associated[HEADER_LEN..HEADER_LEN + 8].copy_from_slice(&container_bytes(container));
        associated[HEADER_LEN + 8..].copy_from_slice(&generation.to_le_bytes());
        Section { container, generation, cipher, associated }
    }

    /// Encrypts in place and appends the tag; `extra` is authenticated with it.
    pub(crate) fn seal(
        &self,
        piece: Piece,
        number: u32,
        extra: &[u8],
        body: &mut Vec<u8>,
    ) -> Result<()> {
        let associated = [&self.associated[..], extra].concat();
        let tag = self.cipher.seal(piece, number, &associated, body)?;
        body.extend_from_slice(&tag);
        Ok(())
    }

    /// Decrypts in place and drops the tag; false when anything is not what was sealed.
    #[must_use]
    pub(crate) fn open(&self, piece: Piece, number: u32, extra: &[u8], body: &mut Vec<u8>) -> bool {
        let Some((_, tag)) = body.split_last_chunk::<TAG_LEN>() else { return false };
        let tag = *tag;
        body.truncate(body.len() - TAG_LEN);
        let associated = [&self.associated[..], extra].concat();
        self.cipher.open(piece, number, &associated, body, &tag)
    }

    /// What a frame's tag covers of its entry: all but its place, which is known only later.
    pub(crate) fn frame_extra(entry: &FrameEntry) -> [u8; ENTRY_LEN] {
        FrameEntry { offset: 0, ..*entry }.encode()
    }

    /// What a chunk's tag covers besides its number: how many slots there are in all.
    pub(crate) fn chunk_extra(slots: u32) -> [u8; 4] {
        slots.to_le_bytes()
    }
}

fn container_bytes(container: ContainerId) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&container.incarnation.0.to_le_bytes());
    bytes[4..].copy_from_slice(&container.counter.to_le_bytes());
    bytes
}

fn read_container(bytes: &[u8], at: usize) -> ContainerId {
    ContainerId { incarnation: Incarnation(le32(bytes, at)), counter: le32(bytes, at + 4) }
}

/// A section's first bytes, for whoever has lost its end.
pub(crate) fn encode_lead(
    header: &Header,
    container: ContainerId,
    generation: u32,
    block_size: u32,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(LEAD_LEN);
    bytes.extend_from_slice(&header.encode());
    bytes.extend_from_slice(&container_bytes(container));
    bytes.extend_from_slice(&generation.to_le_bytes());
    bytes.extend_from_slice(&block_size.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// The end of a section: where everything else is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Trailer {
    pub(crate) header: Header,
    pub(crate) kind: ContainerKind,
    pub(crate) container: ContainerId,
    pub(crate) generation: u32,
    /// Of [`ContainerKind::Blocks`]; 0 for nodes.
    pub(crate) block_size: u32,
    /// Where the section begins in its object.
    pub(crate) section_start: u64,
    /// From the section's start, as are all the offsets below.
    pub(crate) column_offset: u32,
    pub(crate) slots: u32,
    pub(crate) table_offset: u32,
    pub(crate) frames: u32,
    /// Of all frames before compression; for statistics.
    pub(crate) raw_bytes: u64,
}

impl Trailer {
    pub(crate) fn encode(&self, section: &Section) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(TRAILER_LEN);
        bytes.extend_from_slice(&self.header.encode());
        bytes.extend_from_slice(&container_bytes(self.container));
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.extend_from_slice(&self.block_size.to_le_bytes());
        bytes.extend_from_slice(&self.section_start.to_le_bytes());
        for number in [self.column_offset, self.slots, self.table_offset, self.frames] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.raw_bytes.to_le_bytes());
        bytes.extend_from_slice(&[0; 16]);
        let mut nothing = Vec::with_capacity(TAG_LEN);
        section.seal(Piece::Trailer, 0, &bytes, &mut nothing)?;
        bytes.extend_from_slice(&nothing);
        Ok(bytes)
    }

    /// Reads a trailer of object `name`. Not authenticated yet.
    pub(crate) fn decode(bytes: &[u8], name: &str) -> Result<Self> {
        let header = Header::decode(bytes, name)?;
        let Some(kind) =
            ContainerKind::from_object(header.kind).filter(|_| bytes.len() == TRAILER_LEN)
        else {
            return Err(damaged(name, "it does not end like a container"));
        };
        let trailer = Trailer {
            header,
            kind,
            container: read_container(bytes, 80),
            generation: le32(bytes, 88),
            block_size: le32(bytes, 92),
            section_start: le64(bytes, 96),
            column_offset: le32(bytes, 104),
            slots: le32(bytes, 108),
            table_offset: le32(bytes, 112),
            frames: le32(bytes, 116),
            raw_bytes: le64(bytes, 120),
        };
        if trailer.fits() {
            Ok(trailer)
        } else {
            Err(damaged(name, "its trailer contradicts itself"))
        }
    }

    /// Whether it is what was sealed; `bytes` are those that were decoded.
    #[must_use]
    pub(crate) fn is_authentic(section: &Section, bytes: &[u8]) -> bool {
        let Some((fields, tag)) = bytes.split_at_checked(TRAILER_LEN - TAG_LEN) else {
            return false;
        };
        section.open(Piece::Trailer, 0, fields, &mut tag.to_vec())
    }

    fn fits(&self) -> bool {
        let max_offset = LEAD_LEN as u32 + CONTAINER_BYTES;
        self.slots <= CONTAINER_SLOTS
            && self.frames <= CONTAINER_FRAMES
            && self.column_offset <= max_offset
            && (self.column_is_apart() && self.can_be_apart()
                || self.table_offset == self.column_offset + column_len(self.slots))
            && self.section_end().is_some()
    }

    /// The column is in the directory's own object only, not in the section.
    pub(crate) fn column_is_apart(&self) -> bool {
        self.slots > 0 && self.table_offset == self.column_offset
    }

    /// Blocks as they were first written are all there, so their frames say what a column says.
    fn can_be_apart(&self) -> bool {
        self.kind == ContainerKind::Blocks && self.generation == 0
    }

    /// Bytes of the frame table with its tag.
    pub(crate) fn table_len(&self) -> u32 {
        self.frames * ENTRY_LEN as u32 + TAG_LEN as u32
    }

    /// Bytes of the whole section.
    pub(crate) fn section_len(&self) -> u64 {
        u64::from(self.table_offset) + u64::from(self.table_len()) + TRAILER_LEN as u64
    }

    /// Where the section ends in its object; `None` for an end that no object has.
    pub(crate) fn section_end(&self) -> Option<u64> {
        self.section_start.checked_add(self.section_len())
    }

    /// What the section has of the directory: the column, unless it is apart, frame table, trailer.
    pub(crate) fn directory_range(&self) -> Range<u64> {
        let start = self.section_start + u64::from(self.column_offset);
        start..self.section_start + self.section_len()
    }

    /// Where frame table and trailer are.
    pub(crate) fn table_range(&self) -> Range<u64> {
        let start = self.section_start + u64::from(self.table_offset);
        start..self.section_start + self.section_len()
    }

    /// Where a chunk is in the column.
    pub(crate) fn chunk_range(&self, chunk: u32) -> Range<u64> {
        let start = u64::from(chunk) * CHUNK_LEN as u64;
        let slots = self.slots.saturating_sub(chunk * CHUNK_SLOTS).min(CHUNK_SLOTS);
        start..start + chunk_len(slots)
    }

    /// Chunks of the column.
    pub(crate) fn chunks(&self) -> u32 {
        self.slots.div_ceil(CHUNK_SLOTS)
    }

    /// What a chunk's bytes say of each of its slots; `None` where they end early or say what this
    /// version does not know.
    pub(crate) fn states(
        &self,
        chunk: u32,
        bytes: &[u8],
    ) -> impl Iterator<Item = Option<SlotState>> {
        let here = (self.slots - chunk * CHUNK_SLOTS).min(CHUNK_SLOTS) as usize;
        (0..here).map(move |n| SlotState::nth(bytes, n))
    }
}

/// Bytes of a chunk of so many slots; only the last one is shorter than [`CHUNK_LEN`].
fn chunk_len(slots: u32) -> u64 {
    match slots {
        0 => 0,
        CHUNK_SLOTS => CHUNK_LEN as u64,
        _ => u64::from(slots) * SLOT_LEN as u64 + TAG_LEN as u64,
    }
}

/// Bytes of the column of so many slots.
pub(crate) fn column_len(slots: u32) -> u32 {
    (slots / CHUNK_SLOTS) * CHUNK_LEN as u32 + chunk_len(slots % CHUNK_SLOTS) as u32
}

/// A chunk of the column, sealed. A full one is padded to its fixed width.
pub(crate) fn encode_chunk(
    section: &Section,
    number: u32,
    slots: u32,
    states: impl Iterator<Item = SlotState>,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(CHUNK_LEN);
    states.for_each(|state| bytes.extend_from_slice(&state.encode()));
    if bytes.len() == CHUNK_SLOTS as usize * SLOT_LEN {
        bytes.resize(CHUNK_LEN - TAG_LEN, 0);
    }
    section.seal(Piece::Chunk, number, &Section::chunk_extra(slots), &mut bytes)?;
    Ok(bytes)
}

/// The frame table, sealed.
pub(crate) fn encode_table(section: &Section, entries: &[FrameEntry]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(entries.len() * ENTRY_LEN + TAG_LEN);
    entries.iter().for_each(|entry| bytes.extend_from_slice(&entry.encode()));
    section.seal(Piece::Table, 0, &[], &mut bytes)?;
    Ok(bytes)
}

/// Reads and checks the frame table of an authentic trailer.
pub(crate) fn decode_table(
    section: &Section,
    trailer: &Trailer,
    sealed: &[u8],
) -> Option<Vec<FrameEntry>> {
    let mut bytes = sealed.to_vec();
    if sealed.len() as u64 != u64::from(trailer.table_len())
        || !section.open(Piece::Table, 0, &[], &mut bytes)
    {
        return None;
    }
    let mut after = (0, LEAD_LEN as u32);
    bytes
        .chunks_exact(ENTRY_LEN)
        .map(|entry| {
            let entry = FrameEntry::decode(entry).filter(|entry| entry.fits(trailer, after))?;
            after =
                (u32::from(entry.first) + u32::from(entry.span), entry.offset + entry.stored_len);
            Some(entry)
        })
        .collect()
}
