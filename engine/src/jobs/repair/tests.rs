//! What is damaged is put back where a good copy exists, and named where none does.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::ids::Slot;
use crate::jobs::fixture::{Fixture, image};
use crate::jobs::restore::{Options as RestoreOptions, Restorer};
use crate::jobs::tidy;
use crate::jobs::verify::{self, Scope};
use crate::store::commit::SnapshotKey;
use crate::store::manifest::Manifest;
use crate::store::recipe::{Placement, RecipeReader};
use crate::store::{Role, StoreLevel, names};

/// Repairs a store that is opened anew: its engine has cached nothing.
fn run(f: &mut Fixture, dry_run: bool) -> (Report, Vec<Event>) {
    f.open_again();
    let options = Options { dry_run, scratch: f.scratch(), now_ms: 99 };
    let (mut events, mut indexed) = (Vec::new(), Vec::new());
    let report = repair(
        &f.store,
        &options,
        &mut |event| {
            serde_json::to_string(event).unwrap();
            events.push(event.clone());
            Ok(())
        },
        &mut |_, entries| {
            indexed.extend(entries);
            Ok(())
        },
    )
    .unwrap();
    assert_eq!(events.last(), Some(&Event::Summary(report)));
    (report, events)
}

/// Verifies a store that is opened anew; gives the report and all that was said.
fn verify_all(f: &Fixture) -> (verify::Report, String) {
    let options = verify::Options { scope: Scope::All, scratch: f.scratch(), now_ms: 77 };
    let mut said = String::new();
    let report = verify::verify(
        &f.writable(),
        &options,
        &mut |event| {
            said += &serde_json::to_string(event).unwrap();
            said.push('\n');
            Ok(())
        },
        &mut |_| Ok(()),
    )
    .unwrap();
    (report, said)
}

fn restore(f: &Fixture, manifest: &Manifest) -> Result<Vec<u8>> {
    let disk = &manifest.disks[0];
    let mut bytes = vec![0; disk.size as usize];
    let restorer = Restorer::new(&f.reopened(), &f.scratch()).unwrap();
    restorer.restore(disk, RestoreOptions::default(), &mut bytes, &mut Vec::new())?;
    Ok(bytes)
}

/// A backup that takes nothing for stored that is marked, as real ones do.
fn backup_afresh(f: &mut Fixture, bytes: &[u8], parent: Option<&Manifest>) -> Manifest {
    let damage = DamageMap::load(f.store.objects(), f.store.sealer()).unwrap();
    f.index.retain(|_, address| !damage.has(*address));
    f.backup(1, bytes, parent)
}

/// The first run of blocks of a snapshot that is long enough to be in the middle of a container.
fn some_run(f: &Fixture, manifest: &Manifest) -> Address {
    let disk = &manifest.disks[0];
    let recipe =
        RecipeReader::new(f.store.directories().clone(), disk.root, disk.shape(4096)).unwrap();
    let mut runs = recipe.all_runs();
    loop {
        let run = runs.next().unwrap().unwrap();
        if let Placement::At(address) = run.placement
            && run.count > 20
        {
            return address;
        }
    }
}

