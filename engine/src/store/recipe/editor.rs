//! Makes a disk's tree from its parent's tree and what changed.

use std::ops::Range;

use super::node::{Children, Node, NodeRef, SegmentRun, decode, encode_index, encode_segment, tag};
use super::{FAN_OUT, FAN_OUT_BITS, NodeSource, NodeStore, Placement, Shape};
use crate::error::{Error, Kind, Result};

/// Nodes that one editor may find lost and not build anew. An edit that ends in the middle of a disk
/// leaves one or two; who leaves many does not put what is below them.
const MAX_OWED: usize = 64;

/// Blocks whose place in the parent's tree is lost, and of which an editor was given a part only: the
/// tree is whole once the rest is put.
pub struct Owed {
    /// All blocks below the lost node.
    pub blocks: Range<u64>,
    /// Of these, how many were put.
    put: u64,
    /// Why the node cannot be read.
    pub why: Error,
}

impl Owed {
    /// Counts blocks that were put, none of them for the second time.
    pub fn pay(&mut self, blocks: Range<u64>) {
        let (from, to) = (blocks.start.max(self.blocks.start), blocks.end.min(self.blocks.end));
        self.put += to.saturating_sub(from);
    }

    /// Whether all were put.
    #[must_use]
    pub fn is_paid(&self) -> bool {
        self.put >= self.blocks.end - self.blocks.start
    }
}

/// Edits in ascending order; holds one open node per level and one open segment.
pub struct RecipeEditor<'a, S: NodeStore + ?Sized> {
    nodes: &'a mut S,
    shape: Shape,
    /// The lowest block that may be put next.
    next: u64,
    /// From the node above the root (its child 0 is the root) down.
    open: Vec<OpenNode>,
    segment: Option<OpenSegment>,
    owed: Vec<Owed>,
    written: u64,
}

/// An index node whose children are being replaced.
struct OpenNode {
    level: u8,
    /// Its number among the nodes of its level.
    index: u64,
    children: Box<Children>,
    /// The parent's tree has this here.
    old: Option<NodeRef>,
    /// Why the parent's node cannot be read: then all below it must be put.
    lost: Option<Error>,
    /// Blocks put below it since it was opened.
    covered: u64,
}

/// A segment with what was put into it.
struct OpenSegment {
    index: u64,
    old: Option<NodeRef>,
    /// What was put, as (start, count, placement), ascending.
    puts: Vec<(u32, u32, Placement)>,
    /// Blocks of `puts`.
    covered: u32,
}

impl<'a, S: NodeStore + ?Sized> RecipeEditor<'a, S> {
    /// Begins with `parent`'s tree, or with zeros; the disk may have grown since.
    pub fn new(nodes: &'a mut S, parent: Option<NodeRef>, shape: Shape) -> Result<Self> {
        let height = shape.height();
        if let Some(parent) = parent.filter(|parent| parent.level > height) {
            return Err(Error::new(
                Kind::Failed,
                format!("the recipe {parent} is of a larger disk: a shrunk disk is read in full"),
            ));
        }
        let mut children = Box::new([None; FAN_OUT]);
        children[0] = parent;
        let top =
            OpenNode { level: height + 1, index: 0, children, old: None, lost: None, covered: 0 };
        let (open, owed) = (vec![top], Vec::new());
        Ok(RecipeEditor { nodes, shape, next: 0, open, segment: None, owed, written: 0 })
    }

    /// Sets `count` blocks from `first_block` on; everything that is not put stays as in the
    /// parent. Ranges ascend and never overlap.
    pub fn put(&mut self, first_block: u64, count: u64, placement: Placement) -> Result<()> {
        let end = first_block.checked_add(count).filter(|end| *end <= self.shape.blocks());
        let Some(end) = end.filter(|_| first_block >= self.next) else {
            return Err(Error::new(
                Kind::Failed,
                format!("blocks {first_block}+{count} are beyond the disk or out of order"),
            ));
        };
        if let Placement::At(address) = placement
            && u64::from(address.slot.0) + count > u64::from(u16::MAX)
        {
            let message = format!("{count} blocks from {address} on are beyond any container");
            return Err(Error::new(Kind::Failed, message));
        }
        self.next = end;
        let (mut at, mut placement) = (first_block, placement);
        while at < end {
            let done = self.put_some(at, end, placement)?;
            placement = placement.skip(done);
            at += done;
        }
        Ok(())
    }

    /// Nodes that were written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// The new root; `None` for a disk of zeros.
    ///
    /// # Errors
    /// Also where a node of the parent's is lost, and not all below it was put.
    pub fn finish(self) -> Result<Option<NodeRef>> {
        let (root, owed) = self.finish_part()?;
        match owed.into_iter().next() {
            Some(owed) => Err(owed.why),
            None => Ok(root),
        }
    }

