//! Several engines as one: every host owns a part of the fingerprints ([`map`]) and answers for it.
//!
//! Hosts talk by frames of messages ([`frame`]) that wait in an outbox for each host ([`outbox`])
//! until it has taken them, in order and once, however often the link breaks. Nothing here does I/O
//! on a network and nothing waits for another host: [`crate::rpc`] carries the frames.
//!
//! A process that ends takes what it was asked with it; a host that is silent for [`SILENCE`] is given
//! up. Then the sessions of that time are *cut* from it: what they asked it they write themselves, and
//! count as undetected. Detection is a hint, so that costs space and never bytes.
//!
//! Who owns what can change ([`placement`]): then a host fills its index for what it gains from the
//! store, and holds the questions about that until it is done.

pub mod frame;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod grants;
mod held;
mod links;
pub mod map;
pub mod outbox;
mod peer;
mod placement;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod simulation;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::{Duration, Instant};

use self::frame::Message;
use self::held::Held;
pub use self::links::{Caller, Welcome};
use self::map::{MapEpoch, Member, PartitionMap};
use self::outbox::Share;
use self::peer::Peer;
pub use self::placement::Move;
use self::placement::{Late, Moves, Placement};
use crate::detect::JournalPosition;
use crate::error::Result;
use crate::ids::{Address, Fingerprint, HostId, Sequence, SessionId, Slices};
use crate::part::{Part, Wake};
use crate::session::answers::{Answers, LIKE_REACH};
use crate::session::event::Claim;
use crate::session::registry::Registry;

/// How long a host may take nothing of what waits for it: an engine starts anew in less.
pub const SILENCE: Duration = Duration::from_secs(30);

/// Fingerprints of a batch that are remembered, so that what it has often is asked about once.
const SEEN: usize = 4096;
/// Of them those that others may be like: their answers are remembered.
const LIKED: usize = 512;

/// Distinguishes what an engine's process says to a host from what it, or another process there, said
/// before: a host that was forgotten is told everything anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instance(pub u64);

/// The other hosts, as this one sees them.
pub struct Cluster {
    us: HostId,
    /// For the owner, which calls back.
    me: Weak<Cluster>,
    /// The instance of the next peer.
    next_instance: AtomicU64,
    /// No other engine is this host: it may speak as that.
    sure: AtomicBool,
    owner: Box<dyn Part>,
    registry: Arc<Registry>,
    clock: Clock,
    placement: RwLock<Placement>,
    /// Questions about what we own and have not filled in yet, or that came by a map that is
    /// newer than ours.
    early: Mutex<Held>,
    /// Questions of ours that came back from who does not own them any more, until we have that map.
    late: Mutex<Late>,
    /// Grants that sessions hold by a map that is newer than ours.
    claims: Mutex<Late>,
    peers: RwLock<BTreeMap<HostId, Arc<Peer>>>,
    sessions: Mutex<HashMap<SessionId, Asking>>,
    share: Arc<Share>,
    dir: PathBuf,
    ready: Box<dyn Fn(HostId) -> Box<dyn Fn() + Send + Sync> + Send + Sync>,
    moved: Moves,
}

/// What time it is.
pub type Clock = Box<dyn Fn() -> Instant + Send + Sync>;

/// What a cluster works with on its own host.
pub struct Here {
    /// The owner of our part.
    pub owner: Box<dyn Part>,
    /// Our sessions.
    pub registry: Arc<Registry>,
    /// What time it is.
    pub clock: Clock,
}

/// A session of this host that asks others, too.
#[derive(Clone)]
struct Asking {
    answers: Arc<Answers>,
    wake: Wake,
}

/// What a host is like at the moment, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostView {
    /// What the map says of it.
    pub member: Member,
    /// Slices that it owns, of [`crate::ids::Slice::COUNT`].
    pub slices: usize,
    /// It was given up, and has not come back.
    pub lost: bool,
}

