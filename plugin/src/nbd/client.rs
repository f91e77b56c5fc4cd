//! An export of an NBD server, read (or written) over several connections.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, Stream, TryStreamExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::buffer::{self, Buffer, Pool};
use super::connection::{Connection, ReadHalf, WriteHalf};
use super::error::{Asked, NbdError, NbdErrorKind};
use super::handshake::{Handshake, Shape};
use super::pending::{Coverage, Pending, StatusMap, Want};
use super::wire::{self, Request, command, flag};
use crate::extents::Extent;

/// Longest single read: a segment.
pub const MAX_READ: u32 = 2 * 1024 * 1024;
/// Longest stretch asked for in one block status request: below 2^32, and a multiple of every block
/// size up to 2^30, so that nothing is cut within a server's block.
const MAX_STATUS: u32 = 3 << 30;
/// Longest stretch trimmed or zeroed in one request; QEMU splits larger ones itself.
const MAX_CLEAR: u32 = 1 << 30;
/// What is in flight is counted in these.
const UNIT: u32 = 1024;
/// Pause between attempts while a server's queue of new connections is full.
const RETRY: Duration = Duration::from_millis(10);

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A UNIX socket.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

/// An export of a server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdTarget {
    /// Where the server listens.
    pub address: Address,
    /// The export's name; "" is the server's default.
    pub export: String,
}

impl NbdTarget {
    /// An export of a server on a UNIX socket.
    pub fn unix(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        NbdTarget { address: Address::Unix(socket.into()), export: export.into() }
    }

    fn place(&self) -> String {
        let export = wire::printable(self.export.as_bytes());
        match &self.address {
            Address::Unix(path) => format!("NBD export {export:?} at {}", path.display()),
            Address::Tcp(host) => format!("NBD export {export:?} at {host}"),
        }
    }
}

/// How to connect.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Meta contexts that the export must have, at most [`wire::MAX_QUERIES`].
    pub contexts: Vec<String>,
    /// Connections, where the server allows several (read-only QEMU exports do).
    pub connections: usize,
    /// Bytes of reads in flight over all connections; also what the buffers cost.
    pub in_flight: u32,
    /// Whether we mean to write; a read-only export is refused then.
    pub writable: bool,
    /// Limit on connecting and greeting, for each connection.
    pub connect_timeout: Duration,
    /// Limit on the answer to one request.
    pub reply_timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        ConnectOptions {
            contexts: Vec::new(),
            connections: 4,
            // 4 connections x 4 reads x 256 KiB: as fast as more, see the design.
            in_flight: 4 * 4 * 256 * 1024,
            writable: false,
            connect_timeout: Duration::from_secs(10),
            reply_timeout: Duration::from_secs(60),
        }
    }
}

/// An export; clones share its connections. Ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Export(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    place: Arc<str>,
    shape: Shape,
    contexts: Vec<String>,
    links: Vec<Link>,
    pool: Arc<Pool>,
    in_flight: Arc<Semaphore>,
    units: u32,
}

/// A connection and the contexts it negotiated, by their index in `Inner::contexts`.
#[derive(Debug)]
struct Link {
    connection: Connection,
    contexts: Vec<usize>,
}

