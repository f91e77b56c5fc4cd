//! The store's header object: what every program must know before it touches anything else.

use serde::{Deserialize, Serialize};

use super::format::{self, HEADER_LEN, Header, ObjectKind, SEALED_MAX, damaged};
use super::keys::StoreKey;
use super::names;
use super::objects::{Created, Objects};
use super::options::{InitOptions, Location, is_block_size};
use crate::error::{Context, Error, Kind, Result};
use crate::ids::StoreId;

/// The store's header object: readable without the key, authenticated by it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StoreInfo {
    /// Its id.
    pub store: StoreId,
    /// Bytes of a block.
    pub block_size: u32,
    /// Whether its objects are encrypted.
    pub encrypted: bool,
    /// Unix milliseconds.
    pub created_ms: i64,
    /// The deduplication domain.
    pub domain: String,
    /// What a Fleece must know to read or write here.
    pub incompatible: Vec<String>,
    /// What a Fleece may ignore.
    pub compatible: Vec<String>,
    /// The encryption key's check value, in hex.
    key_check: String,
}

impl StoreInfo {
    /// Reads the header object, without a key.
    ///
    /// # Errors
    /// [`Kind::NoStore`] when there is none, something else is there, or a newer Fleece made it.
    pub fn read(objects: &Objects, location: &Location) -> Result<Self> {
        Ok(Self::read_bytes(objects, location)?.0)
    }

    fn read_bytes(objects: &Objects, location: &Location) -> Result<(Self, bytes::Bytes)> {
        let bytes = match objects.read_all(names::STORE, SEALED_MAX) {
            Err(error) if error.kind() == Kind::NotFound => {
                let what = format!("there is no Fleece store at {location}");
                return Err(Error::new(
                    Kind::NoStore,
                    format!("{what}: create it with `fleecectl init`"),
                ));
            }
            bytes => bytes?,
        };
        Ok((Self::decode(&bytes, location)?, bytes))
    }

    /// Reads the header object's bytes; not authenticated yet.
    pub(super) fn decode(bytes: &[u8], location: &Location) -> Result<Self> {
        let foreign = || format!("what is at {location} is not a usable Fleece store");
        let header = Header::decode(bytes, names::STORE)
            .map_err(|error| Error::caused(Kind::NoStore, foreign(), error))?;
        header.expect(ObjectKind::Store, header.store, names::STORE)?;
        let body =
            bytes.get(HEADER_LEN..bytes.len().saturating_sub(format::TAG_LEN)).unwrap_or_default();
        let info: StoreInfo = serde_json::from_slice(body).map_err(|error| {
            Error::caused(Kind::Damaged, "the store's header object is damaged", error)
        })?;
        if let Some(feature) = info.incompatible.first() {
            let what =
                format!("the store at {location} uses {feature}, which this Fleece does not know");
            return Err(Error::new(Kind::NoStore, format!("{what}: upgrade it")));
        }
        if info.store != header.store || !is_block_size(info.block_size) {
            return Err(damaged(names::STORE, "it contradicts itself"));
        }
        Ok(info)
    }

    /// Reads the header object and makes sure that `key` is this store's.
    ///
    /// # Errors
    /// As [`read`](Self::read); [`Kind::Key`] for another key, [`Kind::Damaged`].
    pub fn check(objects: &Objects, location: &Location, key: &StoreKey) -> Result<Self> {
        let (info, bytes) = Self::read_bytes(objects, location)?;
        if info.store != key.store() {
            let what =
                format!("the key is of the store {}, at {location} is {}", key.store(), info.store);
            return Err(Error::new(Kind::Key, format!("{what}: use that one's key file")));
        }
        let header = Header::decode(&bytes, names::STORE)?;
        if key.check_value(header.key_id).map(|check| hex(&check)) != Some(info.key_check.clone()) {
            let what =
                format!("the key is not that of the store at {location}, though it bears its name");
            return Err(Error::new(Kind::Key, format!("{what}: use the right key file")));
        }
        let cipher = key.cipher(&header, names::STORE)?;
        if format::open(&cipher, names::STORE, &bytes).is_none() || info.domain != key.domain() {
            return Err(damaged(names::STORE, "its authentication failed"));
        }
        Ok(info)
    }

    pub(super) fn create(
        objects: &Objects,
        key: &StoreKey,
        options: &InitOptions,
    ) -> Result<Created> {
        let check = key.check_value(key.first()).unwrap_or_default();
        let info = StoreInfo {
            store: key.store(),
            block_size: options.block_size,
            encrypted: options.encrypt,
            created_ms: options.now_ms,
            domain: key.domain().to_owned(),
            incompatible: Vec::new(),
            compatible: Vec::new(),
            key_check: hex(&check),
        };
        let body =
            serde_json::to_vec(&info).context(|| "cannot write the store's header".into())?;
        let under = (key, key.first(), false);
        objects.create(
            names::STORE,
            format::seal_under(under, ObjectKind::Store, names::STORE, &body)?,
        )
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