#[test]
fn lost_blocks_come_back_once_a_new_backup_stored_them_again() {
    let mut f = Fixture::new(4096);
    let bytes = image(21, 6 << 20);
    let old = f.backup(1, &bytes, None);
    let address = some_run(&f, &old);
    let frame = f.store.directories().frame_of(address).unwrap().unwrap();
    let object = f.object(address);
    f.flip(&object, frame.offset + 9);
    let damaged_object = std::fs::read(f.path(&object)).unwrap();

    let (report, said) = verify_all(&f);
    assert_eq!(report.damaged_slots, u64::from(frame.span));
    assert!(said.contains(&old.snapshot.to_string()), "{said}");
    assert_eq!(restore(&f, &old).unwrap_err().kind(), crate::error::Kind::Damaged);
    // Nowhere is there a copy yet: nothing is rewritten, and what is lost is named.
    let (report, events) = run(&mut f, false);
    assert_eq!((report.lost_slots, report.rewritten_containers), (u64::from(frame.span), 0));
    assert_eq!(report.affected_snapshots, 1, "{events:?}");
    assert!(!report.whole());

    let new = backup_afresh(&mut f, &bytes, Some(&old));
    assert!(restore(&f, &new).unwrap() == bytes);
    let before = verify_all(&f).0;
    assert_eq!(before.affected_snapshots, 1);
    let (planned, events) = run(&mut f, true);
    assert!(planned.whole(), "{events:?}");
    assert_eq!(planned.repaired_slots, u64::from(frame.span));
    assert_eq!(restore(&f, &old).unwrap_err().kind(), crate::error::Kind::Damaged, "dry run");

    let (done, events) = run(&mut f, false);
    assert!(done.whole(), "{events:?}");
    assert_eq!(done.repaired_slots, u64::from(frame.span));
    assert!(restore(&f, &old).unwrap() == bytes);
    assert!(restore(&f, &new).unwrap() == bytes);
    let (report, said) = verify_all(&f);
    assert!(report.clean(), "{said}");
    assert_eq!(report.damaged_slots, 0);
    // Nothing was overwritten, and there is nothing left to do.
    assert!(std::fs::read(f.path(&object)).unwrap() == damaged_object);
    let summary = f.store.directories().summary(address.container).unwrap().unwrap();
    assert_eq!(summary.generation, 1);
    assert_eq!(run(&mut f, false).0.marked_containers, 0);

    // The new generation is damaged in its turn, and rewritten in its turn.
    let frame = f.store.directories().frame_of(address).unwrap().unwrap();
    f.flip(&summary.object, frame.offset + 9);
    assert!(!verify_all(&f).0.clean());
    assert!(run(&mut f, false).0.whole());
    assert!(restore(&f, &old).unwrap() == bytes);
    assert_eq!(f.store.directories().summary(address.container).unwrap().unwrap().generation, 2);
    let (report, said) = verify_all(&f);
    assert!(report.clean(), "{said}");
}

#[test]
fn a_damaged_directory_is_rewritten_from_its_own_frames() {
    let parts = [
        ("lead", StoreLevel::NEWEST),
        ("column", StoreLevel::KEYS),
        ("table", StoreLevel::KEYS),
        ("table", StoreLevel::NEWEST),
    ];
    for (part, level) in parts {
        let mut f = Fixture::at(level, 4096);
        let bytes = image(22, 4 << 20);
        let manifest = f.backup(1, &bytes, None);
        let address = some_run(&f, &manifest);
        let object = f.object(address);
        let summary = f.store.directories().summary(address.container).unwrap().unwrap();
        let size = std::fs::metadata(f.path(&object)).unwrap().len();
        let table = u64::from(summary.frames) * 32 + 16;
        let at = match part {
            "lead" => 85,
            "table" => size - 160 - table + 3,
            _ => size - 160 - table - 30,
        };
        f.flip(&object, at);
        let (report, said) = verify_all(&f);
        assert!(!report.clean() && said.contains(&address.container.to_string()), "{part}: {said}");
        let (report, events) = run(&mut f, false);
        assert!(report.whole() && report.lost_slots == 0, "{part}: {events:?}");
        assert_eq!(report.rewritten_containers, 1, "{part}");
        assert_eq!(report.repaired_slots, 0, "{part}: what can be read needs no good copy");
        assert!(restore(&f, &manifest).unwrap() == bytes, "{part}");
        let (report, said) = verify_all(&f);
        assert!(report.clean(), "{part}: {said}");
    }
}

/// How much of a container is left.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Left {
    Nothing,
    /// Up to the middle of its frames.
    Half,
    /// All frames, not the end.
    Frames,
}

