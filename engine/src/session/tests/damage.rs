//! Damage of every kind of object: named, refused, read again, repaired.

use super::*;
use crate::ids::{Address, ContainerId, Incarnation, Slot};
use crate::store::commit::SnapshotKey;
use crate::store::container::SlotInfo;
use crate::store::recipe::{Placement, RecipeReader};
use crate::store::{damage, names};

impl Host {
    fn path(&self, key: &str) -> std::path::PathBuf {
        self.dir.path().join("store").join(key)
    }

    fn repair(&self) -> (bool, String) {
        let mut said = String::new();
        let whole = upkeep::repair(&self.context, false, 5, &mut |line| {
            said = format!("{said}{line}\n");
            Ok(())
        });
        (whole.unwrap(), said)
    }

    /// What is read next comes from the store.
    fn forget(&self) {
        for (container, _) in self.containers() {
            self.context.store.directories().forget(container);
        }
    }

    fn containers(&self) -> Vec<(ContainerId, u32)> {
        let mut all = Vec::new();
        let mut each = |key: &str, _| {
            all.extend(names::parse_container(key));
            Ok(())
        };
        self.context.store.objects().list(names::CONTAINERS, &mut each).unwrap();
        all
    }

    fn address_of(&self, manifest: &Manifest, block: u64) -> Address {
        address_in(&self.context, manifest, block)
    }

    fn object_of(&self, address: Address) -> String {
        self.context.store.directories().summary(address.container).unwrap().unwrap().object
    }
}

/// Where a block of a snapshot is.
pub(super) fn address_in(context: &Context, manifest: &Manifest, block: u64) -> Address {
    let disk = manifest.disk("").unwrap();
    let shape = disk.shape(BLOCK as u32);
    let nodes = context.store.directories();
    let reader = RecipeReader::new(nodes, disk.root, shape).unwrap();
    let run = reader.runs(block..block + 1).next().unwrap().unwrap();
    match run.placement {
        Placement::At(address) => address,
        Placement::Zero => panic!("block {block} is zero"),
    }
}

/// Blocks that differ all, so that every backup has containers of its own.
pub(super) fn different(first: u64, blocks: u64) -> Vec<u8> {
    (first..first + blocks).flat_map(block_of).collect()
}

#[test]
fn damage_is_read_again_by_the_next_increment_and_repair_heals_old_snapshots() {
    let host = Host::new();
    let image = different(1, 1200);
    let full = host.begin(1, "", &image).unwrap().run().unwrap();
    let other = host.begin(2, "", &different(9000, 50)).unwrap().run().unwrap();
    let victim = host.address_of(&full, 600);
    let frame = host.context.store.directories().frame_of(victim).unwrap().unwrap();
    flip(&host.path(&host.object_of(victim)), frame.offset + 20);
    host.forget();

    // A strict restore that fails leaves a mark.
    assert_eq!(host.restore(&full).unwrap_err().kind(), Kind::Damaged);
    assert!(host.context.damage.map().has(victim));
    let (clean, said) = host.verify();
    assert!(!clean && said.contains(full.snapshot.as_str()) && said.contains("affected"), "{said}");
    assert!(!said.contains(other.snapshot.as_str()), "{said}");
    assert!(!host.repair().0, "no good copy exists yet");

    // The bitmap is clean, and the ranges are read all the same.
    let client = host.begin(1, full.snapshot.as_str(), &image).unwrap();
    let forced: u64 = client.begun.disks[0].forced.iter().map(|(_, length)| length).sum();
    assert_eq!(forced, u64::from(frame.span) * BLOCK as u64);
    let healed = client.run_increment([]).unwrap();
    assert_eq!(healed.counts.new, forced, "a damaged block is stored again");
    host.must_restore(&healed, &image);
    assert!(host.restore(&full).is_err());

    let (whole, said) = host.repair();
    assert!(whole, "{said}");
    host.must_restore(&full, &image);
    host.must_restore(&healed, &image);
    host.must_be_clean();
    let slot = host.context.store.directories().slot(victim).unwrap();
    assert!(matches!(slot, SlotInfo::Present(_)), "{slot:?}");
    // Nothing is forced any more, and nothing is stored twice from here on.
    let client = host.begin(1, healed.snapshot.as_str(), &image).unwrap();
    assert!(client.begun.disks[0].forced.is_empty());
    let after = client.run_increment(0..1200).unwrap();
    assert_eq!((after.counts.new, after.counts.unchanged), (0, image.len() as u64));
    host.must_be_clean();
}

