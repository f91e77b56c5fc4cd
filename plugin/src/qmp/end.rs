//! Ending views: one routine for the worker's teardown, the guard, `cleanup` and `abort`.
//!
//! It starts from what is there, not from what should be there, so it can be run at any point of a
//! backup, any number of times. The order is the only one that QEMU takes: exports, snapshot-access
//! nodes, jobs, filters, scratch, NBD server.

use crate::qmp::bitmap::merge_back_actions;
use crate::qmp::command as cmd;
use crate::qmp::disk::{Edges, nodes};
use crate::qmp::session::{CallError, Called, Session};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::time::Duration;

/// A client that is cut off, a job that is cancelled: both take milliseconds; a hanging target can
/// hold a job for cbw-timeout.
const GONE_LIMIT: Duration = Duration::from_secs(15);

/// What was found and ended.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Report {
    /// In words, one per thing done.
    pub done: Vec<String>,
    /// What could not be ended, with the reason and the way out.
    pub left: Vec<String>,
}

/// A bitmap that a backup began, and the one that stopped recording for it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Pair {
    /// The disk's node.
    pub(crate) node: String,
    /// Began at the point in time.
    pub(crate) new: String,
    /// Disabled there; none if there was none, or if it went on recording.
    pub(crate) old: Option<String>,
}

impl Report {
    fn did(&mut self, what: impl Into<String>) {
        self.done.push(what.into());
    }

