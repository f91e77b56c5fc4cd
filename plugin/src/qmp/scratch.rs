//! Scratch: where the blocks go that the guest overwrites while they are still to be read.
//!
//! One qcow2 image per disk over a raw layer of fixed size, so that QEMU itself keeps the cap, even
//! when we are dead. The files lose their names as soon as QEMU has them open: nothing of the
//! guest's data stays behind, whoever is killed.

use crate::error::{Context, Error, Kind, Result};
use crate::qmp::session::Peer;
use serde_json::{Value, json};
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Where scratch goes unless told otherwise.
pub const DEFAULT_DIR: &str = "/var/lib/fleece/scratch";
/// The cap where none is given; half of what is free if that is less.
const DEFAULT_MAX: u64 = 20 << 30;
/// Below this a scratch image holds little more than its own tables.
const LEAST: u64 = 1 << 20;
/// A UNIX socket's path has at most 107 bytes.
const MAX_SOCKET_PATH: usize = 107;

/// What one disk needs scratch for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    /// The disk's size, bytes.
    pub(crate) size: u64,
    /// Bytes that will be copied in any case (way push), 0 otherwise.
    pub(crate) certain: u64,
}

/// The scratch images of one view, and the directory with them and the NBD socket.
#[derive(Debug)]
pub(crate) struct Scratch {
    directory: PathBuf,
    images: Vec<Image>,
    peak: AtomicU64,
}

/// One image; kept open for its usage.
#[derive(Debug)]
struct Image {
    path: PathBuf,
    file: File,
    cap: u64,
}

impl Scratch {
    /// Checks the space and creates the images, before anything is changed in QEMU.
    pub(crate) async fn create(
        base: &Path,
        snapshot: &str,
        owner: Option<Peer>,
        needs: &[Need],
        max: Option<u64>,
    ) -> Result<Scratch> {
        let caps = caps(needs, budget(base, needs, max)?);
        let directory = base.join(crate::qmp::names::of_snapshot(snapshot).trim_end_matches('-'));
        make_directory(&directory, owner)?;
        let mut scratch = Scratch { directory, images: Vec::new(), peak: AtomicU64::new(0) };
        let socket = scratch.socket();
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            let message = format!(
                "{}: too long for a socket's path, choose a shorter --scratch-dir",
                socket.display()
            );
            return Err(Error::new(Kind::Usage, message));
        }
        for (i, (need, cap)) in needs.iter().zip(caps).enumerate() {
            let path = scratch.directory.join(format!("{i}.qcow2"));
            let image = create_image(&path, need.size, cap, owner).await?;
            scratch.images.push(image);
        }
        Ok(scratch)
    }

    /// Where QEMU's NBD server listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.join("nbd.sock")
    }

    /// Where the server of a pushed disk listens.
    pub(crate) fn push_socket(&self, disk: usize) -> PathBuf {
        self.directory.join(format!("{disk}.sock"))
    }

    /// The directory of this view.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The arguments of blockdev-add for one image.
    pub(crate) fn node(&self, disk: usize, name: &str) -> Value {
        let image = &self.images[disk];
        json!({
            "driver": "qcow2", "node-name": name, "discard": "unmap",
            "file": {"driver": "raw", "size": image.cap,
                     "file": {"driver": "file", "filename": image.path, "discard": "unmap"}},
        })
    }

    /// Takes an image's name away: QEMU has it open.
    pub(crate) fn unlink(&self, disk: usize) -> Result<()> {
        let path = &self.images[disk].path;
        std::fs::remove_file(path).context(|| format!("scratch image {}", path.display()))
    }

    /// A way to open an unlinked image again while we live.
    pub(crate) fn reopen_path(&self, disk: usize) -> PathBuf {
        use std::os::fd::AsRawFd;
        PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.images[disk].file.as_raw_fd()
        ))
    }

    /// The image's cap, bytes.
    pub(crate) fn cap(&self, disk: usize) -> u64 {
        self.images[disk].cap
    }

    /// Bytes that all images take now; the peak is remembered.
    pub(crate) fn used(&self) -> u64 {
        let used = self.images.iter().map(Image::used).sum();
        self.peak.fetch_max(used, Ordering::Relaxed);
        used
    }

    /// The most that was ever seen, bytes.
    pub(crate) fn peak(&self) -> u64 {
        self.used();
        self.peak.load(Ordering::Relaxed)
    }

    /// The caps together, bytes.
    pub(crate) fn total(&self) -> u64 {
        self.images.iter().map(|i| i.cap).sum()
    }

    /// An image that has reached its cap: what it has left would not hold one more cluster.
    pub(crate) fn full(&self) -> Option<usize> {
        const CLUSTER: u64 = 64 << 10;
        self.images.iter().position(|i| i.used() + 2 * CLUSTER > i.cap)
    }

    /// Whether less than half of an image's cap is taken.
    pub(crate) fn has_room(&self, disk: usize) -> bool {
        self.images[disk].used() < self.images[disk].cap / 2
    }

    /// Removes the directory. The space of the images is freed when QEMU and we close them.
    pub(crate) fn remove(&self) {
        // Left-over names are harmless, and `cleanup` finds them.
        drop(std::fs::remove_dir_all(&self.directory));
    }
}