#[test]
fn a_session_and_a_serve_that_meet_damage_mark_it() {
    let host = Host::new();
    let image = different(1, 600);
    let full = host.begin(1, "", &image).unwrap().run().unwrap();
    let victim = host.address_of(&full, 300);
    let object = host.object_of(victim);
    let pristine = std::fs::read(host.path(&object)).unwrap();
    // Read at random, as serve does.
    let frame = host.context.store.directories().frame_of(victim).unwrap().unwrap();
    flip(&host.path(&object), frame.offset + 20);
    host.forget();
    let mut served = upkeep::restorer(&host.context).image(full.disk("").unwrap()).unwrap();
    assert!(served.read_at(300 * BLOCK as u64, &mut [0; BLOCK]).is_err());
    let found = served.take_found();
    assert_eq!(found[0].slots, (frame.first.0, frame.span));
    // A session that compares with a container whose end is gone.
    std::fs::write(host.path(&object), &pristine[..pristine.len() - 40]).unwrap();
    host.forget();
    let client = host.begin(1, full.snapshot.as_str(), &image).unwrap();
    let marked = || host.context.damage.map().has(victim);
    assert!(!marked());
    let next = client.run_increment(300..310).unwrap();
    wait_until("the mark", marked);
    assert_eq!(next.counts.new, 10 * BLOCK as u64);
    // It was missing only for a time: verify takes the marks back.
    std::fs::write(host.path(&object), &pristine).unwrap();
    host.must_be_clean();
    assert!(!marked());
    host.must_restore(&next, &image);
}

#[test]
fn a_damaged_node_that_nobody_marked_fails_one_backup_at_most_on_any_engine() {
    let host = Host::new();
    let image = different(1, 3000);
    let full = host.begin(1, "", &image).unwrap().run().unwrap();
    let root = full.disk("").unwrap().root.unwrap();
    let frame = host.context.store.directories().frame_of(root.address).unwrap().unwrap();
    flip(&host.path(&host.object_of(root.address)), frame.offset + 5);
    host.forget();
    let client = host.begin(1, full.snapshot.as_str(), &image).unwrap();
    let failed = client.run_increment([7]);
    drop(client);
    wait_until("the session's end", || host.context.registry.list().is_empty());
    let parent = match failed {
        Ok(manifest) => manifest,
        Err(error) => {
            assert_eq!(error.kind(), Kind::Damaged, "{error}");
            assert!(host.context.damage.map().has(root.address), "marked for all engines");
            full
        }
    };
    // Another engine knows nothing but the marks.
    host.context.registry.trust(VmId(Uuid::from_u128(1)));
    let client = host.begin(1, parent.snapshot.as_str(), &image).unwrap();
    let healed = client.run_increment([7]).unwrap();
    host.must_restore(&healed, &image);
}

/// Scans in windows that end there, and writes meanwhile.
fn in_windows(client: &Client, ends: &[u64]) {
    std::thread::scope(|scope| {
        scope.spawn(|| client.write_all().unwrap());
        let mut first = 0;
        for end in ends {
            client.scan(first..*end).unwrap();
            client.call(Event::EndWindow).unwrap();
            first = *end;
        }
        client.call(Event::EndScan).unwrap();
    });
}

