//! Work on the store as a whole: restore, verify, rebuild.

#[cfg(test)]
pub(crate) mod fixture;
pub mod restore;
