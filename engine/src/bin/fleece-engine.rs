//! The per-host daemon.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use fleece_engine::config::{Config, DEFAULT_CONFIG};
use fleece_engine::error::{Context as _, Error, Kind, Result};
use fleece_engine::store::Store;
use fleece_engine::{memory, rpc, start, upgrade};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};

/// How often the peak of anonymous memory is looked at.
const SAMPLE: Duration = Duration::from_millis(100);
/// Between two looks at what all engines of the store go by: each is a listing, which buckets charge for.
const LOOK: Duration = Duration::from_secs(10);
/// Restores at once: each borrows a pass's share of the memory.
const RESTORES: usize = 2;
/// What the engine adds to its niceness: where processors are scarce, a guest's gets nine times its
/// share. Where one is free it changes nothing.
const NICE: i32 = 10;
/// How long sessions may take to end themselves at a SIGTERM.
const FAREWELL: Duration = Duration::from_secs(10);

/// Fleece's engine: finds duplicates, stores every distinct block once.
#[derive(Parser)]
#[command(name = "fleece-engine", version)]
struct Options {
    /// The configuration that `fleecectl init` wrote.
    #[arg(long, default_value = DEFAULT_CONFIG)]
    config: PathBuf,
    /// The socket for fleece and fleecectl, instead of the configuration's.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Where the index and working files go, instead of the configuration's.
    #[arg(long)]
    state_dir: Option<PathBuf>,
    /// Memory, with a unit (32M), instead of the configuration's.
    #[arg(long)]
    memory_budget: Option<String>,
    /// Print the man page.
    #[arg(long, hide = true)]
    man: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.man {
        let page = clap_mangen::Man::new(Options::command());
        return match page.render(&mut std::io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    if let Err(error) = with_frugal_malloc() {
        eprintln!("fleece-engine: more memory than needed will be taken: {error}");
    }
    // Before there are threads: they inherit it. Where it is refused, we are as nice as before.
    let _ = rustix::process::nice(NICE);
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fleece-engine: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// How glibc's malloc is to be, by environment: that is read at the start only.
const MALLOC: [(&str, &str); 3] = [
    // It gives every thread an arena that keeps what it once held: measured, 37 MiB of anonymous
    // memory instead of 13 after the same work.
    ("MALLOC_ARENA_MAX", "1"),
    // It gives the memory of every message back, to be faulted in again for the next one: measured,
    // a fifth of the CPU time of a restore. So it keeps two of them.
    ("MALLOC_TRIM_THRESHOLD_", "1048576"),
    ("MALLOC_MMAP_THRESHOLD_", "4194304"),
];

/// Starts this program anew with malloc as it should be, unless the environment says otherwise.
fn with_frugal_malloc() -> std::io::Result<()> {
    if MALLOC.iter().all(|(name, _)| std::env::var_os(name).is_some()) {
        return Ok(());
    }
    let set = MALLOC.iter().filter(|(name, _)| std::env::var_os(name).is_none());
    let mut again = std::process::Command::new(std::env::current_exe()?);
    again.args(std::env::args_os().skip(1)).envs(set.copied());
    // Comes back only when it failed; the process stays the same one.
    Err(again.exec())
}

fn configuration(options: Options) -> Result<Config> {
    let mut config = Config::load(&options.config)?;
    if let Some(socket) = options.socket {
        config.socket = socket;
    }
    if let Some(state_dir) = options.state_dir {
        config.state_dir = state_dir;
    }
    if let Some(budget) = options.memory_budget {
        config.memory_budget = budget;
    }
    Ok(config)
}

fn run(options: Options) -> Result<()> {
    let config = configuration(options)?;
    start::harden()?;
    let started = start::start(&config)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .context(|| "cannot start the runtime".into())?;
    let local = tokio::task::LocalSet::new();
    let outcome = local.block_on(&runtime, listen(&config, &started));
    // Their plugins live, and go on with them in the next engine: no tombstones.
    started.context.registry.close();
    drop(local);
    started.wait_for_sessions(FAREWELL);
    runtime.shutdown_timeout(FAREWELL);
    started.stop();
    outcome
}

async fn listen(config: &Config, started: &start::Started) -> Result<()> {
    let (stop, stopped) = watch::channel(false);
    let mut terminate =
        signal(SignalKind::terminate()).context(|| "cannot watch SIGTERM".into())?;
    let mut interrupt = signal(SignalKind::interrupt()).context(|| "cannot watch SIGINT".into())?;
    tokio::task::spawn_local(async move {
        let mut tick = tokio::time::interval(SAMPLE);
        loop {
            tokio::select! {
                _ = tick.tick() => memory::sample(),
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
        let _ = stop.send(true);
    });
    let context = started.context.clone();
    eprintln!(
        "fleece-engine {} on {}: store {} ({}), socket {}, memory {}",
        env!("CARGO_PKG_VERSION"),
        context.host,
        config.store,
        if context.store.encrypted() { "encrypted" } else { "NOT encrypted" },
        config.socket.display(),
        config.memory_budget,
    );
    let (peers, listening) = keep_peers(config, started)?;
    let services = rpc::Services {
        peers,
        membership: started.membership.clone().map(Rc::new),
        readers: Arc::new(Semaphore::new(context.budget.sessions)),
        messages: Arc::new(Semaphore::new(context.budget.messages >> 10)),
        restores: Arc::new(Semaphore::new(RESTORES)),
        context: context.clone(),
        allowed_uids: config.allowed_uids.clone(),
        key_file: config.key.clone(),
        store_name: config.store.clone(),
    };
    let store = context.store.clone();
    let served = async {
        tokio::select! {
            served = rpc::serve(Rc::new(services), &config.socket, stopped) => served,
            ended = listening => ended,
            error = follow(store, config.key.clone()) => Err(error),
        }
    };
    served.await.map_err(|error| match error.kind() {
        Kind::Failed => Error::caused(Kind::Failed, "the engine cannot serve", error),
        _ => error,
    })
}

/// Follows what all engines of the store go by, and the key file, until this engine cannot.
async fn follow(store: Store, key_file: PathBuf) -> Error {
    let mut said = String::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let (store, key_file) = (store.clone(), key_file.clone());
        let looked = rpc::on_a_thread(move || Ok(upgrade::look(&store, &key_file))).await;
        let why = match looked.unwrap_or_else(|error| (Err(error), Ok(()))) {
            (Err(error), _) if matches!(error.kind(), Kind::NoStore | Kind::Key) => return error,
            (Err(error), _) => format!("cannot see what the store's engines go by: {error}"),
            (_, Err(error)) => format!("on with the key that was: {error}"),
            (Ok(_), Ok(())) => String::new(),
        };
        if why != said && !why.is_empty() {
            eprintln!("fleece-engine: {why}");
        }
        said = why;
    }
}

/// The other hosts, if there are any, and what keeps the links to them.
fn keep_peers(
    config: &Config,
    started: &start::Started,
) -> Result<(Option<Rc<rpc::Peers>>, impl Future<Output = Result<()>>)> {
    let context = &started.context;
    let peers = match (context.owners.cluster(), &config.cluster) {
        (Some(cluster), Some(settings)) => {
            let listen = settings.listen_at(&cluster.map()).to_owned();
            if let Some(membership) = started.membership.clone() {
                let cluster = Arc::clone(cluster);
                tokio::task::spawn_local(Rc::new(membership).run(cluster));
            }
            let cluster = Arc::clone(cluster);
            Some((rpc::Peers::start(cluster, context.clone(), settings)?, listen))
        }
        _ => None,
    };
    let kept = peers.as_ref().map(|(peers, _)| Rc::clone(peers));
    let bells = started.bells.clone();
    let listening = async move {
        match peers {
            Some((peers, listen)) => peers.run(&listen, &bells).await,
            None => std::future::pending().await,
        }
    };
    Ok((kept, listening))
}
