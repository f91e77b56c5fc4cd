//! The answer to a request.

use crate::ids::{Address, Sequence, SessionId};

/// What a session is told about one fingerprint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The index has it there; a hint to be checked against the container's directory.
    Stored(Address),
    /// Yours to write.
    Grant,
    /// The same as the block that this session (maybe the asking one) writes under this sequence.
    /// Ask again once your own writes are sealed.
    SameAs(SessionId, Sequence),
}
