//! Generates the Rust side of the protocol.

fn main() {
    println!("cargo:rerun-if-changed=engine.capnp");
    if let Err(error) = capnpc::CompilerCommand::new().file("engine.capnp").run() {
        eprintln!("cannot compile engine.capnp: {error}\nIs `capnp` installed? ci/setup does it.");
        std::process::exit(1);
    }
}
