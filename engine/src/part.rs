//! The owner of this host's part of the fingerprints, as a cluster needs it, and those who ask it.

use std::sync::Arc;

use crate::detect::{JournalPosition, LeftOver, Verdict};
use crate::error::{Error, Result};
use crate::ids::{Address, Fingerprint, Sequence, SessionId, Slices};

/// A block and where it is.
pub type Entry = (Fingerprint, Address);

/// How a session hears that it has new answers; must not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Where an owner gives what a session asks and holds of blocks that it does not own any more; must not
/// block. Gives grants back for what it owns all the same.
pub type HandOver = Arc<dyn Fn(SessionId, LeftOver) -> Vec<(Fingerprint, Sequence)> + Send + Sync>;

/// A session that asks, here or on another host. The owner calls it from its thread: nothing here
/// may wait.
pub trait Asker: Send + Sync {
    /// Takes an answer.
    ///
    /// # Errors
    /// When it cannot be kept: the session fails alone.
    fn answer(&self, sequence: Sequence, verdict: &Verdict) -> Result<()>;
    /// There are no more answers, and why.
    fn fail(&self, error: &Error);
    /// A pass has answered.
    fn answered(&self);
    /// Blocks were sealed or a session ended, for the `progress`th time.
    fn advanced(&self, progress: u64);
}

/// The owner of this host's part. Errors: the engine is ending.
pub trait Part: Send + Sync {
    /// A session asks from now on.
    fn register(&self, session: SessionId, asker: Arc<dyn Asker>) -> Result<()>;
    /// Asks about blocks.
    fn ask(&self, session: SessionId, asked: Vec<(Fingerprint, Sequence)>) -> Result<()>;
    /// Gives grants back.
    fn release(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()>;
    /// The session holds grants that another owner gave it.
    fn claim(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()>;
    /// The part is these slices from now on; what there is about others goes to `hand`.
    fn keep(&self, slices: Slices, hand: HandOver) -> Result<()>;
    /// Whether the session waits for nothing but answers.
    fn waiting(&self, session: SessionId, waiting: bool) -> Result<()>;
    /// A container is sealed and in the journal.
    fn learn(&self, entries: Vec<Entry>, position: JournalPosition) -> Result<()>;
    /// A session has ended.
    fn withdraw(&self, session: SessionId);
    /// Others may have said less than the journals do.
    fn refill(&self) -> Result<()>;
    /// Elsewhere blocks were sealed or a session ended.
    fn advanced(&self);
}
