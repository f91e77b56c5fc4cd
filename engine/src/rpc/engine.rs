//! The engine as `fleece` and `fleecectl` see it.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fleece_schema::engine_capnp::{self as wire, engine};
use tokio::sync::OwnedSemaphorePermit;

use super::backup::BackupServer;
use super::blocking::blocking;
use super::flow::Flow;
use super::image::ImageServer;
use super::protocol::{Speaker, Spoken};
use super::server::Services;
use super::{convert, to_wire};
use crate::cluster::map::PartitionMap;
use crate::detect::Partition;
use crate::error::{Error, Kind, Result};
use crate::hosts::{self, HostReport};
use crate::ids::{SnapshotId, VmId};
use crate::jobs::usage::usage;
use crate::session::Context;
use crate::session::begin::{Begun, Resumed, begin, resume};
use crate::store::manifest::Manifest;
use crate::{upgrade, upkeep};

type Answer = std::result::Result<(), capnp::Error>;

/// Bytes of reads that a session may have in flight: 4 connections of 4 requests of 256 KiB.
const READS_IN_FLIGHT: u32 = 4 << 20;
/// Bytes of read blocks that a session may keep, so that a small backup reads once.
const READ_CACHE: u32 = 4 << 20;
/// What a further session gets of each when several run: the host's memory is for guests.
const SHARED_READS: u32 = 512 << 10;
/// One read, and what an entry costs besides.
const SHARED_CACHE: u32 = (256 << 10) + 4096;
/// Snapshots in one answer: 1 MiB holds them with some disks each.
const MAX_SNAPSHOTS: usize = 2000;
/// Snapshots settled at once: each is looked up in the store. A VM has at most 256 disks, and
/// rarely more than two bitmaps on one.
const MAX_SETTLED: usize = 1024;

/// How long a session whose client is gone may take to end itself: a container may be on its way.
const ENDING: Duration = Duration::from_secs(30);

/// The bootstrap object of a connection.
pub(super) struct EngineServer {
    pub(super) services: Rc<Services>,
    /// Whether the peer's user may call anything.
    pub(super) permitted: bool,
    pub(super) uid: u32,
    /// The connection's messages.
    pub(super) flow: Rc<Flow>,
}

impl EngineServer {
    /// Every call begins here.
    fn context(&self) -> std::result::Result<Context, capnp::Error> {
        if self.permitted {
            return Ok(self.services.context.clone());
        }
        Err(to_wire(&Error::new(
            Kind::NotPermitted,
            format!(
                "user id {} may not use this engine (allowed_uids in its configuration lists who may)",
                self.uid
            ),
        )))
    }
}

/// A reader's place, and whether all the others are free.
struct Place {
    permit: OwnedSemaphorePermit,
    alone: bool,
}

impl EngineServer {
    /// Waits for a reader's place.
    async fn place(&self) -> std::result::Result<Place, capnp::Error> {
        let readers = Arc::clone(&self.services.readers);
        let permit = readers
            .acquire_owned()
            .await
            .map_err(|_| to_wire(&Error::new(Kind::Failed, "the engine is ending")))?;
        // By the places, not by the sessions: several that begin at once are not alone.
        let sessions = self.services.context.budget.sessions;
        let alone = self.services.readers.available_permits() + 1 >= sessions;
        Ok(Place { permit, alone })
    }

    /// Tells a client how its session is planned, and gives it the session.
    fn admit(
        &self,
        begun: Begun,
        place: Place,
        mut plan: wire::backup_plan::Builder<'_>,
    ) -> wire::backup_session::Client {
        plan.set_snapshot(begun.snapshot.as_str());
        plan.set_in_flight(if place.alone { READS_IN_FLIGHT } else { SHARED_READS });
        plan.set_cache(if place.alone { READ_CACHE } else { SHARED_CACHE });
        let mut disks = plan.init_disks(begun.disks.len() as u32);
        for (i, disk) in begun.disks.iter().enumerate() {
            convert::set_disk_plan(disks.reborrow().get(i as u32), disk);
        }
        let messages = Arc::clone(&self.services.messages);
        let flow = Rc::clone(&self.flow);
        let server = BackupServer::new(begun.client, begun.progress, messages, flow, place.permit);
        capnp_rpc::new_client(server)
    }

