//! `fleecectl`'s end of the socket.

use std::path::Path;
use std::rc::Rc;

use capnp_rpc::{RpcSystem, rpc_twoparty_capnp, twoparty};
use fleece_schema::engine_capnp::{self as wire, engine, event_sink};
use serde::Serialize;
use tokio::net::UnixStream;
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

use super::{MESSAGE_WORDS, from_wire};
use crate::error::{Error, Kind, Result};
use crate::hosts::{HostReport, Rebalance, SessionReport};
use crate::ids::VmId;
use crate::session::registry::StageName;
use crate::store::StoreLevel;

/// A connection to the engine of this host. Lives on a `LocalSet`.
pub struct EngineClient {
    engine: engine::Client,
}

/// What the engine says of itself and its store; the same names in `--json`.
#[derive(Serialize, Debug, Clone, Default)]
pub struct Status {
    /// Sizes of all disks of all snapshots.
    pub logical_bytes: u64,
    /// Distinct fingerprints.
    pub unique_blocks: u64,
    /// Bytes of these blocks, uncompressed.
    pub unique_bytes: u64,
    /// All objects of the store.
    pub stored_bytes: u64,
    /// Snapshots of all VMs.
    pub snapshots: u64,
    /// VMs with a snapshot.
    pub vms: u64,
    /// The local index.
    pub index_bytes: u64,
    /// This host.
    pub host: String,
    /// Where the store is.
    pub store: String,
    /// Which store it is.
    pub store_id: String,
    /// Whether guests' data is encrypted.
    pub encrypted: bool,
    /// The engine's memory budget.
    pub memory_budget: u64,
    /// The most anonymous memory that the engine took.
    pub peak_anonymous: u64,
    /// Blocks stored again because another writer was silent, or a shard was wrong.
    pub undetected_blocks: u64,
    /// Blocks known to be damaged.
    pub damaged_blocks: u64,
    /// Hosts of the cluster.
    pub hosts: u32,
    /// Of them those that did not say what they have: `unique_blocks` lacks it.
    pub hosts_silent: u32,
    /// Blocks that were found stored a second time.
    pub double_blocks: u64,
    /// The engine's version.
    pub version: String,
    /// Backups that run.
    pub sessions: Vec<SessionReport>,
}

/// Receives the lines of a long job.
struct Lines<F> {
    each: F,
}

impl<F: Fn(&str) + 'static> event_sink::Server for Lines<F> {
    async fn event(
        self: Rc<Self>,
        params: event_sink::EventParams,
    ) -> std::result::Result<(), capnp::Error> {
        (self.each)(params.get()?.get_json()?.to_str()?);
        Ok(())
    }
}

fn wire_text(
    text: capnp::Result<capnp::text::Reader<'_>>,
) -> std::result::Result<String, capnp::Error> {
    Ok(text?.to_str()?.to_owned())
}

fn wire_uuid(bytes: capnp::Result<&[u8]>) -> std::result::Result<String, capnp::Error> {
    let uuid = uuid::Uuid::from_slice(bytes?);
    Ok(uuid.map(|u| u.to_string()).unwrap_or_default())
}

impl EngineClient {
    /// Connects and makes sure that both speak the same protocol.
    ///
    /// # Errors
    /// `None` when no engine answers there; `Some` for what an engine says.
    pub async fn connect(socket: &Path) -> std::result::Result<Self, Option<Error>> {
        let stream = UnixStream::connect(socket).await.map_err(|_| None)?;
        let (read, write) = stream.into_split();
        let mut options = capnp::message::ReaderOptions::new();
        options.traversal_limit_in_words(Some(MESSAGE_WORDS));
        let network = twoparty::VatNetwork::new(
            futures::io::BufReader::new(read.compat()),
            futures::io::BufWriter::new(write.compat_write()),
            rpc_twoparty_capnp::Side::Client,
            options,
        );
        let mut system = RpcSystem::new(Box::new(network), None);
        let engine: engine::Client = system.bootstrap(rpc_twoparty_capnp::Side::Server);
        tokio::task::spawn_local(system);
        let mut hello = engine.hello_request();
        let mut params = hello.get();
        params.set_program("fleecectl");
        params.set_version(env!("CARGO_PKG_VERSION"));
        params.set_protocol(wire::PROTOCOL_VERSION);
        params.set_oldest_protocol(wire::OLDEST_PROTOCOL);
        hello.send().promise.await.map_err(|e| Some(from_wire(&e)))?;
        Ok(EngineClient { engine })
    }

