//! Files that are handed over to the engine with a call (`SCM_RIGHTS`, unix(7)), so that what it
//! restores goes right into them, and what it wants of a disk it reads there, instead of through
//! the socket.

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
        let files = Rc::clone(&self.files);
        let mut waiting = files.waiting.borrow_mut();
        let Some(file) = waiting.front().filter(|_| !bytes.is_empty()) else {
            return Pin::new(&mut self.half).poll_write(context, bytes);
        };
        // Each needs bytes of its own: while more of them wait, one.
        let bytes = if waiting.len() > 1 { &bytes[..1] } else { bytes };
        let stream: &UnixStream = self.half.as_ref();
        loop {
            ready!(stream.poll_write_ready(context))?;
            match stream.try_io(Interest::WRITABLE, || send(stream, bytes, file)) {
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

fn send(stream: &UnixStream, bytes: &[u8], file: &OwnedFd) -> std::io::Result<usize> {
    let files = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::IoSliceMut;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// What is there to be read, and the sizes of the files that came with it.
    fn receive(stream: &UnixStream, sizes: &mut Vec<u64>) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(stream, into, &mut control, RecvFlags::empty())?.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                sizes.extend(files.map(|file| File::from(file).metadata().unwrap().len()));
            }
        }
        bytes.truncate(received);
        Ok(bytes)
    }

    #[test]
    fn every_file_goes_with_bytes_however_full_the_socket_is() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (_read, half) = ours.into_split();
            let files = Rc::<Files>::default();
            let mut writing = Writing { half, files: Rc::clone(&files) };
            let sent: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
            let (mut got, mut sizes) = (Vec::new(), Vec::new());
            let send = async {
                // So much does not fit into the socket: the next write has to wait.
                writing.write_all(&sent[..1 << 19]).await.unwrap();
                for number in 1..=3 {
                    let file = tempfile::tempfile().unwrap();
                    file.set_len(u64::from(number)).unwrap();
                    assert_eq!(files.hand_over(&file).unwrap(), number);
                }
                writing.write_all(&sent[1 << 19..]).await.unwrap();
            };
            let take = async {
                while got.len() < sent.len() {
                    theirs.readable().await.unwrap();
                    let read = theirs.try_io(Interest::READABLE, || receive(&theirs, &mut sizes));
                    got.extend(read.unwrap_or_default());
                }
            };
            tokio::join!(send, take);
            assert!(got == sent);
            assert_eq!(sizes, [1, 2, 3]);
        });
    }
}
