//! Reads a disk's tree: as a stream of runs, or at any place.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::editor::{misplaced, read};
use super::node::{Node, NodeRef};
use super::{FAN_OUT, NodeSource, Placement, Run, Shape};
use crate::error::{Error, Kind, Result};

/// Decoded nodes that a reader keeps: the way down of a few places read at a time. A full
/// index node is 4.5 KiB, so this is below 160 KiB.
const CACHED_NODES: usize = 32;

/// Reads one tree.
pub struct RecipeReader<S: NodeSource> {
    nodes: S,
    root: Option<NodeRef>,
    shape: Shape,
    cache: RefCell<VecDeque<(NodeRef, Arc<Node>)>>,
}

/// Called with a node, the blocks below it, and, of a segment node, its runs.
pub type Visit<'v> = dyn FnMut(&NodeRef, Range<u64>, Result<&[Run]>) -> Result<()> + 'v;

/// A node that could not be read: these blocks are unknown.
#[derive(Debug)]
pub struct Lost {
    /// The first block below the node.
    pub first_block: u64,
    /// How many blocks are below it, within the range asked for.
    pub count: u64,
    /// The node.
    pub node: NodeRef,
    /// Why.
    pub error: Error,
}

impl<S: NodeSource> RecipeReader<S> {
    /// Of the tree below `root`, of a disk of this shape.
    pub fn new(nodes: S, root: Option<NodeRef>, shape: Shape) -> Result<Self> {
        if let Some(root) = root.filter(|root| root.level != shape.height()) {
            let height = shape.height();
            let message = format!("the recipe {root} should have {height} levels for its disk");
            return Err(Error::new(Kind::Damaged, message));
        }
        Ok(RecipeReader { nodes, root, shape, cache: RefCell::new(VecDeque::new()) })
    }

    /// The disk's shape.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The runs that cover `blocks` (cut at the disk's end) without a gap, ascending and as
    /// long as they can be.
    pub fn runs(&self, blocks: Range<u64>) -> Runs<'_, S> {
        let end = blocks.end.min(self.shape.blocks);
        Runs {
            reader: self,
            at: blocks.start.min(end),
            end,
            way: Vec::new(),
            pending: None,
            tolerant: false,
            lost: Vec::new(),
        }
    }

    /// The runs of the whole disk.
    pub fn all_runs(&self) -> Runs<'_, S> {
        self.runs(0..self.shape.blocks)
    }

    /// Calls `visit` for every node of this tree that `old` (an earlier root of the same disk)
    /// does not have at the same place: with its reference, the range of blocks below it, and,
    /// of a segment node, its runs. A node that cannot be read is visited with the error, and
    /// the walk goes on beside it.
    pub fn visit_new(&self, old: Option<NodeRef>, visit: &mut Visit<'_>) -> Result<()> {
        match self.root {
            Some(root) => self.visit_node(root, 0, old, visit),
            None => Ok(()),
        }
    }

    fn visit_node(
        &self,
        node: NodeRef,
        segment: u64,
        old: Option<NodeRef>,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        if old == Some(node) {
            return Ok(());
        }
        let below = self.shape.blocks_below(segment, node.level);
        if below.is_empty() {
            return visit(&node, below, Err(beyond_the_end(&node)));
        }
        let children = match self.node(&node) {
            Err(error) => return visit(&node, below, Err(error)),
            Ok(read) => match &*read {
                Node::Segment(_) => {
                    let runs = segment_runs(&read, below.start);
                    return visit(&node, below, Ok(&runs));
                }
                Node::Index(children) => children.clone(),
            },
        };
        visit(&node, below, Ok(&[]))?;
        let old_children = old.and_then(|old| self.old_children(&old, node.level));
        for (i, child) in children.iter().enumerate() {
            if let Some(child) = child {
                let old = old_children.as_ref().and_then(|old| old[i]);
                let segment = segment + i as u64 * Shape::span(child.level);
                self.visit_node(*child, segment, old, visit)?;
            }
        }
        Ok(())
    }

    /// The children of the older tree's node at a place of `level`; one that cannot be read
    /// is as if it were not there, so that everything new is visited.
    fn old_children(&self, old: &NodeRef, level: u8) -> Option<Box<[Option<NodeRef>; FAN_OUT]>> {
        if old.level < level {
            let mut children = Box::new([None; FAN_OUT]);
            children[0] = Some(*old);
            return Some(children);
        }
        match &*self.node(old).ok()? {
            Node::Index(children) => Some(children.clone()),
            Node::Segment(_) => None,
        }
    }

    /// A node, from the cache if it is there.
    fn node(&self, node: &NodeRef) -> Result<Arc<Node>> {
        let mut cache = self.cache.borrow_mut();
        if let Some(i) = cache.iter().position(|(cached, _)| cached == node)
            && let Some(hit) = cache.remove(i)
        {
            let found = hit.1.clone();
            cache.push_front(hit);
            return Ok(found);
        }
        let read = Arc::new(read(&self.nodes, node, &self.shape)?);
        cache.truncate(CACHED_NODES - 1);
        cache.push_front((*node, read.clone()));
        Ok(read)
    }
}

