//! The decision of [`super::bitmap::plan`]: cases by hand, and a model of a VM with crashes.

#![allow(clippy::unwrap_used)]

use super::bitmap::*;
use super::disk::Disk;
use proptest::prelude::*;
use std::collections::BTreeMap;
use uuid::Uuid;

const STORE: &str = "s";
const BLOCKS: usize = 8;

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn bitmap(snapshot: &str, disk: Uuid, recording: bool) -> Bitmap {
    let name = BitmapName { store: STORE.into(), snapshot: snapshot.into(), disk };
    Bitmap { name, recording, inconsistent: false, busy: false, dirty: 0 }
}

fn disk(label: &str, bitmaps: Vec<Bitmap>) -> Disk {
    Disk {
        label: label.into(),
        node: format!("node-{label}"),
        format: "qcow2".into(),
        persistent: true,
        size: 100,
        bitmaps,
        ..Disk::default()
    }
}

fn known_disk(label: &str, uuid: Uuid) -> KnownDisk {
    KnownDisk { uuid, label: label.into(), size: 100 }
}

fn decide(disks: &[Disk], fates: &[(&str, Fate)], known: &[KnownDisk]) -> Plan {
    let fates: BTreeMap<String, Fate> = fates.iter().map(|(s, f)| ((*s).to_owned(), *f)).collect();
    let latest = if known.is_empty() { "" } else { "p" };
    let mut next = 1000;
    plan(disks, Known { store: STORE, fates: &fates, latest, known }, || {
        next += 1;
        id(next)
    })
}

fn reason(plan: &DiskPlan) -> &str {
    match &plan.base {
        Base::Full { reason } => reason,
        Base::Incremental { .. } => "incremental",
    }
}

const P: (&str, Fate) = ("p", Fate::Committed);
const N: (&str, Fate) = ("n", Fate::Ended);

#[test]
fn names_are_read_back_and_others_are_not_ours() {
    let name = BitmapName { store: "ab".into(), snapshot: "8d4x1c".into(), disk: id(7) };
    assert_eq!(BitmapName::parse(&name.to_string()), Some(name));
    for other in [
        "",
        "backup-vda",
        "fleece:",
        "fleece:a:b",
        "fleece:a:b:c",
        "fleece::b:00000000-0000-0000-0000-000000000007",
    ] {
        assert_eq!(BitmapName::parse(other), None, "{other}");
    }
    assert_eq!(BitmapName::parse("fleece:a:b:00000000-0000-0000-0000-000000000007:x"), None);
    assert_eq!(BitmapName::parse("fleece:a:b:00000000000000000000000000000007"), None);
}

#[test]
fn a_disk_follows_its_bitmap_not_its_place() {
    let disks =
        [disk("vda", vec![bitmap("p", id(2), true)]), disk("vdb", vec![bitmap("p", id(1), true)])];
    let plan = decide(&disks, &[P], &[known_disk("vda", id(1)), known_disk("vdb", id(2))]);
    assert_eq!([plan.disks[0].uuid, plan.disks[1].uuid], [id(2), id(1)]);
    assert!(plan.disks.iter().all(|d| d.parent() == "p"));
    assert!(plan.recovery.is_empty());
}

#[test]
fn without_a_bitmap_the_label_counts_unless_claimed() {
    let disks = [
        disk("vda", vec![bitmap("p", id(2), true)]),
        disk("vdb", Vec::new()),
        disk("vdc", Vec::new()),
    ];
    let plan = decide(
        &disks,
        &[P],
        &[known_disk("vda", id(1)), known_disk("vdb", id(2)), known_disk("vdc", id(3))],
    );
    assert_eq!(plan.disks[1].uuid, id(1001), "vdb's identity went with its image to vda");
    assert_eq!(reason(&plan.disks[1]), "disk is new since p");
    assert_eq!(plan.disks[2].uuid, id(3));
    assert!(reason(&plan.disks[2]).contains("no dirty bitmap"), "{}", reason(&plan.disks[2]));
}

