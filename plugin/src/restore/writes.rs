//! Writes to a target that run beside the receiving of what comes next.
//!
//! The copying into the page cache takes as long as all the rest of a restore, and so does the
//! disk: both begin at once instead of waiting for each other.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, spawn_blocking};

use super::file::write_error;
use crate::engine::Scattered;
use crate::error::{Context, Error, Kind, Result};

/// Pieces that wait to be written or are being written, at most 512 KiB each: one for each thread,
/// and the next.
const PIECES: u32 = 4;

/// Bytes after which the kernel is told to write out what it has: the last sync is short then,
/// and a restore does not drive everything else out of the page cache.
const SYNC_EVERY: u64 = 32 << 20;

/// A file or device that is written in any order.
pub(super) struct Writes {
    file: Arc<File>,
    places: Arc<Semaphore>,
    /// The first write that failed.
    failure: Arc<Mutex<Option<Error>>>,
    /// Written since the last sync began.
    unsynced: Cell<u64>,
    syncing: RefCell<Option<JoinHandle<std::io::Result<()>>>>,
}

impl Writes {
    pub(super) fn new(file: File) -> Writes {
        Writes {
            file: Arc::new(file),
            places: Arc::new(Semaphore::new(PIECES as usize)),
            failure: Arc::default(),
            unsynced: Cell::new(0),
            syncing: RefCell::default(),
        }
    }

    /// What is written to.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Begins a write, once there is a place for it. It may fail later: then the next one, or the
    /// end, says so.
    pub(super) async fn write(&self, piece: Scattered) -> Result<()> {
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(|_| ended())?;
        self.check()?;
        let bytes = piece.len() as u64;
        let file = Arc::clone(&self.file);
        let failure = Arc::clone(&self.failure);
        // Not waited for: its place says when it is done.
        drop(spawn_blocking(move || {
            let put = |(offset, bytes): (u64, Bytes)| {
                file.write_all_at(&bytes, offset).map_err(|error| write_error(error, offset))
            };
            if let Err(error) = piece.iter().try_for_each(put) {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
            drop(place);
        }));
        self.wrote(bytes).await
    }

    /// So much more was written, or is being written.
    pub(super) async fn wrote(&self, bytes: u64) -> Result<()> {
        self.unsynced.set(self.unsynced.get() + bytes);
        self.sync_some().await
    }

    /// Waits until everything is written, and durable.
    pub(super) async fn finish(&self) -> Result<()> {
        // Held by every write under way.
        let _all = self.places.acquire_many(PIECES).await.map_err(|_| ended())?;
        self.check()?;
        let earlier = self.syncing.take();
        if let Some(earlier) = earlier {
            synced(earlier).await?;
        }
        let file = Arc::clone(&self.file);
        synced(spawn_blocking(move || file.sync_all())).await
    }

    fn check(&self) -> Result<()> {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.take().map_or(Ok(()), Err)
    }

    /// Begins to make durable what was written, unless that is under way already.
    async fn sync_some(&self) -> Result<()> {
        let busy = self.syncing.borrow().as_ref().is_some_and(|syncing| !syncing.is_finished());
        if busy || self.unsynced.get() < SYNC_EVERY {
            return Ok(());
        }
        self.unsynced.set(0);
        let file = Arc::clone(&self.file);
        let next = spawn_blocking(move || file.sync_data());
        let earlier = self.syncing.replace(Some(next));
        match earlier {
            // The kernel tells of a lost page once only.
            Some(earlier) => synced(earlier).await,
            None => Ok(()),
        }
    }
}

async fn synced(sync: JoinHandle<std::io::Result<()>>) -> Result<()> {
    let done = sync.await.unwrap_or_else(|panic| Err(std::io::Error::other(panic)));
    done.context(|| "cannot make what was written durable".to_owned())
}

fn ended() -> Error {
    Error::new(Kind::Failed, "the target is closed")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::Range;

    #[test]
    fn a_write_that_fails_later_is_told() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let writes = Writes::new(full);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let run = Range { offset: 4096, length: 100 };
            let piece = Scattered::new(vec![run], Bytes::from_static(&[7; 100])).unwrap();
            writes.write(piece).await.unwrap();
            let error = writes.finish().await.unwrap_err();
            assert_eq!(error.kind(), Kind::Target);
            assert!(error.to_string().contains("at 4096"), "{error}");
        });
    }
}
