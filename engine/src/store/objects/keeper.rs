//! What takes objects away. Hosts create and read; only an engine whose configuration gives it the role of
//! the keeper gets this, and the store's own rights (a bucket's policy) can refuse it to all others.

use object_store::ObjectStoreExt;

use super::{Objects, failed, parse};
use crate::error::{Error, Kind, Result};

/// The objects of a store, for whoever may take some away.
pub struct Keeper<'o> {
    objects: &'o Objects,
}

impl Objects {
    /// The same objects for an engine that may take some away.
    #[must_use]
    pub fn of_keeper(self) -> Self {
        Objects { may_remove: true, ..self }
    }

    /// What takes objects away.
    ///
    /// # Errors
    /// [`Kind::NotPermitted`] on a host.
    pub fn keeper(&self) -> Result<Keeper<'_>> {
        if self.may_remove {
            return Ok(Keeper { objects: self });
        }
        let what = "this engine has the role of a host, which takes nothing away from the store";
        let how = "run it where engine.toml says role = \"keeper\"";
        Err(Error::new(Kind::NotPermitted, format!("{what}: {how}")))
    }
}

impl Keeper<'_> {
    /// Takes an object away; one that is gone already is no error.
    ///
    /// # Errors
    /// [`Kind::NotPermitted`] where the store does not let us; when it cannot be reached.
    pub fn remove(&self, key: &str) -> Result<()> {
        let path = parse(key)?;
        match self.objects.wait(self.objects.inner.store.delete(&path)) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed("take away object", key, error)),
        }
    }
}