#[test]
fn of_two_copies_the_one_at_the_old_place_keeps_the_identity() {
    let copy = || vec![bitmap("p", id(1), true)];
    let disks = [disk("vdb", copy()), disk("vda", copy())];
    let plan = decide(&disks, &[P], &[known_disk("vda", id(1))]);
    assert_eq!((plan.disks[1].uuid, plan.disks[1].parent()), (id(1), "p"));
    assert_eq!((plan.disks[0].uuid, plan.disks[0].parent()), (id(1001), ""));
    let name = disks[0].bitmaps[0].name.to_string();
    assert_eq!(plan.recovery, [Action::Remove { node: "node-vdb".into(), name }]);
}

#[test]
fn a_dead_run_is_merged_back_and_a_committed_parent_dropped() {
    let both = || vec![bitmap("p", id(1), false), bitmap("n", id(1), true)];
    let name = |i: usize| both()[i].name.to_string();
    let node = || "node-vda".to_owned();
    let plan = decide(&[disk("vda", both())], &[P, N], &[known_disk("vda", id(1))]);
    assert_eq!(
        plan.recovery,
        [Action::MergeBack { node: node(), from: vec![name(1)], into: name(0) }]
    );
    assert_eq!(plan.disks[0].parent(), "p");
    // The crash came after the commit: the newer one is the truth.
    let fates =
        BTreeMap::from([("p".to_owned(), Fate::Committed), ("n".to_owned(), Fate::Committed)]);
    let known = [known_disk("vda", id(1))];
    let disks = [disk("vda", both())];
    let after = super::bitmap::plan(
        &disks,
        Known { store: STORE, fates: &fates, latest: "n", known: &known },
        Uuid::nil,
    );
    assert_eq!(after.recovery, [Action::Remove { node: node(), name: name(0) }]);
    assert_eq!(after.disks[0].parent(), "n");
}

#[test]
fn a_merge_back_that_stopped_half_way_is_done_again() {
    // The parent's was set going again, but nobody knows whether it was given what it lacks.
    let both = [bitmap("p", id(1), true), bitmap("n", id(1), true)];
    let [into, from] = [both[0].name.to_string(), both[1].name.to_string()];
    let plan = decide(&[disk("vda", both.to_vec())], &[P, N], &[known_disk("vda", id(1))]);
    let merge = Action::MergeBack { node: "node-vda".into(), from: vec![from], into };
    assert_eq!((plan.recovery, plan.disks[0].parent()), (vec![merge], "p"));
}

#[test]
fn doubt_means_a_full_read() {
    let known = [known_disk("vda", id(1))];
    let mut broken = bitmap("p", id(1), false);
    broken.inconsistent = true;
    let plan = decide(&[disk("vda", vec![broken])], &[P], &known);
    assert!(reason(&plan.disks[0]).contains("inconsistent"));
    assert_eq!((plan.disks[0].uuid, plan.recovery.len()), (id(1), 1));
    let stopped = decide(&[disk("vda", vec![bitmap("p", id(1), false)])], &[P], &known);
    assert!(reason(&stopped.disks[0]).contains("does not reach until now"));
    let grown = Disk { size: 200, ..disk("vda", vec![bitmap("p", id(1), true)]) };
    let grown = decide(&[grown], &[P], &known);
    assert!(reason(&grown.disks[0]).contains("size changed"));
    assert!(grown.disks[0].bitmap.is_some(), "it goes when this backup commits");
    let overlay = Disk { bitmap_beneath: true, ..disk("vda", Vec::new()) };
    assert!(reason(&decide(&[overlay], &[P], &known).disks[0]).contains("overlay"));
    let data_file = Disk { external_data: true, ..disk("vda", vec![bitmap("p", id(1), true)]) };
    assert!(reason(&decide(&[data_file], &[P], &known).disks[0]).contains("external data file"));
    assert_eq!(
        reason(&decide(&[disk("vda", Vec::new())], &[], &[]).disks[0]),
        "first backup of this VM"
    );
}

