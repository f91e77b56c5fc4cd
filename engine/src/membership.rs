//! Who is in the cluster, by etcd: the only file that knows it.
//!
//! | key below `fleece/<store>/` | says | lives |
//! |---|---|---|
//! | `hosts/<name>` | where its engine listens, and its capacity | with the engine's lease |
//! | `drained/<name>` | it shall own nothing | until it is taken back |
//! | `map` | the partition map | for ever; it is replaced by a transaction on its revision |
//!
//! Every engine looks once a second. Whoever sees that the map does not fit the hosts computes the next
//! one and tries to put it; etcd lets one of them win, and all compute the same. With etcd away
//! everybody goes on with the map that it has, an engine that starts with the one it had last.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, GetOptions, LeaseKeepAliveStream, LeaseKeeper,
    PutOptions, TlsOptions, Txn, TxnOp,
};
use rustls::RootCertStore;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::cluster::Cluster;
use crate::cluster::map::{MAX_HOSTS, MapEpoch, Member, PartitionMap};
use crate::config::ClusterConfig;
use crate::error::{Context as _, Error, Kind, Result};
use crate::ids::{HostId, Incarnation, StoreId};
use crate::pem::Pem;

/// A host that says nothing for so long is out: longer than an engine needs to start anew.
const LEASE: Duration = Duration::from_secs(15);
/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// One request to etcd.
const PATIENCE: Duration = Duration::from_secs(5);
/// An engine that starts waits so long for another one that was this host, but for the lease of that one
/// to end.
const SUCCEED: Duration = Duration::from_secs(LEASE.as_secs() + 5);
/// An engine that starts waits so long for etcd before it takes the map that it had last.
const START: Duration = Duration::from_secs(10);
/// Transactions that an engine may lose in a row before it looks again a second later.
const TRIES: usize = 8;

/// The partition map, as it is kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Document {
    version: u32,
    epoch: MapEpoch,
    hosts: Vec<Member>,
    /// The number of every host that was ever in: sessions carry it, so nobody else gets it.
    numbers: BTreeMap<String, HostId>,
}

/// Documents of this version are read.
const VERSION: u32 = 1;

/// What a host says of itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Announcement {
    address: String,
    capacity: u32,
    /// Which engine: the incarnation in which it numbers containers, that no other one has.
    #[serde(default)]
    engine: Incarnation,
}

/// What is in etcd.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Seen {
    hosts: BTreeMap<String, Announcement>,
    drained: BTreeSet<String>,
    /// With its revision, 0 for none.
    map: Option<Document>,
    revision: i64,
}

impl Seen {
    fn must_know(&self, host: &str) -> Result<()> {
        if self.hosts.contains_key(host) || self.drained.contains(host) {
            return Ok(());
        }
        Err(Error::new(Kind::NotFound, format!("there is no host {host}")))
    }

    /// The map that fits the hosts; `None` if the one there does.
    fn next(&self) -> Option<Document> {
        let mut numbers = self.map.as_ref().map(|map| map.numbers.clone()).unwrap_or_default();
        let mut hosts = Vec::new();
        for (name, announced) in &self.hosts {
            let number = match numbers.get(name) {
                Some(number) => *number,
                None => {
                    let used: BTreeSet<HostId> = numbers.values().copied().collect();
                    let free = (0..MAX_HOSTS as u16).map(HostId).find(|n| !used.contains(n))?;
                    numbers.insert(name.clone(), free);
                    free
                }
            };
            let capacity = if self.drained.contains(name) { 0 } else { announced.capacity };
            let (name, address) = (name.clone(), announced.address.clone());
            hosts.push(Member { number, name, address, capacity });
        }
        hosts.sort_by_key(|member| member.number);
        // Somebody has to own everything.
        if hosts.iter().all(|member| member.capacity == 0) {
            return None;
        }
        let before = self.map.as_ref();
        if before.is_some_and(|map| map.hosts == hosts) {
            return None;
        }
        let epoch = MapEpoch(before.map_or(0, |map| map.epoch.0) + 1);
        Some(Document { version: VERSION, epoch, hosts, numbers })
    }
}

