//! One container: what of it is sound, and its next generation.

use super::copies::Copies;
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint, Slot};
use crate::store::Store;
use crate::store::container::{ContainerKind, Directories, FrameRef, Rewriter, Salvage, SlotState};
use crate::store::journal::Position;
use crate::store::recipe;

/// What a damaged slot of which not even the fingerprint is known is written as.
const UNKNOWN: Fingerprint = Fingerprint([0; Fingerprint::LEN]);

/// What there is of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Have {
    /// Its bytes, which are what the directory says.
    Sound(Fingerprint),
    /// Nothing that can be used; its fingerprint, if that is known.
    Lost(Option<Fingerprint>),
    /// It was given up, or stands elsewhere.
    Nothing(SlotState),
}

/// A container whose frames were all read.
pub(super) struct Examined {
    pub(super) container: ContainerId,
    salvage: Salvage,
    have: Vec<Have>,
}

/// What a rewrite came to.
pub(super) struct Rewritten {
    pub(super) generation: u32,
    pub(super) position: Position,
    /// Slots that hold a good copy now.
    pub(super) put_back: Vec<(Slot, Fingerprint)>,
    pub(super) still_bad: Vec<Slot>,
}

/// Reads a container as far as it can be read; `None` when it cannot be opened.
pub(super) fn examine(store: &Store, container: ContainerId) -> Result<Option<Examined>> {
    let directories = store.directories();
    let Some(salvage) = directories.salvage(container)? else { return Ok(None) };
    let first = |state: &Option<SlotState>| match state {
        None => Have::Lost(None),
        Some(SlotState::Present(f) | SlotState::Damaged(f)) => {
            Have::Lost(Some(*f).filter(|f| *f != UNKNOWN))
        }
        Some(state) => Have::Nothing(*state),
    };
    let mut have: Vec<Have> = salvage.column.iter().map(first).collect();
    for frame in salvage.frames() {
        let Some((_, raw)) = directories.salvage_frame(&salvage, &frame)? else { continue };
        for (slot, bytes) in contents(store, salvage.kind(), &frame, &raw) {
            let fingerprint = fingerprint(store, salvage.kind(), bytes);
            match have.get_mut(usize::from(slot.0)) {
                // Authentic bytes are what was written, whatever became of the column.
                Some(have @ Have::Lost(None)) => *have = Have::Sound(fingerprint),
                Some(have) if *have == Have::Lost(Some(fingerprint)) => {
                    *have = Have::Sound(fingerprint);
                }
                _ => {}
            }
        }
    }
    Ok(Some(Examined { container, salvage, have }))
}

/// What is in the slots of a decoded frame.
fn contents<'a>(
    store: &Store,
    kind: ContainerKind,
    frame: &FrameRef,
    raw: &'a [u8],
) -> Vec<(Slot, &'a [u8])> {
    match kind {
        ContainerKind::Nodes => Directories::nodes_of(frame, raw).unwrap_or_default(),
        ContainerKind::Blocks => frame.blocks(raw, store.block_size()).collect(),
    }
}

pub(super) fn fingerprint(store: &Store, kind: ContainerKind, bytes: &[u8]) -> Fingerprint {
    match kind {
        ContainerKind::Blocks => store.fingerprinter().of(bytes),
        ContainerKind::Nodes => recipe::fingerprint(bytes),
    }
}

impl Examined {
    pub(super) fn kind(&self) -> ContainerKind {
        self.salvage.kind()
    }

    pub(super) fn generation(&self) -> u32 {
        self.salvage.generation()
    }

    /// Above all that there are, readable or not: no key is written twice.
    pub(super) fn next_generation(&self) -> u32 {
        self.salvage.newest.saturating_add(1)
    }

