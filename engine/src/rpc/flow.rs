//! What one connection may keep in the engine's memory, whatever its client does.
//!
//! Cap'n Proto bounds a message, but not how many of them wait: calls that are not answered
//! yet, and answers that the client does not take, or takes and never ends (`Finish`). Here both
//! are counted; who goes beyond what a client of ours can need loses its connection.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};

use capnp::capability::Promise;
use capnp::message::{Builder, HeapAllocator};
use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{Connection, FlowController, IncomingMessage, OutgoingMessage, VatNetwork};
use futures::AsyncRead;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};

use super::files::Files;

/// Bytes of calls without an answer. A plugin streams 1 MiB ahead, `fleece serve` has 128 small reads.
const UNANSWERED: usize = 4 << 20;
/// Bytes of answers that the client has not taken, or not ended.
const UNTAKEN: usize = 8 << 20;
/// No large answer is made while more than this waits for the client.
const ROOM: usize = 2 << 20;
/// What any message counts for at least: a call costs more than its bytes.
const LEAST: usize = 4 << 10;
/// Large answers (at most 1 MiB) that are made at once, for all connections.
static ANSWERS: Semaphore = Semaphore::const_new(8);

type Message = Builder<HeapAllocator>;

/// The messages of one connection that are in memory.
#[derive(Default)]
pub(super) struct Flow {
    /// Bytes of calls that are not answered.
    incoming: Cell<usize>,
    /// Our messages and their bytes; those that are gone are forgotten now and then.
    outgoing: RefCell<Vec<(Weak<Message>, usize)>>,
    /// Files that it handed over and no call has taken.
    pub(super) files: Files,
    /// Bytes read from the socket since the last whole message.
    read: Cell<usize>,
    /// The client has sent a whole message.
    spoken: Cell<bool>,
    /// There may be room for a large answer.
    room: Notify,
    /// The connection is to end.
    ending: Cell<bool>,
    dismissed: Notify,
}

impl Flow {
    /// Whether the client has said anything.
    pub(super) fn has_spoken(&self) -> bool {
        self.spoken.get()
    }

    /// Whether the client has said nothing, and may still.
    pub(super) fn is_silent(&self) -> bool {
        !self.spoken.get() && !self.ending.get()
    }

    /// Ends the connection.
    pub(super) fn dismiss(&self) {
        self.ending.set(true);
        self.dismissed.notify_one();
    }

    /// Completes when the connection is to end.
    pub(super) async fn dismissed(&self) {
        self.dismissed.notified().await;
    }

    /// Waits until a large answer may be made; it must be given before the place is dropped.
    pub(super) async fn place_for_answer(&self) -> Result<SemaphorePermit<'static>, capnp::Error> {
        loop {
            let room = self.room.notified();
            if self.untaken() > ROOM {
                room.await;
                continue;
            }
            let place = ANSWERS.acquire().await;
            let place = place.map_err(|_| capnp::Error::failed("the engine is ending".into()))?;
            // Others of this connection may have been first.
            if self.untaken() <= ROOM {
                return Ok(place);
            }
        }
    }

    /// Bytes of our messages that are still there.
    fn untaken(&self) -> usize {
        let mut messages = self.outgoing.borrow_mut();
        messages.retain(|(message, _)| message.strong_count() > 0);
        messages.iter().map(|(_, bytes)| bytes).sum()
    }

    /// What a client of ours never does ends its connection, taken or not.
    fn check(&self) -> Result<(), capnp::Error> {
        let (untaken, unanswered) = (self.untaken(), self.incoming.get());
        if untaken <= ROOM {
            self.room.notify_waiters();
        }
        let what = if untaken > UNTAKEN {
            format!("{untaken} bytes of answers wait for this client; {UNTAKEN} may")
        } else if unanswered > UNANSWERED {
            format!("{unanswered} bytes of calls are unanswered; {UNANSWERED} may be")
        } else {
            return Ok(());
        };
        self.dismiss();
        Err(capnp::Error::failed(what))
    }
}

/// Counts what is read from a socket.
pub(super) struct Counted<R> {
    pub(super) inner: R,
    pub(super) flow: Rc<Flow>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Counted<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_read(context, buffer);
        if let Poll::Ready(Ok(bytes)) = polled {
            self.flow.read.set(self.flow.read.get() + bytes);
        }
        polled
    }
}

