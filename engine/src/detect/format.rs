//! Reading and writing the fields of the index's own records: the header of a run, CURRENT.
//!
//! Both are: magic, version, fields, and a CRC-32C of all before it.

use uuid::Uuid;

use super::Watermark;
use crate::ids::{Incarnation, StoreId};

/// Appends fields, little endian.
#[derive(Default)]
pub(super) struct Encoder(Vec<u8>);

impl Encoder {
    pub(super) fn begin(magic: &[u8; 8], version: u16) -> Self {
        let mut encoder = Encoder(magic.to_vec());
        encoder.u16(version);
        encoder
    }

    pub(super) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn store(&mut self, store: StoreId) {
        self.0.extend(store.0.as_bytes());
    }

    pub(super) fn watermark(&mut self, watermark: &Watermark) {
        self.u32(watermark.iter().count() as u32);
        for (incarnation, n) in watermark.iter() {
            self.u32(incarnation.0);
            self.u64(n);
        }
    }

    /// Ends with the checksum.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let crc = crc32c::crc32c(&self.0);
        self.u32(crc);
        self.0
    }
}

/// Takes fields; `None` where the bytes end early.
pub(super) struct Decoder<'a>(&'a [u8]);

impl<'a> Decoder<'a> {
    /// Checks magic, checksum and version; the error says what is wrong.
    pub(super) fn begin(bytes: &'a [u8], magic: &[u8; 8], version: u16) -> Result<Self, String> {
        let Some(rest) = bytes.strip_prefix(magic) else {
            return Err("is not what it should be".into());
        };
        let Some((_, crc)) = bytes.split_last_chunk::<4>() else {
            return Err("is too short".into());
        };
        let Some((fields, _)) = rest.split_last_chunk::<4>() else {
            return Err("is too short".into());
        };
        let body = &bytes[..bytes.len() - 4];
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err("is damaged: its checksum is wrong".into());
        }
        let mut decoder = Decoder(fields);
        match decoder.u16() {
            Some(found) if found == version => Ok(decoder),
            Some(found) => Err(format!("has format version {found}, this engine knows {version}")),
            None => Err("is too short".into()),
        }
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.take().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn store(&mut self) -> Option<StoreId> {
        self.take().map(|bytes| StoreId(Uuid::from_bytes(bytes)))
    }

    pub(super) fn watermark(&mut self) -> Option<Watermark> {
        let mut watermark = Watermark::default();
        for _ in 0..self.u32()? {
            let incarnation = Incarnation(self.u32()?);
            watermark.raise(incarnation, self.u64()?);
        }
        Some(watermark)
    }

    /// Whether all was taken.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
