//! Parts of the index that go from one host to another by checkpoints in the store.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use super::cluster::{Hosts, PACE, map, wait_filled};
use super::*;
use crate::jobs::checkpoint::{Checkpoints, OwnPart};
use crate::moving::Pace;
use crate::store::shards;

/// The same for hosts that write no checkpoints by themselves.
const NO_CHECKPOINTS: Pace = Pace { least: u64::MAX, ..PACE };

/// Two hosts whose checkpoints have a whole backup, a third that is to join, and the backup.
fn checkpointed(image: &[u8]) -> (Hosts, Manifest) {
    let two = map(1, &[0, 1]);
    let hosts = Hosts::paced(&[two.clone(), two.clone(), two], NO_CHECKPOINTS);
    let made = hosts.engines[0].backup(1, image);
    hosts.must_be_exact(&[image]);
    let written = hosts.engines[..2].iter().map(|engine| {
        let (host, slices) =
            (engine.cluster.us(), engine.cluster.map().slices(engine.cluster.us()));
        let part = OwnPart { host, map_epoch: 1, slices: &slices };
        let (store, owner) = (&engine.context.store, engine.context.owners.here());
        Checkpoints::default().write(store, owner, &part, (7, &|| true)).unwrap().unwrap()
    });
    assert_eq!(written.sum::<u64>(), distinct(&[image]) as u64);
    (hosts, made)
}

#[test]
fn checkpoints_are_written_as_the_index_grows() {
    let hosts = Hosts::new(2);
    let images = [64, 65, 66].map(|seed| image(seed, 2000, 1_000_000));
    for (vm, image) in images.iter().enumerate() {
        hosts.engines[vm % 2].backup(vm as u128 + 1, image);
        for engine in &hosts.engines {
            let figures = engine.context.owners.figures();
            wait_until("a checkpoint", || {
                let written = figures.checkpointed_blocks.load(Ordering::Relaxed);
                let known = figures.unique_blocks.load(Ordering::Relaxed);
                written > 0 && known < written + PACE.least.max(written / 4)
            });
        }
    }
    assert!(shards::list(&hosts.engines[0].context.store).unwrap().len() >= 4);
}

fn join_third(hosts: &Hosts) {
    let three = map(2, &[0, 1, 2]);
    for engine in hosts.engines.iter().rev() {
        engine.cluster.adopt(three.clone()).unwrap();
    }
    wait_filled(&hosts.engines.iter().collect::<Vec<_>>());
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn who_takes_over_reads_checkpoints_and_what_was_stored_since() {
    let (old, since) = (image(61, 3000, 2500), image(62, 400, 400));
    let (hosts, before) = checkpointed(&old);
    let store = hosts.store();
    let covered = [files(&store.join("containers")), files(&store.join("directories"))].concat();
    // Less than a checkpoint is written for.
    let after = hosts.engines[1].backup(2, &since);
    // While what checkpoints have is away, it can be known by them only.
    let away = |path: &PathBuf| path.with_extension("away");
    covered.iter().for_each(|path| std::fs::rename(path, away(path)).unwrap());
    join_third(&hosts);
    covered.iter().for_each(|path| std::fs::rename(away(path), path).unwrap());
    let again = [(3, &old), (4, &since)].map(|(vm, image)| hosts.engines[2].backup(vm, image));
    assert!(again.iter().all(|made| (made.counts.new, made.counts.undetected) == (0, 0)));
    hosts.must_be_exact(&[&old, &since]);
    hosts.must_be_whole(&[(before, &old), (after, &since)]);
}

#[test]
fn where_a_checkpoint_is_damaged_directories_are_read() {
    let old = image(63, 3000, 2500);
    let (hosts, before) = checkpointed(&old);
    // A part of one, the record of another.
    let all = files(&hosts.store().join("shards"));
    let of = |host: &str, record: bool| {
        let is = |path: &&PathBuf| {
            path.to_string_lossy().contains(&format!("/{host}-"))
                && path.ends_with("record") == record
        };
        all.iter().find(is).unwrap().clone()
    };
    for path in [of("0000", false), of("0001", true)] {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    join_third(&hosts);
    let again = hosts.engines[2].backup(2, &old);
    assert_eq!((again.counts.new, again.counts.undetected), (0, 0));
    hosts.must_be_exact(&[&old]);
    let (clean, said) = verify_in(&hosts.engines[1].context);
    assert!(clean, "{said}");
    let notes = said.lines().filter(|line| line.contains("hosts read directories instead"));
    assert_eq!(notes.count(), 2, "{said}");
    hosts.must_be_whole(&[(before, &old)]);
}

#[test]
fn an_index_that_is_being_filled_is_not_compared() {
    let (two, three) = (map(1, &[0, 1]), map(2, &[0, 1, 2]));
    let never = Pace { settle: Duration::from_secs(3600), ..PACE };
    let hosts = Hosts::paced(&[two.clone(), two.clone(), two], never);
    hosts.engines[0].backup(1, &image(67, 1000, 1000));
    let verified = |engine: usize| {
        let (clean, said) = verify_in(&hosts.engines[engine].context);
        assert!(clean, "{said}");
        said
    };
    assert!(!verified(1).contains("was not compared"));
    for engine in &hosts.engines {
        engine.cluster.adopt(three.clone()).unwrap();
    }
    // It has what is the third host's now.
    assert!(verified(0).contains("was not compared"));
}
