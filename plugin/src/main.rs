//! `fleece`: backup of this host's virtual machines.

use std::os::unix::process::CommandExt;

/// What glibc's malloc shall keep of what is freed; it reads this at its start only. Else it gives the
/// memory of every message back, to be faulted in again for the next one: measured, half of the
/// system time of a backup.
const MALLOC: [(&str, &str); 2] =
    [("MALLOC_TRIM_THRESHOLD_", "4194304"), ("MALLOC_MMAP_THRESHOLD_", "4194304")];

fn main() -> std::process::ExitCode {
    keep_what_is_freed();
    fleece::cli::main(std::env::args_os())
}

/// Starts this program anew with [`MALLOC`], unless the environment says otherwise. Where that
/// fails it goes on, slower.
fn keep_what_is_freed() {
    if MALLOC.iter().any(|(name, _)| std::env::var_os(name).is_some()) {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        let mut again = std::process::Command::new(program);
        let name = std::env::args_os().next().unwrap_or_default();
        // Comes back only when it failed; the process stays the same one.
        let _ = again.arg0(name).args(std::env::args_os().skip(1)).envs(MALLOC).exec();
    }
}
