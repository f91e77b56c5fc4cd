//! The disks of a running VM as QEMU shows them: beneath filters, with our bitmaps.

use crate::error::Result;
use crate::qmp::bitmap::{Bitmap, BitmapName};
use crate::qmp::command::{self as cmd, BitmapState, Device, Graph, Node};
use crate::qmp::session::{Called, Session};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Drivers that pass everything on to their `file` and hold no data or bitmaps of their own.
const FILTERS: &[&str] = &[
    "backup-top",
    "blkdebug",
    "blklogwrites",
    "blkverify",
    "commit_top",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "snapshot-access",
    "throttle",
];
/// A chain longer than this is a loop, or nothing that we want to understand.
const MAX_CHAIN: usize = 256;

/// One disk that can be backed up.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Disk {
    /// What people call it: the device's id, else the name of its `-drive`, else its node.
    pub label: String,
    /// The node that holds the guest's data and the bitmaps.
    pub node: String,
    /// The node that the device uses: `node`, or a filter above it.
    pub top: String,
    /// The device's object path; none if nothing is attached.
    pub qdev: Option<String>,
    /// The image.
    pub file: String,
    /// qcow2, raw, …
    pub format: String,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Bytes that it takes on the host.
    pub allocated: u64,
    /// Its bitmaps can be stored in it (qcow2 v3).
    pub persistent: bool,
    /// The guest's requests are handled by an iothread.
    pub iothread: bool,
    /// qcow2 with an external data file.
    pub external_data: bool,
    /// Bitmaps of ours, of any store, on `node`.
    pub bitmaps: Vec<Bitmap>,
    /// Bitmaps of ours are on a node beneath (someone put an overlay on top).
    pub bitmap_beneath: bool,
}

impl Disk {
    /// Is it meant by this word of the command line?
    #[must_use]
    pub fn is_called(&self, word: &str) -> bool {
        self.label == word || self.node == word
    }
}

/// What a VM has.
#[derive(Clone, Debug, Default)]
pub struct Disks {
    /// To be backed up, in QEMU's order.
    pub disks: Vec<Disk>,
    /// Left out, with the reason.
    pub skipped: Vec<(String, String)>,
}

/// Lists the disks of a VM.
///
/// # Errors
/// QEMU went away.
pub async fn list(session: &Session) -> Result<Disks> {
    let devices = session.call(cmd::QueryBlock(json!({})), "").await?;
    let nodes = nodes(session).await?;
    let graph = Edges::of(session).await?;
    let mut result = Disks::default();
    let mut labels = BTreeSet::new();
    for (i, device) in devices.iter().enumerate() {
        let mut label = label(device, i);
        if !labels.insert(label.clone()) {
            label = format!("{label}.{i}");
            labels.insert(label.clone());
        }
        match skip_reason(device) {
            Some(reason) => result.skipped.push((label, reason.to_owned())),
            None => {
                let mut disk = describe(device, label, &nodes, &graph);
                disk.iothread = has_iothread(session, disk.qdev.as_deref()).await?;
                result.disks.push(disk);
            }
        }
    }
    Ok(result)
}

/// All nodes by name.
pub(crate) async fn nodes(session: &Session) -> Called<BTreeMap<String, Node>> {
    let nodes = session.call(cmd::QueryNodes(json!({"flat": true})), "").await?;
    Ok(nodes.into_iter().map(|n| (n.node_name.clone(), n)).collect())
}

fn skip_reason(device: &Device) -> Option<&'static str> {
    match &device.inserted {
        None => Some("nothing is inserted"),
        Some(_) if device.removable => Some("removable (CD or floppy)"),
        Some(node) if node.ro => Some("read-only"),
        Some(_) => None,
    }
}

/// `/machine/peripheral/vda/virtio-backend` and `vda` both give `vda`.
fn label(device: &Device, index: usize) -> String {
    let id =
        device.qdev.as_deref().and_then(|qdev| match qdev.strip_prefix("/machine/peripheral/") {
            Some(rest) => rest.split('/').next(),
            None => (!qdev.starts_with('/')).then_some(qdev),
        });
    let node =
        device.inserted.as_ref().map(|n| n.node_name.as_str()).filter(|n| !n.starts_with('#'));
    let drive = Some(device.device.as_str()).filter(|d| !d.is_empty());
    id.or(drive).or(node).map_or_else(|| format!("disk{index}"), str::to_owned)
}

fn describe(device: &Device, label: String, nodes: &BTreeMap<String, Node>, graph: &Edges) -> Disk {
    let top = device.inserted.clone().unwrap_or_default();
    let chain = graph.filters_from(&top.node_name, nodes);
    let node =
        chain.last().and_then(|name| nodes.get(name)).cloned().unwrap_or_else(|| top.clone());
    let details = &node.image.format_specific["data"];
    let external_data = details["data-file"].is_string();
    let beneath = graph.beneath(&node.node_name);
    let ours = |n: &Node| n.dirty_bitmaps.iter().filter_map(our_bitmap).collect::<Vec<_>>();
    Disk {
        label,
        top: top.node_name,
        qdev: device.qdev.as_deref().filter(|q| !q.is_empty()).map(qom_path),
        file: node.file.clone(),
        format: node.drv.clone(),
        size: node.image.virtual_size,
        allocated: node.image.actual_size,
        persistent: node.drv == "qcow2" && details["compat"] != "0.10",
        iothread: false,
        external_data,
        bitmaps: ours(&node),
        bitmap_beneath: beneath.iter().filter_map(|n| nodes.get(n)).any(|n| !ours(n).is_empty()),
        node: node.node_name,
    }
}

