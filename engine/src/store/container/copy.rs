//! A directory's own object: column, frame table and trailer. All of it, or all but the column, stands
//! in the container, too; where that or its end is lost, this object alone says what the slots
//! held, and so what to look for.

use std::cmp::Reverse;

use super::directory::{
    CHUNK_LEN, CHUNK_SLOTS, ENTRY_LEN, SlotState, TRAILER_LEN, Trailer, column_len, encode_chunk,
};
use super::open::{Directory, Finder, Tail};
use super::reader::{Directories, SWEEP_CHUNKS};
use super::{CONTAINER_FRAMES, CONTAINER_SLOTS};
use crate::error::{Error, Kind, Result};
use crate::ids::ContainerId;
use crate::store::format::{TAG_LEN, damaged};
use crate::store::names;
use crate::store::objects::Created;

/// No directory is longer: a column of 1.4 MiB and a table of 128 KiB at most.
const DIRECTORY_MAX: u64 = 2 << 20;

const _: () = assert!(
    CONTAINER_SLOTS.div_ceil(CHUNK_SLOTS) as usize * CHUNK_LEN
        + CONTAINER_FRAMES as usize * ENTRY_LEN
        + TAG_LEN
        + TRAILER_LEN
        < DIRECTORY_MAX as usize
);

/// What a look at a directory's own object came to.
#[derive(Debug)]
pub enum SecondCopy {
    /// It is there and the same.
    Whole,
    /// It was missing, and is there now.
    Made,
    /// It is missing, and this kept it from being made: nothing is lost by that yet.
    Missing(Error),
}

/// What a directory's own object says.
pub(super) struct Copied {
    /// The directory; its frames are in the container's own object, if that is there.
    pub(super) directory: Directory,
    /// What each slot is.
    pub(super) column: Vec<SlotState>,
}

impl Directories {
    /// Compares the own object of a container's directory with what the container says, which the
    /// caller has just found whole; makes it if it is missing.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when the object is another: it stays, as keys are never overwritten.
    pub fn ensure_copy(&self, container: ContainerId) -> Result<SecondCopy> {
        let objects = &self.finder().objects;
        let directory = self.present(container)?;
        let key = names::directory(container, directory.trailer.generation);
        let differs = || damaged(&key, "it is not what its container says");
        let said = match self.said_by(&directory) {
            Err(error) if error.kind() == Kind::Damaged && !objects.exists(&key)? => {
                return Ok(SecondCopy::Missing(error));
            }
            said => said?,
        };
        match objects.read_all(&key, said.len() as u64) {
            Ok(copy) if copy == said => Ok(SecondCopy::Whole),
            Ok(_) => Err(differs()),
            Err(error) if error.kind() == Kind::NotFound => match objects.create(&key, said) {
                Ok(Created::Ours) => Ok(SecondCopy::Made),
                Ok(Created::Exists) => Err(differs()),
                Err(error) => Ok(SecondCopy::Missing(error)),
            },
            Err(error) => Err(error),
        }
    }

    /// What the own object of a container's directory has to be, all of which is known.
    ///
    /// # Errors
    /// [`Kind::Damaged`], [`Kind::NotFound`] when not all of it is.
    pub fn own_object(&self, container: ContainerId) -> Result<Vec<u8>> {
        self.each_slot(container, |_, _| Ok(()))?;
        self.said_by(&*self.present(container)?)
    }

    /// What the own object of a directory has to be. A column that is apart is sealed anew, which
    /// gives the same bytes, as it says the same: of that object where it is sound, else of the frames.
    fn said_by(&self, directory: &Directory) -> Result<Vec<u8>> {
        let trailer = &directory.trailer;
        let mut said = Vec::new();
        let chunks = if trailer.column_is_apart() { trailer.chunks() } else { 0 };
        for first in (0..chunks).step_by(SWEEP_CHUNKS as usize) {
            let last = (first + SWEEP_CHUNKS).min(chunks);
            for (chunk, bytes) in (first..last).zip(self.read_chunks(directory, first..last)?) {
                let states: Option<Vec<SlotState>> = trailer.states(chunk, &bytes).collect();
                let states = states.ok_or_else(|| {
                    let what = "what some of its slots hold is not known: fleecectl repair first";
                    damaged(&directory.object, what)
                })?;
                let states = states.into_iter();
                said.extend(encode_chunk(&directory.section, chunk, trailer.slots, states)?);
            }
        }
        said.extend(self.finder().objects.read(&directory.object, trailer.directory_range())?);
        Ok(said)
    }

    /// Reads a directory's own object by itself.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn check_copy(&self, container: ContainerId, generation: u32) -> Result<()> {
        self.finder().open_copy(container, generation, &[]).map(drop)
    }
}

impl Finder {
    /// The generations of whose directory there is an own object: first those whose container is among
    /// `objects`, for its frames; the newest first.
    pub(super) fn copies(&self, container: ContainerId, objects: &[String]) -> Result<Vec<u32>> {
        let mut generations = Vec::new();
        self.objects.list(&names::directories_of(container.incarnation), |key, _| {
            match names::parse_directory(key) {
                Some((found, generation)) if found == container => generations.push(generation),
                _ => {}
            }
            Ok(())
        })?;
        generations.sort_unstable_by_key(|generation| {
            Reverse((own_object(objects, *generation).is_some(), *generation))
        });
        Ok(generations)
    }

    /// A directory as its own object has it.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub(super) fn open_copy(
        &self,
        container: ContainerId,
        generation: u32,
        objects: &[String],
    ) -> Result<Copied> {
        let key = names::directory(container, generation);
        let mut bytes = self.objects.read_all(&key, DIRECTORY_MAX)?;
        let trailer = bytes.len().checked_sub(TRAILER_LEN).map(|at| &bytes[at..]);
        let trailer = Trailer::decode(trailer.unwrap_or_default(), &key)?;
        let range = trailer.table_range();
        let column_len = column_len(trailer.slots);
        if u64::from(column_len) + range.end - range.start != bytes.len() as u64 {
            return Err(damaged(&key, "its length is not that of the directory"));
        }
        let sealed = bytes.split_to(column_len as usize);
        let tail = Tail { key: &key, start: range.start, bytes };
        let (trailer, section) = self.trailer(&tail, range.end)?;
        if (trailer.container, trailer.generation) != (container, generation) {
            return Err(damaged(&key, "it is another container's"));
        }
        let mut directory = self.open_section(&tail, trailer, section, false)?;
        let mut column = Vec::with_capacity(trailer.slots as usize);
        for chunk in 0..trailer.chunks() {
            let place = trailer.chunk_range(chunk);
            let sealed = &sealed[place.start as usize..place.end as usize];
            let states = directory.open_chunk(chunk, sealed)?;
            for state in trailer.states(chunk, &states) {
                column.push(state.ok_or_else(|| damaged(&key, "a slot has no known state"))?);
            }
        }
        let own = own_object(objects, generation).cloned();
        directory.object = own.unwrap_or_else(|| names::container(container, generation));
        Ok(Copied { directory, column })
    }
}

/// The object of a generation, among a container's objects.
fn own_object(objects: &[String], generation: u32) -> Option<&String> {
    let of = |key: &&String| names::parse_container(key).is_some_and(|(_, of)| of == generation);
    objects.iter().find(of)
}
