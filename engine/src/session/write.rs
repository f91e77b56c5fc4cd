//! The writing of a window: grants out, blocks in, from the plugin or from an image that it lent,
//! and what became durable of them to whom it concerns.

use std::fs::File;

use super::event::{GrantExtent, Grants};
use super::lent::LentImage;
use super::registry::Progress;
use super::spool::Position;
use super::stages::{Session, position};
use super::window::Question;
use super::{GRANTS_PER_CALL, MAX_LENT};
use crate::error::{Error, Kind, Result};
use crate::ids::Address;
use crate::store::container::{ContainerKind, SealedContainer};

/// Bytes that are read at once from an image that was lent: so much is in the processor's cache
/// while it is fingerprinted and packed.
const LENT_READ: u64 = 64 << 10;
/// Images that a session takes: each is a descriptor of this process. VMs hardly have more disks.
pub(super) const MAX_IMAGES: usize = 8;

impl Session {
    /// Takes in blocks that were granted, in the order of the grants.
    pub(super) fn write(&mut self, runs: &[GrantExtent], data: &[u8]) -> Result<()> {
        let bytes = self.bytes_of(runs)?;
        if data.len() as u64 != bytes {
            let blocks = bytes / u64::from(self.context.store.block_size());
            let what = format!("{} bytes written, which are not {blocks} whole blocks", data.len());
            return Err(Error::new(Kind::Usage, what));
        }
        let mut rest = data;
        for run in runs {
            let length = run.blocks as usize * self.context.store.block_size() as usize;
            let (these, further) = rest.split_at(length);
            rest = further;
            self.take_in(run.at, these)?;
        }
        self.learn_sealed(false)
    }

    /// Takes over the file that a disk's bytes are in, unless it has enough of them.
    pub(super) fn lend(&mut self, disk: u16, file: File) -> Result<bool> {
        let has = self.disks.iter().filter(|state| state.lent.is_some()).count();
        let Some(state) = self.disks.get_mut(usize::from(disk)) else {
            let what = format!("a file was lent for disk number {disk}, which there is not");
            return Err(Error::new(Kind::Usage, what));
        };
        if has >= MAX_IMAGES {
            return Ok(false);
        }
        state.lent = Some(LentImage::new(file)?);
        Ok(true)
    }

    /// Closes what was lent: whoever hears of the session's end may want to take it away.
    pub(super) fn give_back(&mut self) {
        self.disks.iter_mut().for_each(|state| state.lent = None);
    }

    /// Takes in blocks that were granted, in the order of the grants, from images that were lent.
    pub(super) fn write_lent(&mut self, runs: &[GrantExtent]) -> Result<()> {
        let bytes = self.bytes_of(runs)?;
        if bytes > MAX_LENT {
            let what = format!("{bytes} bytes to be read at once; at most {MAX_LENT}");
            return Err(Error::new(Kind::Usage, what));
        }
        let block_size = u64::from(self.context.store.block_size());
        let at_once = (LENT_READ / block_size).max(1) as u32;
        let pieces = || runs.iter().flat_map(|run| pieces_of(*run, at_once));
        for piece in pieces() {
            let offset = piece.at.block.saturating_mul(block_size);
            self.lent(piece.at)?.announce(offset, u64::from(piece.blocks) * block_size);
        }
        let mut buffer = vec![0; at_once as usize * block_size as usize];
        for piece in pieces() {
            let bytes = &mut buffer[..piece.blocks as usize * block_size as usize];
            let offset = piece.at.block.saturating_mul(block_size);
            self.lent(piece.at)?.read(offset, bytes).map_err(|error| {
                let disk = &self.disks[usize::from(piece.at.disk)].spec.name;
                let what = format!("cannot read {} bytes again at {offset} of {disk}", bytes.len());
                Error::caused(Kind::Failed, what, error)
            })?;
            self.take_in(piece.at, bytes)?;
        }
        self.learn_sealed(false)
    }

    fn lent(&self, at: Position) -> Result<&LentImage> {
        let state = self.disks.get(usize::from(at.disk));
        state.and_then(|state| state.lent.as_ref()).ok_or_else(|| {
            let what = format!("nothing was lent to read disk number {} from", at.disk);
            Error::new(Kind::Usage, what)
        })
    }

