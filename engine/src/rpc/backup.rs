//! A backup session as the plugin sees it: calls become events of the session's thread.

use std::rc::Rc;
use std::sync::Arc;

use crossbeam_channel::TrySendError;
use fleece_schema::engine_capnp::{self as wire, backup_session};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::convert;
use super::to_wire;
use crate::error::{Error, Kind, Result};
use crate::session::begin::ClientEnd;
use crate::session::event::{Event, Reply};
use crate::session::registry::Progress;
use crate::session::spool::Position;

/// A session; the plugin's end of it is the session's end.
pub(super) struct BackupServer {
    pub(super) client: ClientEnd,
    pub(super) progress: Arc<Progress>,
    /// KiB of blocks that may be on their way, of all sessions.
    pub(super) messages: Arc<Semaphore>,
    /// The place among those that may run at once.
    pub(super) _place: OwnedSemaphorePermit,
}

impl BackupServer {
    /// Sends an event and waits for its answer.
    async fn call<T>(
        &self,
        event: impl FnOnce(Reply<T>) -> Event,
    ) -> std::result::Result<T, capnp::Error> {
        let (reply, answer) = oneshot::channel();
        self.client.events.try_send(event(reply)).map_err(|error| {
            to_wire(&match error {
                TrySendError::Full(_) => Error::new(Kind::Usage, "too many calls at once"),
                TrySendError::Disconnected(_) => ended(),
            })
        })?;
        let outcome: Result<T> = answer.await.unwrap_or_else(|_| Err(ended()));
        outcome.map_err(|e| to_wire(&e))
    }
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
        let at = Position { disk: params.get_disk(), block: params.get_first_block() };
        let data = params.get_data()?;
        if data.len() > wire::MAX_WRITE as usize {
            let message =
                format!("{} bytes written at once; at most {}", data.len(), wire::MAX_WRITE);
            return Err(to_wire(&Error::new(Kind::Usage, message)));
        }
        let kib = (data.len() as u32).div_ceil(1024);
        let _share = self.messages.acquire_many(kib).await.map_err(|_| to_wire(&ended()))?;
        let data = data.to_vec();
        self.call(|reply| Event::Write { at, data, reply }).await
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
        let mut results = results.get();
        results.set_stage(self.progress.stage());
        convert::set_counts(results.init_counts(), &self.progress.counts());
        Ok(())
    }
}
