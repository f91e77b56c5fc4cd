//! Names for the things that the engine counts and addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Keyed SHA-1 of a block (see [`crate::fingerprint`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; Fingerprint::LEN]);

impl Fingerprint {
    /// Bytes of a fingerprint.
    pub const LEN: usize = 20;
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One claim of the right to number containers; never reused (see `store::journal`).
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize, Default,
)]
pub struct Incarnation(pub u32);

/// Names a container for ever, whatever object holds it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId {
    /// Who numbered it.
    pub incarnation: Incarnation,
    /// Its number among those of the incarnation, from 1.
    pub counter: u32,
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:08x}", self.incarnation.0, self.counter)
    }
}

impl fmt::Debug for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A slot of a container.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(pub u16);

/// A block's place, for ever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// The container.
    pub container: ContainerId,
    /// The block's slot in it.
    pub slot: Slot,
}

impl Address {
    /// Bytes of an address on disk: incarnation, counter, slot, little endian.
    pub const LEN: usize = 10;

    /// The on-disk form.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.container.incarnation.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.container.counter.to_le_bytes());
        bytes[8..].copy_from_slice(&self.slot.0.to_le_bytes());
        bytes
    }

    /// Reads the on-disk form.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j] = bytes;
        Address {
            container: ContainerId {
                incarnation: Incarnation(u32::from_le_bytes([a, b, c, d])),
                counter: u32::from_le_bytes([e, f, g, h]),
            },
            slot: Slot(u16::from_le_bytes([i, j])),
        }
    }

    /// The address `n` slots further in the same container, if there can be one.
    #[must_use]
    pub fn plus(self, n: u16) -> Option<Self> {
        Some(Address { slot: Slot(self.slot.0.checked_add(n)?), ..self })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container, self.slot.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A virtual machine: its UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct VmId(pub Uuid);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A disk within its VM: its UUID, which its bitmaps carry in their names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct DiskId(pub Uuid);

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The store: random, chosen at `init`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct StoreId(pub Uuid);

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Six characters that name a snapshot among those of its VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId([u8; SnapshotId::LEN]);

impl SnapshotId {
    /// Characters of an id.
    pub const LEN: usize = 6;
    /// Without the letters that are taken for one another: i, l, o, u.
    const ALPHABET: &'static [u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

    /// An id from 30 random bits.
    #[must_use]
    pub fn from_random(bits: u32) -> Self {
        let mut id = [0; Self::LEN];
        for (i, character) in id.iter_mut().enumerate() {
            *character = Self::ALPHABET[(bits >> (5 * i)) as usize & 31];
        }
        SnapshotId(id)
    }

    /// The characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("??????")
    }
}

impl FromStr for SnapshotId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let id: [u8; Self::LEN] = text.as_bytes().try_into().map_err(|_| ())?;
        if id.iter().all(|c| Self::ALPHABET.contains(c)) { Ok(SnapshotId(id)) } else { Err(()) }
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A host of a cluster: its place in the partition map. A host that is alone is number 0.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct HostId(pub u16);

/// A slice of the fingerprint space, by leading bits: what a host of a cluster owns or does not own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slice(pub u16);

impl Slice {
    /// Leading bits of a fingerprint that name its slice: 4096 of them share 100 hosts out within some
    /// percent of one another.
    pub const BITS: u32 = 12;
    /// How many there are.
    pub const COUNT: usize = 1 << Self::BITS;

    /// All of them.
    pub fn all() -> impl Iterator<Item = Slice> {
        (0..Self::COUNT as u16).map(Slice)
    }

    /// Where a fingerprint is.
    #[must_use]
    pub fn of(fingerprint: &Fingerprint) -> Self {
        let [first, second, ..] = fingerprint.0;
        Slice((u16::from(first) << 8 | u16::from(second)) >> (u16::BITS - Self::BITS))
    }

    /// The first fingerprint in it.
    #[must_use]
    pub fn first(self) -> Fingerprint {
        let mut fingerprint = Fingerprint([0; Fingerprint::LEN]);
        let lead = self.0 << (u16::BITS - Self::BITS);
        fingerprint.0[..2].copy_from_slice(&lead.to_be_bytes());
        fingerprint
    }
}

/// A set of slices.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slices([u64; Slice::COUNT / 64]);

impl Default for Slices {
    fn default() -> Self {
        Slices([0; Slice::COUNT / 64])
    }
}

impl Slices {
    /// Adds one.
    pub fn insert(&mut self, slice: Slice) {
        self.0[usize::from(slice.0) / 64] |= 1 << (slice.0 % 64);
    }

    /// Whether it is in the set.
    #[must_use]
    pub fn contains(&self, slice: Slice) -> bool {
        self.0[usize::from(slice.0) / 64] >> (slice.0 % 64) & 1 == 1
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Those that are in another set, too.
    #[must_use]
    pub fn and(&self, other: &Slices) -> Slices {
        let mut both = self.clone();
        both.0.iter_mut().zip(other.0).for_each(|(word, others)| *word &= others);
        both
    }

    /// Those that are not in another set.
    #[must_use]
    pub fn without(&self, other: &Slices) -> Slices {
        let mut left = self.clone();
        left.0.iter_mut().zip(other.0).for_each(|(word, others)| *word &= !others);
        left
    }

    /// Adds those of another set.
    pub fn extend(&mut self, other: &Slices) {
        self.0.iter_mut().zip(other.0).for_each(|(word, others)| *word |= others);
    }

    /// Distinguishes this set from every other one.
    #[must_use]
    pub fn digest(&self) -> u64 {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        self.0.iter().for_each(|word| hash.update(word.to_le_bytes()));
        let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(hash.finalize());
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

/// Hexadecimal, 16 digits for 64 slices, the first one in the lowest bit.
impl Serialize for Slices {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text: String = self.0.iter().map(|word| format!("{word:016x}")).collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Slices {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        let wrong = || D::Error::custom("it is no set of slices");
        let text = String::deserialize(deserializer)?;
        let (words, rest) = text.as_bytes().as_chunks::<16>();
        let mut set = Slices::default();
        if !rest.is_empty() || words.len() != set.0.len() {
            return Err(wrong());
        }
        for (word, digits) in set.0.iter_mut().zip(words) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *word = u64::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(set)
    }
}

impl FromIterator<Slice> for Slices {
    fn from_iter<I: IntoIterator<Item = Slice>>(slices: I) -> Self {
        let mut set = Slices::default();
        slices.into_iter().for_each(|slice| set.insert(slice));
        set
    }
}

/// A session of an engine process; never reused within it. In the upper 8 bits its host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SessionId(pub u32);

impl SessionId {
    /// Bits of a session's number on its host.
    const NUMBER: u32 = 24;
    /// No session.
    pub const NOBODY: SessionId = SessionId(u32::MAX);

    /// The session of a host with this number, of which the lower 24 bits count.
    #[must_use]
    pub fn on(host: HostId, number: u32) -> Self {
        SessionId(u32::from(host.0) << Self::NUMBER | number & ((1 << Self::NUMBER) - 1))
    }

    /// Where it lives.
    #[must_use]
    pub fn host(self) -> HostId {
        HostId((self.0 >> Self::NUMBER) as u16)
    }
}

/// The number of a request within its session; ascends in disk order within a window.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Sequence(pub u64);
