//! Work on the store as a whole: restore, verify, rebuild.

pub mod restore;
