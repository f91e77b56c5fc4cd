//! Reads again what the engine wants to have, and sends it, in the order of the grants; or has it read
//! by the engine, from images that were lent.

use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;

use crate::engine::{BackupSession, DiskIndex, Grant, MAX_LENT};
use crate::error::{Context, Error, Kind, Result};
use crate::nbd::Buffer;
use crate::scan::{AbortOnDrop, Shared};
use crate::source::DiskSource;

/// Serves grants until everything is settled.
///
/// # Errors
/// Where the source or the engine fails.
pub async fn write<S, B>(shared: &Rc<Shared>, session: &B, sources: &[Rc<S>]) -> Result<()>
where
    S: DiskSource + 'static,
    B: BackupSession,
{
    loop {
        let (grants, done) = session.grants().await?;
        let ways = |a: &Grant, b: &Grant| shared.is_lent(a.disk) == shared.is_lent(b.disk);
        for grants in grants.chunk_by(ways) {
            match shared.is_lent(grants[0].disk) {
                true => write_lent(shared, session, grants).await?,
                false => serve(shared, session, sources, grants).await?,
            }
        }
        if done {
            return Ok(());
        }
    }
}

/// Has the engine read what it wants of disks that were lent to it.
async fn write_lent<B: BackupSession>(
    shared: &Shared,
    session: &B,
    mut grants: &[Grant],
) -> Result<()> {
    let mut skip = 0;
    loop {
        let call = next_call(&mut grants, &mut skip, MAX_LENT / shared.block_size);
        if call.is_empty() {
            return Ok(());
        }
        session.write_lent(&call).await?;
        let blocks: u64 = call.iter().map(|grant| u64::from(grant.blocks)).sum();
        shared.read.set(shared.read.get() + blocks * u64::from(shared.block_size));
    }
}

/// The next `most` blocks of the grants, of whose first one `skip` blocks were taken before.
fn next_call(grants: &mut &[Grant], skip: &mut u32, most: u32) -> Vec<Grant> {
    let (mut call, mut room) = (Vec::new(), most);
    while let Some((grant, behind)) = grants.split_first().filter(|_| room > 0) {
        let left = grant.blocks - *skip;
        let blocks = left.min(room);
        call.push(Grant { first: grant.first + u64::from(*skip), blocks, ..*grant });
        room -= blocks;
        if blocks == left {
            (*grants, *skip) = (behind, 0);
        } else {
            *skip += blocks;
        }
    }
    call
}

async fn serve<S, B>(
    shared: &Rc<Shared>,
    session: &B,
    sources: &[Rc<S>],
    grants: &[Grant],
) -> Result<()>
where
    S: DiskSource + 'static,
    B: BackupSession,
{
    let sources: Rc<[Rc<S>]> = sources.into();
    let mut queue = VecDeque::with_capacity(shared.depth);
    let mut pieces = Pieces::new(grants);
    while let Some(parcel) = Parcel::fill(shared, &sources, &mut pieces)? {
        if queue.len() >= shared.depth {
            send_first(shared, session, &mut queue).await?;
        }
        let (shared, sources) = (Rc::clone(shared), Rc::clone(&sources));
        let task = async move { parcel.fetch(&shared, &sources).await };
        queue.push_back(AbortOnDrop(tokio::task::spawn_local(task)));
    }
    while !queue.is_empty() {
        send_first(shared, session, &mut queue).await?;
    }
    Ok(())
}

/// Blocks with their places.
type Blocks = Vec<(Grant, Bytes)>;

async fn send_first<B: BackupSession>(
    shared: &Shared,
    session: &B,
    queue: &mut VecDeque<AbortOnDrop<Result<Blocks>>>,
) -> Result<()> {
    let Some(mut task) = queue.pop_front() else { return Ok(()) };
    let blocks = (&mut task.0)
        .await
        .map_err(|error| Error::caused(Kind::Failed, "a read was lost", error))??;
    session.write(&blocks).await?;
    if let Some((last, _)) = blocks.last() {
        let end = (last.disk, last.first + u64::from(last.blocks));
        shared.cache.borrow_mut().drop_before(end);
    }
    Ok(())
}

/// Granted blocks that go into one message, and where they come from.
#[derive(Default)]
struct Parcel(Vec<Part>);

enum Part {
    Cached(Grant, Bytes),
    /// Several runs of blocks that one read gets, and what is between them.
    Read {
        span: Grant,
        runs: Vec<Grant>,
    },
}

impl Parcel {
    /// Takes pieces as long as what they make the parcel hold is no more than one long read does.
    fn fill<S: DiskSource>(
        shared: &Shared,
        sources: &[Rc<S>],
        pieces: &mut Pieces<'_>,
    ) -> Result<Option<Parcel>> {
        let most = shared.blocks_per_read();
        let mut parcel = Parcel::default();
        let mut blocks = 0;
        while let Some((piece, cached)) = pieces.peek(shared) {
            let source = sources.get(usize::from(piece.disk.0)).ok_or_else(|| {
                Error::new(Kind::Failed, "the engine wants blocks of no disk of ours")
            })?;
            let most_gap = if shared.limit.is_set() { 0 } else { source.gap() };
            let gap = parcel.gap_before(&piece, most_gap / u64::from(shared.block_size));
            let gap = gap.filter(|_| cached.is_none());
            let more = piece.blocks + gap.unwrap_or(0);
            if blocks + more > most && blocks > 0 {
                break;
            }
            blocks += more;
            pieces.take(&piece);
            parcel.add(piece, cached, gap);
        }
        Ok((blocks > 0).then_some(parcel))
    }

