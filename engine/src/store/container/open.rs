//! Finding a container and opening its directory.

use std::ops::Range;

use bytes::Bytes;

use super::ContainerKind;
use super::directory::{
    CHUNK_SLOTS, ENTRY_LEN, FrameEntry, Section, SlotState, TRAILER_LEN, Trailer, decode_table,
};
use super::frame::FrameRef;
use crate::error::{Kind, Result};
use crate::fingerprint::Fingerprinter;
use crate::ids::{Address, ContainerId, Fingerprint, Slot};
use crate::store::format::{Piece, Sealer, TAG_LEN, damaged};
use crate::store::names;
use crate::store::objects::Objects;

/// The suffix that opens a container: trailer and the frame table of some 500 frames.
const TAIL_READ: u64 = 16 << 10;

const _: () = assert!(TAIL_READ as usize > TRAILER_LEN + 400 * ENTRY_LEN + TAG_LEN);

/// What a slot is, to whoever wants to use it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotInfo {
    /// It holds what has this fingerprint (or, of a node, this tag).
    Present(Fingerprint),
    /// It was given up.
    Dead,
    /// What it held stands elsewhere.
    Forward(Address),
    /// It is damaged, or what it held is not known any more.
    Damaged,
    /// There is no such container or slot.
    Missing,
}

/// An open container.
pub(crate) struct Directory {
    pub(crate) object: String,
    pub(crate) trailer: Trailer,
    pub(crate) section: Section,
    pub(crate) frames: Vec<FrameEntry>,
}

impl Directory {
    pub(crate) fn memory(&self) -> usize {
        self.frames.len() * size_of::<FrameEntry>() + size_of::<Directory>() + self.object.len()
    }

    /// Authenticates a chunk of the column.
    pub(crate) fn open_chunk(&self, chunk: u32, sealed: &[u8]) -> Result<Vec<u8>> {
        let mut bytes = sealed.to_vec();
        let extra = Section::chunk_extra(self.trailer.slots);
        if self.section.open(Piece::Chunk, chunk, &extra, &mut bytes) {
            return Ok(bytes);
        }
        let what = format!(
            "chunk {chunk} of container {}'s column: its authentication failed",
            self.trailer.container
        );
        Err(damaged(&self.object, &what))
    }

    /// The object in which the fingerprint column is, and where it begins there.
    pub(super) fn column_place(&self) -> (String, u64) {
        let trailer = &self.trailer;
        match trailer.column_is_apart() {
            true => (names::directory(trailer.container, trailer.generation), 0),
            false => (self.object.clone(), trailer.directory_range().start),
        }
    }

    pub(crate) fn slot(&self, chunk: &[u8], slot: Slot) -> Result<SlotInfo> {
        match SlotState::nth(chunk, (u32::from(slot.0) % CHUNK_SLOTS) as usize) {
            Some(SlotState::Present(fingerprint)) => Ok(SlotInfo::Present(fingerprint)),
            Some(SlotState::Dead) => Ok(SlotInfo::Dead),
            Some(SlotState::Forward(there)) => Ok(SlotInfo::Forward(there)),
            Some(SlotState::Damaged(_)) => Ok(SlotInfo::Damaged),
            // Neither its frame nor the column says any more what it held.
            None if self.trailer.column_is_apart() => Ok(SlotInfo::Damaged),
            None => Err(damaged(&self.object, &format!("slot {} has no known state", slot.0))),
        }
    }

    pub(crate) fn frame_of(&self, slot: Slot) -> Option<FrameRef> {
        let number = self.frames.partition_point(|entry| entry.first <= slot.0).checked_sub(1)?;
        self.frames[number].index_of(slot).map(|_| self.frame(number))
    }

    /// The numbers of the frames that hold any of these slots.
    pub(super) fn frames_of(&self, slots: &Range<u32>) -> Range<usize> {
        let end = |entry: &FrameEntry| u32::from(entry.first) + u32::from(entry.span);
        let first = self.frames.partition_point(|entry| end(entry) <= slots.start);
        first..self.frames.partition_point(|entry| u32::from(entry.first) < slots.end)
    }

