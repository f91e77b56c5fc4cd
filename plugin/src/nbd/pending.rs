//! Requests that wait for their replies.

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::buffer::Buffer;
use super::error::{Asked, NbdError};
use super::wire;
use crate::extents::{Extent, Flags};

/// Extents kept of one context in one block status reply; the rest is asked for again. QEMU
/// sends up to 131,072; 32,768 are 768 KiB and one reply is looked at at a time.
pub(crate) const MAX_EXTENTS: usize = 32 * 1024;
/// Separate pieces of a read reply; beyond, the server plays games. 4096 sectors make 2 MiB.
const MAX_PIECES: usize = 4096;

type Waiter<T> = oneshot::Sender<Result<T, NbdError>>;

/// A request on its way, with everything that its reply needs.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) asked: Asked,
    pub(crate) failed: Option<NbdError>,
    pub(crate) want: Want,
    /// Its share of what may be in flight: given back when the reply is complete, even if
    /// nobody waits for it any more.
    pub(crate) _permit: Option<OwnedSemaphorePermit>,
}

/// What the reply brings.
#[derive(Debug)]
pub(crate) enum Want {
    /// Data, as far as it is covered by now.
    Data { buffer: Buffer, covered: Coverage, waiter: Waiter<Buffer> },
    /// One list of extents for each context of the connection.
    Status { maps: Vec<StatusMap>, waiter: Waiter<Vec<StatusMap>> },
    /// Only that it was done.
    Done { waiter: Waiter<()> },
}

impl Pending {
    /// Tells the waiter; the error is the reader's to end the connection with, if the server
    /// left something out.
    pub(crate) fn finish(self) -> Result<(), &'static str> {
        if let Some(error) = self.failed {
            self.want.fail(error);
            return Ok(());
        }
        // That nobody waits any more is fine: the future was dropped.
        match self.want {
            Want::Data { buffer, covered, waiter } => {
                if !covered.is_whole(self.asked.length) {
                    return Err("a read reply leaves a gap");
                }
                let _ = waiter.send(Ok(buffer));
            }
            Want::Status { maps, waiter } => {
                if maps.iter().any(|map| map.extents.is_empty()) {
                    return Err("a block status reply leaves a context out");
                }
                let _ = waiter.send(Ok(maps));
            }
            Want::Done { waiter } => {
                let _ = waiter.send(Ok(()));
            }
        }
        Ok(())
    }

    /// Tells the waiter that it failed.
    pub(crate) fn fail(self, error: NbdError) {
        self.want.fail(error);
    }
}

impl Want {
    fn fail(self, error: NbdError) {
        match self {
            Want::Data { waiter, .. } => drop(waiter.send(Err(error))),
            Want::Status { waiter, .. } => drop(waiter.send(Err(error))),
            Want::Done { waiter } => drop(waiter.send(Err(error))),
        }
    }
}

/// Which bytes of a read have come; chunks come in any order, none twice.
#[derive(Debug, Default)]
pub(crate) struct Coverage(Vec<(u32, u32)>);

impl Coverage {
    /// Takes up `start..end`.
    pub(crate) fn add(&mut self, start: u32, end: u32) -> Result<(), &'static str> {
        let at = self.0.partition_point(|piece| piece.1 <= start);
        if self.0.get(at).is_some_and(|piece| piece.0 < end) {
            return Err("a read reply covers bytes twice");
        }
        let joins_left = at > 0 && self.0[at - 1].1 == start;
        let joins_right = self.0.get(at).is_some_and(|piece| piece.0 == end);
        match (joins_left, joins_right) {
            (true, true) => {
                self.0[at - 1].1 = self.0[at].1;
                self.0.remove(at);
            }
            (true, false) => self.0[at - 1].1 = end,
            (false, true) => self.0[at].0 = start,
            (false, false) if self.0.len() >= MAX_PIECES => {
                return Err("a read reply in too many pieces");
            }
            (false, false) => self.0.insert(at, (start, end)),
        }
        Ok(())
    }

    fn is_whole(&self, length: u32) -> bool {
        length == 0 || self.0 == [(0, length)]
    }
}

/// Extents of one context, from the request's offset on; adjacent equal ones are merged.
#[derive(Debug)]
pub(crate) struct StatusMap {
    pub(crate) extents: Vec<Extent>,
    end: u64,
    limit: u64,
    full: bool,
}

