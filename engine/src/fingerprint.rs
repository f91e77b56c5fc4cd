//! The fingerprint of a block: SHA-1 over 64 secret bytes and the block.
//!
//! The secret fills exactly one SHA-1 block, so its state is computed once and
//! copied for every block. Without the secret nobody can prepare two blocks that
//! collide, although plain SHA-1 collisions are public (Stevens et al., 2017).

use sha1::block_api::compress;

use crate::ids::Fingerprint;

/// Bytes of the secret before every block: one SHA-1 block.
pub const SECRET_LEN: usize = 64;

/// SHA-1's initial state (FIPS 180-4, 5.3.1).
const INITIAL: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];

/// Computes fingerprints of blocks of one size under one secret.
#[derive(Clone)]
pub struct Fingerprinter {
    state: [u32; 5],
    padding: [u8; 64],
}

impl Fingerprinter {
    /// For blocks of `block_size` bytes, which must be a multiple of 64.
    #[must_use]
    pub fn new(secret: &[u8; SECRET_LEN], block_size: u32) -> Self {
        let mut state = INITIAL;
        compress(&mut state, &[*secret]);
        let bits = 8 * (SECRET_LEN as u64 + u64::from(block_size));
        let mut padding = [0; 64];
        padding[0] = 0x80;
        padding[56..].copy_from_slice(&bits.to_be_bytes());
        Fingerprinter { state, padding }
    }

    /// The state after the secret: all that the plugin needs, and nothing that reveals it.
    #[must_use]
    pub fn state(&self) -> [u32; 5] {
        self.state
    }

    /// The fingerprint of one whole block.
    #[must_use]
    pub fn of(&self, block: &[u8]) -> Fingerprint {
        let mut state = self.state;
        let (chunks, rest) = block.as_chunks::<64>();
        debug_assert!(rest.is_empty(), "blocks are whole");
        compress(&mut state, chunks);
        compress(&mut state, &[self.padding]);
        let mut fingerprint = [0; Fingerprint::LEN];
        for (bytes, word) in fingerprint.chunks_exact_mut(4).zip(state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        Fingerprint(fingerprint)
    }
}

#[cfg(test)]
mod tests {
    use sha1::{Digest, Sha1};

    use super::*;

    #[test]
    fn equals_plain_sha1_of_secret_and_block() {
        let secret: [u8; SECRET_LEN] = std::array::from_fn(|i| i as u8);
        for size in [4096_usize, 65536] {
            let block: Vec<u8> = (0..size).map(|i| (i * 7 + i / 256) as u8).collect();
            let plain = Sha1::new().chain_update(secret).chain_update(&block).finalize();
            let ours = Fingerprinter::new(&secret, size as u32).of(&block);
            assert_eq!(ours.0.as_slice(), plain.as_slice());
        }
    }
}