impl Cluster {
    /// This host, number `us` of the map; what it says is of `instance` and those after it; `filled`:
    /// its index has all of its part. What waits for others takes `memory` bytes, and spills into
    /// `dir`; `ready` makes what is called when something waits for a host.
    pub fn new(
        (map, us, filled): (PartitionMap, HostId, bool),
        instance: Instance,
        Here { owner, registry, clock }: Here,
        (dir, memory): (&Path, usize),
        ready: impl Fn(HostId) -> Box<dyn Fn() + Send + Sync> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (filling, index) = if filled {
            (Slices::default(), map.epoch())
        } else {
            (map.slices(us), MapEpoch::default())
        };
        let cluster = Arc::new_cyclic(|me| Cluster {
            us,
            me: me.clone(),
            next_instance: AtomicU64::new(instance.0),
            sure: AtomicBool::new(true),
            owner,
            registry,
            clock,
            placement: RwLock::new(Placement {
                since: map.epoch(),
                map: Arc::new(map.clone()),
                filling,
                index,
            }),
            early: Mutex::new(Held::new(dir)),
            late: Mutex::new(Late::new(dir)),
            claims: Mutex::new(Late::new(dir)),
            peers: RwLock::default(),
            sessions: Mutex::default(),
            share: Share::new(memory),
            dir: dir.into(),
            ready: Box::new(ready),
            moved: Moves::new(!filled),
        });
        cluster.meet_new(&map);
        cluster
    }

    /// Whether this engine is known to be its host, and no other one is.
    #[must_use]
    pub fn is_sure(&self) -> bool {
        self.sure.load(Ordering::Acquire)
    }

    /// Sets that.
    pub fn be_sure(&self, sure: bool) {
        self.sure.store(sure, Ordering::Release);
    }

    /// Our number in the map.
    #[must_use]
    pub fn us(&self) -> HostId {
        self.us
    }

    /// What we say to a host is of this instance.
    #[must_use]
    pub fn instance(&self, host: HostId) -> Instance {
        self.peer(host).map_or(Instance(0), |peer| peer.ours)
    }

    /// The other hosts' numbers.
    #[must_use]
    pub fn others(&self) -> Vec<HostId> {
        self.peers().keys().copied().collect()
    }

    /// All hosts.
    #[must_use]
    pub fn view(&self) -> Vec<HostView> {
        let map = self.map();
        let view = |member: &Member| HostView {
            slices: map.slices(member.number).len(),
            lost: self.peer(member.number).is_some_and(|peer| peer.link().lost),
            member: member.clone(),
        };
        map.members().iter().map(view).collect()
    }

