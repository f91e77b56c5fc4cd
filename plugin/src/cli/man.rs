//! `fleece man`.

use std::io::Write;
use std::path::PathBuf;

use clap::CommandFactory;

use crate::error::{Context, Result};

/// Write the man page to standard output, or those of all verbs into a folder.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder for fleece.1 and one page for each verb.
    #[arg(long, value_name = "DIR")]
    to_dir: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let command = super::Cli::command();
    if let Some(folder) = &args.to_dir {
        return clap_mangen::generate_to(command, folder)
            .context(|| format!("cannot write man pages into {}", folder.display()));
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command)
        .render(&mut page)
        .context(|| "cannot make the page".to_owned())?;
    std::io::stdout().write_all(&page).context(|| "cannot write the page".to_owned())
}