/// An id stands for `/machine/peripheral/<id>`.
pub(crate) fn qom_path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

fn our_bitmap(state: &BitmapState) -> Option<Bitmap> {
    Some(Bitmap {
        name: BitmapName::parse(state.name.as_deref()?)?,
        recording: state.recording,
        inconsistent: state.inconsistent,
        busy: state.busy,
        dirty: state.count,
    })
}

/// Looks at the device and at the controllers above it (a SCSI disk's iothread is its adapter's).
async fn has_iothread(session: &Session, qdev: Option<&str>) -> Called<bool> {
    let Some(device) = qdev else { return Ok(false) };
    let mut paths = vec![device.to_owned()];
    if let Some(bus) = property(session, device, "parent_bus").await? {
        paths.push(bus);
    }
    for path in paths {
        // From the object upwards: /machine/peripheral/scsi0/virtio-backend/… ends at scsi0.
        let mut path = path.as_str();
        while path.matches('/').count() >= 3 {
            if property(session, path, "iothread").await?.is_some_and(|v| !v.is_empty()) {
                return Ok(true);
            }
            // QEMU 9 can share a disk's queues among several.
            let mapping = any_property(session, path, "iothread-vq-mapping").await?;
            if mapping.as_array().is_some_and(|threads| !threads.is_empty()) {
                return Ok(true);
            }
            path = path.rsplit_once('/').map_or("", |(up, _)| up);
        }
    }
    Ok(false)
}

/// A property that is a string; none if there is no such property.
pub(crate) async fn property(session: &Session, path: &str, name: &str) -> Called<Option<String>> {
    Ok(any_property(session, path, name).await?.as_str().map(str::to_owned))
}

/// A property; null if there is no such property.
async fn any_property(session: &Session, path: &str, name: &str) -> Called<Value> {
    match session.call(cmd::QomGet(json!({"path": path, "property": name})), path).await {
        Ok(value) => Ok(value),
        Err(error) if error.desc().is_empty() => Err(error),
        Err(_) => Ok(Value::Null),
    }
}

/// Who uses whom in the block layer, by node names. Empty where QEMU does not tell.
#[derive(Default, Debug)]
pub(crate) struct Edges(Vec<(String, String, String)>);

impl Edges {
    pub(crate) async fn of(session: &Session) -> Called<Edges> {
        let graph = match session.call(cmd::QueryGraph(json!({})), "").await {
            Ok(graph) => graph,
            Err(error) if error.desc().is_empty() => return Err(error),
            Err(_) => Graph::default(),
        };
        let names: BTreeMap<u64, &str> =
            graph.nodes.iter().map(|n| (n.id, n.name.as_str())).collect();
        let name = |id| names.get(&id).copied().unwrap_or_default().to_owned();
        Ok(Edges(
            graph.edges.iter().map(|e| (name(e.parent), e.name.clone(), name(e.child))).collect(),
        ))
    }

    /// What `node` uses in that role.
    pub(crate) fn child(&self, node: &str, role: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(parent, r, _)| parent == node && r == role)
            .map(|(_, _, child)| child.as_str())
    }

    /// Nodes that use `node`.
    pub(crate) fn parents(&self, node: &str) -> impl Iterator<Item = &str> {
        self.0
            .iter()
            .filter(move |(_, _, child)| child == node)
            .map(|(parent, _, _)| parent.as_str())
    }

    /// From a device's top node through filters to the node with the data, both included.
    pub(crate) fn filters_from(&self, top: &str, nodes: &BTreeMap<String, Node>) -> Vec<String> {
        let mut chain = vec![top.to_owned()];
        while let Some(last) = chain.last().filter(|_| chain.len() < MAX_CHAIN) {
            let is_filter = nodes.get(last).is_some_and(|n| FILTERS.contains(&n.drv.as_str()));
            let below = self.child(last, "file").or_else(|| self.child(last, "backing"));
            match below.filter(|_| is_filter) {
                Some(below) => chain.push(below.to_owned()),
                None => break,
            }
        }
        chain
    }

    /// The backing chain beneath a node, without it.
    fn beneath(&self, node: &str) -> Vec<String> {
        let mut chain: Vec<String> = Vec::new();
        let mut at = node;
        while let Some(below) = self.child(at, "backing").filter(|_| chain.len() < MAX_CHAIN) {
            chain.push(below.to_owned());
            at = chain.last().map_or("", String::as_str);
            if at.is_empty() {
                break;
            }
        }
        chain
    }
}
