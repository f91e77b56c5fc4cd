//! Increments of shut-off qcow2 guests through their dirty bitmaps.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::ensure;
use qemu_tests::bench::blocks::{self, Range};
use qemu_tests::bench::change::change;
use qemu_tests::bench::{Bench, Cost, nbd};
use qemu_tests::content::BLOCK;
use qemu_tests::{Fixture, Result, image};

use crate::guests::{DAYS, Guests};
use crate::tools::backup_image;

/// What one run of it cost.
#[derive(Clone, Default)]
pub(crate) struct Increments {
    /// The first backup, from qcow2.
    pub(crate) first: Cost,
    /// Of all guests, from the second day on.
    pub(crate) days: Vec<Cost>,
    /// Bytes of the changes of each day, as the images differ.
    pub(crate) changed: Vec<u64>,
    /// Backups of single guests in which nothing was dirty.
    pub(crate) idle: Vec<Cost>,
}

/// The guests as qcow2, one after the other: backed up on the first day, changed through QEMU,
/// backed up again, and once more with nothing changed. With `compare` what comes back is compared
/// with the images.
pub(crate) fn measure(bench: &Bench, guests: &Guests, compare: bool) -> Result<Increments> {
    bench.step("increments through bitmaps");
    let mut fixture = Fixture::new()?;
    let mut found = Increments {
        days: vec![Cost::default(); DAYS - 1],
        changed: vec![0; DAYS - 1],
        ..Increments::default()
    };
    for name in &guests.names {
        let qcow2 = fixture.path("guest.qcow2");
        image::convert(&guests.image(name, 1), "raw", &qcow2, "qcow2")?;
        found.first = found.first.then(backup_image(&mut fixture, name, &qcow2)?.0);
        for day in 2..=DAYS {
            let (before, after) = (guests.image(name, day - 1), guests.image(name, day));
            change(&qcow2, |client| {
                found.changed[day - 2] += apply(client, &before, &after)?;
                Ok(())
            })?;
            let cost = increment(&mut fixture, name, &qcow2)?;
            found.days[day - 2] = found.days[day - 2].then(cost);
        }
        found.idle.push(increment(&mut fixture, name, &qcow2)?);
        if compare {
            let restored = fixture.restore(&format!("{name}@latest"), "vda")?;
            blocks::same(&guests.image(name, DAYS), &restored)?;
            fs::remove_file(restored)?;
        }
        fs::remove_file(qcow2)?;
    }
    Ok(found)
}

/// A backup that must go through the bitmap.
pub(crate) fn increment(fixture: &mut Fixture, name: &str, image: &Path) -> Result<Cost> {
    let (cost, printed) = backup_image(fixture, name, image)?;
    ensure!(printed.contains("incremental since"), "{name} was read in full:\n{printed}");
    Ok(cost)
}

/// Makes an image what `after` is, if it is what `before` is: blocks that differ are written, and
/// freed where they became zero. Bytes changed.
fn apply(client: &mut nbd::Client, before: &Path, after: &Path) -> Result<u64> {
    let mut changed = 0;
    each_difference(before, after, |range, data| {
        changed += range.length;
        match data {
            Some(data) => client.write(range.offset, data),
            None => client.zero(range.offset, range.length as usize),
        }
    })?;
    Ok(changed)
}

/// Shows where two images differ, in runs of blocks of at most 1 MiB, with what the second one has
/// there; nothing where that is zero.
fn each_difference(
    before: &Path,
    after: &Path,
    mut visit: impl FnMut(Range, Option<&[u8]>) -> Result,
) -> Result {
    let (a, b) = (File::open(before)?, File::open(after)?);
    let mut ranges = blocks::data_ranges(&a)?;
    ranges.extend(blocks::data_ranges(&b)?);
    ranges.sort_by_key(|range| range.offset);
    let (mut old, mut new) = (vec![0; nbd::MAX], vec![0; nbd::MAX]);
    let mut done = 0;
    for range in ranges {
        let end = range.offset + range.length;
        done = done.max(range.offset);
        while done < end {
            let length = (end - done).min(nbd::MAX as u64) as usize;
            a.read_exact_at(&mut old[..length], done)?;
            b.read_exact_at(&mut new[..length], done)?;
            for (range, data) in runs(&old[..length], &new[..length], done) {
                visit(range, data)?;
            }
            done += length as u64;
        }
    }
    Ok(())
}

/// What becomes of a block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Same,
    Zero,
    Data,
}

fn fate(old: &[u8], new: &[u8]) -> Fate {
    if old == new {
        Fate::Same
    } else if new.iter().all(|byte| *byte == 0) {
        Fate::Zero
    } else {
        Fate::Data
    }
}

/// The runs of changed blocks in a piece at `offset`.
fn runs<'a>(old: &[u8], new: &'a [u8], offset: u64) -> Vec<(Range, Option<&'a [u8]>)> {
    let pairs = old.chunks(BLOCK).zip(new.chunks(BLOCK));
    let fates: Vec<Fate> = pairs.map(|(old, new)| fate(old, new)).collect();
    let (mut found, mut at) = (Vec::new(), 0);
    for run in fates.chunk_by(|a, b| a == b) {
        let bytes = &new[at..(at + run.len() * BLOCK).min(new.len())];
        let range = Range { offset: offset + at as u64, length: bytes.len() as u64 };
        match run[0] {
            Fate::Same => {}
            Fate::Zero => found.push((range, None)),
            Fate::Data => found.push((range, Some(bytes))),
        }
        at += bytes.len();
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use qemu_tests::MIB;

    use super::*;

    #[test]
    fn differences_are_found_and_told_apart() -> Result {
        let folder = tempfile::tempdir()?;
        let (a, b) = (folder.path().join("a.raw"), folder.path().join("b.raw"));
        image::raw(&a, 8 * MIB, &[(0, 16384, 1), (MIB, 8192, 2)])?;
        image::raw(&b, 8 * MIB, &[(0, 16384, 1), (6 * MIB, 4096, 4)])?;
        File::options().write(true).open(&b)?.write_all_at(b"changed", 8192)?;
        let mut found = Vec::new();
        each_difference(&a, &b, |range, data| {
            found.push((range.offset, range.length, data.map(|data| data[0])));
            Ok(())
        })?;
        let new = qemu_tests::content::block(4, 0)[0];
        let expected = [(8192, 4096, Some(b'c')), (MIB, 8192, None), (6 * MIB, 4096, Some(new))];
        assert_eq!(found, expected);
        Ok(())
    }
}
