//! All engines, and what carries their frames: one round of backups after the other.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fleece_engine::cluster::Caller;
use fleece_engine::cluster::map::{MapEpoch, Member, PartitionMap};
use fleece_engine::cluster::outbox::FrameNumber;
use fleece_engine::ids::HostId;
use fleece_engine::session::BLOCKS_PER_SUBMIT;

use crate::content::{Numbers, Set, Vm};
use crate::cost::{Costs, Stage, files, processor};
use crate::engine::{Engine, Told};
use crate::{Outcome, Sizes};

/// Blocks that an engine asks about before frames are carried: below what outboxes keep in memory.
const CARRY_EVERY: usize = 8 * BLOCKS_PER_SUBMIT;

/// Why bytes go over the network.
#[derive(Clone, Copy)]
pub(crate) enum Why {
    Asking,
    Answering,
    Learning,
    Ending,
}

/// Bytes and frames that went over the network.
#[derive(Clone, Copy, Default)]
pub(crate) struct Traffic {
    /// By [`Why`].
    pub(crate) bytes: [u64; 4],
    pub(crate) frames: u64,
}

/// One round: a snapshot of every VM.
pub(crate) struct Round {
    pub(crate) costs: Vec<Costs>,
    pub(crate) told: Told,
    pub(crate) asked: u64,
    pub(crate) requests: u64,
}

pub(crate) struct World {
    sizes: Sizes,
    pub(crate) map: PartitionMap,
    pub(crate) engines: Vec<Engine>,
    vms: Vec<Vec<Vm>>,
    /// The next frame from each to each; 0 before they met.
    links: Vec<FrameNumber>,
    pub(crate) traffic: Traffic,
    /// Bytes that each engine sent and received.
    pub(crate) sent: Vec<u64>,
    pub(crate) received: Vec<u64>,
    why: Why,
    /// The largest folder of each engine.
    pub(crate) disk: Vec<u64>,
    /// What was asked about, and what was granted.
    pub(crate) distinct: Set,
    granted: Set,
    pub(crate) doubles: u64,
    pub(crate) wrong: u64,
    /// Anonymous memory of the process when the most was in use, and what of it is the simulation's.
    pub(crate) anonymous: (u64, u64),
}

fn map_of(engines: usize) -> Outcome<PartitionMap> {
    let member = |n| Member {
        number: HostId(n as u16),
        name: format!("hv{n:03}"),
        address: String::new(),
        capacity: 1,
    };
    Ok(PartitionMap::at(MapEpoch(1), (0..engines).map(member).collect())?)
}

fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().unwrap_or(0);
    kib << 10
}

impl World {
    pub(crate) fn new(dir: &Path, sizes: Sizes) -> Outcome<Self> {
        let count = sizes.engines;
        let map = map_of(count)?;
        let numbers = Numbers::new((count * sizes.vms) as u64, sizes.asked_of_a_vm());
        if numbers.all() > u64::from(u32::MAX) {
            return Err("more contents than 32 bits count".into());
        }
        let start =
            |n| Engine::start((dir, sizes.seed), HostId(n as u16), &map, sizes.memtable_entries);
        let vm = |number| Vm::new(numbers, sizes.seed, number as u64);
        let of_engine = |n| (n * sizes.vms..(n + 1) * sizes.vms).map(vm).collect();
        Ok(World {
            engines: (0..count).map(start).collect::<Outcome<_>>()?,
            vms: (0..count).map(of_engine).collect(),
            links: vec![FrameNumber(0); count * count],
            traffic: Traffic::default(),
            sent: vec![0; count],
            received: vec![0; count],
            why: Why::Asking,
            disk: vec![0; count],
            distinct: Set::new(numbers),
            granted: Set::new(numbers),
            doubles: 0,
            wrong: 0,
            anonymous: (0, 0),
            sizes,
            map,
        })
    }

    /// A snapshot of every VM; `blocks` of each are asked about.
    pub(crate) fn round(&mut self, blocks: usize) -> Outcome<Round> {
        for engine in &mut self.engines {
            engine.costs = Costs::default();
            (engine.told, engine.requests) = (Told::default(), 0);
        }
        self.begin(blocks)?;
        self.scan(blocks)?;
        self.look_at_disks()?;
        loop {
            self.detect()?;
            if !self.write()? {
                break;
            }
        }
        self.look_at_memory();
        self.why = Why::Ending;
        self.engines.iter_mut().try_for_each(Engine::end)?;
        self.carry()?;
        self.engines.iter_mut().try_for_each(Engine::merge)?;
        self.look_at_memory();
        self.look_at_disks()?;
        let mut round = Round {
            costs: self.engines.iter().map(|engine| engine.costs).collect(),
            told: Told::default(),
            asked: (self.sizes.engines * self.sizes.vms * blocks) as u64,
            requests: self.engines.iter().map(|engine| engine.requests).sum(),
        };
        for told in self.engines.iter().map(|engine| engine.told) {
            round.told.granted += told.granted;
            round.told.stored += told.stored;
            round.told.same += told.same;
            round.told.undetected += told.undetected;
        }
        Ok(round)
    }

