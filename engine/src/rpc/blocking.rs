//! Calls that block, on threads of their own.
//!
//! Not on tokio's blocking threads: the store drives its objects with a runtime of its own, and
//! a thread that belongs to another runtime would wait for a place in the pool that it fills.

use tokio::sync::{Semaphore, oneshot};

use super::to_wire;
use crate::error::{Error, Kind, Result};

/// Calls that block at once; more wait. Each is a thread with a small stack.
static PLACES: Semaphore = Semaphore::const_new(16);
/// Nothing recurses here, and every touched page is the host's memory.
const STACK: usize = 512 << 10;

/// Runs what blocks away from the LocalSet thread. What it gives is dropped if nobody waits
/// any more.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> std::result::Result<T, capnp::Error> {
    run(work).await.map_err(|e| to_wire(&e))
}

/// The same for a job that may wait for its client, or must not wait for other calls: it takes no place
/// of the short ones, and who calls this bounds how many there are.
pub(super) async fn long<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> std::result::Result<T, capnp::Error> {
    on_a_thread(work).await.map_err(|e| to_wire(&e))
}

async fn run<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let place = PLACES.acquire().await;
    on_a_thread(move || {
        let _place = place;
        work()
    })
    .await
}

/// Runs `work` on a thread of its own.
///
/// # Errors
/// Its own; when there can be no thread.
pub async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let failed = |e| Error::caused(Kind::Failed, "the engine cannot start a worker", e);
    let (done, result) = oneshot::channel();
    std::thread::Builder::new()
        .name("call".into())
        .stack_size(STACK)
        .spawn(move || drop(done.send(work())))
        .map_err(failed)?;
    result.await.unwrap_or_else(|_| Err(Error::new(Kind::Failed, "the engine's worker failed")))
}
