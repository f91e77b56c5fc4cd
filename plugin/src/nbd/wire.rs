//! The words of the NBD protocol: numbers, and their form on the wire.
//!
//! After `doc/proto.md` of <https://github.com/NetworkBlockDevice/nbd>: the fixed newstyle
//! handshake, simple and structured replies, meta contexts. Everything is big endian.
//! Decoding takes slices that the caller has bounded; it neither panics nor allocates on the
//! peer's word.

use bytes::Buf;

/// First word of a server's greeting, `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting and first of every option, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Longest export or context name, error message or other string; the protocol's limit.
pub const MAX_STRING: u32 = 4096;
/// Longest payload of one option or of an answer to it that we take: a name, and as many
/// queries as [`MAX_QUERIES`] of moderate length.
pub const MAX_OPTION: u32 = 64 * 1024;
/// Options a client may send, or answers a server may give to one, before we hang up.
pub const MAX_OPTIONS: usize = 256;
/// Meta context queries in one option; nobody has more than a few bitmaps per export.
pub const MAX_QUERIES: u32 = 16;
/// Longest read or write that both sides must understand without negotiated sizes.
pub const MAX_PAYLOAD: u32 = 32 * 1024 * 1024;

/// Handshake flags; the client's have the same values.
pub mod handshake {
    /// The server speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeros after `NBD_OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Options of the handshake (`NBD_OPT_…`).
#[allow(missing_docs)]
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Answers to options (`NBD_REP_…`).
#[allow(missing_docs)]
pub mod answer {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR: u32 = 1 << 31;
    pub const UNSUPPORTED: u32 = ERROR | 1;
    pub const POLICY: u32 = ERROR | 2;
    pub const INVALID: u32 = ERROR | 3;
    pub const TLS_REQUIRED: u32 = ERROR | 5;
    pub const UNKNOWN: u32 = ERROR | 6;
    pub const SHUTDOWN: u32 = ERROR | 7;
    pub const TOO_BIG: u32 = ERROR | 9;
}

/// Kinds of `NBD_REP_INFO` (`NBD_INFO_…`).
#[allow(missing_docs)]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export (`NBD_FLAG_…`).
#[allow(missing_docs)]
pub mod flag {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Commands (`NBD_CMD_…`).
#[allow(missing_docs)]
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    /// Flag of BLOCK_STATUS: one extent per context, not beyond the request.
    pub const FLAG_REQ_ONE: u16 = 1 << 3;
}

/// Chunks of structured replies (`NBD_REPLY_TYPE_…`).
#[allow(missing_docs)]
pub mod chunk {
    /// Flag: the last chunk of its reply.
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// Bit of every kind that means an error.
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT | 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Errors on the wire; the values of Linux.
#[allow(missing_docs)]
pub mod errno {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// The meta context that tells data from holes and zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Flag of `base:allocation`: nothing is allocated there.
pub const STATE_HOLE: u32 = 1;
/// Flag of `base:allocation`: reads as zeros.
pub const STATE_ZERO: u32 = 2;
/// Flag of `qemu:dirty-bitmap:…`: written since the bitmap was made.
pub const STATE_DIRTY: u32 = 1;

/// The meta context of a dirty bitmap of QEMU.
#[must_use]
pub fn dirty_bitmap(name: &str) -> String {
    format!("qemu:dirty-bitmap:{name}")
}

/// A message that does not follow the protocol; says how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed(pub &'static str);

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Malformed {}

impl From<bytes::TryGetError> for Malformed {
    fn from(_: bytes::TryGetError) -> Self {
        Malformed("the message is too short")
    }
}

/// Result of decoding.
pub type Decoded<T> = Result<T, Malformed>;

/// A request, without the data of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// One of [`command`].
    pub command: u16,
    /// Chosen by the client, comes back in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// Bytes on the wire.
    pub const LEN: usize = 28;

    /// The wire form.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// Reads the wire form.
    pub fn decode(mut input: &[u8]) -> Decoded<Self> {
        if input.try_get_u32()? != REQUEST_MAGIC {
            return Err(Malformed("a request does not begin with its magic number"));
        }
        Ok(Request {
            flags: input.try_get_u16()?,
            command: input.try_get_u16()?,
            cookie: input.try_get_u64()?,
            offset: input.try_get_u64()?,
            length: input.try_get_u32()?,
        })
    }
}

/// The first 16 bytes of a reply; a chunk's length follows in 4 more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyHead {
    /// The whole reply, but for the data of a successful read.
    Simple {
        /// 0, or one of [`errno`].
        error: u32,
        /// The request's.
        cookie: u64,
    },
    /// One of the chunks of a structured reply.
    Chunk {
        /// [`chunk::DONE`] or nothing.
        flags: u16,
        /// One of [`chunk`].
        kind: u16,
        /// The request's.
        cookie: u64,
    },
}

impl ReplyHead {
    /// Bytes on the wire.
    pub const LEN: usize = 16;

