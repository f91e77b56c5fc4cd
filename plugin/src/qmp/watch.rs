//! Is the view still the point in time? Watched while it is read, and asked after the last read.
//!
//! A filter that breaks lets reads fail, which is safe by itself. But a filter that someone takes
//! out, or a job that someone ends, can let reads return the present: so both are looked at.

use crate::error::{Error, Kind, Result};
use crate::nbd::NbdError;
use crate::qmp::command as cmd;
use crate::qmp::disk::{Edges, nodes};
use crate::qmp::end;
use crate::qmp::names::PREFIX;
use crate::qmp::point::Part;
use crate::qmp::scratch::Scratch;
use crate::qmp::session::{CallError, Session};
use crate::qmp::view::Way;
use serde_json::json;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

/// How often scratch is measured and QEMU is asked although no event came.
const LOOK: Duration = Duration::from_millis(500);

/// Returns when the view is broken, with the reason.
pub(crate) async fn broken(session: &Session, parts: &[Part], scratch: &Scratch) -> Error {
    let mut events = session.events();
    loop {
        if let Some(error) = look(session, parts, scratch).await {
            return error;
        }
        scratch.used();
        match timeout(LOOK, events.recv()).await {
            Ok(Ok(event)) if event.name == "SHUTDOWN" => return gone(session),
            Ok(Err(RecvError::Closed)) => return gone(session),
            // Any other event, some lost ones, or none: look again.
            _ => {}
        }
    }
}

/// A read that failed, and what broke where that is known. A filter's snapshot breaks silently, at
/// the first copy that failed or took too long, so there the failed read itself is the news.
pub(crate) async fn explain(
    session: &Session,
    parts: &[Part],
    scratch: &Scratch,
    failed: Error,
) -> Error {
    let found = look(session, parts, scratch).await;
    let filtered = parts.iter().any(|p| p.way == Way::Filter);
    explained(failed, found, filtered.then(|| snapshot_broke(session, scratch)))
}

/// `found` is what was seen to be broken, `silent` what breaks unseen.
fn explained(failed: Error, found: Option<Error>, silent: Option<Error>) -> Error {
    // A bad sector, a QEMU that does not answer: no larger scratch helps there.
    let broken = failed.cause::<NbdError>().is_some_and(NbdError::is_view_broken);
    match found.or(silent.filter(|_| broken)) {
        Some(why) => Error::caused(why.kind(), why.to_string(), failed),
        None => failed,
    }
}

fn snapshot_broke(session: &Session, scratch: &Scratch) -> Error {
    let text = format!(
        "VM {}: the frozen view broke so that the guest could go on: the scratch is full ({} of {} MiB used; give \
         more --scratch-max), or too slow",
        session.identity().name,
        scratch.used() >> 20,
        scratch.total() >> 20
    );
    Error::new(Kind::Failed, text)
}

/// Looks once.
async fn look(session: &Session, parts: &[Part], scratch: &Scratch) -> Option<Error> {
    let full = scratch.full().map(|i| scratch_full(session, &parts[i], scratch.cap(i)));
    let status = match session.call(cmd::QueryStatus(json!({})), "").await {
        Ok(status) => status.status,
        Err(error) => return Some(call_failed(session, error)),
    };
    if status == "io-error" && parts.iter().any(|p| p.way != Way::Filter) {
        // The guest waits for our scratch: it comes first.
        let ended = async {
            end::end_views(session, PREFIX, false).await?;
            end::let_guest_go_on(session, false).await
        };
        if let Err(error) = ended.await {
            return Some(call_failed(session, error));
        }
        let text = format!(
            "VM {}: the scratch image is full and QEMU paused the guest; the view was ended and the guest goes on. Give more --scratch-max",
            session.identity().name
        );
        return Some(full.unwrap_or_else(|| Error::new(Kind::Failed, text)));
    }
    match still_valid(session, parts).await {
        Err(error) => Some(full.unwrap_or(error)),
        // With a filter, nothing else tells that the snapshot broke.
        Ok(()) => full,
    }
}