impl Document {
    fn map(&self) -> Result<PartitionMap> {
        PartitionMap::at(self.epoch, self.hosts.clone())
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let document: Document = serde_json::from_slice(bytes)
            .map_err(|e| Error::caused(Kind::Failed, "the partition map in etcd", e))?;
        if document.version != VERSION {
            let version = document.version;
            let what = format!("the partition map in etcd is of version {version}");
            return Err(Error::new(Kind::Failed, format!("{what}: upgrade this engine")));
        }
        Ok(document)
    }
}

/// This host's place in the cluster.
#[derive(Clone)]
pub struct Membership {
    settings: ClusterConfig,
    prefix: String,
    announcement: Announcement,
    /// Where the map that we had last is.
    kept: PathBuf,
    /// Dropped when the lease of the start is not needed any more.
    starting: Arc<Mutex<Option<oneshot::Sender<()>>>>,
}

/// A connection to etcd, with our lease.
struct Registered {
    client: Client,
    lease: i64,
    /// Keeps the lease, whatever else takes its time; ends when that fails.
    kept: JoinHandle<()>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.kept.abort();
    }
}

/// Keeps a lease until it has ended, or etcd does not answer.
async fn keep_alive(mut keeper: LeaseKeeper, mut alive: LeaseKeepAliveStream) {
    loop {
        let answer = async {
            keeper.keep_alive().await?;
            alive.message().await
        };
        match timeout(PATIENCE, answer).await {
            Ok(Ok(Some(alive))) if alive.ttl() > 0 => tokio::time::sleep(LEASE / 5).await,
            _ => return,
        }
    }
}

/// Why a request failed: the last cause, such as a certificate's, of which etcd's client tells all that it
/// came through.
fn why(error: &etcd_client::Error) -> String {
    let (mut last, mut cause) = match error {
        etcd_client::Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
        etcd_client::Error::TransportError(error) => (error.to_string(), error.source()),
        other => (other.to_string(), None),
    };
    while let Some(error) = cause {
        last = error.to_string();
        cause = error.source();
    }
    // Its word on that may be lost with the connection.
    if last == "connection closed" || last.contains("fatal alert") {
        last += ": it may be that etcd does not accept this host's certificate";
    }
    last
}

/// How etcd has to prove itself, and how this host does; `None` where they do not.
fn tls(settings: &ClusterConfig) -> Result<Option<TlsOptions>> {
    if !settings.is_etcd_secure() {
        return Ok(None);
    }
    let authority = match &settings.etcd_ca {
        Some(path) => Pem::read(path)?.certificates()?,
        // Behind the host's own.
        None => Pem::read_secret(&settings.identity)?.certificates()?.split_off(1),
    };
    let mut roots = RootCertStore::empty();
    for certificate in authority {
        roots.add(certificate).context(|| "a certificate of etcd's CA".into())?;
    }
    let identity = &settings.identity;
    let own = Pem::read(settings.etcd_certificate.as_ref().unwrap_or(identity))?;
    let key = Pem::read_secret(settings.etcd_key.as_ref().unwrap_or(identity))?;
    own.certificates()?;
    key.key()?;
    let own = etcd_client::Identity::from_pem(own.text(), key.text());
    Ok(Some(TlsOptions::new().trust_anchors(roots.roots).identity(own)))
}

impl Membership {
    /// Whether there is all that etcd is spoken to with.
    ///
    /// # Errors
    /// When a certificate or key cannot be read; [`Kind::Key`] when it is none, or others can read the key.
    pub fn check(config: &ClusterConfig) -> Result<()> {
        tls(config).map(drop)
    }

    /// Of a configuration with `cluster.etcd`; the last map is kept in `state_dir`.
    #[must_use]
    pub fn new(
        config: &ClusterConfig,
        (store, engine): (StoreId, Incarnation),
        state_dir: &Path,
    ) -> Self {
        let address = config.address.clone().unwrap_or_default();
        Membership {
            settings: config.clone(),
            prefix: format!("fleece/{store}/"),
            announcement: Announcement { address, capacity: config.capacity, engine },
            kept: state_dir.join("map.json"),
            starting: Arc::default(),
        }
    }

