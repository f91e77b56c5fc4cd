//! The limit of this machine: what the single steps of a first backup cost by themselves, one after
//! the other and with nothing around them, spread over the cores.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process;
use std::thread;
use std::time::Instant;

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};
use anyhow::anyhow;
use qemu_tests::Result;
use qemu_tests::bench::{blocks, cost, median};
use qemu_tests::content::BLOCK;
use sha1::{Digest, Sha1};
use zstd::bulk::Compressor;

use crate::guests::{FRAME, Guests, LEVEL, Survey};

/// What the RPC carries at a time.
const MESSAGE: usize = 256 << 10;

/// Bytes of a fingerprint, which go over the RPC for every block that is not zero.
const FINGERPRINT: u64 = 20;

/// The single costs in the order of the work.
pub(crate) const STEPS: [&str; 8] = [
    "first read",
    "SHA-1 of every block",
    "second read of new blocks",
    "SHA-1 of new blocks",
    "zstd of new blocks",
    "AES-256-GCM of their frames",
    "copy through a UNIX socket",
    "write and fsync",
];

/// Seconds of each step.
pub(crate) type Costs = [f64; STEPS.len()];

/// Measures every step once.
pub(crate) fn measure(guests: &Guests, survey: &Survey) -> Result<Costs> {
    let [read, hash] = scan(guests)?;
    let [again, rehash, compress, seal, write] = pack(guests, survey)?;
    let new = (survey.new.len() * BLOCK) as u64;
    let rpc = copy(new + survey.days[0].bytes() / BLOCK as u64 * FINGERPRINT)?;
    Ok([read, hash, again, rehash, compress, seal, rpc, write])
}

/// The middle of each step over the runs.
pub(crate) fn medians(runs: &[Costs]) -> Costs {
    std::array::from_fn(|step| median(&runs.iter().map(|run| run[step]).collect::<Vec<_>>()))
}

/// Adds the time that a piece of work takes.
fn timed<T>(seconds: &mut f64, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *seconds += start.elapsed().as_secs_f64();
    result
}

/// SHA-1 with a secret before every block, whose state is computed once.
fn keyed() -> Sha1 {
    Sha1::new().chain_update([7; 64])
}

/// Reads all that is not a hole and hashes what is not zero.
fn scan(guests: &Guests) -> Result<[f64; 2]> {
    let (mut read, mut hash, keyed) = (0.0, 0.0, keyed());
    let mut ends = 0_u64;
    for name in &guests.names {
        let mut last = Instant::now();
        blocks::each_piece(&guests.image(name, 1), |_, piece| {
            // Since the last piece was hashed: this one was read.
            read += last.elapsed().as_secs_f64();
            timed(&mut hash, || {
                for block in piece.chunks_exact(BLOCK) {
                    if block.iter().any(|byte| *byte != 0) {
                        ends += u64::from(keyed.clone().chain_update(block).finalize()[19]);
                    }
                }
            });
            last = Instant::now();
            Ok(())
        })?;
    }
    // So that the hashing cannot be left out.
    std::hint::black_box(ends);
    Ok([read, hash])
}

/// Reads, hashes, compresses, seals and writes the new blocks in frames.
fn pack(guests: &Guests, survey: &Survey) -> Result<[f64; 5]> {
    let [mut read, mut hash, mut compress, mut seal, mut write] = [0.0; 5];
    let files: Vec<File> = guests
        .names
        .iter()
        .map(|name| File::open(guests.image(name, 1)))
        .collect::<std::io::Result<_>>()?;
    let (keyed, cipher) = (keyed(), Aes256Gcm::new(&[3; 32].into()));
    let mut compressor = Compressor::new(LEVEL)?;
    let mut out = tempfile::tempfile()?;
    let mut frame = vec![0; FRAME];
    for (number, places) in survey.new.chunks(FRAME / BLOCK).enumerate() {
        let frame = &mut frame[..places.len() * BLOCK];
        timed(&mut read, || -> Result {
            // Neighbours in one read, as anyone would.
            let mut rest = &mut *frame;
            for run in
                places.chunk_by(|a, b| a.guest == b.guest && a.offset + BLOCK as u64 == b.offset)
            {
                let (piece, more) = rest.split_at_mut(run.len() * BLOCK);
                files[run[0].guest].read_exact_at(piece, run[0].offset)?;
                rest = more;
            }
            Ok(())
        })?;
        timed(&mut hash, || {
            for block in frame.chunks_exact(BLOCK) {
                std::hint::black_box(keyed.clone().chain_update(block).finalize());
            }
        });
        let mut packed = timed(&mut compress, || compressor.compress(frame))?;
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&(number as u64).to_le_bytes());
        timed(&mut seal, || {
            cipher.encrypt_inout_detached(&Nonce::from(nonce), b"", packed.as_mut_slice().into())
        })
        .map_err(|_| anyhow!("AES-GCM refused a frame"))?;
        timed(&mut write, || out.write_all(&packed))?;
    }
    timed(&mut write, || out.sync_all())?;
    Ok([read, hash, compress, seal, write])
}

/// Moves bytes through a UNIX socket; CPU seconds of both ends, as they work at the same time.
fn copy(bytes: u64) -> Result<f64> {
    let (mut from, mut to) = UnixStream::pair()?;
    let before = cost::cpu(process::id())?;
    let sender = thread::spawn(move || -> std::io::Result<()> {
        let message = vec![5; MESSAGE];
        let mut left = bytes;
        while left > 0 {
            let length = left.min(MESSAGE as u64);
            from.write_all(&message[..length as usize])?;
            left -= length;
        }
        Ok(())
    });
    let mut buffer = vec![0; MESSAGE];
    while to.read(&mut buffer)? > 0 {}
    sender.join().map_err(|_| anyhow!("the sender died"))??;
    Ok(cost::cpu(process::id())? - before)
}

/// Cores that the work can be spread over.
pub(crate) fn cores() -> Result<f64> {
    Ok(thread::available_parallelism()?.get() as f64)
}

/// The limit in seconds.
pub(crate) fn seconds(costs: &Costs) -> Result<f64> {
    Ok(costs.iter().sum::<f64>() / cores()?)
}