    fn begin(&mut self, blocks: usize) -> Outcome<()> {
        for (engine, vms) in self.engines.iter_mut().zip(&mut self.vms) {
            for vm in vms {
                let contents: Vec<_> = (0..blocks).map(|_| vm.draw()).collect();
                for content in &contents {
                    self.distinct.insert(*content);
                }
                engine.begin(contents)?;
            }
        }
        Ok(())
    }

    /// All sessions ask about all of their blocks.
    fn scan(&mut self, blocks: usize) -> Outcome<()> {
        self.why = Why::Asking;
        let sequences: Vec<u32> = (0..blocks as u32).collect();
        let mut asked = 0;
        for session in 0..self.sizes.vms {
            for batch in sequences.chunks(BLOCKS_PER_SUBMIT) {
                for engine in &mut self.engines {
                    engine.ask(session, batch)?;
                }
                asked += batch.len();
                if asked >= CARRY_EVERY {
                    asked = 0;
                    self.carry()?;
                }
            }
        }
        self.engines.iter_mut().for_each(|engine| engine.wait(true));
        self.carry()
    }

    /// Passes over everything that was asked; the verdicts go back.
    fn detect(&mut self) -> Outcome<()> {
        self.why = Why::Answering;
        for n in 0..self.engines.len() {
            while self.engines[n].pass()? {}
            if n == 0 {
                self.look_at_memory();
            }
        }
        self.look_at_memory();
        self.carry()?;
        self.look_at_memory();
        self.engines.iter_mut().for_each(|engine| engine.wait(false));
        Ok(())
    }

    /// Sessions read their verdicts, store what they were granted, and ask again about what others
    /// store; false if there is no such thing.
    fn write(&mut self) -> Outcome<bool> {
        self.why = Why::Learning;
        let mut places = Vec::new();
        for n in 0..self.engines.len() {
            for session in 0..self.sizes.vms {
                self.engines[n].settle(session, &mut places)?;
                for (content, address) in places.drain(..) {
                    let container = address.container;
                    let writer = self.engines.get(container.incarnation.0 as usize - 1);
                    let held = writer.and_then(|w| w.holds(container.counter, address.slot.0));
                    self.wrong += u64::from(held != Some(content));
                }
            }
            let before = self.engines[n].stored.len();
            self.engines[n].seal()?;
            for content in &self.engines[n].stored[before..] {
                self.doubles += u64::from(!self.granted.insert(*content));
            }
        }
        self.carry()?;
        self.why = Why::Asking;
        let mut again = false;
        for n in 0..self.engines.len() {
            for session in 0..self.sizes.vms {
                for batch in self.engines[n].take_again(session).chunks(BLOCKS_PER_SUBMIT) {
                    again = true;
                    self.engines[n].ask(session, batch)?;
                }
            }
            self.engines[n].wait(true);
        }
        self.carry()?;
        Ok(again)
    }

    /// Carries all frames that wait.
    fn carry(&mut self) -> Outcome<()> {
        loop {
            let mut carried = 0;
            let count = self.engines.len();
            for to in 0..count {
                // In turns: whoever comes first after somebody's memory was freed pays for getting it again.
                for from in (to + 1..count).chain(0..to) {
                    if self.engines[from].ready[to].swap(false, Ordering::AcqRel) {
                        carried += self.carry_between(from, to)?;
                    }
                }
                self.engines[to].obey_all()?;
            }
            if carried == 0 {
                return Ok(());
            }
        }
    }

    fn carry_between(&mut self, from: usize, to: usize) -> Outcome<u64> {
        let [a, b] = [from, to].map(|n| Arc::clone(&self.engines[n].cluster));
        let (us, them) = (a.us(), b.us());
        let at = from * self.engines.len() + to;
        let caller = Caller { host: us, instance: a.instance(them) };
        let ours = (them, caller.instance);
        let mut next = self.links[at];
        if next.0 == 0 {
            let welcome = b.greeted(caller);
            next = a.connected(ours, b.instance(us), welcome.received)?;
        }
        let mut carried = 0;
        loop {
            let begun = processor();
            let frame = a.next(ours, next)?;
            let read = self.engines[from].costs.until_now(Some(Stage::Send), begun);
            let Some((number, frame)) = frame else { break };
            b.take(caller, number, &frame)?;
            let taken = self.engines[to].costs.until_now(Some(Stage::Receive), read);
            a.taken(ours, number)?;
            self.engines[from].costs.until_now(Some(Stage::Send), taken);
            let bytes = frame.len() as u64;
            self.traffic.bytes[self.why as usize] += bytes;
            self.traffic.frames += 1;
            self.sent[from] += bytes;
            self.received[to] += bytes;
            next = FrameNumber(number.0 + 1);
            carried += 1;
        }
        self.links[at] = next;
        Ok(carried)
    }

    fn look_at_disks(&mut self) -> Outcome<()> {
        for (engine, most) in self.engines.iter().zip(&mut self.disk) {
            *most = (*most).max(files(&engine.dir)?);
        }
        Ok(())
    }

    fn look_at_memory(&mut self) {
        let now = anonymous();
        if now > self.anonymous.0 {
            let driver: u64 = self.engines.iter().map(Engine::of_the_driver).sum();
            self.anonymous = (now, driver + self.distinct.bytes() + self.granted.bytes());
        }
    }
}
