//! The bytes that guests and images are filled with: a function of seed and place, so that the
//! harness can say what must be where. Also compiled into the guest's program: std only.

/// The size of a block of content.
pub const BLOCK: usize = 4096;

/// Where a record keeps its number, and what it begins with.
const MAGIC: &[u8; 8] = b"FLRECORD";

/// A good mix of 64 bits (SplitMix64).
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The block number `index` of the content `seed`: half of it random, half repetition, so that
/// it compresses by about two. Never zero; equal only for equal arguments.
#[must_use]
pub fn block(seed: u64, index: u64) -> [u8; BLOCK] {
    let mut state = mix(mix(seed) ^ index);
    let mut bytes = [0; BLOCK];
    bytes[..8].copy_from_slice(&(index | 1 << 63).to_le_bytes());
    for word in bytes[8..BLOCK / 2].chunks_exact_mut(8) {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes[BLOCK / 2..].fill((state >> 56) as u8);
    bytes
}

/// A numbered record: the block that a guest's writer leaves behind.
#[must_use]
pub fn record(seed: u64, number: u64) -> [u8; BLOCK] {
    let mut bytes = block(seed ^ 0x7265_636f_7264, number);
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    bytes[16..24].copy_from_slice(&seed.to_le_bytes());
    let sum = sum(&bytes[..BLOCK - 8]);
    bytes[BLOCK - 8..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The number of an intact record, or none.
#[must_use]
pub fn record_number(bytes: &[u8]) -> Option<u64> {
    let (body, check) = bytes.split_at_checked(BLOCK - 8)?;
    let intact = body.starts_with(MAGIC) && check == sum(body).to_le_bytes();
    intact.then(|| body[8..16].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// A quick checksum of any bytes, eight at a time; not against malice.
#[must_use]
pub fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(mix(bytes.len() as u64), |state, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (state.rotate_left(23) ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}
