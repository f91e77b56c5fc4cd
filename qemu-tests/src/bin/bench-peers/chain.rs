//! One guest with thirty small increments: restores of the newest and the oldest snapshot, and reads
//! through `fleece serve`.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, anyhow};
use qemu_tests::bench::change::change;
use qemu_tests::bench::{Bench, Cost, blocks, measure, median, nbd, rate};
use qemu_tests::content::{BLOCK, block, mix};
use qemu_tests::wait::SOON;
use qemu_tests::{Fixture, Result, Running, image};
use rustix::process::Signal;

use crate::bitmaps::increment;
use crate::guests::Guests;
use crate::tools::{Kind, LIMIT, Tool, backup_image, restore_image};

/// Increments, and how many in a quick run.
const INCREMENTS: u64 = 30;
const QUICK: u64 = 5;

/// Blocks that one increment changes, at random places.
const CHANGED: u64 = 1000;

/// Random reads of every reader.
const READS: usize = 1000;

/// Readers at once: as many clients as `fleece serve` takes.
const READERS: u64 = 16;

/// Where the random numbers begin: every run reads and writes the same places.
pub(crate) const SEED: u64 = 20_261_124;

/// What it cost.
#[derive(Default)]
pub(crate) struct Chain {
    /// Which guest, and how many increments.
    pub(crate) guest: String,
    pub(crate) increments: u64,
    /// Seconds of one increment, the middle of all.
    pub(crate) increment: f64,
    /// Seconds of the first of them, and what the peers took for it, who read the image.
    pub(crate) first: f64,
    pub(crate) peers: Vec<(Kind, Cost)>,
    /// Restores: before the increments, then of the newest and of the oldest snapshot.
    pub(crate) restores: [Cost; 3],
    /// Bytes that are not zero, of each of these.
    pub(crate) bytes: [u64; 3],
    /// Reads through `fleece serve`.
    pub(crate) served: Served,
}

/// What reading through `fleece serve` gave.
#[derive(Default)]
pub(crate) struct Served {
    /// Random reads a second, by one reader and by many.
    pub(crate) single: f64,
    pub(crate) many: f64,
    /// Milliseconds of one random read of one reader, the middle and the slowest of a hundred.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// MiB/s that are not zero, of one pass from beginning to end.
    pub(crate) sequential: f64,
}

/// Numbers that look random, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 += 1;
        mix(self.0) % below
    }
}

/// Makes the chain, restores from it, serves it.
pub(crate) fn measure_chain(bench: &Bench, guests: &Guests, peers: &[Kind]) -> Result<Chain> {
    let guest = guests.names.first().context("no guest")?.clone();
    let increments = if bench.quick { QUICK } else { INCREMENTS };
    bench.step(&format!("{increments} increments of {guest}"));
    let mut fixture = Fixture::new()?;
    let (truth, qcow2) = (guests.image(&guest, 1), fixture.path("chain.qcow2"));
    image::convert(&truth, "raw", &qcow2, "qcow2")?;
    let (_, printed) = backup_image(&mut fixture, &guest, &qcow2)?;
    let oldest = qemu_tests::fixture::snapshot_id(&printed)?;
    let before = restores(bench, &mut fixture, &format!("{guest}@latest"), &truth)?;

    let mut random = Random(SEED);
    let mut seconds = Vec::new();
    let mut beside = Vec::new();
    let size = std::fs::metadata(&truth)?.len();
    for number in 1..=increments {
        change(&qcow2, |client| {
            for index in 0..CHANGED {
                let place = random.next(size / BLOCK as u64) * BLOCK as u64;
                client.write(place, &block(SEED + number, index))?;
            }
            Ok(())
        })?;
        seconds.push(increment(&mut fixture, &guest, &qcow2)?.wall);
        if number == 1 {
            // Beside the guests, as these are linked there.
            let folder = tempfile::Builder::new().prefix("alone").tempdir_in(guests.folder())?;
            let changed = folder.path().join("changed.raw");
            image::convert(&qcow2, "qcow2", &changed, "raw")?;
            let alone = Guests::alone(folder.path(), &guest);
            beside = measure_peers(peers, &alone, &truth, &changed)?;
        }
    }
    let newest_truth = fixture.path("newest.raw");
    image::convert(&qcow2, "qcow2", &newest_truth, "raw")?;
    let newest = restores(bench, &mut fixture, &format!("{guest}@latest"), &newest_truth)?;
    let oldest = restores(bench, &mut fixture, &format!("{guest}@{oldest}"), &truth)?;
    let bytes = [nonzero(&truth)?, nonzero(&newest_truth)?, nonzero(&truth)?];
    bench.step("reads through fleece serve");
    let served = serve(&mut fixture, &guest, &newest_truth, bytes[1])?;
    Ok(Chain {
        guest,
        increments,
        increment: median(&seconds),
        first: seconds.first().copied().unwrap_or(f64::NAN),
        peers: beside,
        restores: [before, newest, oldest],
        bytes,
        served,
    })
}

