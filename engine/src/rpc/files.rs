//! Files that clients hand over with their calls (`SCM_RIGHTS`, unix(7)): what is restored goes
//! right into them, instead of through the socket.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

use super::flow::Flow;
use crate::error::{Context as _, Error, Kind, Result};

/// Files of one connection that no call has taken: each is a descriptor of this process, and our
/// clients hand over one for each call. What comes beyond that is closed.
const WAITING: usize = 4;

/// The files that came through one connection and were not taken yet.
#[derive(Default)]
pub(super) struct Files {
    /// Each with its number.
    waiting: RefCell<VecDeque<(u32, OwnedFd)>>,
    /// How many have come; so the first is number 1.
    came: Cell<u32>,
}

impl Files {
    fn push(&self, file: OwnedFd) {
        self.came.set(self.came.get().wrapping_add(1));
        let mut waiting = self.waiting.borrow_mut();
        if waiting.len() < WAITING {
            waiting.push_back((self.came.get(), file));
        }
    }

    /// Takes the file of that number, to write to it in any order.
    ///
    /// # Errors
    /// [`Kind::Usage`] where there is none, or it is neither a regular file nor a block device: a
    /// write to anything else may never end.
    pub(super) fn take(&self, number: u32) -> Result<File> {
        let wrong = |what| Error::new(Kind::Usage, format!("file {number} {what}"));
        let mut waiting = self.waiting.borrow_mut();
        let at = waiting.iter().position(|(n, _)| *n == number);
        let (_, file) =
            at.and_then(|at| waiting.remove(at)).ok_or_else(|| wrong("was not handed over"))?;
        let file = File::from(file);
        let metadata = file.metadata().context(|| format!("cannot look at file {number}"))?;
        match metadata.is_file() || metadata.file_type().is_block_device() {
            true => Ok(file),
            false => Err(wrong("is neither a regular file nor a block device")),
        }
    }
}

/// The reading half of a client's socket: files that come with the bytes go to the connection's.
pub(super) struct Reading {
    pub(super) half: OwnedReadHalf,
    pub(super) flow: Rc<Flow>,
}

impl AsyncRead for Reading {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let stream: &UnixStream = self.half.as_ref();
        loop {
            ready!(stream.poll_read_ready(context))?;
            let receive = || receive(stream, buffer.initialize_unfilled(), &self.flow.files);
            match stream.try_io(Interest::READABLE, receive) {
                // It was not ready after all.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                received => {
                    buffer.advance(received?);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

fn receive(stream: &UnixStream, buffer: &mut [u8], files: &Files) -> std::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let into = &mut [IoSliceMut::new(buffer)];
    let received = recvmsg(stream, into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            came.for_each(|file| files.push(file));
        }
    }
    Ok(received.bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::io::IoSlice;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use tokio::io::AsyncReadExt;

    use super::*;

    fn hand_over(stream: &UnixStream, bytes: &[u8], files: &[&File]) {
        let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    }

    #[test]
    fn files_come_with_the_bytes_and_few_wait() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (client, server) = UnixStream::pair().unwrap();
            let (half, _write) = server.into_split();
            let flow = Rc::<Flow>::default();
            let mut reading = Reading { half, flow: Rc::clone(&flow) };
            let (file, pipe) = (tempfile::tempfile().unwrap(), std::io::pipe().unwrap().1);
            let pipe = File::from(OwnedFd::from(pipe));
            hand_over(&client, b"one", &[&file]);
            hand_over(&client, b"two", &[&pipe]);
            let mut bytes = [0; 6];
            reading.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"onetwo");
            assert!(flow.files.take(1).is_ok());
            let said = |number| flow.files.take(number).unwrap_err().to_string();
            assert!(said(1).contains("was not handed over"));
            assert!(said(2).contains("is neither a regular file nor a block device"));
            for _ in 0..2 * WAITING {
                hand_over(&client, b"x", &[&file; 8]);
                reading.read_exact(&mut bytes[..1]).await.unwrap();
            }
            assert_eq!(flow.files.waiting.borrow().len(), WAITING);
            drop(client);
            assert_eq!(reading.read(&mut bytes).await.unwrap(), 0, "the end is the end");
        });
    }
}
