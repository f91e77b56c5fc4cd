//! What the engine is asked: status, sessions, verify, repair, tidy, rebuild-index.

use std::path::Path;
use std::process::ExitCode;

use fleece_engine::error::{Context as _, Error, Kind, Result};
use fleece_engine::hosts::SessionReport;
use fleece_engine::rpc::client::{EngineClient, no_engine};
use serde::Serialize;
use serde_json::Value;

/// Connects, and runs `work` with the connection.
pub(crate) fn with_engine<T>(
    socket: &Path,
    work: impl AsyncFnOnce(EngineClient) -> Result<T>,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "cannot start the runtime".into())?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let client = EngineClient::connect(socket)
            .await
            .map_err(|error| error.unwrap_or_else(|| no_engine(socket)))?;
        work(client).await
    })
}

/// A value as a line of JSON with its type.
pub(crate) fn print_json(message_type: &str, value: &impl Serialize) -> Result<()> {
    let mut value =
        serde_json::to_value(value).map_err(|e| Error::caused(Kind::Failed, "cannot print", e))?;
    if let Value::Object(fields) = &mut value {
        fields.insert("message_type".into(), message_type.into());
    }
    println!("{value}");
    Ok(())
}

/// Bytes for people.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

fn ratio(of: u64, to: u64) -> String {
    if to == 0 { "–".into() } else { format!("{:.1}×", of as f64 / to as f64) }
}

pub(crate) fn status(socket: &Path, json: bool) -> Result<()> {
    let status = with_engine(socket, async |engine| engine.status().await)?;
    if json {
        return print_json("status", &status);
    }
    let encryption = if status.encrypted { "encrypted" } else { "NOT ENCRYPTED" };
    println!("store      {} ({encryption}), {}", status.store, status.store_id);
    println!(
        "snapshots  {} of {} VMs, {} logical",
        status.snapshots,
        status.vms,
        human(status.logical_bytes)
    );
    println!(
        "unique     {} blocks, {} ({} less than logical)",
        status.unique_blocks,
        human(status.unique_bytes),
        ratio(status.logical_bytes, status.unique_bytes)
    );
    println!(
        "stored     {} ({} less than logical, {} less than unique)",
        human(status.stored_bytes),
        ratio(status.logical_bytes, status.stored_bytes),
        ratio(status.unique_bytes, status.stored_bytes)
    );
    println!("index      {} on this host", human(status.index_bytes));
    println!(
        "engine     {} on {}, memory {} at most so far, budget {}",
        status.version,
        status.host,
        human(status.peak_anonymous),
        human(status.memory_budget)
    );
    if status.hosts > 1 {
        let silent = match status.hosts_silent {
            0 => String::new(),
            silent => format!(", {silent} of them SILENT: what they know is missing in unique"),
        };
        println!("cluster    {} hosts{silent}", status.hosts);
    }
    if status.double_blocks > 0 {
        println!("double     {} blocks were found stored twice", status.double_blocks);
    }
    if status.undetected_blocks > 0 {
        println!("undetected {} blocks were stored twice", status.undetected_blocks);
    }
    if status.damaged_blocks > 0 {
        println!("DAMAGED    {} blocks: run fleecectl verify", status.damaged_blocks);
    }
    print_sessions(&status.sessions);
    Ok(())
}

pub(crate) fn sessions(socket: &Path, json: bool) -> Result<()> {
    let (sessions, silent) = with_engine(socket, async |engine| engine.sessions().await)?;
    if json {
        sessions.iter().try_for_each(|session| print_json("session", session))?;
        return silent
            .iter()
            .try_for_each(|host| print_json("silent", &serde_json::json!({ "host": host })));
    }
    if sessions.is_empty() {
        println!("no backup runs");
    }
    print_sessions(&sessions);
    for host in silent {
        println!("silent     {host}: what runs there is not known");
    }
    Ok(())
}

fn print_sessions(sessions: &[SessionReport]) {
    for s in sessions {
        println!(
            "session    {:10} {}@{} {}: read {} = zero {} + unchanged {} + the rest; {} blocks asked about, \
             new {}, written {}, since {} s",
            s.host,
            s.vm,
            s.snapshot,
            s.stage,
            human(s.read),
            human(s.zero),
            human(s.unchanged),
            s.requested,
            human(s.new),
            human(s.stored),
            s.age_ms / 1000
        );
    }
}

/// Prints the lines of a long job as they come.
fn print_event(line: &str, json: bool) {
    if json {
        println!("{line}");
        return;
    }
    let Ok(Value::Object(fields)) = serde_json::from_str(line) else { return };
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let kind = fields.get("message_type").map(text).unwrap_or_default();
    let rest: Vec<String> = fields
        .iter()
        .filter(|(name, value)| *name != "message_type" && !value.is_null())
        .map(|(name, value)| format!("{name} {}", text(value)))
        .collect();
    println!("{kind}: {}", rest.join(", "));
}

pub(crate) fn verify(socket: &Path, what: Option<&str>, json: bool) -> Result<ExitCode> {
    let (vm, snapshot) = match what {
        None => ("", ""),
        Some(what) => what.split_once('@').unwrap_or((what, "")),
    };
    let clean = with_engine(socket, async |engine| {
        engine.verify(vm, snapshot, move |line| print_event(line, json)).await
    })?;
    if !json {
        println!("{}", if clean { "clean" } else { "DAMAGED: see above" });
    }
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::from(Kind::Damaged.exit_code()) })
}

pub(crate) fn repair(socket: &Path, dry_run: bool, json: bool) -> Result<ExitCode> {
    let whole = with_engine(socket, async |engine| {
        engine.repair(dry_run, move |line| print_event(line, json)).await
    })?;
    if !json {
        let what = match (whole, dry_run) {
            (true, false) => "every snapshot can be restored, as far as is known",
            (true, true) => "every snapshot could be restored then; nothing was changed",
            (false, true) => "not everything could be repaired: see above; nothing was changed",
            (false, false) => {
                "DAMAGED: the snapshots above are not whole. Back their VMs up again, so that new \
                 snapshots are; then try repair once more. fleece restore --damaged=zero rescues \
                 the rest of an old one"
            }
        };
        println!("{what}");
    }
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::from(Kind::Damaged.exit_code()) })
}

pub(crate) fn tidy(socket: &Path, dry_run: bool, json: bool) -> Result<()> {
    let removed = with_engine(socket, async |engine| {
        engine.tidy(dry_run, move |line| print_event(line, json)).await
    })?;
    if !json {
        let done = if dry_run { "would be taken away; nothing was" } else { "were taken away" };
        println!("{removed} objects {done}");
    }
    Ok(())
}

pub(crate) fn rebuild_index(socket: &Path, partition: Option<u16>, json: bool) -> Result<()> {
    let entries = with_engine(socket, async |engine| {
        engine.rebuild_index(partition, move |line| print_event(line, json)).await
    })?;
    if json {
        println!("{}", serde_json::json!({ "message_type": "rebuilt", "entries": entries }));
    } else {
        println!("rebuilt: {entries} entries");
    }
    Ok(())
}