    /// Reads the wire form.
    pub fn decode(mut input: &[u8]) -> Decoded<Self> {
        match input.try_get_u32()? {
            SIMPLE_REPLY_MAGIC => {
                Ok(ReplyHead::Simple { error: input.try_get_u32()?, cookie: input.try_get_u64()? })
            }
            CHUNK_MAGIC => Ok(ReplyHead::Chunk {
                flags: input.try_get_u16()?,
                kind: input.try_get_u16()?,
                cookie: input.try_get_u64()?,
            }),
            _ => Err(Malformed("a reply does not begin with its magic number")),
        }
    }
}

/// Wire form of a simple reply.
#[must_use]
pub fn simple_reply(error: u32, cookie: u64) -> [u8; ReplyHead::LEN] {
    let mut out = [0; ReplyHead::LEN];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// Bytes of a chunk's header, its length included.
pub const CHUNK_HEAD: usize = 20;

/// Wire form of a chunk's header.
#[must_use]
pub fn chunk_head(flags: u16, kind: u16, cookie: u64, length: u32) -> [u8; CHUNK_HEAD] {
    let mut out = [0; CHUNK_HEAD];
    out[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&length.to_be_bytes());
    out
}

/// Bytes of the header of an option: magic, option, length.
pub const OPTION_HEAD: usize = 16;

/// Wire form of an option, payload included.
#[must_use]
pub fn option_message(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OPTION_HEAD + payload.len());
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out
}

/// Reads the header of an option: which, and the length of its payload.
pub fn decode_option_head(mut input: &[u8]) -> Decoded<(u32, u32)> {
    if input.try_get_u64()? != OPTION_MAGIC {
        return Err(Malformed("an option does not begin with its magic number"));
    }
    Ok((input.try_get_u32()?, input.try_get_u32()?))
}

/// Bytes of the header of an answer to an option.
pub const ANSWER_HEAD: usize = 20;

/// The header of an answer to an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AnswerHead {
    /// The option that is answered.
    pub option: u32,
    /// One of [`answer`].
    pub kind: u32,
    /// Bytes of payload.
    pub length: u32,
}

impl AnswerHead {
    /// Reads the wire form.
    pub fn decode(mut input: &[u8]) -> Decoded<Self> {
        if input.try_get_u64()? != OPTION_REPLY_MAGIC {
            return Err(Malformed("an answer does not begin with its magic number"));
        }
        Ok(AnswerHead {
            option: input.try_get_u32()?,
            kind: input.try_get_u32()?,
            length: input.try_get_u32()?,
        })
    }
}

/// Wire form of an answer to an option, payload included.
#[must_use]
pub fn answer_message(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(ANSWER_HEAD + payload.len());
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out
}

/// Payload of INFO and GO: the export, and what we want to know beyond its size and flags.
#[must_use]
pub fn encode_go(export: &str, wanted: &[u16]) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|kind| out.extend(kind.to_be_bytes()));
    out
}

/// Reads the payload of INFO and GO: the export's name, and whether block sizes are wanted.
pub fn decode_go(mut input: &[u8]) -> Decoded<(&str, bool)> {
    let export = get_string(&mut input)?;
    let count = input.try_get_u16()?;
    if input.len() != usize::from(count) * 2 {
        return Err(Malformed("the list of wanted information has another length"));
    }
    let wants_sizes = input.chunks_exact(2).any(|kind| kind == info::BLOCK_SIZE.to_be_bytes());
    Ok((export, wants_sizes))
}

/// Payload of LIST_ and SET_META_CONTEXT.
#[must_use]
pub fn encode_meta_queries(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| put_string(&mut out, query));
    out
}

/// Reads the payload of LIST_ and SET_META_CONTEXT: the export's name and the queries.
pub fn decode_meta_queries(mut input: &[u8]) -> Decoded<(&str, Vec<&str>)> {
    let export = get_string(&mut input)?;
    let count = input.try_get_u32()?;
    if count > MAX_QUERIES {
        return Err(Malformed("too many meta contexts are asked for"));
    }
    let queries = (0..count).map(|_| get_string(&mut input)).collect::<Decoded<Vec<_>>>()?;
    if !input.is_empty() {
        return Err(Malformed("bytes follow the last meta context query"));
    }
    Ok((export, queries))
}

/// An answer of kind INFO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Info {
    /// Size in bytes and transmission flags.
    Export(u64, u16),
    /// Smallest, preferred and largest request, in bytes.
    BlockSize(u32, u32, u32),
    /// Something that we did not ask for.
    Other,
}