#[test]
fn what_is_not_ours_or_in_use_is_left_alone() {
    let mut other = bitmap("x", id(9), true);
    other.name.store = "another".into();
    let mut busy = bitmap("p", id(1), true);
    busy.busy = true;
    let unknown = bitmap("nobody-asked", id(1), true);
    let plan =
        decide(&[disk("vda", vec![other, busy, unknown])], &[P], &[known_disk("vda", id(1))]);
    assert!(plan.recovery.is_empty());
    assert_eq!(plan.disks[0].parent(), "");
}

/// A bitmap, what is dirty in it, and whether the image has it since the last clean end.
type Kept = (Bitmap, [bool; BLOCKS], bool);

/// A VM with one disk, as slow and plain as can be.
#[derive(Default)]
struct Model {
    content: [u32; BLOCKS],
    stamp: u32,
    bitmaps: Vec<Kept>,
    /// A copy of the image, made while the VM was off.
    copy: Option<([u32; BLOCKS], Vec<Kept>)>,
    committed: Vec<(String, [u32; BLOCKS], Uuid)>,
    begun: u32,
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize),
    /// A backup that stops after so many steps; 9 is none. Then the bitmaps are merged back, by
    /// the guard or in an image, where this stops after so many steps too.
    Backup {
        until: u8,
        guard: u8,
        writes: Vec<usize>,
    },
    Restart {
        cleanly: bool,
    },
    /// The VM is shut off and its image copied.
    Copy,
    /// The VM is shut off and the copy takes the image's place.
    PutBack,
}

impl Model {
    fn write(&mut self, block: usize) {
        self.stamp += 1;
        self.content[block] = self.stamp;
        for (bitmap, dirty, _) in &mut self.bitmaps {
            dirty[block] |= bitmap.recording;
        }
    }

    fn find(&mut self, name: &str) -> Option<&mut Kept> {
        self.bitmaps.iter_mut().find(|b| b.0.name.to_string() == name)
    }

    fn remove(&mut self, name: &str) {
        self.bitmaps.retain(|b| b.0.name.to_string() != name);
    }

    /// In the order of the offline way, which can stop after each step.
    fn merge_back(&mut self, from: &[String], into: &str, until: u8) {
        let mut step = 0;
        let mut go_on = || {
            step += 1;
            step <= until
        };
        for name in from.iter().filter(|_| go_on()) {
            let dirty = self.find(name).unwrap().1;
            let target = self.find(into).unwrap();
            assert!(!target.0.inconsistent);
            target.1.iter_mut().zip(dirty).for_each(|(t, d)| *t |= d);
        }
        if go_on() {
            self.find(into).unwrap().0.recording = true;
        }
        from.iter().filter(|_| go_on()).for_each(|name| self.remove(name));
    }

    fn plan(&mut self) -> Plan {
        let disks = [disk("vda", self.bitmaps.iter().map(|b| b.0.clone()).collect())];
        let is_committed = |s: &String| self.committed.iter().any(|c| c.0 == *s);
        let fate = |s: String| {
            let fate = if is_committed(&s) { Fate::Committed } else { Fate::Ended };
            (s, fate)
        };
        let fates = named_snapshots(&disks, STORE).into_iter().map(fate).collect();
        let latest = self.committed.last();
        let known: Vec<KnownDisk> = latest.iter().map(|c| known_disk("vda", c.2)).collect();
        let latest = latest.map_or("", |c| c.0.as_str());
        let result =
            plan(&disks, Known { store: STORE, fates: &fates, latest, known: &known }, || id(1));
        for action in &result.recovery {
            match action {
                Action::Remove { name, .. } => self.remove(name),
                Action::MergeBack { from, into, .. } => self.merge_back(from, into, u8::MAX),
            }
        }
        result
    }

