//! `fleece`: backup of this host's virtual machines.

fn main() -> std::process::ExitCode {
    fleece::cli::main(std::env::args_os())
}
