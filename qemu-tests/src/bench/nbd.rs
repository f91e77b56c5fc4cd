//! The smallest NBD client: one export by name over a UNIX socket, one request at a time, simple
//! replies. It changes images as a guest would, through QEMU, and reads what `fleece serve` offers.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, ensure};

use crate::Result;

const NBDMAGIC: &[u8; 8] = b"NBDMAGIC";
const IHAVEOPT: &[u8; 8] = b"IHAVEOPT";
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const OPT_EXPORT_NAME: u32 = 1;
/// Handshake flags of both sides: fixed newstyle, and no zeros after the export's size.
const FLAGS: u32 = 3;
/// The most that a request carries: what every server takes.
pub const MAX: usize = 1 << 20;

/// A connection to one export.
pub struct Client {
    socket: UnixStream,
    size: u64,
    cookie: u64,
}

#[derive(Clone, Copy)]
enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
}

impl Client {
    /// Connects to an export.
    ///
    /// # Errors
    /// When there is no server, or it does not know the export.
    pub fn connect(path: &Path, export: &str) -> Result<Self> {
        let mut socket = UnixStream::connect(path)
            .with_context(|| format!("nobody listens on {}", path.display()))?;
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting)?;
        ensure!(greeting[..8] == *NBDMAGIC && greeting[8..16] == *IHAVEOPT, "no NBD server");
        let mut hello = FLAGS.to_be_bytes().to_vec();
        hello.extend(IHAVEOPT);
        hello.extend(OPT_EXPORT_NAME.to_be_bytes());
        hello.extend(u32::try_from(export.len())?.to_be_bytes());
        hello.extend(export.as_bytes());
        socket.write_all(&hello)?;
        // Eight bytes of size, two of flags; a server that does not know the name hangs up.
        let mut answer = [0; 10];
        socket.read_exact(&mut answer).with_context(|| format!("no export '{export}'"))?;
        let mut size = [0; 8];
        size.copy_from_slice(&answer[..8]);
        Ok(Client { socket, size: u64::from_be_bytes(size), cookie: 0 })
    }

    /// Bytes of the export.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills a buffer of at most [`MAX`] bytes.
    ///
    /// # Errors
    /// The server's.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result {
        self.request(Command::Read, offset, buffer.len(), &[])?;
        Ok(self.socket.read_exact(buffer)?)
    }

    /// Writes at most [`MAX`] bytes.
    ///
    /// # Errors
    /// The server's.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result {
        self.request(Command::Write, offset, data.len(), data)
    }

    /// Discards a range of at most 1 GiB.
    ///
    /// # Errors
    /// The server's.
    pub fn trim(&mut self, offset: u64, length: usize) -> Result {
        self.request(Command::Trim, offset, length, &[])
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// The server's.
    pub fn flush(&mut self) -> Result {
        self.request(Command::Flush, 0, 0, &[])
    }

    /// Sends a request with its payload and takes the reply's header.
    fn request(&mut self, command: Command, offset: u64, length: usize, payload: &[u8]) -> Result {
        self.send(command, offset, length, payload)?;
        let mut reply = [0; 16];
        self.socket.read_exact(&mut reply)?;
        let mut expected = SIMPLE_REPLY.to_be_bytes().to_vec();
        expected.extend([0; 4]);
        expected.extend(self.cookie.to_be_bytes());
        ensure!(reply[..] == expected, "the NBD server refused a request at {offset}: {reply:x?}");
        Ok(())
    }

    fn send(&mut self, command: Command, offset: u64, length: usize, payload: &[u8]) -> Result {
        self.cookie += 1;
        let mut message = REQUEST.to_be_bytes().to_vec();
        message.extend([0, 0]);
        message.extend((command as u16).to_be_bytes());
        message.extend(self.cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(u32::try_from(length)?.to_be_bytes());
        message.extend(payload);
        Ok(self.socket.write_all(&message)?)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A server that is gone already needs no goodbye.
        let _ = self.send(Command::Disconnect, 0, 0, &[]);
    }
}
