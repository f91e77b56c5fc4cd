//! The exchange between hosts under a simulated network, clock and disk of crashes: everything that
//! happens is chosen by a seed, one step at a time, so that what goes wrong can be seen again.
//!
//! Real are the cluster (frames, outboxes, links, the changing map, what is held) and the detectors.
//! Sessions are reduced to asking, writing what they are granted, and asking again about what
//! others write. The oracle is the store: a map from addresses to fingerprints.

mod by_hand;
mod host;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use self::host::{Host, Local};
use super::map::{MapEpoch, Member, PartitionMap};
use super::outbox::FrameNumber;
use super::{Caller, SILENCE};
use crate::detect::{JournalPosition, Verdict, Watermark};
use crate::ids::{Address, ContainerId, Fingerprint, HostId, Sequence, SessionId, Slot};
use crate::part::{Entry, Part, Wake};
use crate::session::answers::Answers;

/// Hosts that there can be.
const HOSTS: usize = 4;
/// Sessions of a run.
const SESSIONS: usize = 6;
/// Blocks of a session at most.
const BLOCKS: u64 = 60;
/// Distinct blocks that sessions have in common.
const COMMON: u64 = 80;
/// Steps in which things go wrong, and those in which all must come to its end.
const STEPS: u64 = 600;
const END: u64 = 60_000;
/// Rounds in which what is on its way comes, if links let it.
const SETTLE: u32 = 100;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

/// A backup of two windows, the second of which begins in the middle.
struct Session {
    id: SessionId,
    host: usize,
    blocks: Vec<Fingerprint>,
    places: Vec<Option<Address>>,
    /// What this round asked about, in each of two windows.
    asked: [Vec<usize>; 2],
    answers: Arc<Answers>,
    own: HashMap<Fingerprint, Address>,
    undetected: u64,
}

impl Session {
    /// Where a window begins.
    fn first(&self, window: usize) -> u64 {
        if window == 0 { 0 } else { middle(self.blocks.len()) as u64 }
    }

    fn is_over(&self) -> bool {
        self.asked.iter().all(Vec::is_empty)
    }

    /// A window all of whose questions are answered.
    fn answered(&self) -> Option<usize> {
        let answered = |window: &usize| {
            let asked = self.asked[*window].len() as u64;
            asked > 0 && self.answers.count(self.first(*window)) >= asked
        };
        (0..2).find(answered)
    }
}

fn middle(blocks: usize) -> usize {
    (blocks / 2).max(1)
}

/// A link, as long as it lasts.
struct Link {
    caller: Caller,
    next: FrameNumber,
}

struct World {
    dir: tempfile::TempDir,
    random: Random,
    base: Instant,
    clock: Arc<AtomicU64>,
    hosts: Vec<Option<Host>>,
    /// Whether packets of one host come to another.
    network: [[bool; HOSTS]; HOSTS],
    links: HashMap<(usize, usize), Link>,
    /// A frame that came, and waits to be taken.
    late: Option<(usize, Caller, FrameNumber, Vec<u8>)>,
    map: PartitionMap,
    journal: Vec<(JournalPosition, Vec<Entry>)>,
    store: HashMap<Address, Fingerprint>,
    sessions: Vec<Session>,
    begun: usize,
    starts: u32,
    undetected: u64,
}

fn member(n: u16) -> Member {
    Member { number: HostId(n), name: format!("hv{n}"), address: String::new(), capacity: 1 }
}

fn map(epoch: u64, hosts: &BTreeSet<u16>) -> PartitionMap {
    let members = hosts.iter().map(|n| member(*n)).collect();
    PartitionMap::at(MapEpoch(epoch), members).unwrap()
}

fn questions_of(blocks: &[Fingerprint], asked: &[usize]) -> Vec<(Fingerprint, Sequence)> {
    asked.iter().map(|n| (blocks[*n], Sequence(*n as u64))).collect()
}

