//! A cluster of engines in one process: real clusters, outboxes, frames, detectors and indexes, one
//! thread that drives them, and what each engine costs as if it had a machine of its own.
//!
//! ```text
//! cargo run --release -p fleece-engine --example cluster_scale -- ENGINES [SNAPSHOTS] [--seed=N]
//!     [--vms=N] [--blocks=N] [--changed=PERCENT] [--memtable=ENTRIES]
//! cargo run --release -p fleece-engine --example cluster_scale -- --constants[=LARGE] [--seed=N]
//! ```
//!
//! Every engine has `--vms` VMs (25) of `--blocks` blocks (10,240). The first snapshot of a VM asks about
//! all of its blocks, every later one about `--changed` percent (24), the dirty ones; zeros and what a
//! dirty bitmap leaves out are no requests. Of the blocks asked about a part is new, half of the others
//! are the same as one of the VM's own, half come from a pool that all VMs share. Blocks are numbers and
//! their fingerprints made of these: hashing, reading, packing and the store are not simulated, nor are
//! TLS and system calls of the network. Frames are carried by hand, and their bytes counted.
//!
//! All is drawn by `--seed` (1). It prints JSON: a line for each round of snapshots, and one of the whole run. What sessions are told
//! is checked: every address against what was stored there, every grant against all others.
//! `--memtable`: entries that an engine keeps before it writes a run. The default of the engine is more
//! than a small simulation has, so that nothing would ever be merged.
//! `--constants`: costs on larger indexes instead, for a model of the full size; `LARGE` entries.
//! Files go into a temporary folder that is removed at the end: of the simulation in `/dev/shm`, if
//! there is one, for `--constants` in `TMPDIR`.

mod constants;
mod content;
mod cost;
mod engine;
mod world;

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::cost::{Costs, costs, spread};
use crate::world::{Round, World};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// How large everything is.
#[derive(Clone, Copy)]
struct Sizes {
    engines: usize,
    vms: usize,
    blocks: usize,
    snapshots: usize,
    changed_percent: usize,
    memtable_entries: usize,
    seed: u64,
}

impl Sizes {
    /// Blocks of a VM that the `n`th snapshot asks about.
    fn asked(&self, n: usize) -> usize {
        if n == 0 { self.blocks } else { self.blocks * self.changed_percent / 100 }
    }

    fn asked_of_a_vm(&self) -> u64 {
        (0..self.snapshots).map(|n| self.asked(n) as u64).sum()
    }

    fn logical(&self) -> u64 {
        (self.engines * self.vms * self.blocks * self.snapshots) as u64
    }
}

/// Costs of engines over rounds.
fn together(rounds: &[Round], engines: usize) -> Vec<Costs> {
    let mut sums = vec![Costs::default(); engines];
    for round in rounds {
        for (sum, costs) in sums.iter_mut().zip(&round.costs) {
            *sum = sum.with(costs);
        }
    }
    sums
}

fn of_round(n: usize, round: &Round) -> Value {
    let all: Vec<f64> = round.costs.iter().map(Costs::sum).collect();
    json!({
        "kind": "round", "round": n + 1, "asked": round.asked, "requests": round.requests,
        "granted": round.told.granted, "stored": round.told.stored, "same": round.told.same,
        "undetected": round.told.undetected, "seconds": spread(&all),
    })
}

/// How even the parts of hosts and partitions are.
fn balance(world: &World, requests: &[f64]) -> Value {
    let slices = |n: usize| world.map.slices(world.engines[n].cluster.us()).len() as f64;
    let slices: Vec<f64> = (0..world.engines.len()).map(slices).collect();
    let entries: Vec<f64> = world.engines.iter().map(|e| e.detector.entries() as f64).collect();
    let (mut partitions, mut within) = (Vec::new(), Vec::new());
    for engine in &world.engines {
        let of = |partition| engine.detector.size_of(partition).0 as f64;
        let each: Vec<f64> = engine.detector.partitions().map(of).collect();
        let mean = each.iter().sum::<f64>() / each.len() as f64;
        within.push(each.iter().copied().fold(0.0, f64::max) / mean);
        partitions.extend(each);
    }
    json!({
        "slices": spread(&slices), "entries": spread(&entries), "requests": spread(requests),
        "partitions": spread(&partitions), "partitions_within_host": spread(&within),
    })
}