    /// Blocks between the last read and a piece that it can be extended to, if it can.
    fn gap_before(&self, piece: &Grant, most: u64) -> Option<u32> {
        let Some(Part::Read { span, .. }) = self.0.last() else { return None };
        let gap = piece.first.checked_sub(span.first + u64::from(span.blocks))?;
        (span.disk == piece.disk && gap <= most).then_some(gap as u32)
    }

    fn add(&mut self, piece: Grant, cached: Option<Bytes>, gap: Option<u32>) {
        match (cached, gap, self.0.last_mut()) {
            (Some(data), _, _) => self.0.push(Part::Cached(piece, data)),
            (None, Some(gap), Some(Part::Read { span, runs })) => {
                span.blocks += gap + piece.blocks;
                runs.push(piece);
            }
            (None, ..) => self.0.push(Part::Read { span: piece, runs: vec![piece] }),
        }
    }

    /// Reads what has to be read, all at the same time.
    async fn fetch<S: DiskSource>(self, shared: &Shared, sources: &[Rc<S>]) -> Result<Blocks> {
        let parts = self.0.into_iter().map(async |part| match part {
            Part::Cached(piece, data) => Ok::<Blocks, Error>(vec![(piece, data)]),
            Part::Read { span, runs } => {
                let source = &*sources[usize::from(span.disk.0)];
                let read_all = read(shared, source, span).await;
                if read_all.is_err() && runs.len() > 1 {
                    // What cannot be read may be what nobody wants.
                    return read_each(shared, source, runs).await;
                }
                let data = Bytes::from_owner(read_all?);
                let place = |run: &Grant| {
                    let byte =
                        |block: u64| (block - span.first) as usize * shared.block_size as usize;
                    data.slice(byte(run.first)..byte(run.first + u64::from(run.blocks)))
                };
                Ok(runs.iter().map(|run| (*run, place(run))).collect())
            }
        });
        let parts = futures::future::try_join_all(parts).await?;
        Ok(parts.into_iter().flatten().collect())
    }
}

async fn read_each<S: DiskSource>(shared: &Shared, source: &S, runs: Vec<Grant>) -> Result<Blocks> {
    let mut blocks = Blocks::with_capacity(runs.len());
    for run in runs {
        blocks.push((run, Bytes::from_owner(read(shared, source, run).await?)));
    }
    Ok(blocks)
}

async fn read<S: DiskSource>(shared: &Shared, source: &S, piece: Grant) -> Result<Buffer> {
    let block_size = u64::from(shared.block_size);
    let offset = piece.first * block_size;
    let whole = u64::from(piece.blocks) * block_size;
    let length = source.size().checked_sub(offset).map_or(0, |left| left.min(whole));
    if length == 0 || whole - length >= block_size {
        return Err(Error::new(Kind::Failed, "the engine wants blocks behind the disk's end"));
    }
    shared.limit.admit(length).await;
    let data = source
        .read(offset, length as u32)
        .await
        .context(|| format!("cannot read {length} bytes again at {offset}"))?;
    shared.read.set(shared.read.get() + length);
    if length == whole {
        return Ok(data);
    }
    let mut padded = data.to_vec();
    padded.resize(whole as usize, 0);
    Ok(Buffer::from_vec(padded))
}

/// Cuts grants into pieces that are read or cached as a whole; joins neighbours first.
struct Pieces<'a> {
    grants: std::iter::Peekable<std::slice::Iter<'a, Grant>>,
    disk: DiskIndex,
    first: u64,
    blocks: u64,
}

impl<'a> Pieces<'a> {
    fn new(grants: &'a [Grant]) -> Self {
        Pieces { grants: grants.iter().peekable(), disk: DiskIndex(0), first: 0, blocks: 0 }
    }

    /// The next piece, and its blocks if they are cached; the same one until it is taken.
    fn peek(&mut self, shared: &Shared) -> Option<(Grant, Option<Bytes>)> {
        if self.blocks == 0 {
            let grant = self.grants.next()?;
            (self.disk, self.first, self.blocks) =
                (grant.disk, grant.first, u64::from(grant.blocks));
        }
        while let Some(more) = self
            .grants
            .next_if(|next| next.disk == self.disk && next.first == self.first + self.blocks)
        {
            self.blocks += u64::from(more.blocks);
        }
        let most = self.blocks.min(u64::from(shared.blocks_per_read()));
        let at = (self.disk, self.first);
        let cache = shared.cache.borrow();
        let cached = cache.get(at, most);
        let blocks = match &cached {
            Some(cached) => cached.len() as u64 / u64::from(shared.block_size),
            None => cache.gap(at, most),
        };
        let piece = Grant { disk: self.disk, first: self.first, blocks: blocks as u32 };
        Some((piece, cached))
    }

    /// Steps over a piece.
    fn take(&mut self, piece: &Grant) {
        self.first += u64::from(piece.blocks);
        self.blocks -= u64::from(piece.blocks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_name_every_granted_block_once_and_never_too_many() {
        let disk = DiskIndex(1);
        let all = [(0, 5), (7, 20), (30, 1), (40, 8)];
        let grants = all.map(|(first, blocks)| Grant { disk, first, blocks });
        let (mut rest, mut skip, mut calls) = (&grants[..], 0, Vec::new());
        loop {
            let call = next_call(&mut rest, &mut skip, 8);
            if call.is_empty() {
                break;
            }
            calls.push(call.iter().map(|grant| (grant.first, grant.blocks)).collect::<Vec<_>>());
        }
        let expected: [&[(u64, u32)]; 5] =
            [&[(0, 5), (7, 3)], &[(10, 8)], &[(18, 8)], &[(26, 1), (30, 1), (40, 6)], &[(46, 2)]];
        assert_eq!(calls, expected);
    }
}
