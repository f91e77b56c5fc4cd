//! Where a store is, what it shall be, and how much memory it may use.

use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::container;
pub use super::objects::s3::{Access, Bucket};
use crate::error::{Error, Kind, Result};

/// The default block size.
pub const BLOCK_SIZE: u32 = 4096;
/// Block sizes that a store can have: powers of two between these.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 4096..=65_536;

/// Where a store is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Location {
    /// A local directory, or one on storage that hosts share.
    Directory(PathBuf),
    /// A bucket of S3-compatible storage.
    Bucket(Bucket),
}

impl Location {
    /// Reads what a user wrote: a directory's path, or `s3://bucket/prefix`, which is reached
    /// by `access`.
    ///
    /// # Errors
    /// [`Kind::Usage`] for another kind of place.
    pub fn parse(text: &str, access: &Access) -> Result<Self> {
        match text.split_once("://") {
            Some(("file", path)) => Ok(Location::Directory(path.into())),
            Some(("s3", rest)) => {
                let bucket = Bucket::parse(rest)?;
                Ok(Location::Bucket(Bucket { access: access.clone(), ..bucket }))
            }
            Some((scheme, _)) => {
                let what = format!("a store at {scheme}:// is not supported");
                let how = "give a directory, or s3://bucket/prefix";
                Err(Error::new(Kind::Usage, format!("{what}: {how}")))
            }
            None if text.is_empty() => {
                Err(Error::new(Kind::Usage, "no place for the store is given"))
            }
            None => Ok(Location::Directory(text.into())),
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Location::Directory(path) => path.display().fmt(f),
            Location::Bucket(bucket) => bucket.fmt(f),
        }
    }
}

/// The store's share of the engine's memory, and what follows from it.
#[derive(Clone, Debug)]
pub struct StoreBudget {
    /// Threads that compress and encrypt.
    pub cpu_threads: usize,
    /// Frames of one packer that are on the pool at a time: each is 64 KiB, twice.
    pub frames_in_flight: usize,
    /// Slots of a container: the packer and the sealed container keep 20 bytes for each.
    pub container_slots: u32,
    /// Bytes of frames in a container.
    pub container_bytes: u32,
    /// Bytes of cached directories: frame tables and chunks of columns.
    pub directory_cache: usize,
    /// Bytes of cached decompressed frames.
    pub frame_cache: usize,
}

impl Default for StoreBudget {
    /// For the default memory budget of 32 MiB: with eight sessions that write, compression
    /// and frames stay within 3 MiB, open containers within 3 MiB, caches within 3 MiB.
    fn default() -> Self {
        StoreBudget {
            cpu_threads: 2,
            frames_in_flight: 2,
            container_slots: 16_384,
            container_bytes: container::CONTAINER_BYTES,
            directory_cache: 1536 << 10,
            frame_cache: 1536 << 10,
        }
    }
}

/// What an engine may do with the store's objects.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Create and read.
    #[default]
    Host,
    /// Take away what nobody needs, besides.
    Keeper,
}

/// How a store is used.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Its memory.
    pub budget: StoreBudget,
    /// zstd's level for new frames.
    pub compression: i32,
    /// What is allowed.
    pub role: Role,
}

impl Default for StoreOptions {
    fn default() -> Self {
        // Level 1: 390 MB/s per core, and a ratio within a few percent of level 3's.
        StoreOptions { budget: StoreBudget::default(), compression: 1, role: Role::Host }
    }
}

/// What a new store shall be.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// Bytes of a block, for ever.
    pub block_size: u32,
    /// Whether objects are encrypted; they are authenticated in any case.
    pub encrypt: bool,
    /// Stores of one domain have the same fingerprints where they share the secret.
    pub domain: String,
    /// A copy of the key under this goes into the store.
    pub passphrase: Option<String>,
    /// When, in Unix milliseconds.
    pub now_ms: i64,
}

impl Default for InitOptions {
    fn default() -> Self {
        InitOptions {
            block_size: BLOCK_SIZE,
            encrypt: true,
            domain: "default".into(),
            passphrase: None,
            now_ms: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_millis() as i64),
        }
    }
}

pub(super) fn is_block_size(size: u32) -> bool {
    size.is_power_of_two() && BLOCK_SIZES.contains(&size)
}