impl Info {
    /// The wire form; nothing for [`Info::Other`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match *self {
            Info::Export(size, flags) => {
                out.extend(info::EXPORT.to_be_bytes());
                out.extend(size.to_be_bytes());
                out.extend(flags.to_be_bytes());
            }
            Info::BlockSize(smallest, preferred, largest) => {
                out.extend(info::BLOCK_SIZE.to_be_bytes());
                [smallest, preferred, largest].iter().for_each(|n| out.extend(n.to_be_bytes()));
            }
            Info::Other => {}
        }
        out
    }

    /// Reads the wire form.
    pub fn decode(mut input: &[u8]) -> Decoded<Self> {
        match input.try_get_u16()? {
            info::EXPORT => Ok(Info::Export(input.try_get_u64()?, input.try_get_u16()?)),
            info::BLOCK_SIZE => Ok(Info::BlockSize(
                input.try_get_u32()?,
                input.try_get_u32()?,
                input.try_get_u32()?,
            )),
            _ => Ok(Info::Other),
        }
    }
}

/// Payload of an answer META_CONTEXT.
#[must_use]
pub fn encode_meta_context(id: u32, name: &str) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend(name.as_bytes());
    out
}

/// Reads an answer META_CONTEXT: id and name.
pub fn decode_meta_context(mut input: &[u8]) -> Decoded<(u32, &str)> {
    let id = input.try_get_u32()?;
    let name = std::str::from_utf8(input).map_err(|_| Malformed("a name is not UTF-8"))?;
    Ok((id, name))
}

/// Payload of an answer SERVER: an export's name.
#[must_use]
pub fn encode_server(export: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out
}

/// Reads an answer SERVER: an export's name; a description may follow and is ignored.
pub fn decode_server(mut input: &[u8]) -> Decoded<&str> {
    get_string(&mut input)
}

/// Payload of an error chunk without an offset.
#[must_use]
pub fn encode_error(error: u32, message: &str) -> Vec<u8> {
    let message = clip(message.as_bytes(), MAX_STRING as usize);
    let mut out = error.to_be_bytes().to_vec();
    out.extend((message.len() as u16).to_be_bytes());
    out.extend(message);
    out
}

/// Reads an error chunk: the error and the server's message; an offset may follow.
pub fn decode_error(mut input: &[u8]) -> Decoded<(u32, String)> {
    let error = input.try_get_u32()?;
    let length = usize::from(input.try_get_u16()?);
    let message = input.get(..length).ok_or(Malformed("an error message is cut short"))?;
    if error == 0 {
        return Err(Malformed("an error chunk without an error"));
    }
    Ok((error, printable(message)))
}

/// What a peer says, for our messages: bounded, without control characters.
#[must_use]
pub fn printable(text: &[u8]) -> String {
    const ENOUGH: usize = 256;
    String::from_utf8_lossy(clip(text, ENOUGH))
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

fn clip(text: &[u8], length: usize) -> &[u8] {
    text.get(..length).unwrap_or(text)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_be_bytes());
    out.extend(text.as_bytes());
}

fn get_string<'a>(input: &mut &'a [u8]) -> Decoded<&'a str> {
    let length = input.try_get_u32()?;
    if length > MAX_STRING {
        return Err(Malformed("a name is longer than the protocol allows"));
    }
    let (text, rest) =
        input.split_at_checked(length as usize).ok_or(Malformed("a name is cut short"))?;
    *input = rest;
    std::str::from_utf8(text).map_err(|_| Malformed("a name is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_never_panics(input in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::decode(&input);
            let _ = ReplyHead::decode(&input);
            let _ = AnswerHead::decode(&input);
            let _ = decode_option_head(&input);
            let _ = decode_go(&input);
            let _ = decode_meta_queries(&input);
            let _ = decode_meta_context(&input);
            let _ = decode_server(&input);
            let _ = decode_error(&input);
            let _ = Info::decode(&input);
        }

        #[test]
        fn requests_come_back(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let request = Request { flags, command, cookie, offset, length };
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
    }

    #[test]
    fn queries_come_back_and_are_bounded() {
        let payload = encode_meta_queries("vda", &[BASE_ALLOCATION, "qemu:dirty-bitmap:b"]);
        assert_eq!(
            decode_meta_queries(&payload),
            Ok(("vda", vec![BASE_ALLOCATION, "qemu:dirty-bitmap:b"]))
        );
        let many = vec!["x"; MAX_QUERIES as usize + 1];
        assert!(decode_meta_queries(&encode_meta_queries("vda", &many)).is_err());
        assert!(decode_server(&u32::MAX.to_be_bytes()).is_err());
    }

    #[test]
    fn a_server_cannot_write_on_our_terminal() {
        assert_eq!(printable(b"bad\x1b[2J\nx"), "bad [2J x");
        assert_eq!(printable(&[b'a'; 9000]).len(), 256);
    }
}