#[test]
fn a_recipe_that_is_lost_is_built_anew_over_several_windows_or_not_at_all() {
    // Neither windows nor nodes end where the others do; the first client leaves a block out.
    for (full_read, ends, whole) in [
        (false, &[700, 2999][..], false),
        (false, &[700, 1500, 3000], true),
        (true, &[1, 2999, 3000], true),
    ] {
        let host = Host::new();
        let image = different(1, 3000);
        let before = host.begin(1, "", &image).unwrap().run().unwrap();
        let root = before.disk("").unwrap().root.unwrap();
        let frame = host.context.store.directories().frame_of(root.address).unwrap().unwrap();
        flip(&host.path(&host.object_of(root.address)), frame.offset + 5);
        host.forget();
        let container = root.address.container;
        let found = damage::Found { container, slots: (0, u16::MAX), how: "flipped".into() };
        host.context.damage.met(&host.context.store, &[found], "the test");
        let parent = if full_read { "" } else { before.snapshot.as_str() };
        let client = host.begin(1, parent, &image).unwrap();
        in_windows(&client, ends);
        match client.commit() {
            Ok(manifest) if whole => host.must_restore(&manifest, &image),
            Ok(_) => panic!("a recipe with a hole is committed"),
            Err(error) => assert!(!whole && error.kind() == Kind::Damaged, "{whole}: {error}"),
        }
    }
}

/// What is done to an object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Harm {
    Flip,
    Truncate,
    Remove,
}

fn flip(path: &std::path::Path, at: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at as usize] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

fn harm(path: &std::path::Path, harm: Harm, at: u64) {
    match harm {
        Harm::Flip => flip(path, at),
        Harm::Truncate => {
            let bytes = std::fs::read(path).unwrap();
            std::fs::write(path, &bytes[..bytes.len() - 30]).unwrap();
        }
        Harm::Remove => std::fs::remove_file(path).unwrap(),
    }
}

/// What an object's damage means.
struct Case {
    what: &'static str,
    /// Its key, and the byte to flip.
    object: fn(&Filled) -> (String, u64),
    /// Its snapshot's bytes are gone; else only redundancy is.
    loses: bool,
    /// Whether verify can know that it is missing.
    missed: bool,
}

/// Two VMs, two snapshots of the first, a tombstone, a mark; nothing of one is in the other.
struct Filled {
    host: Host,
    one: Manifest,
    images: [Vec<u8>; 2],
    other: Manifest,
    tombstone: SnapshotKey,
    mark: String,
}

fn filled(level: StoreLevel) -> Filled {
    let host = Host::at(level);
    let images = [different(1, 700), different(5000, 80)];
    let one = host.begin(1, "", &images[0]).unwrap().run().unwrap();
    let other = host.begin(2, "", &images[1]).unwrap().run().unwrap();
    let client = host.begin(3, "", &images[1]).unwrap();
    let (vm, snapshot) = (VmId(Uuid::from_u128(3)), client.begun.snapshot);
    client.die();
    wait_until("the session's end", || host.context.registry.list().is_empty());
    let tombstone = SnapshotKey { vm, seq: 1, snapshot };
    assert!(host.path(&tombstone.copy()).exists());
    // A mark of a container that does not matter: it never was.
    let container = ContainerId { incarnation: Incarnation(77), counter: 1 };
    let mark =
        damage::DamageMark { slots: vec![(1, 1)], found_ms: 1, how: "test".into(), healed: None };
    let store = &host.context.store;
    damage::mark(store.objects(), store.sealer(), container, &mark).unwrap();
    let mark = names::damage(container, 1);
    Filled { host, one, images, other, tombstone, mark }
}

/// Places in the container of the other VM's blocks: from its end, trailer, table, column.
fn other_container(f: &Filled) -> (String, u64, u64) {
    let address = f.host.address_of(&f.other, 40);
    let object = f.host.object_of(address);
    let size = std::fs::metadata(f.host.path(&object)).unwrap().len();
    let frames = f.host.context.store.directories().frames(address.container).unwrap().len();
    (object, size, frames as u64 * 32 + 16)
}

