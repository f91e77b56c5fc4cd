//! Objects in memory that can be replaced: for the fuzzer, which looks at many of one name.

use std::sync::Arc;

use bytes::Bytes;
use object_store::memory::InMemory;
use object_store::{ObjectStoreExt, PutPayload};

use super::{Objects, failed, parse};
use crate::error::Result;

impl Objects {
    /// No objects, in memory.
    pub(crate) fn in_memory() -> Result<Self> {
        Self::over(Arc::new(InMemory::new()), None, &std::env::temp_dir())
    }

    /// Puts an object in the place of whatever there is.
    pub(crate) fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let payload = PutPayload::from(Bytes::copy_from_slice(bytes));
        let path = parse(key)?;
        let put = self.inner.store.put(&path, payload);
        self.wait(put).map(drop).map_err(|error| failed("replace object", key, error))
    }
}
