//! What is known to be damaged, for all sessions and jobs of the engine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;

use crate::store::Store;
use crate::store::container::Directories;
use crate::store::damage::{DamageMap, Found, Marks};

/// The damage of a store, as its directories know it. One at a time changes it.
pub struct Damage {
    directories: Directories,
    /// The marks that were read last. Whoever changes what is known holds them.
    read: Mutex<Marks>,
}

impl Damage {
    /// Loads the store's marks; its directories know them from then on.
    ///
    /// # Errors
    /// When the marks cannot be listed or read.
    pub fn load(store: &Store) -> Result<Self> {
        let damage = Damage { directories: store.directories().clone(), read: Mutex::default() };
        damage.reload(store)?;
        Ok(damage)
    }

    fn read(&self) -> MutexGuard<'_, Marks> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads the marks again, after a job that made some.
    ///
    /// # Errors
    /// When the marks cannot be listed or read.
    pub fn reload(&self, store: &Store) -> Result<()> {
        // Locked first, so that nothing recorded meanwhile is lost.
        let mut read = self.read();
        let marks = Marks::list(store.objects())?;
        self.directories.set_damage(marks.read(store.objects(), store.sealer(), |_| true)?);
        *read = marks;
        Ok(())
    }

    /// Loads what other engines have marked since then: one listing where that is nothing.
    ///
    /// # Errors
    /// When the marks cannot be listed or read.
    pub fn refresh(&self, store: &Store) -> Result<()> {
        let mut read = self.read();
        let marks = Marks::list(store.objects())?;
        if marks == *read {
            return Ok(());
        }
        // All marks of a container: those that take others back count in their order.
        let news = marks.news(&read);
        let wanted = |container| news.contains(&container);
        let map = marks.read(store.objects(), store.sealer(), wanted)?;
        self.directories.change_damage(|known| known.replace(&news, map));
        *read = marks;
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
        let _changing = self.read();
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