    /// How it is with all hosts.
    async fn reports(
        &self,
        context: &Context,
    ) -> std::result::Result<Vec<HostReport>, capnp::Error> {
        if let Some(peers) = &self.services.peers {
            return peers.reports().await;
        }
        let context = context.clone();
        Ok(vec![blocking(move || hosts::own(&context)).await?])
    }
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

fn of_params<T>(outcome: Result<T>) -> std::result::Result<T, capnp::Error> {
    outcome.map_err(|e| to_wire(&e))
}

impl engine::Server for EngineServer {
    async fn hello(
        self: Rc<Self>,
        params: engine::HelloParams,
        mut results: engine::HelloResults,
    ) -> Answer {
        let context = self.context()?;
        let params = params.get()?;
        let program = of_params(convert::text(params.get_program(), "the program"))?;
        let version = of_params(convert::text(params.get_version(), "the version"))?;
        let theirs = Spoken::said(params.get_oldest_protocol(), params.get_protocol());
        let ours = Spoken { oldest: wire::OLDEST_PROTOCOL, newest: wire::PROTOCOL_VERSION };
        let us = Speaker { name: "the engine", version: env!("CARGO_PKG_VERSION"), speaks: ours };
        let them = Speaker { name: &program, version: &version, speaks: theirs };
        us.agrees_with(&them).map_err(|why| to_wire(&Error::new(Kind::Usage, why)))?;
        let store = &context.store;
        let mut info = results.get().init_info();
        info.set_version(env!("CARGO_PKG_VERSION"));
        info.set_store_id(store.id().0.as_bytes());
        info.set_block_size(store.block_size());
        info.set_segment_size(crate::store::recipe::SEGMENT_SIZE as u32);
        info.set_host(&context.host);
        info.set_encrypted(store.encrypted());
        info.set_takes_files(true);
        let state = store.fingerprinter().state();
        let mut words = info.init_fingerprint_state(state.len() as u32);
        for (i, word) in state.into_iter().enumerate() {
            words.set(i as u32, word);
        }
        Ok(())
    }

    async fn settle(
        self: Rc<Self>,
        params: engine::SettleParams,
        mut results: engine::SettleResults,
    ) -> Answer {
        let context = self.context()?;
        let params = params.get()?;
        let vm = VmId(of_params(convert::uuid(params.get_vm(), "the VM's UUID"))?);
        let names = params.get_snapshots()?.iter();
        if names.len() > MAX_SETTLED {
            let message =
                format!("{} snapshots settled at once; at most {MAX_SETTLED}", names.len());
            return Err(to_wire(&Error::new(Kind::Usage, message)));
        }
        let names: Vec<String> =
            of_params(names.map(|name| convert::text(name, "a snapshot")).collect())?;
        of_params(must_become_idle(&context, vm).await)?;
        let (fates, latest) = blocking(move || {
            context.registry.must_be_idle(vm)?;
            let manifests = &context.manifests;
            let mut fates = Vec::with_capacity(names.len());
            for name in names {
                // A name that is no id was never one of ours.
                let committed = match name.parse::<SnapshotId>() {
                    Ok(id) => manifests.settle(vm, id, "its session died", now_ms())?,
                    Err(()) => false,
                };
                fates.push(committed);
            }
            Ok((fates, manifests.latest(vm)?))
        })
        .await?;
        let mut results = results.get();
        let mut list = results.reborrow().init_fates(fates.len() as u32);
        for (i, committed) in fates.into_iter().enumerate() {
            let fate = if committed { wire::Fate::Committed } else { wire::Fate::Ended };
            list.set(i as u32, fate);
        }
        if let Some(latest) = latest {
            convert::set_snapshot(results.init_latest(), &latest, false);
        }
        Ok(())
    }

    async fn open_backup(
        self: Rc<Self>,
        params: engine::OpenBackupParams,
        mut results: engine::OpenBackupResults,
    ) -> Answer {
        let context = self.context()?;
        let request = of_params(convert::request(params.get()?.get_request()?))?;
        of_params(must_become_idle(&context, request.vm).await)?;
        let place = self.place().await?;
        // Both end with the call if its client dies now.
        let (begun, place) =
            blocking(move || Ok((begin(&context, request, now_ms())?, place))).await?;
        let mut results = results.get();
        let session = self.admit(begun, place, results.reborrow().init_plan());
        results.set_session(session);
        Ok(())
    }

