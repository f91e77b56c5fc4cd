//! Restore: everything of a disk that is not zero, as fast as the store gives it.
//!
//! The plan goes by container: all runs of the disk are sorted by address, so every frame
//! is fetched once and neighbours are read together; what comes out is out of disk order.
//! One batch of frames is fetched and decoded while the one before is written.

mod batch;
mod image;
mod pieces;
mod target;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::bounded;

pub use self::image::{DiskImage, ImageExtent};
pub use self::target::{IntoFile, Messages, Scattered, Target};

use self::batch::{Batch, Fetcher, Source};
pub(super) use self::batch::{fetch_group, is_damage};
use self::pieces::Pieces;
use self::target::TELL;
use crate::error::{Context, Error, Kind, Result};
use crate::pool::Pool;
use crate::store::Store;
use crate::store::container::{Directories, FRAME_BYTES};
use crate::store::damage::{DamageMap, Found};
use crate::store::manifest::{Disk, Manifest};
use crate::store::recipe::{Lost, NodeSource, RecipeReader};

/// The most bytes that are handed out together: what one message of the protocol carries.
pub const MAX_WRITE: usize = 512 << 10;
/// Frames kept from batches before, in bytes, when pieces come by container: a piece may
/// end in the frame where the next begins.
const KEEP_BY_CONTAINER: usize = 256 << 10;
/// The same in disk order, where a frame is often needed again soon.
const KEEP_BY_DISK: usize = 2560 << 10;
/// Stack of the fetching thread.
const STACK: usize = 512 << 10;

/// How a disk is handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// In disk order, for targets that cannot seek; slower.
    pub ordered: bool,
    /// Leaves damaged blocks out and lists them, instead of failing at the first.
    pub damaged_zero: bool,
}

/// What a restore needs of the store. A cheap handle.
#[derive(Clone)]
pub struct Restorer {
    /// Where frames come from.
    pub directories: Directories,
    /// Where they are decoded.
    pub pool: Pool,
    /// Slots that are known to be damaged, whatever their bytes look like.
    pub damage: Arc<DamageMap>,
    /// For the sort by container.
    pub scratch: PathBuf,
    /// The store's.
    pub block_size: u32,
}

/// What became of a restore.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Bytes handed out; the rest is zeros.
    pub written: u64,
    /// Ranges (offset, length) that are damaged, ascending; empty unless they are tolerated.
    pub holes: Vec<(u64, u64)>,
}

impl Restorer {
    /// Over a store, with the damage that it records now; `scratch` is for the sort.
    ///
    /// # Errors
    /// When the damage marks cannot be read.
    pub fn new(store: &Store, scratch: &Path) -> Result<Self> {
        Ok(Restorer {
            directories: store.directories().clone(),
            pool: store.pool().clone(),
            damage: Arc::new(DamageMap::load(store.objects(), store.sealer())?),
            scratch: scratch.into(),
            block_size: store.block_size(),
        })
    }