fn beyond_the_end(node: &NodeRef) -> Error {
    Error::new(Kind::Damaged, format!("the recipe node {node} lies beyond the disk's end"))
}

/// A segment node's runs with their place on the disk.
fn segment_runs(node: &Node, first_block: u64) -> Vec<Run> {
    let Node::Segment(runs) = node else { return Vec::new() };
    let place = |run: &super::node::SegmentRun| Run {
        first_block: first_block + u64::from(run.start),
        count: u64::from(run.count),
        placement: Placement::At(run.at),
    };
    runs.iter().map(place).collect()
}

/// A stream of runs; see [`RecipeReader::runs`].
pub struct Runs<'r, S: NodeSource> {
    reader: &'r RecipeReader<S>,
    /// The next block to look at.
    at: u64,
    end: u64,
    /// The nodes from the root to the segment looked at last.
    way: Vec<Step>,
    /// Grows until something else follows.
    pending: Option<Run>,
    tolerant: bool,
    lost: Vec<Lost>,
}

/// A node on the way down.
struct Step {
    first_block: u64,
    end_block: u64,
    first_segment: u64,
    node: Arc<Node>,
    level: u8,
}

impl<S: NodeSource> Runs<'_, S> {
    /// Takes what is below unreadable nodes for zeros and lists it in [`Runs::take_lost`].
    #[must_use]
    pub fn tolerant(mut self) -> Self {
        self.tolerant = true;
        self
    }

    /// The unreadable nodes met since the last call.
    pub fn take_lost(&mut self) -> Vec<Lost> {
        std::mem::take(&mut self.lost)
    }

    /// The next run.
    #[allow(clippy::should_implement_trait)] // It can fail.
    pub fn next(&mut self) -> Result<Option<Run>> {
        while self.at < self.end {
            let piece = self.piece()?;
            self.at += piece.count;
            match &mut self.pending {
                None => self.pending = Some(piece),
                Some(pending) if pending.continues(&piece) => pending.count += piece.count,
                Some(_) => return Ok(self.pending.replace(piece)),
            }
        }
        Ok(self.pending.take())
    }

    /// What begins at `self.at`, as far as one node says it.
    fn piece(&mut self) -> Result<Run> {
        let segment = self.at / u64::from(self.reader.shape.segment_blocks);
        while self.way.last().is_some_and(|step| step.end_block <= self.at) {
            self.way.pop();
        }
        loop {
            let (child, child_segment, level) = match self.way.last() {
                None => (self.reader.root, 0, self.reader.shape.height()),
                Some(Step { node, first_block, end_block, first_segment, level }) => {
                    match &**node {
                        Node::Segment(runs) => {
                            let (first, end) = (*first_block, *end_block);
                            return Ok(piece_of_segment(runs, self.at, first, end.min(self.end)));
                        }
                        Node::Index(children) => {
                            let span = Shape::span(level - 1);
                            let i = (segment - first_segment) / span;
                            (children[i as usize % FAN_OUT], first_segment + i * span, level - 1)
                        }
                    }
                }
            };
            let below = self.reader.shape.blocks_below(child_segment, level);
            let Some(child) = child else { return Ok(self.zeros(below.end)) };
            if child.level != level {
                return Err(misplaced(&child));
            }
            match self.reader.node(&child) {
                Ok(node) => self.way.push(Step {
                    first_block: below.start,
                    end_block: below.end,
                    first_segment: child_segment,
                    node,
                    level,
                }),
                Err(error) if self.tolerant => {
                    let zeros = self.zeros(below.end);
                    let (first_block, count) = (zeros.first_block, zeros.count);
                    self.lost.push(Lost { first_block, count, node: child, error });
                    return Ok(zeros);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn zeros(&self, end: u64) -> Run {
        let count = end.min(self.end) - self.at;
        Run { first_block: self.at, count, placement: Placement::Zero }
    }
}

/// What a segment's runs say from block `at` on, up to `end`.
fn piece_of_segment(runs: &[super::node::SegmentRun], at: u64, first_block: u64, end: u64) -> Run {
    let here = (at - first_block) as u32;
    let next = runs.partition_point(|run| run.end() <= here);
    let (until, placement) = match runs.get(next) {
        None => (end, Placement::Zero),
        Some(run) if run.start > here => (first_block + u64::from(run.start), Placement::Zero),
        Some(run) => (
            first_block + u64::from(run.end()),
            Placement::At(run.at).skip(u64::from(here - run.start)),
        ),
    };
    Run { first_block: at, count: until.min(end) - at, placement }
}