    async fn resume_backup(
        self: Rc<Self>,
        params: engine::ResumeBackupParams,
        mut results: engine::ResumeBackupResults,
    ) -> Answer {
        let context = self.context()?;
        let params = params.get()?;
        let request = of_params(convert::request(params.get_request()?))?;
        let name = of_params(convert::text(params.get_snapshot(), "the snapshot"))?;
        let snapshot = name.parse().map_err(|()| {
            to_wire(&Error::new(Kind::Usage, format!("{name:?} is no id of a snapshot")))
        })?;
        of_params(must_become_idle(&context, request.vm).await)?;
        let place = self.place().await?;
        let (resumed, place) =
            blocking(move || Ok((resume(&context, request, snapshot)?, place))).await?;
        let mut results = results.get();
        match resumed {
            Resumed::Committed(manifest) => {
                convert::set_snapshot(results.init_committed(), &manifest, false);
            }
            Resumed::Begun(begun) => {
                let session = self.admit(begun, place, results.reborrow().init_plan());
                results.set_session(session);
            }
        }
        Ok(())
    }

    async fn snapshots(
        self: Rc<Self>,
        params: engine::SnapshotsParams,
        mut results: engine::SnapshotsResults,
    ) -> Answer {
        let context = self.context()?;
        let which = of_params(convert::text(params.get()?.get_vm(), "the VM"))?;
        let _place = self.flow.place_for_answer().await?;
        let found = blocking(move || {
            let found = upkeep::snapshots(&context, &which, MAX_SNAPSHOTS)?;
            let damaged = |manifest: &Manifest| upkeep::is_damaged(&context, manifest);
            Ok(found.into_iter().map(|m| (damaged(&m), m)).collect::<Vec<_>>())
        })
        .await?;
        let mut list = results.get().init_snapshots(found.len() as u32);
        for (i, (damaged, manifest)) in found.iter().enumerate() {
            convert::set_snapshot(list.reborrow().get(i as u32), manifest, *damaged);
        }
        Ok(())
    }

    async fn open_disk(
        self: Rc<Self>,
        params: engine::OpenDiskParams,
        mut results: engine::OpenDiskResults,
    ) -> Answer {
        let context = self.context()?;
        let params = params.get()?;
        let vm = of_params(convert::text(params.get_vm(), "the VM"))?;
        let snapshot = of_params(convert::text(params.get_snapshot(), "the snapshot"))?;
        let which = of_params(convert::text(params.get_disk(), "the disk"))?;
        let reading = context.clone();
        let (manifest, disk) = blocking(move || {
            let manifest = find(&reading, &vm, &snapshot)?;
            let disk = manifest.disk(&which)?.clone();
            Ok((manifest, disk))
        })
        .await?;
        let mut results = results.get();
        convert::set_snapshot(results.reborrow().init_snapshot(), &manifest, false);
        convert::set_disk(results.reborrow().init_disk(), &disk);
        let restores = Arc::clone(&self.services.restores);
        let flow = Rc::clone(&self.flow);
        let image = ImageServer::open(context, restores, flow, manifest, disk).await?;
        results.set_image(capnp_rpc::new_client(image));
        Ok(())
    }

    async fn vm_config(
        self: Rc<Self>,
        params: engine::VmConfigParams,
        mut results: engine::VmConfigResults,
    ) -> Answer {
        let context = self.context()?;
        let params = params.get()?;
        let vm = of_params(convert::text(params.get_vm(), "the VM"))?;
        let snapshot = of_params(convert::text(params.get_snapshot(), "the snapshot"))?;
        let _place = self.flow.place_for_answer().await?;
        let manifest = blocking(move || find(&context, &vm, &snapshot)).await?;
        results.get().set_config(&manifest.config);
        Ok(())
    }

