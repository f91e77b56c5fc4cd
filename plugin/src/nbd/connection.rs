//! One connection in transmission: a task that writes requests, a task that takes replies.
//!
//! A caller's future may be dropped at any time: its request then completes into a buffer
//! that nobody takes, and the connection stays in step.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::error::{Asked, NbdError, NbdErrorKind};
use super::pending::{self, Pending, Want, within};
use super::wire::{self, ReplyHead, Request, chunk, command};

/// Requests queued for the writing task; what is in flight is bounded in bytes elsewhere.
const QUEUE: usize = 16;
/// Small reads of reply headers go through a buffer; larger ones go past it.
const READ_BUFFER: usize = 4096;
/// How long we wait for the server to take our goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// The two halves of a socket.
pub(crate) type ReadHalf = Box<dyn AsyncRead + Send + Unpin>;
/// The other one.
pub(crate) type WriteHalf = Box<dyn AsyncWrite + Send + Unpin>;

#[derive(Debug)]
struct Outgoing {
    request: Request,
    data: Bytes,
}

#[derive(Debug, Default)]
struct State {
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
    dead: Option<NbdError>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    place: Arc<str>,
    /// The ids of this connection's meta contexts, in the order of its status maps.
    context_ids: Vec<u32>,
    structured: bool,
}

/// A connection that chose its export.
#[derive(Debug)]
pub(crate) struct Connection {
    requests: mpsc::Sender<Outgoing>,
    shared: Arc<Shared>,
    reader: AbortHandle,
    reply_timeout: Duration,
}

impl Connection {
    /// Starts the two tasks.
    pub(crate) fn start(
        (read, write): (ReadHalf, WriteHalf),
        place: Arc<str>,
        context_ids: Vec<u32>,
        structured: bool,
        reply_timeout: Duration,
    ) -> Self {
        let state = Mutex::default();
        let shared = Arc::new(Shared { state, place, context_ids, structured });
        let (requests, queue) = mpsc::channel(QUEUE);
        tokio::spawn(write_requests(write, queue, Arc::clone(&shared), reply_timeout));
        let reader = tokio::spawn(read_replies(read, Arc::clone(&shared))).abort_handle();
        Connection { requests, shared, reader, reply_timeout }
    }

    /// Requests that wait for a reply.
    pub(crate) fn in_flight(&self) -> usize {
        self.shared.lock().pending.len()
    }

    /// Sends a request, `want` says what to make of its reply, and waits for it.
    pub(crate) async fn request<T>(
        &self,
        request: Request,
        data: Bytes,
        want: impl FnOnce(oneshot::Sender<Result<T, NbdError>>, &Asked) -> Pending,
    ) -> Result<T, NbdError> {
        let Request { command, offset, length, .. } = request;
        let asked = Asked { command, offset, length };
        let (waiter, reply) = oneshot::channel();
        let exchange = async {
            let Ok(slot) = self.requests.reserve().await else { return Err(self.ended()) };
            let cookie = self.shared.register(want(waiter, &asked))?;
            slot.send(Outgoing { request: Request { cookie, ..request }, data });
            reply.await.unwrap_or_else(|_| Err(self.ended()))
        };
        match tokio::time::timeout(self.reply_timeout, exchange).await {
            Ok(result) => result,
            Err(_) => {
                let seconds = self.reply_timeout.as_secs_f32();
                let message = format!("{asked}: no answer within {seconds} s");
                let error = NbdError::new(NbdErrorKind::Timeout, &self.shared.place, message);
                self.shared.die(&error);
                self.reader.abort();
                Err(error)
            }
        }
    }

