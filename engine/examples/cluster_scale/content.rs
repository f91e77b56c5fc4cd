//! What the blocks of the VMs hold: numbers of contents, drawn by a seed, and which of them were seen.

use fleece_engine::ids::Fingerprint;

/// Blocks of the pool that VMs have in common, for each VM.
const POOL_PER_VM: u64 = 400;
/// How many of 10,000 blocks that are asked about are new to their VM and in no pool. What the pool has
/// is new once, too: together they make what is asked about some 4.5 times what is distinct.
const NEW: u64 = 2110;

/// splitmix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Copy)]
pub(crate) struct Random(u64);

fn mixed(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

impl Random {
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        Random(mixed(seed ^ mixed(stream.wrapping_add(0x9e37_79b9_7f4a_7c15))))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed(self.0)
    }

    fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// From 0 to below 1.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// The number of a content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Content(pub(crate) u32);

impl Content {
    /// Uniform, as a keyed SHA-1 is.
    pub(crate) fn fingerprint(self, seed: u64) -> Fingerprint {
        let mut random = Random::new(seed, u64::from(self.0));
        let mut bytes = [0; Fingerprint::LEN];
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&random.next().to_be_bytes()[..chunk.len()]);
        }
        Fingerprint(bytes)
    }
}

/// How contents are numbered: those of each VM alone, then those of the pool.
#[derive(Clone, Copy)]
pub(crate) struct Numbers {
    vms: u64,
    /// Numbers of one VM: it cannot be asked about more blocks.
    each: u64,
}

impl Numbers {
    pub(crate) fn new(vms: u64, asked_of_each: u64) -> Self {
        Numbers { vms, each: asked_of_each }
    }

    pub(crate) fn pool(self) -> u64 {
        self.vms * POOL_PER_VM
    }

    pub(crate) fn all(self) -> u64 {
        self.vms * self.each + self.pool()
    }
}

/// A VM whose changed blocks are drawn.
pub(crate) struct Vm {
    numbers: Numbers,
    random: Random,
    /// Its number among all VMs.
    number: u64,
    /// Contents that it alone has, so far.
    own: u64,
}

impl Vm {
    pub(crate) fn new(numbers: Numbers, seed: u64, number: u64) -> Self {
        Vm { numbers, random: Random::new(seed ^ 0x5eed, number), number, own: 0 }
    }

    /// The content of the next block that changed: new, or the same as one of the VM's own, or one of
    /// the pool, where the content of rank r comes with a probability proportional to 1/r.
    pub(crate) fn draw(&mut self) -> Content {
        let kind = self.random.below(10_000);
        let content = if kind < NEW || self.own == 0 {
            self.own += 1;
            self.number * self.numbers.each + self.own - 1
        } else if kind.is_multiple_of(2) {
            self.number * self.numbers.each + self.random.below(self.own)
        } else {
            let pool = self.numbers.pool() as f64;
            let rank = (self.random.fraction() * pool.ln()).exp() as u64;
            self.numbers.vms * self.numbers.each + rank.clamp(1, self.numbers.pool()) - 1
        };
        Content(content as u32)
    }
}

/// A set of contents, in a bit each.
pub(crate) struct Set {
    bits: Vec<u64>,
    len: u64,
}

impl Set {
    pub(crate) fn new(numbers: Numbers) -> Self {
        Set { bits: vec![0; numbers.all().div_ceil(64) as usize], len: 0 }
    }

    /// False: it was there.
    pub(crate) fn insert(&mut self, content: Content) -> bool {
        let Some(word) = self.bits.get_mut(content.0 as usize / 64) else { return false };
        let bit = 1 << (content.0 % 64);
        let fresh = *word & bit == 0;
        *word |= bit;
        self.len += u64::from(fresh);
        fresh
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bits.len() as u64 * 8
    }
}