    async fn status(
        self: Rc<Self>,
        _: engine::StatusParams,
        mut results: engine::StatusResults,
    ) -> Answer {
        let context = self.context()?;
        let reading = context.clone();
        let usage = blocking(move || usage(&reading.store, &reading.manifests)).await?;
        let store = &context.store;
        let reports = self.reports(&context).await?;
        let sum = |of: fn(&HostReport) -> u64| reports.iter().map(of).sum::<u64>();
        let (unique, doubles) = (sum(|host| host.unique_blocks), sum(|host| host.double_blocks));
        let silent = reports.iter().filter(|host| !host.answers()).count();
        let mut status = results.get().init_status();
        status.set_logical_bytes(usage.logical_bytes);
        status.set_unique_blocks(unique);
        status.set_unique_bytes(unique * u64::from(store.block_size()));
        status.set_stored_bytes(usage.stored_bytes);
        status.set_snapshots(usage.snapshots);
        status.set_vms(usage.vms);
        status.set_hosts(reports.len() as u32);
        status.set_hosts_silent(silent as u32);
        status.set_double_blocks(doubles);
        status.set_index_bytes(reports.first().map_or(0, |own| own.index_bytes));
        status.set_host(&context.host);
        status.set_store(&self.services.store_name);
        status.set_store_id(store.id().0.as_bytes());
        status.set_encrypted(store.encrypted());
        status.set_memory_budget(context.budget.total);
        status.set_peak_anonymous(crate::memory::peak_anonymous());
        status.set_undetected_blocks(usage.undetected / u64::from(store.block_size()));
        status.set_damaged_blocks(context.damage.map().slots());
        status.set_version(env!("CARGO_PKG_VERSION"));
        let running = hosts::sessions(&context);
        let mut sessions = status.init_sessions(running.len() as u32);
        for (i, session) in running.iter().enumerate() {
            convert::set_session(sessions.reborrow().get(i as u32), session);
        }
        Ok(())
    }

    async fn hosts(
        self: Rc<Self>,
        _: engine::HostsParams,
        mut results: engine::HostsResults,
    ) -> Answer {
        let context = self.context()?;
        let reports = self.reports(&context).await?;
        let mut results = results.get();
        let mut list = results.reborrow().init_reports(reports.len() as u32);
        for (i, report) in reports.iter().enumerate() {
            let text = serde_json::to_string(report);
            list.set(i as u32, text.map_err(|e| capnp::Error::failed(e.to_string()))?);
        }
        results.set_owners(&hosts::owners(&context));
        Ok(())
    }

    async fn drain(self: Rc<Self>, params: engine::DrainParams, _: engine::DrainResults) -> Answer {
        self.context()?;
        let params = params.get()?;
        let host = of_params(convert::text(params.get_host(), "the host"))?;
        let Some(membership) = &self.services.membership else {
            let what = "only a cluster with etcd drains hosts: with cluster.static take the host \
                        out of the list everywhere";
            return Err(to_wire(&Error::new(Kind::Usage, what)));
        };
        let draining = Box::pin(membership.drain(&host, params.get_drain()));
        of_params(draining.await)
    }

    async fn rebalance(
        self: Rc<Self>,
        params: engine::RebalanceParams,
        mut results: engine::RebalanceResults,
    ) -> Answer {
        let context = self.context()?;
        let without = of_params(convert::text(params.get()?.get_without(), "the host"))?;
        let without = Some(without.as_str()).filter(|host| !host.is_empty());
        let Some(now) = context.owners.cluster().map(|cluster| cluster.map()) else {
            let what = "this engine is in no cluster: it owns everything";
            return Err(to_wire(&Error::new(Kind::Usage, what)));
        };
        let then = match (&self.services.membership, without) {
            (Some(membership), without) => Box::pin(membership.planned(without)).await,
            (None, Some(host)) => now.without(host),
            (None, None) => Ok(PartitionMap::clone(&now)),
        };
        let (then, known) = (of_params(then)?, self.reports(&context).await?);
        let text = serde_json::to_string(&hosts::rebalance(&now, &then, &known));
        results.get().set_report(text.map_err(|e| capnp::Error::failed(e.to_string()))?);
        Ok(())
    }

    async fn finalize(
        self: Rc<Self>,
        _: engine::FinalizeParams,
        mut results: engine::FinalizeResults,
    ) -> Answer {
        let context = self.context()?;
        let reports = self.reports(&context).await?;
        let raised =
            blocking(move || upgrade::finalize(&context.store, &reports, now_ms())).await?;
        results.get().set_level(raised.0);
        Ok(())
    }

