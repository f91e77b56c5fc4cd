//! From the wire's types to ours, and from its errors to ours.

use fleece_schema::engine_capnp as wire;
use uuid::Uuid;

use super::types::{
    BackupPlan, Counts, Disk, DiskPlan, EngineInfo, ImageExtent, Range, SessionStatus, Snapshot,
    SnapshotId, Status,
};
use crate::error::{Error, Kind};

pub(super) type Wire<T> = Result<T, capnp::Error>;

/// What the engine's "fleece:<kind>: <message>" means to a caller.
///
/// The other side of a connection puts "remote exception: " before it.
pub(super) fn engine_error(error: &capnp::Error, doing: &str) -> Error {
    if let Some((_, reason)) = error.extra.split_once("fleece:")
        && let Some((word, message)) = reason.split_once(": ")
        && let Some(kind) = kind_of(word)
    {
        return Error::new(kind, format!("{doing}: {message}"));
    }
    match error.kind {
        // The second: in the middle of a message.
        capnp::ErrorKind::Disconnected | capnp::ErrorKind::PrematureEndOfFile => Error::new(
            Kind::EngineGone,
            format!("{doing}: the engine has gone away; look at its log, then try again"),
        ),
        _ => Error::new(Kind::Failed, format!("{doing}: the engine says: {error}")),
    }
}

fn kind_of(word: &str) -> Option<Kind> {
    [
        Kind::Failed,
        Kind::Usage,
        Kind::NoStore,
        Kind::Busy,
        Kind::Key,
        Kind::NotFound,
        Kind::Damaged,
        Kind::NotPermitted,
        Kind::NoEngine,
        Kind::Target,
        Kind::Interrupted,
    ]
    .into_iter()
    .find(|kind| kind.word() == word)
}

/// Our error as the engine would say it, for calls that go the other way.
pub(super) fn wire_error(error: &Error) -> capnp::Error {
    capnp::Error::failed(format!("fleece:{}: {error}", error.kind().word()))
}

fn uuid(bytes: &[u8]) -> Wire<Uuid> {
    Uuid::from_slice(bytes)
        .map_err(|_| capnp::Error::failed(format!("a UUID of {} bytes", bytes.len())))
}

fn text(reader: Wire<capnp::text::Reader<'_>>) -> Wire<String> {
    Ok(reader?.to_str()?.to_owned())
}

pub(super) fn info(info: wire::engine_info::Reader<'_>) -> Wire<EngineInfo> {
    let words = info.get_fingerprint_state()?;
    let words: Vec<u32> = words.iter().collect();
    let fingerprint_state = words
        .try_into()
        .map_err(|_| capnp::Error::failed("the fingerprint state is not five words".into()))?;
    let block_size = info.get_block_size();
    if !block_size.is_power_of_two() || !(4096..=65536).contains(&block_size) {
        return Err(capnp::Error::failed(format!("blocks of {block_size} bytes")));
    }
    Ok(EngineInfo {
        version: text(info.get_version())?,
        store: uuid(info.get_store_id()?)?,
        block_size,
        segment_size: info.get_segment_size(),
        fingerprint_state,
        host: text(info.get_host())?,
        encrypted: info.get_encrypted(),
        takes_files: info.get_takes_files(),
    })
}

pub(super) fn snapshot(snapshot: wire::snapshot::Reader<'_>) -> Wire<Snapshot> {
    let parent = text(snapshot.get_parent())?;
    Ok(Snapshot {
        id: SnapshotId(text(snapshot.get_id())?),
        vm: uuid(snapshot.get_vm()?)?,
        vm_name: text(snapshot.get_vm_name())?,
        time_ms: snapshot.get_time_ms(),
        parent: (!parent.is_empty()).then_some(SnapshotId(parent)),
        disks: snapshot.get_disks()?.iter().map(disk).collect::<Wire<_>>()?,
        counts: counts(snapshot.get_counts()?),
        host: text(snapshot.get_host())?,
        duration_ms: snapshot.get_duration_ms(),
        damaged: snapshot.get_damaged(),
    })
}