    /// Notes a refusal and goes on; passes on that QEMU is gone.
    fn note(&mut self, what: &str, result: Called<()>) -> Called<bool> {
        match result {
            Ok(()) => {
                self.did(format!("removed {what}"));
                Ok(true)
            }
            Err(error @ CallError::Refused { .. }) => {
                self.left.push(format!("{what}: {error}"));
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// Ends everything whose name begins with `prefix`. `server` says that the NBD server is ours even
/// if no export of ours is left.
pub(crate) async fn end_views(session: &Session, prefix: &str, server: bool) -> Called<Report> {
    let mut report = Report::default();
    let had_exports = end_exports(session, prefix, &mut report).await?;
    remove_nodes(session, prefix, "snapshot-access", &mut report).await?;
    end_jobs(session, prefix, &mut report).await?;
    take_out_filters(session, prefix, &mut report).await?;
    remove_nodes(session, prefix, "qcow2", &mut report).await?;
    if had_exports || server {
        stop_server(session, &mut report).await?;
    }
    Ok(report)
}

async fn end_exports(session: &Session, prefix: &str, report: &mut Report) -> Called<bool> {
    let ours = |exports: Vec<cmd::Export>| -> Vec<String> {
        exports.into_iter().map(|e| e.id).filter(|id| id.starts_with(prefix)).collect()
    };
    let ids = ours(session.call(cmd::QueryExports(json!({})), "").await?);
    for id in &ids {
        let result =
            session.call(cmd::ExportDel(json!({"id": id, "mode": "hard"})), id).await.map(drop);
        report.note(&format!("export {id}"), result)?;
    }
    let gone = async || {
        let left = ours(session.call(cmd::QueryExports(json!({})), "").await?);
        Ok(left.is_empty().then_some(()))
    };
    session.wait("block-export-del", GONE_LIMIT, gone).await?;
    Ok(!ids.is_empty())
}

async fn end_jobs(session: &Session, prefix: &str, report: &mut Report) -> Called<()> {
    let ours = async || {
        let jobs = session.call(cmd::QueryJobs(json!({})), "").await?;
        Ok(jobs.into_iter().filter(|j| j.id.starts_with(prefix)).collect::<Vec<_>>())
    };
    for job in ours().await? {
        if job.status != "concluded" {
            let arguments = json!({"device": job.id, "force": true});
            let result = session.call(cmd::JobCancel(arguments), &job.id).await.map(drop);
            report.note(&format!("job {}", job.id), result)?;
        }
    }
    let gone = async || {
        let jobs = ours().await?;
        for job in jobs.iter().filter(|j| j.status == "concluded") {
            session.call(cmd::JobDismiss(json!({"id": job.id})), &job.id).await?;
        }
        Ok(jobs.is_empty().then_some(()))
    };
    session.wait("block-job-cancel", GONE_LIMIT, gone).await
}

/// Gives devices back the node beneath our filter, then removes the filter.
async fn take_out_filters(session: &Session, prefix: &str, report: &mut Report) -> Called<()> {
    let all = nodes(session).await?;
    let filters =
        all.values().filter(|n| n.drv == "copy-before-write" && n.node_name.starts_with(prefix));
    let filters: Vec<&str> = filters.map(|n| n.node_name.as_str()).collect();
    if filters.is_empty() {
        return Ok(());
    }
    let graph = Edges::of(session).await?;
    let devices = session.call(cmd::QueryBlock(json!({})), "").await?;
    for filter in filters {
        let user =
            devices.iter().find(|d| d.inserted.as_ref().is_some_and(|n| n.node_name == filter));
        if let (Some(device), Some(beneath)) = (user, graph.child(filter, "file")) {
            put_back(session, device, beneath, filter, report).await?;
        }
        let result =
            session.call(cmd::BlockdevDel(json!({"node-name": filter})), filter).await.map(drop);
        if !report.note(&format!("filter {filter}"), result)? {
            explain_overlay(&graph, filter, report);
        }
    }
    Ok(())
}

async fn put_back(
    session: &Session,
    device: &cmd::Device,
    beneath: &str,
    filter: &str,
    report: &mut Report,
) -> Called<()> {
    let Some(path) = device.qdev.as_deref().map(crate::qmp::disk::qom_path) else { return Ok(()) };
    let result = set_drive(session, &path, beneath).await;
    report.note(&format!("filter {filter} from {path}"), result)?;
    Ok(())
}

/// Lets a device use that node from now on.
pub(crate) async fn set_drive(session: &Session, qdev: &str, node: &str) -> Called<()> {
    let arguments = json!({"path": qdev, "property": "drive", "value": node});
    session.call(cmd::QomSet(arguments), qdev).await.map(drop)
}

/// Someone took an external snapshot through our filter: its header names a driver that cannot be
/// opened again. That must be mended by hand, and be said.
fn explain_overlay(graph: &Edges, filter: &str, report: &mut Report) {
    for parent in
        graph.parents(filter).filter(|p| !p.is_empty() && !p.starts_with(crate::qmp::names::PREFIX))
    {
        report.left.push(format!(
            "{parent} was put on top of {filter} (an external snapshot during the backup): before the VM's next \
             start mend it with `qemu-img rebase -u -f qcow2 -F qcow2 -b OLD_IMAGE NEW_IMAGE`"
        ));
    }
}

async fn remove_nodes(
    session: &Session,
    prefix: &str,
    driver: &str,
    report: &mut Report,
) -> Called<()> {
    for node in nodes(session).await?.into_values() {
        if node.drv == driver && node.node_name.starts_with(prefix) {
            let name = &node.node_name;
            let result =
                session.call(cmd::BlockdevDel(json!({"node-name": name})), name).await.map(drop);
            report.note(&format!("node {name}"), result)?;
        }
    }
    Ok(())
}

/// Stops the NBD server, unless it serves someone else too.
async fn stop_server(session: &Session, report: &mut Report) -> Called<()> {
    if !session.call(cmd::QueryExports(json!({})), "").await?.is_empty() {
        return Ok(());
    }
    match session.call(cmd::NbdStop(json!({})), "").await {
        Ok(_) => report.did("stopped the NBD server"),
        // It was not running.
        Err(CallError::Refused { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Sets the guest going again: if we stopped it, or if our view's full scratch did.
pub(crate) async fn let_guest_go_on(session: &Session, we_stopped: bool) -> Called<bool> {
    let status = session.call(cmd::QueryStatus(json!({})), "").await?;
    let stands = (we_stopped && status.status == "paused") || status.status == "io-error";
    if stands {
        session.call(cmd::Cont(json!({})), "").await?;
    }
    Ok(stands)
}

/// After a backup that did not commit: the old bitmap covers everything again, the new one goes.
pub(crate) async fn merge_back(session: &Session, pairs: &[Pair]) -> Called<Report> {
    let mut report = Report::default();
    let all = nodes(session).await?;
    for pair in pairs {
        let there = |name: &str| {
            let bitmaps =
                all.get(&pair.node).map(|n| n.dirty_bitmaps.as_slice()).unwrap_or_default();
            bitmaps.iter().any(|b| b.name.as_deref() == Some(name))
        };
        if !there(&pair.new) {
            continue;
        }
        let result = match pair.old.as_deref() {
            // Dropped because the backup did commit: the new one is the truth.
            Some(old) if !there(old) => continue,
            Some(old) => {
                let actions = merge_back_actions(&pair.node, std::slice::from_ref(&pair.new), old);
                session.call(cmd::Transaction(json!({"actions": actions})), old).await.map(drop)
            }
            None => remove_bitmap(session, &pair.node, &pair.new).await,
        };
        report.note(&format!("bitmap {}", pair.new), result)?;
    }
    Ok(report)
}

/// Removes a bitmap; one that is not there is fine.
pub(crate) async fn remove_bitmap(session: &Session, node: &str, name: &str) -> Called<()> {
    match session.call(cmd::BitmapRemove(json!({"node": node, "name": name})), name).await {
        Err(error) if error.desc().contains("not found") => Ok(()),
        other => other.map(drop),
    }
}
