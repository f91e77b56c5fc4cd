//! The links of a cluster: frames from outboxes to other hosts, and theirs to our owner.
//!
//! Each host calls another one while it has something to send to it, or waits for its answers. A link
//! that breaks is made again, and goes on with the first frame that was not taken. However many hosts
//! there are, [`LINKS`] links at most are open each way: the rest wait. All that blocks happens on one
//! thread, frame by frame.

use std::cell::Cell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capnp_rpc::{RpcSystem, rpc_twoparty_capnp, twoparty};
use fleece_schema::peer_capnp::{PEER_PROTOCOL, greeting, peer};
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, SemaphorePermit, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

use super::MESSAGE_WORDS;
use super::blocking::blocking;
use super::tls::{Identity, proves};
use crate::cluster::outbox::FrameNumber;
use crate::cluster::{Caller, Cluster, Instance, SILENCE, Welcome};
use crate::error::{Context as _, Error, Kind, Result};
use crate::hosts::{self, HostReport};
use crate::ids::{HostId, StoreId};
use crate::session::Context;

/// Frames on their way to one host: enough to hide a round trip.
const IN_FLIGHT: usize = 4;
/// How long a connection may take, with its greeting, and a frame until it is taken: longer than a turn
/// of all others.
const PATIENCE: Duration = Duration::from_secs(20);
/// Links at a time, each way: with TLS each takes some 100 KiB here and as much in the kernel.
const LINKS: usize = 16;
/// Between two signs of life on a link that has nothing else to say. One that is not needed any more
/// ends after as long: what comes next often comes at once.
const IDLE: Duration = Duration::from_secs(2);
/// A link ends after as long where other hosts wait for its place: of 255 hosts each then has its turn
/// every 16 s, about twice before it would be given up.
const TURN: Duration = Duration::from_secs(1);
/// How long a host may take to say how it is: its owner may be in the middle of a pass.
const REPORT: Duration = Duration::from_secs(5);
/// Before a link is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// Frames that wait for the thread that takes them.
const QUEUE: usize = 4;

/// A frame that came.
struct Arrived {
    caller: Caller,
    number: FrameNumber,
    frame: Vec<u8>,
    taken: oneshot::Sender<Result<()>>,
}

/// This engine among the others.
pub struct Peers {
    cluster: Arc<Cluster>,
    context: Context,
    /// Our name, which our certificate proves.
    name: String,
    store: StoreId,
    identity: Identity,
    arrived: mpsc::Sender<Arrived>,
    outgoing: Places,
    incoming: Arc<Semaphore>,
    looking: Arc<Semaphore>,
}

/// Places of links to other hosts.
struct Places {
    places: Semaphore,
    /// Hosts that wait for one.
    waiting: Cell<usize>,
}

impl Places {
    fn new(count: usize) -> Self {
        Places { places: Semaphore::new(count), waiting: Cell::new(0) }
    }

    /// Waits for one, in the order of those who wait.
    async fn take(&self) -> Result<SemaphorePermit<'_>> {
        self.waiting.set(self.waiting.get() + 1);
        let place = self.places.acquire().await;
        self.waiting.set(self.waiting.get() - 1);
        place.map_err(|_| Error::new(Kind::Failed, "the engine is ending"))
    }

    fn are_wanted(&self) -> bool {
        self.waiting.get() > 0
    }
}

impl Peers {
    /// Reads what this host proves itself with, and starts the thread that takes frames.
    ///
    /// # Errors
    /// [`Kind::Key`] for a bad bundle; when no thread can be started.
    pub fn start(
        cluster: Arc<Cluster>,
        context: Context,
        name: &str,
        bundle: &std::path::Path,
    ) -> Result<Rc<Self>> {
        let identity = Identity::load(bundle)?;
        let (arrived, mut queue) = mpsc::channel::<Arrived>(QUEUE);
        let taker = Arc::clone(&cluster);
        std::thread::Builder::new()
            .name("peers".into())
            .spawn(move || {
                while let Some(Arrived { caller, number, frame, taken }) = queue.blocking_recv() {
                    let _ = taken.send(taker.take(caller, number, &frame));
                }
            })
            .context(|| "cannot start the thread that takes frames".into())?;
        let (name, store) = (name.to_owned(), context.store.id());
        Ok(Rc::new(Peers {
            cluster,
            context,
            name,
            store,
            identity,
            arrived,
            outgoing: Places::new(LINKS),
            incoming: Arc::new(Semaphore::new(LINKS)),
            looking: Arc::new(Semaphore::new(1)),
        }))
    }

