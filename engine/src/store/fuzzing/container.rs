//! Containers for the fuzzer: their seals are made good, so that what they say is believed.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::{fixed_header, fixed_key};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Incarnation, Slot};
use crate::store::container::codec::Codecs;
use crate::store::container::directory::{
    FrameEntry, LEAD_LEN, Section, TRAILER_LEN, Trailer, column_len, decode_table, encode_lead,
};
use crate::store::container::{ContainerKind, Directories, SlotInfo};
use crate::store::format::{HEADER_LEN, Header, ObjectKind, Piece, Sealer, TAG_LEN, le32};
use crate::store::names;
use crate::store::objects::Objects;
use crate::store::recipe::decode_node;

/// Sections that are made good in one object.
const SECTIONS: usize = 4;
/// The object's last container.
const LAST: ContainerId = ContainerId { incarnation: Incarnation(1), counter: 9 };

/// Objects in memory, and a sealer that only authenticates: what is authentic can be read.
pub(super) fn objects() -> Result<(Objects, Sealer)> {
    static SHARED: OnceLock<Option<(Objects, Sealer)>> = OnceLock::new();
    let new =
        || Some((Objects::in_memory().ok()?, Sealer::new(Arc::new(fixed_key().ok()?), false)));
    let shared = SHARED.get_or_init(new).clone();
    shared.ok_or_else(|| Error::new(Kind::Failed, "no objects in memory"))
}

pub(super) fn directories(objects: &Objects, sealer: &Sealer, block_size: u32) -> Directories {
    let codecs = Arc::new(Codecs::new(1));
    Directories::new(objects.clone(), sealer.clone(), codecs, block_size, 64 << 10, 256 << 10)
}

/// A container's object. Bit 0 of the first byte: the block size (4 or 8 KiB); bit 1: numbers of
/// the trailer that follow from others are made to; bit 2: nothing is sealed; bit 3: columns that
/// can be apart are.
pub fn container(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    let block_size = 4096 << (how & 1);
    let Ok((objects, sealer)) = objects() else { return };
    let mut bytes = data.to_vec();
    let mut containers = BTreeSet::from([LAST]);
    if how & 4 == 0 {
        containers.extend(make_good(&mut bytes, &sealer, (how & 2 != 0, how & 8 != 0)));
    }
    let own = own_directory(&bytes, &sealer).unwrap_or_else(|| bytes.clone());
    if objects.replace(&names::container(LAST, 0), &bytes).is_err()
        || objects.replace(&names::directory(LAST, 0), &own).is_err()
    {
        return;
    }
    let directories = directories(&objects, &sealer, block_size);
    let _ = directories.salvage(LAST);
    for container in containers {
        // Others are not there, or would be found in an object of an earlier run.
        if container.incarnation == LAST.incarnation && container.counter <= LAST.counter {
            // The error is what a reader hears.
            let _ = read(&directories, container, block_size);
        }
    }
}

/// What stands in an object of its own of the last directory of an object. A column that is apart is the
/// object's first bytes, made good.
fn own_directory(bytes: &[u8], sealer: &Sealer) -> Option<Vec<u8>> {
    let at = bytes.len().checked_sub(TRAILER_LEN)?;
    let trailer = Trailer::decode(&bytes[at..], "x").ok()?;
    let rest = bytes.get(trailer.directory_range().start as usize..)?;
    if !trailer.column_is_apart() {
        return Some(rest.to_vec());
    }
    let mut own = bytes.get(..column_len(trailer.slots) as usize)?.to_vec();
    let section = section(bytes, at, &trailer.header, sealer)?;
    sign_column(&section, &trailer, &mut own, 0);
    own.extend_from_slice(rest);
    Some(own)
}

/// Everything that readers do with a container.
fn read(directories: &Directories, container: ContainerId, block_size: u32) -> Result<()> {
    let Some(summary) = directories.summary(container)? else { return Ok(()) };
    let _ = directories.check_lead(container);
    if container == LAST {
        // What is made of others would be found in a later run.
        let _ = directories.ensure_copy(container);
    }
    let mut slots = 0;
    let counted = directories.each_slot(container, |slot, _| {
        assert_eq!(u32::from(slot.0), slots);
        slots += 1;
        Ok(())
    });
    assert!(counted.is_err() || slots == summary.slots);
    for frame in directories.frames(container)?.into_iter().take(64) {
        let Ok(raw) = directories.read_frame(&frame) else { continue };
        assert_eq!(raw.len() as u64, u64::from(frame.raw_len));
        match summary.kind {
            ContainerKind::Blocks => {
                for slot in frame.first.0..frame.first.0 + frame.span {
                    let range = frame.block_range(Slot(slot), block_size);
                    assert!(range.is_none_or(|range| range.end <= raw.len()));
                }
            }
            ContainerKind::Nodes => {
                for (_, node) in Directories::nodes_of(&frame, &raw).into_iter().flatten() {
                    for level in 0..4 {
                        let _ = decode_node(level, node);
                    }
                }
            }
        }
    }
    let mut block = vec![0; block_size as usize];
    for slot in (0..summary.slots.min(300)).chain([summary.slots, u32::from(u16::MAX)]) {
        let address = Address { container, slot: Slot(slot as u16) };
        let info = directories.slot(address);
        assert!(slot < summary.slots || matches!(info, Ok(SlotInfo::Missing)));
        let _ = directories.read_block(address, &mut block);
        let _ = directories.read_node(address);
        let _ = directories.resolve(address);
    }
    let _ = directories.run(Address { container, slot: Slot(0) }, 64);
    Ok(())
}

