//! A backup session as the plugin sees it: calls become events of the session's thread.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::TrySendError;
use fleece_schema::engine_capnp::{self as wire, backup_session};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::convert;
use super::files;
use super::flow::Flow;
use super::to_wire;
use crate::error::{Error, Kind, Result};
use crate::session::MAX_LENT;
use crate::session::begin::ClientEnd;
use crate::session::event::{Alone, Event, Reply};
use crate::session::registry::Progress;

/// How long the client of a session may say nothing: it keeps a place from others. Ours ask for
/// the progress twice a second, but for a commit, which they give ten minutes.
const IDLE: Duration = Duration::from_secs(900);

/// As many as the bytes of one call hold of the smallest blocks.
const MAX_LENT_RUNS: u32 = wire::MAX_LENT / 4096;
const _: () = assert!(MAX_LENT == wire::MAX_LENT as u64);

/// A session; the plugin's end of it is the session's end.
pub(super) struct BackupServer {
    client: ClientEnd,
    progress: Arc<Progress>,
    /// KiB of blocks that may be on their way, of all sessions.
    messages: Arc<Semaphore>,
    /// The connection's messages, and the files that came with them.
    flow: Rc<Flow>,
    /// Held by a call about images that were lent.
    lent: Arc<Mutex<()>>,
    held: Rc<Held>,
    /// Ends the session when its client has said nothing for too long.
    watch: JoinHandle<()>,
}

impl Drop for BackupServer {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// What an open session keeps from others.
struct Held {
    /// The place among those that may run at once.
    place: RefCell<Option<OwnedSemaphorePermit>>,
    last_call: Cell<Instant>,
}

impl BackupServer {
    /// A session that has begun. Runs on a `LocalSet`.
    pub(super) fn new(
        client: ClientEnd,
        progress: Arc<Progress>,
        messages: Arc<Semaphore>,
        flow: Rc<Flow>,
        place: OwnedSemaphorePermit,
    ) -> Self {
        client.hand_over();
        let place = RefCell::new(Some(place));
        let held = Rc::new(Held { place, last_call: Cell::new(Instant::now()) });
        let watch = end_when_idle(Rc::clone(&held), client.events.clone(), IDLE);
        let watch = tokio::task::spawn_local(watch);
        BackupServer { client, progress, messages, flow, lent: Arc::default(), held, watch }
    }

    fn called(&self) {
        self.held.last_call.set(Instant::now());
    }

    /// The turn of a call about images that were lent, which goes with it: a call that its client
    /// gives up still waits for the session.
    fn turn_of_lent(&self) -> std::result::Result<Alone, capnp::Error> {
        let turn = Arc::clone(&self.lent).try_lock_owned();
        turn.map(Some).map_err(|_| {
            let what = "images are lent, and read from, by one call at a time";
            to_wire(&Error::new(Kind::Usage, what))
        })
    }