    /// Keeps a link to every other host, rung by `bells`, and takes theirs at `listen`, for ever.
    /// Runs on a `LocalSet`.
    ///
    /// # Errors
    /// When nobody can listen there.
    pub async fn run(self: Rc<Self>, listen: &str, bells: &[Arc<Notify>]) -> Result<()> {
        let failed = || format!("cannot listen for other hosts at {listen}");
        let listener = TcpListener::bind(listen).await.context(failed)?;
        let mut links = HashMap::new();
        let mut second = tokio::time::interval(Duration::from_secs(1));
        loop {
            // Who comes later waits in the kernel, without memory of ours.
            let place = Arc::clone(&self.incoming).acquire_owned();
            tokio::select! {
                accepted = async { (place.await, listener.accept().await) } => match accepted {
                    (place, Ok((stream, from))) => {
                        let serve = Rc::clone(&self).serve(stream, from);
                        tokio::task::spawn_local(async move {
                            let _place = place;
                            serve.await;
                        });
                    }
                    (_, Err(error)) => {
                        eprintln!("fleece-engine: accept: {error}");
                        tokio::time::sleep(AGAIN).await;
                    }
                },
                _ = second.tick() => {
                    self.look();
                    self.keep_links(&mut links, bells);
                }
            }
        }
    }

    /// Has hosts given up that are silent; one look at a time, as it may wait for the owner.
    fn look(self: &Rc<Self>) {
        if let Ok(looking) = Arc::clone(&self.looking).try_acquire_owned() {
            let cluster = Arc::clone(&self.cluster);
            tokio::task::spawn_local(async move {
                let _looking = looking;
                let looked = blocking(move || {
                    cluster.look();
                    Ok(())
                });
                if let Err(error) = looked.await {
                    eprintln!("fleece-engine: {error}");
                }
            });
        }
    }

    /// One task for each of the hosts that there are now.
    fn keep_links(
        self: &Rc<Self>,
        links: &mut HashMap<HostId, JoinHandle<()>>,
        bells: &[Arc<Notify>],
    ) {
        let hosts = self.cluster.others();
        links.retain(|host, task| {
            let stays = hosts.contains(host);
            if !stays {
                task.abort();
            }
            stays
        });
        for host in hosts {
            links.entry(host).or_insert_with(|| {
                let bell = bells.get(usize::from(host.0)).cloned().unwrap_or_default();
                tokio::task::spawn_local(keep_link(Rc::clone(self), host, bell))
            });
        }
    }

    fn greet(&self, ours: Instance, mut greeting: greeting::Builder<'_>) {
        let map = self.cluster.map();
        greeting.set_host(&self.name);
        greeting.set_store(self.store.0.as_bytes());
        greeting.set_map_digest(map.digest());
        greeting.set_instance(ours.0);
        greeting.set_protocol(PEER_PROTOCOL);
        greeting.set_version(env!("CARGO_PKG_VERSION"));
    }

    /// Who greets; an error says what does not fit.
    fn greeted(&self, greeting: greeting::Reader<'_>) -> capnp::Result<(HostId, Instance)> {
        let name = greeting.get_host()?.to_str()?;
        let refused = |what: String| Err(capnp::Error::failed(what));
        if greeting.get_protocol() != PEER_PROTOCOL {
            let (theirs, version) = (greeting.get_protocol(), greeting.get_version()?.to_str()?);
            return refused(format!(
                "{name} runs {version} and speaks protocol {theirs}, this engine {PEER_PROTOCOL}"
            ));
        }
        if greeting.get_store()? != self.store.0.as_bytes() {
            return refused(format!("{name} has another store"));
        }
        let map = self.cluster.map();
        if greeting.get_map_digest() != map.digest() {
            return refused(format!("{name} has another list of hosts in cluster.static"));
        }
        match map.host(name).filter(|host| *host != self.cluster.us()) {
            Some(host) => Ok((host, Instance(greeting.get_instance()))),
            None => refused(format!("{name} is no other host of this cluster")),
        }
    }

