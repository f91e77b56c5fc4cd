//! Work on the store as a whole: restore, verify, rebuild.

#[cfg(test)]
pub(crate) mod fixture;
pub mod rebuild;
pub mod restore;
pub mod usage;
pub mod verify;
