//! What is decided before anything is touched.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::engine::Counts;

pub(super) fn options(disks: &[&str], exclude: &[&str]) -> Options {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    Options {
        disks: words(disks),
        exclude: words(exclude),
        freeze: Freeze::No,
        scratch_dir: PathBuf::new(),
        scratch_max: None,
        read_limit: None,
        pacing: true,
        full: false,
        max_hold: Duration::from_secs(1),
        engine_wait: Duration::ZERO,
        max_age_full: Duration::from_secs(1),
        dry_run: false,
        rename: None,
        adopt: None,
        run_dir: PathBuf::new(),
    }
}

#[test]
fn disks_are_chosen_by_name() {
    let labels = ["vda", "vdb", "vdc"];
    let chosen = |disks: &[&str], exclude: &[&str]| {
        choose("web1", &labels, &options(disks, exclude), |i, word| labels[i] == word)
    };
    assert_eq!(chosen(&[], &[]).unwrap(), [0, 1, 2]);
    assert_eq!(chosen(&["vdb"], &[]).unwrap(), [1]);
    assert_eq!(chosen(&[], &["vdb"]).unwrap(), [0, 2]);
    let error = chosen(&["vdz"], &[]).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains("vda, vdb, vdc"), "{error}");
    assert_eq!(chosen(&[], &["vda", "vdb", "vdc"]).unwrap_err().kind(), Kind::NotFound);
}

fn snapshot(id: &str, parent: Option<&str>, time_ms: i64) -> Snapshot {
    Snapshot {
        id: SnapshotId(id.to_owned()),
        vm: Uuid::nil(),
        vm_name: "web1".to_owned(),
        time_ms,
        parent: parent.map(|id| SnapshotId(id.to_owned())),
        disks: Vec::new(),
        counts: Counts::default(),
        host: String::new(),
        duration_ms: 0,
        damaged: false,
    }
}

#[test]
fn the_last_full_read_is_found_through_the_parents() {
    let chain = [
        snapshot("a", None, 1),
        snapshot("b", Some("a"), 2),
        snapshot("c", None, 3),
        snapshot("d", Some("c"), 4),
        snapshot("e", Some("d"), 5),
    ];
    assert_eq!(last_full(&chain, &chain[4]), 3);
    assert_eq!(last_full(&chain, &chain[2]), 3);
    assert_eq!(last_full(&chain[..2], &chain[1]), 1);
    // A parent that is gone: the chain is at least as old as what is left of it.
    assert_eq!(last_full(&chain[4..], &chain[4]), 5);
}

#[test]
fn names_and_ids_can_be_overruled() {
    let own = Uuid::from_u128(1);
    let mut wanted = options(&[], &[]);
    let identity = Identity::new(own, "web1", &wanted);
    assert_eq!((identity.uuid, identity.name.as_str(), identity.adopt), (own, "web1", false));
    wanted.rename = Some("web-new".to_owned());
    assert_eq!(Identity::new(own, "web1", &wanted).name, "web-new");
    wanted.adopt = Some(Uuid::from_u128(2));
    let identity = Identity::new(own, "web1", &wanted);
    assert_eq!((identity.uuid, identity.adopt), (Uuid::from_u128(2), true));
}

/// Whether a commit that is answered so may have happened.
async fn is_ambiguous(answer: Option<&'static str>) -> bool {
    let session = Session::that_cannot_commit(answer);
    let stop = Stop::watch(std::future::pending());
    let failure = commit(&session, (0, &[]), &stop).await.err().unwrap();
    assert_eq!(failure.ambiguous, failure.error.to_string().contains("may be committed"));
    failure.ambiguous
}

#[tokio::test]
async fn only_the_engines_word_settles_a_commit() {
    let work = async {
        assert!(is_ambiguous(None).await);
        assert!(is_ambiguous(Some("fleece:interrupted: ending")).await);
        assert!(!is_ambiguous(Some("fleece:failed: no space")).await);
    };
    tokio::task::LocalSet::new().run_until(work).await;
}
