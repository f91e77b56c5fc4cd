//! Stores in temporary directories, for tests.

use std::path::PathBuf;

use tempfile::TempDir;

use super::manifest::Manifest;
use super::sessions::SessionRecord;
use super::{InitOptions, Location, Store, StoreOptions};

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
        let dir = tempfile::tempdir().unwrap();
        let location = Location::Directory(dir.path().join("store"));
        let key = Store::init(&location, init, |_| Ok(())).unwrap();
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
        let key = super::keys::StoreKey::from_text(&self.key_text).unwrap();
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
