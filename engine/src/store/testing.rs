//! Stores in temporary directories, for tests.

use std::path::PathBuf;

use tempfile::TempDir;

use super::agreed::{self, StoreLevel};
use super::keys::StoreKey;
use super::manifest::Manifest;
use super::sessions::SessionRecord;
use super::{InitOptions, Location, Store, StoreOptions, names, objects_at};

/// A store as a Fleece made it to which this level was the newest.
pub(crate) fn init_at(location: &Location, options: &InitOptions, level: StoreLevel) -> StoreKey {
    let key = Store::init(location, options, |_| Ok(())).unwrap();
    let Location::Directory(path) = location else { panic!("{location} is no directory") };
    if level < StoreLevel::NEWEST {
        std::fs::remove_file(path.join(names::level(StoreLevel::NEWEST.0))).unwrap();
    }
    if level > StoreLevel::FIRST {
        let objects = objects_at(location, &std::env::temp_dir()).unwrap();
        let under = (&key, key.first(), options.encrypt);
        agreed::raise(&objects, under, level, options.now_ms).unwrap();
    }
    key
}

/// A store, its key and an engine's state, gone when dropped.
pub(crate) struct TestStore {
    pub(crate) store: Store,
    pub(crate) key_text: String,
    pub(crate) options: StoreOptions,
    pub(crate) dir: TempDir,
}

impl TestStore {
    pub(crate) fn new() -> Self {
        Self::with(&InitOptions::default(), StoreOptions::default())
    }

    pub(crate) fn with(init: &InitOptions, options: StoreOptions) -> Self {
        Self::at(StoreLevel::NEWEST, init, options)
    }

    pub(crate) fn at(level: StoreLevel, init: &InitOptions, options: StoreOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let location = Location::Directory(dir.path().join("store"));
        let key = init_at(&location, init, level);
        let key_text = key.to_text().to_string();
        let store =
            Store::open(&location, key, &dir.path().join("state"), options.clone()).unwrap();
        TestStore { store, key_text, options, dir }
    }

    pub(crate) fn path(&self, key: &str) -> PathBuf {
        self.dir.path().join("store").join(key)
    }

    /// Another handle on the same store, with caches of its own, to read.
    pub(crate) fn reader(&self) -> Store {
        let key = StoreKey::from_text(&self.key_text).unwrap();
        Store::open_to_read(self.store.location(), key, self.options.clone()).unwrap()
    }
}

/// What the session says of itself that a snapshot is made by.
pub(crate) fn session_of(of: &Manifest) -> SessionRecord {
    SessionRecord {
        snapshot: of.snapshot,
        vm: of.vm,
        vm_name: of.vm_name.clone(),
        seq: of.seq,
        parent: of.parent,
        host: "hv3".into(),
        engine: "0.1.0".into(),
        gc_epoch: 0,
        started_ms: 1,
        expires_ms: None,
    }
}
