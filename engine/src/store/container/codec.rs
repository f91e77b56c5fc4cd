//! Compression of frames, with contexts that are used again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use zstd::bulk::{Compressor, Decompressor};

use crate::error::{Context, Result};

/// Contexts of each direction that are kept: as many as work at a time on the pool
/// (a compressor is about 0.5 MiB, a decompressor 0.2 MiB).
const KEPT: usize = 2;

/// Compresses and decompresses frames; used by all threads of a store.
pub(crate) struct Codecs {
    level: i32,
    compressors: Mutex<Vec<Compressor<'static>>>,
    decompressors: Mutex<Vec<Decompressor<'static>>>,
}

impl Codecs {
    pub(crate) fn new(level: i32) -> Self {
        Codecs { level, compressors: Mutex::default(), decompressors: Mutex::default() }
    }

    /// The compressed form, or `None` when it is not smaller.
    pub(crate) fn compress(&self, raw: &[u8]) -> Result<Option<Vec<u8>>> {
        let kept = lock(&self.compressors).pop();
        let mut compressor = match kept {
            Some(compressor) => compressor,
            None => Compressor::new(self.level).context(|| "cannot make a zstd context".into())?,
        };
        // What does not fit here is not smaller, and stored as it is.
        let mut out = Vec::with_capacity(raw.len().saturating_sub(1));
        let fits = compressor.compress_to_buffer(raw, &mut out).is_ok_and(|n| n < raw.len());
        keep(&self.compressors, compressor);
        Ok(fits.then_some(out))
    }

    /// Decompresses into exactly `raw_len` bytes; `None` when it is not that.
    pub(crate) fn decompress(&self, bytes: &[u8], raw_len: usize) -> Result<Option<Vec<u8>>> {
        let kept = lock(&self.decompressors).pop();
        let mut decompressor = match kept {
            Some(decompressor) => decompressor,
            None => Decompressor::new().context(|| "cannot make a zstd context".into())?,
        };
        let out = decompressor.decompress(bytes, raw_len);
        keep(&self.decompressors, decompressor);
        Ok(out.ok().filter(|raw| raw.len() == raw_len))
    }
}

fn keep<T>(kept: &Mutex<Vec<T>>, context: T) {
    let mut kept = lock(kept);
    if kept.len() < KEPT {
        kept.push(context);
    }
}

/// A context is whole even after a panic elsewhere: every use starts it anew.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
