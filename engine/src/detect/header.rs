//! The header of a run: what it is of, so that a run of another store, another partition map or
//! another level is never taken for ours, whatever the file is named.

use super::Partition;
use super::Watermark;
use super::current::{Identity, Level, RunMeta};
use super::format::{Decoder, Encoder};

const MAGIC: &[u8; 8] = b"FLEECERN";
/// 2: entries in groups.
const VERSION: u16 = 2;

/// The header record of a run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) identity: Identity,
    pub(super) number: u64,
    pub(super) level: Level,
    pub(super) entries: u64,
    /// What the index has with this run.
    pub(super) watermark: Watermark,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let (level, partition) = match self.level {
            Level::Base(partition) => (0, partition.0),
            Level::Delta(partition) => (1, partition.0),
            Level::Young => (2, 0),
        };
        let mut encoder = Encoder::begin(MAGIC, VERSION);
        self.identity.encode(&mut encoder);
        encoder.u64(self.number);
        encoder.u8(level);
        encoder.u16(partition);
        encoder.u64(self.entries);
        encoder.watermark(&self.watermark);
        encoder.finish()
    }

    /// Reads a header; the error says what is wrong with it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut decoder = Decoder::begin(bytes, MAGIC, VERSION)?;
        let header = Self::decode_fields(&mut decoder).ok_or("is too short")?;
        if decoder.is_empty() { Ok(header) } else { Err("is too long".into()) }
    }

    fn decode_fields(decoder: &mut Decoder<'_>) -> Option<Self> {
        Some(Header {
            identity: Identity::decode(decoder)?,
            number: decoder.u64()?,
            level: match (decoder.u8()?, Partition(decoder.u16()?)) {
                (0, partition) => Level::Base(partition),
                (1, partition) => Level::Delta(partition),
                (2, _) => Level::Young,
                _ => return None,
            },
            entries: decoder.u64()?,
            watermark: decoder.watermark()?,
        })
    }

    /// Whether it is the header of that run. A run outlives a change of the part that the index is
    /// of: CURRENT alone says what the index is complete for.
    pub(super) fn fits(&self, identity: &Identity, run: &RunMeta) -> bool {
        let own = (self.number, self.level, self.entries);
        let identity = Identity { part: self.identity.part, ..*identity };
        self.identity == identity && own == (run.number, run.level, run.entries)
    }
}
