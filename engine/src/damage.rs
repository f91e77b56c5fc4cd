//! What is known to be damaged, for all sessions and jobs of the engine.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;

use crate::store::Store;
use crate::store::damage::{DamageMap, Found};

/// The damage of a store. The map is replaced as a whole: who reads one keeps it.
pub struct Damage {
    map: Mutex<Arc<DamageMap>>,
}

impl Damage {
    /// Loads the store's marks; its directories know them from then on.
    ///
    /// # Errors
    /// When the marks cannot be listed.
    pub fn load(store: &Store) -> Result<Self> {
        let map = DamageMap::load(store.objects(), store.sealer())?;
        map.apply(store.directories());
        Ok(Damage { map: Mutex::new(Arc::new(map)) })
    }

    /// Loads the marks again, after a job that made some.
    ///
    /// # Errors
    /// When the marks cannot be listed.
    pub fn reload(&self, store: &Store) -> Result<()> {
        // Locked first, so that nothing recorded meanwhile is lost.
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        *map = Damage::load(store)?.map();
        Ok(())
    }

    /// What is known now.
    #[must_use]
    pub fn map(&self) -> Arc<DamageMap> {
        Arc::clone(&self.map.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records damage in the store, then here: no session uses these slots any more.
    ///
    /// # Errors
    /// When a mark cannot be created.
    pub fn record(&self, store: &Store, found: &[Found]) -> Result<()> {
        if found.is_empty() {
            return Ok(());
        }
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = DamageMap::clone(&map);
        next.record(store, found, jiff::Timestamp::now().as_millisecond())?;
        *map = Arc::new(next);
        Ok(())
    }
}
