//! Who owns what, and how that changes.
//!
//! A host adopts a newer map at once, and asks by it. For what it gains it builds its index anew from
//! the store, a little later, when all hosts have that map; until then questions about it are held.
//! What it has lost it sends back, with the epoch by which that is so, and what it granted of that it
//! hands over ([`super::grants`]). So at any time one host at most answers for a fingerprint.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use super::frame::Message;
use super::held::Held;
use super::map::{MapEpoch, PartitionMap};
use super::peer::Peer;
use super::{Cluster, Instance, SILENCE};
use crate::detect::JournalPosition;
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, Fingerprint, Sequence, SessionId, Slice, Slices};

/// The map, and what of it we cannot answer for yet.
pub(super) struct Placement {
    pub(super) map: Arc<PartitionMap>,
    /// Ours, and not in the index yet.
    pub(super) filling: Slices,
    /// The epoch whose part of ours the index has, and nothing else.
    pub(super) index: MapEpoch,
    /// The first epoch of the part that is ours now.
    pub(super) since: MapEpoch,
}

/// Questions, or claims, that wait for a newer map.
pub(super) struct Late {
    held: Held,
    since: Option<Instant>,
}

impl Late {
    pub(super) fn new(dir: &Path) -> Self {
        Late { held: Held::new(dir), since: None }
    }

    pub(super) fn push(
        &mut self,
        session: SessionId,
        asked: &[(Fingerprint, Sequence)],
        now: Instant,
    ) -> Result<()> {
        self.since.get_or_insert(now);
        self.held.push(session, asked)
    }

    pub(super) fn take(&mut self) -> Held {
        self.since = None;
        self.held.take()
    }

    /// All of them, if they wait for too long.
    pub(super) fn take_old(&mut self, now: Instant) -> Option<Held> {
        let old = self.since.is_some_and(|at| now.saturating_duration_since(at) > SILENCE);
        old.then(|| self.take())
    }
}

/// That our part has changed.
pub(super) struct Moves {
    waiting: Mutex<Waiting>,
    rung: Condvar,
}

#[derive(Default)]
struct Waiting {
    changed: bool,
    ending: bool,
}

impl Moves {
    pub(super) fn new(changed: bool) -> Self {
        let waiting = Mutex::new(Waiting { changed, ending: false });
        Moves { waiting, rung: Condvar::new() }
    }

    fn ring(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        self.rung.notify_all();
    }

    /// Waits for a change, and then until there was none for `settle`; `patience` at most for the
    /// first. `None` at the end, else whether there was one.
    fn wait(&self, settle: Duration, patience: Duration) -> Option<bool> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |waiting: &mut Waiting| !waiting.changed && !waiting.ending;
        let first = self.rung.wait_timeout_while(waiting, patience, idle);
        let mut waiting = first.unwrap_or_else(PoisonError::into_inner).0;
        let changed = waiting.changed;
        while std::mem::take(&mut waiting.changed) && !waiting.ending {
            let calm = self.rung.wait_timeout_while(waiting, settle, idle);
            waiting = calm.unwrap_or_else(PoisonError::into_inner).0;
        }
        (!waiting.ending).then_some(changed)
    }

    fn is_ending(&self) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).ending
    }
}

/// What there is to do for the part of a host.
#[derive(Clone, Debug)]
pub enum Move {
    /// It changed: the index is to be filled by this map.
    Fill(Arc<PartitionMap>),
    /// It did not change for a while.
    None,
}

impl Cluster {
    fn placement(&self) -> RwLockReadGuard<'_, Placement> {
        self.placement.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn placement_mut(&self) -> RwLockWriteGuard<'_, Placement> {
        self.placement.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn early(&self) -> MutexGuard<'_, Held> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn late(&self) -> MutexGuard<'_, Late> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn claims(&self) -> MutexGuard<'_, Late> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The partition map.
    #[must_use]
    pub fn map(&self) -> Arc<PartitionMap> {
        Arc::clone(&self.placement().map)
    }

    /// Whether we answer for a fingerprint.
    #[must_use]
    pub fn owns(&self, fingerprint: &Fingerprint) -> bool {
        self.placement().map.owner(fingerprint) == self.us
    }

    /// Slices that are ours, and not in our index yet.
    #[must_use]
    pub fn filling(&self) -> usize {
        self.placement().filling.len()
    }

    /// The epoch by which the index has all that is ours, and nothing else.
    #[must_use]
    pub fn index_epoch(&self) -> MapEpoch {
        self.placement().index
    }