impl Export {
    /// Connects. Call it within a tokio runtime, of any flavour.
    ///
    /// Where several connections are allowed the contexts are shared out among them, so that
    /// asking for the dirty map does not make the server look up the allocation too.
    pub async fn connect(target: &NbdTarget, options: &ConnectOptions) -> Result<Self, NbdError> {
        let place: Arc<str> = target.place().into();
        let count = options.contexts.len();
        let shape = look(target, &place, options).await?;
        if options.writable && shape.has(flag::READ_ONLY) {
            return Err(NbdError::new(NbdErrorKind::Refused, &place, "the export is read-only"));
        }
        let several = shape.has(flag::CAN_MULTI_CONN);
        let links = if several { options.connections.max(1) } else { 1 };
        let shares = (0..links).map(|i| share_of(i, links, count));
        let attempts = shares.enumerate().map(|(i, share)| join(i, target, &place, options, share));
        let mut joined = Vec::new();
        for (i, attempt) in futures::future::join_all(attempts).await.into_iter().enumerate() {
            match attempt {
                Ok((_, other)) if other.size != shape.size => {
                    return Err(NbdError::protocol(&place, "its size differs by connection"));
                }
                Ok((link, _)) => joined.push(link),
                // A spare connection too many is no reason to fail.
                Err(e) if i >= count.max(1) && e.kind() == NbdErrorKind::Timeout => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Self::of(place, shape, joined, options))
    }

    fn of(place: Arc<str>, shape: Shape, links: Vec<Link>, options: &ConnectOptions) -> Self {
        let units = (options.in_flight / UNIT).max(MAX_READ / UNIT / 8);
        Export(Arc::new(Inner {
            place,
            shape,
            contexts: options.contexts.clone(),
            links,
            pool: Pool::new(options.in_flight as usize),
            in_flight: Arc::new(Semaphore::new(units as usize)),
            units,
        }))
    }

    /// The server at the other end of a socket, over this connection only.
    #[cfg(any(test, fuzzing))]
    pub(super) async fn over(
        socket: UnixStream,
        options: &ConnectOptions,
    ) -> Result<Self, NbdError> {
        let place: Arc<str> = "a socket".into();
        let (read, write) = socket.into_split();
        let halves: (ReadHalf, WriteHalf) = (Box::new(read), Box::new(write));
        let share = share_of(0, 1, options.contexts.len());
        let (link, shape) = negotiate(halves, "", &place, options, share).await?;
        Ok(Self::of(place, shape, vec![link], options))
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.shape.size
    }

    /// Whether the server refuses writes.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.0.shape.has(flag::READ_ONLY)
    }

