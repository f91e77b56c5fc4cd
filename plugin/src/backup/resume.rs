//! An engine that goes away in the middle of a backup takes only what it had not sealed with it: the
//! point in time is ours. It is held until an engine answers again and goes on with the session, from
//! the first block; what was sealed before is a duplicate then.

use std::io;
use std::time::{Duration, Instant};

use super::messages::{EngineAwaited, EngineBack, EngineGone};
use super::{Admitted, Context, Failure, Stop};
use crate::engine::{BackupPlan, BackupRequest, Engine, Resumed, Snapshot, SnapshotId};
use crate::error::{Error, Kind, Result};
use crate::progress::Report;
use crate::units::human_duration;

/// Between two tries to reach an engine that is away; one that is refused costs nothing.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// A point in time that can be read as often as it has to be.
pub(super) trait Held {
    /// Goes through the backup once.
    async fn attempt(&mut self, admitted: &Admitted) -> std::result::Result<Snapshot, Failure>;

    /// Work on it, unless it is lost, its time is over, or we are to end.
    async fn keep<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T>;

    /// The same for work that does not read it.
    async fn keep_unread<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.keep(work).await
    }

    /// It is certain that nothing was committed, and the engine has planned again.
    ///
    /// # Errors
    /// What it plans cannot be done any more.
    fn begin_again(&mut self, plan: &mut BackupPlan) -> Result<()>;
}

/// Goes through a backup until it is committed, over again whenever the engine goes away.
pub(super) async fn until_committed<H: Held>(
    context: &Context<'_>,
    request: &BackupRequest,
    held: &mut H,
    admitted: &mut Admitted,
) -> std::result::Result<Snapshot, Failure> {
    let Context { report, engine, options, .. } = *context;
    loop {
        let gone = match held.attempt(admitted).await {
            Err(failure) if failure.error.kind() == Kind::EngineGone => failure,
            outcome => return outcome,
        };
        let limit = options.engine_wait;
        if limit.is_zero() {
            return Err(gone);
        }
        let (vm, snapshot) = (request.vm_name.clone(), admitted.plan.snapshot.clone());
        let host = engine.info().host.clone();
        let wait_seconds = limit.as_secs_f64();
        report.send(&EngineGone {
            vm: vm.clone(),
            snapshot: snapshot.0.clone(),
            host,
            wait_seconds,
        });
        let begun = Instant::now();
        let resumed = held.keep_unread(resume(engine, request, &snapshot, limit)).await;
        let resumed = resumed.map_err(|error| gone.followed_by(error))?;
        let committed = matches!(resumed, Resumed::Committed(_));
        let seconds = begun.elapsed().as_secs_f64();
        report.send(&EngineBack { vm, snapshot: snapshot.0, seconds, committed });
        match resumed {
            Resumed::Committed(snapshot) => return Ok(*snapshot),
            Resumed::Session(plan, session) => *admitted = Admitted { plan, session },
        }
        held.begin_again(&mut admitted.plan)?;
    }
}

/// Waits for an engine and asks it to go on. Whatever an engine answers is final.
async fn resume(
    engine: &Engine,
    request: &BackupRequest,
    snapshot: &SnapshotId,
    limit: Duration,
) -> Result<Resumed> {
    once_back(limit, async || {
        engine.reconnect().await?;
        engine.resume_backup(request, snapshot).await
    })
    .await
}

/// Connects again for the next VM of several: the one before may have lost the engine for good, and this one
/// need not fail for that.
///
/// # Errors
/// As [`Engine::reconnect`]; [`Kind::NoEngine`] when none is back in time, [`Kind::Interrupted`].
pub async fn connect_again(
    (report, stop): (&Report, &Stop),
    engine: &Engine,
    vm: &str,
    limit: Duration,
) -> Result<()> {
    match engine.reconnect().await {
        Err(error) if is_away(&error) && !limit.is_zero() => {
            let (host, wait_seconds) = (engine.info().host.clone(), limit.as_secs_f64());
            report.send(&EngineAwaited { vm: vm.to_owned(), host, wait_seconds });
            stop.unless(once_back(limit, async || engine.reconnect().await)).await
        }
        outcome => outcome,
    }
}