    /// Bytes of the runs of a write, each of which must have some.
    fn bytes_of(&self, runs: &[GrantExtent]) -> Result<u64> {
        if runs.is_empty() || runs.iter().any(|run| run.blocks == 0) {
            return Err(Error::new(Kind::Usage, "a write of no blocks"));
        }
        let blocks: u64 = runs.iter().map(|run| u64::from(run.blocks)).sum();
        Ok(blocks.saturating_mul(u64::from(self.context.store.block_size())))
    }

    /// Takes in blocks of a disk, from `first` on.
    fn take_in(&mut self, first: Position, data: &[u8]) -> Result<()> {
        let blocks = data.chunks_exact(self.context.store.block_size() as usize);
        for (number, block) in (first.block..).zip(blocks) {
            let here = Position { block: number, ..first };
            let Some(window) = self.windows.front_mut() else { return Err(not_granted(here)) };
            let granted =
                window.written(here).map_err(|e| e.unwrap_or_else(|| not_granted(here)))?;
            if let Some(question) = granted {
                self.pack(&question, block)?;
            }
        }
        Ok(())
    }

    /// Fingerprints a block afresh before it enters: a wrong one must never be found
    /// under a right name.
    fn pack(&mut self, question: &Question, block: &[u8]) -> Result<()> {
        if self.context.store.fingerprinter().of(block) != question.fingerprint {
            return Err(Error::new(
                Kind::Failed,
                format!(
                    "block {} of disk {} is not what the scan saw: the view or the image changed \
                     under the backup, or the plugin's memory is bad",
                    question.at.block,
                    self.disks[usize::from(question.at.disk)].spec.name
                ),
            ));
        }
        let address = self.blocks.push(question.fingerprint, block)?;
        Progress::add(&self.progress.new, block.len() as u64);
        match self.windows.front_mut() {
            Some(window) => window.place(question.sequence, address),
            None => Ok(()),
        }
    }

    pub(super) fn seal_blocks(&mut self) -> Result<()> {
        self.blocks.seal()?;
        self.learn_sealed(false)
    }

    pub(super) fn seal_nodes(&mut self) -> Result<()> {
        self.nodes.seal()?;
        self.learn_sealed(true)
    }

    /// Tells the owner of the containers that became durable. Those of nodes hold no
    /// blocks, but the journal that the index follows has no gaps.
    fn learn_sealed(&mut self, nodes: bool) -> Result<()> {
        let sealed = if nodes { self.nodes.take_sealed() } else { self.blocks.take_sealed() }?;
        sealed.iter().try_for_each(|container| self.learn(container))
    }

    pub(super) fn learn(&self, container: &SealedContainer) -> Result<()> {
        Progress::add(&self.progress.stored, container.stored_bytes);
        let mut entries = Vec::new();
        if container.kind == ContainerKind::Blocks {
            let at = |slot| Address { container: container.id, slot };
            entries.extend(container.entries().map(|(fingerprint, slot)| (fingerprint, at(slot))));
        }
        self.context.owners.learn(entries, position(container.position))
    }

    /// Answers a waiting call for grants if there is an answer.
    pub(super) fn answer_grants(&mut self) -> Result<()> {
        if self.calls.grants.is_none() {
            return Ok(());
        }
        let mut grants = Grants::default();
        if let Some(window) = self.windows.front_mut() {
            while grants.extents.len() < GRANTS_PER_CALL {
                let Some(question) = window.next_grant()? else { break };
                let at = question.at;
                match grants.extents.last_mut() {
                    Some(last)
                        if last.at.disk == at.disk
                            && last.at.block + u64::from(last.blocks) == at.block =>
                    {
                        last.blocks += 1;
                    }
                    _ => grants.extents.push(GrantExtent { at, blocks: 1 }),
                }
            }
        } else {
            grants.done = self.scan_ended;
        }
        if (grants.done || !grants.extents.is_empty())
            && let Some(reply) = self.calls.grants.take()
        {
            let _ = reply.send(Ok(grants));
        }
        Ok(())
    }
}

/// A run in pieces of at most so many blocks.
fn pieces_of(run: GrantExtent, most: u32) -> impl Iterator<Item = GrantExtent> {
    (0..run.blocks).step_by(most as usize).map(move |skip| GrantExtent {
        at: Position { block: run.at.block.saturating_add(u64::from(skip)), ..run.at },
        blocks: most.min(run.blocks - skip),
    })
}

fn not_granted(at: Position) -> Error {
    Error::new(
        Kind::Usage,
        format!(
            "block {} of disk number {} was written, but is not granted now",
            at.block, at.disk
        ),
    )
}