    /// The status of store and engine.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn status(&self) -> Result<Status> {
        self.try_status().await.map_err(|e| from_wire(&e))
    }

    async fn try_status(&self) -> std::result::Result<Status, capnp::Error> {
        let response = self.engine.status_request().send().promise.await?;
        let status = response.get()?.get_status()?;
        Ok(Status {
            logical_bytes: status.get_logical_bytes(),
            unique_blocks: status.get_unique_blocks(),
            unique_bytes: status.get_unique_bytes(),
            stored_bytes: status.get_stored_bytes(),
            snapshots: status.get_snapshots(),
            vms: status.get_vms(),
            index_bytes: status.get_index_bytes(),
            host: wire_text(status.get_host())?,
            store: wire_text(status.get_store())?,
            store_id: wire_uuid(status.get_store_id())?,
            encrypted: status.get_encrypted(),
            memory_budget: status.get_memory_budget(),
            peak_anonymous: status.get_peak_anonymous(),
            undetected_blocks: status.get_undetected_blocks(),
            damaged_blocks: status.get_damaged_blocks(),
            hosts: status.get_hosts(),
            hosts_silent: status.get_hosts_silent(),
            double_blocks: status.get_double_blocks(),
            version: wire_text(status.get_version())?,
            sessions: sessions(status.get_sessions()?)?,
        })
    }

    /// The backups that run on all hosts, and the hosts that did not answer.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn sessions(&self) -> Result<(Vec<SessionReport>, Vec<String>)> {
        let work = async {
            let response = self.engine.sessions_request().send().promise.await?;
            let response = response.get()?;
            let silent = response.get_silent()?.iter().map(wire_text);
            Ok((sessions(response.get_sessions()?)?, silent.collect::<capnp::Result<_>>()?))
        };
        work.await.map_err(|e: capnp::Error| from_wire(&e))
    }

    /// All hosts, the engine's own first, and the number of the host that owns each slice.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn hosts(&self) -> Result<(Vec<HostReport>, Vec<u8>)> {
        let work = async {
            let response = self.engine.hosts_request().send().promise.await?;
            let response = response.get()?;
            let reports = response.get_reports()?.iter().map(|text| {
                serde_json::from_slice(text?.as_bytes())
                    .map_err(|error| capnp::Error::failed(error.to_string()))
            });
            Ok((reports.collect::<capnp::Result<_>>()?, response.get_owners()?.to_vec()))
        };
        work.await.map_err(|e: capnp::Error| from_wire(&e))
    }

    /// A host shall own nothing, or its share again.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn drain(&self, host: &str, drain: bool) -> Result<()> {
        let mut request = self.engine.drain_request();
        request.get().set_host(host);
        request.get().set_drain(drain);
        request.send().promise.await.map(drop).map_err(|e| from_wire(&e))
    }

    /// What would move if the partition map were computed now, `without` one host.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn rebalance(&self, without: Option<&str>) -> Result<Rebalance> {
        let mut request = self.engine.rebalance_request();
        request.get().set_without(without.unwrap_or_default());
        let work = async {
            let response = request.send().promise.await?;
            serde_json::from_slice(response.get()?.get_report()?.as_bytes())
                .map_err(|error| capnp::Error::failed(error.to_string()))
        };
        work.await.map_err(|e: capnp::Error| from_wire(&e))
    }

    /// Raises the store to the newest level that the engine knows; gives that level.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn finalize(&self) -> Result<StoreLevel> {
        let work = async {
            let response = self.engine.finalize_request().send().promise.await?;
            Ok(StoreLevel(response.get()?.get_level()))
        };
        work.await.map_err(|e: capnp::Error| from_wire(&e))
    }

    /// Has all engines go over to the newest encryption key of the engine's key file; gives its number.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn use_key(&self) -> Result<u32> {
        let work = async {
            let response = self.engine.use_key_request().send().promise.await?;
            Ok(response.get()?.get_key())
        };
        work.await.map_err(|e: capnp::Error| from_wire(&e))
    }

    /// Verifies; `each` gets every event as a line of JSON. `true`: nothing is wrong.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn verify(
        &self,
        vm: &str,
        snapshot: &str,
        each: impl Fn(&str) + 'static,
    ) -> Result<bool> {
        let mut request = self.engine.verify_request();
        let mut params = request.get();
        params.set_vm(vm);
        params.set_snapshot(snapshot);
        params.set_events(capnp_rpc::new_client(Lines { each }));
        let work = async { Ok(request.send().promise.await?.get()?.get_clean()) };
        work.await.map_err(|e: capnp::Error| from_wire(&e))
    }

    /// Repairs what is marked as damaged; `each` gets every event as a line of JSON. `true`:
    /// every snapshot can be restored whole.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn repair(&self, dry_run: bool, each: impl Fn(&str) + 'static) -> Result<bool> {
        let mut request = self.engine.repair_request();
        let mut params = request.get();
        params.set_dry_run(dry_run);
        params.set_events(capnp_rpc::new_client(Lines { each }));
        let work = async { Ok(request.send().promise.await?.get()?.get_whole()) };
        work.await.map_err(|e: capnp::Error| from_wire(&e))
    }

    /// Takes away what nobody needs; `each` gets every event as a line of JSON. Gives the number of objects.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn tidy(&self, dry_run: bool, each: impl Fn(&str) + 'static) -> Result<u64> {
        let mut request = self.engine.tidy_request();
        let mut params = request.get();
        params.set_dry_run(dry_run);
        params.set_events(capnp_rpc::new_client(Lines { each }));
        let work = async { Ok(request.send().promise.await?.get()?.get_removed()) };
        work.await.map_err(|e: capnp::Error| from_wire(&e))
    }

    /// Builds the index anew, or one partition of it; gives the number of its entries.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn rebuild_index(
        &self,
        partition: Option<u16>,
        each: impl Fn(&str) + 'static,
    ) -> Result<u64> {
        let mut request = self.engine.rebuild_index_request();
        request.get().set_partition(partition.map_or(-1, i32::from));
        request.get().set_events(capnp_rpc::new_client(Lines { each }));
        let work = async { Ok(request.send().promise.await?.get()?.get_entries()) };
        work.await.map_err(|e: capnp::Error| from_wire(&e))
    }
}

