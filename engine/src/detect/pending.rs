//! Open grants of a partition: a sorted run on disk, rewritten by every pass as a merge, so that
//! they take no memory however many they are.

use std::path::{Path, PathBuf};

use super::records::{BUFFER, RecordFile, RecordReader, RecordWriter, take};
use crate::error::Result;
use crate::ids::{Fingerprint, Sequence, SessionId};

const RECORD: usize = Fingerprint::LEN + 4 + 8;

/// A block that `session` was told to write, and has not yet been seen sealed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pending {
    pub(super) fingerprint: Fingerprint,
    pub(super) session: SessionId,
    pub(super) sequence: Sequence,
}

impl Pending {
    fn to_bytes(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[..20].copy_from_slice(&self.fingerprint.0);
        bytes[20..24].copy_from_slice(&self.session.0.to_be_bytes());
        bytes[24..].copy_from_slice(&self.sequence.0.to_be_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; RECORD]) -> Self {
        Pending {
            fingerprint: Fingerprint(take(&bytes[..20])),
            session: SessionId(u32::from_be_bytes(take(&bytes[20..24]))),
            sequence: Sequence(u64::from_be_bytes(take(&bytes[24..]))),
        }
    }
}

/// The pending run of a partition.
pub(super) struct PendingRun {
    dir: PathBuf,
    name: String,
    version: u64,
    run: Option<RecordFile>,
}

/// Reads a pending run in ascending order.
pub(super) struct PendingReader(Option<RecordReader<RECORD>>);

/// Writes the next version of a pending run in ascending order.
pub(super) struct PendingWriter(RecordWriter<RECORD>);

impl PendingRun {
    pub(super) fn new(dir: &Path, partition: u16) -> Self {
        Self::named(dir, format!("pending-{partition:03}"))
    }

    pub(super) fn named(dir: &Path, name: String) -> Self {
        PendingRun { dir: dir.into(), name, version: 0, run: None }
    }

    /// Open grants.
    pub(super) fn len(&self) -> u64 {
        self.run.as_ref().map_or(0, RecordFile::records)
    }

    pub(super) fn read(&self) -> Result<PendingReader> {
        Ok(PendingReader(self.run.as_ref().map(RecordFile::read).transpose()?))
    }

    pub(super) fn rewrite(&mut self) -> Result<PendingWriter> {
        self.version += 1;
        let path = self.dir.join(format!("{}-{:08}", self.name, self.version));
        Ok(PendingWriter(RecordWriter::create(path, BUFFER)?))
    }

    /// From here on the new version is the run.
    pub(super) fn replace(&mut self, run: RecordFile) {
        let old = if run.records() == 0 {
            run.remove();
            self.run.take()
        } else {
            self.run.replace(run)
        };
        if let Some(old) = old {
            old.remove();
        }
    }

    /// Gives a run up. If its grants are in no other one, their blocks may be granted twice.
    pub(super) fn forget(&mut self) {
        if let Some(run) = self.run.take() {
            run.remove();
        }
    }
}

impl PendingReader {
    #[allow(clippy::should_implement_trait)] // It can fail.
    pub(super) fn next(&mut self) -> Result<Option<Pending>> {
        let Some(reader) = &mut self.0 else { return Ok(None) };
        Ok(reader.next()?.map(|record| Pending::from_bytes(&record)))
    }
}

impl PendingWriter {
    pub(super) fn push(&mut self, pending: Pending) -> Result<()> {
        self.0.push(&pending.to_bytes())
    }

    /// The new version, for [`PendingRun::replace`].
    pub(super) fn finish(self) -> Result<RecordFile> {
        self.0.finish()
    }
}
