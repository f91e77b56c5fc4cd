//! `fleece abort`.

use super::Session;
use crate::error::{Error, Kind, Result};

/// End a backup.
#[derive(clap::Args)]
pub(super) struct Args {
    /// VM, by name.
    #[arg(value_name = "VM")]
    vm: Option<String>,
}

pub(super) async fn run(_session: &Session, _args: Args) -> Result<()> {
    Err(Error::new(Kind::Failed, "not yet"))
}
