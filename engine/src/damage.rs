//! What is known to be damaged, for all sessions and jobs of the engine.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;

use crate::store::Store;
use crate::store::container::Directories;
use crate::store::damage::{DamageMap, Found};

/// The damage of a store, as its directories know it. One at a time changes it.
pub struct Damage {
    directories: Directories,
    changing: Mutex<()>,
}

impl Damage {
    /// Loads the store's marks; its directories know them from then on.
    ///
    /// # Errors
    /// When the marks cannot be listed.
    pub fn load(store: &Store) -> Result<Self> {
        let damage = Damage { directories: store.directories().clone(), changing: Mutex::new(()) };
        damage.reload(store)?;
        Ok(damage)
    }

    /// Loads the marks again, after a job that made some.
    ///
    /// # Errors
    /// When the marks cannot be listed.
    pub fn reload(&self, store: &Store) -> Result<()> {
        // Locked first, so that nothing recorded meanwhile is lost.
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.directories.set_damage(DamageMap::load(store.objects(), store.sealer())?);
        Ok(())
    }

    /// What is known now.
    #[must_use]
    pub fn map(&self) -> Arc<DamageMap> {
        self.directories.damage()
    }

    /// Records damage in the store: no session uses these slots any more.
    ///
    /// # Errors
    /// When a mark cannot be created.
    pub fn record(&self, store: &Store, found: &[Found]) -> Result<()> {
        if found.is_empty() {
            return Ok(());
        }
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut map = DamageMap::clone(&self.map());
        map.record(store, found, jiff::Timestamp::now().as_millisecond())?;
        Ok(())
    }

    /// Records damage that was met by `who`, who goes on whether that succeeds or not.
    pub fn met(&self, store: &Store, found: &[Found], who: &str) {
        if let Err(error) = self.record(store, found) {
            eprintln!("fleece-engine: damage met by {who} is not recorded: {error}");
        }
    }
}
