//! `fleece abort VM`.

use std::path::PathBuf;

use super::Session;
use super::cleanup::tell;
use crate::error::Result;
use crate::qmp::recover::abort;

/// End the backup of a VM that runs now, or what one left; the guest goes on.
#[derive(clap::Args)]
pub(super) struct Args {
    /// VM, by name.
    #[arg(required_unless_present = "qmp")]
    vm: Option<String>,

    /// Its monitor (QMP) socket, where it is not described in the VMs' folder.
    #[arg(long, value_name = "SOCK")]
    qmp: Option<PathBuf>,
}

pub(super) async fn run(session: &Session, args: Args) -> Result<()> {
    let vm = session.vm(args.vm.as_deref(), args.qmp.as_deref())?;
    let report = abort(&session.run_dir, &vm).await?;
    tell(session, &vm, report);
    Ok(())
}
