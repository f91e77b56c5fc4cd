//! The QMP commands we use, and the parts of their answers that we read.
//!
//! `qapi` carries and sequences them. Its generated types are older than the QEMUs we meet (they
//! lack snapshot-access and the copy-before-write options, and fail on an unknown enum value), so
//! arguments are JSON here and answers keep only the fields that we look at.

use crate::qmp::schema::SchemaItem;
use qapi::qmp::QmpCommand;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An answer that carries nothing, or nothing that we read.
pub type Ignored = Value;

macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident = $wire:literal -> $ok:ty;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, Serialize)]
            #[serde(transparent)]
            pub struct $name(pub Value);

            impl QmpCommand for $name {}
            impl qapi::Command for $name {
                type Ok = $ok;
                const NAME: &'static str = $wire;
                const ALLOW_OOB: bool = false;
            }
        )*

        /// Every command that this file names, for the check against QEMU's schema.
        pub const ALL: &[&str] = &[$($wire),*];
    };
}

commands! {
    /// Is it running, and if not, why.
    QueryStatus = "query-status" -> Status;
    /// The schema, for the check of capabilities.
    QuerySchema = "query-qmp-schema" -> Vec<SchemaItem>;
    /// Devices and what is inserted in them.
    QueryBlock = "query-block" -> Vec<Device>;
    /// How much the guest asked of its devices, and how long that took.
    QueryBlockstats = "query-blockstats" -> Vec<DeviceStats>;
    /// Every node of the block layer.
    QueryNodes = "query-named-block-nodes" -> Vec<Node>;
    /// Nodes and the edges between them.
    QueryGraph = "x-debug-query-block-graph" -> Graph;
    /// What the NBD server exports.
    QueryExports = "query-block-exports" -> Vec<Export>;
    /// Jobs with their state.
    QueryJobs = "query-jobs" -> Vec<Job>;
    /// Character devices (the guest agent's among them).
    QueryChardev = "query-chardev" -> Vec<Chardev>;
    /// A property of an object.
    QomGet = "qom-get" -> Value;
    /// Sets a property of an object.
    QomSet = "qom-set" -> Ignored;
    /// Adds a node.
    BlockdevAdd = "blockdev-add" -> Ignored;
    /// Removes a node.
    BlockdevDel = "blockdev-del" -> Ignored;
    /// Several actions, all or none.
    Transaction = "transaction" -> Ignored;
    /// Adds a dirty bitmap.
    BitmapAdd = "block-dirty-bitmap-add" -> Ignored;
    /// Removes a dirty bitmap.
    BitmapRemove = "block-dirty-bitmap-remove" -> Ignored;
    /// Stops a bitmap's recording.
    BitmapDisable = "block-dirty-bitmap-disable" -> Ignored;
    /// Merges bitmaps into one.
    BitmapMerge = "block-dirty-bitmap-merge" -> Ignored;
    /// Starts the one NBD server.
    NbdStart = "nbd-server-start" -> Ignored;
    /// Stops it, and everybody's exports with it.
    NbdStop = "nbd-server-stop" -> Ignored;
    /// Exports a node.
    ExportAdd = "block-export-add" -> Ignored;
    /// Ends an export.
    ExportDel = "block-export-del" -> Ignored;
    /// Cancels a block job.
    JobCancel = "block-job-cancel" -> Ignored;
    /// Forgets a concluded job.
    JobDismiss = "job-dismiss" -> Ignored;
    /// Stops the guest's CPUs.
    Stop = "stop" -> Ignored;
    /// Lets the guest go on.
    Cont = "cont" -> Ignored;
    /// The VM's UUID, all zeros without `-uuid`.
    QueryUuid = "query-uuid" -> UuidAnswer;
    /// The VM's name, where it has one.
    QueryName = "query-name" -> NameAnswer;
}

macro_rules! answers {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, Default, Deserialize)]
            #[serde(rename_all = "kebab-case", default)]
            pub struct $name {
                $($(#[$field_doc])* pub $field: $kind,)*
            }
        )*
    };
}