    async fn serve(self: Rc<Self>, stream: TcpStream, from: SocketAddr) {
        let accepted = timeout(PATIENCE, self.identity.acceptor.accept(stream)).await;
        let Ok(Ok(stream)) = accepted else {
            eprintln!("fleece-engine: {from} has no certificate of this cluster");
            return;
        };
        let shown = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec);
        let heard = Rc::new(Cell::new(Instant::now()));
        let server = Server { peers: self, shown, caller: Cell::new(None), heard: heard.clone() };
        let client: peer::Client = capnp_rpc::new_client(server);
        let (read, write) = tokio::io::split(stream);
        let network = network(read, write, rpc_twoparty_capnp::Side::Server);
        let system = RpcSystem::new(Box::new(network), Some(client.client));
        let silent = async {
            while heard.get().elapsed() < SILENCE {
                tokio::time::sleep(IDLE).await;
            }
        };
        // A link that ends is made again by the other side. One whose host is gone would keep its place.
        tokio::select! {
            _ = system => {}
            () = silent => {}
        }
    }
}

/// What one host may call.
struct Server {
    peers: Rc<Peers>,
    shown: Option<Vec<rustls::pki_types::CertificateDer<'static>>>,
    caller: Cell<Option<Caller>>,
    /// When it called last: whoever is there gives signs of life.
    heard: Rc<Cell<Instant>>,
}

impl peer::Server for Server {
    async fn greet(
        self: Rc<Self>,
        params: peer::GreetParams,
        mut results: peer::GreetResults,
    ) -> capnp::Result<()> {
        let greeting = params.get()?.get_us()?;
        if !proves(self.shown.as_deref(), greeting.get_host()?.to_str()?) {
            return Err(capnp::Error::failed("the certificate is another host's".into()));
        }
        let (host, instance) = self.peers.greeted(greeting)?;
        // It may have to tell the owner of sessions that are gone.
        let (cluster, caller) = (Arc::clone(&self.peers.cluster), Caller { host, instance });
        let welcome = blocking(move || Ok(cluster.greeted(caller))).await?;
        self.caller.set(Some(caller));
        results.get().set_received(welcome.received.0);
        results.get().set_unreached(welcome.unreached);
        self.peers.greet(self.peers.cluster.instance(host), results.get().init_you());
        Ok(())
    }

    async fn deliver(
        self: Rc<Self>,
        params: peer::DeliverParams,
        _: peer::DeliverResults,
    ) -> capnp::Result<()> {
        let Some(caller) = self.caller.get() else {
            return Err(capnp::Error::failed("greet first".into()));
        };
        self.heard.set(Instant::now());
        let (number, frame) = (params.get()?.get_number(), params.get()?.get_frame()?.to_vec());
        if number == 0 {
            return self.peers.cluster.hears(caller).map_err(|error| super::to_wire(&error));
        }
        let (taken, outcome) = oneshot::channel();
        let number = FrameNumber(number);
        let ending = |_| capnp::Error::failed("the engine is ending".into());
        let arrived = Arrived { caller, number, frame, taken };
        self.peers.arrived.send(arrived).await.map_err(|_| ending(()))?;
        outcome.await.map_err(|_| ending(()))?.map_err(|error| super::to_wire(&error))
    }

    async fn describe(
        self: Rc<Self>,
        _: peer::DescribeParams,
        mut results: peer::DescribeResults,
    ) -> capnp::Result<()> {
        if self.caller.get().is_none() {
            return Err(capnp::Error::failed("greet first".into()));
        }
        let context = self.peers.context.clone();
        let report = blocking(move || hosts::own(&context)).await?;
        let text = serde_json::to_string(&report).map_err(|e| capnp::Error::failed(e.to_string()));
        results.get().set_report(text?);
        Ok(())
    }
}

