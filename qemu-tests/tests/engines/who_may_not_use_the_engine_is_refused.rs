//! The engine's socket: its mode, and what a user is told who may not use it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use qemu_tests::process::Running;
use qemu_tests::wait::SOON;
use qemu_tests::{Fixture, Result, tools};

/// nobody's user and group on every Debian.
const NOBODY: u32 = 65534;

#[test]
fn the_socket_is_for_its_owner_and_group() -> Result {
    let fixture = Fixture::new()?;
    assert_eq!(fs::metadata(fixture.socket())?.permissions().mode() & 0o777, 0o660);
    for name in ["store", "state"] {
        let mode = fs::metadata(fixture.path(name))?.permissions().mode();
        assert_eq!(mode & 0o077, 0, "others can read {name} (mode {mode:o})");
    }
    Ok(())
}

#[test]
fn a_foreign_user_who_gets_to_the_socket_is_refused() -> Result {
    let fixture = Fixture::new()?;
    // Let them in as far as a careless administrator could.
    fs::set_permissions(fixture.folder(), Permissions::from_mode(0o755))?;
    fs::set_permissions(fixture.socket(), Permissions::from_mode(0o666))?;
    for (program, verb) in [("fleecectl", "status"), ("fleece", "snapshots")] {
        let copy = fixture.path(program);
        fs::copy(tools::fleece(program)?.get_program(), &copy)?;
        let mut command = Command::new(&copy);
        command.args([verb, "--engine"]).arg(fixture.socket()).uid(NOBODY).gid(NOBODY);
        let refused = Running::start(program, command.current_dir("/"))?.finish(SOON)?.code(17)?;
        let said = refused.printed();
        assert!(said.contains("65534") && said.contains("allowed_uids"), "{said}");
    }
    Ok(())
}
