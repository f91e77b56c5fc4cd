//! Sessions that go on in another engine than the one that they began in.

use std::sync::Arc;

use super::*;
use crate::ids::SnapshotId;
use crate::session::begin::{Resumed, resume};
use crate::store::commit::{Commit, Fate, SnapshotKey};

impl Host {
    /// The engine ends, and another one knows nothing of its sessions.
    fn end_engine(&mut self, client: Client) -> SnapshotId {
        let snapshot = client.begun.snapshot;
        self.context.registry.close();
        client.die();
        wait_until("the session's end", || self.context.registry.list().is_empty());
        self.context.registry = Arc::default();
        snapshot
    }

    fn fate(&self, snapshot: SnapshotId) -> Fate {
        self.context.manifests.fate(VmId(Uuid::from_u128(1)), snapshot).unwrap()
    }

    fn resume(&self, parent: &str, image: &[u8], snapshot: SnapshotId) -> Result<Resumed> {
        resume(&self.context, request(1, parent, image.len() as u64), snapshot)
    }

    fn resumed(&self, parent: &str, image: &[u8], snapshot: SnapshotId) -> Client {
        match self.resume(parent, image, snapshot).unwrap() {
            Resumed::Begun(begun) => {
                Client { begun, image: image.to_vec(), context: self.context.clone() }
            }
            Resumed::Committed(manifest) => panic!("{} is committed", manifest.snapshot),
        }
    }
}

/// Changes every third block of an image; which ones.
fn changed(image: &mut [u8]) -> Vec<u64> {
    let dirty: Vec<u64> = (0..(image.len() / BLOCK) as u64).step_by(3).collect();
    for block in &dirty {
        let at = *block as usize * BLOCK;
        image[at..at + BLOCK].copy_from_slice(&block_of(1_000_000 + block));
    }
    dirty
}

#[test]
fn a_session_goes_on_in_the_next_engine_as_the_same_snapshot() {
    let mut host = Host::new();
    let first = image(7, 600, 300);
    let parent = host.begin(1, "", &first).unwrap().run().unwrap();
    let mut second = first.clone();
    let dirty = changed(&mut second);
    let parent = parent.snapshot.as_str();

    let client = host.begin(1, parent, &second).unwrap();
    client.scan(dirty.iter().copied()).unwrap();
    client.call(Event::EndScan).unwrap();
    client.write_all().unwrap();
    let snapshot = host.end_engine(client);
    assert!(matches!(host.fate(snapshot), Fate::Open(_)), "{:?}", host.fate(snapshot));

    let again = host.resumed(parent, &second, snapshot);
    assert_eq!(host.begin(1, "", &second).err().unwrap().kind(), Kind::Busy);
    let manifest = again.run_increment(dirty).unwrap();
    assert_eq!((manifest.snapshot, manifest.parent), (snapshot, Some(parent.parse().unwrap())));
    // What the first engine sealed was found.
    assert_eq!(manifest.counts.new, 0);
    host.must_restore(&manifest, &second);
    host.must_be_exact(&[&first, &second]);
}

#[test]
fn a_session_that_committed_is_found_to_have_done_so() {
    let mut host = Host::new();
    let image = image(8, 200, 100);
    let client = host.begin(1, "", &image).unwrap();
    let manifest = client.run().unwrap();
    let snapshot = host.end_engine(client);
    match host.resume("", &image, snapshot).unwrap() {
        Resumed::Committed(committed) => assert_eq!(*committed, manifest),
        Resumed::Begun(_) => panic!("it began again"),
    }
    assert!(host.context.registry.list().is_empty());
}

#[test]
fn a_session_goes_on_only_if_nothing_came_between() {
    let mut host = Host::new();
    let image = image(9, 200, 100);
    // Its client left it, or it was settled meanwhile: it is over.
    let client = host.begin(1, "", &image).unwrap();
    let left = client.begun.snapshot;
    client.die();
    wait_until("the session's end", || host.context.registry.list().is_empty());
    let error = host.resume("", &image, left).err().unwrap();
    assert_eq!((error.kind(), error.to_string().contains("was ended")), (Kind::Failed, true));
    // A newer snapshot is there.
    let client = host.begin(1, "", &image).unwrap();
    let older = host.end_engine(client);
    let newer = host.begin(1, "", &image).unwrap().run().unwrap();
    let error = host.resume("", &image, older).err().unwrap();
    assert!(error.to_string().contains(newer.snapshot.as_str()), "{error}");
    // It never was.
    let unknown = SnapshotId::from_random(5);
    assert_eq!(host.resume("", &image, unknown).err().unwrap().kind(), Kind::NotFound);
    assert!(host.context.registry.list().is_empty());
    host.must_be_clean();
}

#[test]
fn a_commit_that_comes_late_is_the_commit() {
    let mut host = Host::new();
    let image = image(10, 200, 100);
    let client = host.begin(1, "", &image).unwrap();
    let snapshot = host.end_engine(client);
    let again = host.resumed("", &image, snapshot);
    again.scan_all().unwrap();
    again.write_all().unwrap();
    // The request of the engine before was still on its way: another manifest, of the same moment.
    let Fate::Open(seq) = host.fate(snapshot) else { panic!("it is not open") };
    let mut late = host.begin(2, "", &image).unwrap().run().unwrap();
    (late.vm, late.vm_name) = (VmId(Uuid::from_u128(1)), "vm1".into());
    (late.snapshot, late.seq) = (snapshot, seq);
    let manifests = &host.context.manifests;
    let key = SnapshotKey::of(&late);
    assert!(matches!(manifests.commit(&late).unwrap(), Commit::Committed { warning: None }));
    std::fs::remove_file(host.dir.path().join("store").join(key.copy())).unwrap();
    again.commit().unwrap();
    for record in [manifests.read_first(&key).unwrap(), manifests.read_copy(&key).unwrap()] {
        assert_eq!(record, crate::store::manifest::Record::Manifest(Box::new(late.clone())));
    }
    host.must_restore(&late, &image);
    host.must_be_clean();
}