fn network<R, W>(
    read: R,
    write: W,
    side: rpc_twoparty_capnp::Side,
) -> twoparty::VatNetwork<impl futures::AsyncRead + Unpin>
where
    R: AsyncRead + Unpin + 'static,
    W: AsyncWrite + Unpin + 'static,
{
    let mut options = capnp::message::ReaderOptions::new();
    options.traversal_limit_in_words(Some(MESSAGE_WORDS));
    twoparty::VatNetwork::new(
        futures::io::BufReader::new(read.compat()),
        futures::io::BufWriter::new(write.compat_write()),
        side,
        options,
    )
}

/// Makes a link to a host whenever one is needed, for ever.
async fn keep_link(peers: Rc<Peers>, host: HostId, bell: Arc<Notify>) {
    let mut said = String::new();
    loop {
        while !peers.cluster.needs(host) {
            // Answers that are awaited ring no bell.
            let _ = timeout(AGAIN, bell.notified()).await;
        }
        let Ok(_place) = peers.outgoing.take().await else { return };
        let ended = link(&peers, host, &bell).await;
        match ended {
            Ok(()) => said.clear(),
            Err(error) => {
                peers.cluster.disconnected(host);
                // Once for each reason: a host may be away for days.
                let why = error.to_string();
                if why != said {
                    eprintln!("fleece-engine: {why}");
                    said = why;
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// One link, until it is not needed any more or breaks.
async fn link(peers: &Peers, host: HostId, bell: &Notify) -> Result<()> {
    let ours = peers.cluster.instance(host);
    with_host(peers, (host, ours), async |client, instance, welcome| {
        if welcome.unreached {
            peers.cluster.unreached(host, instance);
            let what = format!("{} cannot reach this host", peers.name_of(host));
            return Err(Error::new(Kind::Failed, format!("{what}: see its log")));
        }
        let next = peers.cluster.connected((host, ours), instance, welcome.received)?;
        send(peers, (host, ours), &client, bell, next).await
    })
    .await
}

/// Connects to a host, and runs `work` with it.
async fn with_host<T>(
    peers: &Peers,
    (host, ours): (HostId, Instance),
    work: impl AsyncFnOnce(peer::Client, Instance, Welcome) -> Result<T>,
) -> Result<T> {
    let map = peers.cluster.map();
    let gone = || Error::new(Kind::NotFound, format!("host {} is not in the cluster", host.0));
    let member = map.member(host).ok_or_else(gone)?;
    let what = || format!("no link to {} at {}", member.name, member.address);
    let late = || Error::new(Kind::Failed, format!("{}: no answer", what()));
    let name = ServerName::try_from(member.name.clone()).context(what)?;
    let connect = async {
        let stream = TcpStream::connect(&member.address).await?;
        stream.set_nodelay(true)?;
        peers.identity.connector.connect(name, stream).await
    };
    let stream = timeout(PATIENCE, connect).await.map_err(|_| late())?.context(what)?;
    let (read, write) = tokio::io::split(stream);
    let network = network(read, write, rpc_twoparty_capnp::Side::Client);
    let mut system = RpcSystem::new(Box::new(network), None);
    let client: peer::Client = system.bootstrap(rpc_twoparty_capnp::Side::Server);
    let talk = async {
        let mut request = client.greet_request();
        peers.greet(ours, request.get().init_us());
        let answer = timeout(PATIENCE, request.send().promise).await.map_err(|_| late())?;
        let answer = answer.map_err(|error| Error::caused(Kind::Failed, what(), error))?;
        let (instance, welcome) = greeting_of(peers, host, &answer)
            .map_err(|error| Error::caused(Kind::Failed, what(), error))?;
        work(client.clone(), instance, welcome).await
    };
    let broken = |error: Option<capnp::Error>| match error {
        Some(error) => Error::caused(Kind::Failed, what(), error),
        None => Error::new(Kind::Failed, format!("{}: it hung up", what())),
    };
    tokio::select! {
        ended = &mut system => Err(broken(ended.err())),
        ended = talk => ended,
    }
}

impl Peers {
    fn name_of(&self, host: HostId) -> String {
        let map = self.cluster.map();
        map.member(host).map_or_else(|| format!("host {}", host.0), |member| member.name.clone())
    }

    /// How it is with all hosts, this one first; one that does not answer in time is silent.
    ///
    /// # Errors
    /// When the engine is ending.
    pub(super) async fn reports(&self) -> capnp::Result<Vec<HostReport>> {
        let context = self.context.clone();
        let own = blocking(move || hosts::own(&context)).await?;
        let others = hosts::known(&self.context).into_iter().skip(1);
        let asked = others.map(|known| async {
            match timeout(REPORT, self.report(HostId(known.number))).await {
                // What it says of itself but what we know of the map.
                Ok(Ok(report)) => HostReport { state: "answers".into(), ..report },
                _ => known,
            }
        });
        let others = futures::stream::iter(asked).buffered(LINKS).collect::<Vec<_>>().await;
        Ok(std::iter::once(own).chain(others).collect())
    }

    async fn report(&self, host: HostId) -> Result<HostReport> {
        let failed = |error: capnp::Error| super::from_wire(&error);
        with_host(self, (host, self.cluster.instance(host)), async |client, _, _| {
            let answer = client.describe_request().send().promise.await.map_err(failed)?;
            let text = answer.get().and_then(|answer| answer.get_report()).map_err(failed)?;
            serde_json::from_slice(text.as_bytes())
                .map_err(|error| Error::caused(Kind::Failed, "a host's report", error))
        })
        .await
    }
}

fn greeting_of(
    peers: &Peers,
    host: HostId,
    answer: &capnp::capability::Response<peer::greet_results::Owned>,
) -> capnp::Result<(Instance, Welcome)> {
    let answer = answer.get()?;
    let (who, instance) = peers.greeted(answer.get_you()?)?;
    if who != host {
        return Err(capnp::Error::failed("another host answers there".into()));
    }
    let received = FrameNumber(answer.get_received());
    Ok((instance, Welcome { received, unreached: answer.get_unreached() }))
}

/// Sends what waits, some frames ahead of what was taken.
async fn send(
    peers: &Peers,
    (host, ours): (HostId, Instance),
    client: &peer::Client,
    bell: &Notify,
    mut next: FrameNumber,
) -> Result<()> {
    let mut in_flight = FuturesOrdered::new();
    let begun = Instant::now();
    let mut needed = begun;
    loop {
        let enough = begun.elapsed() > TURN && peers.outgoing.are_wanted();
        if enough && in_flight.is_empty() {
            return Ok(());
        }
        while !enough
            && in_flight.len() < IN_FLIGHT
            && let Some((number, frame)) = peers.cluster.next((host, ours), next)?
        {
            next = FrameNumber(number.0 + 1);
            in_flight.push_back(deliver(client, number, &frame));
        }
        tokio::select! {
            Some(taken) = in_flight.next(), if !in_flight.is_empty() => {
                peers.cluster.taken((host, ours), taken?)?;
            }
            () = bell.notified(), if !enough && in_flight.len() < IN_FLIGHT => {}
            () = tokio::time::sleep(TURN), if in_flight.is_empty() => {
                if peers.outgoing.are_wanted() {
                    continue;
                }
                if peers.cluster.needs(host) {
                    needed = Instant::now();
                    in_flight.push_back(deliver(client, FrameNumber(0), &[]));
                } else if needed.elapsed() > IDLE {
                    return Ok(());
                }
            }
        }
    }
}

fn deliver(
    client: &peer::Client,
    number: FrameNumber,
    frame: &[u8],
) -> impl Future<Output = Result<FrameNumber>> + use<> {
    let mut request = client.deliver_request();
    request.get().set_number(number.0);
    request.get().set_frame(frame);
    let answer = request.send().promise;
    async move {
        match timeout(PATIENCE, answer).await {
            Ok(Ok(_)) => Ok(number),
            Ok(Err(error)) => Err(super::from_wire(&error)),
            Err(_) => Err(Error::new(Kind::Failed, "a frame was not taken in time")),
        }
    }
}
