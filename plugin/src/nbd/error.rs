//! What can go wrong between us and an NBD server, and whose fault it likely is.

use std::fmt;

use super::wire::{self, errno};
use crate::error::{Error, Kind};

/// What a caller can do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NbdErrorKind {
    /// Nobody listens there, or we may not connect.
    Connect,
    /// The server did not greet or answer in time. QEMU does not greet when all its
    /// connections are taken.
    Timeout,
    /// No such export.
    NoSuchExport,
    /// The export lacks a meta context that was asked for (a dirty bitmap that is gone).
    NoContext,
    /// The server broke the protocol; the connection was given up.
    Protocol,
    /// The server hung up, or is shutting down.
    Disconnected,
    /// The point-in-time view behind the export is gone (ENOTSUP on a request that was right, or
    /// EINVAL: so QEMU sends its EACCES, for which NBD has no number): the scratch image was full,
    /// or the guest's writes were too slow.
    ViewBroken,
    /// The server tried and failed, with this errno.
    Io(u32),
    /// The export is read-only, or lacks a command.
    Refused,
    /// The request goes past the disk, or is larger than a request may be.
    Usage,
}

/// An error with the export and what was asked of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdError {
    kind: NbdErrorKind,
    message: String,
}

impl NbdError {
    /// `place` names the export and its server, `message` what went wrong there.
    pub(crate) fn new(kind: NbdErrorKind, place: &str, message: impl fmt::Display) -> Self {
        NbdError { kind, message: format!("{place}: {message}") }
    }

    /// An error number that the server answered to `asked`.
    pub(crate) fn answered(place: &str, asked: &Asked, number: u32, said: &str) -> Self {
        let (kind, hint) = match number {
            errno::EINVAL | errno::ENOTSUP if asked.is_reading() => (
                NbdErrorKind::ViewBroken,
                "; the request was right, so the point-in-time view is gone: \
                 see whether the scratch image was full",
            ),
            errno::EPERM => (NbdErrorKind::Refused, "; the server does not permit it"),
            errno::ESHUTDOWN => (NbdErrorKind::Disconnected, "; the server is shutting down"),
            errno::ENOSPC => (NbdErrorKind::Io(number), "; the server's storage is full"),
            errno::EIO => (NbdErrorKind::Io(number), "; the storage behind the server fails"),
            _ => (NbdErrorKind::Io(number), ""),
        };
        let cause = std::io::Error::from_raw_os_error(number.min(i32::MAX as u32) as i32);
        let said = if said.is_empty() { String::new() } else { format!(", it says: {said}") };
        NbdError::new(kind, place, format_args!("{asked}: the server answers {cause}{said}{hint}"))
    }

    /// The server broke the protocol.
    pub(crate) fn protocol(place: &str, what: impl fmt::Display) -> Self {
        let message = format!("the server breaks the NBD protocol: {what}");
        NbdError::new(NbdErrorKind::Protocol, place, message)
    }

    /// What kind of error it is.
    #[must_use]
    pub fn kind(&self) -> NbdErrorKind {
        self.kind
    }

    /// Whether the point-in-time view behind the export is gone.
    #[must_use]
    pub fn is_view_broken(&self) -> bool {
        self.kind == NbdErrorKind::ViewBroken
    }
}

impl fmt::Display for NbdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for NbdError {}

impl From<NbdError> for Error {
    fn from(error: NbdError) -> Self {
        let kind = match error.kind {
            NbdErrorKind::NoSuchExport | NbdErrorKind::NoContext => Kind::NotFound,
            _ => Kind::Failed,
        };
        Error::new(kind, error.message)
    }
}

/// A request, for messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Asked {
    pub(crate) command: u16,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Asked {
    fn is_reading(&self) -> bool {
        matches!(self.command, wire::command::READ | wire::command::BLOCK_STATUS)
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.command {
            wire::command::READ => "read",
            wire::command::WRITE => "write",
            wire::command::FLUSH => return f.write_str("flush"),
            wire::command::TRIM => "trim",
            wire::command::WRITE_ZEROES => "write of zeros",
            wire::command::BLOCK_STATUS => "block status",
            _ => "request",
        };
        write!(f, "{verb} of {} bytes at offset {}", self.length, self.offset)
    }
}