fn cut(f: &Fixture, object: &str, left: Left) {
    let path = f.path(object);
    let length = std::fs::metadata(&path).unwrap().len();
    match left {
        Left::Nothing => std::fs::remove_file(&path).unwrap(),
        Left::Half => std::fs::File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(length / 2))
            .unwrap(),
        Left::Frames => std::fs::File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(length - 100))
            .unwrap(),
    }
}

#[test]
fn a_container_that_is_gone_comes_back_from_what_a_new_backup_stored() {
    for left in [Left::Nothing, Left::Half, Left::Frames] {
        let mut f = Fixture::new(4096);
        let bytes = image(26, 6 << 20);
        let old = f.backup(1, &bytes, None);
        let object = f.object(some_run(&f, &old));
        cut(&f, &object, left);
        let (report, said) = verify_all(&f);
        assert!(!report.clean() && said.contains(&old.snapshot.to_string()), "{left:?}: {said}");
        assert!(restore(&f, &old).is_err());
        let (report, events) = run(&mut f, false);
        // With all frames nothing is lost; with none nothing can be put back.
        assert_eq!(report.whole(), left == Left::Frames, "{left:?}: {events:?}");
        assert_eq!(report.rewritten_containers, u64::from(left != Left::Nothing), "{left:?}");
        assert_eq!(report.lost_slots > 0, left != Left::Frames, "{left:?}: {events:?}");

        let new = backup_afresh(&mut f, &bytes, Some(&old));
        let (report, events) = run(&mut f, false);
        assert!(report.whole() && report.lost_slots == 0, "{left:?}: {events:?}");
        assert!(restore(&f, &old).unwrap() == bytes, "{left:?}");
        assert!(restore(&f, &new).unwrap() == bytes, "{left:?}");
        let (report, said) = verify_all(&f);
        assert!(report.clean() && report.damaged_slots == 0, "{left:?}: {said}");
    }
}

#[test]
fn a_second_copy_of_a_directory_is_made_again_and_never_believed_under_another_name() {
    let mut f = Fixture::new(4096);
    let bytes = image(27, 6 << 20);
    let manifest = f.backup(1, &bytes, None);
    let mut copies = Vec::new();
    f.store
        .objects()
        .list(names::DIRECTORIES, |key, _| {
            copies.push(key.to_owned());
            Ok(())
        })
        .unwrap();
    copies.sort();
    let sound: Vec<_> = copies.iter().map(|key| std::fs::read(f.path(key)).unwrap()).collect();
    assert!(copies.len() > 2, "every container has one");
    // Missing ones are made.
    copies.iter().for_each(|key| std::fs::remove_file(f.path(key)).unwrap());
    let (report, said) = verify_all(&f);
    assert!(report.clean() && report.copies_made == copies.len() as u64, "{said}");
    assert!(said.contains("the second copy of its directory was missing"), "{said}");
    let again: Vec<_> = copies.iter().map(|key| std::fs::read(f.path(key)).unwrap()).collect();
    assert!(again == sound);
    assert_eq!(verify_all(&f).0.copies_made, 0);
    // Damaged ones are named, and harm no snapshot.
    f.flip(&copies[1], 40);
    let (report, said) = verify_all(&f);
    assert_eq!((report.problems, report.affected_snapshots), (1, 0), "{said}");
    assert!(said.contains(&copies[1]) && said.contains("fleecectl tidy"), "{said}");
    // Neither a damaged one nor another's says what a lost container held.
    let (lost, _) = names::parse_directory(&copies[1]).unwrap();
    std::fs::remove_file(f.path(&names::container(lost, 0))).unwrap();
    assert!(f.reopened().directories().salvage(lost).unwrap().is_none());
    std::fs::copy(f.path(&copies[0]), f.path(&copies[1])).unwrap();
    assert!(f.reopened().directories().salvage(lost).unwrap().is_none());
    assert!(verify_all(&f).0.damaged_slots > 0);
    assert!(!run(&mut f, false).0.whole());
    // A sound one does.
    std::fs::write(f.path(&copies[1]), &sound[1]).unwrap();
    let salvage = f.reopened().directories().salvage(lost).unwrap().unwrap();
    assert!(salvage.flawed && salvage.column.iter().all(Option::is_some));
    assert!(restore(&f, &manifest).is_err());
}

