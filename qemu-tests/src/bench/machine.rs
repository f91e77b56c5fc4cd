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

/// What a program says about its version, in its first line, without its own path and ornaments.
///
/// # Errors
/// When it cannot be run.
pub fn version(command: &mut Command) -> Result<String> {
    let text = tools::run(command)?;
    Ok(plain(text.lines().next().unwrap_or_default()))
}

fn plain(line: &str) -> String {
    let line = line.split([',', ';']).next().unwrap_or_default();
    let words = line.split_whitespace().filter(|word| *word != "***");
    let words = words.take_while(|word| *word != "compiled");
    words.map(|word| word.rsplit('/').next().unwrap_or(word)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_a_few_words() {
        assert_eq!(
            plain("/usr/bin/qemu-nbd 7.2.22 (Debian 1:7.2)"),
            "qemu-nbd 7.2.22 (Debian 1:7.2)"
        );
        assert_eq!(
            plain("*** Zstandard CLI (64-bit) v1.5.4, by Yann Collet ***"),
            "Zstandard CLI (64-bit) v1.5.4"
        );
        assert_eq!(plain("restic 0.14.0 compiled with go1.19.8 on linux/amd64"), "restic 0.14.0");
    }
}