/// For `disks` disks.
pub(super) fn backup_plan(plan: wire::backup_plan::Reader<'_>, disks: usize) -> Wire<BackupPlan> {
    let plan = BackupPlan {
        snapshot: SnapshotId(text(plan.get_snapshot())?),
        disks: plan.get_disks()?.iter().map(disk_plan).collect::<Wire<_>>()?,
        in_flight: plan.get_in_flight(),
        cache: plan.get_cache(),
    };
    if plan.disks.len() != disks {
        return Err(capnp::Error::failed("the plan has another number of disks".into()));
    }
    Ok(plan)
}

pub(super) fn disk(disk: wire::disk::Reader<'_>) -> Wire<Disk> {
    Ok(Disk { uuid: uuid(disk.get_uuid()?)?, name: text(disk.get_name())?, size: disk.get_size() })
}

pub(super) fn counts(counts: wire::counts::Reader<'_>) -> Counts {
    Counts {
        read: counts.get_read(),
        zero: counts.get_zero(),
        unchanged: counts.get_unchanged(),
        duplicate: counts.get_duplicate(),
        new: counts.get_new(),
        stored: counts.get_stored(),
        undetected: counts.get_undetected(),
    }
}

pub(super) fn disk_plan(plan: wire::disk_plan::Reader<'_>) -> Wire<DiskPlan> {
    Ok(DiskPlan {
        incremental: plan.get_incremental(),
        reason: text(plan.get_reason())?,
        forced: plan.get_forced()?.iter().map(range).collect(),
    })
}

pub(super) fn range(range: wire::range::Reader<'_>) -> Range {
    Range { offset: range.get_offset(), length: range.get_length() }
}

pub(super) fn image_extent(extent: wire::image_extent::Reader<'_>) -> ImageExtent {
    ImageExtent {
        offset: extent.get_offset(),
        length: extent.get_length(),
        zero: extent.get_zero(),
    }
}

pub(super) fn status(status: wire::status::Reader<'_>) -> Wire<Status> {
    Ok(Status {
        version: text(status.get_version())?,
        host: text(status.get_host())?,
        store: text(status.get_store())?,
        store_id: uuid(status.get_store_id()?)?,
        encrypted: status.get_encrypted(),
        logical_bytes: status.get_logical_bytes(),
        unique_blocks: status.get_unique_blocks(),
        unique_bytes: status.get_unique_bytes(),
        stored_bytes: status.get_stored_bytes(),
        snapshots: status.get_snapshots(),
        vms: status.get_vms(),
        index_bytes: status.get_index_bytes(),
        memory_budget: status.get_memory_budget(),
        peak_anonymous: status.get_peak_anonymous(),
        undetected_blocks: status.get_undetected_blocks(),
        damaged_blocks: status.get_damaged_blocks(),
        sessions: status.get_sessions()?.iter().map(session_status).collect::<Wire<_>>()?,
    })
}

fn session_status(session: wire::session_status::Reader<'_>) -> Wire<SessionStatus> {
    Ok(SessionStatus {
        vm: uuid(session.get_vm()?)?,
        vm_name: text(session.get_vm_name())?,
        snapshot: SnapshotId(text(session.get_snapshot())?),
        stage: text(session.get_stage())?,
        counts: counts(session.get_counts()?),
        age_ms: session.get_age_ms(),
        requested: session.get_requested(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_survive_the_way() {
        for reason in
            ["fleece:busy: web1 has a session", "remote exception: fleece:busy: web1 has a session"]
        {
            let error = engine_error(&capnp::Error::failed(reason.into()), "cannot open a backup");
            assert_eq!(error.kind(), Kind::Busy);
            assert_eq!(error.to_string(), "cannot open a backup: web1 has a session");
        }
        let ours = Error::new(Kind::Target, "disk full");
        assert_eq!(engine_error(&wire_error(&ours), "restore").kind(), Kind::Target);
    }

    #[test]
    fn strange_reasons_stay_readable() {
        let error = engine_error(&capnp::Error::failed("fleece:nonsense: x".into()), "hello");
        assert_eq!(error.kind(), Kind::Failed);
        for gone in [capnp::ErrorKind::Disconnected, capnp::ErrorKind::PrematureEndOfFile] {
            let error = engine_error(&capnp::Error { kind: gone, extra: "eof".into() }, "hello");
            assert_eq!(error.kind(), Kind::EngineGone);
        }
        // Whatever an engine answers is its word.
        let answered = capnp::Error::disconnected("fleece:no-engine: not here".into());
        assert_eq!(engine_error(&answered, "hello").kind(), Kind::NoEngine);
    }
}
