//! Who else has a block device open.
//!
//! QEMU's locks belong to the inode that a device was opened by, and libvirt gives every VM nodes
//! of its own in a private `/dev`: locks on these do not meet ours. So what all processes have open
//! is looked through; what they have in common is the device's number.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use crate::error::{Error, Kind, Result};

/// Who only looks at a device, as udev does at a new one, has closed it by then.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks whether it did.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Major and minor number of a device: the same for all its nodes.
type Number = (u32, u32);

/// A block device that a process has open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Descriptor {
    process: u32,
    parent: u32,
    device: Number,
    writable: bool,
}

/// Refuses a block device that another process can write to. Those who read it do not count: the
/// engine is one, while an image is lent to it. We and our children, such as the `qemu-nbd` of an
/// image, do not count either.
///
/// Processes that we may not look at, or that are gone before we could, are passed over. So is what
/// the kernel has open for itself, such as a mount, or another device on top of this one.
///
/// # Errors
/// [`Kind::Busy`], with the process's id and name.
pub(super) fn not_written(path: &Path) -> Result<()> {
    match holder(path, |open| open.writable) {
        Some(process) => {
            let way_out = "back a running VM up through its QMP socket";
            Err(busy(path, process, "can write to it", way_out))
        }
        None => Ok(()),
    }
}

/// Refuses a block device that another process has open, be it to read: what it reads is about to
/// be overwritten. Otherwise as [`not_written`]. Waits for a moment for those who only have a look.
///
/// # Errors
/// [`Kind::Busy`], with the process's id and name.
pub(crate) fn not_open(path: &Path) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match holder(path, |_| true) {
            None => return Ok(()),
            Some(_) if Instant::now() < end => std::thread::sleep(LOOK_AGAIN),
            Some(process) => {
                let way_out = "shut a running VM down, or restore to another target";
                return Err(busy(path, process, "has it open", way_out));
            }
        }
    }
}

/// A process that has a block device open in a way that counts; none if `path` is no such device.
fn holder(path: &Path, counts: impl Fn(&Descriptor) -> bool) -> Option<u32> {
    let device = block_device(path)?;
    first_other(&descriptors(), device, std::process::id(), counts)
}

/// The first process but for us and our children that has the device open in a way that counts.
fn first_other(
    all: &[Descriptor],
    device: Number,
    us: u32,
    counts: impl Fn(&Descriptor) -> bool,
) -> Option<u32> {
    let strange = |open: &Descriptor| open.process != us && open.parent != us;
    let found = all.iter().find(|open| open.device == device && strange(open) && counts(open));
    found.map(|open| open.process)
}

/// The block devices that processes have open, as far as we may see that.
fn descriptors() -> Vec<Descriptor> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        let Some(process) = number else { continue };
        for open in fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten() {
            let Some(device) = block_device(&open.path()) else { continue };
            // The link itself has the rights that the descriptor was opened with.
            let Ok(link) = open.metadata() else { continue };
            let (parent, writable) = (parent(process), link.mode() & 0o200 != 0);
            all.push(Descriptor { process, parent, device, writable });
        }
    }
    all
}

/// The device's number, if that is one. Nobody is asked for what the kernel knows: the descriptors
/// of others lead to network file systems, too, whose servers may not answer.
fn block_device(path: &Path) -> Option<Number> {
    let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let is_device = FileType::from_raw_mode(found.stx_mode.into()) == FileType::BlockDevice;
    is_device.then_some((found.stx_rdev_major, found.stx_rdev_minor))
}

/// The process that started another one; 0 if that has ended.
fn parent(process: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    parent.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

fn busy(path: &Path, process: u32, does: &str, way_out: &str) -> Error {
    let name = fs::read(format!("/proc/{process}/comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(&name);
    // Escaped: a process calls itself as it likes.
    let (path, name) = (path.display(), name.trim().escape_debug());
    let message = format!("{path} is in use: process {process} ({name}) {does}; {way_out}");
    Error::new(Kind::Busy, message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const US: u32 = 100;
    const DISK: Number = (253, 4);

    fn open(process: u32, parent: u32, device: Number, writable: bool) -> Descriptor {
        Descriptor { process, parent, device, writable }
    }

    #[test]
    fn others_count_that_have_this_very_device_open() {
        let any = |all: &[Descriptor]| first_other(all, DISK, US, |_| true);
        let writing = |all: &[Descriptor]| first_other(all, DISK, US, |open| open.writable);
        let ours = [open(US, 1, DISK, true), open(101, US, DISK, true)];
        let another = [open(200, 1, (253, 5), true), open(200, 1, (4, 253), true)];
        assert_eq!((any(&ours), writing(&ours)), (None, None));
        assert_eq!((any(&another), writing(&another)), (None, None));
        let mut all = [&ours[..], &another[..], &[open(201, 1, DISK, false)]].concat();
        assert_eq!((any(&all), writing(&all)), (Some(201), None));
        // A child of a child is not ours: we started no such thing.
        all.push(open(102, 101, DISK, true));
        assert_eq!((any(&all), writing(&all)), (Some(201), Some(102)));
    }

    #[test]
    fn children_are_known_and_what_is_no_device_is_never_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk.raw");
        fs::write(&file, "a file").unwrap();
        let opened = fs::OpenOptions::new().read(true).write(true).open(&file).unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("60").stdin(opened).spawn().unwrap();
        let parent = parent(child.id());
        let looks = [not_written(&file), not_open(&file), not_open(&dir.path().join("gone"))];
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(parent, std::process::id());
        assert!(looks.iter().all(|look| look.is_ok()), "{looks:?}");
    }
}
