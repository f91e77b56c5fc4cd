//! Generates the Rust side of the protocols.

fn main() {
    for schema in ["engine.capnp", "peer.capnp"] {
        println!("cargo:rerun-if-changed={schema}");
        if let Err(error) = capnpc::CompilerCommand::new().file(schema).run() {
            eprintln!("cannot compile {schema}: {error}\nIs `capnp` installed? ci/setup does it.");
            std::process::exit(1);
        }
    }
}
