//! Blocks of raw images, read past their holes, and counted by a program that shares nothing with
//! Fleece's own.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::content::BLOCK;
use crate::{MIB, Result};

/// What is read at once.
const READ: u64 = MIB;

/// One range of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// Its first byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// The ranges of a file that are not holes, in whole blocks but for the file's end.
///
/// # Errors
/// The system's.
pub fn data_ranges(file: &File) -> Result<Vec<Range>> {
    let size = file.metadata()?.len();
    let block = BLOCK as u64;
    let mut ranges = Vec::<Range>::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?;
        let offset = (start / block * block).max(at);
        at = end.next_multiple_of(block).min(size);
        ranges.push(Range { offset, length: at - offset });
    }
    Ok(ranges)
}

/// Shows all that is not a hole, in pieces of at most 1 MiB: where it lies, and its bytes.
///
/// # Errors
/// The system's, or what `visit` says.
pub fn each_piece(path: &Path, mut visit: impl FnMut(u64, &[u8]) -> Result) -> Result {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut buffer = vec![0; READ as usize];
    for range in data_ranges(&file)? {
        let end = range.offset + range.length;
        let mut at = range.offset;
        while at < end {
            let piece = &mut buffer[..READ.min(end - at) as usize];
            file.read_exact_at(piece, at)?;
            visit(at, piece)?;
            at += piece.len() as u64;
        }
    }
    Ok(())
}

/// Shows every block that is not zero. Images here are whole blocks long.
///
/// # Errors
/// The system's, or what `visit` says.
pub fn each_block(path: &Path, mut visit: impl FnMut(u64, &[u8]) -> Result) -> Result {
    each_piece(path, |offset, piece| {
        ensure!(piece.len().is_multiple_of(BLOCK), "{} is not whole blocks long", path.display());
        for (index, block) in piece.chunks_exact(BLOCK).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                visit(offset + (index * BLOCK) as u64, block)?;
            }
        }
        Ok(())
    })
}

/// Reads all that is not a hole, so that it lies in the page cache; its bytes.
///
/// # Errors
/// The system's.
pub fn warm(path: &Path) -> Result<u64> {
    let mut bytes = 0;
    each_piece(path, |_, piece| {
        bytes += piece.len() as u64;
        Ok(())
    })?;
    Ok(bytes)
}

/// The different blocks seen so far, by half of their SHA-256: Fleece uses another hash and a key.
#[derive(Default)]
pub struct Distinct {
    seen: HashSet<[u8; 16]>,
}

impl Distinct {
    /// Adds a block; was it new?
    pub fn add(&mut self, block: &[u8]) -> bool {
        let mut half = [0; 16];
        half.copy_from_slice(&Sha256::digest(block)[..16]);
        self.seen.insert(half)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.seen.len() as u64
    }
}

/// Are two raw images the same, byte by byte? Where both have holes they are.
///
/// # Errors
/// When they differ, with the first byte that does.
pub fn same(truth: &Path, other: &Path) -> Result {
    let open =
        |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    let (a, b) = (open(truth)?, open(other)?);
    let (a_size, b_size) = (a.metadata()?.len(), b.metadata()?.len());
    ensure!(a_size == b_size, "{} has {b_size} bytes, not {a_size}", other.display());
    let mut ranges = data_ranges(&a)?;
    ranges.extend(data_ranges(&b)?);
    ranges.sort_by_key(|range| range.offset);
    let (mut left, mut right) = (vec![0; READ as usize], vec![0; READ as usize]);
    let mut done = 0;
    for range in ranges {
        let end = range.offset + range.length;
        done = done.max(range.offset);
        while done < end {
            let length = READ.min(end - done) as usize;
            a.read_exact_at(&mut left[..length], done)?;
            b.read_exact_at(&mut right[..length], done)?;
            if let Some(at) = (0..length).find(|at| left[*at] != right[*at]) {
                bail!(
                    "{} differs from {} at byte {}",
                    other.display(),
                    truth.display(),
                    done + at as u64
                );
            }
            done += length as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image;

    #[test]
    fn holes_are_passed_over_and_nothing_else() -> Result {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a.raw");
        image::raw(
            &path,
            64 * MIB,
            &[(0, 8192, 1), (40 * MIB, 4096, 2), (64 * MIB - 4096, 4096, 1)],
        )?;
        let (mut places, mut distinct) = (Vec::new(), Distinct::default());
        each_block(&path, |offset, block| {
            places.push((offset, distinct.add(block)));
            Ok(())
        })?;
        let end = 64 * MIB - 4096;
        assert_eq!(places, [(0, true), (4096, true), (40 * MIB, true), (end, false)]);
        assert_eq!(distinct.count(), image::distinct_blocks(&[&path])?);
        assert!(warm(&path)? < MIB);
        Ok(())
    }

    #[test]
    fn images_are_the_same_or_not_wherever_their_holes_are() -> Result {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name);
        image::raw(&path("a"), 8 * MIB, &[(MIB, 8192, 1)])?;
        image::raw(&path("b"), 8 * MIB, &[(MIB, 8192, 1)])?;
        // Zeros that are written are the same as a hole.
        File::options().write(true).open(path("b"))?.write_all_at(&[0; 4096], 5 * MIB)?;
        same(&path("a"), &path("b"))?;
        same(&path("b"), &path("a"))?;
        image::raw(&path("c"), 8 * MIB, &[(MIB, 8192, 1), (7 * MIB, 4096, 3)])?;
        let told = same(&path("a"), &path("c")).err().map(|error| error.to_string());
        assert!(told.is_some_and(|told| told.ends_with(&format!("at byte {}", 7 * MIB))));
        assert!(same(&path("c"), &path("a")).is_err());
        image::raw(&path("d"), 9 * MIB, &[(MIB, 8192, 1)])?;
        assert!(same(&path("a"), &path("d")).is_err());
        Ok(())
    }
}