    /// The root as far as it is built, and what must still be put for it to be a whole disk's: the
    /// editor was given a part of the changes.
    ///
    /// # Errors
    /// When nodes cannot be read, for another reason than damage, or written.
    pub fn finish_part(mut self) -> Result<(Option<NodeRef>, Vec<Owed>)> {
        self.close_segment()?;
        while self.open.len() > 1 {
            self.close_node()?;
        }
        let root = self.open.first().and_then(|top| top.children[0]);
        let root = root.map(|root| self.lift(root, self.shape.height())).transpose()?;
        Ok((root, self.owed))
    }

    fn owe(&mut self, blocks: Range<u64>, put: u64, why: Error) -> Result<()> {
        if self.owed.len() >= MAX_OWED {
            return Err(why);
        }
        self.owed.push(Owed { blocks, put, why });
        Ok(())
    }

    /// Puts what lies in one segment, or in one subtree of zeros; returns how many blocks.
    fn put_some(&mut self, at: u64, end: u64, placement: Placement) -> Result<u64> {
        let segment_blocks = u64::from(self.shape.segment_blocks());
        let segment = at / segment_blocks;
        let start = (at % segment_blocks) as u32;
        let has = self.shape.blocks_of(segment);
        if start == 0 && placement == Placement::Zero && end - at >= u64::from(has) {
            return self.zero_subtree(segment, at, end);
        }
        let count = u64::from(has - start).min(end - at) as u32;
        let open = self.open_segment(segment)?;
        open.puts.push((start, count, placement));
        open.covered += count;
        self.cover(u64::from(count));
        Ok(u64::from(count))
    }

    /// Drops the largest subtree that begins with `segment` and ends by block `end`.
    fn zero_subtree(&mut self, segment: u64, at: u64, end: u64) -> Result<u64> {
        let segment_blocks = u64::from(self.shape.segment_blocks());
        let blocks_at =
            |level: u8| (Shape::span(level) * segment_blocks).min(self.shape.blocks() - at);
        let mut level = 0;
        while level < self.shape.height()
            && segment.is_multiple_of(Shape::span(level + 1))
            && blocks_at(level + 1) <= end - at
        {
            level += 1;
        }
        let done = blocks_at(level);
        self.close_segment()?;
        let node = self.open_path(segment, level + 1)?;
        node.children[child_of(segment, level)] = None;
        self.cover(done);
        Ok(done)
    }

    /// Counts blocks that were put below all open nodes.
    fn cover(&mut self, blocks: u64) {
        self.open.iter_mut().for_each(|node| node.covered += blocks);
    }

    fn open_segment(&mut self, segment: u64) -> Result<&mut OpenSegment> {
        if self.segment.as_ref().is_none_or(|open| open.index != segment) {
            self.close_segment()?;
            let old = self.open_path(segment, 1)?.children[child_of(segment, 0)];
            let puts = Vec::new();
            self.segment = Some(OpenSegment { index: segment, old, puts, covered: 0 });
        }
        self.segment.as_mut().ok_or_else(|| Error::new(Kind::Failed, "no segment is open"))
    }

    /// Opens the index node of `level` above `segment`, closing what is beside the way.
    fn open_path(&mut self, segment: u64, level: u8) -> Result<&mut OpenNode> {
        while let Some(lowest) = self.open.last()
            && self.open.len() > 1
            && (lowest.level < level || lowest.index != segment / Shape::span(lowest.level))
        {
            self.close_node()?;
        }
        while let Some(lowest) = self.open.last()
            && lowest.level > level
        {
            let below = lowest.level - 1;
            let old = lowest.children[child_of(segment, below)];
            // A damaged node does not keep a backup from being made that puts all below it.
            let (children, lost) = match self.children_of(old, below) {
                Ok(children) => (children, None),
                Err(error) if is_lost(&error) => (Box::new([None; FAN_OUT]), Some(error)),
                Err(error) => return Err(error),
            };
            let index = segment / Shape::span(below);
            self.open.push(OpenNode { level: below, index, children, old, lost, covered: 0 });
        }
        self.open.last_mut().ok_or_else(|| Error::new(Kind::Failed, "no node is open"))
    }

    /// The children that the parent's tree has at a node of `level`.
    fn children_of(&self, old: Option<NodeRef>, level: u8) -> Result<Box<Children>> {
        let mut children = Box::new([None; FAN_OUT]);
        match old {
            None => {}
            // The root of a disk that was smaller: the first child of what is above it now.
            Some(old) if old.level < level => children[0] = Some(old),
            Some(old) => match read(self.nodes, &old, &self.shape)? {
                Node::Index(index) => children = index,
                Node::Segment(_) => return Err(misplaced(&old)),
            },
        }
        Ok(children)
    }

    fn close_node(&mut self) -> Result<()> {
        let Some(mut node) = self.open.pop() else { return Ok(()) };
        let below = self.shape.blocks_below(node.index * Shape::span(node.level), node.level);
        if let Some(lost) = node.lost {
            if node.covered < below.end - below.start {
                self.owe(below, node.covered, lost)?;
            }
            node.old = None; // Not to be named again, even if the new one is equal.
        }
        if let Some(first) = node.children[0] {
            node.children[0] = Some(self.lift(first, node.level - 1)?);
        }
        let new = if node.children.iter().all(Option::is_none) {
            None
        } else {
            Some(self.keep(node.level, &encode_index(node.level, &node.children), node.old)?)
        };
        let first_segment = node.index * Shape::span(node.level);
        if let Some(above) = self.open.last_mut() {
            above.children[child_of(first_segment, node.level)] = new;
        }
        Ok(())
    }