#[test]
fn a_slot_whose_frame_and_column_are_damaged_is_told_by_the_second_copy() {
    let mut f = Fixture::at(StoreLevel::KEYS, 4096);
    let bytes = image(28, 4 << 20);
    let old = f.backup(1, &bytes, None);
    let address = some_run(&f, &old);
    let object = f.object(address);
    let frame = f.store.directories().frame_of(address).unwrap().unwrap();
    let summary = f.store.directories().summary(address.container).unwrap().unwrap();
    let size = std::fs::metadata(f.path(&object)).unwrap().len();
    let column = u64::from(summary.slots.div_ceil(194)) * 4096;
    let end = size - 160 - u64::from(summary.frames) * 32 - 16;
    (end.saturating_sub(column)..end).step_by(3000).for_each(|at| f.flip(&object, at));
    f.flip(&object, frame.offset + 9);
    assert!(!verify_all(&f).0.clean());
    let new = backup_afresh(&mut f, &bytes, Some(&old));
    let (report, events) = run(&mut f, false);
    assert!(report.whole() && report.repaired_slots > 0, "{events:?}");
    assert!(restore(&f, &old).unwrap() == bytes);
    assert!(restore(&f, &new).unwrap() == bytes);
    let (report, said) = verify_all(&f);
    assert!(report.clean(), "{said}");
}

#[test]
fn a_column_of_which_a_part_is_lost_with_a_frame_of_another_part_loses_no_more() {
    for lost in [None, Some(40), Some(4096 + 40)] {
        let mut f = Fixture::new(4096);
        let bytes = image(29, 6 << 20);
        let old = f.backup(1, &bytes, None);
        let address = some_run(&f, &old);
        // In the second chunk, without slots of the first.
        let later = Address { slot: Slot(250), ..address };
        let second = f.store.directories().frame_of(later).unwrap().unwrap();
        assert!(second.first.0 >= 194);
        f.flip(&f.object(address), second.offset + 9);
        let own = f.path(&names::directory(address.container, 0));
        match lost {
            None => std::fs::remove_file(&own).unwrap(),
            Some(at) => f.flip(&names::directory(address.container, 0), at),
        }
        let left = std::fs::read(&own).ok();
        let known = lost == Some(40);
        // Only the frame is lost; the others come back.
        let (report, said) = verify_all(&f);
        assert_eq!(report.damaged_slots, u64::from(second.span), "{lost:?}: {said}");
        let keeper = f.opened_by(Role::Keeper);
        let options = Options { dry_run: false, scratch: f.scratch(), now_ms: 99 };
        tidy::tidy(&keeper, &options, &mut |_| Ok(())).unwrap();
        drop(keeper);
        let after = std::fs::read(&own).ok();
        assert_eq!(after == left, !known, "{lost:?}: replaced where all of it is known");
        let new = backup_afresh(&mut f, &bytes, Some(&old));
        let (report, events) = run(&mut f, false);
        assert_eq!(report.whole(), known, "{lost:?}: {events:?}");
        assert!(restore(&f, &new).unwrap() == bytes, "{lost:?}");
        assert_eq!(restore(&f, &old).is_ok_and(|restored| restored == bytes), known, "{lost:?}");
    }
}

