//! The scan's batches: checked, compared with the parent, spooled, asked about.

use super::event::Extent;
use super::registry::Progress;
use super::spool::{BLOCKS_PER_RECORD, Found, Position};
use super::stages::Session;
use super::{BLOCKS_PER_SUBMIT, BLOCKS_PER_WINDOW};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, Fingerprint, Sequence};
use crate::store::container::SlotInfo;
use crate::store::recipe::{Placement, RecipeReader};

fn gone(address: Address) -> Error {
    Error::new(Kind::NotFound, format!("a snapshot needs the block at {address}, which is gone"))
}

impl Session {
    /// Takes in a batch of the scan.
    pub(super) fn submit(
        &mut self,
        disk: u16,
        extents: &[Extent],
        fingerprints: &[Fingerprint],
    ) -> Result<()> {
        self.check_batch(disk, extents, fingerprints.len())?;
        self.open_window()?;
        let mut requests = Vec::with_capacity(fingerprints.len());
        let mut rest = fingerprints;
        for extent in extents {
            let at = Position { disk, block: extent.first_block };
            let bytes = u64::from(extent.blocks) * u64::from(self.context.store.block_size());
            Progress::add(&self.progress.read, bytes);
            if extent.zero {
                Progress::add(&self.progress.zero, bytes);
                self.scanning()?.found(at, &Found::Zero(u64::from(extent.blocks)))?;
            } else {
                let (these, further) = rest.split_at(extent.blocks as usize);
                rest = further;
                self.compare(at, these, &mut requests)?;
            }
            self.disks[usize::from(disk)].covered = extent.first_block + u64::from(extent.blocks);
        }
        self.last_disk = disk;
        if requests.is_empty() {
            return Ok(());
        }
        Progress::add(&self.progress.requested, requests.len() as u64);
        self.context.owners.ask(self.id, requests)
    }

    /// Everything that can be wrong with a batch, before anything is done with it.
    fn check_batch(&self, disk: u16, extents: &[Extent], fingerprints: usize) -> Result<()> {
        let wrong =
            |what: String| Err(Error::new(Kind::Usage, format!("batch of the scan: {what}")));
        if self.scan_ended {
            return wrong("comes after the scan's end".into());
        }
        let Some(state) = self.disks.get(usize::from(disk)) else {
            return wrong(format!("there is no disk number {disk}"));
        };
        if disk < self.last_disk {
            return wrong(format!("disk {disk} comes after disk {}", self.last_disk));
        }
        let mut next = state.covered;
        let mut blocks = 0_u64;
        for extent in extents {
            let end = extent.first_block.saturating_add(u64::from(extent.blocks));
            if extent.blocks == 0 {
                return wrong(format!(
                    "no blocks at {} of {}",
                    extent.first_block, state.spec.name
                ));
            }
            if extent.first_block < next || end > state.shape.blocks() {
                return wrong(format!(
                    "blocks {} to {end} of disk {} are out of order or beyond its end",
                    extent.first_block, state.spec.name
                ));
            }
            if !state.incremental && extent.first_block != next {
                return wrong(format!(
                    "disk {} is read in full, but blocks {next} to {} are missing",
                    state.spec.name, extent.first_block
                ));
            }
            next = end;
            blocks += if extent.zero { 0 } else { u64::from(extent.blocks) };
        }
        if blocks != fingerprints as u64 || fingerprints > BLOCKS_PER_SUBMIT {
            return wrong(format!("{fingerprints} fingerprints for {blocks} blocks"));
        }
        let open = self.windows.back().filter(|w| !w.scanned).map_or(0, |w| w.end - w.first);
        if open + blocks > BLOCKS_PER_WINDOW {
            return wrong(format!("a window has at most {BLOCKS_PER_WINDOW} blocks"));
        }
        Ok(())
    }

    /// Settles on the spot what the parent has at the same place; the rest becomes requests.
    fn compare(
        &mut self,
        at: Position,
        fingerprints: &[Fingerprint],
        requests: &mut Vec<(Fingerprint, Sequence)>,
    ) -> Result<()> {
        let state = &self.disks[usize::from(at.disk)];
        let Some(parent) = state.parent_root else {
            return self.ask(at, fingerprints, requests);
        };
        let nodes = self.context.store.directories();
        let met = &mut self.met;
        let reader = RecipeReader::new(nodes, Some(parent), state.parent_shape)?;
        let end = (at.block + fingerprints.len() as u64).min(state.parent_shape.blocks());
        let mut same: Vec<Option<Address>> = vec![None; fingerprints.len()];
        // A parent that cannot be read settles nothing: its blocks are asked about.
        let mut runs = reader.runs(at.block..end.max(at.block)).tolerant();
        while let Some(run) = runs.next()? {
            let Placement::At(first) = run.placement else { continue };
            for i in 0..run.count {
                let index = (run.first_block - at.block + i) as usize;
                let Some(address) = first.plus(i as u16) else { break };
                match nodes.slot(address) {
                    Ok(SlotInfo::Present(f)) if f == fingerprints[index] => {
                        same[index] = Some(address);
                    }
                    // The recipe is right: what it names and is not there was lost.
                    Ok(SlotInfo::Missing) => met.note(nodes, address, &gone(address)),
                    Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => {
                        met.note(nodes, address, &error);
                    }
                    _ => {}
                }
            }
        }
        runs.take_lost().iter().for_each(|lost| met.note_node(lost));
        self.spool_compared(at, fingerprints, &same, requests)
    }

    /// Spools blocks by runs: settled ones at consecutive slots, others as requests.
    fn spool_compared(
        &mut self,
        at: Position,
        fingerprints: &[Fingerprint],
        same: &[Option<Address>],
        requests: &mut Vec<(Fingerprint, Sequence)>,
    ) -> Result<()> {
        let block_size = u64::from(self.context.store.block_size());
        let mut start = 0;
        while start < same.len() {
            let here = Position { block: at.block + start as u64, ..at };
            let first = same[start];
            let continues = |i: usize| match (first, same[i]) {
                (None, None) => true,
                (Some(first), Some(next)) => first.plus((i - start) as u16) == Some(next),
                _ => false,
            };
            let end = (start + 1..same.len()).find(|&i| !continues(i)).unwrap_or(same.len());
            match first {
                None => self.ask(here, &fingerprints[start..end], requests)?,
                Some(address) => {
                    let blocks = (end - start) as u16;
                    Progress::add(&self.progress.unchanged, u64::from(blocks) * block_size);
                    self.scanning()?.found(here, &Found::Unchanged(blocks, address))?;
                }
            }
            start = end;
        }
        Ok(())
    }

    fn ask(
        &mut self,
        at: Position,
        fingerprints: &[Fingerprint],
        requests: &mut Vec<(Fingerprint, Sequence)>,
    ) -> Result<()> {
        for (n, part) in fingerprints.chunks(BLOCKS_PER_RECORD).enumerate() {
            let here = Position { block: at.block + (n * BLOCKS_PER_RECORD) as u64, ..at };
            let first = self.next_sequence;
            requests.extend(part.iter().zip(first..).map(|(f, n)| (*f, Sequence(n))));
            self.next_sequence += part.len() as u64;
            self.scanning()?.found(here, &Found::Asked(part.to_vec()))?;
        }
        Ok(())
    }
}
