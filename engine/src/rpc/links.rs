//! Links to other hosts: made when something waits for one, and what goes over them.
//!
//! A link that breaks is made again, and goes on with the first frame that was not taken. Where more hosts
//! wait than there are places, each link has its turn.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capnp_rpc::{RpcSystem, rpc_twoparty_capnp};
use fleece_schema::peer_capnp::peer;
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::peers::{AGAIN, IDLE, PATIENCE, Peers, network};
use super::tls::is_of_revoked;
use crate::cluster::outbox::FrameNumber;
use crate::cluster::{Instance, Welcome};
use crate::error::{Context as _, Error, Kind, Result};
use crate::ids::HostId;

/// Frames on their way to one host: enough to hide a round trip, where there are few hosts.
const IN_FLIGHT: usize = 4;
/// The same to all hosts, but for one on each link: on both sides they are in memory besides the outboxes.
const ALL_IN_FLIGHT: usize = 8;
/// A link ends after as long where other hosts wait for its place: of 255 hosts each then has its turn
/// every 16 s, about twice before it would be given up. On one that has nothing else to say, between two
/// signs of life.
const TURN: Duration = Duration::from_secs(1);

/// A link over which nothing went for so long leaves its place at the other host to whoever has something to
/// say; that the other one is there is seen when the next link is made.
const PATIENT: Duration = Duration::from_secs(5);

/// Places of links to other hosts.
pub(super) struct Places {
    places: Semaphore,
    /// Hosts that wait for one.
    waiting: Cell<usize>,
}

impl Places {
    pub(super) fn new(count: usize) -> Self {
        Places { places: Semaphore::new(count), waiting: Cell::new(0) }
    }

    /// Waits for one, in the order of those who wait.
    async fn take(&self) -> Result<SemaphorePermit<'_>> {
        let _waiting = Waiting::new(&self.waiting);
        let place = self.places.acquire().await;
        place.map_err(|_| Error::new(Kind::Failed, "the engine is ending"))
    }

    fn are_wanted(&self) -> bool {
        self.waiting.get() > 0
    }
}

/// Counted as long as it is there: a task that waits may be ended at any moment.
struct Waiting<'c>(&'c Cell<usize>);

impl<'c> Waiting<'c> {
    fn new(count: &'c Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// How a link ended that did not break.
enum Ended {
    /// It is not needed, or others need its place.
    Done,
    /// All that is left is to wait for answers, which come by a link of the other host.
    OnlyWaits,
    /// The other host cannot reach this one.
    Unreached,
}

/// Makes a link to a host whenever one is needed, for ever.
pub(super) async fn keep_link(peers: Rc<Peers>, host: HostId, bell: Arc<Notify>) {
    let mut said = String::new();
    loop {
        while !peers.cluster.needs(host) {
            // Answers that are awaited ring no bell.
            let _ = timeout(AGAIN, bell.notified()).await;
        }
        let ended = {
            let Ok(_place) = peers.outgoing.take().await else { return };
            // Apart, as there are fewer links than hosts.
            Box::pin(link(&peers, host, &bell)).await
        };
        let why = match ended {
            Ok(Ended::Done) => {
                said.clear();
                continue;
            }
            Ok(Ended::OnlyWaits) => String::new(),
            // It was reached, which is what it has to hear.
            Ok(Ended::Unreached) => format!("host {} cannot reach this one: see its log", host.0),
            Err(error) => {
                peers.cluster.disconnected(host);
                error.to_string()
            }
        };
        // Once for each reason: a host may be away for days.
        if why != said && !why.is_empty() {
            eprintln!("fleece-engine: {why}");
        }
        said = why;
        tokio::time::sleep(AGAIN).await;
    }
}

/// One link, until it is not needed any more or breaks.
async fn link(peers: &Peers, host: HostId, bell: &Notify) -> Result<Ended> {
    let ours = peers.cluster.instance(host);
    with_host(peers, (host, ours), async |client, instance, welcome| {
        if welcome.unreached {
            peers.cluster.unreached(host, instance);
            return Ok(Ended::Unreached);
        }
        let next = peers.cluster.connected((host, ours), instance, welcome.received)?;
        send(peers, (host, ours), &client, bell, next).await
    })
    .await
}

/// Connects to a host, and runs `work` with it. [`Kind::NotPermitted`] if its certificate is revoked.
pub(super) async fn with_host<T>(
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
    let mut identity = peers.identity.subscribe();
    let connector = identity.borrow_and_update().connector.clone();
    let connect = async {
        let stream = TcpStream::connect(&member.address).await?;
        stream.set_nodelay(true)?;
        connector.connect(name, stream).await
    };
    let connected = timeout(PATIENCE, connect).await.map_err(|_| late())?;
    let stream = connected.map_err(|error| {
        let revoked = is_of_revoked(&error);
        if revoked {
            peers.cluster.refuse(host);
        }
        let kind = if revoked { Kind::NotPermitted } else { Kind::Failed };
        Error::caused(kind, what(), error)
    })?;
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
        _ = identity.changed() => {
            let why = "other certificates are revoked now, it is made anew";
            Err(Error::new(Kind::Failed, format!("{}: {why}", what())))
        }
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
) -> Result<Ended> {
    let mut in_flight = FuturesOrdered::new();
    let most = (ALL_IN_FLIGHT / peers.cluster.others().len().max(1)).clamp(1, IN_FLIGHT);
    let begun = Instant::now();
    let (mut needed, mut spoken) = (begun, begun);
    loop {
        let enough = begun.elapsed() > TURN && peers.outgoing.are_wanted();
        if enough && in_flight.is_empty() {
            return Ok(Ended::Done);
        }
        while !enough
            && in_flight.len() < most
            && let Some((number, frame)) = peers.cluster.next((host, ours), next)?
        {
            (next, spoken) = (FrameNumber(number.0 + 1), Instant::now());
            in_flight.push_back(deliver(client, number, &frame));
        }
        tokio::select! {
            Some(taken) = in_flight.next(), if !in_flight.is_empty() => {
                peers.cluster.taken((host, ours), taken?)?;
            }
            () = bell.notified(), if !enough && in_flight.len() < most => {}
            () = tokio::time::sleep(TURN), if in_flight.is_empty() => {
                if peers.outgoing.are_wanted() {
                    continue;
                }
                if !peers.cluster.needs(host) {
                    if needed.elapsed() > IDLE {
                        return Ok(Ended::Done);
                    }
                    continue;
                }
                needed = Instant::now();
                if spoken.elapsed() > PATIENT {
                    return Ok(Ended::OnlyWaits);
                }
                in_flight.push_back(deliver(client, FrameNumber(0), &[]));
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
