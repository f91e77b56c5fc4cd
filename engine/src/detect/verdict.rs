//! The answer to a request, and the file in which a pass's answers wait until its grants are safe.

use std::path::PathBuf;

use super::records::{BUFFER, RecordFile, RecordWriter, take};
use crate::error::Result;
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

/// Session, sequence, kind, and an address or another session and sequence.
const RECORD: usize = 4 + 8 + 1 + 12;
const STORED: u8 = 1;
const GRANT: u8 = 2;
const SAME_AS: u8 = 3;

/// Collects the verdicts of a pass.
pub(super) struct VerdictSpool(RecordWriter<RECORD>);

impl VerdictSpool {
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        Ok(VerdictSpool(RecordWriter::create(path, BUFFER)?))
    }

    pub(super) fn push(
        &mut self,
        to: SessionId,
        sequence: Sequence,
        verdict: Verdict,
    ) -> Result<()> {
        let mut bytes = [0; RECORD];
        bytes[..4].copy_from_slice(&to.0.to_be_bytes());
        bytes[4..12].copy_from_slice(&sequence.0.to_be_bytes());
        bytes[12] = match verdict {
            Verdict::Stored(address) => {
                bytes[13..23].copy_from_slice(&address.to_bytes());
                STORED
            }
            Verdict::Grant => GRANT,
            Verdict::SameAs(session, sequence) => {
                bytes[13..17].copy_from_slice(&session.0.to_be_bytes());
                bytes[17..].copy_from_slice(&sequence.0.to_be_bytes());
                SAME_AS
            }
        };
        self.0.push(&bytes)
    }

    pub(super) fn finish(self) -> Result<SpooledVerdicts> {
        Ok(SpooledVerdicts(self.0.finish()?))
    }
}

/// The verdicts of a pass, in order of fingerprints.
pub(super) struct SpooledVerdicts(RecordFile);

impl SpooledVerdicts {
    /// Hands them out.
    pub(super) fn send(
        &self,
        answers: &mut dyn FnMut(SessionId, Sequence, Verdict) -> Result<()>,
    ) -> Result<()> {
        let mut reader = self.0.read::<RECORD>()?;
        while let Some(bytes) = reader.next()? {
            let verdict = match bytes[12] {
                STORED => Verdict::Stored(Address::from_bytes(take(&bytes[13..23]))),
                SAME_AS => Verdict::SameAs(
                    SessionId(u32::from_be_bytes(take(&bytes[13..17]))),
                    Sequence(u64::from_be_bytes(take(&bytes[17..]))),
                ),
                _ => Verdict::Grant,
            };
            let session = SessionId(u32::from_be_bytes(take(&bytes[..4])));
            answers(session, Sequence(u64::from_be_bytes(take(&bytes[4..12]))), verdict)?;
        }
        Ok(())
    }

    pub(super) fn remove(&self) {
        self.0.remove();
    }
}