/// Seals an object's sections as a writer of the store would have, from the last one back;
/// returns the containers that they are.
fn make_good(
    bytes: &mut [u8],
    sealer: &Sealer,
    (consistent, apart): (bool, bool),
) -> Vec<ContainerId> {
    let mut containers = Vec::new();
    let mut end = bytes.len();
    while containers.len() < SECTIONS && end >= TRAILER_LEN {
        let at = end - TRAILER_LEN;
        let kind =
            if le32(bytes, at + 8) >> 16 & 1 == 0 { ObjectKind::Nodes } else { ObjectKind::Blocks };
        let header = fixed_header(kind, false);
        bytes[at..at + HEADER_LEN].copy_from_slice(&header.encode());
        if consistent {
            make_consistent(&mut bytes[at..end], end, apart);
        }
        let Some(section) = section(bytes, at, &header, sealer) else { break };
        containers.push(section.container);
        let extra = bytes[at..end - TAG_LEN].to_vec();
        sign(&section, Piece::Trailer, 0, &extra, bytes, end - TAG_LEN..end);
        let Ok(trailer) = Trailer::decode(&bytes[at..end], "x") else { break };
        if trailer.section_end() != Some(end as u64) {
            break;
        }
        sign_pieces(&section, &trailer, bytes);
        end = trailer.section_start as usize;
    }
    containers
}

/// Makes the places in a trailer follow from its counts, where that is possible.
fn make_consistent(trailer: &mut [u8], end: usize, apart: bool) {
    let (column, slots, frames) = (le32(trailer, 104), le32(trailer, 108), le32(trailer, 116));
    let (column, slots, frames) = (column % (1 << 20), slots % (1 << 16), frames % (1 << 12));
    let table = column + if apart { 0 } else { column_len(slots) };
    let length = table as usize + frames as usize * 32 + TAG_LEN + TRAILER_LEN;
    let start = end.saturating_sub(length) as u64;
    trailer[96..104].copy_from_slice(&start.to_le_bytes());
    for (at, number) in [(104, column), (108, slots), (112, table), (116, frames)] {
        trailer[at..at + 4].copy_from_slice(&number.to_le_bytes());
    }
}

fn section(bytes: &[u8], at: usize, header: &Header, sealer: &Sealer) -> Option<Section> {
    let container = ContainerId {
        incarnation: Incarnation(le32(bytes, at + 80)),
        counter: le32(bytes, at + 84),
    };
    let cipher = sealer.cipher(header, header.kind, "x").ok()?;
    Some(Section::new(header, cipher, container, le32(bytes, at + 88)))
}

/// Seals the lead, the column, the table and the frames of a section.
fn sign_pieces(section: &Section, trailer: &Trailer, bytes: &mut [u8]) {
    let start = trailer.section_start as usize;
    let lead =
        encode_lead(&trailer.header, section.container, section.generation, trailer.block_size);
    if let Some(place) = bytes.get_mut(start..start + LEAD_LEN) {
        place.copy_from_slice(&lead);
    }
    if !trailer.column_is_apart() {
        sign_column(section, trailer, bytes, start + trailer.column_offset as usize);
    }
    let table = start + trailer.table_offset as usize;
    let table = table..table + trailer.table_len() as usize;
    sign(section, Piece::Table, 0, &[], bytes, table.clone());
    let entries = bytes.get(table).and_then(|table| decode_table(section, trailer, table));
    for (number, entry) in entries.unwrap_or_default().iter().enumerate() {
        let FrameEntry { offset, stored_len, .. } = *entry;
        let frame = start + offset as usize..start + offset as usize + stored_len as usize;
        sign(section, Piece::Frame, number as u32, &Section::frame_extra(entry), bytes, frame);
    }
}

/// Seals a column that begins at `start`.
fn sign_column(section: &Section, trailer: &Trailer, bytes: &mut [u8], start: usize) {
    for chunk in 0..trailer.chunks() {
        let range = trailer.chunk_range(chunk);
        let range = start + range.start as usize..start + range.end as usize;
        sign(section, Piece::Chunk, chunk, &Section::chunk_extra(trailer.slots), bytes, range);
    }
}

/// Puts the right tag at the end of a piece, wherever it lies.
fn sign(
    section: &Section,
    piece: Piece,
    number: u32,
    extra: &[u8],
    bytes: &mut [u8],
    range: Range<usize>,
) {
    let Some(piece_bytes) = bytes.get_mut(range) else { return };
    let Some(body) = piece_bytes.len().checked_sub(TAG_LEN) else { return };
    let mut sealed = piece_bytes[..body].to_vec();
    if section.seal(piece, number, extra, &mut sealed).is_ok() {
        piece_bytes.copy_from_slice(&sealed);
    }
}
