//! Every kind of damage is found, named and marked; a sound store is clean.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use super::*;
use crate::jobs::fixture::{Fixture, image};
use crate::jobs::rebuild::each_entry;
use crate::jobs::usage::usage;
use crate::store::journal::Position;
use crate::store::manifest::Manifest;
use crate::store::names;
use crate::store::recipe::RecipeReader;

/// Verifies a freshly opened store.
fn run(f: &Fixture, scope: Scope) -> (Report, Vec<Event>, HashMap<Fingerprint, Address>) {
    let options = Options { scope, scratch: f.scratch(), now_ms: 77 };
    let (mut all, mut index) = (Vec::new(), HashMap::new());
    let report = verify(
        &f.reopened(),
        &options,
        &mut |event| {
            serde_json::to_string(event).unwrap();
            all.push(event.clone());
            Ok(())
        },
        &mut |entries| {
            index.extend(entries.iter().copied());
            Ok(())
        },
    )
    .unwrap();
    assert_eq!(all.last(), Some(&Event::Summary(report)));
    (report, all, index)
}

fn problems(events: &[Event]) -> Vec<&'static str> {
    let what = |event: &Event| match event {
        Event::Problem { what, .. } => Some(*what),
        _ => None,
    };
    events.iter().filter_map(what).collect()
}

fn affected(events: &[Event]) -> Vec<String> {
    let what = |event: &Event| match event {
        Event::Affected(one) => Some(one.snapshot.clone()),
        _ => None,
    };
    events.iter().filter_map(what).collect()
}

/// Two VMs, three snapshots; the second of the first VM shares most of its tree.
fn filled() -> (Fixture, Vec<Manifest>) {
    let mut f = Fixture::new(4096);
    let mut bytes = image(3, 9 << 20);
    let one = f.backup(1, &bytes, None);
    bytes[4_000_000..4_200_000]
        .iter_mut()
        .enumerate()
        .for_each(|(i, b)| *b = ((i * 31) >> 7) as u8);
    let two = f.backup(1, &bytes, Some(&one));
    let three = f.backup(2, &image(4, 5 << 20), None);
    (f, vec![one, two, three])
}

fn ids(manifests: &[&Manifest]) -> Vec<String> {
    manifests.iter().map(|manifest| manifest.snapshot.to_string()).collect()
}

#[test]
fn a_sound_store_is_clean_and_its_index_complete() {
    let (f, manifests) = filled();
    let (report, events, index) = run(&f, Scope::All);
    assert!(report.clean(), "{events:?}");
    assert_eq!(report.snapshots, 3);
    assert!(index == f.index);
    assert_eq!(report.blocks, index.len() as u64);
    assert!(!events.iter().any(|event| matches!(event, Event::Note { .. })), "{events:?}");
    let part = run(&f, Scope::Vm(manifests[0].vm)).0;
    assert!(part.clean() && part.snapshots == 2 && part.blocks < report.blocks);
    // The second snapshot's tree is not read a second time.
    let alone = run(&f, Scope::Snapshot(SnapshotKey::of(&manifests[1]))).0;
    assert!(alone.clean() && alone.snapshots == 1 && alone.nodes + 2 < part.nodes * 2);
    let used = usage(&f.store, &f.manifests).unwrap();
    assert_eq!((used.snapshots, used.vms, used.logical_bytes), (3, 2, (9 + 9 + 5) << 20));
    assert_eq!(used.stored_bytes, bytes_below(&f.path("")));
}

fn bytes_below(folder: &std::path::Path) -> u64 {
    let bytes = |entry: std::fs::DirEntry| {
        let meta = entry.metadata().unwrap();
        if meta.is_dir() { bytes_below(&entry.path()) } else { meta.len() }
    };
    std::fs::read_dir(folder).unwrap().map(|entry| bytes(entry.unwrap())).sum()
}

