//! What `plugin/fuzz` calls: functions that take any bytes. Built for the fuzzer and for tests only.
//!
//! Tests call them too, with every seed that is committed in `plugin/fuzz/seeds`.

pub use crate::engine::fuzzing::answers;
pub use crate::nbd::fuzzing::{client as nbd_client, server as nbd_server};
pub use crate::qmp::fuzzing::qmp;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod seeds;
