//! `fleece completions SHELL`.

use clap::CommandFactory;

use crate::error::Result;

/// Write the completion script of a shell to standard output.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Which shell.
    shell: clap_complete::Shell,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut command = super::Cli::command();
    clap_complete::generate(args.shell, &mut command, "fleece", &mut std::io::stdout());
    Ok(())
}
