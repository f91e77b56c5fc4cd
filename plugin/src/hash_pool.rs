//! The threads that look at what was read: zero or data, and its fingerprint.

use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use tokio::sync::oneshot;

use crate::engine::BlockExtent;
use crate::error::{Context, Error, Kind, Result};
use crate::fingerprint::{FINGERPRINT_LEN, Fingerprinter, is_zero};
use crate::nbd::Buffer;

/// Two cores hash as fast as QEMU reads; more would take time from the guests.
const THREADS: usize = 2;

/// Jobs waiting or under way; more than any scan has reads in flight, so that handing
/// one over never blocks.
pub const MAX_JOBS: usize = 64;

/// The threads' frames are small and their default stack is 2 MiB.
const STACK: usize = 128 << 10;

/// What a piece of a disk holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Hashed {
    /// Runs of zeros and data, in order; blocks count from the piece's first.
    pub extents: Vec<BlockExtent>,
    /// 20 bytes for each block of data.
    pub fingerprints: Vec<u8>,
}

struct Job {
    data: Buffer,
    first_block: u64,
    hashed: Hashed,
    reply: oneshot::Sender<(Buffer, Hashed)>,
}

/// The threads; they end when it is dropped.
pub struct HashPool {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    block_size: usize,
}

impl HashPool {
    /// Starts the threads.
    ///
    /// # Errors
    /// Where the system refuses a thread.
    pub fn start(fingerprinter: &Fingerprinter, block_size: u32) -> Result<HashPool> {
        let (jobs, queue) = bounded(MAX_JOBS);
        let block_size = block_size as usize;
        let mut pool = HashPool { jobs: Some(jobs), threads: Vec::new(), block_size };
        for i in 0..THREADS {
            let (queue, fingerprinter) = (queue.clone(), fingerprinter.clone());
            let thread = std::thread::Builder::new()
                .name(format!("hash{i}"))
                .stack_size(STACK)
                .spawn(move || work(&queue, &fingerprinter, block_size))
                .context(|| "cannot start a thread".to_owned())?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Hashes whole blocks, of which `first_block` is the first; gives the buffer back.
    ///
    /// # Errors
    /// Where a thread died.
    pub async fn hash(&self, data: Buffer, first_block: u64) -> Result<(Buffer, Hashed)> {
        let dead = || Error::new(Kind::Failed, "a hashing thread died");
        // Allocated here, so that the threads allocate nothing: each would get an arena.
        let blocks = data.len().div_ceil(self.block_size);
        let hashed = Hashed {
            extents: Vec::with_capacity(blocks),
            fingerprints: Vec::with_capacity(blocks * FINGERPRINT_LEN),
        };
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or_else(dead)?;
        jobs.send(Job { data, first_block, hashed, reply }).map_err(|_| dead())?;
        answer.await.map_err(|_| dead())
    }
}

impl Drop for HashPool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panic there was reported as a dead thread already.
            let _ = thread.join();
        }
    }
}

fn work(queue: &Receiver<Job>, fingerprinter: &Fingerprinter, block_size: usize) {
    while let Ok(Job { data, first_block, mut hashed, reply }) = queue.recv() {
        hash(fingerprinter, block_size, &data, first_block, &mut hashed);
        // Whoever asked may have given up.
        let _ = reply.send((data, hashed));
    }
}

fn hash(
    fingerprinter: &Fingerprinter,
    block_size: usize,
    data: &[u8],
    first_block: u64,
    hashed: &mut Hashed,
) {
    for (at, block) in (first_block..).zip(data.chunks(block_size)) {
        let zero = is_zero(block);
        if !zero {
            hashed.fingerprints.extend_from_slice(&fingerprint(fingerprinter, block_size, block));
        }
        push(&mut hashed.extents, BlockExtent { first: at, blocks: 1, zero });
    }
}

/// A disk's last block may be short: it counts as padded with zeros.
fn fingerprint(
    fingerprinter: &Fingerprinter,
    block_size: usize,
    block: &[u8],
) -> [u8; FINGERPRINT_LEN] {
    if block.len() == block_size {
        return fingerprinter.of(block);
    }
    let mut padded = block.to_vec();
    padded.resize(block_size, 0);
    fingerprinter.of(&padded)
}

/// Appends a run, or lets the last one grow.
pub(crate) fn push(extents: &mut Vec<BlockExtent>, next: BlockExtent) {
    if let Some(last) = extents.last_mut()
        && last.zero == next.zero
        && last.first + u64::from(last.blocks) == next.first
        && let Some(blocks) = last.blocks.checked_add(next.blocks)
    {
        last.blocks = blocks;
        return;
    }
    extents.push(next);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn zeros_and_data_are_told_apart() {
        let fingerprinter = Fingerprinter::from_state([1, 2, 3, 4, 5], 4096);
        let pool = HashPool::start(&fingerprinter, 4096).unwrap();
        let mut data = vec![0; 5 * 4096 + 100];
        data[4096] = 1;
        data[3 * 4096 - 1] = 2;
        data[5 * 4096 + 99] = 3;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (back, hashed) =
            runtime.block_on(pool.hash(Buffer::from_vec(data.clone()), 1000)).unwrap();
        assert!(*back == *data);
        let run = |first, blocks, zero| BlockExtent { first, blocks, zero };
        let expected =
            [run(1000, 1, true), run(1001, 2, false), run(1003, 2, true), run(1005, 1, false)];
        assert_eq!(hashed.extents, expected);
        let mut padded = data[5 * 4096..].to_vec();
        padded.resize(4096, 0);
        let prints: Vec<u8> = [&data[4096..8192], &data[8192..12288], &padded]
            .iter()
            .flat_map(|block| fingerprinter.of(block))
            .collect();
        assert_eq!(hashed.fingerprints, prints);
    }
}