/// The address of a block that snapshots 1 and 2 have and 3 has not.
fn shared_block(f: &Fixture, manifests: &[Manifest]) -> Address {
    let scratch = f.scratch();
    let restorer = crate::jobs::restore::Restorer::new(&f.store, &scratch).unwrap();
    let recipe = RecipeReader::new(
        restorer.directories,
        manifests[0].disks[0].root,
        manifests[0].disks[0].shape(4096),
    )
    .unwrap();
    let mut runs = recipe.all_runs();
    loop {
        let run = runs.next().unwrap().unwrap();
        if let crate::store::recipe::Placement::At(address) = run.placement
            && run.count > 20
        {
            return address;
        }
    }
}

#[test]
fn a_flipped_bit_is_found_named_marked_and_healed_around() {
    let (f, manifests) = filled();
    let address = shared_block(&f, &manifests);
    let frame = f.store.directories().frame_of(address).unwrap().unwrap();
    f.flip(&f.object(address), frame.offset + 100);
    let (report, events, index) = run(&f, Scope::All);
    assert_eq!(problems(&events)[0], "frame");
    assert!(!report.clean());
    assert_eq!(report.damaged_slots, u64::from(frame.span));
    assert_eq!(affected(&events), ids(&[&manifests[0], &manifests[1]]));
    assert_eq!(index.len() + usize::from(frame.span), f.index.len());
    // Marked once, for every later session.
    let damage = DamageMap::load(f.store.objects(), f.store.sealer()).unwrap();
    assert!(damage.has(address));
    let again = run(&f, Scope::All).0;
    assert_eq!(again.damaged_slots, report.damaged_slots);
    let marks = std::fs::read_dir(f.path(&format!("damage/{}", address.container))).unwrap();
    assert_eq!(marks.count(), 1);
    // The other VM is well, and so is a rebuilt index without the damaged slots.
    assert!(run(&f, Scope::Vm(manifests[2].vm)).0.problems == 0);
    let mut rebuilt = HashMap::new();
    let mut each = |entries: &[(Fingerprint, Address)]| {
        rebuilt.extend(entries.iter().copied());
        Ok(())
    };
    each_entry(&f.store, &damage, &f.scratch(), &[], &mut each).unwrap();
    assert!(rebuilt == index);
}

#[test]
fn a_lost_container_is_found_and_all_that_needs_it() {
    let (f, manifests) = filled();
    let address = shared_block(&f, &manifests);
    std::fs::remove_file(f.path(&f.object(address))).unwrap();
    let (report, events, index) = run(&f, Scope::All);
    assert_eq!(problems(&events), ["container", "reference"]);
    assert_eq!(affected(&events), ids(&[&manifests[0], &manifests[1]]));
    assert_eq!(report.affected_snapshots, 2);
    assert!(index.values().all(|at| at.container != address.container));
    let only = run(&f, Scope::Snapshot(SnapshotKey::of(&manifests[1])));
    assert_eq!(only.0.affected_snapshots, 1);
}

#[test]
fn a_damaged_node_directory_journal_or_manifest_is_found() {
    let (f, manifests) = filled();
    // The tree of the third snapshot.
    let root = manifests[2].disks[0].root.unwrap();
    let frame = f.store.directories().frame_of(root.address).unwrap().unwrap();
    f.flip(&f.object(root.address), frame.offset + 3);
    let (_, events, _) = run(&f, Scope::All);
    assert!(problems(&events).contains(&"recipe") && problems(&events).contains(&"frame"));
    assert_eq!(affected(&events), ids(&[&manifests[2]]));

    let (f, manifests) = filled();
    let object = f.object(shared_block(&f, &manifests));
    let size = std::fs::metadata(f.path(&object)).unwrap().len();
    f.flip(&object, size - 20); // The trailer's tag.
    let (_, events, _) = run(&f, Scope::All);
    assert_eq!(problems(&events), ["container", "reference"]);

    let (f, manifests) = filled();
    f.flip(&f.object(shared_block(&f, &manifests)), 90); // The lead, which no restore needs.
    let (report, events, _) = run(&f, Scope::All);
    assert_eq!((problems(&events), report.affected_snapshots), (vec!["container"], 0));

    let (f, _) = filled();
    f.flip(&names::journal(f.store.journal().unwrap().incarnation(), 2), 90);
    let (report, events, _) = run(&f, Scope::All);
    assert_eq!(problems(&events), ["journal", "journal"]); // Unreadable; a container unrecorded.
    assert_eq!(report.affected_snapshots, 0);

    let (f, manifests) = filled();
    f.flip(&SnapshotKey::of(&manifests[0]).manifest(), 200);
    let (report, events, _) = run(&f, Scope::All);
    assert_eq!(problems(&events), ["manifest"]);
    assert_eq!(report.snapshots, 3, "read from its copy");
    std::fs::remove_file(f.path(&SnapshotKey::of(&manifests[0]).manifest())).unwrap();
    let (report, events, _) = run(&f, Scope::All);
    assert_eq!((problems(&events), report.snapshots), (vec!["manifest"], 2));
}

