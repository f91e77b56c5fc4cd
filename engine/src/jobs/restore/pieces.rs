//! What to fetch, in which order: pieces of runs, by container or by disk.

use std::path::Path;

use crate::error::Result;
use crate::ids::{Address, ContainerId, Incarnation, Slot};
use crate::sort::{Sorted, Sorter};
use crate::store::recipe::{Lost, NodeSource, Placement, RecipeReader, Run, Runs};

/// Memory of the sort by container: it ends before the first frame is fetched, so that it
/// takes nothing from what is in flight then.
const SORT_BYTES: usize = 4 << 20;
/// A record: container 8, slot 2, blocks 2, first block 8, all big endian.
const RECORD: usize = 20;

/// Blocks of a disk that stand in consecutive slots of one cell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) at: Address,
    pub(super) count: u16,
    pub(super) first_block: u64,
}

/// Cuts a run at multiples of `cell` slots. All that refers to one cell then sorts
/// together, so a frame, which is about a cell long, is needed once.
pub(super) fn cut(run: &Run, cell: u16, mut each: impl FnMut(Piece) -> Result<()>) -> Result<()> {
    let Placement::At(mut at) = run.placement else { return Ok(()) };
    let (mut first_block, mut left) = (run.first_block, run.count);
    while left > 0 {
        let count = left.min(u64::from(cell - at.slot.0 % cell)) as u16;
        each(Piece { at, count, first_block })?;
        first_block += u64::from(count);
        left -= u64::from(count);
        at = Address { slot: Slot(at.slot.0.wrapping_add(count)), ..at };
    }
    Ok(())
}

impl Piece {
    fn to_record(self) -> [u8; RECORD] {
        let mut record = [0; RECORD];
        record[..4].copy_from_slice(&self.at.container.incarnation.0.to_be_bytes());
        record[4..8].copy_from_slice(&self.at.container.counter.to_be_bytes());
        record[8..10].copy_from_slice(&self.at.slot.0.to_be_bytes());
        record[10..12].copy_from_slice(&self.count.to_be_bytes());
        record[12..].copy_from_slice(&self.first_block.to_be_bytes());
        record
    }

    fn from_record(record: &[u8; RECORD]) -> Self {
        let [a, b, c, d, e, f, g, h, s, t, m, n, block @ ..] = *record;
        let container = ContainerId {
            incarnation: Incarnation(u32::from_be_bytes([a, b, c, d])),
            counter: u32::from_be_bytes([e, f, g, h]),
        };
        Piece {
            at: Address { container, slot: Slot(u16::from_be_bytes([s, t])) },
            count: u16::from_be_bytes([m, n]),
            first_block: u64::from_be_bytes(block),
        }
    }
}

/// The pieces of a disk in one of the two orders.
pub(super) enum Pieces<'r, S: NodeSource> {
    /// By container and slot.
    ByContainer(Sorted<RECORD>),
    /// By place on the disk; `waiting` are the pieces of the run read last, in reverse.
    ByDisk { runs: Runs<'r, S>, cell: u16, waiting: Vec<Piece> },
}

impl<'r, S: NodeSource> Pieces<'r, S> {
    /// Sorts all pieces of a disk; what is below unreadable nodes is put into `lost`.
    pub(super) fn by_container(
        recipe: &'r RecipeReader<S>,
        cell: u16,
        scratch: &Path,
        lost: &mut Vec<Lost>,
    ) -> Result<Self> {
        let mut sorter = Sorter::new(scratch, SORT_BYTES);
        let mut runs = recipe.all_runs().tolerant();
        while let Some(run) = runs.next()? {
            cut(&run, cell, |piece| sorter.push(&piece.to_record()))?;
        }
        *lost = runs.take_lost();
        Ok(Pieces::ByContainer(sorter.finish()?))
    }

    pub(super) fn by_disk(recipe: &'r RecipeReader<S>, cell: u16) -> Self {
        let runs = recipe.all_runs().tolerant();
        Pieces::ByDisk { runs, cell, waiting: Vec::new() }
    }

    pub(super) fn next(&mut self) -> Result<Option<Piece>> {
        match self {
            Pieces::ByContainer(sorted) => {
                Ok(sorted.next()?.map(|record| Piece::from_record(&record)))
            }
            Pieces::ByDisk { runs, cell, waiting } => {
                while waiting.is_empty() {
                    let Some(run) = runs.next()? else { return Ok(None) };
                    // At most as many as there are cells in a container.
                    cut(&run, *cell, |piece| {
                        waiting.push(piece);
                        Ok(())
                    })?;
                    waiting.reverse();
                }
                Ok(waiting.pop())
            }
        }
    }

    /// Unreadable nodes met while pieces were read.
    pub(super) fn take_lost(&mut self) -> Vec<Lost> {
        match self {
            Pieces::ByContainer(_) => Vec::new(),
            Pieces::ByDisk { runs, .. } => runs.take_lost(),
        }
    }
}