    /// Sends an event and waits for its answer.
    async fn call<T>(
        &self,
        event: impl FnOnce(Reply<T>) -> Event,
    ) -> std::result::Result<T, capnp::Error> {
        self.called();
        let (reply, answer) = oneshot::channel();
        if let Err(refused) = self.client.events.try_send(event(reply)) {
            let (event, error) = match refused {
                TrySendError::Full(event) => {
                    (event, Error::new(Kind::Usage, "too many calls at once"))
                }
                TrySendError::Disconnected(event) => (event, ended()),
            };
            if let Event::Lend { file, .. } = event {
                files::close(file);
            }
            return Err(to_wire(&error));
        }
        let outcome: Result<T> = answer.await.unwrap_or_else(|_| Err(ended()));
        outcome.map_err(|e| to_wire(&e))
    }
}

/// Ends a session whose client says nothing any more, and gives its place to others.
async fn end_when_idle(held: Rc<Held>, events: crossbeam_channel::Sender<Event>, idle: Duration) {
    while held.last_call.get().elapsed() < idle {
        tokio::time::sleep_until(held.last_call.get() + idle).await;
    }
    let reason = format!("its client said nothing for {} minutes", idle.as_secs() / 60);
    eprintln!("fleece-engine: a session is ended: {reason}");
    let (reply, ended) = oneshot::channel();
    let mut word = Event::Abort { reason, reply };
    // A full queue is gone through in a moment.
    while let Err(TrySendError::Full(again)) = events.try_send(word) {
        word = again;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // An error means that its thread has ended, too.
    let _ = ended.await;
    drop(held.place.take());
}

fn ended() -> Error {
    Error::new(Kind::Failed, "the session is over")
}

impl backup_session::Server for BackupServer {
    async fn submit(
        self: Rc<Self>,
        params: backup_session::SubmitParams,
    ) -> std::result::Result<(), capnp::Error> {
        let params = params.get()?;
        let disk = params.get_disk();
        let extents = convert::extents(params.get_extents()?);
        let fingerprints =
            convert::fingerprints(params.get_fingerprints()?).map_err(|e| to_wire(&e))?;
        self.call(|reply| Event::Submit { disk, extents, fingerprints, reply }).await
    }

    async fn end_window(
        self: Rc<Self>,
        _: backup_session::EndWindowParams,
        _: backup_session::EndWindowResults,
    ) -> std::result::Result<(), capnp::Error> {
        self.call(Event::EndWindow).await
    }

    async fn end_scan(
        self: Rc<Self>,
        _: backup_session::EndScanParams,
        _: backup_session::EndScanResults,
    ) -> std::result::Result<(), capnp::Error> {
        self.call(Event::EndScan).await
    }

    async fn grants(
        self: Rc<Self>,
        _: backup_session::GrantsParams,
        mut results: backup_session::GrantsResults,
    ) -> std::result::Result<(), capnp::Error> {
        let grants = self.call(Event::Grants).await?;
        convert::set_grants(results.get(), &grants);
        Ok(())
    }

    async fn write(
        self: Rc<Self>,
        params: backup_session::WriteParams,
    ) -> std::result::Result<(), capnp::Error> {
        let params = params.get()?;
        let data = params.get_data()?;
        if data.len() > wire::MAX_WRITE as usize {
            let message =
                format!("{} bytes written at once; at most {}", data.len(), wire::MAX_WRITE);
            return Err(to_wire(&Error::new(Kind::Usage, message)));
        }
        let runs = params.get_runs()?;
        if runs.len() > wire::MAX_RUNS {
            let message =
                format!("{} runs written at once; at most {}", runs.len(), wire::MAX_RUNS);
            return Err(to_wire(&Error::new(Kind::Usage, message)));
        }
        let runs = convert::grants(runs);
        let kib = (data.len() as u32).div_ceil(1024);
        let _share = self.messages.acquire_many(kib).await.map_err(|_| to_wire(&ended()))?;
        let data = data.to_vec();
        self.call(|reply| Event::Write { runs, data, reply }).await
    }

    async fn lend(
        self: Rc<Self>,
        params: backup_session::LendParams,
        mut results: backup_session::LendResults,
    ) -> std::result::Result<(), capnp::Error> {
        let params = params.get()?;
        let disk = params.get_disk();
        let alone = self.turn_of_lent()?;
        // One that did not arrive is no error: the client sends data, too.
        let Some(file) = self.flow.files.take(params.get_file()) else { return Ok(()) };
        let taken = self.call(|reply| Event::Lend { disk, file, alone, reply }).await?;
        results.get().set_taken(taken);
        Ok(())
    }

    async fn write_lent(
        self: Rc<Self>,
        params: backup_session::WriteLentParams,
        _: backup_session::WriteLentResults,
    ) -> std::result::Result<(), capnp::Error> {
        let alone = self.turn_of_lent()?;
        let runs = params.get()?.get_runs()?;
        if runs.len() > MAX_LENT_RUNS {
            let message =
                format!("{} runs to be read at once; at most {MAX_LENT_RUNS}", runs.len());
            return Err(to_wire(&Error::new(Kind::Usage, message)));
        }
        let runs = convert::grants(runs);
        self.call(|reply| Event::WriteLent { runs, alone, reply }).await
    }

    async fn commit(
        self: Rc<Self>,
        params: backup_session::CommitParams,
        mut results: backup_session::CommitResults,
    ) -> std::result::Result<(), capnp::Error> {
        let params = params.get()?;
        let point_in_time_ms = params.get_point_in_time_ms();
        let bitmaps = params.get_bitmaps()?.iter();
        let bitmaps = bitmaps
            .map(|name| convert::text(name, "a bitmap's name"))
            .collect::<Result<Vec<_>>>()
            .map_err(|e| to_wire(&e))?;
        let manifest =
            self.call(|reply| Event::Commit { point_in_time_ms, bitmaps, reply }).await?;
        convert::set_snapshot(results.get().init_snapshot(), &manifest, false);
        Ok(())
    }

    async fn abort(
        self: Rc<Self>,
        params: backup_session::AbortParams,
        _: backup_session::AbortResults,
    ) -> std::result::Result<(), capnp::Error> {
        let reason =
            convert::text(params.get()?.get_reason(), "a reason").map_err(|e| to_wire(&e))?;
        self.call(|reply| Event::Abort { reason, reply }).await
    }

    async fn progress(
        self: Rc<Self>,
        _: backup_session::ProgressParams,
        mut results: backup_session::ProgressResults,
    ) -> std::result::Result<(), capnp::Error> {
        self.called();
        let mut results = results.get();
        results.set_stage(self.progress.stage());
        convert::set_counts(results.init_counts(), &self.progress.counts());
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_session_whose_client_is_silent_gives_up_its_place() {
        const IDLE: Duration = Duration::from_millis(300);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let places = Arc::new(Semaphore::new(1));
            let place = RefCell::new(Some(Arc::clone(&places).try_acquire_owned().unwrap()));
            let held = Rc::new(Held { place, last_call: Cell::new(Instant::now()) });
            let (events, queue) = crossbeam_channel::bounded(1);
            let client = async {
                for _ in 0..5 {
                    tokio::time::sleep(IDLE / 3).await;
                    held.last_call.set(Instant::now());
                }
                assert!(queue.is_empty(), "it was not silent");
                let (reason, reply) = loop {
                    match queue.try_recv() {
                        Ok(Event::Abort { reason, reply }) => break (reason, reply),
                        _ => tokio::time::sleep(IDLE / 10).await,
                    }
                };
                assert!(held.last_call.get().elapsed() >= IDLE);
                assert!(reason.contains("said nothing"), "{reason}");
                assert_eq!(places.available_permits(), 0, "the session still runs");
                reply.send(Ok(())).unwrap();
            };
            futures::join!(end_when_idle(Rc::clone(&held), events, IDLE), client);
            assert_eq!(places.available_permits(), 1);
        });
    }
}
