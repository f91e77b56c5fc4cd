//! Files that are handed over to the engine with a call (`SCM_RIGHTS`, unix(7)), so that what it
//! restores goes right into them, instead of through the socket.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncWrite, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;

/// Files on their way to the engine.
#[derive(Default)]
pub(super) struct Files {
    waiting: RefCell<VecDeque<OwnedFd>>,
    /// How many there were.
    handed: Cell<u32>,
}

impl Files {
    /// Hands a file over with what is written next; returns its number, for the call that is about it.
    ///
    /// # Errors
    /// Where there are no descriptors left.
    pub(super) fn hand_over(&self, file: &File) -> std::io::Result<u32> {
        self.waiting.borrow_mut().push_back(file.as_fd().try_clone_to_owned()?);
        self.handed.set(self.handed.get() + 1);
        Ok(self.handed.get())
    }
}

/// The writing half of the engine's socket.
pub(super) struct Writing {
    pub(super) half: OwnedWriteHalf,
    pub(super) files: Rc<Files>,
}

impl AsyncWrite for Writing {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        if self.files.waiting.borrow().is_empty() || bytes.is_empty() {
            return Pin::new(&mut self.half).poll_write(context, bytes);
        }
        let stream: &UnixStream = self.half.as_ref();
        let mut waiting = self.files.waiting.borrow_mut();
        loop {
            ready!(stream.poll_write_ready(context))?;
            match stream.try_io(Interest::WRITABLE, || send(stream, bytes, &waiting)) {
                // It was not ready after all.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                sent => {
                    waiting.pop_front();
                    return Poll::Ready(sent);
                }
            }
        }
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.half).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.half).poll_shutdown(context)
    }
}

/// Sends bytes with the first file; while there are more of them one byte, for each needs one.
fn send(stream: &UnixStream, bytes: &[u8], waiting: &VecDeque<OwnedFd>) -> std::io::Result<usize> {
    let files: Vec<_> = waiting.iter().take(1).map(AsFd::as_fd).collect();
    let bytes = if waiting.len() > 1 { &bytes[..1] } else { bytes };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}
