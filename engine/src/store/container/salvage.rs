//! What can still be got from a container, whatever is damaged in it.

use std::sync::Arc;

use super::ContainerKind;
use super::directory::{CHUNK_SLOTS, SlotState};
use super::frame::FrameRef;
use super::open::Directory;
use super::reader::Directories;
use crate::error::{Kind, Result};
use crate::ids::ContainerId;
use crate::store::names;

/// A container that is open as far as it can be.
pub struct Salvage {
    directory: Arc<Directory>,
    /// What each slot is; `None` where the column is damaged.
    pub column: Vec<Option<SlotState>>,
    /// Something beside the frames is damaged: lead, frame table or column.
    pub flawed: bool,
    /// The newest generation that there is, readable or not.
    pub newest: u32,
}

impl Salvage {
    /// What its slots hold.
    #[must_use]
    pub fn kind(&self) -> ContainerKind {
        self.directory.trailer.kind
    }

    /// The generation that was opened.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.directory.trailer.generation
    }

    /// Its frames; none when their table is damaged.
    pub fn frames(&self) -> impl Iterator<Item = FrameRef> + '_ {
        (0..self.directory.frames.len()).map(|number| self.directory.frame(number))
    }
}

impl Directories {
    /// Opens the newest generation of a container of which anything can be opened; `None` when
    /// none has a sound trailer: then it is not known what its slots held.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn salvage(&self, container: ContainerId) -> Result<Option<Salvage>> {
        let keys = self.finder().keys(container)?;
        let generation =
            |key: &String| names::parse_container(key).map(|(_, generation)| generation);
        let newest = keys.iter().filter_map(generation).max().unwrap_or(0);
        for tolerant in [false, true] {
            for key in &keys {
                match self.finder().open_in(key, container, tolerant) {
                    Ok(Some(directory)) => return self.salvaged(directory, newest).map(Some),
                    Ok(None) => {}
                    Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(None)
    }

    fn salvaged(&self, directory: Directory, newest: u32) -> Result<Salvage> {
        let mut flawed = directory.frames.len() as u32 != directory.trailer.frames;
        flawed |= sound(self.check_lead_of(&directory))?.is_none();
        let slots = directory.trailer.slots;
        let mut column = Vec::with_capacity(slots as usize);
        for chunk in 0..directory.trailer.chunks() {
            let here = (slots - chunk * CHUNK_SLOTS).min(CHUNK_SLOTS) as usize;
            match sound(self.read_chunks(&directory, chunk..chunk + 1))? {
                Some(bytes) => {
                    let bytes = bytes.first().map_or(&[][..], Vec::as_slice);
                    column.extend((0..here).map(|n| SlotState::nth(bytes, n)));
                }
                None => {
                    flawed = true;
                    column.resize(column.len() + here, None);
                }
            }
        }
        Ok(Salvage { directory: Arc::new(directory), column, flawed, newest })
    }

    /// A frame's bytes, as they were compressed and decompressed; `None` when it is damaged.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn salvage_frame(
        &self,
        salvage: &Salvage,
        frame: &FrameRef,
    ) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        let directory = &salvage.directory;
        let stored = self.finder().objects.read(&directory.object, frame.range());
        let Some(stored) = sound(stored)? else { return Ok(None) };
        let Some(compressed) = sound(self.unseal(directory, frame, &stored))? else {
            return Ok(None);
        };
        let raw = sound(self.inflate(directory, frame, &compressed))?;
        Ok(raw.map(|raw| (compressed, raw)))
    }
}

/// Takes damage for nothing.
fn sound<T>(read: Result<T>) -> Result<Option<T>> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}
