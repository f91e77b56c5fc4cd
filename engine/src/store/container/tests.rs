//! Containers against real directories: what goes in comes out, and no changed byte goes unnoticed.

use std::fs;

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::directory::{
    CHUNK_SLOTS, Codec, FrameEntry, Section, SlotState, Trailer, column_len, encode_chunk,
    encode_lead, encode_table,
};
use super::*;
use crate::error::{Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint, Incarnation, Slot};
use crate::store::format::{Piece, TAG_LEN};
use crate::store::testing::TestStore;
use crate::store::{InitOptions, Store, StoreBudget, StoreLevel, StoreOptions, names};

/// A block of one of several kinds: noise, text that compresses, nearly zero.
fn block(rng: &mut StdRng, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    match rng.random_range(0..3) {
        0 => rng.fill_bytes(&mut bytes),
        1 => {
            let word: u64 = rng.random();
            bytes
                .chunks_exact_mut(8)
                .for_each(|b| b.copy_from_slice(&(word & 0xff00_ff00_00ff).to_le_bytes()));
        }
        _ => bytes[rng.random_range(0..size)] = rng.random(),
    }
    bytes
}

fn small(block_size: u32, encrypt: bool, container_slots: u32, container_bytes: u32) -> TestStore {
    small_at(StoreLevel::NEWEST, block_size, encrypt, container_slots, container_bytes)
}

fn small_at(
    level: StoreLevel,
    block_size: u32,
    encrypt: bool,
    container_slots: u32,
    container_bytes: u32,
) -> TestStore {
    let budget = StoreBudget { container_slots, container_bytes, ..StoreBudget::default() };
    let options = StoreOptions { budget, ..StoreOptions::default() };
    TestStore::at(level, &InitOptions { block_size, encrypt, ..InitOptions::default() }, options)
}

/// Packs blocks and checks what comes out against what went in.
fn round_trip(test: &TestStore, count: usize, seal_every: usize, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let size = test.store.block_size() as usize;
    let mut packer = Packer::new(&test.store, ContainerKind::Blocks, "test");
    let mut model: Vec<(Address, Fingerprint, Vec<u8>)> = Vec::new();
    let mut sealed = Vec::new();
    for n in 0..count {
        let bytes = block(&mut rng, size);
        let fingerprint = test.store.fingerprinter().of(&bytes);
        let address = packer.push(fingerprint, &bytes).unwrap();
        model.push((address, fingerprint, bytes));
        if n % seal_every == seal_every - 1 {
            packer.seal().unwrap();
        }
        sealed.extend(packer.take_sealed().unwrap());
    }
    packer.seal().unwrap();
    sealed.extend(packer.take_sealed().unwrap());
    let listed: Vec<(Address, Fingerprint)> = sealed
        .iter()
        .flat_map(|c| c.entries().map(|(f, slot)| (Address { container: c.id, slot }, f)))
        .collect();
    assert_eq!(listed, model.iter().map(|(a, f, _)| (*a, *f)).collect::<Vec<_>>(), "seed {seed}");
    for container in &sealed {
        let size = fs::metadata(test.path(&names::container(container.id, 0))).unwrap().len();
        assert_eq!(size, container.stored_bytes);
    }
    let reader = test.reader();
    let mut out = vec![0; size];
    // Forwards, then in random order.
    let random = (0..model.len()).map(|_| rng.random_range(0..model.len())).collect::<Vec<_>>();
    for n in (0..model.len()).chain(random) {
        let (address, fingerprint, bytes) = &model[n];
        assert_eq!(reader.directories().slot(*address).unwrap(), SlotInfo::Present(*fingerprint));
        reader.directories().read_block(*address, &mut out).unwrap();
        assert!(out == *bytes, "seed {seed}: block {n} at {address}");
    }
    check_whole(&reader, &sealed);
}

/// Frames, sweeps and leads of sealed containers.
fn check_whole(reader: &Store, sealed: &[SealedContainer]) {
    for container in sealed {
        let directories = reader.directories();
        let mut slots = Vec::new();
        directories
            .each_slot(container.id, |slot, info| {
                slots.push((info, slot));
                Ok(())
            })
            .unwrap();
        let expected: Vec<_> =
            container.entries().map(|(f, slot)| (SlotInfo::Present(f), slot)).collect();
        assert_eq!(slots, expected);
        let frames = directories.frames(container.id).unwrap();
        let stored = directories.fetch_frames(&frames).unwrap();
        let raw: u64 = frames
            .iter()
            .zip(&stored)
            .map(|(frame, stored)| {
                assert!(frame.raw_len <= FRAME_RAW_MAX);
                directories.decode_frame(frame, stored).unwrap().len() as u64
            })
            .sum();
        assert_eq!(raw, container.raw_bytes);
        directories.check_lead(container.id).unwrap();
    }
}

