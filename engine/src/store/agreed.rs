//! What all engines of a store go by, whatever their versions: its level, and the encryption key for what
//! is new.
//!
//! A format that is new is written only once every host knows it. Until then the store stays at its
//! level, which `fleecectl upgrade --finalize` raises when all hosts say that they know the next one: by an
//! object of that level's name, created once. The highest counts; a store without any is at the first.
//! `fleecectl key rotate --use` likewise has them go over to a key that all have, by an object of its number
//! that is sealed under it. Body of both: `A`, version 1, JSON.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::format::{Header, KeyId, ObjectKind, SEALED_MAX, Sealer, Under, damaged, seal_under};
use super::keys::StoreKey;
use super::objects::Objects;
use super::{Location, names};
use crate::error::{Error, Kind, Result};

const MAGIC: [u8; 2] = *b"A\x01";

/// Which formats may be in a store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct StoreLevel(pub u32);

impl StoreLevel {
    /// Of a store that was never raised.
    pub const FIRST: Self = StoreLevel(1);
    /// There may be further encryption keys.
    pub const KEYS: Self = StoreLevel(2);
    /// The fingerprints of a container of blocks may be in its directory's own object alone.
    pub const COLUMN_APART: Self = StoreLevel(3);
    /// The newest that this program knows. New stores begin with it: no older engine has them.
    pub const NEWEST: Self = Self::COLUMN_APART;
}

impl Default for StoreLevel {
    /// What an engine means that says nothing of levels.
    fn default() -> Self {
        Self::FIRST
    }
}

impl fmt::Display for StoreLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What all engines of a store go by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Agreed {
    /// The formats that may be in it.
    pub level: StoreLevel,
    /// The encryption key for what is new.
    pub key: KeyId,
}

impl Agreed {
    /// What engines go by in a store where nothing was changed.
    pub(super) fn at_first(key: &StoreKey) -> Self {
        Agreed { level: StoreLevel::FIRST, key: key.first() }
    }

    /// What they go by now, by one listing; `known`: some time before. It never goes back: a directory that
    /// is unmounted looks like a store in which nothing was ever changed.
    ///
    /// # Errors
    /// [`Kind::NoStore`] for a level that this program does not know, [`Kind::Key`] where a key of ours is
    /// another one than that in use, [`Kind::Damaged`].
    pub(super) fn read(
        objects: &Objects,
        sealer: &Sealer,
        location: &Location,
        known: Self,
    ) -> Result<Self> {
        let mut read = known;
        objects.list(names::AGREED, |name, _| {
            if let Some(level) = names::parse_number(names::LEVEL, name) {
                read.level = read.level.max(StoreLevel(level));
            }
            if let Some(id) = names::parse_number(names::KEY_IN_USE, name) {
                read.key = read.key.max(KeyId(id));
            }
            Ok(())
        })?;
        if read.level > StoreLevel::NEWEST {
            let (version, newest) = (env!("CARGO_PKG_VERSION"), StoreLevel::NEWEST);
            let what = format!("the store at {location} is at level {}", read.level);
            let what = format!("{what}, and this Fleece ({version}) knows levels up to {newest}");
            return Err(Error::new(Kind::NoStore, format!("{what}: upgrade it")));
        }
        // Without its key nothing that was made since can be read.
        if !sealer.key().has(read.key) {
            return Ok(read);
        }
        if read.key > known.key {
            let name = names::key_in_use(read.key.0);
            let bytes = objects.read_all(&name, SEALED_MAX)?;
            opens(&bytes, sealer, ObjectKind::KeyInUse, &name)
                .map_err(|error| is_another_key(read.key, error))?;
        }
        if read.level > known.level {
            check(objects, sealer, ObjectKind::Level, &names::level(read.level.0))?;
        }
        Ok(read)
    }

