//! A qcow2 image, written through a private `qemu-nbd`.

use std::path::Path;

use super::Target;
use crate::engine::{BlockTarget, DiskImage, Range};
use crate::error::{Error, Kind, Result};

/// A qcow2 image in the making.
pub struct Qcow2Target {}

impl Qcow2Target {
    /// Creates the image under a temporary name and opens it for writing.
    ///
    /// # Errors
    /// Where it cannot be created.
    pub async fn create(_path: &Path, _size: u64) -> Result<Qcow2Target> {
        Err(Error::new(Kind::Failed, "not yet"))
    }
}

impl BlockTarget for Qcow2Target {
    async fn write(&self, _offset: u64, _data: &[u8]) -> Result<()> {
        Ok(())
    }
}

impl Target for Qcow2Target {
    const ORDERED: bool = false;

    async fn prepare(&self, _image: &impl DiskImage, _size: u64) -> Result<()> {
        Ok(())
    }

    async fn finish(self, _holes: &[Range]) -> Result<()> {
        Ok(())
    }
}