#[test]
fn blocks_of_every_size_and_protection_come_back() {
    for (block_size, encrypt, count) in
        [(4096, true, 500), (4096, false, 300), (16_384, true, 100), (65_536, true, 60)]
    {
        let seed = u64::from(block_size);
        round_trip(&small(block_size, encrypt, 200, 16 << 20), count, count / 2, seed);
        round_trip(&small(block_size, encrypt, 65_535, 1 << 20), count, 1000, 7);
        let before = StoreLevel::KEYS;
        round_trip(&small_at(before, block_size, encrypt, 65_535, 1 << 20), count, 1000, 7);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn any_sequence_of_blocks_comes_back(
        count in 1..160_usize,
        seal_every in 1..400_usize,
        slots in 1..300_u32,
        kilobytes in 1..900_u32,
        seed: u64,
    ) {
        round_trip(&small(4096, true, slots, kilobytes << 10), count, seal_every.max(10), seed);
    }
}

#[test]
fn nodes_of_any_length_come_back() {
    let test = TestStore::new();
    let mut rng = StdRng::seed_from_u64(11);
    let mut packer = Packer::new(&test.store, ContainerKind::Nodes, "test");
    let lengths = [1, 2, NODE_MAX, 33, NODE_MAX, NODE_MAX - 1];
    let nodes: Vec<Vec<u8>> = (0..1500)
        .map(|n| {
            let length = lengths.get(n).copied().unwrap_or_else(|| rng.random_range(1..400));
            (0..length).map(|_| rng.random_range(0..4)).collect()
        })
        .collect();
    let tag = |n: usize| Fingerprint([n as u8; Fingerprint::LEN]);
    let addresses: Vec<Address> =
        nodes.iter().enumerate().map(|(n, node)| packer.push(tag(n), node).unwrap()).collect();
    assert!(packer.push(tag(0), &[]).is_err(), "an empty node");
    assert!(packer.push(tag(0), &vec![0; NODE_MAX + 1]).is_err(), "too long a node");
    packer.seal().unwrap();
    let sealed = packer.take_sealed().unwrap();
    let reader = test.reader();
    for ((n, node), address) in nodes.iter().enumerate().zip(&addresses) {
        assert_eq!(reader.directories().slot(*address).unwrap(), SlotInfo::Present(tag(n)));
        assert_eq!(reader.directories().read_node(*address).unwrap(), *node);
    }
    let mut whole = Vec::new();
    for frame in reader.directories().frames(sealed[0].id).unwrap() {
        let raw = reader.directories().read_frame(&frame).unwrap();
        whole.extend(
            Directories::nodes_of(&frame, &raw).unwrap().into_iter().map(|(_, node)| node.to_vec()),
        );
    }
    assert_eq!(whole, nodes);
    check_whole(&reader, &sealed);
    let mut out = vec![0; 4096];
    assert_eq!(
        reader.directories().read_block(addresses[0], &mut out).unwrap_err().kind(),
        Kind::Damaged
    );
}

#[test]
fn what_is_not_sealed_never_was() {
    let test = TestStore::new();
    let mut packer = Packer::new(&test.store, ContainerKind::Blocks, "test");
    let address = packer.push(Fingerprint([1; 20]), &[7; 4096]).unwrap();
    drop(packer);
    assert_eq!(test.store.directories().slot(address).unwrap(), SlotInfo::Missing);
    let mut objects = Vec::new();
    test.store
        .objects()
        .list(names::CONTAINERS, |key, _| {
            objects.push(key.to_owned());
            Ok(())
        })
        .unwrap();
    assert!(objects.is_empty(), "{objects:?}");
    assert_eq!(
        fs::read_dir(test.path(&names::containers_of(address.container.incarnation)))
            .unwrap()
            .count(),
        0
    );
}

/// Everything that one can ask of a container, in one go.
fn use_all(store: &Store, id: ContainerId, slots: u32) -> Vec<Result<Vec<u8>>> {
    let directories = store.directories();
    let mut results = vec![directories.check_lead(id).map(|()| Vec::new())];
    for slot in 0..slots {
        let address = Address { container: id, slot: Slot(slot as u16) };
        results.push(directories.slot(address).map(|info| match info {
            SlotInfo::Present(fingerprint) => fingerprint.0.to_vec(),
            other => format!("{other:?}").into_bytes(),
        }));
        let mut out = vec![0; store.block_size() as usize];
        results.push(directories.read_block(address, &mut out).map(|()| out));
    }
    results
}

#[test]
fn a_changed_byte_anywhere_is_an_error_and_never_a_wrong_block() {
    for (encrypt, level) in [
        (true, StoreLevel::KEYS),
        (false, StoreLevel::KEYS),
        (true, StoreLevel::COLUMN_APART),
        (false, StoreLevel::COLUMN_APART),
    ] {
        let test = small_at(level, 4096, encrypt, 65_535, 16 << 20);
        let mut rng = StdRng::seed_from_u64(5);
        let mut packer = Packer::new(&test.store, ContainerKind::Blocks, "test");
        for n in 0..20_u8 {
            packer.push(Fingerprint([n; 20]), &block(&mut rng, 4096)).unwrap();
        }
        packer.seal().unwrap();
        let container = packer.take_sealed().unwrap().remove(0);
        let path = test.path(&names::container(container.id, 0));
        let whole = fs::read(&path).unwrap();
        let truth: Vec<Vec<u8>> =
            use_all(&test.reader(), container.id, 20).into_iter().map(|r| r.unwrap()).collect();
        let reader = test.reader();
        let check = |bytes: &[u8], what: &str| {
            fs::write(&path, bytes).unwrap();
            reader.directories().forget(container.id);
            let results = use_all(&reader, container.id, 20);
            let errors: Vec<_> = results.iter().filter_map(|r| r.as_ref().err()).collect();
            assert!(!errors.is_empty(), "{what}: nobody noticed");
            for error in errors {
                assert_eq!(error.kind(), Kind::Damaged, "{what}: {error}");
            }
            for (found, true_bytes) in results.into_iter().zip(&truth) {
                assert!(found.is_err() || found.unwrap() == *true_bytes, "{what}: wrong bytes");
            }
        };
        // All of what is not frames, some of the frames.
        let column = if level < StoreLevel::COLUMN_APART { 20 * 21 + TAG_LEN } else { 0 };
        let frames = whole.len() - 160 - 48 - column;
        let places = (0..104)
            .step_by(3)
            .chain((104..frames).step_by(1997))
            .chain((frames..whole.len()).step_by(2));
        for place in places {
            let mut bytes = whole.clone();
            bytes[place] ^= 1 << (place % 8);
            check(&bytes, &format!("byte {place} of {}", whole.len()));
        }
        for length in [0, 1, 79, 80, 159, 160, 300, whole.len() / 2, whole.len() - 1] {
            check(&whole[..length], &format!("cut to {length}"));
        }
        check(&[&whole[..], &[0]].concat(), "one byte more");
    }
}

#[test]
fn a_container_under_anothers_name_is_not_believed() {
    let test = TestStore::new();
    let mut packer = Packer::new(&test.store, ContainerKind::Blocks, "test");
    for n in 0..2 {
        packer.push(Fingerprint([n; 20]), &[n; 4096]).unwrap();
        packer.seal().unwrap();
    }
    let [a, b] = &packer.take_sealed().unwrap()[..] else { panic!("two were sealed") };
    fs::copy(test.path(&names::container(a.id, 0)), test.path(&names::container(b.id, 0))).unwrap();
    let error =
        test.reader().directories().slot(Address { container: b.id, slot: Slot(0) }).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
}

#[test]
fn marked_slots_are_damaged_and_missing_ones_missing() {
    let test = TestStore::new();
    let mut packer = Packer::new(&test.store, ContainerKind::Blocks, "test");
    let addresses: Vec<_> =
        (0..4).map(|n| packer.push(Fingerprint([n; 20]), &[n; 4096]).unwrap()).collect();
    packer.seal().unwrap();
    let directories = test.store.directories();
    directories.mark_damaged(addresses[1].container, 1, 2);
    let infos = directories.run(addresses[0], 5).unwrap();
    let present = |n| SlotInfo::Present(Fingerprint([n; 20]));
    assert_eq!(
        infos,
        [present(0), SlotInfo::Damaged, SlotInfo::Damaged, present(3), SlotInfo::Missing]
    );
    let mut out = [0; 4096];
    assert_eq!(directories.read_block(addresses[1], &mut out).unwrap_err().kind(), Kind::Damaged);
    directories.read_block(addresses[3], &mut out).unwrap();
    assert_eq!(out, [3; 4096]);
}

/// What every slot holds, as a reader without anything in its caches hears it.
fn column_of(test: &TestStore, id: ContainerId) -> Result<Vec<SlotInfo>> {
    let mut column = Vec::new();
    test.reader().directories().each_slot(id, |_, info| {
        column.push(info);
        Ok(())
    })?;
    Ok(column)
}

/// A container of blocks as first written, and what each of its slots holds.
fn written(test: &TestStore) -> (ContainerId, Vec<Vec<u8>>, Vec<SlotInfo>) {
    let mut rng = StdRng::seed_from_u64(6);
    let mut packer = Packer::new(&test.store, ContainerKind::Blocks, "test");
    let blocks: Vec<Vec<u8>> = (0..500).map(|_| block(&mut rng, 4096)).collect();
    let mut column = Vec::new();
    for block in &blocks {
        let fingerprint = test.store.fingerprinter().of(block);
        packer.push(fingerprint, block).unwrap();
        column.push(SlotInfo::Present(fingerprint));
    }
    packer.seal().unwrap();
    (packer.take_sealed().unwrap()[0].id, blocks, column)
}

#[test]
fn a_column_that_is_lost_is_computed_from_the_frames() {
    let test = small(4096, true, 65_535, 16 << 20);
    let (id, _, column) = written(&test);
    let own = test.path(&names::directory(id, 0));
    let sound = fs::read(&own).unwrap();
    assert_eq!(column_of(&test, id).unwrap(), column);
    // A chunk of it, its end, all of it: nobody who reads misses anything, and it is made again.
    let mut flipped = sound.clone();
    flipped[4096 + 30] ^= 4;
    for bytes in [Some(&flipped[..]), Some(&sound[..5000]), Some(b""), None] {
        fs::remove_file(&own).unwrap();
        if let Some(bytes) = bytes {
            fs::write(&own, bytes).unwrap();
        }
        assert_eq!(column_of(&test, id).unwrap(), column);
        let address = Address { container: id, slot: Slot(200) };
        assert_eq!(test.reader().directories().slot(address).unwrap(), column[200]);
        let copy = test.reader().directories().ensure_copy(id);
        match bytes {
            Some(_) => assert_eq!(copy.unwrap_err().kind(), Kind::Damaged),
            None => assert!(matches!(copy.unwrap(), SecondCopy::Made)),
        }
    }
    assert!(fs::read(&own).unwrap() == sound);
}

#[test]
fn of_a_lost_column_only_the_slots_of_a_damaged_frame_are_not_known() {
    let test = small(4096, true, 65_535, 16 << 20);
    let (id, blocks, column) = written(&test);
    let (own, object) = (test.path(&names::directory(id, 0)), test.path(&names::container(id, 0)));
    let at = |slot| Address { container: id, slot: Slot(slot) };
    let frame = test.reader().directories().frame_of(at(250)).unwrap().unwrap();
    let hole = frame.first.0..frame.first.0 + frame.span;
    fs::remove_file(&own).unwrap();
    let mut damaged = fs::read(&object).unwrap();
    damaged[frame.offset as usize + 5] ^= 1;
    fs::write(&object, damaged).unwrap();
    let reader = test.reader();
    let directories = reader.directories();
    let salvage = directories.salvage(id).unwrap().unwrap();
    let mut out = vec![0; 4096];
    for slot in 0..column.len() as u16 {
        let n = usize::from(slot);
        let (said, read) = (salvage.column[n], directories.read_block(at(slot), &mut out));
        if hole.contains(&slot) {
            assert_eq!(directories.slot(at(slot)).unwrap(), SlotInfo::Damaged);
            assert!(said.is_none() && read.unwrap_err().kind() == Kind::Damaged);
        } else {
            assert_eq!(directories.slot(at(slot)).unwrap(), column[n]);
            assert!(
                matches!(said, Some(SlotState::Present(f)) if column[n] == SlotInfo::Present(f))
            );
            assert!(read.is_ok() && out == blocks[n]);
        }
    }
    let copy = directories.ensure_copy(id).unwrap();
    assert!(matches!(copy, SecondCopy::Missing(_)) && !own.exists(), "{copy:?}");
    // A container that is gone is not taken for damaged.
    fs::remove_file(&object).unwrap();
    let read = directories.each_slot(id, |_, _| Ok(()));
    assert_eq!(read.unwrap_err().kind(), Kind::NotFound);
}

/// What a later Fleece will write: several containers in one object, with holes.
struct Rewritten {
    bytes: Vec<u8>,
}

impl Rewritten {
    fn add(
        &mut self,
        store: &Store,
        id: ContainerId,
        generation: u32,
        states: &[SlotState],
        blocks: &[Vec<u8>],
    ) {
        let (header, cipher) = store.sealer().begin(ContainerKind::Blocks.object()).unwrap();
        let section = Section::new(&header, cipher, id, generation);
        let start = self.bytes.len();
        self.bytes.extend(encode_lead(&header, id, generation, store.block_size()));
        let mut table = Vec::new();
        let present: Vec<u16> = (0..states.len() as u16)
            .filter(|slot| matches!(states[usize::from(*slot)], SlotState::Present(_)))
            .collect();
        if let (Some(first), Some(last)) = (present.first(), present.last()) {
            let mut stored = blocks.concat();
            let entry = FrameEntry {
                first: *first,
                span: last - first + 1,
                present: present.iter().fold(0, |bits, slot| bits | 1 << (slot - first)),
                codec: Codec::Raw,
                offset: (self.bytes.len() - start) as u32,
                stored_len: (stored.len() + TAG_LEN) as u32,
                raw_len: stored.len() as u32,
            };
            section.seal(Piece::Frame, 0, &Section::frame_extra(&entry), &mut stored).unwrap();
            self.bytes.extend(stored);
            table.push(entry);
        }
        let column_offset = (self.bytes.len() - start) as u32;
        let slots = states.len() as u32;
        for (n, chunk) in states.chunks(CHUNK_SLOTS as usize).enumerate() {
            let sealed = encode_chunk(&section, n as u32, slots, chunk.iter().copied()).unwrap();
            self.bytes.extend(sealed);
        }
        let trailer = Trailer {
            header,
            kind: ContainerKind::Blocks,
            container: id,
            generation,
            block_size: store.block_size(),
            section_start: start as u64,
            column_offset,
            slots,
            table_offset: column_offset + column_len(slots),
            frames: table.len() as u32,
            raw_bytes: 0,
        };
        self.bytes.extend(encode_table(&section, &table).unwrap());
        self.bytes.extend(trailer.encode(&section).unwrap());
    }
}

#[test]
fn rewritten_containers_share_an_object_keep_slots_and_forward() {
    let test = TestStore::new();
    let id = |counter| ContainerId { incarnation: Incarnation(9), counter };
    let fingerprint = |n| Fingerprint([n; 20]);
    let at = |counter, slot| Address { container: id(counter), slot: Slot(slot) };
    let block = |n: u8| vec![n; 4096];
    let mut shared = Rewritten { bytes: Vec::new() };
    let holes = [
        SlotState::Dead,
        SlotState::Present(fingerprint(1)),
        SlotState::Dead,
        SlotState::Forward(at(5, 199)),
        SlotState::Present(fingerprint(4)),
        SlotState::Damaged(fingerprint(5)),
        SlotState::Forward(at(3, 3)),
    ];
    shared.add(&test.store, id(3), 2, &holes, &[block(1), block(4)]);
    let mut long = vec![SlotState::Dead; 200];
    long[199] = SlotState::Present(fingerprint(3));
    shared.add(&test.store, id(5), 2, &long, &[block(3)]);
    shared.add(&test.store, id(6), 2, &[SlotState::Dead], &[]);
    test.store.objects().create(&names::container(id(6), 2), shared.bytes).unwrap();
    // An older generation that came back after a crash loses.
    let mut old = Rewritten { bytes: Vec::new() };
    old.add(&test.store, id(6), 1, &[SlotState::Present(fingerprint(9))], &[block(9)]);
    test.store.objects().create(&names::container(id(6), 1), old.bytes).unwrap();

    let directories = test.store.directories();
    let infos = directories.run(at(3, 0), 8).unwrap();
    assert_eq!(infos[..3], [SlotInfo::Dead, SlotInfo::Present(fingerprint(1)), SlotInfo::Dead]);
    assert_eq!(
        infos[3..6],
        [SlotInfo::Forward(at(5, 199)), SlotInfo::Present(fingerprint(4)), SlotInfo::Damaged]
    );
    assert_eq!(infos[7], SlotInfo::Missing);
    assert_eq!(directories.slot(at(6, 0)).unwrap(), SlotInfo::Dead);
    assert_eq!(directories.slot(at(4, 0)).unwrap(), SlotInfo::Missing);
    assert_eq!(directories.slot(at(7, 0)).unwrap(), SlotInfo::Missing);
    let mut out = block(0);
    for (address, n) in [(at(3, 1), 1), (at(3, 4), 4), (at(3, 3), 3), (at(5, 199), 3)] {
        directories.read_block(address, &mut out).unwrap();
        assert_eq!(out, block(n), "{address}");
    }
    assert_eq!(directories.resolve(at(3, 3)).unwrap(), at(5, 199));
    // A forward to a forward is not followed, nor is there anything in a dead slot.
    for address in [at(3, 6), at(3, 0), at(4, 0)] {
        assert_eq!(directories.read_block(address, &mut out).unwrap_err().kind(), Kind::NotFound);
    }
    assert_eq!(directories.frame_of(at(3, 2)).unwrap(), None, "a hole in a frame");
    directories.check_lead(id(5)).unwrap();
}

#[test]
fn an_absent_container_is_found_once_it_is_there() {
    let test = TestStore::new();
    let mut packer = Packer::new(&test.store, ContainerKind::Blocks, "test");
    let address = packer.push(Fingerprint([1; 20]), &[1; 4096]).unwrap();
    assert_eq!(test.store.directories().slot(address).unwrap(), SlotInfo::Missing);
    packer.seal().unwrap();
    assert_eq!(
        test.store.directories().slot(address).unwrap(),
        SlotInfo::Present(Fingerprint([1; 20]))
    );
}

#[test]
fn caches_stay_within_their_limits() {
    let budget =
        StoreBudget { directory_cache: 20_000, frame_cache: 200_000, ..StoreBudget::default() };
    let options = StoreOptions { budget, ..StoreOptions::default() };
    let test = TestStore::with(&InitOptions::default(), options);
    let mut packer = Packer::new(&test.store, ContainerKind::Blocks, "test");
    let mut rng = StdRng::seed_from_u64(3);
    let mut model = Vec::new();
    for _ in 0..600 {
        let bytes = block(&mut rng, 4096);
        model.push((packer.push(test.store.fingerprinter().of(&bytes), &bytes).unwrap(), bytes));
        if rng.random_ratio(1, 60) {
            packer.seal().unwrap();
        }
    }
    packer.seal().unwrap();
    let directories = test.store.directories();
    let mut out = vec![0; 4096];
    for _ in 0..1500 {
        let (address, bytes) = &model[rng.random_range(0..model.len())];
        directories.read_block(*address, &mut out).unwrap();
        assert_eq!(out, *bytes);
        let (directory_bytes, frame_bytes) = directories.cached_bytes();
        assert!(
            directory_bytes <= 20_000 && frame_bytes <= 200_000,
            "{directory_bytes}, {frame_bytes}"
        );
    }
}

#[test]
fn after_a_failed_write_nothing_more_is_packed() {
    let test = TestStore::new();
    let mut packer = Packer::new(&test.store, ContainerKind::Blocks, "web1");
    let address = packer.push(Fingerprint([1; 20]), &[1; 4096]).unwrap();
    // Someone put an object where ours would go: it is not replaced.
    let key = names::container(address.container, 0);
    fs::write(test.path(&key), b"something else").unwrap();
    assert!(packer.seal().is_err());
    assert!(packer.push(Fingerprint([2; 20]), &[2; 4096]).is_err());
    assert!(packer.take_sealed().is_err());
    assert_eq!(fs::read(test.path(&key)).unwrap(), b"something else");
    drop(packer);
    let mut next = Packer::new(&test.store, ContainerKind::Blocks, "web1");
    let other = next.push(Fingerprint([1; 20]), &[1; 4096]).unwrap();
    assert_ne!(other.container, address.container);
    next.seal().unwrap();
}
