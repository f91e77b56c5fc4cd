//! The detector against a slow obvious model, and against crashes and damage.

mod crash;
mod large;
mod model;
mod partition;

use std::collections::BTreeMap;
use std::path::Path;

use rand::RngExt;
use rand::rngs::StdRng;
use uuid::Uuid;

use super::{DetectOptions, Detector, JournalPosition, OpenReport};
use crate::ids::{Address, ContainerId, Fingerprint, Incarnation, Slot, StoreId};

pub(super) const STORE: StoreId = StoreId(Uuid::from_u128(7));

/// A directory in memory where there is one: these tests sync thousands of files, and no power
/// fails in them.
pub(super) fn tempdir() -> tempfile::TempDir {
    let memory = tempfile::tempdir_in("/dev/shm");
    memory.or_else(|_| tempfile::tempdir()).unwrap()
}

/// Both go to other threads.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Detector>();
    is_send::<super::Rebuild>();
};

/// Limits so small that a few dozen entries go through every level.
pub(super) fn tiny_options() -> DetectOptions {
    DetectOptions {
        partition_bits: 2,
        pass_memory: 600, // Sort runs of 11 requests.
        memtable_entries: 20,
        txn_entries: 7,
        young_runs: 3,
        delta_runs: 2,
        delta_fraction: 3,
        step_entries: 16,
        ..DetectOptions::new(STORE)
    }
}

/// The `n`th fingerprint: spread like a hash, so over all partitions.
pub(super) fn fingerprint(n: u64) -> Fingerprint {
    let mut bytes = [0; Fingerprint::LEN];
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    for chunk in bytes.chunks_mut(8) {
        state ^= state >> 30;
        state = state.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state ^= state >> 27;
        state = state.wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
        chunk.copy_from_slice(&state.to_be_bytes()[..chunk.len()]);
    }
    Fingerprint(bytes)
}

pub(super) fn address(container: u64, slot: u64) -> Address {
    let incarnation = Incarnation(1 + (container >> 32) as u32);
    let container = ContainerId { incarnation, counter: container as u32 };
    Address { container, slot: Slot(slot as u16) }
}

/// What container `number` holds: up to 30 of 400 fingerprints, each once.
pub(super) fn container(rng: &mut StdRng, number: u64) -> Vec<(Fingerprint, Address)> {
    let count = rng.random_range(0..30);
    let block = |slot| (fingerprint(rng.random_range(0..400)), address(number, slot));
    (0..count).map(block).collect::<BTreeMap<_, _>>().into_iter().collect()
}

pub(super) fn position(n: u64) -> JournalPosition {
    JournalPosition { incarnation: Incarnation(3), n }
}

/// What the store's journal would have: the entries of every container, in order.
pub(super) type Journal = Vec<Vec<(Fingerprint, Address)>>;

/// Opens the index and learns what it lacks, as the engine does at its start.
pub(super) fn open(
    dir: &Path,
    options: &DetectOptions,
    journal: &Journal,
) -> (Detector, OpenReport) {
    let (mut detector, report) = Detector::open(dir, options.clone()).unwrap();
    assert_eq!(detector.watermark(), report.watermark);
    refill(&mut detector, journal);
    (detector, report)
}

pub(super) fn refill(detector: &mut Detector, journal: &Journal) {
    let have = detector.watermark().get(Incarnation(3)) as usize;
    for (i, entries) in journal.iter().enumerate().skip(have) {
        detector.learn(&mut entries.clone(), position(i as u64 + 1)).unwrap();
    }
}

/// All that the detector knows.
pub(super) fn export(detector: &mut Detector) -> crate::error::Result<Vec<(Fingerprint, Address)>> {
    let mut all = Vec::new();
    for partition in detector.partitions().collect::<Vec<_>>() {
        // Small pieces, so that every test goes over their seams.
        let mut after = None;
        loop {
            let entries = detector.export(partition, after, 9)?;
            let Some((last, _)) = entries.last() else { break };
            after = Some(*last);
            all.extend(entries);
        }
    }
    Ok(all)
}
