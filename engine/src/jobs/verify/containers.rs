//! Containers, each once and in order, in step with the references to them.

use bytes::Bytes;

use super::{Event, Reference, Scope, Verifier};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint, Slot};
use crate::jobs::rebuild::{id_bytes, read_id};
use crate::jobs::restore::{fetch_group, is_damage};
use crate::pool::Pending;
use crate::sort::Sorted;
use crate::store::container::{ContainerKind, Directories, FrameRef, SecondCopy, SlotInfo};
use crate::store::damage::all_but;
use crate::store::recipe;

/// Decompressed bytes that are in flight: what restore has, too.
const BATCH_BYTES: usize = 2 << 20;
/// Entries handed on at a time.
const ENTRIES: usize = 1024;
/// Containers that are named whose second copy was made: a store of an older Fleece has none at all.
const NAMED_COPIES: u64 = 16;
/// All slots of a container that is damaged as a whole.
const ALL_SLOTS: u16 = u16::MAX;

/// A container that a journal records, or that an object's key names.
#[derive(Clone, Copy, Debug)]
pub(super) struct ContainerKey {
    pub(super) id: ContainerId,
    pub(super) recorded: bool,
}

impl ContainerKey {
    /// Id 8, source 1.
    pub(super) const LEN: usize = 9;

    pub(super) fn to_record(self) -> [u8; Self::LEN] {
        let mut record = [0; Self::LEN];
        record[..8].copy_from_slice(&id_bytes(self.id));
        record[8] = u8::from(self.recorded);
        record
    }

    fn from_record(record: &[u8; Self::LEN]) -> Self {
        let [id @ .., recorded] = *record;
        ContainerKey { id: read_id(&id), recorded: recorded == 1 }
    }
}

/// A sorted stream with its next record in view.
struct Ahead<const N: usize> {
    sorted: Sorted<N>,
    next: Option<[u8; N]>,
}

impl<const N: usize> Ahead<N> {
    fn new(mut sorted: Sorted<N>) -> Result<Self> {
        let next = sorted.next()?;
        Ok(Ahead { sorted, next })
    }

    fn take(&mut self) -> Result<Option<[u8; N]>> {
        let following = if self.next.is_some() { self.sorted.next()? } else { None };
        Ok(std::mem::replace(&mut self.next, following))
    }

    fn id(&self) -> Option<ContainerId> {
        let (id, _) = self.next.as_ref()?.split_first_chunk::<8>()?;
        Some(read_id(id))
    }
}

/// What a container's slots turned out to be.
#[derive(Default)]
struct Slots {
    kind: Option<ContainerKind>,
    generation: u32,
    /// Of each slot, what the directory says stands there; `None` for dead and worse.
    said: Vec<Option<Fingerprint>>,
    /// Of each slot, whether it may be referred to.
    sound: Vec<bool>,
}

impl Slots {
    fn has(&self, reference: &Reference) -> bool {
        let first = usize::from(reference.first.slot.0);
        let kind = if reference.node { ContainerKind::Nodes } else { ContainerKind::Blocks };
        let slots = self.sound.get(first..first + usize::from(reference.count));
        self.kind == Some(kind) && slots.is_some_and(|slots| slots.iter().all(|sound| *sound))
    }
}

/// The fingerprints of a frame's slots, computed afresh.
type Computed = Result<Vec<(Slot, Fingerprint)>>;

