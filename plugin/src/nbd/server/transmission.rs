//! The server's side of reading: several requests of a client at once, answers in any order.

use std::io::{Error, ErrorKind, Result};

use bytes::Bytes;
use futures::stream::{self, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, Notify};

use super::handshake::{ALLOCATION_ID, Chosen};
use super::{ImageSource, MAX_REQUESTS, PIECE};
use crate::nbd::wire::{self, Request, chunk, command, errno};

/// Extents in one block status answer: 32 KiB.
const MAX_EXTENTS: usize = 4096;
/// Longest data of a refused write that we swallow to stay in step.
const MAX_SWALLOWED: u64 = 64 * 1024 * 1024;
/// Bytes of a chunk's header and the offset that data begins with.
const DATA_HEAD: usize = wire::CHUNK_HEAD + 8;

/// Answers requests until the client goes, or something breaks.
pub(super) async fn serve<S: ImageSource>(chosen: Chosen<'_, S>) {
    let Chosen { read, write, disk, structured, allocation } = chosen;
    let write = Mutex::new(write);
    let broken = Notify::new();
    let answers = Answers { disk, structured, allocation, write: &write };
    let requests = stream::unfold(BufReader::new(read), async |mut read| {
        match next_request(&mut read).await {
            Ok(Some(request)) => Some((request, read)),
            _ => None,
        }
    });
    requests
        .take_until(broken.notified())
        .for_each_concurrent(MAX_REQUESTS, async |request| {
            if answers.answer(request).await.is_err() {
                // Half an answer may be out: nothing can follow it.
                broken.notify_one();
                let _ = write.lock().await.shutdown().await;
            }
        })
        .await;
}

