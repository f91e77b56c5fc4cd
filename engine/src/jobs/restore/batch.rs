//! Fetching: takes pieces until their frames fill a batch, reads and decodes the frames.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::pieces::{Piece, Pieces};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, Slot};
use crate::pool::Pool;
use crate::store::container::{Directories, FrameRef, SlotInfo};
use crate::store::damage::{DamageMap, Found};
use crate::store::recipe::{Lost, NodeSource};

/// Decompressed bytes of a batch: one is written while the next one is fetched, so twice
/// this and the fetched bytes of one stay within the pass's share, which restore borrows.
const BATCH_BYTES: usize = 2560 << 10;
/// Pieces of a batch, some 100 bytes each with what may be lost of them: a frame that the whole disk refers to fills several batches.
const BATCH_PIECES: usize = 8192;
/// Frames that a thread of the pool decodes before it is given more: waking it for each took 7 % of a
/// restore (measured).
const FRAMES_PER_JOB: usize = 4;
/// Containers that are read at the same time when a batch is scattered over many.
const READERS: usize = 16;

/// A decoded frame.
#[derive(Clone)]
pub(super) struct Frame {
    pub(super) at: FrameRef,
    /// Its bytes, or why there are none.
    pub(super) bytes: std::result::Result<Arc<Vec<u8>>, Arc<Error>>,
}

/// A piece and where its bytes are.
pub(super) struct Placed {
    pub(super) first_block: u64,
    pub(super) count: u16,
    pub(super) source: Source,
}

pub(super) enum Source {
    /// Consecutive blocks of a frame of the batch, from this byte on.
    Frame { frame: usize, from: usize },
    /// Nowhere.
    Lost { found: Found, error: Error },
}

/// What can be written without waiting.
pub(super) struct Batch {
    pub(super) frames: Vec<Frame>,
    pub(super) pieces: Vec<Placed>,
    /// Unreadable nodes of the recipe.
    pub(super) lost: Vec<Lost>,
}

/// Makes batches of pieces.
pub(super) struct Fetcher<'r, S: NodeSource> {
    pub(super) pieces: Pieces<'r, S>,
    pub(super) directories: Directories,
    pub(super) damage: Arc<DamageMap>,
    pub(super) pool: Pool,
    pub(super) block_size: u32,
    /// What did not fit into the last batch.
    pub(super) rest: Option<Piece>,
    /// Frames of batches before, the newest first, up to `keep` bytes.
    pub(super) recent: VecDeque<Frame>,
    pub(super) keep: usize,
}