#[test]
fn what_a_crash_leaves_is_no_problem() {
    let (f, manifests) = filled();
    // No journal entry, because the engine died before; and a copy that was not made.
    let position = f.store.journal().unwrap().last();
    let copy = SnapshotKey::of(&manifests[1]).copy();
    std::fs::remove_file(f.path(&copy)).unwrap();
    let mut packer = crate::store::container::Packer::new(
        &f.store,
        crate::store::container::ContainerKind::Blocks,
        "test",
    );
    packer.push(f.store.fingerprinter().of(&[9; 4096]), &[9; 4096]).unwrap();
    packer.seal().unwrap();
    let last = f.store.journal().unwrap().last();
    assert_eq!(last.n, position.n + 1);
    std::fs::remove_file(f.path(&names::journal(last.incarnation, last.n))).unwrap();
    let (report, events, _) = run(&f, Scope::All);
    assert!(report.clean(), "{events:?}");
    assert_eq!(events.iter().filter(|event| matches!(event, Event::Note { .. })).count(), 2);
    assert!(f.path(&copy).exists(), "healed");
}

#[test]
fn the_index_is_rebuilt_from_the_beginning_or_from_a_watermark() {
    let (mut f, _) = filled();
    let damage = DamageMap::default();
    let rebuild = |f: &Fixture, after: &[Position]| {
        let mut index = HashMap::new();
        let mut each = |entries: &[(Fingerprint, Address)]| {
            index.extend(entries.iter().copied());
            Ok(())
        };
        let rebuilt = each_entry(&f.store, &damage, &f.scratch(), after, &mut each).unwrap();
        (rebuilt, index)
    };
    let (first, index) = rebuild(&f, &[]);
    assert!(index == f.index);
    assert_eq!(first.watermark, [f.store.journal().unwrap().last()]);
    assert!(first.problems.is_empty());
    let before = f.index.clone();
    f.backup(3, &image(99, 3 << 20), None);
    let (second, newer) = rebuild(&f, &first.watermark);
    assert!(second.entries > 0 && second.containers > 0);
    assert_eq!(newer.len() + before.len(), f.index.len());
    assert!(newer.keys().all(|fingerprint| !before.contains_key(fingerprint)));
    // A journal entry that is gone or damaged costs nothing but messages.
    let incarnation = second.watermark[0].incarnation;
    f.flip(&names::journal(incarnation, 1), 90);
    std::fs::remove_file(f.path(&names::journal(incarnation, 3))).unwrap();
    let (third, index) = rebuild(&f, &[]);
    assert_eq!(third.problems.len(), 2);
    assert!(index == f.index);
    assert_eq!(third.watermark, second.watermark);
    // So does a container that is gone.
    let (mut f, manifests) = filled();
    let address = shared_block(&f, &manifests);
    std::fs::remove_file(f.path(&f.object(address))).unwrap();
    f.store = f.reopened();
    let (fourth, index) = rebuild(&f, &[]);
    assert_eq!(fourth.problems.len(), 1);
    assert!(index.values().all(|at| at.container != address.container));
}
