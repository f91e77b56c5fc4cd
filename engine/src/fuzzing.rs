//! What `engine/fuzz` calls: functions that take any bytes. Built for the fuzzer and for tests only.
//!
//! Tests call them too, with every seed that is committed in `engine/fuzz/seeds`.

pub use crate::cluster::fuzzing::frames;
pub use crate::detect::fuzzing::index;
pub use crate::rpc::fuzzing::calls;
pub use crate::store::fuzzing::{container, recipe, small_objects};

#[cfg(test)]
use crate::{
    cluster::fuzzing::seeds as conversations,
    detect::fuzzing::seeds as indexes,
    rpc::fuzzing::seeds::recordings,
    store::fuzzing::seeds::{containers, objects, recipes},
};

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod seeds;
