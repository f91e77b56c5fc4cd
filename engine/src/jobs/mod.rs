//! Work on the store as a whole: restore, verify, rebuild, checkpoints, tidying.

pub mod affected;
pub mod checkpoint;
#[cfg(test)]
pub(crate) mod fixture;
pub mod journals;
pub mod rebuild;
pub mod repair;
pub mod restore;
pub mod tidy;
pub mod usage;
pub mod verify;
