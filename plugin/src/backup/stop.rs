//! Ctrl-C, SIGTERM and a lost terminal end a backup at its next safe point.

use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};

/// Whether somebody wants us to end. The default action of the signals is off while it lives,
/// so that what was changed in a VM is put back.
pub struct Stop {
    token: CancellationToken,
}

impl Stop {
    /// Begins to watch for signals; must run inside a `LocalSet`.
    #[must_use]
    pub fn watch(signal: impl Future<Output = Error> + 'static) -> Stop {
        let token = CancellationToken::new();
        let ours = token.clone();
        tokio::task::spawn_local(async move {
            let _ = signal.await;
            ours.cancel();
        });
        Stop { token }
    }

    /// Completes when we are to end.
    pub async fn requested(&self) -> Error {
        self.token.cancelled().await;
        Error::new(Kind::Interrupted, "interrupted; nothing was committed")
    }

    /// Fails if we are to end.
    ///
    /// # Errors
    /// [`Kind::Interrupted`].
    pub fn check(&self) -> Result<()> {
        match self.token.is_cancelled() {
            true => Err(Error::new(Kind::Interrupted, "interrupted; nothing was committed")),
            false => Ok(()),
        }
    }

    /// Work that may be dropped at any point, unless we are to end first.
    ///
    /// # Errors
    /// The work's own, or [`Kind::Interrupted`].
    pub async fn unless<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            result = work => result,
            error = self.requested() => Err(error),
        }
    }
}