    fn peers(&self) -> RwLockReadGuard<'_, BTreeMap<HostId, Arc<Peer>>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_peers(&self) -> Vec<Arc<Peer>> {
        self.peers().values().cloned().collect()
    }

    fn peer(&self, host: HostId) -> Option<Arc<Peer>> {
        self.peers().get(&host).cloned()
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Asking>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // What sessions of this host say.

    /// A session of ours begins. Hosts that are lost now are not asked for it.
    pub fn register(&self, session: SessionId, answers: &Arc<Answers>, wake: &Wake) {
        let asking = Asking { answers: Arc::clone(answers), wake: Arc::clone(wake) };
        self.sessions().insert(session, asking);
        for peer in self.all_peers().iter().filter(|peer| peer.link().lost) {
            answers.cut(peer.host);
        }
    }

    /// Asks whoever owns what is asked about.
    ///
    /// # Errors
    /// When the engine is ending, or what must wait cannot be kept.
    pub fn ask(&self, session: SessionId, asked: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        let once = self.once(session, asked)?;
        self.ask_each(session, once)
    }

    /// What a batch has several times is asked about once; the others get the same answer. Else the owner of
    /// a block that is everywhere would have more to do than all other hosts.
    fn once(
        &self,
        session: SessionId,
        asked: Vec<(Fingerprint, Sequence)>,
    ) -> Result<Vec<(Fingerprint, Sequence)>> {
        let Some(Asking { answers, .. }) = self.sessions().get(&session).cloned() else {
            return Ok(asked);
        };
        let mut once = Vec::with_capacity(asked.len());
        for batch in asked.chunks(LIKE_REACH) {
            // By the fingerprint's last bits: a request's place in the batch, and whether others are said
            // to be like it. Until they are, the next one of these bits takes its place.
            let mut seen: Vec<Option<(u16, bool)>> = vec![None; SEEN];
            let mut liked = 0;
            for (at, (fingerprint, sequence)) in batch.iter().enumerate() {
                let [.., high, low] = fingerprint.0;
                let place = &mut seen[usize::from(u16::from_be_bytes([high, low])) % SEEN];
                let known = place.map(|(first, told)| (batch[usize::from(first)], told));
                match known {
                    Some(((known, first), told))
                        if known == *fingerprint
                            && (told || liked < LIKED)
                            && answers.put_like(*sequence, (session, first), told)? =>
                    {
                        liked += usize::from(!told);
                        *place = place.map(|(first, _)| (first, true));
                        continue;
                    }
                    Some((_, true)) => {}
                    _ => *place = Some((at as u16, false)),
                }
                once.push((*fingerprint, *sequence));
            }
        }
        Ok(once)
    }

    /// The same, whatever a batch has several times: what is asked again comes in batches of its own, and
    /// too far from what it is like.
    fn ask_each(&self, session: SessionId, asked: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        let map = self.map();
        for (host, asked) in split(&map, asked) {
            if host == self.us {
                self.ask_here(session, map.epoch(), asked)?;
            } else {
                self.ask_there(host, session, map.epoch(), asked);
            }
        }
        Ok(())
    }

    fn ask_there(
        &self,
        host: HostId,
        session: SessionId,
        epoch: MapEpoch,
        asked: Vec<(Fingerprint, Sequence)>,
    ) {
        let asking = self.sessions().get(&session).cloned();
        let Some(asking) = asking.filter(|_| !asked.is_empty()) else { return };
        if asking.answers.expect(host, &asked) {
            if self.peer(host).is_some() {
                self.put(host, &Message::Ask(session, epoch, asked));
                return self.withdraw_if_gone(session, host);
            }
            // It left the map a moment ago.
            asking.answers.cut(host);
        }
        (asking.wake)();
    }

    /// Gives grants back to whoever owns them.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn release(&self, session: SessionId, grants: Vec<(Fingerprint, Sequence)>) -> Result<()> {
        for (host, grants) in split(&self.map(), grants) {
            if host == self.us {
                self.owner.release(session, grants)?;
            } else {
                self.put(host, &Message::Release(session, grants));
            }
        }
        Ok(())
    }

    /// Tells all others whether a session waits for nothing but answers.
    pub fn waiting(&self, session: SessionId, waiting: bool) {
        let message = Message::Waiting(session, waiting);
        self.others().iter().for_each(|host| self.put(*host, &message));
    }

    /// Tells everybody of a container that is sealed and in the journal: its blocks to who owns
    /// them, and to the others that it is there, so that none sees a gap.
    ///
    /// # Errors
    /// When the engine is ending.
    pub fn learn(
        &self,
        entries: Vec<(Fingerprint, Address)>,
        position: JournalPosition,
    ) -> Result<()> {
        let map = self.map();
        let (mut ours, mut others) = (Vec::new(), self.others());
        for (host, entries) in split(&map, entries) {
            if host == self.us {
                ours = entries;
            } else {
                others.retain(|other| *other != host);
                self.put(host, &Message::Learn(map.epoch(), position, entries));
            }
        }
        for host in others {
            self.put(host, &Message::Learn(map.epoch(), position, Vec::new()));
        }
        self.owner.learn(ours, position)
    }

    /// A session of ours has ended.
    pub fn withdraw(&self, session: SessionId) {
        if self.sessions().remove(&session).is_some() {
            self.others().iter().for_each(|host| self.put(*host, &Message::Withdraw(session)));
        }
    }

    /// A host was told of a session by another thread than the session's own, which may have ended
    /// before that: then it is told so once more.
    fn withdraw_if_gone(&self, session: SessionId, host: HostId) {
        if !self.sessions().contains_key(&session) {
            self.put(host, &Message::Withdraw(session));
        }
    }

    /// Asks a session of another host to leave blocks to one of ours; false if it cannot hear it.
    pub fn give_up(&self, to: SessionId, writer: SessionId, claims: Vec<Claim>) -> bool {
        self.tell(writer.host(), &Message::GiveUp { to, writer, claims })
    }

    /// Tells a session of another host that one of ours has done with what it asked for.
    pub fn gave_up(&self, from: SessionId, to: SessionId) -> bool {
        self.tell(to.host(), &Message::GaveUp { from, to })
    }

    fn tell(&self, host: HostId, message: &Message) -> bool {
        let heard = self.peer(host).is_some_and(|peer| !peer.link().lost);
        if heard {
            self.put(host, message);
        }
        heard
    }

    /// Puts a message into a host's outbox. What cannot be kept any more gives the host up; a host
    /// that is lost learns nothing: it reads the journals when it is back.
    fn put(&self, host: HostId, message: &Message) {
        let Some(peer) = self.peer(host) else { return };
        if peer.link().lost {
            return;
        }
        if let Err(error) = peer.outbox.put(message) {
            self.lose(&peer, &error.to_string());
        }
    }

    /// Whether something waits for a host, or is awaited of it: then there is to be a link.
    #[must_use]
    pub fn needs(&self, host: HostId) -> bool {
        let Some(peer) = self.peer(host) else { return false };
        !peer.outbox.is_empty() || self.sessions().values().any(|s| s.answers.waits_for(host))
    }

    fn now(&self) -> Instant {
        (self.clock)()
    }

    /// Gives hosts up that take nothing for too long. Called every second or so; may wait for the owner.
    pub fn look(&self) {
        let now = self.now();
        for peer in self.all_peers() {
            if peer.take_broken() {
                self.lose(&peer, "an answer to it could not be kept");
            }
            let needed = self.needs(peer.host);
            let mut link = peer.link();
            if !needed {
                // It has no reason to say anything.
                link.heard = now;
            }
            let silent = now.saturating_duration_since(link.heard) > SILENCE;
            let lost = !link.lost && silent;
            // Nobody waits for what sessions write that cannot be asked about it.
            let ended =
                if link.lost { std::mem::take(&mut link.sessions) } else { HashSet::default() };
            drop(link);
            ended.into_iter().for_each(|session| self.owner.withdraw(session));
            if lost {
                self.lose(&peer, &format!("it took nothing for {} s", SILENCE.as_secs()));
            }
        }
        self.give_late_up(now);
        self.give_claims_up(now);
    }

    /// A host shows a certificate that was taken back. Nobody waits for it until it is silent.
    pub fn refuse(&self, host: HostId) {
        if let Some(peer) = self.peer(host) {
            self.lose(&peer, "its certificate is revoked");
        }
    }

    /// Gives a host up until it has a link again.
    fn lose(&self, peer: &Peer, why: &str) {
        let met = {
            let mut link = peer.link();
            if std::mem::replace(&mut link.lost, true) {
                return;
            }
            link.instance.is_some()
        };
        let name = self.name(peer.host);
        eprintln!("fleece-engine: {name} is given up, blocks that it has are missed: {why}");
        peer.outbox.clear();
        // The first thing that it hears when it is back.
        let first = if met { Message::Reset } else { Message::Behind };
        let _ = peer.outbox.put(&first);
        self.cut(peer.host);
    }

    /// The sessions that live now ask a host nothing any more.
    fn cut(&self, host: HostId) {
        self.sessions().values().for_each(|asking| asking.answers.cut(host));
        self.wake_all();
    }

    fn wake_all(&self) {
        let wakes: Vec<Wake> = self.sessions().values().map(|a| Arc::clone(&a.wake)).collect();
        wakes.iter().for_each(|wake| wake());
    }

    fn name(&self, host: HostId) -> String {
        let map = self.map();
        map.member(host).map_or_else(|| format!("host {}", host.0), |member| member.name.clone())
    }
}

/// What is whose, host by host, each by `T`. Sorted where it is: lists for a hundred hosts at once would take
/// the memory of all of it again, in pieces.
fn split<T: Ord + Copy>(
    map: &PartitionMap,
    mut all: Vec<(Fingerprint, T)>,
) -> impl Iterator<Item = (HostId, Vec<(Fingerprint, T)>)> {
    all.sort_unstable_by_key(|(fingerprint, of)| (map.owner(fingerprint), *of));
    std::iter::from_fn(move || {
        let host = map.owner(&all.last()?.0);
        let before = all.partition_point(|one| map.owner(&one.0) < host);
        Some((host, all.drain(before..).collect()))
    })
}