    fn ended(&self) -> NbdError {
        self.shared.lock().dead.clone().unwrap_or_else(|| {
            NbdError::new(NbdErrorKind::Disconnected, &self.shared.place, "we hung up")
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The writing task sees its queue end, says goodbye and closes.
        self.reader.abort();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, pending: Pending) -> Result<u64, NbdError> {
        let mut state = self.lock();
        if let Some(error) = &state.dead {
            return Err(error.clone());
        }
        let cookie = state.next_cookie;
        state.next_cookie += 1;
        state.pending.insert(cookie, pending);
        Ok(cookie)
    }

    /// Ends the connection: everything that waits fails with `error`.
    fn die(&self, error: &NbdError) {
        let waiting = {
            let mut state = self.lock();
            state.dead.get_or_insert_with(|| error.clone());
            std::mem::take(&mut state.pending)
        };
        waiting.into_values().for_each(|pending| pending.fail(error.clone()));
    }

    fn take(&self, cookie: u64) -> Result<Pending, NbdError> {
        let taken = self.lock().pending.remove(&cookie);
        taken.ok_or_else(|| self.broken("a reply to no request"))
    }

    fn broken(&self, what: impl std::fmt::Display) -> NbdError {
        NbdError::protocol(&self.place, what)
    }

    fn lost(&self, cause: &std::io::Error) -> NbdError {
        let message = format!("the server hung up ({cause}); did the VM or the export end?");
        NbdError::new(NbdErrorKind::Disconnected, &self.place, message)
    }
}

async fn write_requests(
    mut write: WriteHalf,
    mut queue: mpsc::Receiver<Outgoing>,
    shared: Arc<Shared>,
    limit: Duration,
) {
    while let Some(outgoing) = queue.recv().await {
        let sent = tokio::time::timeout(limit, async {
            write.write_all(&outgoing.request.encode()).await?;
            write.write_all(&outgoing.data).await
        });
        let sent = sent.await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        if let Err(cause) = sent {
            shared.die(&shared.lost(&cause));
            return;
        }
    }
    let goodbye =
        Request { flags: 0, command: command::DISCONNECT, cookie: 0, offset: 0, length: 0 };
    // The server may be gone already; then there is nobody to say it to.
    let _ = tokio::time::timeout(GOODBYE, async {
        let _ = write.write_all(&goodbye.encode()).await;
        let _ = write.shutdown().await;
    })
    .await;
}

async fn read_replies(read: ReadHalf, shared: Arc<Shared>) {
    let mut replies = Replies { read: BufReader::with_capacity(READ_BUFFER, read), shared };
    loop {
        if let Err(error) = replies.next().await {
            replies.shared.die(&error);
            return;
        }
    }
}

struct Replies {
    read: BufReader<ReadHalf>,
    shared: Arc<Shared>,
}

impl Replies {
    async fn next(&mut self) -> Result<(), NbdError> {
        let mut head = [0; ReplyHead::LEN];
        self.receive(&mut head).await?;
        match ReplyHead::decode(&head).map_err(|e| self.shared.broken(e))? {
            ReplyHead::Simple { error, cookie } => self.simple(error, cookie).await,
            ReplyHead::Chunk { flags, kind, cookie } => {
                let length = self.number().await?;
                if !self.shared.structured {
                    return Err(self.shared.broken("a structured reply that nobody asked for"));
                }
                let mut pending = self.shared.take(cookie)?;
                let taken = self.chunk(&mut pending, kind, length).await;
                if let Err(error) = taken {
                    pending.fail(error.clone());
                    return Err(error);
                }
                if flags & chunk::DONE == 0 {
                    return self.put_back(cookie, pending);
                }
                pending.finish().map_err(|what| self.shared.broken(what))
            }
        }
    }

    fn put_back(&self, cookie: u64, pending: Pending) -> Result<(), NbdError> {
        let mut state = self.shared.lock();
        if let Some(error) = state.dead.clone() {
            pending.fail(error.clone());
            return Err(error);
        }
        state.pending.insert(cookie, pending);
        Ok(())
    }

    async fn simple(&mut self, error: u32, cookie: u64) -> Result<(), NbdError> {
        let mut pending = self.shared.take(cookie)?;
        if error != 0 {
            pending.failed =
                Some(NbdError::answered(&self.shared.place, &pending.asked, error, ""));
        } else if let Want::Data { buffer, covered, .. } = &mut pending.want {
            let length = pending.asked.length;
            let received = if self.shared.structured {
                Err(self.shared.broken("a simple reply to a read"))
            } else {
                covered.add(0, length).map_err(|what| self.shared.broken(what))
            };
            let received = match received {
                Ok(()) => self.receive(buffer).await,
                Err(error) => Err(error),
            };
            if let Err(error) = received {
                pending.fail(error.clone());
                return Err(error);
            }
        }
        pending.finish().map_err(|what| self.shared.broken(what))
    }

    async fn chunk(
        &mut self,
        pending: &mut Pending,
        kind: u16,
        length: u32,
    ) -> Result<(), NbdError> {
        match kind {
            chunk::NONE if length == 0 => Ok(()),
            chunk::OFFSET_DATA => self.data(pending, length).await,
            chunk::OFFSET_HOLE if length == 12 => self.hole(pending).await,
            chunk::BLOCK_STATUS => self.status(pending, length).await,
            kind if kind & chunk::ERROR_BIT != 0 => self.error(pending, length).await,
            _ => Err(self.shared.broken(format_args!("a chunk of kind {kind}"))),
        }
    }

    async fn data(&mut self, pending: &mut Pending, length: u32) -> Result<(), NbdError> {
        let mut offset = [0; 8];
        let length = length.checked_sub(8).filter(|length| *length > 0);
        let length = length.ok_or_else(|| self.shared.broken("a chunk without data"))?;
        self.receive(&mut offset).await?;
        let place = self.place(pending, u64::from_be_bytes(offset), length)?;
        let Want::Data { buffer, .. } = &mut pending.want else {
            return Err(self.shared.broken("data for what is not a read"));
        };
        self.receive(&mut buffer[place]).await
    }

    async fn hole(&mut self, pending: &mut Pending) -> Result<(), NbdError> {
        let mut offset = [0; 8];
        self.receive(&mut offset).await?;
        let length = self.number().await?;
        if length == 0 {
            return Err(self.shared.broken("a hole of no bytes"));
        }
        let place = self.place(pending, u64::from_be_bytes(offset), length)?;
        if let Want::Data { buffer, .. } = &mut pending.want {
            buffer[place].fill(0);
        }
        Ok(())
    }

    /// Where in the buffer a chunk goes; each byte is taken once.
    fn place(
        &self,
        pending: &mut Pending,
        offset: u64,
        length: u32,
    ) -> Result<std::ops::Range<usize>, NbdError> {
        let Want::Data { covered, .. } = &mut pending.want else {
            return Err(self.shared.broken("data for what is not a read"));
        };
        let start = within(&pending.asked, offset, length)
            .and_then(|start| covered.add(start, start + length).map(|()| start))
            .map_err(|what| self.shared.broken(what))?;
        Ok(start as usize..start as usize + length as usize)
    }

    async fn status(&mut self, pending: &mut Pending, length: u32) -> Result<(), NbdError> {
        let payload = length.checked_sub(4).map_or(0, |l| l as usize);
        if payload == 0 || !payload.is_multiple_of(pending::DESCRIPTOR) {
            return Err(self.shared.broken("a block status of impossible length"));
        }
        if length > pending::MAX_STATUS {
            return Err(self.shared.broken("a block status without end"));
        }
        let id = self.number().await?;
        let at = self.shared.context_ids.iter().position(|known| *known == id);
        let Want::Status { maps, .. } = &mut pending.want else {
            return Err(self.shared.broken("a block status for another request"));
        };
        let map = at.and_then(|at| maps.get_mut(at)).filter(|map| !map.has_begun());
        let map = map.ok_or_else(|| self.shared.broken("a block status of another context"))?;
        for _ in 0..payload / pending::DESCRIPTOR {
            let mut descriptor = [0; pending::DESCRIPTOR];
            match self.read.read_exact(&mut descriptor).await {
                Ok(_) => {}
                Err(cause) => return Err(self.shared.lost(&cause)),
            }
            let [a, b, c, d, e, f, g, h] = descriptor;
            map.add(u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
                .map_err(|what| self.shared.broken(what))?;
        }
        Ok(())
    }

    async fn error(&mut self, pending: &mut Pending, length: u32) -> Result<(), NbdError> {
        if length > pending::MAX_ERROR {
            return Err(self.shared.broken("an error message without end"));
        }
        let mut payload = vec![0; length as usize];
        self.receive(&mut payload).await?;
        let (number, said) = wire::decode_error(&payload).map_err(|e| self.shared.broken(e))?;
        let error = NbdError::answered(&self.shared.place, &pending.asked, number, &said);
        pending.failed.get_or_insert(error);
        Ok(())
    }

    async fn number(&mut self) -> Result<u32, NbdError> {
        let mut bytes = [0; 4];
        self.receive(&mut bytes).await?;
        Ok(u32::from_be_bytes(bytes))
    }

    async fn receive(&mut self, bytes: &mut [u8]) -> Result<(), NbdError> {
        match self.read.read_exact(bytes).await {
            Ok(_) => Ok(()),
            Err(cause) => Err(self.shared.lost(&cause)),
        }
    }
}