    /// Makes sure that a key has the encryption key for what is new.
    pub(super) fn must_be_had_by(&self, key: &StoreKey, location: &Location) -> Result<()> {
        match key.has(self.key) {
            true => Ok(()),
            false => Err(key.lacks(self.key, &format!("the store at {location}"))),
        }
    }
}

/// Makes sure that an object was made by an engine of this store.
pub(crate) fn check(
    objects: &Objects,
    sealer: &Sealer,
    kind: ObjectKind,
    name: &str,
) -> Result<()> {
    opens(&objects.read_all(name, SEALED_MAX)?, sealer, kind, name)
}

fn opens(bytes: &[u8], sealer: &Sealer, kind: ObjectKind, name: &str) -> Result<()> {
    Since::decode(&sealer.open(kind, name, bytes)?, name)?;
    let id = Header::decode(bytes, name)?.key_id;
    if kind == ObjectKind::KeyInUse && names::key_in_use(id.0) != name {
        return Err(damaged(name, "it is sealed under another key than it names"));
    }
    Ok(())
}

/// With another key of the number in use all that is good would be taken for damaged.
fn is_another_key(id: KeyId, error: Error) -> Error {
    if error.kind() != Kind::Damaged {
        return error;
    }
    let what = format!("this host's encryption key {} is another one than the store's", id.0);
    let hint = "take the key file of a host that works; if none does, that object is damaged";
    Error::caused(Kind::Key, format!("{what} ({hint})"), error)
}

/// What an object says that changes what engines go by; its name says the rest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Since {
    /// When it was made, Unix milliseconds.
    pub(super) made_ms: i64,
    /// By which version.
    pub(super) version: String,
}

impl Since {
    fn now(made_ms: i64) -> Self {
        Since { made_ms, version: env!("CARGO_PKG_VERSION").into() }
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let mut body = MAGIC.to_vec();
        serde_json::to_writer(&mut body, self)
            .map_err(|error| Error::caused(Kind::Failed, "cannot encode an agreement", error))?;
        Ok(body)
    }

    pub(super) fn decode(body: &[u8], name: &str) -> Result<Self> {
        let text = body.strip_prefix(&MAGIC).ok_or_else(|| {
            Error::new(Kind::Damaged, format!("object {name} is no agreement of this version"))
        })?;
        serde_json::from_slice(text).map_err(|error| {
            Error::caused(Kind::Damaged, format!("object {name} is no agreement"), error)
        })
    }
}

/// Raises a store to a level that all its engines know; who is second finds it done.
pub(super) fn raise(
    objects: &Objects,
    under: Under<'_>,
    level: StoreLevel,
    now_ms: i64,
) -> Result<()> {
    create(objects, under, (ObjectKind::Level, &names::level(level.0)), now_ms)
}

/// Makes an encryption key that all engines have the one for what is new: the object is under it.
pub(super) fn use_key(objects: &Objects, under: Under<'_>, now_ms: i64) -> Result<()> {
    let (_, KeyId(id), _) = under;
    create(objects, under, (ObjectKind::KeyInUse, &names::key_in_use(id)), now_ms)
}

fn create(
    objects: &Objects,
    under: Under<'_>,
    (kind, name): (ObjectKind, &str),
    now_ms: i64,
) -> Result<()> {
    let bytes = seal_under(under, kind, name, &Since::now(now_ms).encode()?)?;
    objects.create(name, bytes).map(drop)
}

/// The newest copy of the store's key under a passphrase; none: there is no copy.
pub(super) fn wrapped_key(objects: &Objects) -> Result<Option<bytes::Bytes>> {
    let mut newest = None;
    objects.list(names::WRAPPED_KEYS, |name, _| {
        newest = newest.max(names::parse_number(names::WRAPPED_KEYS, name));
        Ok(())
    })?;
    let name = newest.map_or_else(|| names::WRAPPED_KEY.to_owned(), names::wrapped_key);
    match objects.read_all(&name, SEALED_MAX) {
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        wrapped => wrapped.map(Some),
    }
}