/// What every peer takes for an image that it has backed up before and that has changed a little.
fn measure_peers(
    peers: &[Kind],
    alone: &Guests,
    before: &Path,
    changed: &Path,
) -> Result<Vec<(Kind, Cost)>> {
    let mut costs = Vec::new();
    for kind in peers {
        let once = || -> Result<Cost> {
            alone.put_file(before)?;
            let mut tool = Tool::begin(*kind, alone)?;
            tool.backup(alone, 1)?;
            alone.put_file(changed)?;
            rustix::fs::sync();
            tool.backup(alone, 2)
        };
        match once() {
            // It comes from no distribution, and must not cost the others their run.
            Err(error) if *kind == Kind::Rustic => {
                eprintln!("peers: rustic is left out: {error:#}");
            }
            cost => costs.push((*kind, cost?)),
        }
    }
    Ok(costs)
}

/// Restores a snapshot as often as is asked for, and compares.
fn restores(bench: &Bench, fixture: &mut Fixture, snapshot: &str, truth: &Path) -> Result<Cost> {
    let to = fixture.path("chain.raw");
    let mut runs = Vec::new();
    for _ in 0..bench.runs() {
        rustix::fs::sync();
        runs.push(restore_image(fixture, snapshot, &to)?);
        blocks::same(truth, &to)?;
        std::fs::remove_file(&to)?;
    }
    Ok(Cost::median(&runs))
}

fn nonzero(path: &Path) -> Result<u64> {
    let mut bytes = 0;
    blocks::each_block(path, |_, block| {
        bytes += block.len() as u64;
        Ok(())
    })?;
    Ok(bytes)
}

/// Random and sequential reads of the newest snapshot.
fn serve(fixture: &mut Fixture, guest: &str, truth: &Path, bytes: u64) -> Result<Served> {
    let socket = fixture.path("serve.sock");
    let mut command = fixture.fleece_command(&["serve", &format!("{guest}@latest"), "--socket"])?;
    let mut server = Running::start("fleece serve", command.arg(&socket))?;
    server.wait_printed(SOON, "nbd+unix://")?;
    let mut places = Vec::new();
    blocks::each_block(truth, |offset, _| {
        places.push(offset);
        Ok(())
    })?;

    let (_, mut times) = read_at_random(&socket, &places, 0)?;
    let total: f64 = times.iter().sum();
    times.sort_by(f64::total_cmp);
    let start = Instant::now();
    let readers: Vec<_> = (0..READERS)
        .map(|reader| {
            let (socket, places) = (socket.clone(), places.clone());
            thread::spawn(move || read_at_random(&socket, &places, reader + 1))
        })
        .collect();
    let mut reads = 0;
    for reader in readers {
        reads += reader.join().map_err(|_| anyhow!("a reader died"))??.0;
    }
    let many = reads as f64 / start.elapsed().as_secs_f64();

    let daemons = [fixture.engine()?.pid(), server.pid()];
    let uri = format!("nbd+unix:///vda?socket={}", socket.display());
    let (cost, _) =
        measure("nbdcopy", Command::new("nbdcopy").args([uri.as_str(), "null:"]), &daemons, LIMIT)?;
    server.signal(Signal::TERM)?;
    server.finish(SOON)?;
    Ok(Served {
        single: times.len() as f64 / total,
        many,
        p50: times[times.len() / 2] * 1000.0,
        p99: times[times.len() * 99 / 100] * 1000.0,
        sequential: rate(bytes, cost.wall),
    })
}

/// One reader: how many reads, and the seconds of each.
fn read_at_random(socket: &Path, places: &[u64], seed: u64) -> Result<(usize, Vec<f64>)> {
    let mut client = nbd::Client::connect(socket, "vda")?;
    let mut random = Random(mix(SEED + seed));
    let mut buffer = vec![0; BLOCK];
    let mut times = Vec::with_capacity(READS);
    for _ in 0..READS {
        let place = places[random.next(places.len() as u64) as usize];
        let start = Instant::now();
        client.read(place, &mut buffer)?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok((times.len(), times))
}
