//! `fleece cleanup [VM]`.

use std::path::PathBuf;

use serde::Serialize;

use super::Session;
use crate::error::{Context, Result};
use crate::progress::Message;
use crate::qmp::recover::{Report, cleanup};
use crate::vms::{self, Vm};

/// Remove what dead backups left behind in a VM, or in all of this host; needs no engine.
#[derive(clap::Args)]
pub(super) struct Args {
    /// VM, by name; all described ones if none is given.
    vm: Option<String>,

    /// Its monitor (QMP) socket, where it is not described in the VMs' folder.
    #[arg(long, value_name = "SOCK")]
    qmp: Option<PathBuf>,
}

#[derive(Serialize)]
struct Shown {
    vm: String,
    #[serde(flatten)]
    report: Report,
}

impl Message for Shown {
    const TYPE: &'static str = "cleaned";

    fn human(&self) -> String {
        match self.report.done.is_empty() {
            true => format!("{}: nothing to end", self.vm),
            false => format!("{}: {}", self.vm, self.report.done.join("; ")),
        }
    }
}

pub(super) async fn run(session: &Session, args: Args) -> Result<()> {
    if args.vm.is_some() || args.qmp.is_some() {
        let vm = session.vm(args.vm.as_deref(), args.qmp.as_deref())?;
        let report = cleanup(&session.run_dir, &vm).await?;
        tell(session, &vm, report);
        return Ok(());
    }
    for vm in vms::list(&session.vms_dir)? {
        match cleanup(&session.run_dir, &vm).await.context(|| vm.name.clone()) {
            Ok(report) => tell(session, &vm, report),
            Err(error) => session.fail(&error),
        }
    }
    Ok(())
}

/// Says what was ended; what is left is a warning.
pub(super) fn tell(session: &Session, vm: &Vm, report: Report) {
    let name = if vm.name.is_empty() { vm.qmp.display().to_string() } else { vm.name.clone() };
    let left = report.left.clone();
    session.report.send(&Shown { vm: name.clone(), report });
    left.iter().for_each(|what| session.report.warn(&format!("{name}: left: {what}")));
}
