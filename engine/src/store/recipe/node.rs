//! Recipe nodes on disk.
//!
//! Segment node: the byte `S`, version 1, then one entry per run, ascending:
//! ```text
//! varint  blocks since the end of the run before << 1 | same container as the run before
//! varint  blocks of the run - 1
//! same container:   zigzag varint  first slot - slot after the run before
//! other container:  varint incarnation, varint counter, varint first slot
//! ```
//! Index node: the byte `I`, version 1, its level, a bitmap of the children that are there
//! (16 bytes, bit 0 of byte 0 first), then of each the address (10 bytes) and the tag (16).
//! There is one way to write a node: equal content has equal bytes, hence an equal tag.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{FAN_OUT, Shape};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint, Incarnation, Slot};

const SEGMENT_MAGIC: u8 = b'S';
const INDEX_MAGIC: u8 = b'I';
const VERSION: u8 = 1;
/// Slots of a container: a run's slots end before this.
const SLOTS: u32 = u16::MAX as u32;
/// Levels that there can be: 2^64 bytes in segments of 2 MiB need 7.
const MAX_LEVEL: u8 = 7;
/// Bytes of the tag: a truncated SHA-256, far beyond accident; tampering is the AEAD's part.
const TAG_LEN: usize = 16;

/// Names a node: where it is, its level, and a tag of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct NodeRef {
    /// The node's slot in a container of nodes.
    pub address: Address,
    /// 0 for a segment node.
    pub level: u8,
    /// The first bytes of the SHA-256 of its bytes.
    pub tag: [u8; TAG_LEN],
}

impl NodeRef {
    /// The reference of a node kept at `address`.
    pub(in crate::store) fn of(address: Address, level: u8, bytes: &[u8]) -> Self {
        NodeRef { address, level, tag: tag(bytes) }
    }

    /// Checks a node's bytes against the tag.
    pub(super) fn check(&self, bytes: &[u8]) -> Result<()> {
        if tag(bytes) == self.tag {
            Ok(())
        } else {
            Err(damaged(&format!("at {} is not the one that its parent names", self.address)))
        }
    }
}

pub(super) fn tag(bytes: &[u8]) -> [u8; TAG_LEN] {
    let mut tag = [0; TAG_LEN];
    tag.copy_from_slice(&Sha256::digest(bytes)[..TAG_LEN]);
    tag
}

/// What a node stands under in its container's directory: the first 20 bytes of its
/// SHA-256, of which the tag is a part.
#[must_use]
pub fn fingerprint(bytes: &[u8]) -> Fingerprint {
    let mut fingerprint = [0; Fingerprint::LEN];
    fingerprint.copy_from_slice(&Sha256::digest(bytes)[..Fingerprint::LEN]);
    Fingerprint(fingerprint)
}

/// `level:incarnation-counter/slot:tag`, all hexadecimal but the slot: the form in manifests.
impl fmt::Display for NodeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.level, self.address)?;
        self.tag.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl From<NodeRef> for String {
    fn from(node: NodeRef) -> String {
        node.to_string()
    }
}

impl TryFrom<String> for NodeRef {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        parse(&text).ok_or_else(|| format!("{text:?} names no recipe node"))
    }
}

fn parse(text: &str) -> Option<NodeRef> {
    let mut parts = text.split(':');
    let (level, address, hex) = (parts.next()?, parts.next()?, parts.next()?);
    let (container, slot) = address.split_once('/')?;
    let (incarnation, counter) = container.split_once('-')?;
    let container = ContainerId {
        incarnation: Incarnation(u32::from_str_radix(incarnation, 16).ok()?),
        counter: u32::from_str_radix(counter, 16).ok()?,
    };
    let mut tag = [0; TAG_LEN];
    if hex.len() != 2 * TAG_LEN || !hex.is_ascii() || parts.next().is_some() {
        return None;
    }
    for (i, byte) in tag.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    let level = level.parse().ok().filter(|level| *level <= MAX_LEVEL)?;
    Some(NodeRef { address: Address { container, slot: Slot(slot.parse().ok()?) }, level, tag })
}

/// A run within a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SegmentRun {
    /// The first block's number in the segment.
    pub(super) start: u32,
    pub(super) count: u32,
    pub(super) at: Address,
}

impl SegmentRun {
    pub(super) fn end(&self) -> u32 {
        self.start + self.count
    }

    fn end_slot(&self) -> u32 {
        u32::from(self.at.slot.0) + self.count
    }

    /// Whether `next` could be written as a part of this run.
    pub(super) fn continues(&self, next: &SegmentRun) -> bool {
        self.end() == next.start
            && self.at.container == next.at.container
            && self.end_slot() == u32::from(next.at.slot.0)
    }
}

/// The children of an index node.
pub(super) type Children = [Option<NodeRef>; FAN_OUT];

/// A decoded node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Node {
    Segment(Vec<SegmentRun>),
    Index(Box<Children>),
}