/// Asks until somebody answers.
async fn once_back<T>(limit: Duration, ask: impl AsyncFn() -> Result<T>) -> Result<T> {
    let back = async {
        loop {
            match ask().await {
                Err(error) if is_away(&error) => tokio::time::sleep(TRY_AGAIN).await,
                answer => return answer,
            }
        }
    };
    tokio::time::timeout(limit, back).await.unwrap_or_else(|_| {
        let what = format!("the engine did not come back within {}", human_duration(limit));
        Err(Error::new(Kind::NoEngine, what))
    })
}

/// Nobody answered. One that starts has a socket for a moment that only its own user may use.
fn is_away(error: &Error) -> bool {
    matches!(error.kind(), Kind::NoEngine | Kind::EngineGone) || error.has_cause::<io::Error>()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::VecDeque;

    use super::super::tests::options;
    use super::super::{Identity, Stop};
    use super::*;
    use crate::engine::Session;
    use crate::error::Kind;
    use crate::progress::Report;

    /// A point in time whose attempts fail so.
    struct Failing(VecDeque<Failure>);

    impl Held for Failing {
        async fn attempt(&mut self, _: &Admitted) -> std::result::Result<Snapshot, Failure> {
            Err(self.0.pop_front().unwrap())
        }

        async fn keep<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
            work.await
        }

        fn begin_again(&mut self, _: &mut BackupPlan) -> Result<()> {
            panic!("no engine came back")
        }
    }

    /// What comes of an attempt that failed so where no engine answers.
    async fn after(kind: Kind, ambiguous: bool, engine_wait: Duration) -> Failure {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::that_is_gone(&dir.path().join("engine.sock"));
        let options = super::super::Options { engine_wait, ..options(&[], &[]) };
        let identity = Identity::new(uuid::Uuid::nil(), "web1", &options);
        let request = identity.request(Vec::new(), Vec::new(), String::new());
        let (report, stop) = (Report::new(false, false), Stop::watch(std::future::pending()));
        let context = Context { report: &report, engine: &engine, options: &options, stop: &stop };
        let snapshot = SnapshotId("abc234".into());
        let plan = BackupPlan { snapshot, disks: Vec::new(), in_flight: 0, cache: 0 };
        let mut admitted = Admitted { plan, session: Session::that_cannot_commit(None) };
        let failure = Failure { error: Error::new(kind, "the attempt"), ambiguous };
        let mut held = Failing(VecDeque::from([failure]));
        until_committed(&context, &request, &mut held, &mut admitted).await.err().unwrap()
    }

    #[tokio::test]
    async fn only_an_engine_that_is_gone_is_waited_for() {
        const SHORT: Duration = Duration::from_millis(300);
        let work = async {
            for kind in [Kind::Failed, Kind::NoEngine, Kind::Busy, Kind::Interrupted] {
                assert_eq!(after(kind, false, SHORT).await.error.to_string(), "the attempt");
            }
            let told_not_to = after(Kind::EngineGone, false, Duration::ZERO).await;
            assert_eq!(told_not_to.error.to_string(), "the attempt");
            // Whether it may have committed is as uncertain after the waiting as before.
            for ambiguous in [false, true] {
                let failure = after(Kind::EngineGone, ambiguous, SHORT).await;
                let told = failure.error.to_string();
                assert!(told.contains("did not come back within 0.30 s"), "{told}");
                assert_eq!(told.contains("may be committed"), ambiguous, "{told}");
                assert_eq!((failure.ambiguous, failure.error.kind()), (ambiguous, Kind::NoEngine));
            }
        };
        tokio::task::LocalSet::new().run_until(work).await;
    }
}
