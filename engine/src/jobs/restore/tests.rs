//! Restores of real stores, byte for byte.
#![allow(clippy::unwrap_used)]

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::jobs::fixture::{Fixture, image};
use crate::store::Store;
use crate::store::recipe::Placement;

/// What a restore gave and noted.
#[derive(Debug)]
struct Noted {
    written: u64,
    holes: Vec<(u64, u64)>,
    found: Vec<Found>,
}

/// Restores into memory; every byte is written at most once.
fn restore(store: &Store, dir: &Path, disk: &Disk, options: Options) -> Result<(Vec<u8>, Noted)> {
    let restorer = Restorer::new(store, dir).unwrap();
    let mut target = vec![0; disk.size as usize];
    let mut seen = vec![false; disk.size as usize];
    let mut last = 0;
    let mut found = Vec::new();
    let mut messages = Messages::new(|piece: Scattered| {
        assert!(piece.bytes.len() <= MAX_WRITE && !piece.bytes.is_empty());
        assert_eq!(piece.runs.iter().map(|run| run.1).sum::<u64>(), piece.bytes.len() as u64);
        for (offset, bytes) in piece.iter() {
            assert!(!options.ordered || offset >= last, "in disk order");
            last = offset + bytes.len() as u64;
            let range = offset as usize..offset as usize + bytes.len();
            assert!(seen[range.clone()].iter().all(|seen| !seen), "twice at {offset}");
            seen[range.clone()].fill(true);
            target[range].copy_from_slice(bytes);
        }
        Ok(())
    });
    let Outcome { written, holes } = restorer.restore(disk, options, &mut messages, &mut found)?;
    let outcome = Noted { written, holes, found };
    Ok((target, outcome))
}

const BOTH: [bool; 2] = [false, true];

#[test]
fn every_snapshot_of_a_chain_comes_back() {
    for (seed, block_size) in [(1, 4096), (2, 16384), (3, 65536)] {
        let mut f = Fixture::new(block_size);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bytes = image(seed, (9 << 20) + 12_345);
        let mut chain: Vec<(Manifest, Vec<u8>)> = Vec::new();
        for _ in 0..3 {
            let parent = chain.last().map(|(manifest, _)| manifest.clone());
            chain.push((f.backup(1, &bytes, parent.as_ref()), bytes.clone()));
            for _ in 0..5 {
                let at = rng.random_range(0..bytes.len() - 70_000);
                rng.fill(&mut bytes[at..at + 70_000]);
            }
            bytes.extend(std::iter::repeat_n(7, 3_000_000)); // It grows.
        }
        for (manifest, bytes) in &chain {
            for ordered in BOTH {
                let options = Options { ordered, damaged_zero: false };
                let disk = &manifest.disks[0];
                let (restored, outcome) = restore(&f.store, &f.scratch(), disk, options).unwrap();
                assert!(restored == *bytes, "seed {seed}, ordered {ordered}");
                assert!(outcome.holes.is_empty() && outcome.written <= disk.size);
            }
        }
    }
}

#[test]
fn random_reads_and_extents_agree_with_the_image() {
    let mut f = Fixture::new(4096);
    let bytes = image(7, (5 << 20) + 999);
    let manifest = f.backup(1, &bytes, None);
    let restorer = Restorer::new(&f.store, &f.scratch()).unwrap();
    let mut open = restorer.image(&manifest.disks[0]).unwrap();
    let mut rng = StdRng::seed_from_u64(9);
    for _ in 0..200 {
        let offset = rng.random_range(0..bytes.len());
        let length = rng.random_range(1..40_000);
        let mut buffer = vec![0xee; length];
        open.read_at(offset as u64, &mut buffer).unwrap();
        let end = (offset + length).min(bytes.len());
        assert!(buffer[..end - offset] == bytes[offset..end], "at {offset}");
        assert!(buffer[end - offset..].iter().all(|byte| *byte == 0));
    }
    let mut at = 1000;
    for extent in open.extents(1000, u64::MAX).unwrap() {
        assert_eq!(extent.offset, at);
        at += extent.length;
        let data = &bytes[extent.offset as usize..at as usize];
        assert!(!extent.zero || data.iter().all(|byte| *byte == 0));
    }
    assert_eq!(at, bytes.len() as u64);
    assert!(open.extents(bytes.len() as u64, 10).unwrap().is_empty());
}

/// The first block that is not zero, and where it is.
fn some_block(f: &Fixture, manifest: &Manifest) -> (u64, crate::ids::Address) {
    let restorer = Restorer::new(&f.store, &f.scratch()).unwrap();
    let recipe = restorer.recipe(&manifest.disks[0]).unwrap();
    let mut runs = recipe.all_runs();
    while let Some(run) = runs.next().unwrap() {
        if let Placement::At(address) = run.placement {
            return (run.first_block, address);
        }
    }
    panic!("the disk is empty");
}

