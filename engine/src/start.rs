//! Bringing an engine up: store, index, owner; and down again.

use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::budget::Budget;
use crate::cluster::map::{MAX_HOSTS, PartitionMap};
use crate::cluster::{Cluster, Here, Instance};
use crate::config::Config;
use crate::damage::Damage;
use crate::detect::{DetectOptions, Detector, Watermark};
use crate::error::{Context as _, Error, Kind, Result};
use crate::ids::{Fingerprint, HostId};
use crate::membership::Membership;
use crate::moving;
use crate::owner::Owner;
use crate::routing::Owners;
use crate::session::Context;
use crate::session::event::Event;
use crate::session::registry::Registry;
use crate::store::commit::Manifests;
use crate::store::format::random;
use crate::store::keys::StoreKey;
use crate::store::{Location, Store, StoreOptions};
use crate::upkeep;

/// How long after its own writes a session leaves the rest to those who hold the grants:
/// longer than a busy writer needs for a container, shorter than people wait.
const PATIENCE: Duration = Duration::from_secs(10);

/// A store that takes longer to answer is worth a word.
const SAY_AFTER: Duration = Duration::from_secs(5);

/// A running engine but for its socket.
pub struct Started {
    /// What sessions and calls work with.
    pub context: Context,
    /// Rung when something waits for another host, by its number.
    pub bells: Vec<Arc<Notify>>,
    /// This host's place in a cluster that etcd knows.
    pub membership: Option<Membership>,
    thread: Option<std::thread::JoinHandle<()>>,
    mover: Option<std::thread::JoinHandle<()>>,
}

/// Keeps guests' data and keys out of core dumps, and files from everyone else.
///
/// # Errors
/// When the limit cannot be set.
pub fn harden() -> Result<()> {
    use rustix::process::{
        DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit, umask,
    };
    umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let failed = || "cannot switch core dumps off".into();
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).context(failed)?;
    // A `core_pattern` that pipes to a program heeds no limit.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context(failed)
}

/// Opens the store and the index, and brings the index up to the store's journals.
///
/// # Errors
/// Those of the store and its key; [`Kind::Busy`] when another engine has the state.
pub fn start(config: &Config) -> Result<Started> {
    let budget = config.budget()?;
    if let Some(settings) = &config.cluster {
        Membership::check(settings)?;
    }
    let state = &config.state_dir;
    let work_dir = state.join("sessions");
    for dir in [state, &work_dir] {
        create_private_dir(dir)?;
    }
    let key = StoreKey::load(&config.key)?;
    let location = config.location()?;
    let options = store_options(config, &budget);
    let store = slowly(&location, || Store::open(&location, key, state, options))?;
    sweep(&work_dir);
    let mut options = DetectOptions::new(store.id());
    options.partition_bits = config.partition_bits;
    options.pass_memory = budget.pass;
    let membership = membership(config, &store)?;
    let place = place(config, membership.as_ref())?;
    options.part = place.as_ref().map_or(0, |(map, us)| map.slices(*us).digest());
    let (mut detector, report) = Detector::open(&state.join("index"), options)?;
    if let Some(reason) = &report.set_aside {
        eprintln!("fleece-engine: the index is built anew from the store: {reason}");
    }
    let placed: Arc<OnceLock<Arc<Cluster>>> = Arc::default();
    let owns = ownership(place.clone(), Arc::clone(&placed));
    // With others about nobody waits for what an index lacks: it is filled later.
    let filled = place.is_none() || !report.watermark.is_empty();
    if filled {
        refill(&store, &mut detector, &report.watermark, &owns)?;
    }
    let refilled = store.clone();
    let refill = move |detector: &mut Detector| {
        let watermark = detector.watermark();
        upkeep::refill(&refilled, detector, &watermark, &owns)
    };
    let (owner, thread) = Owner::start(detector, Box::new(refill))?;
    let mut bells = Vec::new();
    let (owners, registry) = match place {
        Some((map, us)) => {
            let parts = (&owner, &budget, &*work_dir);
            let (owners, registry) = join((map, us, filled), parts, &mut bells)?;
            if let Some(cluster) = owners.cluster() {
                // By a list it is yet to be found; etcd has said it.
                cluster.be_sure(membership.is_some());
                let _ = placed.set(Arc::clone(cluster));
            }
            (owners, registry)
        }
        None => (Owners::alone(owner), Arc::default()),
    };
    let damage = Arc::new(Damage::load(&store)?);
    let manifests = Manifests::new(store.objects().clone(), store.sealer().clone(), &work_dir);
    let context = Context {
        store,
        manifests,
        damage,
        owners,
        registry,
        budget,
        work_dir,
        host: host_name(),
        rebuilding: Arc::default(),
        tidying: Arc::default(),
        patience: PATIENCE,
    };
    let mover = start_mover(&context)?;
    Ok(Started { context, thread: Some(thread), mover, bells, membership })
}

fn store_options(config: &Config, budget: &Budget) -> StoreOptions {
    let (compression, role) = (config.compression_level, config.role);
    StoreOptions { budget: budget.store(), compression, role }
}

