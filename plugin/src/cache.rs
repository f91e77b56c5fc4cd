//! Blocks that were read and may have to be written: so a small backup reads once.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::engine::DiskIndex;

/// What an entry costs besides its data.
const OVERHEAD: usize = 96;

/// A place of a backup: a block of one of its disks. Ordered as they are scanned.
pub type Position = (DiskIndex, u64);

/// Runs of blocks, up to a number of bytes; the first that come stay.
#[derive(Debug)]
pub struct Cache {
    runs: BTreeMap<Position, Bytes>,
    room: usize,
    block_size: usize,
}

impl Cache {
    /// A cache of `room` bytes.
    #[must_use]
    pub fn new(room: usize, block_size: u32) -> Cache {
        Cache { runs: BTreeMap::new(), room, block_size: block_size as usize }
    }

    /// Keeps a copy of a run of whole blocks if there is room.
    pub fn offer(&mut self, at: Position, data: &[u8]) {
        let cost = data.len() + OVERHEAD;
        if cost <= self.room {
            self.room -= cost;
            self.runs.insert(at, Bytes::copy_from_slice(data));
        }
    }

    /// The kept blocks from `at` on, at most `blocks` of them; none if that one is not kept.
    #[must_use]
    pub fn get(&self, at: Position, blocks: u64) -> Option<Bytes> {
        let (&(disk, first), run) = self.runs.range(..=at).next_back()?;
        let skip = usize::try_from(at.1.checked_sub(first)?).ok()?.checked_mul(self.block_size)?;
        if disk != at.0 || skip >= run.len() {
            return None;
        }
        let wanted = usize::try_from(blocks).ok()?.saturating_mul(self.block_size);
        Some(run.slice(skip..run.len().min(skip.saturating_add(wanted))))
    }

    /// Blocks from `at` on that are not kept, at most `blocks`.
    #[must_use]
    pub fn gap(&self, at: Position, blocks: u64) -> u64 {
        match self.runs.range(at..).next() {
            Some((&(disk, first), _)) if disk == at.0 => blocks.min(first - at.1),
            _ => blocks,
        }
    }

    /// Drops everything before a position: writing has passed it.
    pub fn drop_before(&mut self, at: Position) {
        while let Some(entry) = self.runs.first_entry() {
            let (disk, first) = *entry.key();
            let end = first + entry.get().len().div_ceil(self.block_size) as u64;
            if (disk, end) > at {
                return;
            }
            self.room += entry.remove().len() + OVERHEAD;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D0: DiskIndex = DiskIndex(0);
    const D1: DiskIndex = DiskIndex(1);

    #[test]
    fn keeps_what_fits_and_finds_it() {
        let mut cache = Cache::new(4 * 4096 + 2 * OVERHEAD, 4096);
        let run: Vec<u8> = (0..3 * 4096).map(|i| (i / 4096) as u8).collect();
        cache.offer((D0, 10), &run);
        cache.offer((D1, 0), &[7; 4096]);
        cache.offer((D1, 1), &[8; 4096]);
        assert_eq!(cache.get((D0, 11), 9).as_deref(), Some(&run[4096..]));
        assert_eq!(cache.get((D0, 10), 1).as_deref(), Some(&run[..4096]));
        assert_eq!(cache.get((D0, 13), 1), None);
        assert_eq!(cache.get((D0, 9), 1), None);
        assert_eq!(cache.get((D1, 0), 4).map(|data| data.len()), Some(4096));
        assert_eq!(cache.get((D1, 1), 1), None, "there was no room");
        assert_eq!(cache.gap((D0, 7), 100), 3);
        assert_eq!(cache.gap((D0, 13), 100), 100);
    }

    #[test]
    fn makes_room_behind_the_writing() {
        let mut cache = Cache::new(3 * (4096 + OVERHEAD), 4096);
        for block in 0..3 {
            cache.offer((D0, block), &[1; 4096]);
        }
        cache.drop_before((D0, 2));
        assert_eq!(cache.get((D0, 1), 1), None);
        assert!(cache.get((D0, 2), 1).is_some());
        cache.drop_before((D1, 0));
        assert_eq!(cache.get((D0, 2), 1), None);
        assert_eq!(cache.room, 3 * (4096 + OVERHEAD));
    }
}