    /// Joins, and gives the map with this host in it; the one that it had last if etcd does not answer.
    ///
    /// # Errors
    /// When there is neither; [`Kind::Busy`] while another engine is this host.
    pub fn join(&self) -> Result<PartitionMap> {
        let (tell, told) = std::sync::mpsc::channel();
        let (over, is_over) = oneshot::channel();
        *self.starting.lock().unwrap_or_else(PoisonError::into_inner) = Some(over);
        let us = self.clone();
        std::thread::Builder::new()
            .name("lease".into())
            .spawn(move || us.join_and_stay(&tell, is_over))
            .context(|| "cannot start the thread that joins".into())?;
        let joined = told.recv().unwrap_or_else(|_| Err(self.failed("nobody asked it")));
        match joined {
            Ok(document) => {
                self.keep(&document);
                document.map()
            }
            Err(error) if error.kind() == Kind::Busy => Err(error),
            Err(error) => {
                let Ok(bytes) = std::fs::read(&self.kept) else { return Err(error) };
                let document = Document::decode(&bytes)?;
                eprintln!("fleece-engine: {error}; on with the map that was last");
                document.map()
            }
        }
    }

    /// Joins, tells of it, and keeps the lease until [`Membership::run`] has one of its own: reading what
    /// was stored meanwhile may take longer than a lease.
    fn join_and_stay(
        &self,
        tell: &std::sync::mpsc::Sender<Result<Document>>,
        is_over: oneshot::Receiver<()>,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = match runtime.context(|| "cannot start the runtime".into()) {
            Ok(runtime) => runtime,
            Err(error) => return drop(tell.send(Err(error))),
        };
        runtime.block_on(async {
            let begun = Instant::now();
            let joined = loop {
                match Box::pin(self.try_join()).await {
                    Ok(joined) => break Ok(joined),
                    Err(error) => {
                        let is_taken = error.kind() == Kind::Busy;
                        if begun.elapsed() >= if is_taken { SUCCEED } else { START } {
                            break Err(error);
                        }
                        tokio::time::sleep(LOOK).await;
                    }
                }
            };
            match joined {
                Ok((document, _registered)) => {
                    // Whoever waits for it is the engine that starts: if that has ended, so does this.
                    if tell.send(Ok(document)).is_ok() {
                        let _ = is_over.await;
                    }
                }
                Err(error) => drop(tell.send(Err(error))),
            }
        });
    }

    async fn try_join(&self) -> Result<(Document, Registered)> {
        let mut registered = Box::pin(self.register()).await?;
        for _ in 0..TRIES {
            let seen = self.look(&mut registered).await?;
            let ours = self.kept().map_or(MapEpoch::default(), |kept| kept.epoch);
            let document = match self.next(&seen, ours) {
                Some(next) => {
                    if !self.put(&mut registered, &seen, &next).await? {
                        continue;
                    }
                    next
                }
                None => seen.map.ok_or_else(|| self.failed("no map, and none can be made"))?,
            };
            if document.hosts.iter().any(|member| member.name == self.settings.name) {
                return Ok((document, registered));
            }
        }
        Err(self.failed("others change the map all the time"))
    }

    fn failed(&self, what: &str) -> Error {
        let endpoints = self.settings.etcd.join(", ");
        Error::new(Kind::Failed, format!("etcd at {endpoints}: {what}"))
    }

    /// Waits for an answer of etcd.
    async fn answer<T>(
        &self,
        request: impl Future<Output = std::result::Result<T, etcd_client::Error>>,
    ) -> Result<T> {
        let late = |_| self.failed("no answer");
        let failed = |error: etcd_client::Error| self.failed(&why(&error));
        timeout(PATIENCE, request).await.map_err(late)?.map_err(failed)
    }

    async fn connect(&self) -> Result<Client> {
        let mut options =
            ConnectOptions::new().with_connect_timeout(PATIENCE).with_timeout(PATIENCE);
        // Read anew each time: certificates end, and are replaced.
        if let Some(tls) = tls(&self.settings)? {
            options = options.with_tls(tls);
        }
        self.answer(Client::connect(&self.settings.etcd, Some(options))).await
    }