impl<S: NodeSource> Fetcher<'_, S> {
    /// The next batch; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Batch>> {
        let mut wanted: Vec<FrameRef> = Vec::new();
        let mut placed = Vec::new();
        let mut bytes = 0;
        while placed.len() < BATCH_PIECES {
            let next = match self.rest.take() {
                Some(rest) => Some(rest),
                None => self.pieces.next()?,
            };
            let Some(piece) = next else { break };
            let (source, count) = match self.locate(piece.at, piece.count) {
                Err(error) if is_damage(&error) => {
                    let found = Found::around(&self.directories, piece.at, &error.to_string());
                    (Source::Lost { found, error }, 1)
                }
                Err(error) => return Err(error),
                Ok((frame, from, count)) => {
                    // The frames of a piece are among the last ones wanted, if anywhere.
                    let known = wanted.iter().rposition(|other| same(other, &frame));
                    if known.is_none() && bytes + frame.raw_len as usize > BATCH_BYTES && bytes > 0
                    {
                        self.rest = Some(piece);
                        break;
                    }
                    let index = known.unwrap_or_else(|| {
                        bytes += frame.raw_len as usize;
                        wanted.push(frame);
                        wanted.len() - 1
                    });
                    (Source::Frame { frame: index, from }, count)
                }
            };
            placed.push(Placed { first_block: piece.first_block, count, source });
            self.rest = remainder(&piece, count);
        }
        let lost = self.pieces.take_lost();
        if placed.is_empty() && lost.is_empty() {
            return Ok(None);
        }
        let frames = self.load(wanted)?;
        Ok(Some(Batch { frames, pieces: placed, lost }))
    }

    /// The frame of a slot, the byte of its block there, and how many of `count` blocks follow it.
    fn locate(&self, at: Address, count: u16) -> Result<(FrameRef, usize, u16)> {
        if self.damage.has(at) {
            return Err(gone(at, "was found damaged before"));
        }
        let Some((frame, slot)) = self.frame_of(at)? else {
            return Err(gone(at, "is not in its container"));
        };
        let start = frame.block_range(slot, self.block_size);
        let from = start.ok_or_else(|| gone(at, "is not in its frame"))?.start;
        let follows = |n: u16| {
            let next = slot.0.checked_add(n).map(Slot)?;
            let address = at.plus(n)?;
            let expected = from + usize::from(n) * self.block_size as usize;
            let range = frame.block_range(next, self.block_size)?;
            (range.start == expected && !self.damage.has(address)).then_some(())
        };
        // Behind a forward only the one block is known to be there.
        let most = if slot == at.slot && frame.container == at.container { count } else { 1 };
        let count = (1..most).find(|n| follows(*n).is_none()).unwrap_or(most);
        Ok((frame, from, count))
    }

    fn frame_of(&self, at: Address) -> Result<Option<(FrameRef, Slot)>> {
        if let Some(frame) = self.directories.frame_of(at)? {
            return Ok(Some((frame, at.slot)));
        }
        match self.directories.slot(at)? {
            SlotInfo::Forward(there) => {
                Ok(self.directories.frame_of(there)?.map(|frame| (frame, there.slot)))
            }
            _ => Ok(None),
        }
    }

    /// Fetches and decodes frames, or takes those of the batches before.
    fn load(&mut self, wanted: Vec<FrameRef>) -> Result<Vec<Frame>> {
        let mut frames: Vec<Option<Frame>> = wanted
            .iter()
            .map(|frame| self.recent.iter().find(|recent| same(&recent.at, frame)).cloned())
            .collect();
        let missing: Vec<FrameRef> =
            wanted.iter().zip(&frames).filter(|(_, f)| f.is_none()).map(|(w, _)| *w).collect();
        let mut fetched = missing.iter().copied().zip(fetch(&self.directories, &missing)?);
        let mut jobs = Vec::with_capacity(missing.len().div_ceil(FRAMES_PER_JOB));
        while fetched.len() > 0 {
            let job: Vec<_> = fetched.by_ref().take(FRAMES_PER_JOB).collect();
            let directories = self.directories.clone();
            let decode = move |(frame, stored): (FrameRef, Result<Bytes>)| {
                stored.and_then(|stored| directories.decode_frame(&frame, &stored))
            };
            jobs.push(self.pool.run(move || job.into_iter().map(decode).collect::<Vec<_>>()));
        }
        let mut decoded = Vec::with_capacity(missing.len());
        for job in jobs {
            decoded.extend(job.wait()?);
        }
        let mut decoded = decoded.into_iter();
        for (slot, at) in frames.iter_mut().zip(wanted).filter(|(slot, _)| slot.is_none()) {
            let Some(result) = decoded.next() else { break };
            let bytes = match result {
                Ok(bytes) => Ok(Arc::new(bytes)),
                Err(error) if is_damage(&error) => Err(Arc::new(error)),
                Err(error) => return Err(error),
            };
            *slot = Some(Frame { at, bytes });
        }
        let frames: Vec<Frame> = frames.into_iter().flatten().collect();
        self.remember(&frames);
        Ok(frames)
    }

    fn remember(&mut self, frames: &[Frame]) {
        for frame in frames {
            self.recent.retain(|recent| !same(&recent.at, &frame.at));
            self.recent.push_front(frame.clone());
        }
        let mut bytes = 0;
        let fits = |frame: &Frame| {
            bytes += frame.at.raw_len as usize;
            bytes <= self.keep
        };
        let kept = self.recent.iter().map(fits).take_while(|fits| *fits).count();
        self.recent.truncate(kept);
    }
}

fn same(a: &FrameRef, b: &FrameRef) -> bool {
    (a.container, a.generation, a.number) == (b.container, b.generation, b.number)
}

/// What is left of a piece after `count` blocks.
fn remainder(piece: &Piece, count: u16) -> Option<Piece> {
    let left = piece.count.checked_sub(count).filter(|left| *left > 0)?;
    let first_block = piece.first_block + u64::from(count);
    Some(Piece { at: piece.at.plus(count)?, count: left, first_block })
}

/// Whether an error says that the data is gone, and not that reading failed for now.
pub(in crate::jobs) fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), Kind::Damaged | Kind::NotFound)
}

fn gone(at: Address, what: &str) -> Error {
    Error::new(Kind::Damaged, format!("the block at {at} {what}"))
}

/// Reads frames; those of one container together, several containers at the same time.
fn fetch(directories: &Directories, frames: &[FrameRef]) -> Result<Vec<Result<Bytes>>> {
    let together = |frame: &FrameRef| (frame.container, frame.generation);
    let groups: Vec<&[FrameRef]> =
        frames.chunk_by(|a, b| together(a) == together(b) && a.number < b.number).collect();
    if groups.len() <= 1 {
        return Ok(fetch_group(directories, frames));
    }
    let share = groups.len().div_ceil(READERS);
    std::thread::scope(|scope| {
        let readers: Vec<_> = groups
            .chunks(share)
            .map(|groups| {
                scope.spawn(move || -> Vec<Result<Bytes>> {
                    groups.iter().flat_map(|group| fetch_group(directories, group)).collect()
                })
            })
            .collect();
        let mut fetched = Vec::with_capacity(frames.len());
        for reader in readers {
            let part = reader
                .join()
                .map_err(|_| Error::new(Kind::Failed, "a reader of a restore panicked (a bug)"))?;
            fetched.extend(part);
        }
        Ok(fetched)
    })
}

/// Reads frames of one container; one by one if they cannot be read together.
pub(in crate::jobs) fn fetch_group(
    directories: &Directories,
    frames: &[FrameRef],
) -> Vec<Result<Bytes>> {
    match directories.fetch_frames(frames) {
        Ok(fetched) => fetched.into_iter().map(Ok).collect(),
        Err(_) => frames.iter().map(|frame| directories.fetch_frame(frame)).collect(),
    }
}
