//! What writers that died left behind in a local directory: the staging files `name#N` of
//! the objects that they were writing.
//!
//! Every engine that writes holds a shared lock on the directory itself. Whoever gets it
//! for itself alone knows that no staging file is in use.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Context, Error, Kind, Result};

/// How long another engine's sweep is waited for, shorter than what service managers wait for a start.
const SWEEP_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks whether it is over.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Joins the writers of `root`; the only one sweeps first. The lock lasts as long as the file.
pub(crate) fn join_writers(root: &Path) -> Result<fs::File> {
    let failed = || format!("cannot open the store's directory {}", root.display());
    let lock = fs::File::open(root).context(failed)?;
    // Where directories cannot be locked nobody sweeps: leftovers only take space.
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
        sweep(root);
    }
    // Unlocked, a later sweep would take what is being written.
    let until = Instant::now() + SWEEP_LIMIT;
    loop {
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(LOOK_AGAIN),
            Err(Errno::WOULDBLOCK) => {
                let what = format!(
                    "another engine has been clearing {} up for {} s: start this one again later",
                    root.display(),
                    SWEEP_LIMIT.as_secs()
                );
                return Err(Error::new(Kind::Busy, what));
            }
            Ok(()) | Err(_) => return Ok(lock),
        }
    }
}

/// Removes the staging files below a folder. What cannot be read or removed stays.
fn sweep(folder: &Path) -> u64 {
    let mut swept = 0;
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            swept += sweep(&entry.path());
        } else if kind.is_file() && entry.file_name().to_str().is_some_and(is_staging) {
            swept += u64::from(fs::remove_file(entry.path()).is_ok());
        }
    }
    swept
}

/// Whether a file name is one of `object_store`'s staging names.
fn is_staging(name: &str) -> bool {
    name.rsplit_once('#')
        .is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_leftovers_are_swept_and_only_by_a_writer_that_is_alone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("containers/00000001");
        fs::create_dir_all(&folder).unwrap();
        for name in ["a", "b#1", "b#17", "c#x", "d#"] {
            fs::write(folder.join(name), b"x").unwrap();
        }
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let other = fs::File::open(dir.path()).unwrap();
        flock(&other, FlockOperation::NonBlockingLockShared).unwrap();
        drop(join_writers(dir.path()).unwrap());
        assert_eq!(names().len(), 5, "another writer may be using them");
        drop(other);
        let first = join_writers(dir.path()).unwrap();
        assert_eq!(names(), ["a", "c#x", "d#"]);
        fs::write(folder.join("e#1"), b"of the first").unwrap();
        drop(join_writers(dir.path()).unwrap());
        assert_eq!(names().len(), 4);
        drop(first);
        drop(join_writers(dir.path()).unwrap());
        assert_eq!(names().len(), 3);
    }

    #[test]
    fn a_writer_that_comes_while_another_sweeps_waits_for_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let sweeping = fs::File::open(dir.path()).unwrap();
        flock(&sweeping, FlockOperation::NonBlockingLockExclusive).unwrap();
        let path = dir.path().to_owned();
        let joining = std::thread::spawn(move || join_writers(&path).unwrap());
        drop(sweeping);
        let _joined = joining.join().unwrap();
        let other = fs::File::open(dir.path()).unwrap();
        assert!(flock(&other, FlockOperation::NonBlockingLockExclusive).is_err());
    }
}