    pub(crate) fn frame(&self, number: usize) -> FrameRef {
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

/// Finds containers in the objects of a store.
pub(crate) struct Finder {
    pub(crate) objects: Objects,
    pub(crate) sealer: Sealer,
    pub(crate) fingerprinter: Fingerprinter,
    pub(crate) block_size: u32,
}

impl Finder {
    /// Finds a container: under its own key in the generation that is known, as most are, or
    /// in the newest generation that can be opened.
    pub(crate) fn open(&self, container: ContainerId, known: u32) -> Result<Option<Directory>> {
        let own = names::container(container, known);
        let mut damage = None;
        let mut keys = vec![own.clone()];
        loop {
            for key in &keys {
                match self.open_in(key, container, false) {
                    Ok(Some(directory)) => return Ok(Some(directory)),
                    // Others are in it: in the object of its own name that is damage.
                    Ok(None) if *key == own => {
                        damage.get_or_insert(damaged(key, "another container is in it"));
                    }
                    Ok(None) => {}
                    Err(error) if error.kind() == Kind::NotFound => {}
                    Err(error) if error.kind() == Kind::Damaged => {
                        damage.get_or_insert(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            if keys != [own.as_str()] {
                break;
            }
            keys = self.keys(container)?;
            if keys.is_empty() || keys == [own.as_str()] {
                break;
            }
        }
        damage.map_or(Ok(None), Err)
    }

    /// The container in one generation.
    pub(crate) fn open_generation(
        &self,
        container: ContainerId,
        generation: u32,
    ) -> Result<Option<Directory>> {
        for key in self.keys(container)? {
            if names::parse_container(&key).is_some_and(|(_, other)| other == generation)
                && let Some(directory) = self.open_in(&key, container, false)?
            {
                return Ok(Some(directory));
            }
        }
        Ok(None)
    }

    /// The objects that may hold the container, the newest generation first: those with the
    /// smallest last container that is not before it.
    pub(crate) fn keys(&self, container: ContainerId) -> Result<Vec<String>> {
        let mut last = None;
        let mut generations = Vec::new();
        self.objects.list(&names::containers_of(container.incarnation), |key, _| {
            let Some((found, generation)) = names::parse_container(key) else { return Ok(()) };
            if found.counter < container.counter || last.is_some_and(|last| found.counter > last) {
                return Ok(());
            }
            if last != Some(found.counter) {
                generations.clear();
            }
            last = Some(found.counter);
            generations.push(generation);
            Ok(())
        })?;
        generations.sort_unstable_by(|a, b| b.cmp(a));
        let counter = last.unwrap_or(container.counter);
        let last = ContainerId { counter, ..container };
        Ok(generations.into_iter().map(|generation| names::container(last, generation)).collect())
    }

    /// The container's section in an object, which may hold several: they are found from the last one back.
    /// `tolerant`: without its frames, if their table is damaged.
    pub(crate) fn open_in(
        &self,
        key: &str,
        container: ContainerId,
        tolerant: bool,
    ) -> Result<Option<Directory>> {
        let (bytes, size) = self.objects.read_tail(key, TAIL_READ)?;
        let tail = Tail { key, start: size - bytes.len() as u64, bytes };
        let mut end = size;
        loop {
            let (trailer, section) = self.trailer(&tail, end)?;
            if trailer.container == container {
                return self.open_section(&tail, trailer, section, tolerant).map(Some);
            }
            if trailer.section_start == 0 {
                return Ok(None);
            }
            end = trailer.section_start;
        }
    }

    /// The authentic trailer that ends at byte `end`.
    pub(super) fn trailer(&self, tail: &Tail<'_>, end: u64) -> Result<(Trailer, Section)> {
        let Some(start) = end.checked_sub(TRAILER_LEN as u64) else {
            return Err(damaged(tail.key, "it is too short for a container"));
        };
        let bytes = self.within(tail, start..end)?;
        let trailer = Trailer::decode(&bytes, tail.key)?;
        if trailer.section_end() != Some(end) {
            return Err(damaged(tail.key, "its trailer does not end where it says"));
        }
        let cipher = self.sealer.cipher(&trailer.header, trailer.kind.object(), tail.key)?;
        let section = Section::new(&trailer.header, cipher, trailer.container, trailer.generation);
        if !Trailer::is_authentic(&section, &bytes) {
            return Err(damaged(tail.key, "its trailer's authentication failed"));
        }
        Ok((trailer, section))
    }

    pub(super) fn open_section(
        &self,
        tail: &Tail<'_>,
        trailer: Trailer,
        section: Section,
        tolerant: bool,
    ) -> Result<Directory> {
        if trailer.kind == ContainerKind::Blocks && trailer.block_size != self.block_size {
            return Err(damaged(tail.key, "its block size is not the store's"));
        }
        let start = trailer.table_range().start;
        let table = self.within(tail, start..start + u64::from(trailer.table_len()))?;
        let frames = decode_table(&section, &trailer, &table)
            .or_else(|| tolerant.then(Vec::new))
            .ok_or_else(|| damaged(tail.key, "its frame table's authentication failed"))?;
        Ok(Directory { object: tail.key.to_owned(), trailer, section, frames })
    }

    /// Bytes of an object, from what was read of its end where they lie in it.
    fn within(&self, tail: &Tail<'_>, range: Range<u64>) -> Result<Bytes> {
        match range.start.checked_sub(tail.start) {
            Some(from) if range.end - tail.start <= tail.bytes.len() as u64 => {
                Ok(tail.bytes.slice(from as usize..(range.end - tail.start) as usize))
            }
            _ => self.objects.read(tail.key, range),
        }
    }
}

/// The end of an object.
pub(super) struct Tail<'a> {
    pub(super) key: &'a str,
    /// Where it begins in the object.
    pub(super) start: u64,
    pub(super) bytes: Bytes,
}
