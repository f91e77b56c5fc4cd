//! The machine that figures were measured on.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

use crate::{Result, tools};

/// Processor, cores, memory, kernel, disk and date, as a list in Markdown.
///
/// # Errors
/// When `/proc` or a tool does not answer.
pub fn describe() -> Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        line.split(':').nth(1).map(|value| value.trim().to_owned())
    };
    let flags = field("flags").unwrap_or_default();
    let has = |flag: &str| flags.split(' ').any(|one| one == flag);
    let extensions: Vec<&str> =
        ["aes", "sha_ni", "avx2", "avx512f"].into_iter().filter(|flag| has(flag)).collect();
    let cores = std::thread::available_parallelism()?.get();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let date = tools::run(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]))?;
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let system = system.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    Ok(format!(
        "- Machine: {}, {cores} cores ({}{}), {:.1} GiB of memory\n- System: {}, Linux {}\n- Temporary files: {}\n- Date: {}",
        field("model name").unwrap_or_else(|| "unknown processor".into()),
        extensions.join(" "),
        if has("hypervisor") { "; a virtual machine itself" } else { "" },
        memory()? as f64 / 1024.0 / 1024.0,
        system.unwrap_or("unknown").trim_matches('"'),
        kernel.trim(),
        disk(&std::env::temp_dir())?,
        date.trim()
    ))
}

/// KiB of memory.
fn memory() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:")).context("no MemTotal")?;
    Ok(line.split_whitespace().nth(1).context("MemTotal without a value")?.parse()?)
}

/// The file system that a folder lies on, and its device.
fn disk(folder: &Path) -> Result<String> {
    let text = tools::run(Command::new("df").args(["--output=fstype,source"]).arg(folder))?;
    let line = text.lines().nth(1).context("df said nothing")?;
    Ok(line.split_whitespace().collect::<Vec<_>>().join(" on "))
}

/// The first words of what a program prints about its version.
///
/// # Errors
/// When it cannot be run.
pub fn version(command: &mut Command) -> Result<String> {
    let text = tools::run(command)?;
    let line = text.lines().next().unwrap_or_default();
    Ok(line.split(" compiled").next().unwrap_or_default().trim().to_owned())
}