fn block(n: u64) -> Fingerprint {
    let mut bytes = [0; Fingerprint::LEN];
    bytes[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    bytes[8..16].copy_from_slice(&n.to_be_bytes());
    Fingerprint(bytes)
}

impl World {
    fn new(seed: u64) -> Self {
        let shm = Path::new("/dev/shm");
        let dir = if shm.exists() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
        let all: BTreeSet<u16> = (0..3).collect();
        let mut world = World {
            dir: dir.unwrap(),
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            base: Instant::now(),
            clock: Arc::default(),
            hosts: (0..HOSTS).map(|_| None).collect(),
            network: [[true; HOSTS]; HOSTS],
            links: HashMap::new(),
            late: None,
            map: map(1, &all),
            journal: Vec::new(),
            store: HashMap::new(),
            sessions: Vec::new(),
            begun: 0,
            starts: 0,
            undetected: 0,
        };
        (0..3).for_each(|host| world.start(host, true));
        world
    }

    fn start(&mut self, host: usize, filled: bool) {
        self.starts += 1;
        let (clock, base) = (Arc::clone(&self.clock), self.base);
        let now = move || base + Duration::from_millis(clock.load(Ordering::Acquire));
        let us = HostId(host as u16);
        let how = (self.starts, filled);
        self.hosts[host] = Some(Host::start(self.dir.path(), us, &self.map, how, now));
    }

    fn alive(&self) -> Vec<usize> {
        (0..HOSTS).filter(|host| self.hosts[*host].is_some()).collect()
    }

    fn any_alive(&mut self) -> Option<usize> {
        let alive = self.alive();
        let n = self.random.below(alive.len().max(1) as u64) as usize;
        alive.get(n).copied()
    }

    /// One thing that happens without anything going wrong.
    fn step(&mut self) {
        let Some(host) = self.any_alive() else { return };
        match self.random.below(10) {
            0..=3 => {
                if let Some(host) = &mut self.hosts[host] {
                    host.work(&self.journal);
                }
            }
            4..=6 => {
                let to = self.random.below(HOSTS as u64) as usize;
                self.carry(host, to);
            }
            7 => self.begin(host),
            8 => {
                self.fill(host);
                self.take_late();
            }
            _ => {
                let n = self.random.below(self.sessions.len().max(1) as u64) as usize;
                self.go_on(n);
            }
        }
    }

    /// A frame goes from one host to another, if the network lets it; sometimes nobody hears that it
    /// came, or it is not taken before its host was started anew.
    fn carry(&mut self, from: usize, to: usize) {
        let up = from != to && self.network[from][to];
        let (Some(a), Some(b)) = (&self.hosts[from], &self.hosts[to]) else { return };
        let (a, b) = (Arc::clone(&a.cluster), Arc::clone(&b.cluster));
        let (us, them) = (a.us(), b.us());
        if !up {
            self.links.remove(&(from, to));
            return a.disconnected(them);
        }
        let Some(link) = self.links.get_mut(&(from, to)) else {
            // Who is not in the other's map is refused.
            if a.others().contains(&them) && b.others().contains(&us) {
                let caller = Caller { host: us, instance: a.instance(them) };
                let welcome = b.greeted(caller);
                if welcome.unreached {
                    return a.unreached(them, b.instance(us));
                }
                let ours = (them, caller.instance);
                let next = a.connected(ours, b.instance(us), welcome.received).unwrap();
                self.links.insert((from, to), Link { caller, next });
            }
            return;
        };
        if self.late.as_ref().is_some_and(|late| (late.0, late.1) == (to, link.caller)) {
            // What a link brings is taken in the order in which it came.
            return;
        }
        let chance = self.random.below(20);
        let ours = (them, link.caller.instance);
        let taken = match a.next(ours, link.next) {
            Ok(Some((number, frame))) => {
                link.next = FrameNumber(number.0 + 1);
                if chance == 0 && self.late.is_none() {
                    self.late = Some((to, link.caller, number, frame));
                    return;
                }
                b.take(link.caller, number, &frame).map(|()| number)
            }
            // A sign of life.
            Ok(None) => b.hears(link.caller).map(|()| FrameNumber(link.next.0 - 1)),
            Err(error) => Err(error),
        };
        // Sometimes the answer does not come.
        if !taken.is_ok_and(|number| chance > 2 && a.taken(ours, number).is_ok()) {
            self.links.remove(&(from, to));
            a.disconnected(them);
        }
    }

    /// A frame that waited long is taken.
    fn take_late(&mut self) {
        let Some((to, caller, number, frame)) = self.late.take() else { return };
        if let Some(host) = &self.hosts[to] {
            // It may have been refused since.
            let _ = host.cluster.take(caller, number, &frame);
        }
        // In the order in which they came: whoever sent it sends what comes after it again.
        self.links.remove(&(usize::from(caller.host.0), to));
    }

    fn begin(&mut self, host: usize) {
        if self.begun >= SESSIONS {
            return;
        }
        self.begun += 1;
        let count = 1 + self.random.below(BLOCKS);
        // Common ones, some of them twice, and its own.
        let own = self.begun as u64 * 1000;
        let mut blocks = Vec::new();
        for n in 0..count {
            let common = self.random.below(3) > 0;
            blocks.push(block(if common { self.random.below(COMMON) } else { own + n }));
        }
        let Some(here) = &self.hosts[host] else { return };
        let us = here.cluster.us();
        let id = SessionId::on(us, self.begun as u32);
        let answers = Arc::new(Answers::new(self.dir.path(), 64 << 10));
        answers.open(0);
        answers.open(middle(blocks.len()) as u64);
        let local = Local { host: us, answers: Arc::clone(&answers) };
        here.owned.register(id, Arc::new(local)).unwrap();
        let wake: Wake = Arc::new(|| ());
        here.cluster.register(id, &answers, &wake);
        let middle = middle(blocks.len());
        let asked: [Vec<usize>; 2] = [(0..middle).collect(), (middle..blocks.len()).collect()];
        for window in &asked {
            let questions = questions_of(&blocks, window);
            here.cluster.ask(id, questions).unwrap();
        }
        let places = vec![None; blocks.len()];
        let (own, undetected) = (HashMap::new(), 0);
        self.sessions.push(Session { id, host, blocks, places, asked, answers, own, undetected });
    }

    /// A session goes as far as its answers let it.
    fn go_on(&mut self, n: usize) {
        let Some(session) = self.sessions.get_mut(n) else { return };
        let Some(window) = session.answered() else { return };
        let Some(host) = &mut self.hosts[session.host] else { return };
        let mut stream = session.answers.take(session.first(window)).unwrap();
        let (mut write, mut again) = (Vec::new(), Vec::new());
        for at in std::mem::take(&mut session.asked[window]) {
            let fingerprint = session.blocks[at];
            match stream.answer(Sequence(at as u64)).unwrap() {
                // The directory decides.
                Some(Verdict::Stored(address))
                    if self.store.get(&address) == Some(&fingerprint) =>
                {
                    session.places[at] = Some(address);
                }
                Some(Verdict::SameAs(..)) => match session.own.get(&fingerprint) {
                    Some(address) => session.places[at] = Some(*address),
                    None => again.push(at),
                },
                Some(Verdict::Stored(_) | Verdict::Grant) => write.push(at),
                None => {
                    session.undetected += 1;
                    write.push(at);
                }
            }
        }
        let mut entries = Vec::new();
        for at in write {
            let fingerprint = session.blocks[at];
            let container =
                ContainerId { incarnation: host.incarnation, counter: host.sealed as u32 };
            let address = *session.own.entry(fingerprint).or_insert_with(|| {
                let address = Address { container, slot: Slot(entries.len() as u16) };
                entries.push((fingerprint, address));
                address
            });
            session.places[at] = Some(address);
        }
        if !entries.is_empty() {
            host.sealed += 1;
            let position = JournalPosition { incarnation: host.incarnation, n: host.sealed };
            for (fingerprint, address) in &entries {
                self.store.insert(*address, *fingerprint);
            }
            self.journal.push((position, entries.clone()));
            host.cluster.learn(entries, position).unwrap();
        }
        let questions = questions_of(&session.blocks, &again);
        session.asked[window] = again;
        if session.is_over() {
            host.cluster.withdraw(session.id);
            host.owned.withdraw(session.id);
            self.undetected += session.undetected;
        } else if !questions.is_empty() {
            host.cluster.ask(session.id, questions).unwrap();
        }
    }

    /// Goes by the newest map.
    fn adopt(&mut self, host: usize) {
        if let Some(host) = &self.hosts[host] {
            host.cluster.adopt(self.map.clone()).unwrap();
        }
    }

    /// Fills an index that is not of the map: once all that live have that map.
    fn fill(&mut self, host: usize) {
        let newest = self.map.epoch();
        let all = self.hosts.iter().flatten().all(|host| host.cluster.map().epoch() == newest);
        let fills = |host: &Host| host.cluster.index_epoch() != newest;
        if !all || !self.hosts[host].as_ref().is_some_and(fills) {
            return;
        }
        self.settle();
        let Some(host) = &mut self.hosts[host] else { return };
        let us = host.cluster.us();
        let mut rebuild = host.detector.rebuild_as(self.map.slices(us).digest()).unwrap();
        let mut watermark = Watermark::default();
        for (position, entries) in &self.journal {
            let ours: Vec<Entry> =
                entries.iter().filter(|(f, _)| self.map.owner(f) == us).copied().collect();
            rebuild.feed(&ours).unwrap();
            watermark.raise(position.incarnation, position.n);
        }
        host.detector.install(rebuild.build(watermark).unwrap()).unwrap();
        host.cluster.filled(newest).unwrap();
    }

    /// What is on its way when all have a map comes before an index is filled for it, if links let it.
    fn settle(&mut self) {
        self.take_late();
        for _ in 0..SETTLE {
            let mut quiet = true;
            for host in self.hosts.iter_mut().flatten() {
                while !host.is_idle() {
                    host.work(&self.journal);
                }
            }
            for (from, to) in (0..HOSTS).flat_map(|from| (0..HOSTS).map(move |to| (from, to))) {
                let waits = |host: &Host| {
                    let peer = host.cluster.peer(HostId(to as u16));
                    peer.is_some_and(|peer| !peer.outbox.is_empty())
                };
                if self.hosts[from].as_ref().is_some_and(waits) {
                    quiet = false;
                    self.carry(from, to);
                    self.take_late();
                }
            }
            if quiet {
                return;
            }
        }
    }

    /// Something goes wrong, or the map changes.
    fn disturb(&mut self, faults: bool) {
        let host = self.random.below(HOSTS as u64) as usize;
        match self.random.below(if faults { 6 } else { 2 }) {
            0 if faults => self.change_members(),
            0 => self.change_shares(),
            1 => self.adopt(host),
            2 => {
                let other = self.random.below(HOSTS as u64) as usize;
                self.network[host][other] = self.random.below(2) == 0;
            }
            3 if self.hosts[host].is_some() => self.crash(host),
            3 | 4 => {
                if self.hosts[host].is_none() {
                    self.start(host, false);
                }
            }
            _ => self.pass_time(),
        }
    }

    /// A host joins, is drained, or comes back.
    fn change_shares(&mut self) {
        let mut members = self.map.members().to_vec();
        let host = self.random.below(HOSTS as u64) as u16;
        match members.iter().position(|member| member.number.0 == host) {
            Some(at) => members[at].capacity = 1 - members[at].capacity,
            None => members.push(member(host)),
        }
        if let Ok(map) = PartitionMap::at(MapEpoch(self.map.epoch().0 + 1), members) {
            self.map = map;
            if self.hosts[usize::from(host)].is_none() {
                self.start(usize::from(host), false);
            }
        }
    }

    fn change_members(&mut self) {
        let mut members: BTreeSet<u16> =
            self.map.members().iter().map(|member| member.number.0).collect();
        let host = self.random.below(HOSTS as u64) as u16;
        if !members.insert(host) && members.len() > 1 {
            members.remove(&host);
        }
        self.map = map(self.map.epoch().0 + 1, &members);
        // A host starts to join; one that left goes on until its sessions have ended.
        if self.hosts[usize::from(host)].is_none() && members.contains(&host) {
            self.start(usize::from(host), false);
        }
    }

    fn crash(&mut self, host: usize) {
        self.hosts[host] = None;
        self.links.retain(|(from, to), _| *from != host && *to != host);
        self.sessions.retain(|session| session.host != host);
    }

    fn pass_time(&mut self) {
        let most = SILENCE.as_millis() as u64 * 2;
        let passed = self.random.below(most);
        self.clock.fetch_add(passed, Ordering::AcqRel);
        for host in self.hosts.iter().flatten() {
            host.cluster.look();
        }
    }

    /// Everything is mended, and comes to its end.
    fn come_to_an_end(&mut self, seed: u64) {
        self.network = [[true; HOSTS]; HOSTS];
        for member in self.map.members().to_vec() {
            let host = usize::from(member.number.0);
            if self.hosts[host].is_none() {
                self.start(host, false);
            }
        }
        (0..HOSTS).for_each(|host| self.adopt(host));
        for step in 0..END {
            if self.begun >= SESSIONS && self.sessions.iter().all(Session::is_over) {
                return;
            }
            self.step();
            if step % 500 == 499 {
                self.clock.fetch_add(1000, Ordering::AcqRel);
                self.hosts.iter().flatten().for_each(|host| host.cluster.look());
            }
        }
        for host in self.hosts.iter().flatten() {
            let commands = host.owned.commands.lock().unwrap().len();
            let logged: Vec<u64> =
                host.detector.partitions().map(|p| host.detector.waiting(p)).collect();
            let needs: Vec<bool> =
                host.cluster.others().iter().map(|other| host.cluster.needs(*other)).collect();
            let (map, filling) = (host.cluster.map().epoch(), host.cluster.filling());
            eprintln!(
                "host {}: {commands} commands, {logged:?} logged, needs {needs:?}, {map:?}, filling \
                 {filling}, index {:?}",
                host.cluster.us().0,
                host.cluster.index_epoch()
            );
        }
        let waiting: BTreeMap<_, _> = self
            .sessions
            .iter()
            .filter(|s| !s.is_over())
            .map(|s| {
                let windows = [0, 1].map(|w| (s.asked[w].len(), s.answers.count(s.first(w))));
                (s.id.0, windows)
            })
            .collect();
        panic!("seed {seed}: sessions do not end (asked, answered): {waiting:?}");
    }

    /// No block is lost.
    fn must_be_whole(&self, seed: u64) {
        for session in &self.sessions {
            for (block, place) in session.blocks.iter().zip(&session.places) {
                let stored = place.and_then(|address| self.store.get(&address));
                assert_eq!(stored, Some(block), "seed {seed}: a block is lost");
            }
        }
    }

    fn doubles(&self) -> usize {
        self.store.len() - self.store.values().collect::<BTreeSet<_>>().len()
    }
}

fn run(seed: u64, disturbed: Option<bool>) -> World {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        match disturbed {
            Some(faults) if world.random.below(25) == 0 => world.disturb(faults),
            _ => world.step(),
        }
    }
    world.come_to_an_end(seed);
    world.must_be_whole(seed);
    world
}

/// Seeds of a run of the tests; `FLEECE_TEST_SEED` tries one alone.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("FLEECE_TEST_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (1..=count).collect(),
    }
}

#[test]
fn without_a_fault_nothing_is_stored_twice() {
    for seed in seeds(1000) {
        let world = run(seed, None);
        assert_eq!((world.doubles(), world.undetected), (0, 0), "seed {seed}");
    }
}

#[test]
fn while_hosts_join_and_are_drained_nothing_is_stored_twice() {
    for seed in seeds(1000) {
        let world = run(seed, Some(false));
        assert_eq!((world.doubles(), world.undetected), (0, 0), "seed {seed}");
    }
}

#[test]
fn whatever_fails_every_session_ends_and_no_block_is_lost() {
    for seed in seeds(1000) {
        run(seed, Some(true));
    }
}
