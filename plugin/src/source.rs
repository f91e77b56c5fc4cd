//! Where a backup reads a disk from, and the scan over it: maps in, work out.

use std::fs::File;
use std::future::Future;

use crate::error::{Error, Kind};
use crate::extents::{BadMap, Extent, Flags, PlanInput, Planner, Step, Wanted, Work};
use crate::nbd::wire::{self, BASE_ALLOCATION};
use crate::nbd::{Buffer, ConnectOptions, Export, NbdError, NbdErrorKind, NbdTarget};

/// Bytes of one read: larger ones are no faster and cost QEMU's memory.
pub const READ_SIZE: u32 = 256 << 10;
/// The allocation is looked up this far beyond what is needed: dirty blocks come in groups,
/// and each look-up is a round trip.
const ALLOCATION_AHEAD: u64 = 16 << 20;
/// The allocation is looked up no further than this at once: a running QEMU works it out cluster by
/// cluster, in the thread that serves the guest.
const ALLOCATION_MOST: u64 = 1 << 30;
/// What is dirty, no longer than this and alone in what a look-up tells of is read without one: that
/// could only save reading zeros, and scattered blocks would cost a round trip each.
const NOT_LOOKED_UP: u64 = READ_SIZE as u64;

/// A disk that does not change while it is read.
///
/// Futures may be dropped at any time; several reads may be under way.
pub trait DiskSource {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Reads `length` bytes, at most [`crate::nbd::MAX_READ`], within the disk.
    fn read(&self, offset: u64, length: u32) -> impl Future<Output = Result<Buffer, NbdError>>;

    /// Bytes that may be read though nobody wants them, where that joins two reads; none where
    /// what is not wanted may not be read.
    fn gap(&self) -> u64 {
        0
    }

    /// What whoever is on this host can read the disk's bytes from, at their offsets.
    fn file(&self) -> Option<&File> {
        None
    }

    /// What is allocated, from `wanted.from` on: extents without gaps, at least one; flags as
    /// in `base:allocation`.
    fn allocation(&self, wanted: Wanted) -> impl Future<Output = Result<Vec<Extent>, NbdError>>;

    /// What is dirty, from `wanted.from` on; all of it where there is no bitmap.
    fn dirty(&self, wanted: Wanted) -> impl Future<Output = Result<Vec<Extent>, NbdError>>;
}

/// A disk behind an NBD export: a view of a live VM, or a shut-off image.
#[derive(Clone, Debug)]
pub struct NbdDisk {
    export: Export,
    /// Contexts to ask; without one of allocation everything counts as data.
    allocation: Option<String>,
    dirty: Option<String>,
}

impl NbdDisk {
    /// Connects with the contexts that are needed: `bitmap` by its name in QEMU,
    /// `allocation` unless the export cannot tell (a filter that copies a bitmap only).
    /// `options.contexts` is overwritten.
    pub async fn connect(
        target: &NbdTarget,
        mut options: ConnectOptions,
        bitmap: Option<&str>,
        allocation: bool,
    ) -> Result<Self, NbdError> {
        let allocation = allocation.then(|| BASE_ALLOCATION.to_owned());
        let dirty = bitmap.map(wire::dirty_bitmap);
        options.contexts = dirty.iter().chain(&allocation).cloned().collect();
        let export = Export::connect(target, &options).await?;
        Ok(NbdDisk { export, allocation, dirty })
    }

    /// The export.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }

    async fn ask(
        &self,
        context: Option<&str>,
        wanted: Wanted,
        otherwise: Flags,
    ) -> Result<Vec<Extent>, NbdError> {
        let length = wanted.until.saturating_sub(wanted.from);
        match context {
            Some(context) => self.export.block_status(context, wanted.from, length).await,
            None => Ok(vec![Extent { offset: wanted.from, length, flags: otherwise }]),
        }
    }
}

impl DiskSource for NbdDisk {
    fn size(&self) -> u64 {
        self.export.size()
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Buffer, NbdError> {
        self.export.read(offset, length).await
    }

    async fn allocation(&self, wanted: Wanted) -> Result<Vec<Extent>, NbdError> {
        self.ask(self.allocation.as_deref(), wanted, Flags(0)).await
    }

    async fn dirty(&self, wanted: Wanted) -> Result<Vec<Extent>, NbdError> {
        self.ask(self.dirty.as_deref(), wanted, Flags(wire::STATE_DIRTY)).await
    }
}

/// Goes over a disk: work items in ascending order.
#[derive(Debug)]
pub struct Scan<'a, S> {
    source: &'a S,
    planner: Planner,
    size: u64,
}

impl<'a, S: DiskSource> Scan<'a, S> {
    /// A scan as planned; `input.size` must be the source's.
    pub fn new(source: &'a S, input: PlanInput) -> Result<Self, Error> {
        if input.size != source.size() {
            let message = format!("the disk has {} bytes, the plan {}", source.size(), input.size);
            return Err(Error::new(Kind::Failed, message));
        }
        Ok(Scan { source, size: input.size, planner: Planner::new(input) })
    }

