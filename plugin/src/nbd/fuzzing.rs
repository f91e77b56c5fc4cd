//! NBD peers that say anything, for the fuzzer.

use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::client::{ConnectOptions, Export};
use super::server::{ImageSource, PIECE, Stretch, to_one};
use super::wire;
use crate::error::Result;

/// A peer that has hung up is noticed at once, long before this.
const LIMIT: Duration = Duration::from_secs(5);
/// Answers of one walk that are looked at.
const BATCHES: usize = 64;
/// The bitmap whose map the client asks for.
pub(crate) const BITMAP: &str = "qemu:dirty-bitmap:b";

/// Runs `work` beside a peer that sends all of `data`, takes whatever comes, and hangs up.
fn beside<F: Future<Output = ()>>(data: &[u8], work: impl FnOnce(UnixStream) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
        let peer = async move {
            let (mut read, mut write) = theirs.split();
            let said = async {
                // They may have heard enough before the end.
                let _ = write.write_all(data).await;
                let _ = write.shutdown().await;
            };
            let mut buffer = vec![0; 64 << 10];
            let heard = async { while read.read(&mut buffer).await.is_ok_and(|n| n > 0) {} };
            tokio::join!(said, heard);
        };
        let both = async { tokio::join!(work(ours), peer) };
        let ended = tokio::time::timeout(LIMIT, both).await;
        assert!(ended.is_ok(), "a peer that hung up is waited for");
    });
}

/// A server's bytes, from its greeting on. Bit 0 of the first byte: a bitmap is asked for, too.
pub fn client(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    let mut contexts = vec![wire::BASE_ALLOCATION.to_owned()];
    if how & 1 == 1 {
        contexts.push(BITMAP.to_owned());
    }
    let options = ConnectOptions { contexts, in_flight: 1 << 20, ..ConnectOptions::default() };
    beside(data, |socket| async move {
        let Ok(export) = Export::over(socket, &options).await else { return };
        assert!(i64::try_from(export.size()).is_ok(), "a size that overflows");
        let data = async {
            let (a, b) = tokio::join!(export.read(0, 4096), export.read(4096, 64 << 10));
            for (read, length) in [(a, 4096), (b, 64 << 10)] {
                if let Ok(read) = read {
                    assert_eq!(read.len(), length);
                }
            }
            let _ = export.write(0, Bytes::from_static(&[1; 512])).await;
            let _ = export.write_zeroes(0, 1 << 20).await;
            let _ = export.trim(512, 4096).await;
            let _ = export.flush().await;
        };
        let maps = async {
            for context in &options.contexts {
                walk(&export, context).await;
            }
        };
        tokio::join!(data, maps);
    });
}

/// What a map says covers the disk from its beginning without a gap.
async fn walk(export: &Export, context: &str) {
    let mut at = 0;
    let mut batches = std::pin::pin!(export.walk(context, 0..export.size()));
    for _ in 0..BATCHES {
        let Ok(Some(batch)) = batches.try_next().await else { return };
        assert!(!batch.is_empty(), "an answer without an extent");
        for extent in batch {
            assert!(extent.offset == at && extent.length > 0, "{extent:?} after {at}");
            at += extent.length;
            assert!(at <= export.size(), "{extent:?} beyond the disk's end");
        }
    }
}

/// A disk of 1 MiB, half of it zeros.
struct Half;

impl ImageSource for Half {
    fn size(&self) -> u64 {
        1 << 20
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Bytes> {
        let fits = offset.checked_add(length.into()).is_some_and(|end| end <= self.size());
        assert!(fits && length <= PIECE, "{length} bytes at {offset} are asked of the source");
        Ok(Bytes::from(vec![7; length as usize]))
    }

    async fn extents(&self, offset: u64, _length: u64) -> Result<Vec<Stretch>> {
        assert!(offset < self.size(), "extents beyond the disk's end are asked of the source");
        let half = self.size() / 2;
        let data = Stretch { length: half.saturating_sub(offset), zero: false };
        let zero = Stretch { length: half.min(self.size() - offset), zero: true };
        Ok([data, zero].into_iter().filter(|stretch| stretch.length > 0).collect())
    }
}

/// A client's bytes, to our own server.
pub fn server(data: &[u8]) {
    beside(data, |socket| to_one(socket, Half));
}
