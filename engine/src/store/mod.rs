//! What is durable: objects, containers, recipes, manifests, journals, keys. Knows nothing of detection.

pub mod catalog;
pub mod commit;
#[cfg(test)]
mod commit_tests;
pub mod container;
pub mod damage;
pub mod format;
pub mod journal;
pub mod keys;
pub mod manifest;
pub mod names;
pub mod objects;
pub mod recipe;
pub mod sessions;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing;

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use self::container::Directories;
use self::container::codec::Codecs;
use self::format::{HEADER_LEN, Header, ObjectKind, SEALED_MAX, Sealer, damaged};
use self::journal::{Journal, Journals};
use self::keys::StoreKey;
use self::objects::{Created, Objects};
use crate::error::{Context, Error, Kind, Result};
use crate::fingerprint::Fingerprinter;
use crate::ids::StoreId;
use crate::pool::Pool;

/// The default block size.
pub const BLOCK_SIZE: u32 = 4096;
/// Block sizes that a store can have: powers of two between these.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 4096..=65_536;

/// Where a store is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Location {
    /// A local directory.
    Directory(PathBuf),
}

impl Location {
    /// Reads what a user wrote: a directory's path (later also `s3://…`).
    ///
    /// # Errors
    /// [`Kind::Usage`] for another kind of place.
    pub fn parse(text: &str) -> Result<Self> {
        match text.split_once("://") {
            Some(("file", path)) => Ok(Location::Directory(path.into())),
            Some((scheme, _)) => {
                let what = format!("a store at {scheme}:// is not supported by this version");
                Err(Error::new(Kind::Usage, format!("{what}: give a directory")))
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

/// How a store is used.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Its memory.
    pub budget: StoreBudget,
    /// zstd's level for new frames.
    pub compression: i32,
}

impl Default for StoreOptions {
    fn default() -> Self {
        // Level 1: 390 MB/s per core, and a ratio within a few percent of level 3's.
        StoreOptions { budget: StoreBudget::default(), compression: 1 }
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
        let foreign = || format!("what is at {location} is not a usable Fleece store");
        let header = Header::decode(&bytes, names::STORE)
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
        Ok((info, bytes))
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

    fn create(objects: &Objects, key: &StoreKey, options: &InitOptions) -> Result<Created> {
        let header = Header::new(ObjectKind::Store, false, key.current(), key.store())?;
        let check = key.check_value(key.current()).unwrap_or_default();
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
        let cipher = key.cipher(&header, names::STORE)?;
        objects.create(names::STORE, format::seal(&cipher, &header, names::STORE, &body)?)
    }
}

fn is_block_size(size: u32) -> bool {
    size.is_power_of_two() && BLOCK_SIZES.contains(&size)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Opens the objects at a location, which must exist.
///
/// # Errors
/// [`Kind::NoStore`].
pub fn objects_at(location: &Location) -> Result<Objects> {
    match location {
        Location::Directory(path) => Objects::local(path),
    }
}

/// A store that is open. A cheap handle; its calls block.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    location: Location,
    objects: Objects,
    sealer: Sealer,
    info: StoreInfo,
    fingerprinter: Fingerprinter,
    pool: Pool,
    codecs: Arc<Codecs>,
    directories: Directories,
    /// None where the store is only read.
    journal: Option<Journal>,
    budget: StoreBudget,
}

impl Store {
    /// Creates a store in an empty or new directory; its key must be kept by the caller
    /// (first durable elsewhere: `keep` is called with it before the store exists).
    ///
    /// # Errors
    /// [`Kind::Usage`] for a bad block size or a place that is taken; what `keep` says.
    pub fn init(
        location: &Location,
        options: &InitOptions,
        keep: impl FnOnce(&StoreKey) -> Result<()>,
    ) -> Result<StoreKey> {
        if !is_block_size(options.block_size) {
            let what = format!("a block size of {} is not possible", options.block_size);
            return Err(Error::new(
                Kind::Usage,
                format!("{what}: a power of two from 4K to 64K is"),
            ));
        }
        let key = StoreKey::generate(&options.domain)?;
        let Location::Directory(path) = location;
        make_directory(path, location)?;
        let objects = objects_at(location)?;
        keep(&key)?;
        if let Some(passphrase) = &options.passphrase {
            objects.create(names::WRAPPED_KEY, key.wrap(passphrase)?)?;
        }
        // The last step: a store exists once its header does.
        match StoreInfo::create(&objects, &key, options)? {
            Created::Ours => Ok(key),
            Created::Exists => Err(taken(location)),
        }
    }

    /// The store's key from the copy under a passphrase.
    ///
    /// # Errors
    /// [`Kind::Key`] when there is no copy or the passphrase is wrong; [`Kind::NoStore`].
    pub fn recover_key(location: &Location, passphrase: &str) -> Result<StoreKey> {
        let objects = objects_at(location)?;
        StoreInfo::read(&objects, location)?;
        let wrapped = match objects.read_all(names::WRAPPED_KEY, SEALED_MAX) {
            Err(error) if error.kind() == Kind::NotFound => {
                let what = format!("the store at {location} has no key under a passphrase");
                return Err(Error::new(
                    Kind::Key,
                    format!("{what}: use the key file or its paper copy"),
                ));
            }
            wrapped => wrapped?,
        };
        let key = StoreKey::unwrap(&wrapped, passphrase)?;
        StoreInfo::check(&objects, location, &key)?;
        Ok(key)
    }

    /// Opens a store for reading and writing, as the one engine of `state_dir`.
    ///
    /// # Errors
    /// [`Kind::NoStore`], [`Kind::Key`], [`Kind::Busy`], [`Kind::Damaged`].
    pub fn open(
        location: &Location,
        key: StoreKey,
        state_dir: &Path,
        options: StoreOptions,
    ) -> Result<Self> {
        Self::open_with(location, key, Some(state_dir), options)
    }

    /// Opens a store for reading: nothing can be packed.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_to_read(location: &Location, key: StoreKey, options: StoreOptions) -> Result<Self> {
        Self::open_with(location, key, None, options)
    }

    fn open_with(
        location: &Location,
        key: StoreKey,
        state_dir: Option<&Path>,
        options: StoreOptions,
    ) -> Result<Self> {
        let objects = objects_at(location)?;
        let info = StoreInfo::check(&objects, location, &key)?;
        let fingerprinter = key.fingerprinter(info.block_size);
        let sealer = Sealer::new(Arc::new(key), info.encrypted);
        let codecs = Arc::new(Codecs::new(options.compression));
        let budget = options.budget;
        let journals = Journals::new(objects.clone(), sealer.clone());
        let journal = state_dir.map(|state_dir| Journal::open(journals, state_dir)).transpose()?;
        let directories = Directories::new(
            objects.clone(),
            sealer.clone(),
            codecs.clone(),
            info.block_size,
            budget.directory_cache,
            budget.frame_cache,
        );
        let pool = Pool::new(budget.cpu_threads)?;
        let location = location.clone();
        let inner = Inner {
            location,
            objects,
            sealer,
            info,
            fingerprinter,
            pool,
            codecs,
            directories,
            journal,
            budget,
        };
        Ok(Store { inner: Arc::new(inner) })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> StoreId {
        self.inner.info.store
    }

    /// What its header object says.
    #[must_use]
    pub fn info(&self) -> &StoreInfo {
        &self.inner.info
    }

    /// Where it is.
    #[must_use]
    pub fn location(&self) -> &Location {
        &self.inner.location
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.inner.info.block_size
    }

    /// Whether its objects are encrypted.
    #[must_use]
    pub fn encrypted(&self) -> bool {
        self.inner.info.encrypted
    }

    /// Computes its blocks' fingerprints.
    #[must_use]
    pub fn fingerprinter(&self) -> &Fingerprinter {
        &self.inner.fingerprinter
    }

    /// Its objects.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.inner.objects
    }

    /// Seals and opens its small objects.
    #[must_use]
    pub fn sealer(&self) -> &Sealer {
        &self.inner.sealer
    }

    /// Its containers, to be read.
    #[must_use]
    pub fn directories(&self) -> &Directories {
        &self.inner.directories
    }

    /// The CPU pool.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.inner.pool
    }

    /// Its limits.
    #[must_use]
    pub fn budget(&self) -> &StoreBudget {
        &self.inner.budget
    }

    /// This engine's journal.
    ///
    /// # Errors
    /// [`Kind::NotPermitted`] where the store was opened to read.
    pub fn journal(&self) -> Result<&Journal> {
        let only_read = || Error::new(Kind::NotPermitted, "the store was opened to read only");
        self.inner.journal.as_ref().ok_or_else(only_read)
    }

    /// All engines' journals.
    #[must_use]
    pub fn journals(&self) -> Journals {
        Journals::new(self.inner.objects.clone(), self.inner.sealer.clone())
    }

    pub(crate) fn codecs(&self) -> &Codecs {
        &self.inner.codecs
    }

    /// Seals `plaintext` and creates the object of `kind` at `key`.
    ///
    /// # Errors
    /// As [`Objects::create`].
    pub fn create_sealed(&self, kind: ObjectKind, key: &str, plaintext: &[u8]) -> Result<Created> {
        self.inner.objects.create(key, self.inner.sealer.seal(kind, key, plaintext)?)
    }

    /// Reads and opens the small object of `kind` at `key`.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn read_sealed(&self, kind: ObjectKind, key: &str) -> Result<Vec<u8>> {
        self.inner.sealer.open(kind, key, &self.inner.objects.read_all(key, SEALED_MAX)?)
    }
}

fn taken(location: &Location) -> Error {
    Error::new(Kind::Usage, format!("there is a store at {location} already: choose another place"))
}

/// A directory for a store: new, or empty. Only its owner may read what will be there.
fn make_directory(path: &Path, location: &Location) -> Result<()> {
    let failed = || format!("cannot create a store at {location}");
    match fs::read_dir(path) {
        Ok(mut entries) => {
            let entry = entries.next().transpose().context(failed)?;
            match entry {
                None => {
                    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).context(failed)
                }
                Some(_) if path.join(names::STORE).exists() => Err(taken(location)),
                Some(entry) => {
                    let found = entry.file_name();
                    let what = format!("{location} is not empty ({})", found.display());
                    Err(Error::new(
                        Kind::Usage,
                        format!("{what}: a new store needs a directory of its own"),
                    ))
                }
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(path).context(failed)
        }
        Err(error) => Err(error).context(failed),
    }
}