/// A network of two parties whose connection is counted.
pub(super) struct Bounded<N> {
    pub(super) network: N,
    pub(super) flow: Rc<Flow>,
}

impl<N: VatNetwork<Side>> VatNetwork<Side> for Bounded<N> {
    fn connect(&mut self, host: Side) -> Option<Box<dyn Connection<Side>>> {
        let inner = self.network.connect(host)?;
        Some(Box::new(BoundedConnection { inner, flow: Rc::clone(&self.flow) }))
    }

    fn accept(&mut self) -> Promise<Box<dyn Connection<Side>>, capnp::Error> {
        let (accepted, flow) = (self.network.accept(), Rc::clone(&self.flow));
        Promise::from_future(async move {
            let inner = accepted.await?;
            Ok(Box::new(BoundedConnection { inner, flow }) as Box<dyn Connection<Side>>)
        })
    }

    fn drive_until_shutdown(&mut self) -> Promise<(), capnp::Error> {
        self.network.drive_until_shutdown()
    }
}

struct BoundedConnection {
    inner: Box<dyn Connection<Side>>,
    flow: Rc<Flow>,
}

impl Connection<Side> for BoundedConnection {
    fn get_peer_vat_id(&self) -> Side {
        self.inner.get_peer_vat_id()
    }

    fn new_outgoing_message(&mut self, first_segment_words: u32) -> Box<dyn OutgoingMessage> {
        let inner = self.inner.new_outgoing_message(first_segment_words);
        Box::new(Outgoing { inner, flow: Rc::clone(&self.flow) })
    }

    fn receive_incoming_message(
        &mut self,
    ) -> Promise<Option<Box<dyn IncomingMessage>>, capnp::Error> {
        if let Err(error) = self.flow.check() {
            return Promise::err(error);
        }
        let (next, flow) = (self.inner.receive_incoming_message(), Rc::clone(&self.flow));
        Promise::from_future(async move {
            let Some(inner) = next.await? else { return Ok(None) };
            flow.spoken.set(true);
            let bytes = flow.read.take().max(LEAST);
            flow.incoming.set(flow.incoming.get() + bytes);
            Ok(Some(Box::new(Incoming { inner, bytes, flow }) as Box<dyn IncomingMessage>))
        })
    }

    fn new_stream(&mut self) -> (Box<dyn FlowController>, Promise<(), capnp::Error>) {
        self.inner.new_stream()
    }

    fn shutdown(&mut self, result: capnp::Result<()>) -> Promise<(), capnp::Error> {
        self.inner.shutdown(result)
    }
}

/// A message of the client's, counted until whoever handles it drops it.
struct Incoming {
    inner: Box<dyn IncomingMessage>,
    bytes: usize,
    flow: Rc<Flow>,
}

impl IncomingMessage for Incoming {
    fn get_body(&self) -> capnp::Result<capnp::any_pointer::Reader<'_>> {
        self.inner.get_body()
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.flow.incoming.set(self.flow.incoming.get().saturating_sub(self.bytes));
    }
}

/// A message of ours, counted from its sending until nobody needs it.
struct Outgoing {
    inner: Box<dyn OutgoingMessage>,
    flow: Rc<Flow>,
}

impl OutgoingMessage for Outgoing {
    fn get_body(&mut self) -> capnp::Result<capnp::any_pointer::Builder<'_>> {
        self.inner.get_body()
    }

    fn get_body_as_reader(&self) -> capnp::Result<capnp::any_pointer::Reader<'_>> {
        self.inner.get_body_as_reader()
    }

    fn send(self: Box<Self>) -> (Promise<(), capnp::Error>, Rc<Message>) {
        let bytes = (8 * self.inner.size_in_words()).max(LEAST);
        let (sent, message) = self.inner.send();
        self.flow.outgoing.borrow_mut().push((Rc::downgrade(&message), bytes));
        (sent, message)
    }

    fn take(self: Box<Self>) -> Message {
        self.inner.take()
    }

    fn size_in_words(&self) -> usize {
        self.inner.size_in_words()
    }
}