    /// Everything that differs from the parent is dirty.
    fn check(&mut self, plan: &DiskPlan) {
        let Base::Incremental { parent } = &plan.base else { return };
        let before = self.committed.iter().find(|c| c.0 == *parent).unwrap().1;
        let content = self.content;
        let (bitmap, dirty, _) = self.find(plan.bitmap.as_ref().unwrap()).unwrap();
        assert!(bitmap.recording && !bitmap.inconsistent);
        for block in 0..BLOCKS {
            assert!(dirty[block] || content[block] == before[block], "block {block} is forgotten");
        }
    }

    fn backup(&mut self, until: u8, guard: u8, writes: &[usize]) {
        let plan = self.plan();
        // Recovery settles it: a second look finds nothing to do and decides the same.
        let again = self.plan();
        assert!(again.recovery.is_empty(), "{again:?}");
        assert_eq!(again.disks[0].parent(), plan.disks[0].parent());
        assert_eq!(again.disks[0].bitmap, plan.disks[0].bitmap);
        let plan = &plan.disks[0];
        self.check(plan);
        self.begun += 1;
        let snapshot = format!("n{}", self.begun);
        let new = bitmap(&snapshot, plan.uuid, true);
        let name = new.name.to_string();
        let mut writes = writes.iter().copied().cycle();
        let mut step = 0;
        let mut go_on = |model: &mut Model| {
            writes.next().into_iter().for_each(|block| model.write(block));
            step += 1;
            step <= until
        };
        if !go_on(self) {
            return;
        }
        self.bitmaps.push((new, [false; BLOCKS], false));
        if !go_on(self) {
            return self.after_death(guard, &name, None);
        }
        let truth = self.content;
        let old = plan.bitmap.clone().filter(|_| !plan.parent().is_empty());
        if !go_on(self) {
            return self.after_death(guard, &name, old);
        }
        old.iter().for_each(|old| self.find(old).unwrap().0.recording = false);
        if !go_on(self) {
            return self.after_death(guard, &name, old);
        }
        self.committed.push((snapshot, truth, plan.uuid));
        if go_on(self) {
            plan.bitmap.iter().for_each(|old| self.remove(old));
        }
    }

    fn after_death(&mut self, guard: u8, new: &str, old: Option<String>) {
        match old {
            Some(old) => self.merge_back(&[new.to_owned()], &old, guard),
            None if guard > 0 => self.remove(new),
            None => {}
        }
    }

    fn restart(&mut self, cleanly: bool) {
        if cleanly {
            self.bitmaps.iter_mut().filter(|b| !b.0.inconsistent).for_each(|b| b.2 = true);
        } else {
            self.bitmaps.retain(|b| b.2);
            self.bitmaps.iter_mut().for_each(|b| (b.0.inconsistent, b.0.recording) = (true, false));
        }
    }
}

impl Model {
    fn copy(&mut self) {
        self.restart(true);
        self.copy = Some((self.content, self.bitmaps.clone()));
    }

    fn put_back(&mut self) {
        if let Some((content, bitmaps)) = self.copy.clone() {
            (self.content, self.bitmaps) = (content, bitmaps);
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let writes = prop::collection::vec(0..BLOCKS, 1..4);
    prop_oneof![
        3 => (0..BLOCKS).prop_map(Step::Write),
        4 => (prop_oneof![2 => Just(9u8), 1 => 0..6u8], 0..4u8, writes)
            .prop_map(|(until, guard, writes)| Step::Backup { until, guard, writes }),
        1 => prop_oneof![3 => Just(true), 1 => Just(false)].prop_map(|cleanly| Step::Restart { cleanly }),
        1 => prop_oneof![Just(Step::Copy), Just(Step::PutBack)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn nothing_dirty_is_ever_forgotten(steps in prop::collection::vec(step(), 1..60)) {
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Write(block) => model.write(block),
                Step::Backup { until, guard, writes } => model.backup(until, guard, &writes),
                Step::Restart { cleanly } => model.restart(cleanly),
                Step::Copy => model.copy(),
                Step::PutBack => model.put_back(),
            }
        }
    }

    #[test]
    fn names_never_panic(name in "\\PC{0,80}") {
        if let Some(read) = BitmapName::parse(&name) {
            prop_assert_eq!(read.to_string(), name);
        }
    }
}