    /// Goes by another map from here on, if it is a newer one.
    ///
    /// # Errors
    /// [`Kind::Failed`] for a map in which our number is another host's; when the engine is ending, or
    /// what must wait cannot be kept.
    pub fn adopt(&self, map: PartitionMap) -> Result<()> {
        let map = Arc::new(map);
        if map.epoch() <= self.map().epoch() {
            return Ok(());
        }
        let name = |map: &PartitionMap| map.member(self.us).map(|member| member.name.clone());
        if let (Some(ours), Some(other)) = (name(&self.map()), name(&map))
            && ours != other
        {
            let what = format!("the partition map gives the number of {ours} to {other}");
            return Err(Error::new(Kind::Failed, format!("{what}: restart this engine")));
        }
        // Whoever asks by the new map has somebody to ask.
        self.meet_new(&map);
        let changed = {
            let mut placement = self.placement_mut();
            if map.epoch() <= placement.map.epoch() {
                return Ok(());
            }
            let ours = map.slices(self.us);
            // By a map that we never had others may have answered for what is ours, and learned of it.
            let missed = map.epoch().0 != placement.map.epoch().0 + 1;
            let before = if missed { Slices::default() } else { placement.map.slices(self.us) };
            let mut filling = placement.filling.clone();
            filling.extend(&ours.without(&before));
            placement.filling = filling.without(&filling.without(&ours));
            // Another map by which we own the same is no change for the index.
            let changed = missed || before != ours;
            if changed {
                placement.since = map.epoch();
            }
            if !changed && placement.index == placement.map.epoch() {
                placement.index = map.epoch();
            }
            placement.map = Arc::clone(&map);
            changed
        };
        if changed {
            self.keep(&map)?;
            self.moved.ring(|waiting| waiting.changed = true);
        }
        self.forget_gone(&map);
        self.look_at_claims();
        let late = self.late().take();
        let asked = late.each(|session, asked| self.ask_each(session, asked));
        asked.and_then(|()| self.look_at_early()).inspect_err(|error| self.fail_all(error))
    }

    /// Waits until our part has changed and all hosts can have heard of it, `settle` later, or for
    /// `patience`. `None` when the engine ends.
    pub fn next_move(&self, settle: Duration, patience: Duration) -> Option<Move> {
        let changed = self.moved.wait(settle, patience)?;
        Some(if changed { Move::Fill(self.map()) } else { Move::None })
    }

    /// Whether what was begun for our part by the map of that epoch is still of use: it is still our
    /// part, and the engine does not end.
    #[must_use]
    pub fn is_still_ours(&self, epoch: MapEpoch) -> bool {
        self.placement().since <= epoch && !self.moved.is_ending()
    }

    /// The map, if the index has all that is ours by it.
    #[must_use]
    pub fn settled(&self) -> Option<Arc<PartitionMap>> {
        let placement = self.placement();
        let whole = placement.filling.is_empty() && placement.index == placement.map.epoch();
        whole.then(|| Arc::clone(&placement.map))
    }

    /// What [`Cluster::next_move`] gave is given again.
    fn move_again(&self) {
        self.moved.ring(|waiting| waiting.changed = true);
    }

    /// The engine ends: nobody waits for moves any more.
    pub fn end_moves(&self) {
        self.moved.ring(|waiting| waiting.ending = true);
    }

    /// Our index has all that is ours by that map. If another part is ours meanwhile,
    /// [`Cluster::next_move`] gives the map of that.
    ///
    /// # Errors
    /// When the engine is ending, or what must wait still cannot be kept.
    pub fn filled(&self, epoch: MapEpoch) -> Result<()> {
        {
            let mut placement = self.placement_mut();
            if placement.since > epoch {
                drop(placement);
                self.move_again();
                return Ok(());
            }
            placement.filling = Slices::default();
            placement.index = placement.map.epoch();
        }
        self.look_at_early().inspect_err(|error| self.fail_all(error))
    }

    /// The index cannot be filled now. Who waits for that is told, and does without.
    pub fn not_filled(&self, error: &Error) {
        let early = self.early().take();
        let told = early.each(|session, asked| {
            if session.host() != self.us {
                self.put(session.host(), &Message::Failed(session, error.to_string()));
                return Ok(());
            }
            let Some(asking) = self.sessions().get(&session).cloned() else { return Ok(()) };
            asked.iter().try_for_each(|(_, sequence)| asking.answers.put_nobody(*sequence))?;
            (asking.wake)();
            Ok(())
        });
        if let Err(error) = told {
            eprintln!("fleece-engine: questions that nobody answers are lost: {error}");
        }
        self.move_again();
    }