    /// The slots that are lost, with their fingerprints where these are known.
    pub(super) fn bad(&self) -> impl Iterator<Item = (Slot, Option<Fingerprint>)> + '_ {
        self.have.iter().enumerate().filter_map(|(slot, have)| match have {
            Have::Lost(fingerprint) => Some((Slot(slot as u16), *fingerprint)),
            _ => None,
        })
    }

    pub(super) fn bad_slots(&self) -> Vec<Slot> {
        self.bad().map(|(slot, _)| slot).collect()
    }

    /// The slots whose fingerprint can be looked for.
    pub(super) fn wanted(&self) -> impl Iterator<Item = (Slot, Fingerprint)> + '_ {
        self.bad().filter_map(|(slot, fingerprint)| Some((slot, fingerprint?)))
    }

    /// Nothing of it is damaged.
    pub(super) fn is_whole(&self) -> bool {
        !self.salvage.flawed && self.bad().next().is_none()
    }

    /// Rewriting it makes something readable that is not, without any copy.
    pub(super) fn is_worth_it(&self) -> bool {
        self.salvage.flawed && self.have.iter().any(|have| matches!(have, Have::Sound(_)))
    }

    fn state(&self, slot: Slot) -> SlotState {
        match self.have.get(usize::from(slot.0)) {
            Some(Have::Sound(fingerprint)) => SlotState::Present(*fingerprint),
            Some(Have::Nothing(state)) => *state,
            Some(Have::Lost(fingerprint)) => SlotState::Damaged(fingerprint.unwrap_or(UNKNOWN)),
            None => SlotState::Dead,
        }
    }

    fn slots_of(frame: &FrameRef) -> impl Iterator<Item = Slot> + use<> {
        let first = frame.first.0;
        (0..frame.span).filter_map(move |n| first.checked_add(n).map(Slot))
    }

    /// A frame of which nothing is lost is copied as it is.
    fn is_sound(&self, frame: &FrameRef) -> bool {
        let lost = |slot: Slot| !matches!(self.have.get(usize::from(slot.0)), Some(Have::Lost(_)));
        Self::slots_of(frame).all(lost)
    }

    /// Writes the next generation: what is sound, and a good copy of what is lost.
    pub(super) fn rewrite(&self, store: &Store, copies: &mut Copies) -> Result<Rewritten> {
        let frames: Vec<FrameRef> = self.salvage.frames().collect();
        let sound = frames.iter().filter(|frame| self.is_sound(frame));
        let copied =
            sound.fold((0, 0), |(n, bytes), frame| (n + 1, bytes + u64::from(frame.stored_len)));
        let generation = self.next_generation();
        let mut next = Next {
            examined: self,
            store,
            rewriter: Rewriter::begin(store, self.kind(), self.container, generation, copied)?,
            put_back: Vec::new(),
            still_bad: Vec::new(),
        };
        let mut slot = Slot(0);
        for frame in &frames {
            next.fill(slot..frame.first, &[], copies)?;
            next.frame(frame, copies)?;
            slot = Slot(frame.first.0 + frame.span);
        }
        next.fill(slot..Slot(self.have.len() as u16), &[], copies)?;
        let Next { rewriter, put_back, still_bad, .. } = next;
        let (_, position) = rewriter.finish()?;
        store.directories().forget(self.container);
        Ok(Rewritten { generation, position, put_back, still_bad })
    }
}

/// The generation that is being written.
struct Next<'n> {
    examined: &'n Examined,
    store: &'n Store,
    rewriter: Rewriter,
    put_back: Vec<(Slot, Fingerprint)>,
    still_bad: Vec<Slot>,
}

impl Next<'_> {
    fn frame(&mut self, frame: &FrameRef, copies: &mut Copies) -> Result<()> {
        let examined = self.examined;
        let slots = frame.first..Slot(frame.first.0 + frame.span);
        let Some((compressed, raw)) =
            self.store.directories().salvage_frame(&examined.salvage, frame)?
        else {
            return self.fill(slots, &[], copies);
        };
        if examined.is_sound(frame) {
            let states = Examined::slots_of(frame).map(|slot| examined.state(slot));
            return self.rewriter.copy(frame, compressed, states);
        }
        self.fill(slots, &contents(self.store, examined.kind(), frame, &raw), copies)
    }

    /// Slots one by one, from `own` or from good copies.
    fn fill(
        &mut self,
        slots: std::ops::Range<Slot>,
        own: &[(Slot, &[u8])],
        copies: &mut Copies,
    ) -> Result<()> {
        for slot in (slots.start.0..slots.end.0).map(Slot) {
            match self.examined.have[usize::from(slot.0)] {
                Have::Sound(fingerprint) => {
                    let bytes = own.iter().find(|(here, _)| *here == slot).map(|(_, bytes)| *bytes);
                    let kept = match bytes {
                        Some(bytes) => self.rewriter.push(fingerprint, bytes)?,
                        None => false,
                    };
                    if !kept {
                        return Err(self.gone(slot));
                    }
                }
                Have::Nothing(state) => self.rewriter.skip(state)?,
                Have::Lost(fingerprint) => self.put_back(slot, fingerprint, copies)?,
            }
        }
        Ok(())
    }

    /// What was sound a moment ago must not be lost by rewriting.
    fn gone(&self, slot: Slot) -> Error {
        let what = format!("container {} cannot be rewritten", self.examined.container);
        Error::new(Kind::Failed, format!("{what}: slot {} does not fit or is gone", slot.0))
    }

    /// A good copy, confirmed, or where it stands if there is no room for it.
    fn put_back(
        &mut self,
        slot: Slot,
        fingerprint: Option<Fingerprint>,
        copies: &mut Copies,
    ) -> Result<()> {
        let kind = self.examined.kind();
        if let Some(fingerprint) = fingerprint
            && let Some(there) = copies.get(kind, fingerprint)
            && let Some(bytes) = copies.read(self.store, kind, fingerprint)?
        {
            if !self.rewriter.push(fingerprint, &bytes)? {
                self.rewriter.skip(SlotState::Forward(there))?;
            }
            self.put_back.push((slot, fingerprint));
            return Ok(());
        }
        self.still_bad.push(slot);
        self.rewriter.skip(self.examined.state(slot))
    }
}

impl Rewritten {
    /// The blocks that were put back, for the index.
    pub(super) fn indexed(&self, examined: &Examined) -> Vec<(Fingerprint, Address)> {
        let container = examined.container;
        match examined.kind() {
            ContainerKind::Nodes => Vec::new(),
            ContainerKind::Blocks => self
                .put_back
                .iter()
                .map(|(slot, fingerprint)| (*fingerprint, Address { container, slot: *slot }))
                .collect(),
        }
    }
}