    /// The next item, or `None` at the end. Errors of the source come as they are
    /// (see [`NbdError::is_view_broken`]).
    pub async fn next(&mut self) -> Result<Option<Work>, NbdError> {
        loop {
            match self.planner.step() {
                Step::Work(work) => return Ok(Some(work)),
                Step::Done => return Ok(None),
                Step::NeedDirty(wanted) => {
                    let map = self.source.dirty(wanted).await?;
                    self.planner.feed_dirty(map).map_err(bad_map)?;
                }
                Step::NeedAllocation(Wanted { from, until })
                    if until - from <= NOT_LOOKED_UP
                        && self.planner.is_clean_until(from.saturating_add(ALLOCATION_AHEAD)) =>
                {
                    let data = Extent { offset: from, length: until - from, flags: Flags(0) };
                    self.planner.feed_allocation([data]).map_err(bad_map)?;
                }
                Step::NeedAllocation(Wanted { from, until }) => {
                    let ahead = from.saturating_add(ALLOCATION_AHEAD);
                    let most = from.saturating_add(ALLOCATION_MOST).min(self.size);
                    let wanted = Wanted { from, until: until.max(ahead).min(most) };
                    let map = self.source.allocation(wanted).await?;
                    self.planner.feed_allocation(map).map_err(bad_map)?;
                }
            }
        }
    }
}

fn bad_map(cause: BadMap) -> NbdError {
    NbdError::new(NbdErrorKind::Protocol, "disk map", cause)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::cell::RefCell;
    use std::ops::Range;

    use super::*;
    use crate::extents::Action;

    const MIB: u64 = 1 << 20;

    /// A disk that is one hole from its middle on, and keeps what it was asked.
    struct Asked {
        dirty: Vec<Range<u64>>,
        looked_up: RefCell<Vec<u64>>,
    }

    const SIZE: u64 = 256 * MIB;

    impl DiskSource for Asked {
        fn size(&self) -> u64 {
            SIZE
        }

        async fn read(&self, _: u64, _: u32) -> Result<Buffer, NbdError> {
            unreachable!("a scan only says what to read")
        }

        async fn allocation(&self, wanted: Wanted) -> Result<Vec<Extent>, NbdError> {
            self.looked_up.borrow_mut().push(wanted.from);
            let hole = Flags(wire::STATE_HOLE | wire::STATE_ZERO);
            let (flags, end) =
                if wanted.from < SIZE / 2 { (Flags(0), SIZE / 2) } else { (hole, SIZE) };
            Ok(vec![Extent { offset: wanted.from, length: end - wanted.from, flags }])
        }

        async fn dirty(&self, wanted: Wanted) -> Result<Vec<Extent>, NbdError> {
            let mut extents = Vec::new();
            let mut at = wanted.from;
            for range in self.dirty.iter().filter(|range| range.end > wanted.from) {
                let clean = range.start.saturating_sub(at);
                if clean > 0 {
                    extents.push(Extent { offset: at, length: clean, flags: Flags(0) });
                }
                let from = at.max(range.start);
                let flags = Flags(wire::STATE_DIRTY);
                extents.push(Extent { offset: from, length: range.end - from, flags });
                at = range.end;
            }
            extents.push(Extent { offset: at, length: SIZE - at, flags: Flags(0) });
            extents.retain(|extent| extent.length > 0);
            Ok(extents)
        }
    }

    /// Stretches by offset and length.
    async fn scanned(dirty: &[(u64, u64)], forced: &[(u64, u64)]) -> (Vec<Work>, Vec<u64>) {
        let ranges = |of: &[(u64, u64)]| of.iter().map(|(at, length)| *at..at + length).collect();
        let (dirty, forced) = (ranges(dirty), ranges(forced));
        let disk = Asked { dirty, looked_up: RefCell::default() };
        let input = PlanInput { size: SIZE, block_size: 4096, dirty_until: Some(SIZE), forced };
        let mut scan = Scan::new(&disk, input).unwrap();
        let mut items = Vec::new();
        while let Some(item) = scan.next().await.unwrap() {
            items.push(item);
        }
        (items, disk.looked_up.into_inner())
    }

    #[tokio::test]
    async fn what_is_dirty_and_alone_is_read_without_a_look_up() {
        // Both halves: also where a look-up would have told of a hole.
        let dirty: Vec<_> = (0..8).map(|n| (n * 32 * MIB, 4096)).collect();
        let (items, looked_up) = scanned(&dirty, &[]).await;
        assert_eq!((items.len(), looked_up), (8, vec![]));
        assert!(items.iter().all(|item| item.action == Action::Read));
    }

    #[tokio::test]
    async fn what_has_neighbours_or_is_long_is_looked_up() {
        let hole = SIZE / 2;
        let near = [(hole, 4096), (hole + MIB, 4096)];
        let (items, looked_up) = scanned(&near, &[]).await;
        assert_eq!(looked_up, [hole]);
        assert!(items.iter().all(|item| item.action == Action::Zero), "{items:?}");
        let (_, looked_up) = scanned(&[(hole, 2 * MIB)], &[]).await;
        assert_eq!(looked_up, [hole]);
    }

    #[tokio::test]
    async fn a_forced_range_counts_as_a_neighbour() {
        let (_, looked_up) = scanned(&[(0, 4096)], &[(MIB, 4096)]).await;
        assert_eq!(looked_up, [0]);
        let (_, looked_up) = scanned(&[(0, 4096)], &[(64 * MIB, 4096)]).await;
        assert!(looked_up.is_empty());
    }
}