fn of_run(world: &World, sizes: &Sizes, rounds: &[Round], requests: &[f64]) -> Value {
    let count = world.engines.len();
    let told = |pick: &dyn Fn(&Round) -> u64| rounds.iter().map(pick).sum::<u64>();
    let later = |pick: &dyn Fn(&Round) -> u64| rounds.iter().skip(1).map(pick).sum::<u64>();
    let index: Vec<f64> = world.engines.iter().map(|e| e.detector.index_bytes() as f64).collect();
    let floats = |values: &[u64]| values.iter().map(|n| *n as f64).collect::<Vec<_>>();
    let [asking, answering, learning, ending] = world.traffic.bytes;
    let entries: u64 = world.engines.iter().map(|e| e.detector.entries()).sum();
    json!({
        "kind": "run", "engines": count, "vms": count * sizes.vms, "blocks": sizes.blocks,
        "snapshots": sizes.snapshots, "changed_percent": sizes.changed_percent, "seed": sizes.seed,
        "memtable_entries": sizes.memtable_entries,
        "logical_blocks": sizes.logical(), "asked": told(&|round| round.asked),
        "requests": told(&|round| round.requests),
        "remote": world.engines.iter().map(|e| e.remote).sum::<u64>(),
        "distinct": world.distinct.len(), "granted": told(&|round| round.told.granted),
        "doubles": world.doubles, "wrong": world.wrong,
        "undetected": told(&|round| round.told.undetected), "entries": entries,
        "index_duplicates": world.engines.iter().map(|e| e.detector.duplicates()).sum::<u64>(),
        "costs": costs(&together(rounds, count)),
        "costs_later": costs(&together(rounds.get(1..).unwrap_or_default(), count)),
        "logical_blocks_later": sizes.logical() / sizes.snapshots as u64
            * (sizes.snapshots as u64 - 1),
        "asked_later": later(&|round| round.asked),
        "requests_later": later(&|round| round.requests),
        "granted_later": later(&|round| round.told.granted),
        "network": {
            "asking": asking, "answering": answering, "learning": learning, "ending": ending,
            "frames": world.traffic.frames,
            "sent": spread(&floats(&world.sent)), "received": spread(&floats(&world.received)),
        },
        "index_bytes": spread(&index), "disk_bytes": spread(&floats(&world.disk)),
        "anonymous_bytes": world.anonymous.0, "driver_bytes": world.anonymous.1,
        "balance": balance(world, requests),
    })
}

fn simulate(sizes: Sizes) -> Outcome<()> {
    // No figure has waiting for disks in it, and syncing the files of 100 engines on one disk takes long.
    let (shm, mut builder) = (Path::new("/dev/shm"), tempfile::Builder::new());
    builder.prefix("fleece-scale");
    let folder = if shm.exists() { builder.tempdir_in(shm)? } else { builder.tempdir()? };
    let begun = Instant::now();
    let mut world = World::new(folder.path(), sizes)?;
    let mut rounds = Vec::new();
    let mut requests = vec![0.0; sizes.engines];
    for n in 0..sizes.snapshots {
        let round = world.round(sizes.asked(n))?;
        println!("{}", of_round(n, &round));
        for (sum, engine) in requests.iter_mut().zip(&world.engines) {
            *sum += engine.requests as f64;
        }
        rounds.push(round);
        eprintln!("round {} of {}: {:.0} s", n + 1, sizes.snapshots, begun.elapsed().as_secs_f64());
    }
    let mut run = of_run(&world, &sizes, &rounds, &requests);
    run["wall_seconds"] = json!(begun.elapsed().as_secs_f64());
    println!("{run}");
    Ok(())
}

fn main() -> Outcome<()> {
    let (flags, words): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|word| word.starts_with("--"));
    let flag = |name: &str, default: u64| -> Outcome<u64> {
        let found = flags.iter().find_map(|flag| flag.strip_prefix(name)?.strip_prefix('='));
        Ok(found.map_or(Ok(default), str::parse)?)
    };
    let seed = flag("--seed", 1)?;
    if flags.iter().any(|flag| flag.starts_with("--constants")) {
        let large = flag("--constants", 8_000_000)?;
        let folder = tempfile::Builder::new().prefix("fleece-scale").tempdir()?;
        let load = constants::Load {
            seed,
            entries: [large / 4, large],
            requests: (large / 32).min(256 << 10),
        };
        return constants::measure(folder.path(), &load);
    }
    let Some(engines) = words.first() else {
        return Err("usage: cluster_scale ENGINES [SNAPSHOTS] [--seed=N] … | --constants".into());
    };
    simulate(Sizes {
        engines: engines.parse()?,
        vms: flag("--vms", 25)? as usize,
        blocks: flag("--blocks", 10_240)? as usize,
        snapshots: words.get(1).map_or(Ok(10), |word| word.parse())?,
        changed_percent: flag("--changed", 24)? as usize,
        memtable_entries: flag("--memtable", 4096)? as usize,
        seed,
    })
}
