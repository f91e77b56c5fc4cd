//! Rewriting: the next generation of a container, under a new key, with every slot in its place.
//!
//! Order: object and its directory's own object durable → journal entry durable. Nothing of the older generation changes,
//! and it is read until a mark names the new one; a crash before leaves an object too many.

use bytes::Bytes;

use super::directory::{FrameEntry, Section, SlotState, encode_lead};
use super::frame::FrameRef;
use super::writer::{Column, RawFrame, block_size_of, frame_max, pack, write_directory};
use super::{CONTAINER_BYTES, CONTAINER_FRAMES, ContainerKind};
use crate::error::Result;
use crate::ids::{ContainerId, Fingerprint};
use crate::store::Store;
use crate::store::format::{Header, Piece};
use crate::store::journal::{Entry, Position};
use crate::store::names;
use crate::store::objects::ObjectWriter;

/// Writes a generation, slot by slot from slot 0. Dropped before it is finished, it never was.
pub struct Rewriter {
    store: Store,
    kind: ContainerKind,
    header: Header,
    section: Section,
    writer: ObjectWriter,
    table: Vec<FrameEntry>,
    states: Vec<SlotState>,
    frame: RawFrame,
    raw_bytes: u64,
    /// Bytes and frames that what is packed anew may take.
    room: (u64, u64),
}

impl Rewriter {
    /// Begins `generation` of a container, into which `copied` frames of so many bytes will
    /// be copied as they are.
    ///
    /// # Errors
    /// When it cannot be staged.
    pub fn begin(
        store: &Store,
        kind: ContainerKind,
        container: ContainerId,
        generation: u32,
        (copied, bytes): (u64, u64),
    ) -> Result<Self> {
        let (header, cipher) = store.sealer().begin(kind.object())?;
        let mut writer = store.objects().writer(&names::container(container, generation))?;
        let block_size = block_size_of(kind, store.block_size());
        writer.write(encode_lead(&header, container, generation, block_size).into())?;
        Ok(Rewriter {
            store: store.clone(),
            kind,
            section: Section::new(&header, cipher, container, generation),
            header,
            writer,
            table: Vec::new(),
            states: Vec::new(),
            frame: RawFrame::default(),
            raw_bytes: 0,
            room: (
                u64::from(CONTAINER_BYTES).saturating_sub(bytes),
                u64::from(CONTAINER_FRAMES).saturating_sub(copied),
            ),
        })
    }

    /// Copies a frame as it was compressed; `states` are those of its span.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn copy(
        &mut self,
        frame: &FrameRef,
        compressed: Vec<u8>,
        states: impl IntoIterator<Item = SlotState>,
    ) -> Result<()> {
        self.end_frame()?;
        let mut stored = compressed;
        let extra = Section::frame_extra(&frame.entry);
        self.section.seal(Piece::Frame, self.table.len() as u32, &extra, &mut stored)?;
        self.raw_bytes += u64::from(frame.raw_len);
        self.states.extend(states);
        self.write_frame(frame.entry, stored)
    }

    /// Puts a block or a node into the next slot; false when the container has no room for it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn push(&mut self, fingerprint: Fingerprint, bytes: &[u8]) -> Result<bool> {
        if self.frame.lengths.is_empty() {
            let most = u64::from(frame_max(self.kind, self.store.block_size()));
            if self.room.0 < most || self.room.1 == 0 {
                return Ok(false);
            }
            self.frame.first = self.states.len() as u16;
        }
        self.frame.bytes.extend_from_slice(bytes);
        self.frame.lengths.push(bytes.len() as u32);
        self.states.push(SlotState::Present(fingerprint));
        if self.frame.is_full(self.kind, self.store.block_size()) {
            self.end_frame()?;
        }
        Ok(true)
    }

    /// The next slot holds nothing.
    ///
    /// # Errors
    /// When the frame before it cannot be written.
    pub fn skip(&mut self, state: SlotState) -> Result<()> {
        self.end_frame()?;
        self.states.push(state);
        Ok(())
    }

    fn end_frame(&mut self) -> Result<()> {
        if self.frame.lengths.is_empty() {
            return Ok(());
        }
        let raw = self.frame.take(self.kind);
        self.raw_bytes += raw.bytes.len() as u64;
        let number = self.table.len() as u32;
        let (entry, stored) = pack(&self.store, &self.section, number, &raw)?;
        self.room =
            (self.room.0.saturating_sub(stored.len() as u64), self.room.1.saturating_sub(1));
        self.write_frame(entry, stored)
    }

    fn write_frame(&mut self, entry: FrameEntry, stored: Vec<u8>) -> Result<()> {
        let offset = self.writer.written() as u32;
        self.table.push(FrameEntry { offset, ..entry });
        self.writer.write(Bytes::from(stored))
    }

    /// Makes the generation durable, then its journal entry. It is read once the damage marks
    /// name it.
    ///
    /// # Errors
    /// When either cannot be made durable.
    pub fn finish(mut self) -> Result<(Entry, Position)> {
        self.end_frame()?;
        let copy = write_directory(
            &self.store,
            &mut self.writer,
            (self.kind, &self.header, &self.section),
            (&self.table, self.raw_bytes),
            (Column::Within, self.states.iter().copied()),
        )?;
        let (container, generation) = (self.section.container, self.section.generation);
        let copy = copy.finish_in_background()?;
        let stored_bytes = self.writer.finish()?;
        copy.wait()?;
        let entry = Entry {
            container,
            generation,
            kind: self.kind,
            slots: self.states.len() as u32,
            last_in_object: container.counter,
            stored_bytes,
        };
        let position = self.store.journal()?.record(entry)?;
        Ok((entry, position))
    }
}