    /// Connections in use.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.links.len()
    }

    /// Reads `length` bytes (at most [`MAX_READ`]) at `offset`. Several reads may be under way;
    /// beyond `in_flight` bytes they wait for their turn, in order.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Buffer, NbdError> {
        let asked = Asked { command: command::READ, offset, length };
        self.check(&asked, MAX_READ.min(self.0.shape.largest))?;
        let permit = self.permit(buffer::cost(length as usize) as u32).await?;
        let buffer = self.0.pool.take(length as usize);
        self.least_busy()
            .request(request(asked), Bytes::new(), |waiter, asked| {
                let want = Want::Data { buffer, covered: Coverage::default(), waiter };
                Pending { asked: *asked, failed: None, want, _permit: Some(permit) }
            })
            .await
    }

    /// What `context` (one of those connected with) says about the disk from `offset` on: at
    /// least one extent, no further than `length`, adjacent equal ones merged.
    pub async fn block_status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
    ) -> Result<Vec<Extent>, NbdError> {
        let context = self.0.contexts.iter().position(|known| known == context);
        let context = context.ok_or_else(|| self.usage("a context that was not negotiated"))?;
        let length = length.min(u64::from(MAX_STATUS)) as u32;
        let asked = Asked { command: command::BLOCK_STATUS, offset, length };
        self.check(&asked, MAX_STATUS)?;
        let having = self.0.links.iter().filter(|link| link.contexts.contains(&context));
        // Fewest contexts first: the server works out all of a connection's.
        let best = having.min_by_key(|link| (link.contexts.len(), link.connection.in_flight()));
        let link = best.ok_or_else(|| self.usage("a context without a connection"))?;
        let maps = link.connection.request(request(asked), Bytes::new(), |waiter, asked| {
            let maps = link.contexts.iter().map(|_| StatusMap::new(asked)).collect();
            Pending {
                asked: *asked,
                failed: None,
                want: Want::Status { maps, waiter },
                _permit: None,
            }
        });
        let maps = maps.await?;
        let mine = link.contexts.iter().position(|at| *at == context);
        let map = maps.into_iter().nth(mine.unwrap_or_default());
        map.map(|map| map.extents).ok_or_else(|| self.usage("a context without a map"))
    }

    /// All extents of `context` within `range`, ascending, without gaps, in batches.
    pub fn walk(
        &self,
        context: &str,
        range: std::ops::Range<u64>,
    ) -> impl Stream<Item = Result<Vec<Extent>, NbdError>> {
        let context = context.to_owned();
        stream::try_unfold((self.clone(), range), move |(export, range)| {
            let context = context.clone();
            async move {
                if range.start >= range.end {
                    return Ok(None);
                }
                let length = range.end - range.start;
                let batch = export.block_status(&context, range.start, length).await?;
                let next = batch.last().map_or(range.end, Extent::end);
                Ok(Some((batch, (export, next..range.end))))
            }
        })
    }

    /// The same walk, extent by extent, equal ones merged across batches.
    pub async fn map(
        &self,
        context: &str,
        range: std::ops::Range<u64>,
        mut each: impl FnMut(Extent),
    ) -> Result<(), NbdError> {
        let mut open: Option<Extent> = None;
        let mut batches = std::pin::pin!(self.walk(context, range));
        while let Some(batch) = batches.try_next().await? {
            for extent in batch {
                match &mut open {
                    Some(last) if last.flags == extent.flags => last.length += extent.length,
                    _ => open.replace(extent).into_iter().for_each(&mut each),
                }
            }
        }
        open.into_iter().for_each(each);
        Ok(())
    }

    /// Writes `data` (at most [`MAX_READ`] bytes) at `offset`.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), NbdError> {
        let length = u32::try_from(data.len()).map_err(|_| self.usage("a write too long"))?;
        let asked = Asked { command: command::WRITE, offset, length };
        self.check(&asked, MAX_READ.min(self.0.shape.largest))?;
        self.must_take_writes()?;
        let permit = self.permit(length).await?;
        self.done(asked, data, Some(permit)).await
    }

    /// Makes `length` bytes at `offset` read as zeros, without storing them where possible.
    pub async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), NbdError> {
        self.must_have(flag::SEND_WRITE_ZEROES, "writing zeros")?;
        self.clear(command::WRITE_ZEROES, offset, length).await
    }

    /// Gives `length` bytes at `offset` back to the storage; what they read as is open.
    pub async fn trim(&self, offset: u64, length: u64) -> Result<(), NbdError> {
        self.must_have(flag::SEND_TRIM, "trim")?;
        self.clear(command::TRIM, offset, length).await
    }

    /// Makes what was written durable. Covers all connections, as the server promises by
    /// allowing several.
    pub async fn flush(&self) -> Result<(), NbdError> {
        self.must_have(flag::SEND_FLUSH, "flush")?;
        let asked = Asked { command: command::FLUSH, offset: 0, length: 0 };
        self.done(asked, Bytes::new(), None).await
    }

    async fn clear(&self, command: u16, mut offset: u64, length: u64) -> Result<(), NbdError> {
        let end = offset.checked_add(length).ok_or_else(|| self.usage("a range without end"))?;
        while offset < end {
            let length = (end - offset).min(u64::from(MAX_CLEAR)) as u32;
            let asked = Asked { command, offset, length };
            self.check(&asked, MAX_CLEAR)?;
            self.done(asked, Bytes::new(), None).await?;
            offset += u64::from(length);
        }
        Ok(())
    }

    async fn done(
        &self,
        asked: Asked,
        data: Bytes,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<(), NbdError> {
        self.least_busy()
            .request(request(asked), data, |waiter, asked| {
                let want = Want::Done { waiter };
                Pending { asked: *asked, failed: None, want, _permit: permit }
            })
            .await
    }

    fn least_busy(&self) -> &Connection {
        let links = &self.0.links;
        let best = links.iter().min_by_key(|link| link.connection.in_flight());
        // `connect` leaves at least the first one.
        &best.unwrap_or(&links[0]).connection
    }

    async fn permit(&self, length: u32) -> Result<OwnedSemaphorePermit, NbdError> {
        let units = length.div_ceil(UNIT).clamp(1, self.0.units);
        let permit = Arc::clone(&self.0.in_flight).acquire_many_owned(units).await;
        permit.map_err(|_| self.usage("the export is closed"))
    }

    fn check(&self, asked: &Asked, most: u32) -> Result<(), NbdError> {
        let end = asked.offset.checked_add(u64::from(asked.length));
        if end.is_none_or(|end| end > self.size()) || asked.length == 0 {
            let message = format!("{asked}, of a disk of {} bytes", self.size());
            return Err(NbdError::new(NbdErrorKind::Usage, &self.0.place, message));
        }
        if asked.length > most {
            let message = format!("{asked}: the most at once is {most} bytes");
            return Err(NbdError::new(NbdErrorKind::Usage, &self.0.place, message));
        }
        Ok(())
    }

    fn must_have(&self, wanted: u16, what: &str) -> Result<(), NbdError> {
        if self.0.shape.has(wanted) {
            return Ok(());
        }
        let message = format!("the server does not offer {what}");
        Err(NbdError::new(NbdErrorKind::Refused, &self.0.place, message))
    }

    fn must_take_writes(&self) -> Result<(), NbdError> {
        if self.is_read_only() {
            let message = "the export is read-only";
            return Err(NbdError::new(NbdErrorKind::Refused, &self.0.place, message));
        }
        Ok(())
    }

    fn usage(&self, what: &str) -> NbdError {
        NbdError::new(NbdErrorKind::Usage, &self.0.place, what)
    }
}

