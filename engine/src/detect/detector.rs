//! The detector: what the detector thread owns and calls.

use std::path::Path;
use std::time::Instant;

use super::{DetectOptions, JournalPosition, Partition, Verdict, Watermark};
use crate::error::Result;
use crate::ids::{Address, Fingerprint, Sequence, SessionId};

/// What was found when the index was opened.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OpenReport {
    /// What the index has; the caller learns the journals' entries after it.
    pub watermark: Watermark,
    /// Why an existing index was set aside and an empty one begun, if it was.
    pub set_aside: Option<String>,
}

/// What a pass did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PassReport {
    /// Requests answered.
    pub requests: u64,
    /// Requests of ended sessions, skipped.
    pub skipped: u64,
    /// Answers `Stored`.
    pub stored: u64,
    /// Answers `Grant`.
    pub grants: u64,
    /// Answers `SameAs`.
    pub same: u64,
    /// Grants of the partition that are open now.
    pub pending: u64,
}

/// Detection on one host: request logs, index and pending grants of all its partitions.
pub struct Detector {
    options: DetectOptions,
}

/// A new index made of entries in any order, aside from the present one.
pub struct Rebuild {}

impl Detector {
    /// Opens the index in `dir` or begins one. A missing, damaged, foreign or outdated index is no
    /// error: it is set aside, and the caller learns the journals again from the watermark on.
    pub fn open(_dir: &Path, options: DetectOptions) -> Result<(Self, OpenReport)> {
        Ok((Detector { options }, OpenReport::default()))
    }

    /// Logs questions of `session`. Asking again under the same sequence is harmless.
    pub fn submit(
        &mut self,
        session: SessionId,
        requests: &[(Fingerprint, Sequence)],
    ) -> Result<()> {
        self.take_over(session, session, requests)
    }

    /// Logs questions of `to` that, where `from` still holds the grant, move the grant to `to`.
    /// They are answered by a pass like any other; where `from` holds nothing they are plain.
    pub fn take_over(
        &mut self,
        _from: SessionId,
        _to: SessionId,
        _requests: &[(Fingerprint, Sequence)],
    ) -> Result<()> {
        Ok(())
    }

    /// A session's end, whatever the end: its grants die, its logged requests are skipped.
    pub fn withdraw(&mut self, _session: SessionId) {}

    /// Takes in the blocks of a sealed container; sorts `entries` in place. `position` is the
    /// journal entry that has them (also with no entries, so that the journal has no gap).
    pub fn learn(
        &mut self,
        _entries: &mut [(Fingerprint, Address)],
        _position: JournalPosition,
    ) -> Result<()> {
        Ok(())
    }

    /// The partition whose log should be passed now: big enough, old enough, or any log at all if
    /// sessions wait for nothing else (`waiting`).
    pub fn due(&mut self, _now: Instant, _waiting: bool) -> Option<Partition> {
        None
    }

    /// Answers all requests in the log of `partition`. `live` tells which sessions are not ended.
    /// After an error the requests are still logged, and the pass can be repeated.
    pub fn pass(
        &mut self,
        _partition: Partition,
        _live: &dyn Fn(SessionId) -> bool,
        _answers: &mut dyn FnMut(SessionId, Sequence, Verdict) -> Result<()>,
    ) -> Result<PassReport> {
        Ok(PassReport::default())
    }

    /// One bounded step of merging, for the time between passes. False: nothing to do.
    pub fn maintain(&mut self) -> Result<bool> {
        Ok(false)
    }

    /// Makes all that was learned durable, so that a restart has nothing to refill.
    pub fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    /// Distinguishes this opening of the index from every other one.
    #[must_use]
    pub fn instance(&self) -> u64 {
        0
    }

    /// The partitions of this index.
    pub fn partitions(&self) -> impl Iterator<Item = Partition> + use<> {
        (0..self.options.partitions()).map(Partition)
    }

    /// Whose log `fingerprint` goes to.
    #[must_use]
    pub fn partition_of(&self, fingerprint: &Fingerprint) -> Partition {
        self.options.partition_of(fingerprint)
    }

    /// Entries of the index. A fingerprint learned twice counts twice until the two are merged.
    #[must_use]
    pub fn entries(&self) -> u64 {
        0
    }

    /// Fingerprints that were found stored under two addresses while merging.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        0
    }

    /// Bytes of the index's files.
    #[must_use]
    pub fn index_bytes(&self) -> u64 {
        0
    }

    /// What is durable in the index.
    #[must_use]
    pub fn watermark(&self) -> Watermark {
        Watermark::default()
    }

    /// All entries of `partition`, ascending, the newest address of each.
    pub fn export(
        &mut self,
        _partition: Partition,
        _each: &mut dyn FnMut(Fingerprint, Address) -> Result<()>,
    ) -> Result<()> {
        Ok(())
    }

    /// Looks ascending `fingerprints` up; calls `each` for every one in order.
    pub fn lookup(
        &mut self,
        _fingerprints: &[Fingerprint],
        _each: &mut dyn FnMut(Fingerprint, Option<Address>) -> Result<()>,
    ) -> Result<()> {
        Ok(())
    }

    /// Begins a new index beside the present one; until [`Detector::install`] no merge runs.
    pub fn rebuild(&mut self) -> Result<Rebuild> {
        Ok(Rebuild {})
    }

    /// Puts the new index in place of the present one, but for what was learned since
    /// [`Detector::rebuild`]. `watermark` is what was fed to it.
    pub fn install(&mut self, _rebuild: Rebuild, _watermark: &Watermark) -> Result<()> {
        Ok(())
    }
}

impl Rebuild {
    /// Adds entries in any order; of equal fingerprints the one fed last wins.
    pub fn feed(&mut self, _entries: &[(Fingerprint, Address)]) -> Result<()> {
        Ok(())
    }
}