const CASES: [Case; 14] = [
    Case {
        what: "store header",
        object: |_| (names::STORE.into(), 100),
        loses: false,
        missed: true,
    },
    Case {
        what: "claim",
        object: |f| (names::incarnation(f.host.context.store.journal().unwrap().incarnation()), 85),
        loses: false,
        missed: true,
    },
    Case {
        what: "journal entry",
        object: |f| (names::journal(f.host.context.store.journal().unwrap().incarnation(), 1), 85),
        loses: false,
        missed: true,
    },
    Case {
        what: "container lead",
        object: |f| (other_container(f).0, 90),
        loses: false,
        missed: true,
    },
    Case {
        what: "container frame",
        object: |f| (other_container(f).0, 300),
        loses: true,
        missed: true,
    },
    Case {
        what: "container column",
        object: |f| {
            let (object, size, table) = other_container(f);
            (object, size - 160 - table - 30)
        },
        loses: true,
        missed: true,
    },
    Case {
        what: "container table",
        object: |f| {
            let (object, size, table) = other_container(f);
            (object, size - 160 - table + 3)
        },
        loses: true,
        missed: true,
    },
    Case {
        what: "container trailer",
        object: |f| {
            let (object, size, _) = other_container(f);
            (object, size - 20)
        },
        loses: true,
        missed: true,
    },
    Case {
        what: "directory copy",
        object: |f| {
            let address = f.host.address_of(&f.other, 40);
            (names::directory(address.container, 0), 90)
        },
        loses: false,
        missed: true,
    },
    Case {
        what: "recipe node",
        object: |f| {
            let root = f.other.disk("").unwrap().root.unwrap();
            (f.host.object_of(root.address), 110)
        },
        loses: true,
        missed: true,
    },
    Case {
        what: "session",
        object: |f| (names::session(f.other.vm, f.other.seq, f.other.snapshot), 90),
        loses: false,
        missed: false,
    },
    Case {
        what: "manifest",
        object: |f| (SnapshotKey::of(&f.other).manifest(), 90),
        loses: false,
        missed: true,
    },
    Case {
        what: "manifest copy",
        object: |f| (SnapshotKey::of(&f.other).copy(), 90),
        loses: false,
        missed: true,
    },
    Case {
        what: "tombstone",
        object: |f| (f.tombstone.manifest(), 90),
        loses: false,
        missed: true,
    },
];

#[test]
fn every_kind_of_damage_in_every_kind_of_object() {
    for case in &CASES {
        for harm in [Harm::Flip, Harm::Truncate, Harm::Remove] {
            // Another part of a container is the same when it is cut or gone.
            let same = case.what.starts_with("container") && case.what != "container trailer";
            if harm == Harm::Flip || !same {
                one_case(case, harm);
            }
        }
    }
}

fn one_case(case: &Case, kind: Harm) {
    let name = format!("{}, {kind:?}", case.what);
    // Later the column of blocks is apart, in what is called the copy here.
    let level = match case.what {
        "container column" => StoreLevel::KEYS,
        _ => StoreLevel::NEWEST,
    };
    let f = filled(level);
    let (host, other) = (&f.host, &f.other);
    let (object, at) = (case.object)(&f);
    harm(&host.path(&object), kind, at);
    host.forget();
    let (clean, said) = host.verify();
    let silent = kind == Harm::Remove && !case.missed;
    // A second copy that is missing is made again by verify itself.
    let healed = kind == Harm::Remove && case.what.ends_with("copy");
    assert_eq!(clean, silent || healed, "{name}: {said}");
    let named = object.split('/').skip(1).collect::<Vec<_>>().join("-");
    let named = named.trim_end_matches("-0000");
    assert!(silent || said.contains(&object) || said.contains(named), "{name}: {object}\n{said}");
    let affected = said.lines().filter(|line| line.contains("\"affected\"")).collect::<String>();
    let lost = case.loses || (case.what.starts_with("container") && kind != Harm::Flip);
    assert_eq!(affected.contains(other.snapshot.as_str()), lost, "{name}: {said}");
    assert!(!affected.contains(f.one.snapshot.as_str()), "{name}: {said}");
    // Wrong bytes are refused, right ones are not.
    host.must_restore(&f.one, &f.images[0]);
    match host.restore(other) {
        Ok(bytes) => assert!(!lost && bytes == f.images[1], "{name}"),
        Err(error) => assert!(lost && error.kind() == Kind::Damaged, "{name}: {error}"),
    }
    next_backups_are_exact(&f, &name);
    if case.what.starts_with("container") {
        // What the next backup stored again stands in the place of what was lost.
        let (whole, said) = host.repair();
        assert!(whole, "{name}: {said}");
        host.must_restore(other, &f.images[1]);
        host.must_be_clean();
    }
}