/// The names of a server's exports.
pub async fn list_exports(
    address: &Address,
    connect_timeout: Duration,
) -> Result<Vec<String>, NbdError> {
    let target = NbdTarget { address: address.clone(), export: String::new() };
    let place = target.place();
    let names = async {
        let (read, write) = dial(&target, &place).await?;
        let mut handshake = Handshake::greet(read, write, &place).await?;
        let names = handshake.list().await?;
        handshake.abort().await;
        Ok(names)
    };
    timeout(connect_timeout, names).await.unwrap_or_else(|_| Err(silent(&place)))
}

/// Asks what the export is like, on a connection of its own: how many connections it allows
/// must be known before contexts are chosen.
async fn look(
    target: &NbdTarget,
    place: &str,
    options: &ConnectOptions,
) -> Result<Shape, NbdError> {
    let shape = async {
        let (read, write) = dial(target, place).await?;
        let mut handshake = Handshake::greet(read, write, place).await?;
        if let Some(shape) = handshake.info(&target.export).await? {
            handshake.abort().await;
            return Ok(shape);
        }
        handshake.go(&target.export).await.map(|(_, _, shape)| shape)
    };
    timeout(options.connect_timeout, shape).await.unwrap_or_else(|_| Err(silent(place)))
}

/// Which contexts connection `i` of `links` negotiates.
fn share_of(i: usize, links: usize, contexts: usize) -> Vec<usize> {
    if contexts == 0 {
        return Vec::new();
    }
    if links >= contexts {
        return vec![i % contexts];
    }
    (0..contexts).filter(|context| context % links == i).collect()
}

async fn join(
    i: usize,
    target: &NbdTarget,
    place: &Arc<str>,
    options: &ConnectOptions,
    share: Vec<usize>,
) -> Result<(Link, Shape), NbdError> {
    // Spare connections are not worth a long wait.
    let patience = if i == 0 { 1 } else { 4 };
    let joined = async {
        let halves = dial(target, place).await?;
        negotiate(halves, &target.export, place, options, share).await
    };
    let limit = options.connect_timeout / patience;
    timeout(limit, joined).await.unwrap_or_else(|_| Err(silent(place)))
}

/// From the greeting to the first request.
async fn negotiate(
    (read, write): (ReadHalf, WriteHalf),
    export: &str,
    place: &Arc<str>,
    options: &ConnectOptions,
    share: Vec<usize>,
) -> Result<(Link, Shape), NbdError> {
    let mut handshake = Handshake::greet(read, write, place).await?;
    let structured = handshake.structured_replies().await?;
    let mut ids = Vec::new();
    if !share.is_empty() {
        let names: Vec<&str> = share.iter().map(|at| options.contexts[*at].as_str()).collect();
        ids = handshake.meta_contexts(export, &names).await?;
    }
    let (read, write, shape) = handshake.go(export).await?;
    let halves = (read, write);
    let connection =
        Connection::start(halves, Arc::clone(place), ids, structured, options.reply_timeout);
    Ok((Link { connection, contexts: share }, shape))
}

async fn dial(target: &NbdTarget, place: &str) -> Result<(ReadHalf, WriteHalf), NbdError> {
    let refused = |cause: std::io::Error| {
        NbdError::new(NbdErrorKind::Connect, place, format_args!("cannot connect: {cause}"))
    };
    match &target.address {
        Address::Unix(path) => loop {
            match UnixStream::connect(path).await {
                Ok(socket) => {
                    let (read, write) = socket.into_split();
                    return Ok((Box::new(read), Box::new(write)));
                }
                // The server's queue is full; the caller's limit ends this.
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(RETRY).await;
                }
                Err(e) => return Err(refused(e)),
            }
        },
        Address::Tcp(host) => {
            let socket = TcpStream::connect(host).await.map_err(refused)?;
            socket.set_nodelay(true).map_err(refused)?;
            let (read, write) = socket.into_split();
            Ok((Box::new(read), Box::new(write)))
        }
    }
}

fn silent(place: &str) -> NbdError {
    let message = "the server does not greet or answer; are all its connections taken?";
    NbdError::new(NbdErrorKind::Timeout, place, message)
}

fn request(asked: Asked) -> Request {
    let Asked { command, offset, length } = asked;
    Request { flags: 0, command, cookie: 0, offset, length }
}