    /// Connects, takes a lease and announces this host.
    async fn register(&self) -> Result<Registered> {
        let mut client = self.connect().await?;
        let granted = client.lease_grant(LEASE.as_secs() as i64, None);
        let lease = self.answer(granted).await?.id();
        let (keeper, alive) = self.answer(client.lease_keep_alive(lease)).await?;
        let kept = tokio::spawn(keep_alive(keeper, alive));
        let key = format!("{}hosts/{}", self.prefix, self.settings.name);
        let value = serde_json::to_vec(&self.announcement)
            .map_err(|error| Error::caused(Kind::Failed, "cannot announce this host", error))?;
        let registered = Registered { client: client.clone(), lease, kept };
        let there = self.answer(client.get(key.clone(), None)).await?;
        let there = there.kvs().first();
        if let Some(Ok(other)) = there.map(|pair| serde_json::from_slice(pair.value())) {
            self.must_be_us(&other)?;
        }
        let same = Compare::mod_revision(
            key.clone(),
            CompareOp::Equal,
            there.map_or(0, etcd_client::KeyValue::mod_revision),
        );
        let options = Some(PutOptions::new().with_lease(lease));
        let announce = Txn::new().when([same]).and_then([TxnOp::put(key, value, options)]);
        if !self.answer(client.txn(announce)).await?.succeeded() {
            return Err(self.failed("another engine announced itself at the same moment"));
        }
        Ok(registered)
    }

    /// Two engines of one name would answer for one another's questions.
    fn must_be_us(&self, announced: &Announcement) -> Result<()> {
        if announced.engine == self.announcement.engine {
            return Ok(());
        }
        let what = format!("another engine, at {}, is {}", announced.address, self.settings.name);
        let seconds = LEASE.as_secs();
        Err(Error::new(
            Kind::Busy,
            format!(
                "{what} already: give this host a name of its own (one that has ended is forgotten after \
                 {seconds} s)"
            ),
        ))
    }

    /// Reads all that is there.
    async fn look(&self, registered: &mut Registered) -> Result<Seen> {
        if registered.kept.is_finished() {
            return Err(self.failed(&format!("the lease {} was not kept", registered.lease)));
        }
        self.read(&mut registered.client).await
    }

    /// Reads all that is there.
    async fn read(&self, client: &mut Client) -> Result<Seen> {
        let all = GetOptions::new().with_prefix();
        let answer = self.answer(client.get(self.prefix.clone(), Some(all))).await?;
        let mut seen = Seen::default();
        for pair in answer.kvs() {
            let key = String::from_utf8_lossy(pair.key());
            let Some(key) = key.strip_prefix(&self.prefix) else { continue };
            if let Some(name) = key.strip_prefix("hosts/") {
                // What a later version says of itself beyond this is no concern of ours.
                if let Ok(announced) = serde_json::from_slice(pair.value()) {
                    seen.hosts.insert(name.into(), announced);
                }
            } else if let Some(name) = key.strip_prefix("drained/") {
                seen.drained.insert(name.into());
            } else if key == "map" {
                seen.revision = pair.mod_revision();
                seen.map = Some(Document::decode(pair.value())?);
            }
        }
        Ok(seen)
    }

    /// Puts the next map in the place of the one that was seen; false if another host was quicker.
    async fn put(&self, registered: &mut Registered, seen: &Seen, next: &Document) -> Result<bool> {
        let key = format!("{}map", self.prefix);
        let value = serde_json::to_vec(next)
            .map_err(|error| Error::caused(Kind::Failed, "cannot write the map", error))?;
        let same = Compare::mod_revision(key.clone(), CompareOp::Equal, seen.revision);
        let replace = Txn::new().when([same]).and_then([TxnOp::put(key, value, None)]);
        Ok(self.answer(registered.client.txn(replace)).await?.succeeded())
    }

    /// The map that this host had last.
    fn kept(&self) -> Option<Document> {
        std::fs::read(&self.kept).ok().and_then(|bytes| Document::decode(&bytes).ok())
    }

    /// The map that fits the hosts; `None` if the one there does. Where etcd has lost its map, or was set
    /// back to one before `ours`, the one that this host had last goes on: epochs never go back, and
    /// numbers stay whose they were.
    fn next(&self, seen: &Seen, ours: MapEpoch) -> Option<Document> {
        if seen.map.as_ref().is_some_and(|map| map.epoch >= ours) {
            return seen.next();
        }
        let Some(kept) = self.kept() else { return seen.next() };
        let again = Document { epoch: MapEpoch(kept.epoch.0 + 1), ..kept.clone() };
        let with = Seen { map: Some(kept), ..seen.clone() };
        Some(with.next().unwrap_or(again))
    }

