//! A file or device that the engine writes to: what is in it becomes durable meanwhile.
//!
//! The disk takes as long as all the rest of a restore: it begins at once instead of at the end.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use tokio::task::{JoinHandle, spawn_blocking};

use super::file::write_error;
use crate::engine::Scattered;
use crate::error::{Context, Result};

/// Bytes after which the kernel is told to write out what it has: the last sync is short then,
/// and a restore does not drive everything else out of the page cache.
const SYNC_EVERY: u64 = 32 << 20;

/// A file or device that is written in any order.
pub(super) struct Writes {
    file: Arc<File>,
    /// Written since the last sync began.
    unsynced: Cell<u64>,
    syncing: RefCell<Option<JoinHandle<std::io::Result<()>>>>,
}

impl Writes {
    pub(super) fn new(file: File) -> Writes {
        Writes { file: Arc::new(file), unsynced: Cell::new(0), syncing: RefCell::default() }
    }

    /// What is written to.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Writes what an engine sends that does not write to files itself: one of an earlier version.
    pub(super) async fn write(&self, piece: Scattered) -> Result<()> {
        let (file, bytes) = (Arc::clone(&self.file), piece.len() as u64);
        let write = move || {
            piece.iter().try_for_each(|(offset, bytes)| {
                file.write_all_at(&bytes, offset).map_err(|error| write_error(error, offset))
            })
        };
        let written = spawn_blocking(write).await;
        written.map_err(std::io::Error::other).context(|| "cannot write".to_owned())??;
        self.wrote(bytes).await
    }

    /// So much more is in it.
    pub(super) async fn wrote(&self, bytes: u64) -> Result<()> {
        self.unsynced.set(self.unsynced.get() + bytes);
        self.sync_some().await
    }

    /// Waits until everything is durable.
    pub(super) async fn finish(&self) -> Result<()> {
        let earlier = self.syncing.take();
        if let Some(earlier) = earlier {
            synced(earlier).await?;
        }
        let file = Arc::clone(&self.file);
        synced(spawn_blocking(move || file.sync_all())).await
    }

    /// Begins to make durable what was written, unless that is under way already.
    async fn sync_some(&self) -> Result<()> {
        let busy = self.syncing.borrow().as_ref().is_some_and(|syncing| !syncing.is_finished());
        if busy || self.unsynced.get() < SYNC_EVERY {
            return Ok(());
        }
        self.unsynced.set(0);
        let file = Arc::clone(&self.file);
        let next = spawn_blocking(move || {
            file.sync_data()?;
            // What is on the disk need not stay in memory: the pages go to what is written next. A
            // hint: where it is refused, they stay.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            Ok(())
        });
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::engine::Range;
    use crate::error::Kind;

    #[test]
    fn a_write_that_fails_is_told() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let writes = Writes::new(full);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let run = Range { offset: 4096, length: 100 };
            let piece = Scattered::new(vec![run], Bytes::from_static(&[7; 100])).unwrap();
            let error = writes.write(piece).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Target);
            assert!(error.to_string().contains("at 4096"), "{error}");
        });
    }
}
