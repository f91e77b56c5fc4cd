//! What can still be got from a container, whatever is damaged in it.

use std::sync::Arc;

use super::ContainerKind;
use super::copy::Copied;
use super::directory::SlotState;
use super::frame::FrameRef;
use super::open::Directory;
use super::reader::{Directories, sound};
use crate::error::Result;
use crate::ids::ContainerId;
use crate::store::names;

/// A container that is open as far as it can be.
pub struct Salvage {
    directory: Arc<Directory>,
    /// What each slot is; `None` where nothing says it any more.
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
    /// Opens the newest generation of a container of which anything can be opened: the directory in
    /// it, or the directory's own object; `None` when there is neither: then it is not known what its
    /// slots held.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn salvage(&self, container: ContainerId) -> Result<Option<Salvage>> {
        let keys = self.finder().keys(container)?;
        let copies = self.finder().copies(container, &keys)?;
        let generations = keys.iter().filter_map(|key| names::parse_container(key));
        let generations = generations.map(|(_, generation)| generation);
        let newest = generations.chain(copies.iter().copied()).max().unwrap_or(0);
        if let Some(directory) = self.open_any(&keys, container, false)? {
            return self.salvaged(directory, &keys, newest).map(Some);
        }
        for generation in copies {
            let copy = sound(self.finder().open_copy(container, generation, &keys))?;
            if let Some(Copied { directory, column }) = copy {
                let (directory, column) = (Arc::new(directory), column.into_iter().map(Some));
                let column = column.collect();
                return Ok(Some(Salvage { directory, column, flawed: true, newest }));
            }
        }
        let directory = self.open_any(&keys, container, true)?;
        directory.map(|directory| self.salvaged(directory, &keys, newest)).transpose()
    }

    /// The first of these objects in which the container can be opened.
    fn open_any(
        &self,
        keys: &[String],
        container: ContainerId,
        tolerant: bool,
    ) -> Result<Option<Directory>> {
        for key in keys {
            if let Some(Some(directory)) = sound(self.finder().open_in(key, container, tolerant))? {
                return Ok(Some(directory));
            }
        }
        Ok(None)
    }

    fn salvaged(&self, directory: Directory, keys: &[String], newest: u32) -> Result<Salvage> {
        let mut flawed = directory.frames.len() as u32 != directory.trailer.frames;
        flawed |= sound(self.check_lead_of(&directory))?.is_none();
        let mut column = self.own_column(&directory)?;
        if column.contains(&None) {
            flawed = true;
            let (container, generation) =
                (directory.trailer.container, directory.trailer.generation);
            let copy = sound(self.finder().open_copy(container, generation, keys))?;
            let said = copy.into_iter().flat_map(|copy| copy.column);
            column.iter_mut().zip(said).for_each(|(slot, said)| *slot = slot.or(Some(said)));
        }
        Ok(Salvage { directory: Arc::new(directory), column, flawed, newest })
    }

    /// What its column says of each slot, wherever that is; `None` where nothing says it.
    fn own_column(&self, directory: &Directory) -> Result<Vec<Option<SlotState>>> {
        let trailer = &directory.trailer;
        let mut column = Vec::with_capacity(trailer.slots as usize);
        for chunk in 0..trailer.chunks() {
            let bytes = sound(self.read_chunks(directory, chunk..chunk + 1))?;
            let bytes = bytes.as_ref().and_then(|chunks| chunks.first()).map_or(&[][..], |c| c);
            column.extend(trailer.states(chunk, bytes));
        }
        Ok(column)
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
        sound(self.read_parts(&salvage.directory, frame))
    }
}