    /// Keeps the map for a start without etcd. That it cannot be kept matters then only.
    fn keep(&self, document: &Document) {
        let kept = serde_json::to_vec(document).map_err(std::io::Error::other).and_then(|bytes| {
            let next = self.kept.with_extension("new");
            std::fs::write(&next, bytes)?;
            std::fs::rename(&next, &self.kept)
        });
        if let Err(error) = kept {
            eprintln!("fleece-engine: the partition map cannot be kept: {error}");
        }
    }

    /// Stays a member and goes by every newer map, for ever. Runs on a `LocalSet`.
    pub async fn run(self: Rc<Self>, cluster: Arc<Cluster>) {
        let mut registered = None;
        let mut said = false;
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            match Box::pin(self.step(&mut registered, &cluster)).await {
                Ok(()) => {
                    *self.starting.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    if std::mem::take(&mut said) {
                        eprintln!("fleece-engine: etcd answers again");
                    }
                }
                Err(error) => {
                    registered = None;
                    if !std::mem::replace(&mut said, true) {
                        eprintln!("fleece-engine: {error}; on with the map that there is");
                    }
                }
            }
        }
    }

    async fn step(
        &self,
        registered: &mut Option<Registered>,
        cluster: &Arc<Cluster>,
    ) -> Result<()> {
        let registered = match registered {
            Some(registered) => registered,
            none => none.insert(Box::pin(self.register()).await?),
        };
        let seen = self.look(registered).await?;
        // Whoever took the key away, a lease alone keeps nobody in the map.
        let gone = || self.failed("this host is not announced any more");
        self.must_be_us(seen.hosts.get(&self.settings.name).ok_or_else(gone)?)?;
        if let Some(next) = self.next(&seen, cluster.map().epoch()) {
            // Whoever loses sees the winner's a second later.
            self.put(registered, &seen, &next).await?;
            return Ok(());
        }
        let Some(document) = seen.map else { return Ok(()) };
        if document.epoch > cluster.map().epoch() {
            let (cluster, map) = (Arc::clone(cluster), document.map()?);
            let (epoch, hosts) = (document.epoch.0, document.hosts.len());
            eprintln!("fleece-engine: partition map {epoch}: {hosts} hosts");
            // Its locks and files are not for this thread, nor for the one that looks names up.
            let (done, adopted) = oneshot::channel();
            std::thread::Builder::new()
                .name("adopt".into())
                .spawn(move || done.send(cluster.adopt(map)))
                .context(|| "cannot start the thread that adopts a map".into())?;
            adopted.await.map_err(|error| Error::caused(Kind::Failed, "the map", error))??;
            self.keep(&document);
        }
        Ok(())
    }

    /// Says that a host shall own nothing, or takes that back.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for a host that is not in the cluster; when etcd does not answer.
    pub async fn drain(&self, host: &str, drain: bool) -> Result<()> {
        // Without a lease: a second one would take this host's place over, and end with this call.
        let mut client = self.connect().await?;
        self.read(&mut client).await?.must_know(host)?;
        let key = format!("{}drained/{host}", self.prefix);
        if drain {
            self.answer(client.put(key, "", None)).await?;
        } else {
            self.answer(client.delete(key, None)).await?;
        }
        Ok(())
    }

    /// The map that fits the hosts that live now, as if `without` were drained. Nothing is changed.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for a host that is not in the cluster, [`Kind::Usage`] when nobody would be
    /// left; when etcd does not answer.
    pub async fn planned(&self, without: Option<&str>) -> Result<PartitionMap> {
        let mut seen = self.read(&mut self.connect().await?).await?;
        if let Some(host) = without {
            seen.must_know(host)?;
            seen.drained.insert(host.to_owned());
        }
        if seen.hosts.keys().all(|name| seen.drained.contains(name)) {
            return Err(Error::new(Kind::Usage, "no host would be left that owns anything"));
        }
        match self.next(&seen, MapEpoch::default()).or(seen.map) {
            Some(document) => document.map(),
            None => Err(self.failed("no map, and none can be made")),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
