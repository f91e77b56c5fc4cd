//! The client's side of the fixed newstyle handshake.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::error::{NbdError, NbdErrorKind};
use super::wire::{self, AnswerHead, Info, answer, flag, option};

/// What the server told about the export.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Shape {
    pub(crate) size: u64,
    pub(crate) flags: u16,
    /// Offsets and lengths must be multiples of this.
    pub(crate) smallest: u32,
    /// Longest read or write.
    pub(crate) largest: u32,
}

impl Shape {
    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A connection in its handshake.
pub(crate) struct Handshake<R, W> {
    read: R,
    write: W,
    place: String,
}

type Answer = (u32, Vec<u8>);

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Handshake<R, W> {
    /// Takes the greeting; says that we speak fixed newstyle.
    pub(crate) async fn greet(read: R, write: W, place: &str) -> Result<Self, NbdError> {
        let mut this = Handshake { read, write, place: place.to_owned() };
        let mut greeting = [0; 18];
        this.receive(&mut greeting).await?;
        if greeting[..8] != wire::GREETING_MAGIC.to_be_bytes() {
            return Err(this.broken("what listens there is no NBD server"));
        }
        if greeting[8..16] != wire::OPTION_MAGIC.to_be_bytes() {
            return Err(this.broken("it only speaks the old style of NBD"));
        }
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        if flags & wire::handshake::FIXED_NEWSTYLE == 0 {
            return Err(this.broken("it does not speak fixed newstyle"));
        }
        let ours = flags & (wire::handshake::FIXED_NEWSTYLE | wire::handshake::NO_ZEROES);
        this.send(&u32::from(ours).to_be_bytes()).await?;
        Ok(this)
    }

    /// Asks for structured replies.
    pub(crate) async fn structured_replies(&mut self) -> Result<bool, NbdError> {
        let answers = self.ask(option::STRUCTURED_REPLY, &[]).await?;
        Ok(matches!(answers.last(), Some((answer::ACK, _))))
    }

    /// The names of all exports.
    pub(crate) async fn list(&mut self) -> Result<Vec<String>, NbdError> {
        let mut names = Vec::new();
        for (kind, payload) in self.ask(option::LIST, &[]).await? {
            match kind {
                answer::SERVER => {
                    let name = wire::decode_server(&payload).map_err(|e| self.broken(e))?;
                    names.push(name.to_owned());
                }
                answer::ACK => {}
                _ => return Err(self.refused("list of exports", kind, &payload)),
            }
        }
        Ok(names)
    }

    /// Selects meta contexts: their ids on this connection, in the order of `contexts`.
    pub(crate) async fn meta_contexts(
        &mut self,
        export: &str,
        contexts: &[&str],
    ) -> Result<Vec<u32>, NbdError> {
        let payload = wire::encode_meta_queries(export, contexts);
        let mut ids = vec![None; contexts.len()];
        for (kind, payload) in self.ask(option::SET_META_CONTEXT, &payload).await? {
            match kind {
                answer::META_CONTEXT => {
                    let (id, name) =
                        wire::decode_meta_context(&payload).map_err(|e| self.broken(e))?;
                    if let Some(at) = contexts.iter().position(|context| *context == name) {
                        ids[at] = Some(id);
                    }
                }
                answer::ACK => {}
                _ => return Err(self.refused("meta contexts", kind, &payload)),
            }
        }
        let missing = ids.iter().position(Option::is_none);
        if let Some(at) = missing {
            let message = format!("the export has no {:?}", printable(contexts[at]));
            return Err(NbdError::new(NbdErrorKind::NoContext, &self.place, message));
        }
        Ok(ids.into_iter().flatten().collect())
    }

    /// What the export is like, without choosing it; `None` if the server cannot say.
    pub(crate) async fn info(&mut self, export: &str) -> Result<Option<Shape>, NbdError> {
        let payload = wire::encode_go(export, &[wire::info::BLOCK_SIZE]);
        let answers = self.ask(option::INFO, &payload).await?;
        if let Some((answer::UNSUPPORTED | answer::POLICY, _)) = answers.last() {
            return Ok(None);
        }
        self.shape(&answers).map(Some)
    }

    /// Chooses the export; requests may follow.
    pub(crate) async fn go(mut self, export: &str) -> Result<(R, W, Shape), NbdError> {
        let payload = wire::encode_go(export, &[wire::info::BLOCK_SIZE]);
        let answers = self.ask(option::GO, &payload).await?;
        if let Some((answer::UNSUPPORTED, _)) = answers.last() {
            return self.export_name(export).await;
        }
        let shape = self.shape(&answers)?;
        Ok((self.read, self.write, shape))
    }

    /// The way of servers without GO, such as the `nbd` crate's.
    async fn export_name(mut self, export: &str) -> Result<(R, W, Shape), NbdError> {
        self.send(&wire::option_message(option::EXPORT_NAME, export.as_bytes())).await?;
        let mut head = [0; 10];
        self.receive(&mut head).await.map_err(|e| {
            let message = format!("the server closes on the export's name; does it exist? {e}");
            NbdError::new(NbdErrorKind::NoSuchExport, &self.place, message)
        })?;
        let mut size = [0; 8];
        size.copy_from_slice(&head[..8]);
        let flags = u16::from_be_bytes([head[8], head[9]]);
        // We always take NO_ZEROES where it is offered; every server since 2013 offers it.
        let shape = Shape { size: u64::from_be_bytes(size), flags, ..DEFAULT_SHAPE };
        let shape = self.checked(shape)?;
        Ok((self.read, self.write, shape))
    }

    /// Ends the handshake without choosing anything.
    pub(crate) async fn abort(mut self) {
        // Whether the server hears it does not matter: we close next.
        let _ = self.send(&wire::option_message(option::ABORT, &[])).await;
    }

    fn shape(&self, answers: &[Answer]) -> Result<Shape, NbdError> {
        let mut shape = DEFAULT_SHAPE;
        let mut known = false;
        for (kind, payload) in answers {
            match *kind {
                answer::INFO => match Info::decode(payload).map_err(|e| self.broken(e))? {
                    Info::Export(size, flags) => {
                        (shape.size, shape.flags) = (size, flags);
                        known = true;
                    }
                    Info::BlockSize(smallest, _, largest) => {
                        (shape.smallest, shape.largest) = (smallest, largest);
                    }
                    Info::Other => {}
                },
                answer::ACK if known => {}
                answer::ACK => return Err(self.broken("it does not tell the export's size")),
                _ => return Err(self.refused("the export", *kind, payload)),
            }
        }
        self.checked(shape)
    }

    fn checked(&self, shape: Shape) -> Result<Shape, NbdError> {
        if !shape.has(flag::HAS_FLAGS) {
            return Err(self.broken("the export's flags are not valid"));
        }
        // File offsets are signed; a larger disk is a lie and would overflow arithmetic.
        if shape.size > i64::MAX as u64 {
            return Err(self.broken(format_args!("an export of {} bytes", shape.size)));
        }
        if !shape.smallest.is_power_of_two() || shape.largest < shape.smallest {
            return Err(self.broken("impossible block sizes"));
        }
        Ok(shape)
    }

    /// Sends an option and takes all answers up to the last one.
    async fn ask(&mut self, option: u32, payload: &[u8]) -> Result<Vec<Answer>, NbdError> {
        self.send(&wire::option_message(option, payload)).await?;
        let mut answers = Vec::new();
        loop {
            let mut head = [0; wire::ANSWER_HEAD];
            self.receive(&mut head).await?;
            let head = AnswerHead::decode(&head).map_err(|e| self.broken(e))?;
            if head.option != option {
                return Err(self.broken("it answers another option than it was asked"));
            }
            if head.length > wire::MAX_OPTION || answers.len() >= wire::MAX_OPTIONS {
                return Err(self.broken("an answer without end"));
            }
            let mut payload = vec![0; head.length as usize];
            self.receive(&mut payload).await?;
            answers.push((head.kind, payload));
            if head.kind == answer::ACK || head.kind & answer::ERROR != 0 {
                return Ok(answers);
            }
        }
    }

    async fn receive(&mut self, bytes: &mut [u8]) -> Result<(), NbdError> {
        match self.read.read_exact(bytes).await {
            Ok(_) => Ok(()),
            Err(e) => Err(self.lost(&e)),
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), NbdError> {
        self.write.write_all(bytes).await.map_err(|e| self.lost(&e))
    }

    fn lost(&self, cause: &std::io::Error) -> NbdError {
        let message = format!("the server hangs up during the handshake: {cause}");
        NbdError::new(NbdErrorKind::Disconnected, &self.place, message)
    }

    fn broken(&self, what: impl std::fmt::Display) -> NbdError {
        NbdError::protocol(&self.place, what)
    }

    fn refused(&self, what: &str, kind: u32, payload: &[u8]) -> NbdError {
        let said = wire::printable(payload);
        let (error, why) = match kind {
            answer::UNKNOWN => (NbdErrorKind::NoSuchExport, "there is no such export"),
            answer::TLS_REQUIRED => (NbdErrorKind::Refused, "it wants TLS, which we do not speak"),
            answer::POLICY => (NbdErrorKind::Refused, "its configuration forbids it"),
            answer::UNSUPPORTED => (NbdErrorKind::Refused, "it does not know how"),
            answer::SHUTDOWN => (NbdErrorKind::Disconnected, "it is shutting down"),
            _ => (NbdErrorKind::Protocol, "it refuses"),
        };
        let said = if said.is_empty() { said } else { format!(" (it says: {said})") };
        NbdError::new(error, &self.place, format_args!("asked for {what}, {why}{said}"))
    }
}

/// What holds for a server that tells nothing about block sizes.
const DEFAULT_SHAPE: Shape = Shape { size: 0, flags: 0, smallest: 1, largest: wire::MAX_PAYLOAD };

fn printable(text: &str) -> String {
    wire::printable(text.as_bytes())
}