impl StatusMap {
    /// A map of `asked`, still empty.
    pub(crate) fn new(asked: &Asked) -> Self {
        let limit = asked.offset + u64::from(asked.length);
        StatusMap { extents: Vec::new(), end: asked.offset, limit, full: false }
    }

    /// Takes a descriptor of the reply.
    pub(crate) fn add(&mut self, length: u32, flags: u32) -> Result<(), &'static str> {
        if length == 0 {
            return Err("an extent of no bytes");
        }
        if self.full || self.end >= self.limit {
            return Ok(()); // More than we asked for, which is allowed, or than we keep.
        }
        // The last extent may go beyond the request.
        let length = u64::from(length).min(self.limit - self.end);
        let kept = self.extents.len();
        match self.extents.last_mut() {
            Some(last) if last.flags == Flags(flags) => last.length += length,
            _ if kept >= MAX_EXTENTS => {
                self.full = true;
                return Ok(());
            }
            _ => self.extents.push(Extent { offset: self.end, length, flags: Flags(flags) }),
        }
        self.end += length;
        Ok(())
    }

    /// Whether a status chunk has come for this context before.
    pub(crate) fn has_begun(&self) -> bool {
        !self.extents.is_empty()
    }
}

/// The place of a chunk of `length` bytes at `offset` of the disk within what was asked.
pub(crate) fn within(asked: &Asked, offset: u64, length: u32) -> Result<u32, &'static str> {
    let start = offset.checked_sub(asked.offset).ok_or("a chunk lies before its request")?;
    let end = start.checked_add(u64::from(length)).ok_or("a chunk without end")?;
    if end > u64::from(asked.length) {
        return Err("a chunk lies past its request");
    }
    Ok(start as u32)
}

/// Bytes of a block status descriptor.
pub(crate) const DESCRIPTOR: usize = 8;
/// Longest block status payload: the protocol's 2^20 descriptors.
pub(crate) const MAX_STATUS: u32 = 4 + (1 << 20) * DESCRIPTOR as u32;
/// Longest error payload: number, length, message, offset.
pub(crate) const MAX_ERROR: u32 = 4 + 2 + wire::MAX_STRING + 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coverage_in_any_order() {
        let mut covered = Coverage::default();
        for (start, end) in [(10, 20), (0, 5), (5, 10), (30, 40), (20, 30)] {
            assert_eq!(covered.add(start, end), Ok(()));
        }
        assert!(covered.is_whole(40));
        assert!(!covered.is_whole(41));
        for (start, end) in [(0, 1), (39, 41), (15, 16), (0, 50)] {
            assert!(covered.add(start, end).is_err(), "{start}..{end}");
        }
    }

    #[test]
    fn coverage_is_bounded() {
        let mut covered = Coverage::default();
        let taken = (0..100_000).take_while(|i| covered.add(i * 2, i * 2 + 1).is_ok()).count();
        assert_eq!(taken, MAX_PIECES);
    }

    #[test]
    fn chunks_stay_within_their_request() {
        let asked = Asked { command: 0, offset: 4096, length: 4096 };
        assert_eq!(within(&asked, 8000, 192), Ok(3904));
        assert!(within(&asked, 8000, 193).is_err());
        assert!(within(&asked, 4095, 1).is_err());
        assert!(within(&asked, u64::MAX, u32::MAX).is_err());
    }

    #[test]
    fn status_is_clipped_merged_and_bounded() {
        let asked = Asked { command: 7, offset: 100, length: 1000 };
        let mut map = StatusMap::new(&asked);
        for (length, flags) in [(10, 0), (20, 0), (30, 3), (5000, 0), (7, 3)] {
            assert_eq!(map.add(length, flags), Ok(()));
        }
        let got: Vec<_> = map.extents.iter().map(|e| (e.offset, e.length, e.flags.0)).collect();
        assert_eq!(got, [(100, 30, 0), (130, 30, 3), (160, 940, 0)]);
        assert!(map.add(0, 0).is_err());

        let asked = Asked { command: 7, offset: 0, length: u32::MAX };
        let mut map = StatusMap::new(&asked);
        for i in 0..200_000 {
            assert_eq!(map.add(1, i % 2), Ok(()));
        }
        assert_eq!(map.extents.len(), MAX_EXTENTS);
    }
}