impl Verifier<'_> {
    pub(super) fn check_containers(&mut self) -> Result<()> {
        let scratch = &self.options.scratch;
        let empty = || crate::sort::Sorter::new(scratch, 0);
        let references = std::mem::replace(&mut self.references, empty());
        let mut references = Ahead::new(references.finish()?)?;
        let known = std::mem::replace(&mut self.containers, crate::sort::Sorter::new(scratch, 0));
        let mut known = Ahead::new(known.finish()?)?;
        while let Some(id) = [references.id(), known.id()].into_iter().flatten().min() {
            self.progress("containers", self.report.containers)?;
            let recorded = Self::is_recorded(&mut known, id)?;
            let referred = references.id() == Some(id);
            let slots = self.check_container(id, recorded || referred)?;
            if self.options.scope == Scope::All && !recorded {
                self.not_recorded(id, referred)?;
            }
            let mut said = false;
            while references.id() == Some(id)
                && let Some(record) = references.take()?
            {
                let reference = Reference::from_record(&record);
                if !slots.has(&reference) {
                    // One message for a container; all slots are marked.
                    self.bad_reference(&reference, &slots, !said)?;
                    said = true;
                }
            }
        }
        Ok(())
    }

    /// Takes all that is noted of a container.
    fn is_recorded(known: &mut Ahead<{ ContainerKey::LEN }>, id: ContainerId) -> Result<bool> {
        let mut recorded = false;
        while known.id() == Some(id)
            && let Some(record) = known.take()?
        {
            recorded |= ContainerKey::from_record(&record).recorded;
        }
        Ok(recorded)
    }

    fn not_recorded(&mut self, id: ContainerId, referred: bool) -> Result<()> {
        let object = format!("container {id}");
        self.unrecorded += 1;
        if referred {
            return self.problem("journal", &object, "recipes refer to it, no journal records it");
        }
        let message = "no journal records it and nothing refers to it: a crash left it";
        self.tell(&Event::Note { object, message: message.into() })
    }

    fn bad_reference(&mut self, reference: &Reference, slots: &Slots, say: bool) -> Result<()> {
        let Reference { first, count, node: _ } = *reference;
        if say {
            let what = reference.what();
            let message =
                format!("a snapshot needs {what} at {first} ({count} slots), which are not sound");
            self.problem("reference", &format!("container {}", first.container), &message)?;
        }
        for slot in first.slot.0..first.slot.0.saturating_add(count) {
            if slots.sound.get(usize::from(slot)) != Some(&true) {
                let how = "a snapshot refers to it, and it is not there";
                self.damaged(first.container, slot, 1, how)?;
            }
        }
        Ok(())
    }

    /// Reads a container whole. `must` says whether it has to be there.
    fn check_container(&mut self, id: ContainerId, must: bool) -> Result<Slots> {
        self.report.containers += 1;
        // What the engine has in its caches says nothing about the store.
        self.store.directories().forget(id);
        let name = format!("container {id}");
        match self.read_slots(id) {
            Ok(mut slots) => {
                let lead = self.store.directories().check_lead(id);
                if let Err(error) = &lead {
                    self.problem("container", &name, &error.to_string())?;
                    if is_damage(error) {
                        // No restore needs it: no slot is lost, but a rewrite mends it.
                        self.damaged(id, 0, 0, &error.to_string())?;
                    }
                }
                if must {
                    // One that nothing names yet may be under way: its second copy is, too.
                    self.check_copy(id)?;
                }
                self.check_frames(id, &mut slots)?;
                self.take_back(id, &slots, lead.is_ok())?;
                self.hand_on_sound(id, &slots)?;
                Ok(slots)
            }
            Err(error) => {
                let gone = error.kind() == Kind::NotFound;
                if must || !gone {
                    self.problem("container", &name, &error.to_string())?;
                }
                if must && is_damage(&error) {
                    self.damaged(id, 0, ALL_SLOTS, &error.to_string())?;
                }
                Ok(Slots::default())
            }
        }
    }

    /// The own object of a directory that was just read. Nothing that is read needs it while the container is sound.
    fn check_copy(&mut self, id: ContainerId) -> Result<()> {
        match self.store.directories().ensure_copy(id) {
            Ok(SecondCopy::Whole) => Ok(()),
            Ok(SecondCopy::Made) => {
                self.report.copies_made += 1;
                let message = "the second copy of its directory was missing, and is there now";
                self.note_copy(id, self.report.copies_made, message.into())
            }
            Ok(SecondCopy::Missing(error)) => {
                self.report.copies_missing += 1;
                let message =
                    format!("the second copy of its directory is missing, and stays so: {error}");
                self.note_copy(id, self.report.copies_missing, message)
            }
            Err(error) if is_damage(&error) => {
                let advice = "fleecectl tidy, on a keeper, makes it again";
                self.problem("directory", &format!("container {id}"), &format!("{error}; {advice}"))
            }
            Err(error) => Err(error),
        }
    }

    fn note_copy(&mut self, id: ContainerId, so_many: u64, message: String) -> Result<()> {
        if so_many > NAMED_COPIES {
            return Ok(());
        }
        self.tell(&Event::Note { object: format!("container {id}"), message })
    }

    /// The directory: frame table, and the whole fingerprint column.
    fn read_slots(&self, id: ContainerId) -> Result<Slots> {
        let directories = self.store.directories();
        let gone = || Error::new(Kind::NotFound, format!("the container {id} is not in the store"));
        let summary = directories.summary(id)?.ok_or_else(gone)?;
        let (kind, generation) = (Some(summary.kind), summary.generation);
        let mut slots = Slots { kind, generation, ..Slots::default() };
        let mut forwards = Vec::new();
        directories.each_slot(id, |slot, info| {
            let said = match info {
                SlotInfo::Present(fingerprint) => Some(fingerprint),
                SlotInfo::Forward(there) => {
                    forwards.push((slot, there));
                    None
                }
                _ => None,
            };
            slots.said.push(said);
            Ok(())
        })?;
        slots.sound = vec![false; slots.said.len()];
        for (slot, there) in forwards {
            // The other container's own turn tells whether what stands there is right.
            let present = matches!(directories.slot(there)?, SlotInfo::Present(_));
            slots.sound[usize::from(slot.0)] = present;
        }
        Ok(slots)
    }

    /// Decodes every frame and compares what is in it with the directory.
    fn check_frames(&mut self, id: ContainerId, slots: &mut Slots) -> Result<()> {
        let frames = self.store.directories().frames(id)?;
        let mut at = 0;
        while at < frames.len() {
            let mut bytes = 0;
            let fits = |frame: &&FrameRef| {
                bytes += frame.raw_len as usize;
                bytes <= BATCH_BYTES
            };
            let count = frames[at..].iter().take_while(fits).count().max(1);
            let batch = &frames[at..at + count];
            let stored = fetch_group(self.store.directories(), batch);
            let jobs: Vec<(FrameRef, Pending<Computed>)> = batch
                .iter()
                .zip(stored)
                .map(|(frame, stored)| (*frame, self.compute(*frame, stored, slots.kind)))
                .collect();
            for (frame, job) in jobs {
                let computed = job.wait()?;
                self.check_frame(&frame, computed, slots)?;
            }
            at += count;
        }
        self.check_homeless(id, slots)
    }

    /// Decodes a frame and fingerprints its slots, on the pool.
    fn compute(
        &self,
        frame: FrameRef,
        stored: Result<Bytes>,
        kind: Option<ContainerKind>,
    ) -> Pending<Computed> {
        let directories = self.store.directories().clone();
        let fingerprinter = self.store.fingerprinter().clone();
        let block_size = self.store.block_size();
        self.store.pool().run(move || {
            let raw = directories.decode_frame(&frame, &stored?)?;
            match kind {
                Some(ContainerKind::Nodes) => Directories::nodes_of(&frame, &raw)
                    .map(|nodes| {
                        nodes
                            .iter()
                            .map(|(slot, node)| (*slot, recipe::fingerprint(node)))
                            .collect()
                    })
                    .ok_or_else(|| Error::new(Kind::Damaged, "its list of lengths is wrong")),
                _ => {
                    let blocks = frame.blocks(&raw, block_size);
                    Ok(blocks.map(|(slot, block)| (slot, fingerprinter.of(block))).collect())
                }
            }
        })
    }

    fn check_frame(
        &mut self,
        frame: &FrameRef,
        computed: Computed,
        slots: &mut Slots,
    ) -> Result<()> {
        self.report.frames += 1;
        let name = format!("container {}", frame.container);
        let computed = match computed {
            Ok(computed) => computed,
            Err(error) => {
                self.problem("frame", &name, &error.to_string())?;
                if is_damage(&error) {
                    let (first, span) = (frame.first.0, frame.span);
                    self.damaged(frame.container, first, span, &error.to_string())?;
                }
                return Ok(());
            }
        };
        for (slot, fingerprint) in computed {
            let at = usize::from(slot.0);
            self.report.blocks += u64::from(slots.kind == Some(ContainerKind::Blocks));
            if slots.said.get(at) == Some(&Some(fingerprint)) {
                // Whatever is marked: it is read, and it is right.
                slots.sound[at] = true;
                continue;
            }
            let message = format!("slot {} does not hold what its directory says", slot.0);
            self.problem("fingerprint", &name, &message)?;
            self.damaged(frame.container, slot.0, 1, &message)?;
        }
        Ok(())
    }

    /// Takes marks back of what was only missing for a time, or was rewritten since.
    fn take_back(&mut self, id: ContainerId, slots: &Slots, lead: bool) -> Result<()> {
        if !self.damage.names(id) {
            return Ok(());
        }
        let all = 0..slots.said.len();
        let slot = |at: usize| Slot(at as u16);
        let marked = |at: &usize| self.damage.has(Address { container: id, slot: slot(*at) });
        let healed = all.clone().any(|at| slots.sound[at] && marked(&at));
        let lost = all.clone().any(|at| !slots.sound[at] && marked(&at));
        if !healed && (lost || !lead) {
            return Ok(());
        }
        // What the frames did not hold was marked just now.
        self.write_marks()?;
        let whole = all_but(all.filter(|at| !slots.sound[*at]).map(slot));
        let (generation, now) = (slots.generation, self.options.now_ms);
        let how = "verify: it is whole";
        self.damage.take_back(self.store, id, generation, whole, now, how)?;
        if !lead {
            self.damaged(id, 0, 0, "its lead is damaged")?;
        }
        let message = "what was marked as damaged is whole";
        self.tell(&Event::Note { object: format!("container {id}"), message: message.into() })
    }

    /// Slots that are said to be there and that no frame holds.
    fn check_homeless(&mut self, id: ContainerId, slots: &Slots) -> Result<()> {
        let unsound = |at: &usize| slots.said[*at].is_some() && !slots.sound[*at];
        for at in (0..slots.said.len()).filter(unsound) {
            let address = Address { container: id, slot: Slot(at as u16) };
            if !self.damage.has(address) {
                let message = format!("slot {at} is said to be there, and no frame holds it");
                self.problem("container", &format!("container {id}"), &message)?;
                self.damaged(id, at as u16, 1, &message)?;
            }
        }
        Ok(())
    }

    /// Hands on the sound blocks for the comparison with the index.
    fn hand_on_sound(&mut self, id: ContainerId, slots: &Slots) -> Result<()> {
        if slots.kind != Some(ContainerKind::Blocks) {
            return Ok(());
        }
        let mut batch = Vec::with_capacity(ENTRIES);
        for (at, said) in slots.said.iter().enumerate() {
            if let Some(fingerprint) = said
                && slots.sound[at]
            {
                batch.push((*fingerprint, Address { container: id, slot: Slot(at as u16) }));
                if batch.len() == ENTRIES {
                    self.hand_on(&mut batch)?;
                }
            }
        }
        self.hand_on(&mut batch)
    }
}