impl Image {
    fn used(&self) -> u64 {
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }
}

/// How much all images may take together.
fn budget(base: &Path, needs: &[Need], max: Option<u64>) -> Result<u64> {
    let free = free_space(base)?;
    let at = || format!("scratch directory {}", base.display());
    let mib = |bytes: u64| bytes >> 20;
    let least = LEAST * needs.len() as u64 + needs.iter().map(|n| n.certain).sum::<u64>();
    let budget = match max {
        Some(max) if max.min(wanted(needs)) > free => {
            let text = format!(
                "{}: {} MiB free, --scratch-max asks for {} MiB",
                at(),
                mib(free),
                mib(max)
            );
            return Err(Error::new(Kind::Failed, text));
        }
        Some(max) => max,
        None => DEFAULT_MAX.min(free / 2),
    };
    if budget < least {
        let text = format!(
            "{}: {} MiB may be used ({} MiB free), at least {} MiB are needed: free some, or choose another --scratch-dir or --scratch-max",
            at(),
            mib(budget),
            mib(free),
            mib(least)
        );
        return Err(Error::new(Kind::Failed, text));
    }
    Ok(budget)
}

/// Makes sure that there is a folder for scratch. The default one is made: others may pass through
/// it, as QEMU must, whoever it runs as, and see nothing.
///
/// # Errors
/// `Usage`: it was given and is no folder. Else it could not be made.
pub fn ready(base: &Path) -> Result<()> {
    if base.is_dir() {
        return Ok(());
    }
    if base != Path::new(DEFAULT_DIR) {
        let text = format!("--scratch-dir {} is no folder: create it first", base.display());
        return Err(Error::new(Kind::Usage, text));
    }
    DirBuilder::new().recursive(true).mode(0o711).create(base).map_err(|error| {
        let kind = match error.kind() {
            std::io::ErrorKind::PermissionDenied => Kind::NotPermitted,
            _ => Kind::Failed,
        };
        Error::caused(
            kind,
            format!("cannot create the scratch directory {}", base.display()),
            error,
        )
    })
}

/// Bytes free for us in the file system of a directory.
pub(crate) fn free_space(base: &Path) -> Result<u64> {
    let stat =
        rustix::fs::statvfs(base).context(|| format!("scratch directory {}", base.display()))?;
    Ok(stat.f_bavail * stat.f_frsize)
}

/// The most that an image of a disk can ever take: every cluster, and qcow2's tables (an L2 entry
/// of 8 bytes and a refcount of 2 per 64 KiB).
fn most(size: u64) -> u64 {
    size + size / 4096 + LEAST
}

fn wanted(needs: &[Need]) -> u64 {
    needs.iter().map(|n| most(n.size)).sum()
}

/// Shares the budget: what is certain and the least first, the rest by what each disk could use.
fn caps(needs: &[Need], budget: u64) -> Vec<u64> {
    let base: Vec<u64> = needs.iter().map(|n| (n.certain + LEAST).min(most(n.size))).collect();
    let room: Vec<u64> = needs.iter().zip(&base).map(|(n, b)| most(n.size) - b).collect();
    let spare = u128::from(budget.saturating_sub(base.iter().sum()));
    let all: u128 = room.iter().map(|r| u128::from(*r)).sum::<u128>().max(1);
    let share = |r: u64| u64::try_from(spare.min(all) * u128::from(r) / all).unwrap_or(r);
    // QEMU wants whole sectors.
    base.iter().zip(&room).map(|(b, r)| (b + share(*r)) / 4096 * 4096).collect()
}

