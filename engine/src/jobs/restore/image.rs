//! A disk read at random, for serving it.

use super::Restorer;
use crate::error::{Context, Result};
use crate::store::container::Directories;
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
        let mut runs = self.recipe.runs(blocks);
        while let Some(run) =
            runs.next().context(|| format!("cannot read the disk {}", self.name))?
        {
            for n in 0..run.count {
                let Placement::At(address) = run.placement.skip(n) else { break };
                self.directories.read_block(address, &mut self.block).context(|| {
                    let at = (run.first_block + n) * self.block_size;
                    format!("the disk {} cannot be read at {at}", self.name)
                })?;
                let start = (run.first_block + n) * self.block_size;
                let (from, to) = (start.max(offset), (start + self.block_size).min(end));
                let source = (from - start) as usize..(to - start) as usize;
                let target = (from - offset) as usize..(to - offset) as usize;
                buffer[target].copy_from_slice(&self.block[source]);
            }
        }
        Ok(())
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
