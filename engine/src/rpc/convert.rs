//! Between wire structs and the engine's own types.

use fleece_schema::engine_capnp as wire;
use uuid::Uuid;

use crate::error::{Context as _, Error, Kind, Result};
use crate::hosts::SessionReport;
use crate::ids::{DiskId, Fingerprint, VmId};
use crate::session::begin::{DiskPlan, DiskSpec, Request};
use crate::session::event::{Extent, GrantExtent, Grants};
use crate::session::registry::StageName;
use crate::session::spool::Position;
use crate::store::manifest::{Counts, Disk, Manifest};

/// A label longer than this is refused: it would crowd manifests and messages.
const MAX_NAME: usize = 1024;

pub(super) fn uuid(bytes: capnp::Result<&[u8]>, what: &str) -> Result<Uuid> {
    let bytes = bytes.context(|| format!("{what} of a call"))?;
    Uuid::from_slice(bytes)
        .map_err(|_| Error::new(Kind::Usage, format!("{what} has {} bytes, not 16", bytes.len())))
}

pub(super) fn text(reader: capnp::Result<capnp::text::Reader<'_>>, what: &str) -> Result<String> {
    let text = reader.context(|| format!("{what} of a call"))?;
    let text =
        text.to_str().map_err(|e| Error::caused(Kind::Usage, format!("{what} is no text"), e))?;
    if text.len() > MAX_NAME {
        return Err(Error::new(Kind::Usage, format!("{what} is longer than {MAX_NAME} bytes")));
    }
    Ok(text.to_owned())
}

pub(super) fn request(reader: wire::backup_request::Reader<'_>) -> Result<Request> {
    let disks = reader.get_disks().context(|| "disks of a call".into())?;
    let disks = disks.iter().map(|disk| {
        Ok(DiskSpec {
            uuid: DiskId(uuid(disk.get_uuid(), "a disk's UUID")?),
            name: text(disk.get_name(), "a disk's name")?,
            size: disk.get_size(),
            parent: text(disk.get_parent(), "a parent")?,
        })
    });
    Ok(Request {
        vm: VmId(uuid(reader.get_vm(), "the VM's UUID")?),
        vm_name: text(reader.get_vm_name(), "the VM's name")?,
        adopt: reader.get_adopt(),
        disks: disks.collect::<Result<_>>()?,
        config: reader.get_config().context(|| "configuration of a call".into())?.to_vec(),
        hypervisor: text(reader.get_hypervisor(), "the hypervisor")?,
    })
}

pub(super) fn extents(list: capnp::struct_list::Reader<'_, wire::extent::Owned>) -> Vec<Extent> {
    list.iter()
        .map(|extent| Extent {
            first_block: extent.get_first_block(),
            blocks: extent.get_blocks(),
            zero: extent.get_zero(),
        })
        .collect()
}

pub(super) fn fingerprints(bytes: &[u8]) -> Result<Vec<Fingerprint>> {
    let (fingerprints, rest) = bytes.as_chunks::<{ Fingerprint::LEN }>();
    if !rest.is_empty() {
        return Err(Error::new(Kind::Usage, "fingerprints of a batch are cut short"));
    }
    Ok(fingerprints.iter().map(|f| Fingerprint(*f)).collect())
}

pub(super) fn set_disk_plan(mut to: wire::disk_plan::Builder<'_>, plan: &DiskPlan) {
    to.set_incremental(plan.incremental);
    to.set_reason(&plan.reason);
    set_ranges(to.init_forced(plan.forced.len() as u32), &plan.forced);
}

/// Ranges as (offset, length) in bytes; `to` has room for as many.
pub(super) fn set_ranges(
    mut to: capnp::struct_list::Builder<'_, wire::range::Owned>,
    ranges: &[(u64, u64)],
) {
    for (i, (offset, length)) in ranges.iter().enumerate() {
        let mut range = to.reborrow().get(i as u32);
        range.set_offset(*offset);
        range.set_length(*length);
    }
}

pub(super) fn grants(list: capnp::struct_list::Reader<'_, wire::grant::Owned>) -> Vec<GrantExtent> {
    let position = |grant: wire::grant::Reader<'_>| Position {
        disk: grant.get_disk(),
        block: grant.get_first_block(),
    };
    list.iter()
        .map(|grant| GrantExtent { at: position(grant), blocks: grant.get_blocks() })
        .collect()
}

pub(super) fn set_grants(
    mut to: wire::backup_session::grants_results::Builder<'_>,
    grants: &Grants,
) {
    to.set_done(grants.done);
    let mut list = to.init_extents(grants.extents.len() as u32);
    for (i, extent) in grants.extents.iter().enumerate() {
        let mut grant = list.reborrow().get(i as u32);
        grant.set_disk(extent.at.disk);
        grant.set_first_block(extent.at.block);
        grant.set_blocks(extent.blocks);
    }
}

pub(super) fn set_counts(mut to: wire::counts::Builder<'_>, counts: &Counts) {
    to.set_read(counts.read);
    to.set_zero(counts.zero);
    to.set_unchanged(counts.unchanged);
    to.set_duplicate(counts.duplicate);
    to.set_new(counts.new);
    to.set_stored(counts.stored);
    to.set_undetected(counts.undetected);
}

pub(super) fn set_disk(mut to: wire::disk::Builder<'_>, disk: &Disk) {
    to.set_uuid(disk.uuid.0.as_bytes());
    to.set_name(&disk.name);
    to.set_size(disk.size);
}

pub(super) fn set_snapshot(
    mut to: wire::snapshot::Builder<'_>,
    manifest: &Manifest,
    damaged: bool,
) {
    to.set_id(manifest.snapshot.as_str());
    to.set_vm(manifest.vm.0.as_bytes());
    to.set_vm_name(&manifest.vm_name);
    to.set_time_ms(manifest.point_in_time_ms);
    to.set_parent(manifest.parent.as_ref().map_or("", |id| id.as_str()));
    to.set_host(&manifest.host);
    to.set_duration_ms(manifest.duration_ms);
    to.set_damaged(damaged);
    set_counts(to.reborrow().init_counts(), &manifest.counts);
    let mut disks = to.init_disks(manifest.disks.len() as u32);
    for (i, disk) in manifest.disks.iter().enumerate() {
        set_disk(disks.reborrow().get(i as u32), disk);
    }
}

pub(super) fn set_session(mut to: wire::session_status::Builder<'_>, session: &SessionReport) {
    to.set_host(&session.host);
    to.set_vm(session.vm_uuid.0.as_bytes());
    to.set_vm_name(&session.vm);
    to.set_snapshot(&session.snapshot);
    to.set_stage(&session.stage);
    to.set_age_ms(session.age_ms);
    to.set_requested(session.requested);
    let mut counts = to.reborrow().init_counts();
    counts.set_read(session.read);
    counts.set_zero(session.zero);
    counts.set_unchanged(session.unchanged);
    counts.set_duplicate(session.duplicate);
    counts.set_new(session.new);
    counts.set_stored(session.stored);
    let mut list = to.init_stage_ms(StageName::ALL.len() as u32);
    for (i, stage) in StageName::ALL.iter().enumerate() {
        list.set(i as u32, session.stage_ms.get(stage.name()).copied().unwrap_or(0));
    }
}
