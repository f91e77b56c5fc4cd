//! A qcow2 image, written through a private `qemu-nbd`.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::Target;
use super::file::TempName;
use crate::engine::{BlockTarget, DiskImage, Range, Scattered};
use crate::error::{Context, Error, Kind, Result};
use crate::image::{ImageInfo, OpenImage, OpenOptions};

/// What every QEMU since 1.1 reads, at the cluster size that suits most disks: bitmaps need
/// the version, and refcounts kept at once spare a repair after a crash.
const CREATE_OPTIONS: &str = "compat=1.1,lazy_refcounts=off,cluster_size=65536,preallocation=off";

/// A qcow2 image in the making; removed if it is dropped before it is finished.
pub struct Qcow2Target {
    image: OpenImage,
    name: TempName,
}

impl Qcow2Target {
    /// Creates the image under a temporary name and opens it for writing; what is at `path` at the
    /// end may be replaced, or not.
    ///
    /// # Errors
    /// Where it cannot be created.
    pub async fn create(path: &Path, size: u64, replace: bool) -> Result<Qcow2Target> {
        // qemu-img writes into a file that is there, whoever made it, and leaves its mode.
        let (name, _) = TempName::create(path, replace)?;
        // qemu-img takes a name with a colon for a protocol: an absolute path has none before it.
        let file: PathBuf = std::path::absolute(&name.temporary)
            .context(|| format!("cannot find {}", path.display()))?;
        let output = tokio::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", CREATE_OPTIONS, "--"])
            .arg(&file)
            .arg(size.to_string())
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .context(|| "cannot start qemu-img (Debian: package qemu-utils)".to_owned())?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let what = format!("qemu-img cannot create {}: {}", path.display(), said.trim());
            return Err(Error::new(Kind::Target, what));
        }
        let info = ImageInfo::read(&file, Some("qcow2")).await?;
        let options = OpenOptions { writable: true, ..OpenOptions::default() };
        Ok(Qcow2Target { image: OpenImage::open(&info, &options).await?, name })
    }
}

impl BlockTarget for Qcow2Target {
    async fn write(&self, piece: Scattered) -> Result<()> {
        let export = self.image.export();
        for (offset, bytes) in piece.iter() {
            export.write(offset, bytes).await.context(|| format!("cannot write at {offset}"))?;
        }
        Ok(())
    }
}

impl Target for Qcow2Target {
    const ORDERED: bool = false;

    async fn prepare(&self, _image: &impl DiskImage, _size: u64) -> Result<()> {
        Ok(())
    }

    async fn finish(self, _holes: &[Range]) -> Result<()> {
        let Qcow2Target { image, name } = self;
        image.export().flush().await.context(|| "cannot flush the image".to_owned())?;
        image.close().await?;
        std::fs::File::open(&name.temporary)
            .and_then(|file| file.sync_all())
            .context(|| "cannot make the image durable".to_owned())?;
        name.publish()
    }
}
