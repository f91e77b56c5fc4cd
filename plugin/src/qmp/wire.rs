//! What lies between the socket and `qapi`: events go to our listeners, lines are bounded.
//!
//! `qapi` ends a session at an event that its generated types do not know; a newer QEMU has some.
//! So events are taken out of the stream here, a schema becomes shorter, and everything else is
//! handed on as it is.

use crate::qmp::command::Event;
use crate::qmp::schema;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::broadcast;

/// The longest line we take: the answer to query-qmp-schema has some 250 KiB, one about the nodes
/// of a VM with a hundred disks less. Anything longer is not QEMU.
const MAX_LINE: usize = 4 << 20;
/// What a line is about stands within so many bytes: the long answers are not worth two parses.
const BEGINNING: usize = 64 << 10;
/// Read at once from the socket.
const CHUNK: usize = 8 << 10;

/// The reading half of a monitor connection.
pub(crate) struct Tap<R> {
    inner: R,
    /// Lines for `qapi`, and how much of them is handed out.
    ready: Vec<u8>,
    taken: usize,
    /// The beginning of a line that is not complete.
    partial: Vec<u8>,
    events: broadcast::Sender<Event>,
    /// All bytes that came, so that a silent peer is told from a babbling one.
    received: Arc<AtomicU64>,
}

impl<R> Tap<R> {
    pub(crate) fn new(
        inner: R,
        events: broadcast::Sender<Event>,
        received: Arc<AtomicU64>,
    ) -> Self {
        Tap { inner, ready: Vec::new(), taken: 0, partial: Vec::new(), events, received }
    }

    /// Sorts what arrived: whole lines to their readers, the rest kept.
    fn arrived(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        while let Some(end) = bytes.iter().position(|&b| b == b'\n') {
            let (line, rest) = bytes.split_at(end + 1);
            self.partial.extend_from_slice(line);
            bytes = rest;
            let line = std::mem::take(&mut self.partial);
            match as_event(&line) {
                // Nobody listening is fine.
                Some(event) => drop(self.events.send(event)),
                None => self.ready.extend_from_slice(&schema::looked_for(&line).unwrap_or(line)),
            }
        }
        self.partial.extend_from_slice(bytes);
        if self.partial.len() > MAX_LINE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line of more than 4 MiB"));
        }
        Ok(())
    }
}

/// An event line has the member `event`; answers have `return` or `error` instead.
fn as_event(line: &[u8]) -> Option<Event> {
    if says(line, b"\"event\"") { serde_json::from_slice(line).ok() } else { None }
}

/// Whether a word stands near the beginning of a line.
pub(super) fn says(line: &[u8], word: &[u8]) -> bool {
    line.windows(word.len()).take(BEGINNING).any(|there| there == word)
}

impl<R: AsyncRead + Unpin> AsyncRead for Tap<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.taken < this.ready.len() {
                let n = buf.remaining().min(this.ready.len() - this.taken);
                buf.put_slice(&this.ready[this.taken..this.taken + n]);
                this.taken += n;
                if this.taken == this.ready.len() {
                    this.ready = Vec::new();
                    this.taken = 0;
                }
                return Poll::Ready(Ok(()));
            }
            let mut chunk = [0; CHUNK];
            let mut read = ReadBuf::new(&mut chunk);
            std::task::ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.arrived(read.filled())?;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn events_are_taken_out_and_a_schema_is_shorter_however_the_bytes_are_cut() {
        let text = b"{\"QMP\": 1}\r\n{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"NEW_IN_11\", \"data\": {\"a\": 1}}\r\n{\"return\": [{\"name\": \"cont\", \"arg-type\": \"0\", \"meta-type\": \"command\"}, {\"name\": \"E\", \"meta-type\": \"event\"}], \"id\": 1}\r\n{\"return\": {}}\r\n";
        let less = "{\"QMP\": 1}\r\n{\"return\":[{\"name\":\"cont\",\"meta-type\":\"command\",\"members\":[],\"values\":[]}],\"id\":1}\n{\"return\": {}}\r\n";
        for cut in 1..text.len() {
            let (sender, mut events) = broadcast::channel(4);
            let inner = tokio_test_reader(text, cut);
            let mut tap = Tap::new(inner, sender, Arc::default());
            let mut out = String::new();
            tap.read_to_string(&mut out).await.unwrap();
            assert_eq!(out, less);
            assert_eq!(events.try_recv().unwrap().name, "NEW_IN_11");
        }
    }

    #[tokio::test]
    async fn an_endless_line_is_refused() {
        let (sender, _events) = broadcast::channel(4);
        let mut tap = Tap::new(tokio::io::repeat(b'x'), sender, Arc::default());
        let error = tap.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    fn tokio_test_reader(text: &'static [u8], cut: usize) -> impl AsyncRead + Unpin {
        text[..cut].chain(&text[cut..])
    }
}