    /// Whether a snapshot touches damage that is known; reads nothing while there is none.
    ///
    /// # Errors
    /// When its recipes cannot be read for another reason than damage.
    pub fn is_damaged(&self, manifest: &Manifest) -> Result<bool> {
        if self.damage.is_empty() {
            return Ok(false);
        }
        for disk in &manifest.disks {
            if !self.damage.forced_ranges(&self.recipe(disk)?)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Hands out everything of a disk that is not zero, each byte once; the disk's last block is
    /// cut at its size.
    ///
    /// Damage that it meets goes to `found`, for [`DamageMap::record`], also when it fails.
    ///
    /// # Errors
    /// [`Kind::Damaged`] at the first damaged block, unless these are tolerated; whatever
    /// `target` fails with.
    pub fn restore(
        &self,
        disk: &Disk,
        options: Options,
        target: &mut dyn Target,
        found: &mut Vec<Found>,
    ) -> Result<Outcome> {
        let mut writer = Writer::new(self, disk, options, target);
        let handed_out = self.hand_out(disk, options, &mut writer);
        found.append(&mut writer.found);
        handed_out?;
        writer.finish()
    }

    fn hand_out(&self, disk: &Disk, options: Options, writer: &mut Writer<'_>) -> Result<()> {
        let recipe = self.recipe(disk)?;
        if options.ordered {
            // The reader's cache is not shared between threads: the fetching one owns it.
            return self.pump(writer, KEEP_BY_DISK, move |fetch| {
                fetch(Pieces::by_disk(&recipe, self.cell()))
            });
        }
        let mut lost = Vec::new();
        let pieces = Pieces::by_container(&recipe, self.cell(), &self.scratch, &mut lost)?;
        // The writer fails at the first, unless they are tolerated; all are noted.
        writer.lose(&lost)?;
        let Pieces::ByContainer(sorted) = pieces else { return Ok(()) };
        self.pump(writer, KEEP_BY_CONTAINER, move |fetch| fetch(Pieces::ByContainer(sorted)))
    }

    /// Reads the recipe of a disk.
    fn recipe(&self, disk: &Disk) -> Result<RecipeReader<Directories>> {
        RecipeReader::new(self.directories.clone(), disk.root, disk.shape(self.block_size))
            .context(|| format!("cannot read the disk {}", disk.name))
    }

    /// Slots of a frame: the unit that pieces are cut to.
    fn cell(&self) -> u16 {
        (FRAME_BYTES / self.block_size as usize).max(1) as u16
    }

    /// Fetches in a thread of its own, writes in this one, a batch apart.
    fn pump(
        &self,
        writer: &mut Writer<'_>,
        keep: usize,
        with_pieces: impl FnOnce(&mut dyn FnMut(Pieces<'_, Directories>) -> Result<()>) -> Result<()>
        + Send,
    ) -> Result<()> {
        let (send, batches) = bounded::<Batch>(0);
        std::thread::scope(|scope| {
            let fetching = move || {
                with_pieces(&mut |pieces| {
                    let mut fetcher = self.fetcher(pieces, keep);
                    while let Some(batch) = fetcher.next()? {
                        if send.send(batch).is_err() {
                            break; // The writer failed, and says so.
                        }
                    }
                    Ok(())
                })
            };
            let thread = std::thread::Builder::new()
                .name("restore".into())
                .stack_size(STACK)
                .spawn_scoped(scope, fetching)
                .map_err(|error| Error::caused(Kind::Failed, "cannot start a thread", error))?;
            let written = batches.iter().try_for_each(|mut batch| writer.write(&mut batch));
            drop(batches);
            let fetched = thread
                .join()
                .unwrap_or_else(|_| Err(Error::new(Kind::Failed, "a restore panicked (a bug)")));
            written.and(fetched)
        })
    }

    fn fetcher<'r, S: NodeSource>(&self, pieces: Pieces<'r, S>, keep: usize) -> Fetcher<'r, S> {
        Fetcher {
            pieces,
            directories: self.directories.clone(),
            damage: self.damage.clone(),
            pool: self.pool.clone(),
            block_size: self.block_size,
            rest: None,
            recent: VecDeque::new(),
            keep,
        }
    }
}

/// Bytes that follow one another on the disk.
#[derive(Default)]
struct Neighbours<'b> {
    offset: u64,
    bytes: u64,
    parts: Vec<&'b [u8]>,
}

impl<'b> Neighbours<'b> {
    /// Whether bytes at `offset` follow, and it is not yet as much as a client is told of at once; its
    /// parts, of a block at least, are then fewer than a system call takes (1024).
    fn takes(&self, offset: u64) -> bool {
        self.bytes < TELL && self.offset + self.bytes == offset
    }

    fn push(&mut self, offset: u64, part: &'b [u8]) {
        if self.parts.is_empty() {
            self.offset = offset;
        }
        self.bytes += part.len() as u64;
        self.parts.push(part);
    }
}

/// Puts batches into the target, and keeps account of what is lost.
struct Writer<'t> {
    target: &'t mut dyn Target,
    name: String,
    size: u64,
    block_size: u64,
    damaged_zero: bool,
    outcome: Outcome,
    found: Vec<Found>,
}

