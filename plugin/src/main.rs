//! `fleece`: backup of this host's virtual machines.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The guard stays as small as it can be: no command line, no engine.
    if std::env::args_os().nth(1).is_some_and(|word| word == fleece::qmp::guard::SUBCOMMAND) {
        return fleece::qmp::guard::main();
    }
    fleece::cli::main(std::env::args_os())
}
