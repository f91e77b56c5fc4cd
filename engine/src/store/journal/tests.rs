//! Incarnations and journals: ids are never given out twice, and no entry is missing.

use std::collections::HashSet;

use super::*;
use crate::store::keys::StoreKey;
use crate::store::testing::TestStore;
use crate::store::{Store, StoreOptions};

fn entry(container: ContainerId) -> Entry {
    Entry {
        container,
        generation: 0,
        kind: ContainerKind::Blocks,
        slots: 5,
        last_in_object: container.counter,
        stored_bytes: 1 << 33,
    }
}

/// The same store with an engine of another state directory.
fn engine(test: &TestStore, state: &str) -> Result<Store> {
    let key = StoreKey::from_text(&test.key_text).unwrap();
    Store::open(test.store.location(), key, &test.dir.path().join(state), StoreOptions::default())
}

/// What another start of the engine gives, the first one gone.
fn restarted(
    test: TestStore,
    between: impl FnOnce(&Path),
) -> (Store, Vec<ContainerId>, tempfile::TempDir) {
    let journal = test.store.journal().unwrap();
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(journal.next_container().unwrap());
        journal.record(entry(ids[ids.len() - 1])).unwrap();
    }
    let TestStore { store, key_text, dir, options } = test;
    let location = store.location().clone();
    drop(store);
    let state = dir.path().join("state");
    between(&state);
    let key = StoreKey::from_text(&key_text).unwrap();
    (Store::open(&location, key, &state, options).unwrap(), ids, dir)
}

#[test]
fn a_restart_goes_on_with_its_incarnation_and_skips_what_was_reserved() {
    let (store, ids, _dir) = restarted(TestStore::new(), |_| ());
    let journal = store.journal().unwrap();
    assert_eq!(journal.incarnation(), Incarnation(1));
    let next = journal.next_container().unwrap();
    assert_eq!(next.counter, BATCH + 1);
    assert!(!ids.contains(&next));
    assert_eq!(
        journal.record(entry(next)).unwrap(),
        Position { incarnation: Incarnation(1), n: 4 }
    );
}

#[test]
fn any_doubt_claims_a_new_incarnation() {
    type Doubt = (&'static str, fn(&Path));
    let doubts: [Doubt; 5] = [
        ("no file", |state| fs::remove_file(state.join(STATE)).unwrap()),
        ("not a state", |state| fs::write(state.join(STATE), "nonsense").unwrap()),
        ("checksum", |state| edit(state, |text| text.replace("reserved = 64", "reserved = 65"))),
        ("set back", |state| resum(state, |s| s.reserved = 1)),
        ("another machine", |state| resum(state, |s| s.machine = "a clone".into())),
    ];
    for (what, doubt) in doubts {
        let (store, ids, _dir) = restarted(TestStore::new(), doubt);
        let journal = store.journal().unwrap();
        assert_eq!(journal.incarnation(), Incarnation(2), "{what}");
        assert!(!ids.contains(&journal.next_container().unwrap()), "{what}");
    }
    let (store, _, _dir) =
        restarted(TestStore::new(), |state| resum(state, |s| s.token = "stolen".into()));
    assert_eq!(store.journal().unwrap().incarnation(), Incarnation(2));
}

fn edit(state: &Path, change: impl FnOnce(String) -> String) {
    let text = fs::read_to_string(state.join(STATE)).unwrap();
    let changed = change(text.clone());
    assert_ne!(text, changed);
    fs::write(state.join(STATE), changed).unwrap();
}

/// A change that the checksum does not show; the journal position is set back as well.
fn resum(state: &Path, change: impl FnOnce(&mut State)) {
    let mut kept = State::load(&state.join(STATE)).unwrap();
    kept.journal = 0;
    change(&mut kept);
    kept.save(&state.join(STATE)).unwrap();
}

#[test]
fn a_state_that_only_knows_less_of_the_journal_goes_on_behind_it() {
    let (store, _, _dir) = restarted(TestStore::new(), |state| resum(state, |_| ()));
    let journal = store.journal().unwrap();
    assert_eq!(journal.incarnation(), Incarnation(1));
    assert_eq!(journal.last().n, 3);
}

#[test]
fn engines_of_one_store_never_give_out_the_same_id() {
    let test = TestStore::new();
    let second = engine(&test, "other").unwrap();
    assert_ne!(
        second.journal().unwrap().incarnation(),
        test.store.journal().unwrap().incarnation()
    );
    let mut seen = HashSet::new();
    for store in [&test.store, &second] {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        (0..100)
                            .map(|_| store.journal().unwrap().next_container().unwrap())
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            for thread in threads {
                seen.extend(thread.join().unwrap());
            }
        });
    }
    assert_eq!(seen.len(), 800);
    assert_eq!(test.store.journals().incarnations().unwrap(), [Incarnation(1), Incarnation(2)]);
}

#[test]
fn one_engine_at_a_time_uses_a_state_directory() {
    let test = TestStore::new();
    let error = engine(&test, "state").map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
}

#[test]
fn a_journal_has_no_gaps_whoever_writes_it() {
    let test = TestStore::new();
    let journal = test.store.journal().unwrap();
    let mut positions: Vec<(Position, ContainerId)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let record = |_| {
                        let id = journal.next_container().unwrap();
                        (journal.record(entry(id)).unwrap(), id)
                    };
                    (0..8).map(record).collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    positions.sort_unstable();
    let mut read = Vec::new();
    let last = test.store.journals().each_after(Incarnation(1), 0, |position, entries| {
        let [found] = entries else { panic!("{entries:?}") };
        assert_eq!(*found, entry(found.container));
        read.push((position, found.container));
        Ok(())
    });
    assert_eq!(last.unwrap(), 32);
    assert_eq!(read, positions);
    let mut after = 0;
    test.store
        .journals()
        .each_after(Incarnation(1), 30, |_, _| {
            after += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(after, 2);
    assert!(journal.record_all(&[]).is_err());
}

#[test]
fn an_entry_that_was_created_without_our_knowing_is_stepped_over() {
    let test = TestStore::new();
    let journal = test.store.journal().unwrap();
    let key = names::journal(Incarnation(1), 1);
    let id = journal.next_container().unwrap();
    test.store.create_sealed(ObjectKind::Journal, &key, &encode_entries(&[entry(id)])).unwrap();
    assert_eq!(journal.record(entry(id)).unwrap().n, 2);
}

#[test]
fn entries_that_are_not_entries_are_refused() {
    let good = encode_entries(&[entry(ContainerId { incarnation: Incarnation(1), counter: 2 })]);
    assert!(decode_entries(&good).is_some());
    for bad in
        [&good[..good.len() - 1], &good[..3], &[&good[..], &[0; 32]].concat(), &[255; 36][..]]
    {
        assert!(decode_entries(bad).is_none());
    }
    assert_eq!(decode_entries(&[0; 4]), Some(vec![]));
}