/// The next request; the data of writes is swallowed, for they are refused.
async fn next_request(read: &mut BufReader<OwnedReadHalf>) -> Result<Option<Request>> {
    let mut head = [0; Request::LEN];
    read.read_exact(&mut head).await?;
    let request = Request::decode(&head).map_err(|e| Error::new(ErrorKind::InvalidData, e))?;
    if request.command == command::DISCONNECT {
        return Ok(None);
    }
    if request.command == command::WRITE {
        let length = u64::from(request.length);
        if length > MAX_SWALLOWED {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut data = read.take(length);
        if tokio::io::copy(&mut data, &mut tokio::io::sink()).await? != length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(Some(request))
}

struct Answers<'a, S> {
    disk: &'a S,
    structured: bool,
    allocation: bool,
    write: &'a Mutex<OwnedWriteHalf>,
}

impl<S: ImageSource> Answers<'_, S> {
    async fn answer(&self, request: Request) -> Result<()> {
        let Request { command, cookie, .. } = request;
        match command {
            command::READ => match self.check(&request) {
                Ok(()) if self.structured => self.read_in_chunks(request).await,
                Ok(()) => self.read_plainly(request).await,
                Err((error, why)) => self.fail(cookie, error, why).await,
            },
            command::BLOCK_STATUS if self.allocation => match self.check(&request) {
                Ok(()) => self.block_status(request).await,
                Err((error, why)) => self.fail(cookie, error, why).await,
            },
            command::FLUSH => self.write(&[&wire::simple_reply(0, cookie)]).await,
            command::WRITE | command::WRITE_ZEROES | command::TRIM => {
                self.fail(cookie, errno::EPERM, "a snapshot cannot be written").await
            }
            _ => self.fail(cookie, errno::EINVAL, "unknown command").await,
        }
    }

    fn check(&self, request: &Request) -> std::result::Result<(), (u32, &'static str)> {
        let end = request.offset.checked_add(u64::from(request.length));
        if request.length == 0 || end.is_none_or(|end| end > self.disk.size()) {
            return Err((errno::EINVAL, "the request goes past the end of the disk"));
        }
        if request.command == command::READ && request.length > wire::MAX_PAYLOAD {
            return Err((errno::EOVERFLOW, "the request is too long"));
        }
        Ok(())
    }

    /// Data piece by piece; pieces of other answers may come between.
    async fn read_in_chunks(&self, request: Request) -> Result<()> {
        let Request { cookie, mut offset, length, .. } = request;
        let end = offset + u64::from(length);
        while offset < end {
            let length = (end - offset).min(u64::from(PIECE)) as u32;
            let data = match self.piece(offset, length).await {
                Ok(data) => data,
                Err(message) => return self.fail(cookie, errno::EIO, &message).await,
            };
            let done = if offset + u64::from(length) == end { chunk::DONE } else { 0 };
            if is_zero(&data) {
                let mut out = [0; DATA_HEAD + 4];
                let head = wire::chunk_head(done, chunk::OFFSET_HOLE, cookie, 12);
                out[..wire::CHUNK_HEAD].copy_from_slice(&head);
                out[wire::CHUNK_HEAD..DATA_HEAD].copy_from_slice(&offset.to_be_bytes());
                out[DATA_HEAD..].copy_from_slice(&length.to_be_bytes());
                self.write(&[&out]).await?;
            } else {
                let mut out = [0; DATA_HEAD];
                let head = wire::chunk_head(done, chunk::OFFSET_DATA, cookie, length + 8);
                out[..wire::CHUNK_HEAD].copy_from_slice(&head);
                out[wire::CHUNK_HEAD..].copy_from_slice(&offset.to_be_bytes());
                self.write(&[&out, &data]).await?;
            }
            offset += u64::from(length);
        }
        Ok(())
    }

    /// A simple reply: all data in one go, so that an error after its beginning ends the
    /// connection.
    async fn read_plainly(&self, request: Request) -> Result<()> {
        let Request { cookie, mut offset, length, .. } = request;
        let end = offset + u64::from(length);
        let mut piece = self.piece(offset, (end - offset).min(u64::from(PIECE)) as u32).await;
        if let Err(message) = &piece {
            return self.fail(cookie, errno::EIO, message).await;
        }
        let mut write = self.write.lock().await;
        write.write_all(&wire::simple_reply(0, cookie)).await?;
        loop {
            let data = piece.map_err(Error::other)?;
            write.write_all(&data).await?;
            offset += data.len() as u64;
            drop(data);
            if offset >= end {
                return Ok(());
            }
            piece = self.piece(offset, (end - offset).min(u64::from(PIECE)) as u32).await;
        }
    }

    async fn piece(&self, offset: u64, length: u32) -> std::result::Result<Bytes, String> {
        let data = self.disk.read(offset, length).await.map_err(|e| e.to_string())?;
        if data.len() == length as usize {
            return Ok(data);
        }
        Err(format!("{} bytes at offset {offset} came where {length} are", data.len()))
    }

    async fn block_status(&self, request: Request) -> Result<()> {
        let Request { cookie, offset, length, flags, .. } = request;
        let stretches = match self.disk.extents(offset, u64::from(length)).await {
            Ok(stretches) => stretches,
            Err(e) => return self.fail(cookie, errno::EIO, &e.to_string()).await,
        };
        let most = if flags & command::FLAG_REQ_ONE != 0 { 1 } else { MAX_EXTENTS };
        let mut out = ALLOCATION_ID.to_be_bytes().to_vec();
        let mut left = length;
        for stretch in stretches.iter().filter(|stretch| stretch.length > 0).take(most) {
            let length = stretch.length.min(u64::from(left)) as u32;
            let state = if stretch.zero { wire::STATE_HOLE | wire::STATE_ZERO } else { 0 };
            out.extend(length.to_be_bytes());
            out.extend(state.to_be_bytes());
            left -= length;
            if left == 0 {
                break;
            }
        }
        if left == length {
            return self.fail(cookie, errno::EIO, "nothing is known about this place").await;
        }
        let head = wire::chunk_head(chunk::DONE, chunk::BLOCK_STATUS, cookie, out.len() as u32);
        self.write(&[&head, &out]).await
    }

    async fn fail(&self, cookie: u64, error: u32, message: &str) -> Result<()> {
        if !self.structured {
            return self.write(&[&wire::simple_reply(error, cookie)]).await;
        }
        let payload = wire::encode_error(error, message);
        let head = wire::chunk_head(chunk::DONE, chunk::ERROR, cookie, payload.len() as u32);
        self.write(&[&head, &payload]).await
    }

    /// Writes the parts of one message together.
    async fn write(&self, parts: &[&[u8]]) -> Result<()> {
        let mut write = self.write.lock().await;
        for part in parts {
            write.write_all(part).await?;
        }
        Ok(())
    }
}

fn is_zero(data: &[u8]) -> bool {
    // Most data ends it at the first words.
    let words = data.chunks_exact(16);
    words.remainder().iter().all(|byte| *byte == 0) && words.into_iter().all(|word| word == [0; 16])
}
