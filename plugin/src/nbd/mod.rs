//! NBD: the wire, our client, our server.

mod buffer;
mod client;
mod connection;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handshake;
mod pending;
pub mod server;
pub mod wire;

pub use buffer::Buffer;
pub(crate) use buffer::Pool;
pub use client::{Address, ConnectOptions, Export, MAX_READ, NbdTarget, list_exports};
pub use error::{NbdError, NbdErrorKind};