/// Everything that makes the view is still there.
pub(crate) async fn still_valid(session: &Session, parts: &[Part]) -> Result<()> {
    let checked = async {
        let exports = session.call(cmd::QueryExports(json!({})), "").await?;
        let jobs = session.call(cmd::QueryJobs(json!({})), "").await?;
        let devices = session.call(cmd::QueryBlock(json!({})), "").await?;
        let all = nodes(session).await?;
        let graph = Edges::of(session).await?;
        for part in parts.iter().filter(|p| p.way != Way::Push) {
            let names = &part.names;
            if !exports.iter().any(|e| e.id == names.export && e.node_name == names.view) {
                return Ok(Some(broke(part, "its export was ended by someone else")));
            }
            if part.way == Way::Job
                && !jobs.iter().any(|j| j.id == names.job && j.status == "running")
            {
                return Ok(Some(broke(
                    part,
                    "its backup job was ended by someone else, or failed",
                )));
            }
            let covered = devices.iter().filter_map(|d| d.inserted.as_ref()).any(|top| {
                top.node_name == names.filter
                    || graph.filters_from(&top.node_name, &all).contains(&names.filter)
            });
            if !covered {
                return Ok(Some(broke(part, "the guest no longer writes through our filter")));
            }
        }
        Ok(None)
    };
    match checked.await {
        Ok(None) => Ok(()),
        Ok(Some(error)) => Err(error),
        Err(error) => Err(call_failed(session, error)),
    }
}

fn broke(part: &Part, why: &str) -> Error {
    Error::new(Kind::Failed, format!("disk {}: the frozen view is lost: {why}", part.disk.label))
}

fn scratch_full(session: &Session, part: &Part, cap: u64) -> Error {
    let text = format!(
        "VM {}: disk {}: its scratch image is full ({} MiB): the guest wrote more during the backup than --scratch-max allows",
        session.identity().name,
        part.disk.label,
        cap >> 20
    );
    Error::new(Kind::Failed, text)
}

fn call_failed(session: &Session, error: CallError) -> Error {
    if error.is_gone() {
        return gone(session);
    }
    Error::caused(Kind::Failed, format!("VM {}", session.identity().name), error)
}

fn gone(session: &Session) -> Error {
    Error::new(
        Kind::Failed,
        format!("VM {}: it was powered off during the backup", session.identity().name),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::error::Context;
    use crate::nbd::NbdErrorKind;

    /// A read that failed so, where its way says no more than that the scratch may be to blame.
    fn told(kind: NbdErrorKind, found: Option<Error>) -> String {
        let answer: std::result::Result<(), _> = Err(NbdError::new(kind, "vda", "the answer"));
        let failed = answer.context(|| "cannot read 512 bytes at 0".to_owned()).unwrap_err();
        let scratch = Error::new(Kind::Failed, "the scratch is full, or too slow");
        explained(failed, found, Some(scratch)).to_string()
    }

    #[test]
    fn only_a_view_that_broke_is_blamed_on_the_scratch() {
        const READ: &str = "cannot read 512 bytes at 0: vda: the answer";
        let broken = told(NbdErrorKind::ViewBroken, None);
        assert_eq!(broken, format!("the scratch is full, or too slow: {READ}"));
        for kind in [NbdErrorKind::Io(5), NbdErrorKind::Timeout, NbdErrorKind::Connect] {
            assert_eq!(told(kind, None), READ);
        }
    }

    #[test]
    fn what_was_seen_comes_before_what_is_inferred() {
        for kind in [NbdErrorKind::ViewBroken, NbdErrorKind::Disconnected] {
            let gone = Error::new(Kind::Failed, "it was powered off");
            let told = told(kind, Some(gone));
            assert!(told.starts_with("it was powered off: cannot read"), "{told}");
            assert!(!told.contains("scratch"), "{told}");
        }
    }
}
