//! The Cap'n Proto protocol between Fleece's programs: generated code only.

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod engine_capnp {
    include!(concat!(env!("OUT_DIR"), "/engine_capnp.rs"));
}