#[test]
fn a_damaged_frame_fails_or_leaves_a_hole() {
    let mut f = Fixture::new(4096);
    let bytes = image(11, 6 << 20);
    let manifest = f.backup(1, &bytes, None);
    let (block, address) = some_block(&f, &manifest);
    let frame = f.store.directories().frame_of(address).unwrap().unwrap();
    f.flip(&f.object(address), frame.offset + 5);
    let store = f.reopened();
    for ordered in BOTH {
        let disk = &manifest.disks[0];
        let options = Options { ordered, damaged_zero: false };
        let error = restore(&store, &f.scratch(), disk, options).unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged, "{error}");
        let options = Options { ordered, damaged_zero: true };
        let (restored, outcome) = restore(&store, &f.scratch(), disk, options).unwrap();
        assert!(outcome.holes.iter().any(|(at, n)| (*at..at + n).contains(&(block * 4096))));
        let mut expected = bytes.clone();
        for (offset, length) in &outcome.holes {
            expected[*offset as usize..(offset + length) as usize].fill(0);
        }
        assert!(restored == expected);
        assert_eq!(outcome.found.len(), 1);
        assert_eq!(outcome.found[0].container, address.container);
    }
    // Once it is marked, the blocks are known to be damaged.
    let disk = &manifest.disks[0];
    let options = Options { ordered: false, damaged_zero: true };
    let (_, outcome) = restore(&store, &f.scratch(), disk, options).unwrap();
    let mut damage = DamageMap::default();
    assert!(damage.record(&f.store, &outcome.found, 5).unwrap() > 0);
    assert_eq!(damage.record(&f.store, &outcome.found, 5).unwrap(), 0);
    let again = Restorer::new(&f.store, &f.scratch()).unwrap();
    assert!(again.damage.has(address) && again.is_damaged(&manifest).unwrap());
    let recipe = again.recipe(disk).unwrap();
    let forced = again.damage.forced_ranges(&recipe).unwrap();
    let forced: Vec<(u64, u64)> = forced.iter().map(|(b, n)| (b * 4096, n * 4096)).collect();
    assert_eq!(forced, outcome.holes);
}

#[test]
fn a_lost_container_or_node_leaves_holes_and_the_rest_comes_back() {
    let mut f = Fixture::new(4096);
    let bytes = image(13, 8 << 20);
    let manifest = f.backup(1, &bytes, None);
    let (_, address) = some_block(&f, &manifest);
    std::fs::remove_file(f.path(&f.object(address))).unwrap();
    let store = f.reopened();
    let options = Options { ordered: false, damaged_zero: true };
    let disk = &manifest.disks[0];
    let (restored, outcome) = restore(&store, &f.scratch(), disk, options).unwrap();
    assert!(!outcome.holes.is_empty() && outcome.written > 0);
    let mut expected = bytes;
    for (offset, length) in &outcome.holes {
        expected[*offset as usize..(offset + length) as usize].fill(0);
    }
    assert!(restored == expected);
    // Without the root nothing is known.
    let root = disk.root.unwrap();
    std::fs::remove_file(f.path(&f.object(root.address))).unwrap();
    let store = f.reopened();
    for ordered in BOTH {
        let options = Options { ordered, damaged_zero: true };
        let (_, outcome) = restore(&store, &f.scratch(), disk, options).unwrap();
        assert_eq!((outcome.written, outcome.holes), (0, vec![(0, disk.size)]));
    }
}

#[test]
fn a_sink_that_fails_ends_the_restore() {
    let mut f = Fixture::new(4096);
    let manifest = f.backup(1, &image(17, 12 << 20), None);
    let restorer = Restorer::new(&f.store, &f.scratch()).unwrap();
    for ordered in BOTH {
        let options = Options { ordered, damaged_zero: true };
        let fail =
            &mut Messages::new(|_: Scattered| Err(Error::new(Kind::Failed, "the target is full")));
        let error =
            restorer.restore(&manifest.disks[0], options, fail, &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "the target is full");
    }
}

#[test]
fn right_into_a_file_comes_the_same() {
    let mut f = Fixture::new(4096);
    let bytes = image(19, (12 << 20) + 777);
    let manifest = f.backup(1, &bytes, None);
    let restorer = Restorer::new(&f.store, &f.scratch()).unwrap();
    for ordered in BOTH {
        let options = Options { ordered, damaged_zero: false };
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes.len() as u64).unwrap();
        let (mut sum, mut most) = (0, 0);
        let told = |wrote: u64| {
            (sum, most) = (sum + wrote, most.max(wrote));
            Ok(())
        };
        let mut target = IntoFile::new(file.reopen().unwrap(), told).unwrap();
        let disk = &manifest.disks[0];
        let done = restorer.restore(disk, options, &mut target, &mut Vec::new()).unwrap();
        assert!(std::fs::read(file.path()).unwrap() == bytes);
        assert_eq!(sum, done.written);
        assert!(most < 2 << 20, "{most} bytes at once: whoever is gone is noticed late");
    }
}

#[test]
fn a_file_that_takes_no_more_and_a_client_that_is_gone_end_the_restore() {
    let mut f = Fixture::new(4096);
    let manifest = f.backup(1, &image(23, 12 << 20), None);
    let restorer = Restorer::new(&f.store, &f.scratch()).unwrap();
    let restore = |target: &mut dyn Target| {
        let found = &mut Vec::new();
        restorer.restore(&manifest.disks[0], Options::default(), target, found).unwrap_err()
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    let gone = |_| Err(Error::new(Kind::Failed, "whoever asked is gone"));
    let error = restore(&mut IntoFile::new(file.reopen().unwrap(), gone).unwrap());
    assert_eq!(error.to_string(), "whoever asked is gone");
    assert!(file.as_file().metadata().unwrap().len() <= 12 << 20);
    // Opened for reading only.
    let file = std::fs::File::open(file.path()).unwrap();
    let error = restore(&mut IntoFile::new(file, |_| Ok(())).unwrap());
    assert!(error.to_string().contains("cannot write to the target at"), "{error}");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let refused = IntoFile::new(full, |_| Ok(())).map(drop).unwrap_err();
    assert_eq!(refused.kind(), Kind::Usage);
}