    /// Questions that waited are lost: nobody goes on waiting for them.
    pub(super) fn fail_all(&self, error: &Error) {
        for asking in self.sessions().values() {
            asking.answers.fail(error);
        }
        self.wake_all();
        for peer in self.all_peers() {
            let sessions: Vec<SessionId> = peer.link().sessions.iter().copied().collect();
            for session in sessions {
                self.put(peer.host, &Message::Failed(session, error.to_string()));
            }
        }
    }

    fn look_at_early(&self) -> Result<()> {
        let early = self.early().take();
        let epoch = self.map().epoch();
        early.each(|session, asked| self.ask_here(session, epoch, asked))
    }

    /// Takes hosts of the map in.
    pub(super) fn meet_new(&self, map: &PartitionMap) {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        for member in map.members().iter().filter(|member| member.number != self.us) {
            peers.entry(member.number).or_insert_with(|| {
                let ready = (self.ready)(member.number);
                let ours = Instance(self.next_instance.fetch_add(1, Ordering::AcqRel));
                let who = (member.number, ours);
                Arc::new(Peer::new(who, &self.dir, &self.share, ready, self.now()))
            });
        }
    }

    /// Forgets hosts that the map no longer has.
    fn forget_gone(&self, map: &PartitionMap) {
        let mut gone = Vec::new();
        self.peers.write().unwrap_or_else(PoisonError::into_inner).retain(|host, peer| {
            let stays = map.member(*host).is_some();
            if !stays {
                gone.push(Arc::clone(peer));
            }
            stays
        });
        for peer in gone {
            let ended = {
                let mut link = peer.link();
                link.lost = true;
                std::mem::take(&mut link.sessions)
            };
            peer.outbox.clear();
            ended.into_iter().for_each(|session| self.owner.withdraw(session));
            self.cut(peer.host);
        }
    }

    /// Questions to our own owner, by the map of that epoch.
    pub(super) fn ask_here(
        &self,
        session: SessionId,
        epoch: MapEpoch,
        asked: Vec<(Fingerprint, Sequence)>,
    ) -> Result<()> {
        let (mut ready, mut early, mut moved) = (Vec::new(), Vec::new(), Vec::new());
        let ours = {
            let placement = self.placement();
            for one in asked {
                if placement.map.owner(&one.0) != self.us {
                    let newer = epoch > placement.map.epoch();
                    if newer { early.push(one) } else { moved.push(one) }
                } else if placement.filling.contains(Slice::of(&one.0)) {
                    early.push(one);
                } else {
                    ready.push(one);
                }
            }
            placement.map.epoch()
        };
        if !early.is_empty() {
            self.early().push(session, &early)?;
            // It may all have been filled in just now.
            if self.filling() == 0 && self.map().epoch() >= epoch {
                self.look_at_early()?;
            }
        }
        if !moved.is_empty() {
            if session.host() == self.us {
                self.ask_each(session, moved)?;
            } else {
                self.put(session.host(), &Message::Moved(session, ours, moved));
            }
        }
        if ready.is_empty() { Ok(()) } else { self.owner.ask(session, ready) }
    }

    /// Questions of ours that came back: asked again by the map of that epoch, once we have it.
    pub(super) fn ask_again(
        &self,
        session: SessionId,
        epoch: MapEpoch,
        asked: Vec<(Fingerprint, Sequence)>,
    ) -> Result<()> {
        {
            // Under the lock: whoever adopts a map looks here afterwards.
            let mut late = self.late();
            if self.map().epoch() < epoch {
                return late.push(session, &asked, self.now());
            }
        }
        self.ask_each(session, asked)
    }

    /// Questions that have waited too long for a newer map: nobody answers them.
    pub(super) fn give_late_up(&self, now: Instant) {
        let late = self.late().take_old(now);
        let Some(late) = late else { return };
        let given_up = late.each(|session, asked| {
            let Some(asking) = self.sessions().get(&session).cloned() else { return Ok(()) };
            asked.iter().try_for_each(|(_, sequence)| asking.answers.put_nobody(*sequence))?;
            (asking.wake)();
            Ok(())
        });
        if let Err(error) = given_up {
            eprintln!("fleece-engine: questions that nobody answers are lost: {error}");
        }
    }

    /// Another host tells of its blocks, by the map of that epoch. By another one it may have told us of
    /// too few: then they are read from the journals, so that we have all of ours up to wherever we say.
    pub(super) fn learn_from(
        &self,
        epoch: MapEpoch,
        position: JournalPosition,
        entries: Vec<(Fingerprint, Address)>,
    ) -> Result<()> {
        if self.map().epoch() == epoch {
            self.owner.learn(entries, position)
        } else {
            self.owner.refill()
        }
    }
}
