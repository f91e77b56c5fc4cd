//! Requests that wait for a pass: an append-only log per partition.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::Partition;
use super::pending::Pending;
use super::records::{RecordFile, RecordWriter, take};
use crate::error::{Error, Kind, Result};
use crate::ids::{Fingerprint, Sequence, SessionId};

/// Bytes of the write buffers of all logs together, shared out evenly.
const BUFFERS: usize = 512 << 10;

/// Bytes of a request in a log.
const RECORD: usize = Fingerprint::LEN + 4 + 8 + 4;
/// Bytes of a request while it is sorted: with its arrival behind the fingerprint.
pub(super) const SORTED: usize = RECORD + 4;

/// What a session says about one fingerprint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Request {
    pub(super) fingerprint: Fingerprint,
    pub(super) session: SessionId,
    pub(super) sequence: Sequence,
    pub(super) kind: RequestKind,
}

/// Why it says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum RequestKind {
    /// It asks.
    Ask = 0,
    /// It gives the grant that it holds under this sequence back.
    Release = 1,
    /// It holds a grant under this sequence, from who answered for the block before.
    Claim = 2,
}

impl Request {
    fn to_bytes(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[..20].copy_from_slice(&self.fingerprint.0);
        bytes[20..24].copy_from_slice(&self.session.0.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.sequence.0.to_be_bytes());
        bytes[32..].copy_from_slice(&(self.kind as u32).to_be_bytes());
        bytes
    }

    /// The form that sorts by fingerprint, then arrival.
    fn to_sorted(record: &[u8; RECORD], arrival: u32) -> [u8; SORTED] {
        let mut bytes = [0; SORTED];
        bytes[..20].copy_from_slice(&record[..20]);
        bytes[20..24].copy_from_slice(&arrival.to_be_bytes());
        bytes[24..].copy_from_slice(&record[20..]);
        bytes
    }

    /// Whom a grant of it is for.
    pub(super) fn grant(self) -> Pending {
        Pending { fingerprint: self.fingerprint, session: self.session, sequence: self.sequence }
    }

    pub(super) fn from_sorted(bytes: &[u8; SORTED]) -> Self {
        Request {
            fingerprint: Fingerprint(take(&bytes[..20])),
            session: SessionId(u32::from_be_bytes(take(&bytes[24..28]))),
            sequence: Sequence(u64::from_be_bytes(take(&bytes[28..36]))),
            kind: match u32::from_be_bytes(take(&bytes[36..])) {
                1 => RequestKind::Release,
                2 => RequestKind::Claim,
                _ => RequestKind::Ask,
            },
        }
    }
}

/// The logs of all partitions.
pub(super) struct RequestLogs {
    dir: PathBuf,
    logs: Vec<Log>,
    next_segment: u64,
}

#[derive(Default)]
struct Log {
    open: Option<RecordWriter<RECORD>>,
    /// Closed segments, oldest first; more than one only after a failed pass.
    closed: Vec<RecordFile>,
    /// When a request was first seen waiting.
    since: Option<Instant>,
}

impl Log {
    fn waiting(&self) -> u64 {
        let open = self.open.as_ref().map_or(0, RecordWriter::records);
        open + self.closed.iter().map(RecordFile::records).sum::<u64>()
    }
}

fn find(logs: &mut [Log], partition: Partition) -> Result<&mut Log> {
    logs.get_mut(usize::from(partition.0))
        .ok_or_else(|| Error::new(Kind::Usage, format!("no partition {}", partition.0)))
}

impl RequestLogs {
    pub(super) fn new(dir: &Path, partitions: u16) -> Self {
        let logs = (0..partitions).map(|_| Log::default()).collect();
        RequestLogs { dir: dir.into(), logs, next_segment: 1 }
    }

    fn log(&mut self, partition: Partition) -> Result<&mut Log> {
        find(&mut self.logs, partition)
    }

    pub(super) fn push(&mut self, partition: Partition, request: Request) -> Result<()> {
        let (segment, buffer) = (self.next_segment, BUFFERS / self.logs.len().max(1));
        let RequestLogs { dir, logs, .. } = self;
        let writer = match &mut find(logs, partition)?.open {
            Some(writer) => writer,
            empty => {
                let path = dir.join(format!("log-{:03}-{segment:08}", partition.0));
                empty.insert(RecordWriter::create(path, buffer)?)
            }
        };
        writer.push(&request.to_bytes())?;
        self.next_segment = self.next_segment.max(segment + 1);
        Ok(())
    }

    /// Requests that wait.
    pub(super) fn waiting(&self, partition: Partition) -> u64 {
        self.logs.get(usize::from(partition.0)).map_or(0, Log::waiting)
    }

    /// The partition to pass now; see [`super::Detector::due`].
    pub(super) fn due(
        &mut self,
        now: Instant,
        waiting: bool,
        enough: u64,
        age: std::time::Duration,
    ) -> Option<Partition> {
        let mut best: Option<(u64, usize)> = None;
        for (i, log) in self.logs.iter_mut().enumerate() {
            let requests = log.waiting();
            if requests == 0 {
                log.since = None;
                continue;
            }
            let since = *log.since.get_or_insert(now);
            let due = waiting || requests >= enough || now.saturating_duration_since(since) >= age;
            if due && best.is_none_or(|(most, _)| requests > most) {
                best = Some((requests, i));
            }
        }
        best.map(|(_, i)| Partition(i as u16))
    }

    /// Closes the partition's log; what is submitted from here on waits for the next pass.
    pub(super) fn close(&mut self, partition: Partition) -> Result<()> {
        let log = self.log(partition)?;
        if let Some(open) = &mut log.open {
            open.flush()?;
        }
        if let Some(open) = log.open.take() {
            log.closed.push(open.finish()?);
        }
        log.since = None;
        Ok(())
    }

    /// Hands out the closed requests in order of arrival, in the form to be sorted.
    pub(super) fn read(
        &self,
        partition: Partition,
        each: &mut dyn FnMut(&[u8; SORTED]) -> Result<()>,
    ) -> Result<()> {
        let mut arrival = 0_u32;
        let Some(log) = self.logs.get(usize::from(partition.0)) else { return Ok(()) };
        for segment in &log.closed {
            let mut reader = segment.read::<RECORD>()?;
            while let Some(record) = reader.next()? {
                each(&Request::to_sorted(&record, arrival))?;
                // Beyond 4 G requests in one pass (144 GB of log) order of arrival is lost, no more.
                arrival = arrival.saturating_add(1);
            }
        }
        Ok(())
    }

    /// Removes the closed segments: their requests are answered.
    pub(super) fn remove_closed(&mut self, partition: Partition) -> Result<()> {
        for segment in std::mem::take(&mut self.log(partition)?.closed) {
            segment.remove();
        }
        Ok(())
    }
}
