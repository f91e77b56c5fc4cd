//! The per-host engine of Fleece: it knows blocks and nothing of QEMU.

pub mod detect;
pub mod error;
pub mod fingerprint;
pub mod ids;
pub mod jobs;
pub mod pool;
pub mod rpc;
pub mod session;
pub mod sort;
pub mod store;