#[test]
fn a_recipe_node_comes_back_where_an_identical_one_exists() {
    let mut f = Fixture::new(4096);
    let bytes = image(23, 6 << 20);
    let old = f.backup(1, &bytes, None);
    let root = old.disks[0].root.unwrap();
    let frame = f.store.directories().frame_of(root.address).unwrap().unwrap();
    f.flip(&f.object(root.address), frame.offset + 3);
    assert!(!verify_all(&f).0.clean());
    assert!(!run(&mut f, false).0.whole(), "no other node is like it");
    // A full read that finds all blocks makes the same nodes again.
    let new = f.backup(1, &bytes, None);
    assert_eq!(new.disks[0].root.unwrap().level, root.level);
    let (report, events) = run(&mut f, false);
    assert!(report.repaired_slots > 0, "{events:?}");
    // Those below the root are the same; the root names them at other places, so it is not.
    assert_eq!(report.whole(), root.level == 0, "{events:?}");
    assert!(restore(&f, &new).unwrap() == bytes);
}

#[test]
fn what_was_only_missing_is_taken_back() {
    let mut f = Fixture::new(4096);
    let bytes = image(24, 4 << 20);
    let manifest = f.backup(1, &bytes, None);
    let path = f.path(&f.object(some_run(&f, &manifest)));
    let (away, folder) = (f.scratch().join("away"), f.scratch().join("other"));
    std::fs::rename(&path, &away).unwrap();
    let (report, said) = verify_all(&f);
    assert!(report.damaged_slots > 0 && report.affected_snapshots == 1, "{said}");
    assert!(!run(&mut f, false).0.whole());
    std::fs::rename(&away, &path).unwrap();
    // A repair takes it back; verify, too.
    let (report, events) = run(&mut f, false);
    assert!(report.whole() && report.whole_containers == 1, "{events:?}");
    assert!(verify_all(&f).0.clean());
    std::fs::rename(&path, &folder).unwrap();
    assert!(!verify_all(&f).0.clean());
    std::fs::rename(&folder, &path).unwrap();
    let (report, said) = verify_all(&f);
    assert!(report.clean() && report.damaged_slots == 0, "{said}");
    assert!(restore(&f, &manifest).unwrap() == bytes);
}

#[test]
fn missing_manifests_claims_and_journal_entries_are_made_again() {
    let mut f = Fixture::new(4096);
    let bytes = image(25, 3 << 20);
    let first = f.backup(1, &bytes, None);
    let second = f.backup(2, &bytes, None);
    let incarnation = f.store.journal().unwrap().incarnation();
    let gone = [
        SnapshotKey::of(&first).manifest(),
        SnapshotKey::of(&second).copy(),
        names::incarnation(incarnation),
        names::journal(incarnation, 1),
    ];
    gone.iter().for_each(|key| std::fs::remove_file(f.path(key)).unwrap());
    // Nobody takes a committed snapshot for a dead session's, though its manifest is gone.
    assert!(f.manifests.settle(first.vm, first.snapshot, "test", 1).unwrap());
    assert_eq!(f.store.journals().incarnations().unwrap(), [incarnation]);
    let (planned, events) = run(&mut f, true);
    assert_eq!(planned.repaired_manifests, 2, "{events:?}");
    assert!(gone.iter().all(|key| !f.path(key).exists()));
    let (done, events) = run(&mut f, false);
    assert!(done.whole() && done.repaired_manifests == 2, "{events:?}");
    assert!(gone[..3].iter().all(|key| f.path(key).exists()));
    assert!(f.store.journal().unwrap().incarnation() > incarnation, "never the same number again");
    let (report, said) = verify_all(&f);
    assert!(report.clean(), "{said}");
    assert_eq!(report.snapshots, 2);
    assert!(restore(&f, &first).unwrap() == bytes);
    // Both copies of a manifest gone bad cannot be repaired, and are named.
    for key in [SnapshotKey::of(&first).manifest(), SnapshotKey::of(&first).copy()] {
        f.flip(&key, 120);
    }
    let (report, events) = run(&mut f, false);
    assert!(!report.whole() && report.lost_manifests == 1, "{events:?}");
}
