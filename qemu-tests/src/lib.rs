//! The harness of the real-QEMU tests: guests, engines, stores, images and the comparison of
//! bytes. A scenario in `tests/` reads like the sentence in its name; what it needs is here.
//!
//! Nothing here knows Fleece's insides: only its three programs and what they print.

pub mod bench;
pub mod cluster;
pub mod content;
pub mod etcd;
pub mod fixture;
pub mod guest;
pub mod held;
pub mod image;
pub mod live;
pub mod memory;
pub mod mount;
pub mod network;
pub mod process;
pub mod proxy;
pub mod qmp;
pub mod s3;
pub mod scenario;
pub mod tools;
pub mod wait;
pub mod wire;

pub use fixture::Fixture;
pub use guest::{Disk, Guest, Machine};
pub use process::{Finished, Running};
pub use scenario::{Taken, take};
pub use wait::wait_until;

/// What every scenario returns.
pub type Result<T = ()> = anyhow::Result<T>;

/// Units that make sizes readable.
pub const MIB: u64 = 1 << 20;
/// The newest level of a store that this version knows.
pub const NEWEST_LEVEL: u64 = 3;
