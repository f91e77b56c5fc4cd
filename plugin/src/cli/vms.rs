//! `fleece vms`: the VMs of this host.

use std::time::Duration;

use serde::Serialize;

use super::Session;
use super::table::layout;
use crate::error::Result;
use crate::progress::Message;
use crate::qmp::session::Session as Qemu;
use crate::vms::{self, Vm};

/// A list should come at once, whatever one of the VMs does.
const PATIENCE: Duration = Duration::from_secs(3);

/// List the VMs of this host that are described, and whether they run.
#[derive(clap::Args)]
pub(super) struct Args {}

#[derive(Serialize)]
struct One {
    name: String,
    qmp: String,
    uuid: Option<String>,
    state: String,
}

impl Message for One {
    const TYPE: &'static str = "vm";

    fn human(&self) -> String {
        format!("{} {}", self.name, self.state)
    }
}

pub(super) async fn run(session: &Session, _args: Args) -> Result<()> {
    let mut rows = Vec::new();
    for vm in vms::list(&session.vms_dir)? {
        let one = look(&vm).await;
        if session.report.is_json() {
            session.report.send(&one);
        } else {
            let uuid = one.uuid.unwrap_or_else(|| "-".to_owned());
            rows.push(vec![one.name, one.state, uuid, one.qmp]);
        }
    }
    if session.report.is_json() {
        return Ok(());
    }
    if rows.is_empty() {
        let folder = session.vms_dir.display();
        session.report.note(&format!(
            "no VMs are described in {folder}; write NAME.toml there with the line qmp = \"SOCKET\""
        ));
    } else {
        session.report.note(&layout(&["VM", "STATE", "UUID", "MONITOR"], &rows, &[]));
    }
    Ok(())
}

async fn look(vm: &Vm) -> One {
    let (uuid, state) = match tokio::time::timeout(PATIENCE, Qemu::connect(vm)).await {
        Ok(Ok(qemu)) => {
            (Some(qemu.identity().uuid.to_string()), format!("QEMU {}", qemu.version()))
        }
        Ok(Err(error)) => (None, format!("not reachable ({})", error.kind().word())),
        Err(_) => (None, "does not answer".to_owned()),
    };
    One { name: vm.name.clone(), qmp: vm.qmp.display().to_string(), uuid, state }
}
