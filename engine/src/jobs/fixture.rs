//! A small real store for tests, filled by a slow obvious backup.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::PathBuf;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use uuid::Uuid;

use crate::ids::{Address, DiskId, Fingerprint, SnapshotId, VmId};
use crate::store::commit::Manifests;
use crate::store::container::{ContainerKind, Packer};
use crate::store::manifest::{Counts, Disk, Manifest};
use crate::store::recipe::{Placement, RecipeEditor, StoredNodes};
use crate::store::testing::init_at;
use crate::store::{InitOptions, Location, Role, Store, StoreLevel, StoreOptions};

pub(crate) struct Fixture {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) store: Store,
    pub(crate) manifests: Manifests,
    /// Every block of the store.
    pub(crate) index: HashMap<Fingerprint, Address>,
    seq: u64,
}

impl Fixture {
    pub(crate) fn new(block_size: u32) -> Self {
        Self::at(StoreLevel::NEWEST, block_size)
    }

    pub(crate) fn at(level: StoreLevel, block_size: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let location = Location::Directory(dir.path().join("store"));
        let options = InitOptions { block_size, ..InitOptions::default() };
        let key = init_at(&location, &options, level);
        let mut options = StoreOptions::default();
        // Several containers from little data.
        options.budget.container_slots = 300;
        let store = Store::open(&location, key, &dir.path().join("state"), options).unwrap();
        let manifests = Manifests::of(&store, dir.path());
        Fixture { dir, store, manifests, index: HashMap::new(), seq: 0 }
    }

    pub(crate) fn scratch(&self) -> PathBuf {
        self.dir.path().into()
    }

    pub(crate) fn path(&self, key: &str) -> PathBuf {
        self.dir.path().join("store").join(key)
    }

    /// Backs up an image in full, sharing what the parent's tree has; commits it.
    pub(crate) fn backup(&mut self, vm: u128, image: &[u8], parent: Option<&Manifest>) -> Manifest {
        let size = self.store.block_size() as usize;
        let mut packer = Packer::new(&self.store, ContainerKind::Blocks, "test");
        let mut placements = Vec::new();
        for block in image.chunks(size) {
            let mut whole = block.to_vec();
            whole.resize(size, 0);
            let fingerprint = self.store.fingerprinter().of(&whole);
            let known = self.index.get(&fingerprint).copied();
            placements.push(if whole.iter().all(|byte| *byte == 0) {
                Placement::Zero
            } else if let Some(known) = known {
                Placement::At(known)
            } else {
                let at = packer.push(fingerprint, &whole).unwrap();
                self.index.insert(fingerprint, at);
                Placement::At(at)
            });
        }
        packer.seal().unwrap();
        let mut disk = Disk {
            uuid: DiskId(Uuid::from_u128(vm + 1000)),
            name: "vda".into(),
            size: image.len() as u64,
            root: parent.and_then(|parent| parent.disks[0].root),
        };
        let mut packer = Packer::new(&self.store, ContainerKind::Nodes, "test");
        let mut nodes = StoredNodes::new(self.store.directories(), &mut packer);
        let shape = disk.shape(self.store.block_size());
        let mut editor = RecipeEditor::new(&mut nodes, disk.root, shape).unwrap();
        for (block, placement) in placements.into_iter().enumerate() {
            editor.put(block as u64, 1, placement).unwrap();
        }
        disk.root = editor.finish().unwrap();
        packer.seal().unwrap();
        self.commit(vm, disk, parent)
    }

    fn commit(&mut self, vm: u128, disk: Disk, parent: Option<&Manifest>) -> Manifest {
        self.seq += 1;
        let manifest = Manifest {
            snapshot: SnapshotId::from_random(self.seq as u32),
            vm: VmId(Uuid::from_u128(vm)),
            vm_name: format!("vm{vm}"),
            seq: self.seq,
            parent: parent.map(|parent| parent.snapshot),
            point_in_time_ms: 1_795_132_800_000,
            disks: vec![disk],
            bitmaps: Vec::new(),
            host: "test".into(),
            engine: "0.1.0".into(),
            hypervisor: "none".into(),
            counts: Counts::default(),
            duration_ms: 1,
            gc_epoch: 0,
            config: b"<domain/>".to_vec(),
        };
        self.manifests.commit(&manifest).unwrap();
        manifest
    }

    /// Flips a bit of an object.
    pub(crate) fn flip(&self, key: &str, at: u64) {
        let path = self.path(key);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at as usize] ^= 0x40;
        std::fs::write(path, bytes).unwrap();
    }

    /// The object of a container.
    pub(crate) fn object(&self, address: Address) -> String {
        self.store.directories().summary(address.container).unwrap().unwrap().object
    }

    /// Opens the store anew as another engine: nothing is cached, and it can be written.
    pub(crate) fn open_again(&mut self) {
        self.store = self.writable();
        self.manifests = Manifests::of(&self.store, self.dir.path());
    }

    /// A store opened anew by another engine.
    pub(crate) fn writable(&self) -> Store {
        self.opened_by(Role::Host)
    }

    /// A store opened anew by another engine of a role.
    pub(crate) fn opened_by(&self, role: Role) -> Store {
        let state = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        let key = self.store.sealer().key().encode();
        let key = crate::store::keys::StoreKey::decode(&key).unwrap();
        let mut options = StoreOptions { role, ..StoreOptions::default() };
        options.budget.container_slots = 300;
        Store::open(self.store.location(), key, &state, options).unwrap()
    }

    /// A store opened anew: nothing is cached.
    pub(crate) fn reopened(&self) -> Store {
        let location = self.store.location().clone();
        let key = self.store.sealer().key().encode();
        let key = crate::store::keys::StoreKey::decode(&key).unwrap();
        Store::open_to_read(&location, key, StoreOptions::default()).unwrap()
    }
}

/// An image with zeros, runs, duplicates near and far, and an odd size.
pub(crate) fn image(seed: u64, size: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut image = vec![0_u8; size];
    let mut at = 0;
    while at < size {
        let length = rng.random_range(1..60) * 4096;
        let end = (at + length).min(size);
        match rng.random_range(0..4) {
            0 => {}
            // The same block over and over.
            1 => image[at..end]
                .iter_mut()
                .enumerate()
                .for_each(|(i, b)| *b = (i % 4096 % 251) as u8 ^ seed as u8),
            // Something from before.
            2 if at > 0 => {
                let from = rng.random_range(0..at) / 4096 * 4096;
                let length = (end - at).min(at - from);
                image.copy_within(from..from + length, at);
            }
            _ => rng.fill(&mut image[at..end]),
        }
        at = end;
    }
    image
}