impl<'t> Writer<'t> {
    fn new(restorer: &Restorer, disk: &Disk, options: Options, target: &'t mut dyn Target) -> Self {
        Writer {
            target,
            name: disk.name.clone(),
            size: disk.size,
            block_size: u64::from(restorer.block_size),
            damaged_zero: options.damaged_zero,
            outcome: Outcome::default(),
            found: Vec::new(),
        }
    }

    fn write(&mut self, batch: &mut Batch) -> Result<()> {
        self.lose(&batch.lost)?;
        // Neighbours on the disk come from several frames: they become one run of a message, or one
        // write to a file.
        batch.pieces.sort_unstable_by_key(|piece| piece.first_block);
        for frame in &batch.frames {
            if let Err(error) = &frame.bytes {
                self.note(Found {
                    container: frame.at.container,
                    slots: (frame.at.first.0, frame.at.span),
                    how: error.to_string(),
                });
            }
        }
        let mut run = Neighbours::default();
        for piece in &batch.pieces {
            let count = u64::from(piece.count);
            match &piece.source {
                Source::Lost { found, error } => {
                    self.note(found.clone());
                    self.hole(piece.first_block, count, error)?;
                }
                Source::Frame { frame, from } => match &batch.frames[*frame].bytes {
                    Err(error) => self.hole(piece.first_block, count, error)?,
                    Ok(bytes) => {
                        let offset = piece.first_block * self.block_size;
                        let length = (count * self.block_size) as usize;
                        let part = self.inside(offset, &bytes[*from..*from + length]);
                        if !run.takes(offset) {
                            self.put(&std::mem::take(&mut run))?;
                        }
                        run.push(offset, part);
                    }
                },
            }
        }
        self.put(&run)
    }

    /// What of bytes lies before the disk's end.
    fn inside<'b>(&self, offset: u64, bytes: &'b [u8]) -> &'b [u8] {
        let inside = self.size.saturating_sub(offset).min(bytes.len() as u64);
        &bytes[..inside as usize]
    }

    fn put(&mut self, run: &Neighbours<'_>) -> Result<()> {
        self.outcome.written += run.bytes;
        self.target.put(run.offset, &run.parts)
    }

    fn lose(&mut self, lost: &[Lost]) -> Result<()> {
        for lost in lost.iter().filter(|lost| is_damage(&lost.error)) {
            self.note(Found {
                container: lost.node.address.container,
                slots: (lost.node.address.slot.0, 1),
                how: lost.error.to_string(),
            });
        }
        lost.iter().try_for_each(|lost| self.hole(lost.first_block, lost.count, &lost.error))
    }

    fn note(&mut self, found: Found) {
        let known =
            |other: &Found| (other.container, other.slots) == (found.container, found.slots);
        if !self.found.iter().rev().take(64).any(known) {
            self.found.push(found);
        }
    }

    fn hole(&mut self, first_block: u64, count: u64, error: &Error) -> Result<()> {
        let offset = first_block * self.block_size;
        let length = (count * self.block_size).min(self.size.saturating_sub(offset));
        if !self.damaged_zero || !is_damage(error) {
            let kind = if is_damage(error) { Kind::Damaged } else { error.kind() };
            let what = format!("the disk {} cannot be read at {offset}: {error}", self.name);
            return Err(Error::new(kind, what));
        }
        match self.outcome.holes.last_mut() {
            Some(last) if last.0 + last.1 == offset => last.1 += length,
            _ => self.outcome.holes.push((offset, length)),
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Outcome> {
        self.target.finish()?;
        self.outcome.holes.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (offset, length) in std::mem::take(&mut self.outcome.holes) {
            match merged.last_mut() {
                Some(last) if last.0 + last.1 >= offset => {
                    last.1 = last.1.max(offset + length - last.0);
                }
                _ => merged.push((offset, length)),
            }
        }
        self.outcome.holes = merged;
        Ok(self.outcome)
    }
}
