//! This engine among the others: what they call, and who may. Links to them are in [`super::links`].
//!
//! Each host calls another one while it has something to send to it, or waits for its answers. However
//! many hosts there are, [`LINKS`] links at most are open each way: the rest wait. All that blocks happens
//! on one thread, frame by frame.

use std::cell::Cell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capnp_rpc::{RpcSystem, rpc_twoparty_capnp, twoparty};
use fleece_schema::peer_capnp::{OLDEST_PEER_PROTOCOL, PEER_PROTOCOL, greeting, peer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

use super::MESSAGE_WORDS;
use super::blocking::{blocking, long};
use super::links::{Places, keep_link};
use super::protocol::{Speaker, Spoken};
use super::reports::to_json;
use super::tls::{Files, Identity, is_of_revoked, proves};
use crate::cluster::outbox::FrameNumber;
use crate::cluster::{Caller, Cluster, Instance, SILENCE};
use crate::config::ClusterConfig;
use crate::error::{Context as _, Error, Kind, Result};
use crate::hosts;
use crate::ids::{HostId, StoreId};
use crate::session::Context;
use crate::store::format::random;

/// How long a connection may take, with its greeting, and a frame until it is taken: longer than a turn
/// of all others.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// Links at a time, each way: with TLS each takes some 100 KiB here and as much in the kernel.
pub(super) const LINKS: usize = 16;
/// A link that is not needed any more ends after as long: what comes next often comes at once.
pub(super) const IDLE: Duration = Duration::from_secs(2);
/// Between two looks at the list of revoked certificates.
const LOOK: Duration = Duration::from_secs(1);
/// Before a link is tried again.
pub(super) const AGAIN: Duration = Duration::from_secs(1);
/// Bytes of a message's head, or of a short one, that are read or written together: TLS has its own buffers.
const BUFFER: usize = 1 << 10;
/// Frames that wait for the thread that takes them.
const QUEUE: usize = 4;

/// What engines say to one another.
const SPOKEN: Spoken = Spoken { oldest: OLDEST_PEER_PROTOCOL, newest: PEER_PROTOCOL };

/// What a host is told whose own certificate was taken back.
const REVOKED: &str = "this host's certificate is revoked, no other one talks to it (fleecectl cluster invite makes a new one)";

/// A frame that came.
struct Arrived {
    caller: Caller,
    number: FrameNumber,
    frame: Vec<u8>,
    taken: oneshot::Sender<Result<()>>,
}

/// This engine among the others.
pub struct Peers {
    pub(super) cluster: Arc<Cluster>,
    pub(super) context: Context,
    /// Our name, which our certificate proves.
    pub(super) name: String,
    /// This process, as it knows itself.
    pub(super) engine: Instance,
    /// A list says who is in the cluster.
    pub(super) listed: bool,
    store: StoreId,
    files: Files,
    /// Every link ends when it changes.
    pub(super) identity: watch::Sender<Rc<Identity>>,
    /// Who was refused last, and whether its certificate is a revoked one.
    refused: Cell<Option<(IpAddr, bool)>>,
    arrived: mpsc::Sender<Arrived>,
    /// One question to all hosts at a time.
    pub(super) asking: Semaphore,
    pub(super) outgoing: Places,
    incoming: Arc<Semaphore>,
    looking: Arc<Semaphore>,
}

impl Peers {
    /// Reads what this host proves itself with, and starts the thread that takes frames.
    ///
    /// # Errors
    /// [`Kind::Key`] for a bad bundle or list of revoked certificates, [`Kind::NotPermitted`] when this
    /// host's is on it; when no thread can be started.
    pub fn start(
        cluster: Arc<Cluster>,
        context: Context,
        settings: &ClusterConfig,
    ) -> Result<Rc<Self>> {
        let files = Files::of(settings);
        let identity = Identity::load(&files)?;
        if identity.is_revoked {
            return Err(Error::new(Kind::NotPermitted, REVOKED));
        }
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
        let (name, store, asking) = (settings.name.clone(), context.store.id(), Semaphore::new(1));
        let identity = watch::Sender::new(Rc::new(identity));
        let listed = settings.etcd.is_empty();
        Ok(Rc::new(Peers {
            cluster,
            context,
            name,
            engine: Instance(u64::from_le_bytes(random()?)),
            listed,
            store,
            files,
            identity,
            refused: Cell::new(None),
            arrived,
            asking,
            outgoing: Places::new(LINKS),
            incoming: Arc::new(Semaphore::new(LINKS)),
            looking: Arc::new(Semaphore::new(1)),
        }))
    }

    /// Keeps a link to every other host, rung by `bells`, and takes theirs at `listen`, for ever.
    /// Runs on a `LocalSet`.
    ///
    /// # Errors
    /// When nobody can listen there; [`Kind::Busy`] when another engine is this host.
    pub async fn run(self: Rc<Self>, listen: &str, bells: &[Arc<Notify>]) -> Result<()> {
        let failed = || format!("cannot listen for other hosts at {listen}");
        let listener = TcpListener::bind(listen).await.context(failed)?;
        tokio::task::spawn_local(Rc::clone(&self).follow_revocations());
        let mut links = HashMap::new();
        let mut second = tokio::time::interval(Duration::from_secs(1));
        let mut fence = Box::pin(Rc::clone(&self).fence());
        loop {
            // Who comes later waits in the kernel, without memory of ours.
            let place = Arc::clone(&self.incoming).acquire_owned();
            tokio::select! {
                another = &mut fence => return Err(another),
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
                    if self.cluster.is_sure() {
                        self.keep_links(&mut links, bells);
                    }
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

    /// Looks whether other certificates are revoked now, for ever. If so, every link is made anew.
    async fn follow_revocations(self: Rc<Self>) {
        let mut said = String::new();
        loop {
            tokio::time::sleep(LOOK).await;
            let (files, list) = (self.files.clone(), self.identity.borrow().list);
            // Not after calls that wait for the store.
            match long(move || Identity::renewed(&files, list)).await {
                Ok(None) => said.clear(),
                Ok(Some(identity)) => {
                    let us = if identity.is_revoked { REVOKED } else { "all links are made anew" };
                    eprintln!("fleece-engine: the list of revoked certificates has changed: {us}");
                    self.identity.send_replace(Rc::new(identity));
                }
                Err(error) => {
                    let why = super::from_wire(&error).to_string();
                    if why != said {
                        eprintln!("fleece-engine: {why}; on with what it said before");
                        said = why;
                    }
                }
            }
        }
    }

    /// Says once that somebody is no host of this cluster: it may try every second, for days.
    fn refuse(&self, from: SocketAddr, revoked: bool) {
        let who = Some((from.ip(), revoked));
        if self.refused.replace(who) != who {
            let what =
                if revoked { "a revoked certificate" } else { "no certificate of this cluster" };
            eprintln!("fleece-engine: {from} has {what}");
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

    pub(super) fn greet(&self, ours: Instance, mut greeting: greeting::Builder<'_>) {
        let map = self.cluster.map();
        greeting.set_host(&self.name);
        greeting.set_store(self.store.0.as_bytes());
        greeting.set_map_digest(map.digest());
        greeting.set_instance(ours.0);
        greeting.set_protocol(SPOKEN.oldest);
        greeting.set_newest_protocol(SPOKEN.newest);
        greeting.set_version(env!("CARGO_PKG_VERSION"));
    }

    /// Who greets; an error says what does not fit.
    pub(super) fn greeted(
        &self,
        greeting: greeting::Reader<'_>,
    ) -> capnp::Result<(HostId, Instance)> {
        let name = greeting.get_host()?.to_str()?;
        let refused = |what: String| Err(capnp::Error::failed(what));
        let theirs = Spoken::said(greeting.get_protocol(), greeting.get_newest_protocol());
        let version = greeting.get_version()?.to_str()?;
        let us = Speaker { name: &self.name, version: env!("CARGO_PKG_VERSION"), speaks: SPOKEN };
        let them = Speaker { name, version, speaks: theirs };
        let agreed = us.agrees_with(&them).map_err(capnp::Error::failed)?;
        if greeting.get_store()? != self.store.0.as_bytes() {
            return refused(format!("{name} has another store"));
        }
        let map = self.cluster.map();
        if greeting.get_map_digest() != map.digest() {
            return refused(format!("{name} has another list of hosts in cluster.static"));
        }
        match map.host(name) {
            Some(host) => {
                self.cluster.speaks(host, agreed);
                Ok((host, Instance(greeting.get_instance())))
            }
            None => refused(format!("{name} is no host of this cluster")),
        }
    }

    async fn serve(self: Rc<Self>, stream: TcpStream, from: SocketAddr) {
        let mut identity = self.identity.subscribe();
        let acceptor = identity.borrow_and_update().acceptor.clone();
        // Answers are short: they would wait for what was sent before to be acknowledged.
        let _ = stream.set_nodelay(true);
        let stream = match timeout(PATIENCE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return self.refuse(from, is_of_revoked(&error)),
            Err(_) => return self.refuse(from, false),
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
            _ = identity.changed() => {}
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

impl Server {
    /// Who calls. Nobody gets anything before.
    fn greeted(&self) -> capnp::Result<Caller> {
        self.caller.get().ok_or_else(|| capnp::Error::failed("greet first".into()))
    }
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
        if host == self.peers.cluster.us() {
            // Its own fence, or another engine's of this name: it hears who is here, and no more.
            self.peers.greet(self.peers.engine, results.get().init_you());
            return Ok(());
        }
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
        let caller = self.greeted()?;
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
        self.greeted()?;
        let context = self.peers.context.clone();
        let report = blocking(move || hosts::own(&context)).await?;
        results.get().set_report(to_json(&report)?);
        Ok(())
    }

    async fn sessions(
        self: Rc<Self>,
        _: peer::SessionsParams,
        mut results: peer::SessionsResults,
    ) -> capnp::Result<()> {
        self.greeted()?;
        results.get().set_sessions(to_json(&hosts::sessions(&self.peers.context))?);
        Ok(())
    }
}

pub(super) fn network<R, W>(
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
        futures::io::BufReader::with_capacity(BUFFER, read.compat()),
        futures::io::BufWriter::with_capacity(BUFFER, write.compat_write()),
        side,
        options,
    )
}
