//! Reads again what the engine wants to have, and sends it, in the order of the grants.

use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;

use crate::engine::{BackupSession, DiskIndex, Grant};
use crate::error::{Context, Error, Kind, Result};
use crate::nbd::Buffer;
use crate::scan::{AbortOnDrop, READ_SIZE, Shared};
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
        serve(shared, session, sources, &grants).await?;
        if done {
            return Ok(());
        }
    }
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
    let mut queue = VecDeque::with_capacity(shared.depth);
    let mut pieces = Pieces::new(grants);
    while let Some(piece) = pieces.next(shared) {
        if queue.len() >= shared.depth {
            send_first(shared, session, &mut queue).await?;
        }
        let source = sources.get(usize::from(piece.disk.0)).ok_or_else(|| {
            Error::new(Kind::Failed, "the engine wants blocks of no disk of ours")
        })?;
        queue.push_back(fetch(shared, source, piece));
    }
    while !queue.is_empty() {
        send_first(shared, session, &mut queue).await?;
    }
    Ok(())
}

/// Blocks on their way from the cache or the source to the engine.
enum Fetch {
    Cached(Grant, Bytes),
    Reading(Grant, AbortOnDrop<Result<Buffer>>),
}

fn fetch<S: DiskSource + 'static>(shared: &Rc<Shared>, source: &Rc<S>, piece: Grant) -> Fetch {
    let cached = shared.cache.borrow().get((piece.disk, piece.first), u64::from(piece.blocks));
    if let Some(data) = cached {
        return Fetch::Cached(piece, data);
    }
    let (shared, source) = (Rc::clone(shared), Rc::clone(source));
    let task = async move { read(&shared, &*source, piece).await };
    Fetch::Reading(piece, AbortOnDrop(tokio::task::spawn_local(task)))
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

async fn send_first<B: BackupSession>(
    shared: &Shared,
    session: &B,
    queue: &mut VecDeque<Fetch>,
) -> Result<()> {
    let piece = match queue.pop_front() {
        None => return Ok(()),
        Some(Fetch::Cached(piece, data)) => {
            session.write(piece.disk, piece.first, &data).await?;
            piece
        }
        Some(Fetch::Reading(piece, mut task)) => {
            let data = (&mut task.0)
                .await
                .map_err(|error| Error::caused(Kind::Failed, "a read was lost", error))??;
            session.write(piece.disk, piece.first, &data).await?;
            piece
        }
    };
    shared.cache.borrow_mut().drop_before((piece.disk, piece.first + u64::from(piece.blocks)));
    Ok(())
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

    fn next(&mut self, shared: &Shared) -> Option<Grant> {
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
        let most = self.blocks.min(u64::from(READ_SIZE / shared.block_size));
        let at = (self.disk, self.first);
        let cache = shared.cache.borrow();
        let blocks = match cache.get(at, most) {
            Some(cached) => cached.len() as u64 / u64::from(shared.block_size),
            None => cache.gap(at, most),
        };
        let piece = Grant { disk: self.disk, first: self.first, blocks: blocks as u32 };
        self.first += blocks;
        self.blocks -= blocks;
        Some(piece)
    }
}