    fn close_segment(&mut self) -> Result<()> {
        let Some(segment) = self.segment.take() else { return Ok(()) };
        let mut runs = Vec::new();
        let mut old_runs = Vec::new();
        if segment.covered < self.shape.blocks_of(segment.index)
            && let Some(old) = segment.old
        {
            let read = match read(self.nodes, &old, &self.shape) {
                Ok(Node::Segment(runs)) => Ok(runs),
                Ok(Node::Index(_)) => Err(misplaced(&old)),
                Err(error) => Err(error),
            };
            match read {
                Ok(runs) => old_runs = runs,
                Err(error) if is_lost(&error) => {
                    let below = self.shape.blocks_below(segment.index, 0);
                    self.owe(below, segment.covered.into(), error)?;
                }
                Err(error) => return Err(error),
            }
        }
        overlay(&old_runs, &segment.puts, &mut runs);
        let new = if runs.is_empty() {
            None
        } else {
            let bytes = encode_segment(&runs);
            let sound = match segment.old.filter(|old| old.level == 0 && old.tag == tag(&bytes)) {
                // Equal and not read yet: a damaged one must not be named again.
                Some(old) if old_runs.is_empty() => self.is_sound(&old)?,
                _ => true,
            };
            Some(self.keep(0, &bytes, segment.old.filter(|_| sound))?)
        };
        if let Some(above) = self.open.last_mut() {
            above.children[child_of(segment.index, 0)] = new;
        }
        Ok(())
    }

    fn is_sound(&self, node: &NodeRef) -> Result<bool> {
        match read(self.nodes, node, &self.shape) {
            Ok(_) => Ok(true),
            Err(error) if is_lost(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Names the old node if it has these bytes, or writes a new one.
    fn keep(&mut self, level: u8, bytes: &[u8], old: Option<NodeRef>) -> Result<NodeRef> {
        if let Some(old) = old.filter(|old| old.level == level && old.tag == tag(bytes)) {
            return Ok(old);
        }
        self.written += 1;
        let address = self.nodes.put(level, bytes)?;
        Ok(NodeRef::of(address, level, bytes))
    }

    /// Puts nodes above a root of a smaller disk until it is of `level`.
    fn lift(&mut self, mut node: NodeRef, level: u8) -> Result<NodeRef> {
        while node.level < level {
            let mut children = Box::new([None; FAN_OUT]);
            children[0] = Some(node);
            node = self.keep(node.level + 1, &encode_index(node.level + 1, &children), None)?;
        }
        Ok(node)
    }
}

/// Whether this is not only away, as where the store cannot be read for now.
fn is_lost(error: &Error) -> bool {
    matches!(error.kind(), Kind::Damaged | Kind::NotFound)
}

/// The place, in the node above it, of the node of `level` that `segment` is in.
fn child_of(segment: u64, level: u8) -> usize {
    (segment >> (FAN_OUT_BITS * u32::from(level))) as usize % FAN_OUT
}

/// Reads, checks and decodes a node.
pub(super) fn read<S: NodeSource + ?Sized>(
    nodes: &S,
    node: &NodeRef,
    shape: &Shape,
) -> Result<Node> {
    let bytes = nodes.get(node)?;
    node.check(&bytes)?;
    decode(node.level, &bytes, shape)
}

pub(super) fn misplaced(node: &NodeRef) -> Error {
    Error::new(Kind::Damaged, format!("the recipe node {node} is not of the level it is used at"))
}

/// Lays `puts` over `old`; merges what can be one run.
fn overlay(old: &[SegmentRun], puts: &[(u32, u32, Placement)], runs: &mut Vec<SegmentRun>) {
    let mut from = 0;
    for &(start, count, placement) in puts {
        keep_between(old, from, start, runs);
        if let Placement::At(at) = placement {
            push(runs, SegmentRun { start, count, at });
        }
        from = start + count;
    }
    keep_between(old, from, u32::MAX, runs);
}

/// Takes over what `old` has in `from..to`.
fn keep_between(old: &[SegmentRun], from: u32, to: u32, runs: &mut Vec<SegmentRun>) {
    let first = old.partition_point(|run| run.end() <= from);
    for run in old[first..].iter().take_while(|run| run.start < to) {
        let start = run.start.max(from);
        let mut at = run.at;
        at.slot.0 += (start - run.start) as u16;
        push(runs, SegmentRun { start, count: run.end().min(to) - start, at });
    }
}

fn push(runs: &mut Vec<SegmentRun>, run: SegmentRun) {
    match runs.last_mut() {
        _ if run.count == 0 => {}
        Some(last) if last.continues(&run) => last.count += run.count,
        _ => runs.push(run),
    }
}
