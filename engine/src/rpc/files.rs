//! Files that clients hand over with their calls (`SCM_RIGHTS`, unix(7)): what is restored goes
//! right into them, and what is new is read from them, instead of through the socket.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

use super::flow::Flow;

/// Files of one connection that no call has taken: each is a descriptor of this process, and our
/// clients hand over one for each call. More of them end the connection.
const WAITING: usize = 4;
/// Stack of the thread that closes what was left.
const STACK: usize = 64 << 10;

/// The files that came through one connection and were not taken yet.
#[derive(Default)]
pub(super) struct Files {
    /// Each with its number.
    waiting: RefCell<VecDeque<(u32, OwnedFd)>>,
    /// How many have come; so the first is number 1.
    came: Cell<u32>,
}

impl Files {
    /// Takes the file of that number, if it came.
    pub(super) fn take(&self, number: u32) -> Option<File> {
        let mut waiting = self.waiting.borrow_mut();
        let at = waiting.iter().position(|(n, _)| *n == number)?;
        waiting.remove(at).map(|(_, file)| File::from(file))
    }

    /// Counts the next one; `None` is one that got lost on its way.
    fn came(&self, file: Option<OwnedFd>) {
        self.came.set(self.came.get().wrapping_add(1));
        let number = self.came.get();
        self.waiting.borrow_mut().extend(file.map(|file| (number, file)));
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let left = std::mem::take(self.waiting.get_mut());
        if !left.is_empty() {
            close(left);
        }
    }
}

/// Closes files. That may take as long as their file systems like: not on the thread of all
/// connections.
pub(super) fn close(files: impl Send + 'static) {
    let thread = std::thread::Builder::new().name("close".into()).stack_size(STACK);
    drop(thread.spawn(move || drop(files)));
}

/// The reading half of a client's socket: files that come with the bytes go to the connection's.
pub(super) struct Reading {
    pub(super) half: OwnedReadHalf,
    pub(super) flow: Rc<Flow>,
    /// Whether it may hand over files; those of others the kernel drops.
    pub(super) permitted: bool,
}

impl AsyncRead for Reading {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if !self.permitted {
            return Pin::new(&mut self.half).poll_read(context, buffer);
        }
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
    // As where this process has no descriptors left, or may not have that file.
    if received.flags.contains(ReturnFlags::CTRUNC) {
        files.came(None);
    }
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(all) = message {
            all.for_each(|file| files.came(Some(file)));
        }
    }
    match files.waiting.borrow().len() {
        0..=WAITING => Ok(received.bytes),
        many => Err(std::io::Error::other(format!("{many} files wait for a call"))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::io::IoSlice;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use tokio::io::AsyncReadExt;

    use super::*;

    fn hand_over(stream: &UnixStream, bytes: &[u8], file: &File) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    }

    fn reading(permitted: bool) -> (UnixStream, Reading) {
        let (client, server) = UnixStream::pair().unwrap();
        // The other half is not needed, and does not close the socket.
        let (half, write) = server.into_split();
        write.forget();
        (client, Reading { half, flow: Rc::default(), permitted })
    }

    #[test]
    fn files_come_with_the_bytes_by_number() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (client, mut reading) = reading(true);
            let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
            files[1].set_len(7).unwrap();
            hand_over(&client, b"one", &files[0]);
            hand_over(&client, b"two", &files[1]);
            let mut bytes = [0; 6];
            reading.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"onetwo");
            let second = reading.flow.files.take(2).unwrap();
            assert_eq!(second.metadata().unwrap().len(), 7);
            assert!(reading.flow.files.take(2).is_none(), "taken twice");
            assert!(reading.flow.files.take(0).is_none() && reading.flow.files.take(3).is_none());
            drop(client);
            assert_eq!(reading.read(&mut bytes).await.unwrap(), 0, "the end is the end");
        });
    }

    #[test]
    fn few_files_wait_and_none_of_whom_we_do_not_know() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let file = tempfile::tempfile().unwrap();
            for permitted in [true, false] {
                let (client, mut reading) = reading(permitted);
                let mut byte = [0];
                for n in 0..=WAITING {
                    hand_over(&client, b"x", &file);
                    let read = reading.read_exact(&mut byte).await;
                    assert_eq!(read.is_ok(), n < WAITING || !permitted, "{n}: {read:?}");
                }
                let waiting = reading.flow.files.waiting.borrow().len();
                assert_eq!(waiting > 0, permitted);
            }
        });
    }
}
