//! What all engines of a store go by, whatever their versions: its level.
//!
//! A format that is new is written only once every host knows it. Until then the store stays at its
//! level, which `fleecectl upgrade --finalize` raises when all hosts say that they know the next one: by an
//! object of that level's name, created once. The highest counts; a store without any is at the first.
//! Body: `A`, version 1, JSON.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::format::{ObjectKind, SEALED_MAX, Sealer, Under, seal_under};
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
    /// The newest that this program knows. New stores begin with it: no older engine has them.
    pub const NEWEST: Self = Self::KEYS;
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
}

impl Agreed {
    /// Reads it.
    ///
    /// # Errors
    /// [`Kind::NoStore`] for a level that this program does not know, [`Kind::Damaged`].
    pub(super) fn read(objects: &Objects, sealer: &Sealer, location: &Location) -> Result<Self> {
        let level = StoreLevel(highest(objects, names::LEVELS, names::parse_level)?);
        if level > StoreLevel::NEWEST {
            let (version, newest) = (env!("CARGO_PKG_VERSION"), StoreLevel::NEWEST);
            let what = format!(
                "the store at {location} is at level {level}, and this Fleece ({version}) knows levels up to {newest}"
            );
            return Err(Error::new(Kind::NoStore, format!("{what}: upgrade it")));
        }
        if level > StoreLevel::FIRST {
            check(objects, sealer, ObjectKind::Level, &names::level(level.0))?;
        }
        Ok(Agreed { level: level.max(StoreLevel::FIRST) })
    }
}

/// The highest number in the names of a folder's objects; 0 where there is none.
fn highest(objects: &Objects, folder: &str, number: impl Fn(&str) -> Option<u32>) -> Result<u32> {
    let mut highest = 0;
    objects.list(folder, |key, _| {
        highest = highest.max(number(key).unwrap_or(0));
        Ok(())
    })?;
    Ok(highest)
}

/// Makes sure that an object was made by an engine of this store.
pub(crate) fn check(
    objects: &Objects,
    sealer: &Sealer,
    kind: ObjectKind,
    name: &str,
) -> Result<()> {
    let bytes = objects.read_all(name, SEALED_MAX)?;
    Since::decode(&sealer.open(kind, name, &bytes)?, name).map(drop)
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
    let (kind, name) = (ObjectKind::Level, names::level(level.0));
    let bytes = seal_under(under, kind, &name, &Since::now(now_ms).encode()?)?;
    objects.create(&name, bytes).map(drop)
}
