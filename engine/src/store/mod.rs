//! What is durable: objects, containers, recipes, manifests, journals, keys. Knows nothing of detection.

mod agreed;
pub mod catalog;
pub mod commit;
#[cfg(test)]
mod commit_tests;
pub mod container;
pub mod damage;
pub mod format;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod info;
pub mod journal;
pub mod keys;
pub mod manifest;
pub mod names;
pub mod objects;
mod options;
pub mod recipe;
pub mod sessions;
pub mod shards;
mod staging;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing;

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

pub use self::agreed::{Agreed, StoreLevel};
pub use self::info::StoreInfo;
pub use self::options::{
    Access, BLOCK_SIZE, Bucket, InitOptions, Location, Role, StoreBudget, StoreOptions,
};

use self::container::Directories;
use self::container::codec::Codecs;
use self::format::{ObjectKind, SEALED_MAX, Sealer};
use self::journal::{Journal, Journals};
use self::keys::StoreKey;
use self::objects::{Created, Objects};
use crate::error::{Context, Error, Kind, Result};
use crate::fingerprint::Fingerprinter;
use crate::ids::StoreId;
use crate::pool::Pool;

/// Opens the objects at a location, which must exist. What is to be sent across a network is staged
/// in `staging`.
///
/// # Errors
/// [`Kind::NoStore`]; [`Kind::Key`] when a bucket's credentials cannot be used.
pub fn objects_at(location: &Location, staging: &Path) -> Result<Objects> {
    match location {
        Location::Directory(path) => Objects::local(path),
        Location::Bucket(bucket) => Objects::in_bucket(bucket, staging),
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
    agreed: Mutex<Agreed>,
    pool: Pool,
    codecs: Arc<Codecs>,
    directories: Directories,
    /// None where the store is only read.
    journal: Option<Journal>,
    budget: StoreBudget,
    /// What registers us as a writer of a local directory.
    _writer: Option<fs::File>,
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
        if !options::is_block_size(options.block_size) {
            let what = format!("a block size of {} is not possible", options.block_size);
            return Err(Error::new(
                Kind::Usage,
                format!("{what}: a power of two from 4K to 64K is"),
            ));
        }
        let key = StoreKey::generate(&options.domain)?;
        if let Location::Directory(path) = location {
            make_directory(path, location)?;
        }
        let objects = objects_at(location, &std::env::temp_dir())?;
        make_sure_that_nothing_is_there(&objects, location)?;
        make_sure_that_nothing_is_overwritten(&objects, location)?;
        keep(&key)?;
        if let Some(passphrase) = &options.passphrase {
            objects.create(names::WRAPPED_KEY, key.wrap(passphrase)?)?;
        }
        let under = (&key, key.first(), options.encrypt);
        agreed::raise(&objects, under, StoreLevel::NEWEST, options.now_ms)?;
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
    pub fn recover_key(location: &Location, passphrase: &str) -> Result<Arc<StoreKey>> {
        let objects = objects_at(location, &std::env::temp_dir())?;
        StoreInfo::read(&objects, location)?;
        let wrapped = agreed::wrapped_key(&objects)?.ok_or_else(|| {
            let what = format!("the store at {location} has no key under a passphrase");
            Error::new(Kind::Key, format!("{what}: use the key file or its paper copy"))
        })?;
        let key = Arc::new(StoreKey::unwrap(&wrapped, passphrase)?);
        look(&objects, location, Arc::clone(&key))?;
        Ok(key)
    }

    /// Puts a copy of the store's key under a passphrase into the store, for [`recover_key`](Self::recover_key).
    ///
    /// # Errors
    /// [`Kind::Usage`] when there is another one of that number; the store's.
    pub fn keep_key(location: &Location, key: &StoreKey, passphrase: &str) -> Result<()> {
        let objects = objects_at(location, &std::env::temp_dir())?;
        let newest = key.newest().0;
        match objects.create(&names::wrapped_key(newest), key.wrap(passphrase)?)? {
            Created::Ours => Ok(()),
            Created::Exists => {
                let name = names::wrapped_key(newest);
                let there = objects.read_all(&name, SEALED_MAX)?;
                let same = StoreKey::unwrap(&there, passphrase).is_ok_and(|there| there == *key);
                if same {
                    return Ok(());
                }
                let what = format!(
                    "the store's copy {name} is under another passphrase, or of another key {newest}"
                );
                let hint =
                    "look with fleecectl key export --passphrase-file, delete it if it is no good";
                Err(Error::new(Kind::Usage, format!("{what}: {hint}")))
            }
        }
    }

    /// Makes sure that a key opens all that is and will be in a store; what its engines go by.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn check_key(location: &Location, key: Arc<StoreKey>) -> Result<Agreed> {
        let objects = objects_at(location, &std::env::temp_dir())?;
        let (_, sealer, agreed) = look(&objects, location, key)?;
        agreed.must_be_had_by(&sealer.key(), location)?;
        Ok(agreed)
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
        let anywhere = std::env::temp_dir();
        let objects = objects_at(location, state_dir.unwrap_or(&anywhere))?;
        Self::open_objects(objects, location, key, state_dir, options)
    }

    /// The same over objects that are open; without `state_dir` only to read.
    pub(crate) fn open_objects(
        objects: Objects,
        location: &Location,
        key: StoreKey,
        state_dir: Option<&Path>,
        options: StoreOptions,
    ) -> Result<Self> {
        let objects = match options.role {
            Role::Host => objects,
            Role::Keeper => objects.of_keeper(),
        };
        let (info, sealer, agreed) = look(&objects, location, Arc::new(key))?;
        agreed.must_be_had_by(&sealer.key(), location)?;
        sealer.use_key(agreed.key);
        let fingerprinter = sealer.key().fingerprinter(info.block_size);
        let codecs = Arc::new(Codecs::new(options.compression));
        let budget = options.budget;
        let journals = Journals::new(objects.clone(), sealer.clone());
        if state_dir.is_some() {
            make_sure_that_nothing_is_overwritten(&objects, location)?;
        }
        let writer = if state_dir.is_some() { objects.join_writers()? } else { None };
        let journal = state_dir.map(|state_dir| Journal::open(journals, state_dir)).transpose()?;
        let directories = Directories::new(
            objects.clone(),
            sealer.clone(),
            codecs.clone(),
            info.block_size,
            budget.directory_cache,
            budget.frame_cache,
        );
        directories.set_damage(damage::DamageMap::load(&objects, &sealer)?);
        let pool = Pool::new(budget.cpu_threads)?;
        let location = location.clone();
        let inner = Inner {
            location,
            objects,
            sealer,
            info,
            fingerprinter,
            agreed: Mutex::new(agreed),
            pool,
            codecs,
            directories,
            journal,
            budget,
            _writer: writer,
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

    /// What its engines go by, as far as this one has seen.
    #[must_use]
    pub fn agreed(&self) -> Agreed {
        *self.inner.agreed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks what its engines go by now, and goes by it, too.
    ///
    /// # Errors
    /// As [`open`](Self::open): this engine cannot go on then, unless it could not look at all.
    pub fn follow(&self) -> Result<Agreed> {
        let Inner { objects, sealer, location, .. } = &*self.inner;
        let read = Agreed::read(objects, sealer, location, self.agreed())?;
        read.must_be_had_by(&sealer.key(), location)?;
        let mut agreed = self.inner.agreed.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have looked meanwhile.
        *agreed = Agreed { level: agreed.level.max(read.level), key: agreed.key.max(read.key) };
        sealer.use_key(agreed.key);
        Ok(*agreed)
    }

    /// Takes a key file that has further encryption keys, so that they are known before they are used.
    ///
    /// # Errors
    /// [`Kind::Key`] when it lacks something of the present one that is in use.
    pub fn take_key(&self, key: StoreKey) -> Result<()> {
        let sealer = &self.inner.sealer;
        if *sealer.key() == key || sealer.take(key) {
            return Ok(());
        }
        let what = "the key file was changed, and lacks what is in use: put the newest one there";
        Err(Error::new(Kind::Key, what))
    }

    /// Makes sure that what changed the engines' agreement was made by one of them.
    ///
    /// # Errors
    /// [`Kind::Damaged`].
    pub(crate) fn check_agreed(&self, kind: ObjectKind, name: &str) -> Result<()> {
        agreed::check(&self.inner.objects, &self.inner.sealer, kind, name)
    }

    /// Raises it to a level that every engine of it knows.
    ///
    /// # Errors
    /// As [`Objects::create`], and as [`follow`](Self::follow).
    pub fn raise(&self, level: StoreLevel, now_ms: i64) -> Result<Agreed> {
        let Inner { objects, sealer, info, .. } = &*self.inner;
        let under = (&*sealer.key(), sealer.current(), info.encrypted);
        agreed::raise(objects, under, level, now_ms)?;
        self.follow()
    }

    /// Has all its engines, each of which has it, seal what is new under the newest encryption key of `key`.
    ///
    /// # Errors
    /// As [`Objects::create`], and as [`follow`](Self::follow).
    pub fn use_newest_of(&self, key: &StoreKey, now_ms: i64) -> Result<Agreed> {
        let Inner { objects, info, .. } = &*self.inner;
        agreed::use_key(objects, (key, key.newest(), info.encrypted), now_ms)?;
        self.follow()
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

/// The first look into a store, before anything is touched: whether its key, its format and its level are
/// known here. The key may lack the encryption key for what is new.
fn look(
    objects: &Objects,
    location: &Location,
    key: Arc<StoreKey>,
) -> Result<(StoreInfo, Sealer, Agreed)> {
    let info = StoreInfo::check(objects, location, &key)?;
    let sealer = Sealer::new(key, info.encrypted);
    let agreed = Agreed::read(objects, &sealer, location, Agreed::at_first(&sealer.key()))?;
    Ok((info, sealer, agreed))
}

fn taken(location: &Location) -> Error {
    Error::new(Kind::Usage, format!("there is a store at {location} already: choose another place"))
}

/// A bucket's folder for a store must be empty, too. The first request says whether it can be used.
fn make_sure_that_nothing_is_there(objects: &Objects, location: &Location) -> Result<()> {
    if matches!(location, Location::Directory(_)) {
        return Ok(());
    }
    let failed = || format!("cannot use {location}");
    if objects.exists(names::STORE).context(failed)? {
        return Err(taken(location));
    }
    let mut found = None;
    let listed = objects.list("", |key, _| {
        if key == names::PROBE {
            return Ok(()); // Of an init that failed.
        }
        found = Some(key.to_owned());
        Err(Error::new(Kind::Usage, "one is enough"))
    });
    match found {
        Some(key) => {
            let what = format!("{location} is not empty ({key})");
            Err(Error::new(Kind::Usage, format!("{what}: a new store needs a folder of its own")))
        }
        None => listed.context(failed),
    }
}

/// Directories are ours to know; of a bucket's server it must be seen.
fn make_sure_that_nothing_is_overwritten(objects: &Objects, location: &Location) -> Result<()> {
    match location {
        Location::Directory(_) => Ok(()),
        Location::Bucket(_) => {
            objects.must_keep_what_is_there().context(|| format!("cannot use {location}"))
        }
    }
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
