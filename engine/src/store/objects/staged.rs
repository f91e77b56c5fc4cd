//! Bytes on their way to a store across a network: in a file without a name, sent from where they
//! are. What is in such a file is encrypted already.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{Context, Result};

/// A file that is being filled.
pub(super) struct Staged {
    dir: PathBuf,
    file: File,
}

impl Staged {
    /// An empty one in `dir`.
    pub(super) fn new(dir: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(dir).context(|| cannot(dir))?;
        Ok(Staged { dir: dir.into(), file })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).context(|| cannot(&self.dir))
    }

    /// Its bytes, as pages of the file: the kernel can take them back, so they count as cache.
    pub(super) fn into_bytes(self) -> Result<Bytes> {
        let Staged { dir, file } = self;
        if file.metadata().context(|| cannot(&dir))?.len() == 0 {
            return Ok(Bytes::new());
        }
        // SAFETY: the file has no name, and this handle on it ends here: nobody can change or
        // shorten it while it is mapped.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.context(|| cannot(&dir))?;
        Ok(Bytes::from_owner(map))
    }
}

fn cannot(dir: &Path) -> String {
    format!("cannot keep what is to be sent to the store in {}", dir.display())
}
