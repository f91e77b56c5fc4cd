//! PEM files: certificates, and keys that nobody else may read.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::{Context as _, Error, Kind, Result};

/// What such a file holds.
pub(crate) struct Pem {
    path: PathBuf,
    text: Vec<u8>,
}

impl Pem {
    /// Reads what anybody may read.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).context(|| format!("cannot read {}", path.display()))?;
        Ok(Pem { path: path.into(), text })
    }

    /// Reads what holds a key.
    ///
    /// # Errors
    /// When it cannot be read; [`Kind::Key`] when others can read it, too.
    pub(crate) fn read_secret(path: &Path) -> Result<Self> {
        let unread = || format!("cannot read {}", path.display());
        let mode = std::fs::metadata(path).context(unread)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            let what = format!("it can be read by others (mode {mode:04o}): chmod 0400");
            return Err(Error::new(Kind::Key, format!("{}: {what}", path.display())));
        }
        Self::read(path)
    }

    /// Its certificates, at least one.
    ///
    /// # Errors
    /// [`Kind::Key`] when there is none, or one is damaged.
    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>> {
        let found: Vec<_> = CertificateDer::pem_slice_iter(&self.text)
            .collect::<std::result::Result<_, _>>()
            .map_err(|error| self.wrong(&error.to_string()))?;
        if found.is_empty() { Err(self.wrong("there is no certificate in it")) } else { Ok(found) }
    }

    /// Its key.
    ///
    /// # Errors
    /// [`Kind::Key`] when there is none, or it is damaged.
    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>> {
        PrivateKeyDer::from_pem_slice(&self.text).map_err(|error| self.wrong(&error.to_string()))
    }

    /// The file as it is.
    pub(crate) fn text(&self) -> &[u8] {
        &self.text
    }

    fn wrong(&self, what: &str) -> Error {
        Error::new(Kind::Key, format!("{}: {what}", self.path.display()))
    }
}
