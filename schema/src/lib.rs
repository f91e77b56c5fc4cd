//! The Cap'n Proto protocols between Fleece's programs: generated code only.

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod engine_capnp {
    include!(concat!(env!("OUT_DIR"), "/engine_capnp.rs"));
}

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod peer_capnp {
    include!(concat!(env!("OUT_DIR"), "/peer_capnp.rs"));
}
