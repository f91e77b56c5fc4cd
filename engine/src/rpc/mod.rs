//! The edge: Cap'n Proto objects on one LocalSet thread, bounded queues behind them.
//!
//! Only this folder names Cap'n Proto. What blocks (the store, a session's thread, the
//! owner) is reached through `spawn_blocking` or a queue, never from the LocalSet thread.

mod backup;
mod blocking;
pub mod client;
mod convert;
mod engine;
mod fence;
mod files;
mod flow;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod image;
mod links;
mod peers;
mod protocol;
mod reports;
mod server;
mod tls;

pub use blocking::on_a_thread;
pub use peers::Peers;
pub use server::{Services, serve};

use crate::error::{Error, Kind};

/// The longest message that is taken, in words of 8 bytes: 1 MiB. The largest call carries
/// 512 KiB; Cap'n Proto's default would allocate 64 MiB on the sender's word.
pub const MESSAGE_WORDS: usize = 128 << 10;

/// An error as it goes over the wire: its kind as a word, then the message.
fn to_wire(error: &Error) -> capnp::Error {
    capnp::Error::failed(format!("fleece:{}: {error}", error.kind().word()))
}

/// An error as it came over the wire. Cap'n Proto puts words of its own before ours.
#[must_use]
pub fn from_wire(error: &capnp::Error) -> Error {
    let text = &error.extra;
    if let Some((_, rest)) = text.split_once("fleece:")
        && let Some((word, message)) = rest.split_once(": ")
        && let Some(kind) = Kind::of_word(word)
    {
        return Error::new(kind, message);
    }
    match error.kind {
        capnp::ErrorKind::Disconnected => {
            Error::new(Kind::Failed, "the engine ended the connection (see its log)")
        }
        capnp::ErrorKind::Unimplemented => {
            Error::new(Kind::Failed, "the engine is older than this program: upgrade it")
        }
        _ => Error::new(Kind::Failed, format!("the engine says: {error}")),
    }
}
