//! What can go wrong in the plugin: a small kind to act on, a message for people, a source.

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
    /// Stored data is damaged: an authentication or a checksum failed.
    Damaged,
    /// The caller may not do that.
    NotPermitted,
    /// No engine answers.
    NoEngine,
    /// It answered, and its connection ended.
    EngineGone,
    /// The restore target exists, is too small, or contradicts the options.
    Target,
    /// Ctrl-C or SIGTERM; everything was undone.
    Interrupted,
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
            Kind::NoEngine | Kind::EngineGone => "no-engine",
            Kind::Target => "target",
            Kind::Interrupted => "interrupted",
        }
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
            Kind::NoEngine | Kind::EngineGone => 13,
            Kind::Target => 15,
            Kind::Interrupted => 130,
        }
    }
}

/// An error with its kind, what was being done to what, and the cause.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The plugin's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a cause of its own.
    pub fn new(kind: Kind, context: impl Into<String>) -> Self {
        Error { kind, context: context.into(), source: None }
    }

    /// An error that something else caused.
    pub fn caused(
        kind: Kind,
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error { kind, context: context.into(), source: Some(source.into()) }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether an error of that type is beneath it.
    #[must_use]
    pub fn has_cause<E: std::error::Error + 'static>(&self) -> bool {
        self.cause::<E>().is_some()
    }

    /// The error of that type that is beneath it.
    #[must_use]
    pub fn cause<E: std::error::Error + 'static>(&self) -> Option<&E> {
        let cause = std::error::Error::source(self);
        let mut chain = std::iter::successors(cause, |cause| cause.source());
        chain.find_map(|cause| cause.downcast_ref::<E>())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        let mut source = self.source.as_deref().map(|s| s as &dyn std::error::Error);
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            // Our own errors print their whole chain.
            source = if cause.is::<Error>() { None } else { cause.source() };
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

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

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_cause_is_found_beneath_what_was_added_on_its_way() {
        let failed: io::Result<()> = Err(io::Error::other("a bad sector"));
        let read = failed.context(|| "reading".to_owned()).context(|| "a backup".to_owned());
        let error = read.unwrap_err();
        assert_eq!(error.to_string(), "a backup: reading: a bad sector");
        assert!(error.has_cause::<io::Error>());
        assert!(error.cause::<io::Error>().is_some_and(|e| e.to_string() == "a bad sector"));
        assert!(!error.has_cause::<fmt::Error>());
        assert!(!Error::new(Kind::NoEngine, "gone").has_cause::<io::Error>());
    }
}
