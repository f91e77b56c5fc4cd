//! A disk read at random, for serving it.

use super::{Restorer, is_damage};
use crate::error::{Context, Error, Result};
use crate::ids::Address;
use crate::store::container::Directories;
use crate::store::damage::Found;
use crate::store::manifest::Disk;
use crate::store::recipe::{Placement, RecipeReader};

/// Extents of one answer: what the protocol carries.
const MAX_EXTENTS: usize = 4096;

/// A disk of a snapshot, open for reading.
pub struct DiskImage {
    recipe: RecipeReader<Directories>,
    directories: Directories,
    size: u64,
    block_size: u64,
    name: String,
    block: Vec<u8>,
    /// Damage that was met since it was taken last.
    found: Vec<Found>,
}

/// A range of a disk that is all zeros, or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ImageExtent {
    /// Its first byte.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
    /// Whether it is all zeros.
    pub zero: bool,
}

impl Restorer {
    /// Opens a disk for reading at random.
    ///
    /// # Errors
    /// When its recipe does not fit its size.
    pub fn image(&self, disk: &Disk) -> Result<DiskImage> {
        Ok(DiskImage {
            recipe: self.recipe(disk)?,
            directories: self.directories.clone(),
            size: disk.size,
            block_size: u64::from(self.block_size),
            name: disk.name.clone(),
            block: vec![0; self.block_size as usize],
            found: Vec::new(),
        })
    }
}

impl DiskImage {
    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` with what is at `offset`; beyond the disk's end there are zeros.
    ///
    /// # Errors
    /// [`crate::error::Kind::Damaged`] when any of it is.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        buffer.fill(0);
        let end = offset.saturating_add(buffer.len() as u64).min(self.size);
        let blocks = offset / self.block_size..end.div_ceil(self.block_size);
        let mut runs = self.recipe.runs(blocks).tolerant();
        loop {
            let run = runs.next().context(|| format!("cannot read the disk {}", self.name))?;
            if let Some(lost) = runs.take_lost().into_iter().next() {
                if is_damage(&lost.error) {
                    let (container, slot) = (lost.node.address.container, lost.node.address.slot.0);
                    let how = lost.error.to_string();
                    self.found.push(Found { container, slots: (slot, 1), how });
                }
                return Err(lost.error).context(|| format!("cannot read the disk {}", self.name));
            }
            let Some(run) = run else { return Ok(()) };
            for n in 0..run.count {
                let Placement::At(address) = run.placement.skip(n) else { break };
                if let Err(error) = self.directories.read_block(address, &mut self.block) {
                    if is_damage(&error) {
                        self.found.push(self.damage_at(address, &error));
                    }
                    let at = (run.first_block + n) * self.block_size;
                    let what = || format!("the disk {} cannot be read at {at}", self.name);
                    return Err(error).context(what);
                }
                let start = (run.first_block + n) * self.block_size;
                let (from, to) = (start.max(offset), (start + self.block_size).min(end));
                let source = (from - start) as usize..(to - start) as usize;
                let target = (from - offset) as usize..(to - offset) as usize;
                buffer[target].copy_from_slice(&self.block[source]);
            }
        }
    }

    /// What is lost with a block: its frame, or what cannot be looked up.
    fn damage_at(&self, address: Address, error: &Error) -> Found {
        let how = error.to_string();
        match self.directories.frame_of(address) {
            Ok(Some(frame)) if !self.directories.damage().has(address) => {
                let slots = (frame.first.0, frame.span);
                Found { container: address.container, slots, how }
            }
            _ => Found::around(&self.directories, address, &how),
        }
    }

    /// Takes the damage that was met since the last time.
    pub fn take_found(&mut self) -> Vec<Found> {
        std::mem::take(&mut self.found)
    }

    /// What is zero and what is not, from `offset` on; adjacent ranges of a kind are one, and
    /// after 4096 of them the answer ends early.
    ///
    /// # Errors
    /// [`crate::error::Kind::Damaged`] when the recipe is.
    pub fn extents(&self, offset: u64, length: u64) -> Result<Vec<ImageExtent>> {
        let end = offset.saturating_add(length).min(self.size);
        let mut extents: Vec<ImageExtent> = Vec::new();
        if offset >= end {
            return Ok(extents);
        }
        let mut runs = self.recipe.runs(offset / self.block_size..end.div_ceil(self.block_size));
        while let Some(run) = runs.next()? {
            let zero = run.placement == Placement::Zero;
            let from = (run.first_block * self.block_size).max(offset);
            let to = ((run.first_block + run.count) * self.block_size).min(end);
            let full = extents.len() == MAX_EXTENTS;
            match extents.last_mut() {
                Some(last) if last.zero == zero => last.length += to - from,
                _ if full => break,
                _ => extents.push(ImageExtent { offset: from, length: to - from, zero }),
            }
        }
        Ok(extents)
    }
}
