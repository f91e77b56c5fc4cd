//! What can go wrong in the engine: a small kind to act on, a message for people, a source.

use std::fmt;

/// What a caller can do about an error; the exit codes of the README.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Failed; nothing committed.
    Failed,
    /// The request itself is wrong.
    Usage,
    /// There is no store, or it is not ours, or too new.
    NoStore,
    /// Someone else is at it.
    Busy,
    /// The key is missing, wrong, or does not belong to the store.
    Key,
    /// No such VM, snapshot, disk or object.
    NotFound,
    /// Stored data is damaged: an authentication or a checksum failed, or the disk cannot read it.
    Damaged,
    /// The caller may not do that.
    NotPermitted,
    /// No engine answers.
    NoEngine,
    /// The place that a restore goes to cannot take it.
    Target,
}

impl Kind {
    /// The word that stands for the kind in an RPC error.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Kind::Failed => "failed",
            Kind::Usage => "usage",
            Kind::NoStore => "no-store",
            Kind::Busy => "busy",
            Kind::Key => "key",
            Kind::NotFound => "not-found",
            Kind::Damaged => "damaged",
            Kind::NotPermitted => "not-permitted",
            Kind::NoEngine => "no-engine",
            Kind::Target => "target",
        }
    }

    /// The kind that a word stands for.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        const ALL: [Kind; 10] = [
            Kind::Failed,
            Kind::Usage,
            Kind::NoStore,
            Kind::Busy,
            Kind::Key,
            Kind::NotFound,
            Kind::Damaged,
            Kind::NotPermitted,
            Kind::NoEngine,
            Kind::Target,
        ];
        ALL.into_iter().find(|kind| kind.word() == word)
    }

    /// The process's exit code.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Failed => 1,
            Kind::Usage => 2,
            Kind::NoStore => 10,
            Kind::Busy => 11,
            Kind::Key => 12,
            Kind::NotFound => 14,
            Kind::Damaged => 16,
            Kind::NotPermitted => 17,
            Kind::NoEngine => 13,
            Kind::Target => 15,
        }
    }
}

/// An error with its kind, what was being done to what, and the cause.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    /// A local disk was full.
    disk_full: bool,
}

/// The engine's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a cause of its own.
    pub fn new(kind: Kind, context: impl Into<String>) -> Self {
        Error { kind, context: context.into(), source: None, disk_full: false }
    }

    /// An error that something else caused.
    pub fn caused(
        kind: Kind,
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let source = source.into();
        let disk_full = is_full(&*source);
        Error { kind, context: context.into(), source: Some(source), disk_full }
    }

    /// It is of the store: a full disk is not this host's.
    #[must_use]
    pub fn of_the_store(self) -> Self {
        Error { disk_full: false, ..self }
    }

    /// Whether a disk of this host was full.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        self.disk_full
    }

    /// The same without its source, for others who are told, too.
    #[must_use]
    pub fn retold(&self) -> Self {
        let context = self.to_string();
        Error { kind: self.kind, context, source: None, disk_full: self.disk_full }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

/// Whether a disk cannot read what is there (EIO): a bad sector, mostly.
pub(crate) fn is_unreadable(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// Whether a cause is that a disk is full.
fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    if let Some(ours) = error.downcast_ref::<Error>() {
        return ours.disk_full;
    }
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|io| matches!(io.kind(), StorageFull | QuotaExceeded))
        || error.source().is_some_and(is_full)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = self.context.clone();
        let mut source = self.source.as_deref().map(|s| s as &dyn std::error::Error);
        while let Some(cause) = source {
            // Some libraries' errors say their causes, too.
            let text = cause.to_string();
            if !told.ends_with(&text) {
                told += ": ";
                told += &text;
            }
            // Our own errors print their whole chain.
            source = if cause.is::<Error>() { None } else { cause.source() };
        }
        f.write_str(&told)
    }
}

impl std::error::Error for Error {}

/// Adds what was being done to an error on its way up.
pub trait Context<T> {
    /// Wraps the error; one of our own keeps its kind, any other becomes [`Kind::Failed`].
    fn context(self, describe: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E> Context<T> for std::result::Result<T, E>
where
    E: std::error::Error + Send + Sync + 'static,
{
    fn context(self, describe: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| {
            let any: &(dyn std::error::Error + 'static) = &error;
            let kind = any.downcast_ref::<Error>().map_or(Kind::Failed, Error::kind);
            Error::caused(kind, describe(), error)
        })
    }
}