/// Does what may wait for a server, and says so if it takes long.
fn slowly<T>(location: &Location, work: impl FnOnce() -> T) -> T {
    let (done, waits) = std::sync::mpsc::channel::<()>();
    let what = format!("fleece-engine: the store at {location} does not answer yet");
    let says = std::thread::Builder::new().name("patience".into()).spawn(move || {
        if waits.recv_timeout(SAY_AFTER) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{what}");
        }
    });
    let outcome = work();
    drop(done);
    if let Ok(says) = says {
        let _ = says.join();
    }
    outcome
}

fn membership(config: &Config, store: &Store) -> Result<Option<Membership>> {
    let settings = config.cluster.as_ref().filter(|settings| !settings.etcd.is_empty());
    let Some(settings) = settings else { return Ok(None) };
    let who = (store.id(), store.journal()?.incarnation());
    Ok(Some(Membership::new(settings, who, &config.state_dir)))
}

/// The map to begin with, and this host's number in it.
fn place(
    config: &Config,
    membership: Option<&Membership>,
) -> Result<Option<(PartitionMap, HostId)>> {
    let Some(settings) = &config.cluster else { return Ok(None) };
    let Some(membership) = membership else { return settings.fixed_map().map(Some) };
    let map = membership.join()?;
    let lost = || Error::new(Kind::Failed, "the last partition map has no such host");
    let us = map.host(&settings.name).ok_or_else(lost)?;
    Ok(Some((map, us)))
}

/// Brings the index up to the journals. One that turns out to be damaged was set aside, and is begun anew.
fn refill(
    store: &Store,
    detector: &mut Detector,
    after: &Watermark,
    owns: &dyn Fn(&Fingerprint) -> bool,
) -> Result<()> {
    match upkeep::refill(store, detector, after, owns) {
        Err(error) if error.kind() == Kind::Damaged && detector.watermark().is_empty() => {
            upkeep::refill(store, detector, &Watermark::default(), owns)
        }
        refilled => refilled,
    }
}

/// Tells what this host answers for: by the first map until there is a cluster to ask.
fn ownership(
    place: Option<(PartitionMap, HostId)>,
    placed: Arc<OnceLock<Arc<Cluster>>>,
) -> impl Fn(&Fingerprint) -> bool + Send {
    move |fingerprint| match placed.get() {
        Some(cluster) => cluster.owns(fingerprint),
        None => place.as_ref().is_none_or(|(map, us)| map.owner(fingerprint) == *us),
    }
}

/// The thread that fills the index for what this host comes to own, and checkpoints it.
fn start_mover(context: &Context) -> Result<Option<std::thread::JoinHandle<()>>> {
    if context.owners.cluster().is_none() {
        return Ok(None);
    }
    let context = context.clone();
    let mover = std::thread::Builder::new().name("mover".into()).spawn(move || {
        moving::keep_part(&context, moving::PACE);
    });
    mover.map(Some).context(|| "cannot start the thread that fills the index".into())
}

/// This host among the others of the map.
fn join(
    (map, us, filled): (PartitionMap, HostId, bool),
    (owner, budget, work_dir): (&Owner, &Budget, &Path),
    bells: &mut Vec<Arc<Notify>>,
) -> Result<(Owners, Arc<Registry>)> {
    // Others may still know sessions of a process before this one: of 2^24 numbers, some at most.
    let first = u32::from_le_bytes(random()?);
    let registry = Arc::new(Registry::on(us, first));
    let instance = Instance(u64::from_le_bytes(random()?));
    bells.extend((0..MAX_HOSTS).map(|_| Arc::new(Notify::new())));
    let ringing = bells.clone();
    let ready = move |host: HostId| -> Box<dyn Fn() + Send + Sync> {
        let bell = ringing.get(usize::from(host.0)).cloned().unwrap_or_default();
        Box::new(move || bell.notify_one())
    };
    let here = Here {
        owner: Box::new(owner.clone()),
        registry: Arc::clone(&registry),
        clock: Box::new(Instant::now),
    };
    let place = (map, us, filled);
    let cluster = Cluster::new(place, instance, here, (work_dir, budget.peers), ready);
    Ok((Owners::among(owner.clone(), cluster), registry))
}

impl Started {
    /// Hangs up on all sessions and waits until they ended themselves.
    pub fn wait_for_sessions(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            let live = self.context.registry.list();
            if live.is_empty() {
                return;
            }
            for session in live {
                let _ = session.events.try_send(Event::Hangup);
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// Ends the owner: what it learned is written out.
    pub fn stop(mut self) {
        if let (Some(cluster), Some(mover)) = (self.context.owners.cluster(), self.mover.take()) {
            cluster.end_moves();
            mover.thread().unpark();
            let _ = mover.join();
        }
        self.context.owners.here().stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn create_private_dir(dir: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .context(|| format!("cannot create {}", dir.display()))
}

/// Working files have no names; whatever has one here is from another version.
fn sweep(work_dir: &Path) {
    for entry in std::fs::read_dir(work_dir).into_iter().flatten().flatten() {
        let _ = std::fs::remove_file(entry.path());
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
