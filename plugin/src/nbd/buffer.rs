//! Buffers of data read, used again and again, so that memory stays at what is in flight.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Buffers come in powers of two from a page on, so that they fit the next request too.
const SMALLEST: usize = 4096;

/// What a buffer of `length` bytes costs.
pub(crate) fn cost(length: usize) -> usize {
    length.next_power_of_two().max(SMALLEST)
}

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
        let size = cost(length);
        let reused = {
            let mut idle = self.lock();
            let fit = idle.iter().rposition(|bytes| bytes.len() == size);
            fit.map(|at| idle.remove(at))
        };
        let bytes = reused.unwrap_or_else(|| vec![0; size]);
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
        let most = self.pool.most;
        if bytes.len() > most {
            return;
        }
        let mut idle = self.pool.lock();
        // Those that were not used for the longest time go.
        while idle.iter().map(Vec::len).sum::<usize>() + bytes.len() > most {
            idle.remove(0);
        }
        idle.push(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_buffers_are_used_again_and_bounded() {
        let pool = Pool::new(3 * 4096);
        let mut first = pool.take(4000);
        first[0] = 7;
        assert_eq!(first.len(), 4000);
        drop(first);
        assert_eq!(pool.take(4096)[0], 7);
        drop((0..5).map(|_| pool.take(4096)).collect::<Vec<_>>());
        assert_eq!(pool.lock().len(), 3);
        drop(pool.take(8192));
        assert_eq!(pool.lock().iter().map(Vec::len).collect::<Vec<_>>(), [4096, 8192]);
        drop(pool.take(1 << 20));
        assert_eq!(pool.lock().len(), 2);
    }
}