/// Encodes the runs of a segment, which ascend and cannot be merged.
pub(super) fn encode_segment(runs: &[SegmentRun]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(2 + 8 * runs.len());
    bytes.extend([SEGMENT_MAGIC, VERSION]);
    let mut before: Option<&SegmentRun> = None;
    for run in runs {
        let same = before.filter(|before| before.at.container == run.at.container);
        let gap = run.start - before.map_or(0, SegmentRun::end);
        put_varint(&mut bytes, gap << 1 | u32::from(same.is_some()));
        put_varint(&mut bytes, run.count - 1);
        match same {
            Some(before) => {
                let delta = i32::from(run.at.slot.0) - before.end_slot() as i32;
                put_varint(&mut bytes, (delta << 1 ^ delta >> 31) as u32);
            }
            None => {
                put_varint(&mut bytes, run.at.container.incarnation.0);
                put_varint(&mut bytes, run.at.container.counter);
                put_varint(&mut bytes, u32::from(run.at.slot.0));
            }
        }
        before = Some(run);
    }
    bytes
}

/// Encodes an index node; its children are all of the level below.
pub(super) fn encode_index(level: u8, children: &Children) -> Vec<u8> {
    let present = children.iter().flatten().count();
    let mut bytes = Vec::with_capacity(3 + FAN_OUT / 8 + present * (Address::LEN + TAG_LEN));
    bytes.extend([INDEX_MAGIC, VERSION, level]);
    let mut bitmap = [0_u8; FAN_OUT / 8];
    for (i, _) in children.iter().enumerate().filter(|(_, child)| child.is_some()) {
        bitmap[i / 8] |= 1 << (i % 8);
    }
    bytes.extend(bitmap);
    for child in children.iter().flatten() {
        debug_assert_eq!(child.level + 1, level);
        bytes.extend(child.address.to_bytes());
        bytes.extend(child.tag);
    }
    bytes
}

/// Decodes a node of the given level of a disk of this shape.
pub(super) fn decode(level: u8, bytes: &[u8], shape: &Shape) -> Result<Node> {
    let mut input = Input(bytes);
    let magic = if level == 0 { SEGMENT_MAGIC } else { INDEX_MAGIC };
    if input.byte()? != magic {
        return Err(damaged("is of another kind than its parent says"));
    }
    if input.byte()? != VERSION {
        return Err(damaged("has a version that this program does not know"));
    }
    if level == 0 {
        decode_segment(input, shape.segment_blocks()).map(Node::Segment)
    } else {
        decode_index(level, input).map(Node::Index)
    }
}

/// Whether any bytes are a node of a level, for the fuzzer.
#[cfg(any(test, fuzzing))]
pub(crate) fn decode_node(level: u8, bytes: &[u8]) -> bool {
    decode(level, bytes, &Shape::new(u64::MAX / 2, 4096)).is_ok()
}

fn decode_segment(mut input: Input<'_>, segment_blocks: u32) -> Result<Vec<SegmentRun>> {
    let mut runs: Vec<SegmentRun> = Vec::new();
    while !input.0.is_empty() {
        let head = input.varint()?;
        let before = runs.last();
        let start = before.map_or(0, SegmentRun::end) + (head >> 1);
        let count = input.varint()?.saturating_add(1);
        if start >= segment_blocks || count > segment_blocks - start {
            return Err(damaged("has a run beyond its segment"));
        }
        let (container, slot) = if head & 1 == 1 {
            let before = before.ok_or_else(|| damaged("begins with a reference back"))?;
            let zigzag = input.varint()?;
            let delta = (zigzag >> 1) as i32 ^ -((zigzag & 1) as i32);
            (before.at.container, i64::from(before.end_slot()) + i64::from(delta))
        } else {
            let incarnation = Incarnation(input.varint()?);
            let counter = input.varint()?;
            (ContainerId { incarnation, counter }, i64::from(input.varint()?))
        };
        let slot = u16::try_from(slot).map_err(|_| damaged("has a slot out of range"))?;
        if u32::from(slot) + count > SLOTS {
            return Err(damaged("has a run beyond its container"));
        }
        runs.push(SegmentRun { start, count, at: Address { container, slot: Slot(slot) } });
    }
    Ok(runs)
}

fn decode_index(level: u8, mut input: Input<'_>) -> Result<Box<Children>> {
    if input.byte()? != level {
        return Err(damaged("is of another level than its parent says"));
    }
    let bitmap: [u8; FAN_OUT / 8] = input.array()?;
    let mut children = Box::new([None; FAN_OUT]);
    for (i, child) in children.iter_mut().enumerate() {
        if bitmap[i / 8] >> (i % 8) & 1 == 1 {
            let address = Address::from_bytes(input.array()?);
            *child = Some(NodeRef { address, level: level - 1, tag: input.array()? });
        }
    }
    if input.0.is_empty() { Ok(children) } else { Err(damaged("is too long")) }
}

fn damaged(what: &str) -> Error {
    Error::new(Kind::Damaged, format!("a recipe node {what}"))
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// What is left to decode.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Result<u8> {
        let (first, rest) = self.0.split_first().ok_or_else(|| damaged("is cut off"))?;
        self.0 = rest;
        Ok(*first)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk().ok_or_else(|| damaged("is cut off"))?;
        self.0 = rest;
        Ok(*array)
    }

    fn varint(&mut self) -> Result<u32> {
        let mut value = 0_u64;
        for shift in (0..35).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return u32::try_from(value).map_err(|_| damaged("has a number out of range"));
            }
        }
        Err(damaged("has a number without end"))
    }
}