answers! {
    /// Of [`QueryStatus`].
    Status {
        /// The guest's CPUs run.
        running: bool,
        /// QEMU's word: running, paused, io-error, …
        status: String,
    }
    /// Of [`QueryUuid`].
    UuidAnswer {
        /// Hyphenated.
        #[serde(rename = "UUID")]
        uuid: String,
    }
    /// Of [`QueryName`].
    NameAnswer {
        /// `-name`.
        name: Option<String>,
    }
    /// A device of [`QueryBlock`].
    Device {
        /// The name of a `-drive`; empty with `-device`.
        device: String,
        /// Its id, or the path of the device object.
        qdev: Option<String>,
        /// A CD or floppy drive.
        removable: bool,
        /// What is in it.
        inserted: Option<Node>,
    }
    /// A device of [`QueryBlockstats`].
    DeviceStats {
        /// What it counted.
        stats: DeviceCounts,
    }
    /// Requests of the guest that were answered since it began, and the sum of their times.
    DeviceCounts {
        /// Reads.
        #[serde(rename = "rd_operations")]
        rd_operations: u64,
        /// Their nanoseconds.
        #[serde(rename = "rd_total_time_ns")]
        rd_total_time_ns: u64,
        /// Writes.
        #[serde(rename = "wr_operations")]
        wr_operations: u64,
        /// Their nanoseconds.
        #[serde(rename = "wr_total_time_ns")]
        wr_total_time_ns: u64,
        /// Flushes.
        #[serde(rename = "flush_operations")]
        flush_operations: u64,
        /// Their nanoseconds.
        #[serde(rename = "flush_total_time_ns")]
        flush_total_time_ns: u64,
    }
    /// A node of the block layer.
    Node {
        /// Its name; `#block…` where nobody gave one.
        node_name: String,
        /// The driver.
        drv: String,
        /// Read-only.
        ro: bool,
        /// The file, or a json: description.
        file: String,
        /// The image in it.
        image: Image,
        /// Its bitmaps, unnamed ones too.
        dirty_bitmaps: Vec<BitmapState>,
    }
    /// The image in a node.
    Image {
        /// The size that the guest sees.
        #[serde(rename = "virtual-size")]
        virtual_size: u64,
        /// Bytes that it takes on its host.
        #[serde(rename = "actual-size")]
        actual_size: u64,
        /// What only its format knows.
        #[serde(rename = "format-specific")]
        format_specific: Value,
    }
    /// A bitmap of a node.
    BitmapState {
        /// Absent for the unnamed ones of jobs.
        name: Option<String>,
        /// Dirty bytes, roughly.
        count: u64,
        /// Bytes per bit.
        granularity: u64,
        /// Guest writes are recorded.
        recording: bool,
        /// In use by an export or a job.
        busy: bool,
        /// Stored in the image.
        persistent: bool,
        /// Was not stored when QEMU last ended.
        inconsistent: bool,
    }
    /// Of [`QueryGraph`].
    Graph {
        /// Devices' backends, jobs and nodes.
        nodes: Vec<GraphNode>,
        /// Who uses whom.
        edges: Vec<GraphEdge>,
    }
    /// A corner of the graph.
    GraphNode {
        /// Its number in this answer.
        id: u64,
        /// block-backend, block-job or block-driver.
        #[serde(rename = "type")]
        kind: String,
        /// A node's name.
        name: String,
    }
    /// An edge of the graph.
    GraphEdge {
        /// The user.
        parent: u64,
        /// The used.
        child: u64,
        /// The role: file, backing, target, root, …
        name: String,
    }
    /// An export.
    Export {
        /// Its id.
        id: String,
        /// The node.
        node_name: String,
    }
    /// A job.
    Job {
        /// Its id.
        id: String,
        /// created, running, concluded, …
        status: String,
        /// Bytes done.
        current_progress: u64,
        /// Bytes to do.
        total_progress: u64,
        /// Why it failed.
        error: Option<String>,
    }
    /// A character device.
    Chardev {
        /// Its id.
        label: String,
        /// Its address: `unix:/path,server=on` or `disconnected:unix:…`.
        filename: String,
        /// The guest has the port open.
        frontend_open: bool,
    }
}

/// An event as QEMU sent it.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// Its word, e.g. `BLOCK_IO_ERROR`.
    #[serde(rename = "event")]
    pub name: String,
    /// Its fields.
    #[serde(default)]
    pub data: Value,
}
