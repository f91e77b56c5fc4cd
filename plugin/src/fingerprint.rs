//! The fingerprint of a block, from the hash state that the engine hands out.
//!
//! The engine keeps the secret; it gives us SHA-1's state after the 64 secret
//! bytes, from which nobody can get the secret back.

use sha1::block_api::compress;

/// Bytes of a fingerprint.
pub const FINGERPRINT_LEN: usize = 20;

/// Bytes of the secret before every block: one SHA-1 block.
const SECRET_LEN: u64 = 64;

/// Computes fingerprints of blocks of one size under one secret.
#[derive(Clone)]
pub struct Fingerprinter {
    state: [u32; 5],
    padding: [u8; 64],
}

impl Fingerprinter {
    /// From SHA-1's state after the secret, for blocks of `block_size` bytes (a multiple of 64).
    #[must_use]
    pub fn from_state(state: [u32; 5], block_size: u32) -> Self {
        let bits = 8 * (SECRET_LEN + u64::from(block_size));
        let mut padding = [0; 64];
        padding[0] = 0x80;
        padding[56..].copy_from_slice(&bits.to_be_bytes());
        Fingerprinter { state, padding }
    }

    /// The fingerprint of one whole block.
    #[must_use]
    pub fn of(&self, block: &[u8]) -> [u8; FINGERPRINT_LEN] {
        let mut state = self.state;
        let (chunks, rest) = block.as_chunks::<64>();
        debug_assert!(rest.is_empty(), "blocks are whole");
        compress(&mut state, chunks);
        compress(&mut state, &[self.padding]);
        let mut fingerprint = [0; FINGERPRINT_LEN];
        for (bytes, word) in fingerprint.chunks_exact_mut(4).zip(state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        fingerprint
    }
}

/// Whether there is nothing but zeros in it; gives up at the first 64 bytes that differ.
#[must_use]
pub fn is_zero(block: &[u8]) -> bool {
    let (chunks, rest) = block.as_chunks::<64>();
    chunks.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use sha1::{Digest, Sha1};

    use super::*;

    /// SHA-1's initial state (FIPS 180-4, 5.3.1).
    const INITIAL: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];

    #[test]
    fn equals_plain_sha1_of_secret_and_block() {
        let secret: [u8; 64] = std::array::from_fn(|i| i as u8);
        let mut state = INITIAL;
        compress(&mut state, &[secret]);
        for size in [4096_usize, 65536] {
            let block: Vec<u8> = (0..size).map(|i| (i * 7 + i / 256) as u8).collect();
            let plain = Sha1::new().chain_update(secret).chain_update(&block).finalize();
            let ours = Fingerprinter::from_state(state, size as u32).of(&block);
            assert_eq!(ours.as_slice(), plain.as_slice());
        }
    }

    #[test]
    fn sees_every_byte_that_is_not_zero() {
        let mut block = vec![0; 4096 + 7];
        assert!(is_zero(&block));
        for at in [0, 63, 64, 4095, 4096, 4102] {
            block[at] = 1;
            assert!(!is_zero(&block), "byte {at}");
            block[at] = 0;
        }
    }
}
