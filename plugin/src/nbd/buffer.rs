//! Buffers of data read, used again and again, so that memory stays at what is in flight.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Buffers come in multiples of this, so that any of them fits the next request.
const GRAIN: usize = 256 * 1024;

/// Keeps idle buffers up to a number of bytes; more are freed.
#[derive(Debug)]
pub(crate) struct Pool {
    idle: Mutex<Vec<Vec<u8>>>,
    most: usize,
}

impl Pool {
    /// A pool that keeps at most `bytes` of idle buffers.
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Pool { idle: Mutex::new(Vec::new()), most: bytes })
    }

    /// A buffer of `length` bytes; what is in it is left over from earlier.
    pub(crate) fn take(self: &Arc<Self>, length: usize) -> Buffer {
        let reused = {
            let mut idle = self.lock();
            let fit = idle.iter().rposition(|bytes| bytes.len() >= length);
            fit.map(|at| idle.swap_remove(at))
        };
        let bytes = reused.unwrap_or_else(|| vec![0; length.next_multiple_of(GRAIN)]);
        Buffer { bytes, length, pool: Arc::clone(self) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes read; goes back to its pool when dropped.
/// `bytes::Bytes::from_owner` makes it shareable.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    length: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// A buffer of its own, of no pool; for sources that are not NBD.
    #[must_use]
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        Buffer { length: bytes.len(), bytes, pool: Pool::new(0) }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut idle = self.pool.lock();
        let kept: usize = idle.iter().map(Vec::len).sum();
        if kept + bytes.len() <= self.pool.most {
            idle.push(bytes);
        }
    }
}