fn sessions(
    list: capnp::struct_list::Reader<'_, wire::session_status::Owned>,
) -> std::result::Result<Vec<SessionReport>, capnp::Error> {
    list.iter()
        .map(|session| {
            let counts = session.get_counts()?;
            Ok(SessionReport {
                host: wire_text(session.get_host())?,
                vm: wire_text(session.get_vm_name())?,
                vm_uuid: VmId(uuid::Uuid::from_slice(session.get_vm()?).unwrap_or_default()),
                snapshot: wire_text(session.get_snapshot())?,
                stage: wire_text(session.get_stage())?,
                age_ms: session.get_age_ms(),
                read: counts.get_read(),
                zero: counts.get_zero(),
                hashed: counts.get_read().saturating_sub(counts.get_zero()),
                unchanged: counts.get_unchanged(),
                duplicate: counts.get_duplicate(),
                new: counts.get_new(),
                stored: counts.get_stored(),
                requested: session.get_requested(),
                stage_ms: StageName::ALL
                    .iter()
                    .map(|stage| stage.name().to_owned())
                    .zip(session.get_stage_ms()?.iter())
                    .collect(),
            })
        })
        .collect()
}

/// The error of a client that finds no engine.
#[must_use]
pub fn no_engine(socket: &Path) -> Error {
    Error::new(
        Kind::NoEngine,
        format!(
            "no engine answers on {}: start fleece-engine, or name its socket with --engine",
            socket.display()
        ),
    )
}