/// The next backup of either VM commits, is exact, and dedups against nothing that is damaged.
fn next_backups_are_exact(f: &Filled, name: &str) {
    for (vm, before, image) in [(1, &f.one, &f.images[0]), (2, &f.other, &f.images[1])] {
        let client = f.host.begin(vm, before.snapshot.as_str(), image).unwrap();
        let blocks = (image.len() / BLOCK) as u64;
        let committed = if client.begun.disks[0].incremental {
            client.run_increment([3, blocks - 1])
        } else {
            client.run()
        };
        let committed = committed.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(f.host.restore(&committed).unwrap() == *image, "{name}");
        drop(client);
        wait_until("the session's end", || f.host.context.registry.list().is_empty());
    }
}

#[test]
fn a_mark_that_cannot_be_read_condemns_until_it_is_taken_back() {
    for kind in [Harm::Flip, Harm::Truncate] {
        let f = filled(StoreLevel::NEWEST);
        harm(&f.host.path(&f.mark), kind, 90);
        let (clean, said) = f.host.verify();
        assert!(!clean && said.contains(&f.mark), "{said}");
        next_backups_are_exact(&f, "mark");
        // A mark of a container that is there and sound.
        let container = f.host.address_of(&f.one, 5).container;
        let found = damage::Found { container, slots: (5, 1), how: "test".into() };
        let (damage, store) = (&f.host.context.damage, &f.host.context.store);
        damage.record(store, &[found]).unwrap();
        damage.refresh(store).unwrap();
        let mark = names::damage(container, 1);
        harm(&f.host.path(&mark), kind, 90);
        let beside = Address { container, slot: Slot(6) };
        // What was read once is not read again where nothing was added.
        damage.refresh(store).unwrap();
        assert!(!damage.map().has(beside));
        damage.reload(store).unwrap();
        assert!(damage.map().has(beside));
        assert_eq!(f.host.restore(&f.one).unwrap_err().kind(), Kind::Damaged);
        let (_, said) = f.host.verify();
        assert!(said.contains(&mark), "{said}");
        f.host.must_restore(&f.one, &f.images[0]);
    }
}

#[test]
fn a_wrapped_key_or_an_agreement_that_is_damaged_is_named() {
    let host = Host::new();
    let store = &host.context.store;
    let (second, raised) = (names::wrapped_key(2), names::level(StoreLevel::NEWEST.0));
    for name in [names::WRAPPED_KEY, &second] {
        let wrapped = store.sealer().key().wrap("a passphrase").unwrap();
        store.objects().create(name, wrapped).unwrap();
    }
    host.must_be_clean();
    for name in [names::WRAPPED_KEY, &second, &raised] {
        for kind in [Harm::Flip, Harm::Truncate] {
            let path = host.path(name);
            let pristine = std::fs::read(&path).unwrap();
            match kind {
                Harm::Flip => flip(&path, 30),
                _ => std::fs::write(&path, &pristine[..70]).unwrap(),
            }
            let (clean, said) = host.verify();
            assert!(!clean && said.contains(name), "{said}");
            std::fs::write(&path, pristine).unwrap();
        }
    }
}
