//! Reading fingerprint columns: from the container, from the directory's own object, or, where
//! the column is there alone and is lost, once more from the frames.

use std::ops::Range;

use super::directory::{CHUNK_SLOTS, SLOT_LEN, SlotState};
use super::open::Directory;
use super::reader::{Directories, sound};
use crate::error::{Kind, Result};

/// A byte of a slot whose frame is damaged: no state has this code.
const UNKNOWN: u8 = u8::MAX;

impl Directories {
    /// Reads and authenticates chunks of the column.
    pub(super) fn read_chunks(
        &self,
        directory: &Directory,
        chunks: Range<u32>,
    ) -> Result<Vec<Vec<u8>>> {
        if chunks.is_empty() {
            return Ok(Vec::new());
        }
        let trailer = &directory.trailer;
        let whole =
            trailer.chunk_range(chunks.start).start..trailer.chunk_range(chunks.end - 1).end;
        let (object, start) = directory.column_place();
        let read = self.finder().objects.read(&object, start + whole.start..start + whole.end);
        let read = if trailer.column_is_apart() { sound(read)? } else { Some(read?) };
        let bytes = read.unwrap_or_default();
        chunks
            .map(|chunk| {
                let range = trailer.chunk_range(chunk);
                let (from, to) = (range.start - whole.start, range.end - whole.start);
                let sealed = bytes.get(from as usize..to as usize).unwrap_or_default();
                match directory.open_chunk(chunk, sealed) {
                    Err(_) if trailer.column_is_apart() => self.computed_chunk(directory, chunk),
                    opened => opened,
                }
            })
            .collect()
    }

    /// A chunk as the frames say it. Slots whose frame is damaged have no known state.
    fn computed_chunk(&self, directory: &Directory, chunk: u32) -> Result<Vec<u8>> {
        let first = chunk * CHUNK_SLOTS;
        let slots = first..directory.trailer.slots.min(first + CHUNK_SLOTS);
        let mut bytes = vec![UNKNOWN; slots.len() * SLOT_LEN];
        let finder = self.finder();
        for number in directory.frames_of(&slots) {
            let frame = directory.frame(number);
            let raw = match self.read_parts(directory, &frame) {
                Ok((_, raw)) => raw,
                Err(error) if error.kind() == Kind::Damaged => continue,
                Err(error) => return Err(error),
            };
            for (slot, block) in frame.blocks(&raw, finder.block_size) {
                let n = u32::from(slot.0).checked_sub(first).map(|n| n as usize * SLOT_LEN);
                let entry = n.and_then(|n| bytes.get_mut(n..n + SLOT_LEN));
                if let Some(entry) = entry {
                    let fingerprint = finder.fingerprinter.of(block);
                    entry.copy_from_slice(&SlotState::Present(fingerprint).encode());
                }
            }
        }
        Ok(bytes)
    }
}
