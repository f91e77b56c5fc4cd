//! Where a backup reads a disk from, and the scan over it: maps in, work out.

use std::future::Future;

use crate::error::{Error, Kind};
use crate::extents::{BadMap, Extent, Flags, PlanInput, Planner, Step, Wanted, Work};
use crate::nbd::wire::{self, BASE_ALLOCATION};
use crate::nbd::{Buffer, ConnectOptions, Export, NbdError, NbdErrorKind, NbdTarget};
use crate::scan::READ_SIZE;

/// The allocation is looked up this far beyond what is needed: dirty blocks come in groups,
/// and each look-up is a round trip.
const ALLOCATION_AHEAD: u64 = 16 << 20;
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
                    let wanted = Wanted { from, until: until.max(ahead).min(self.size) };
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
