//! Images: made, filled, compared byte by byte, and counted by a program that shares nothing
//! with Fleece's own.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};

use crate::content::{BLOCK, block};
use crate::{MIB, Result, tools};

/// A new empty image: `qcow2` or `raw`.
///
/// # Errors
/// qemu-img's.
pub fn create(path: &Path, format: &str, size: u64) -> Result {
    tools::run(
        tools::qemu("qemu-img")?
            .args(["create", "-q", "-f", format])
            .arg(path)
            .arg(size.to_string()),
    )?;
    Ok(())
}

/// Copies an image into another format, at its state now even if it is in use.
///
/// # Errors
/// qemu-img's.
pub fn convert(from: &Path, format: &str, to: &Path, to_format: &str) -> Result {
    let mut command = tools::qemu("qemu-img")?;
    tools::run(command.args(["convert", "-U", "-f", format, "-O", to_format]).arg(from).arg(to))?;
    Ok(())
}

/// A raw image of a size with content in ranges of (offset, length, seed); the rest is holes.
/// The content of a range is `content::block(seed, 0..)`, wherever it lies: the same seed twice is
/// the same blocks twice.
///
/// # Errors
/// The system's.
pub fn raw(path: &Path, size: u64, ranges: &[(u64, u64, u64)]) -> Result {
    let file = File::create(path)?;
    file.set_len(size)?;
    for &(offset, length, seed) in ranges {
        fill(&file, offset, length, seed)?;
    }
    Ok(())
}

/// Fills a range of a file with `content::block(seed, 0..)`.
///
/// # Errors
/// The system's.
pub fn fill(file: &File, offset: u64, length: u64, seed: u64) -> Result {
    let mut chunk = Vec::with_capacity(MIB as usize);
    let mut done = 0;
    while done < length {
        chunk.clear();
        let end = (done + MIB).min(length);
        for place in (done..end).step_by(BLOCK) {
            chunk.extend_from_slice(&block(seed, place / BLOCK as u64));
        }
        chunk.truncate((end - done) as usize);
        file.write_all_at(&chunk, offset + done)?;
        done = end;
    }
    Ok(())
}

/// Are two raw images the same, byte by byte? Says where they differ.
///
/// # Errors
/// When they differ or cannot be read.
pub fn same(truth: &Path, other: &Path) -> Result {
    let (a, b) = (open(truth)?, open(other)?);
    let (a_size, b_size) = (a.metadata()?.len(), b.metadata()?.len());
    ensure!(
        a_size == b_size,
        "{} has {a_size} bytes, {} has {b_size}",
        truth.display(),
        other.display()
    );
    let (mut left, mut right) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut wrong = Vec::new();
    let mut at = 0;
    while at < a_size {
        let length = MIB.min(a_size - at) as usize;
        a.read_exact_at(&mut left[..length], at)?;
        b.read_exact_at(&mut right[..length], at)?;
        if left[..length] != right[..length] {
            for (index, (x, y)) in
                left[..length].chunks(BLOCK).zip(right[..length].chunks(BLOCK)).enumerate()
            {
                if x != y {
                    wrong.push(at + (index * BLOCK) as u64);
                }
            }
        }
        at += length as u64;
    }
    if let Some(first) = wrong.first() {
        bail!(
            "{} and {} differ in {} blocks, first at byte {first}, last at {}",
            truth.display(),
            other.display(),
            wrong.len(),
            wrong[wrong.len() - 1]
        );
    }
    Ok(())
}

/// Is an image of any format the same as a raw one, as QEMU reads them?
///
/// # Errors
/// When they differ.
pub fn same_as_qemu_reads(truth: &Path, other: &Path, format: &str) -> Result {
    let mut command = tools::qemu("qemu-img")?;
    tools::run(command.args(["compare", "-f", "raw", "-F", format]).arg(truth).arg(other))?;
    Ok(())
}

/// How many different non-zero blocks the images hold together, a last partial block padded with
/// zeros. SHA-256 without a key: not how Fleece does it.
///
/// # Errors
/// The system's.
pub fn distinct_blocks(images: &[&Path]) -> Result<u64> {
    let mut seen = HashSet::new();
    for path in images {
        each_block(path, |one| {
            if one.iter().any(|byte| *byte != 0) {
                seen.insert(<[u8; 32]>::from(Sha256::digest(one)));
            }
        })?;
    }
    Ok(seen.len() as u64)
}

/// Shows every block of an image, a last partial one padded with zeros.
///
/// # Errors
/// The system's.
pub fn each_block(path: &Path, mut visit: impl FnMut(&[u8])) -> Result {
    let mut file = open(path)?;
    let mut chunk = vec![0; MIB as usize];
    loop {
        let length = read_full(&mut file, &mut chunk)?;
        if length == 0 {
            return Ok(());
        }
        chunk[length..].fill(0);
        chunk[..length.next_multiple_of(BLOCK)].chunks(BLOCK).for_each(&mut visit);
    }
}

/// Bytes that a file takes on its disk.
///
/// # Errors
/// The system's.
pub fn allocated(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn read_full(file: &mut File, buffer: &mut [u8]) -> Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}