fn make_directory(directory: &Path, owner: Option<Peer>) -> Result<()> {
    let at = || format!("scratch directory {}", directory.display());
    match DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            // Ids are not used twice: this is a dead run's.
            std::fs::remove_dir_all(directory).context(at)?;
            DirBuilder::new().mode(0o700).create(directory).context(at)?;
        }
        Err(e) => return Err(e).context(at),
    }
    give(directory, owner)
}

/// QEMU may run as another user; as root we give it what it must open.
fn give(path: &Path, owner: Option<Peer>) -> Result<()> {
    let Some(owner) = owner else { return Ok(()) };
    let us = rustix::process::geteuid();
    if !us.is_root() || owner.uid == us.as_raw() {
        return Ok(());
    }
    let (uid, gid) =
        (rustix::process::Uid::from_raw(owner.uid), rustix::process::Gid::from_raw(owner.gid));
    rustix::fs::chown(path, Some(uid), Some(gid))
        .context(|| format!("giving {} to QEMU's user", path.display()))
}

async fn create_image(path: &Path, size: u64, cap: u64, owner: Option<Peer>) -> Result<Image> {
    let at = || format!("scratch image {}", path.display());
    let mut command = tokio::process::Command::new("qemu-img");
    command
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size.to_string())
        .kill_on_drop(true);
    let output =
        command.output().await.context(|| "qemu-img (is qemu-utils installed?)".to_owned())?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::new(Kind::Failed, format!("{}: {words}", at())));
    }
    let file = OpenOptions::new().read(true).write(true).open(path).context(at)?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).context(at)?;
    // The raw layer wants its whole range to exist; a hole costs nothing.
    let cap = cap.max(file.metadata().context(at)?.len());
    file.set_len(cap).context(at)?;
    give(path, owner)?;
    Ok(Image { path: path.to_owned(), file, cap })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn caps_share_the_budget(
            sizes in prop::collection::vec((1u64..1 << 44, 0u64..1 << 30), 1..9),
            extra in 0u64..1 << 45,
        ) {
            let needs: Vec<Need> =
                sizes.iter().map(|&(size, certain)| Need { size, certain: certain.min(size) }).collect();
            let least: u64 = needs.iter().map(|n| n.certain + LEAST).sum();
            let caps = caps(&needs, least + extra);
            prop_assert!(caps.iter().sum::<u64>() <= least + extra);
            for (need, cap) in needs.iter().zip(&caps) {
                prop_assert!(*cap + 4096 > (need.certain + LEAST).min(most(need.size)));
                prop_assert!(*cap <= most(need.size));
                prop_assert_eq!(cap % 4096, 0);
            }
        }
    }

    #[test]
    fn a_small_disk_gets_no_more_than_it_can_use() {
        let needs = [Need { size: 1 << 20, certain: 0 }, Need { size: 1 << 40, certain: 0 }];
        let caps = caps(&needs, 20 << 30);
        assert!(caps[0] <= most(1 << 20));
        assert!(caps[1] > 19 << 30);
    }

    #[test]
    fn a_given_folder_must_exist() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ready(dir.path()).is_ok());
        assert_eq!(ready(&dir.path().join("no")).unwrap_err().kind(), Kind::Usage);
    }

    #[tokio::test]
    async fn too_little_space_is_said_before_anything() {
        let dir = tempfile::tempdir().unwrap();
        let needs = [Need { size: 1 << 40, certain: 0 }];
        let error =
            Scratch::create(dir.path(), "abc", None, &needs, Some(1 << 60)).await.unwrap_err();
        assert!(error.to_string().contains("--scratch-max asks for"), "{error}");
        let error =
            Scratch::create(dir.path(), "abc", None, &needs, Some(1 << 16)).await.unwrap_err();
        assert!(error.to_string().contains("at least 1 MiB are needed"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
