//! The server's side of the handshake.

use std::io::{Error, ErrorKind, Result};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::{Exports, ImageSource};
use crate::nbd::wire::{self, Info, Malformed, answer, flag, option};

/// The id of `base:allocation`, the only context we have.
pub(super) const ALLOCATION_ID: u32 = 1;
/// What every export offers.
const FLAGS: u16 = flag::HAS_FLAGS | flag::READ_ONLY | flag::SEND_FLUSH | flag::CAN_MULTI_CONN;
/// Preferred size of requests: a page, as for QEMU's own exports.
const PREFERRED: u32 = 4096;
/// Zeros after the answer to EXPORT_NAME, unless the client does without.
const PADDING: usize = 124;

/// A client that chose its export.
pub(super) struct Chosen<'a, S> {
    pub(super) read: OwnedReadHalf,
    pub(super) write: OwnedWriteHalf,
    pub(super) disk: &'a S,
    pub(super) structured: bool,
    pub(super) allocation: bool,
}

/// Talks until the client has chosen an export, or goes (`None`).
pub(super) async fn choose<S: ImageSource>(
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
    exports: &Exports<S>,
) -> Result<Option<Chosen<'_, S>>> {
    let mut talk =
        Talk { read, write, exports, structured: false, allocation_of: None, no_zeroes: false };
    talk.greet().await?;
    for _ in 0..wire::MAX_OPTIONS {
        let mut head = [0; wire::OPTION_HEAD];
        talk.read.read_exact(&mut head).await?;
        let (asked, length) = wire::decode_option_head(&head).map_err(invalid)?;
        if length > wire::MAX_OPTION {
            return Err(invalid(Malformed("an option too long")));
        }
        let mut payload = vec![0; length as usize];
        talk.read.read_exact(&mut payload).await?;
        match talk.option(asked, &payload).await? {
            Next::More => {}
            Next::Gone => return Ok(None),
            Next::Chosen(name) => return Ok(talk.chosen(&name)),
        }
    }
    Ok(None)
}

enum Next {
    More,
    Gone,
    Chosen(String),
}

struct Talk<'a, S> {
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
    exports: &'a Exports<S>,
    structured: bool,
    /// The export for which `base:allocation` was negotiated.
    allocation_of: Option<String>,
    no_zeroes: bool,
}

impl<'a, S: ImageSource> Talk<'a, S> {
    async fn greet(&mut self) -> Result<()> {
        let flags = wire::handshake::FIXED_NEWSTYLE | wire::handshake::NO_ZEROES;
        let mut greeting = Vec::with_capacity(18);
        greeting.extend(wire::GREETING_MAGIC.to_be_bytes());
        greeting.extend(wire::OPTION_MAGIC.to_be_bytes());
        greeting.extend(flags.to_be_bytes());
        self.write.write_all(&greeting).await?;
        let theirs = self.read.read_u32().await?;
        self.no_zeroes = theirs & u32::from(wire::handshake::NO_ZEROES) != 0;
        // A client must not claim what we did not offer.
        if theirs & !u32::from(flags) != 0 {
            return Err(invalid(Malformed("unknown client flags")));
        }
        Ok(())
    }

    async fn option(&mut self, asked: u32, payload: &[u8]) -> Result<Next> {
        match asked {
            option::EXPORT_NAME => return self.export_name(payload).await,
            option::ABORT => {
                // It may have closed already.
                let _ = self.answer(asked, answer::ACK, &[]).await;
                return Ok(Next::Gone);
            }
            option::LIST if payload.is_empty() => {
                for (name, _) in &self.exports.disks {
                    self.answer(asked, answer::SERVER, &wire::encode_server(name)).await?;
                }
                self.answer(asked, answer::ACK, &[]).await?;
            }
            option::STRUCTURED_REPLY if payload.is_empty() => {
                self.structured = true;
                self.answer(asked, answer::ACK, &[]).await?;
            }
            option::INFO | option::GO => return self.go(asked, payload).await,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta(asked, payload).await?;
            }
            option::LIST | option::STRUCTURED_REPLY => {
                self.answer(asked, answer::INVALID, b"this option has no data").await?;
            }
            _ => self.answer(asked, answer::UNSUPPORTED, &[]).await?,
        }
        Ok(Next::More)
    }

    async fn export_name(&mut self, payload: &[u8]) -> Result<Next> {
        let name = std::str::from_utf8(payload).unwrap_or("\0");
        // This option knows no error answer: the server hangs up.
        let Some(disk) = self.exports.find(name) else { return Ok(Next::Gone) };
        let mut out = disk.size().to_be_bytes().to_vec();
        out.extend(FLAGS.to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; PADDING]);
        }
        self.write.write_all(&out).await?;
        Ok(Next::Chosen(name.to_owned()))
    }

    async fn go(&mut self, asked: u32, payload: &[u8]) -> Result<Next> {
        let Ok((name, _)) = wire::decode_go(payload) else {
            self.answer(asked, answer::INVALID, b"malformed option").await?;
            return Ok(Next::More);
        };
        let Some(disk) = self.exports.find(name) else {
            self.answer(asked, answer::UNKNOWN, b"no such export").await?;
            return Ok(Next::More);
        };
        let size = Info::Export(disk.size(), FLAGS);
        let blocks = Info::BlockSize(1, PREFERRED, wire::MAX_PAYLOAD);
        for info in [size, blocks] {
            self.answer(asked, answer::INFO, &info.encode()).await?;
        }
        self.answer(asked, answer::ACK, &[]).await?;
        let go = asked == option::GO;
        Ok(if go { Next::Chosen(name.to_owned()) } else { Next::More })
    }

    async fn meta(&mut self, asked: u32, payload: &[u8]) -> Result<()> {
        let setting = asked == option::SET_META_CONTEXT;
        if setting {
            self.allocation_of = None;
        }
        let Ok((name, queries)) = wire::decode_meta_queries(payload) else {
            return self.answer(asked, answer::INVALID, b"malformed option").await;
        };
        if !self.structured {
            return self.answer(asked, answer::INVALID, b"ask for structured replies first").await;
        }
        if self.exports.find(name).is_none() {
            return self.answer(asked, answer::UNKNOWN, b"no such export").await;
        }
        let lists_all = !setting && (queries.is_empty() || queries.contains(&"base:"));
        if lists_all || queries.contains(&wire::BASE_ALLOCATION) {
            // In a list, ids mean nothing.
            let id = if setting { ALLOCATION_ID } else { 0 };
            let context = wire::encode_meta_context(id, wire::BASE_ALLOCATION);
            self.answer(asked, answer::META_CONTEXT, &context).await?;
            if setting {
                self.allocation_of = Some(name.to_owned());
            }
        }
        self.answer(asked, answer::ACK, &[]).await
    }

    async fn answer(&mut self, asked: u32, kind: u32, payload: &[u8]) -> Result<()> {
        self.write.write_all(&wire::answer_message(asked, kind, payload)).await
    }

    fn chosen(self, name: &str) -> Option<Chosen<'a, S>> {
        Some(Chosen {
            read: self.read,
            write: self.write,
            disk: self.exports.find(name)?,
            structured: self.structured,
            // Contexts hold only for the export that they were negotiated for.
            allocation: self.allocation_of.as_deref() == Some(name),
        })
    }
}

fn invalid(cause: Malformed) -> Error {
    Error::new(ErrorKind::InvalidData, cause)
}
