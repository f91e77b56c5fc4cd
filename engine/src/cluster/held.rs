//! Questions that wait for something, in bounded memory.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::ids::{Fingerprint, Sequence, SessionId};
use crate::sort::Sorter;

/// Session, sequence (big endian both), fingerprint.
const RECORD: usize = 4 + 8 + Fingerprint::LEN;
/// More goes to a file without a name.
const MEMORY: usize = 64 << 10;
/// Questions that are given out together.
const BATCH: usize = 2048;

/// Questions of sessions, in no order.
pub(super) struct Held {
    dir: PathBuf,
    questions: Sorter<RECORD>,
}

impl Held {
    pub(super) fn new(dir: &Path) -> Self {
        Held { dir: dir.into(), questions: Sorter::new(dir, MEMORY) }
    }

    pub(super) fn push(
        &mut self,
        session: SessionId,
        asked: &[(Fingerprint, Sequence)],
    ) -> Result<()> {
        for (fingerprint, sequence) in asked {
            let mut record = [0; RECORD];
            record[..4].copy_from_slice(&session.0.to_be_bytes());
            record[4..12].copy_from_slice(&sequence.0.to_be_bytes());
            record[12..].copy_from_slice(&fingerprint.0);
            self.questions.push(&record)?;
        }
        Ok(())
    }

    /// All of them, to be worked through without this.
    pub(super) fn take(&mut self) -> Self {
        let fresh = Held::new(&self.dir);
        std::mem::replace(self, fresh)
    }

    /// Gives all to `each`, some of one session at a time, by ascending sequence.
    pub(super) fn each(
        self,
        mut each: impl FnMut(SessionId, Vec<(Fingerprint, Sequence)>) -> Result<()>,
    ) -> Result<()> {
        let mut sorted = self.questions.finish()?;
        let mut batch = Vec::new();
        let mut of = SessionId::NOBODY;
        while let Some(record) = sorted.next()? {
            let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |n, &b| n << 8 | u64::from(b));
            let session = SessionId(number(&record[..4]) as u32);
            if (session != of || batch.len() == BATCH) && !batch.is_empty() {
                each(of, std::mem::take(&mut batch))?;
            }
            of = session;
            let mut fingerprint = [0; Fingerprint::LEN];
            fingerprint.copy_from_slice(&record[12..]);
            batch.push((Fingerprint(fingerprint), Sequence(number(&record[4..12]))));
        }
        if batch.is_empty() { Ok(()) } else { each(of, batch) }
    }
}