    async fn use_key(
        self: Rc<Self>,
        _: engine::UseKeyParams,
        mut results: engine::UseKeyResults,
    ) -> Answer {
        let context = self.context()?;
        let (store, key_file) = (context.store.clone(), self.services.key_file.clone());
        // The file may just have been changed.
        blocking(move || {
            let (followed, taken) = upgrade::look(&store, &key_file);
            followed.and(taken)
        })
        .await?;
        let reports = self.reports(&context).await?;
        let used = move || upgrade::use_newest_key(&context.store, &reports, now_ms());
        results.get().set_key(blocking(used).await?.0);
        Ok(())
    }

    async fn sessions(
        self: Rc<Self>,
        _: engine::SessionsParams,
        mut results: engine::SessionsResults,
    ) -> Answer {
        let mut running = hosts::sessions(&self.context()?);
        let mut silent = Vec::new();
        if let Some(peers) = &self.services.peers {
            for (host, theirs) in peers.sessions().await {
                match theirs {
                    Some(theirs) => running.extend(theirs),
                    None => silent.push(host),
                }
            }
        }
        let mut results = results.get();
        let mut sessions = results.reborrow().init_sessions(running.len() as u32);
        for (i, session) in running.iter().enumerate() {
            convert::set_session(sessions.reborrow().get(i as u32), session);
        }
        let mut names = results.init_silent(silent.len() as u32);
        for (i, name) in silent.iter().enumerate() {
            names.set(i as u32, name);
        }
        Ok(())
    }

    async fn verify(
        self: Rc<Self>,
        params: engine::VerifyParams,
        mut results: engine::VerifyResults,
    ) -> Answer {
        let context = self.context()?;
        let params = params.get()?;
        let vm = of_params(convert::text(params.get_vm(), "the VM"))?;
        let snapshot = of_params(convert::text(params.get_snapshot(), "the snapshot"))?;
        let events = params.get_events()?;
        let clean = super::image::with_events(events, move |emit| {
            upkeep::verify(&context, &vm, &snapshot, now_ms(), emit)
        })
        .await?;
        results.get().set_clean(clean);
        Ok(())
    }

    async fn rebuild_index(
        self: Rc<Self>,
        params: engine::RebuildIndexParams,
        mut results: engine::RebuildIndexResults,
    ) -> Answer {
        let context = self.context()?;
        let params = params.get()?;
        let number = params.get_partition();
        // One that is no number of any partition is refused as one that there is not.
        let partition =
            (number != -1).then(|| Partition(u16::try_from(number).unwrap_or(u16::MAX)));
        let entries = super::image::with_events(params.get_events()?, move |emit| {
            upkeep::rebuild_index(&context, partition, emit)
        })
        .await?;
        results.get().set_entries(entries);
        Ok(())
    }

    async fn repair(
        self: Rc<Self>,
        params: engine::RepairParams,
        mut results: engine::RepairResults,
    ) -> Answer {
        let context = self.context()?;
        let params = params.get()?;
        let (dry_run, events) = (params.get_dry_run(), params.get_events()?);
        let whole = super::image::with_events(events, move |emit| {
            upkeep::repair(&context, dry_run, now_ms(), emit)
        })
        .await?;
        results.get().set_whole(whole);
        Ok(())
    }

    async fn tidy(
        self: Rc<Self>,
        params: engine::TidyParams,
        mut results: engine::TidyResults,
    ) -> Answer {
        let context = self.context()?;
        let params = params.get()?;
        let (dry_run, events) = (params.get_dry_run(), params.get_events()?);
        let removed = super::image::with_events(events, move |emit| {
            upkeep::tidy(&context, dry_run, now_ms(), emit)
        })
        .await?;
        results.get().set_removed(removed);
        Ok(())
    }
}

/// Fails while the VM has a session. One whose client was killed is waited for: whoever begins the
/// next backup at once need not try again.
async fn must_become_idle(context: &Context, vm: VmId) -> Result<()> {
    let begun = Instant::now();
    while context.registry.is_ending(vm) && begun.elapsed() < ENDING {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    context.registry.must_be_idle(vm)
}

fn find(context: &Context, vm: &str, snapshot: &str) -> Result<Manifest> {
    let manifests = &context.manifests;
    let vm = manifests.find_vm(vm)?;
    manifests.find_snapshot(vm, snapshot, &jiff::tz::TimeZone::system())
}
