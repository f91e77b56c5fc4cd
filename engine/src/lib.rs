//! The per-host engine of Fleece: it knows blocks and nothing of QEMU.

pub mod budget;
pub mod cluster;
pub mod config;
pub mod damage;
pub mod detect;
pub mod error;
pub mod fingerprint;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod hosts;
pub mod ids;
pub mod jobs;
pub mod membership;
pub mod memory;
pub mod moving;
pub mod owner;
pub mod part;
pub(crate) mod pem;
pub mod pool;
pub mod routing;
pub mod rpc;
pub mod session;
pub mod sort;
pub mod start;
pub mod store;
pub mod upgrade;
pub mod upkeep;
