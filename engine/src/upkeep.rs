//! What needs both the store and the index: refill at the start, rebuild, verify; and
//! restore, which notes the damage that it meets.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;

use crate::detect::{Anew, Detector, Partition, Rebuild, Watermark};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint, HostId, Slice, Slices};
use crate::jobs;
use crate::jobs::checkpoint::{Checkpoints, journal_ends};
use crate::jobs::journals::walk;
use crate::jobs::rebuild::each_entry;
use crate::jobs::repair;
use crate::jobs::restore::{Options, Outcome, Restorer, Target};
use crate::jobs::tidy;
use crate::jobs::verify::{self, Event, Scope};
use crate::session::Context;
use crate::sort::{Sorted, Sorter};
use crate::store::Store;
use crate::store::commit::SnapshotKey;
use crate::store::container::{ContainerKind, SlotInfo};
use crate::store::journal::Position;
use crate::store::manifest::{Disk, Manifest};
use crate::store::recipe::RecipeReader;
use crate::store::sessions::SessionRecord;

/// Where a job puts its lines of JSON.
pub type Emit<'a> = &'a mut dyn FnMut(String) -> Result<()>;

/// Restores with this engine's means.
#[must_use]
pub fn restorer(context: &Context) -> Restorer {
    Restorer {
        directories: context.store.directories().clone(),
        pool: context.store.pool().clone(),
        damage: context.damage.map(),
        scratch: context.work_dir.clone(),
        block_size: context.store.block_size(),
    }
}

/// Restores a disk into `target`. Damage that it meets is recorded, so that the next backup
/// reads these ranges again.
///
/// # Errors
/// Those of [`Restorer::restore`].
pub fn restore(
    context: &Context,
    disk: &Disk,
    what: &str,
    options: Options,
    target: &mut dyn Target,
) -> Result<Outcome> {
    let mut found = Vec::new();
    let outcome = restorer(context).restore(disk, options, target, &mut found);
    context.damage.met(&context.store, &found, &format!("the restore of {what}"));
    outcome
}

/// Registers a restore or a serve, so that nothing it reads is deleted under it.
///
/// # Errors
/// When the registration cannot be created.
pub fn register_reader(context: &Context, manifest: &Manifest, lease: Duration) -> Result<()> {
    let now_ms = jiff::Timestamp::now().as_millisecond();
    context.manifests.begin_reader(&SessionRecord {
        snapshot: manifest.snapshot,
        vm: manifest.vm,
        vm_name: manifest.vm_name.clone(),
        seq: manifest.seq,
        parent: manifest.parent,
        host: context.host.clone(),
        engine: env!("CARGO_PKG_VERSION").into(),
        gc_epoch: manifest.gc_epoch,
        started_ms: now_ms,
        expires_ms: Some(now_ms.saturating_add(lease.as_millis() as i64)),
    })
}

/// Learns what the journals list after the index's watermark, and what this host `owns` of it.
///
/// # Errors
/// When the journals cannot be read or the index cannot be written. A damaged container
/// is passed over: nothing is deduplicated against it.
pub fn refill(
    store: &Store,
    detector: &mut Detector,
    after: &Watermark,
    owns: &dyn Fn(&Fingerprint) -> bool,
) -> Result<()> {
    each_container(store, after, &mut |position, mut entries| {
        entries.retain(|(fingerprint, _)| owns(fingerprint));
        detector.learn(&mut entries, crate::session::position(position))?;
        while detector.maintain()? {}
        Ok(())
    })
}

/// Builds the index anew, or one partition of it, while backups go on with the present one; gives its
/// entries.
///
/// # Errors
/// [`Kind::Usage`] for a partition that there is not, or of which this host has nothing. When the journals
/// cannot be read or the index cannot be written.
pub fn rebuild_index(
    context: &Context,
    partition: Option<Partition>,
    emit: Emit<'_>,
) -> Result<u64> {
    if let Some(partition) = partition
        && let Some(note) = elsewhere(context, partition)?
    {
        emit(line(&note)?)?;
    }
    let Ok(_only_one) = context.rebuilding.try_lock() else { return Err(busy()) };
    let rebuild =
        context.owners.here().begin_rebuild(partition.map_or(Anew::Index, Anew::Partition))?;
    let epoch = context.owners.cluster().map(|cluster| cluster.map().epoch());
    let owns = context.owners.ownership();
    // Another part is filled for soon, and by another map this one would be taken for it.
    let wanted = || match (context.owners.cluster(), epoch) {
        (Some(cluster), Some(epoch)) if !cluster.is_still_ours(epoch) => {
            Err(Error::new(Kind::Busy, "this host answers for another part now: try again"))
        }
        _ => Ok(()),
    };
    build(context, (rebuild, &[]), &owns, &wanted, &mut |problem| {
        let line = serde_json::json!({ "message_type": "problem", "message": problem });
        emit(line.to_string())
    })
}

/// What is to be said of the other hosts that answer for fingerprints of a partition: each has them in its
/// own index.
fn elsewhere(context: &Context, partition: Partition) -> Result<Option<Event>> {
    let Partition(number) = partition;
    let partitions = context.owners.here().partitions();
    if number >= partitions {
        let last = partitions.saturating_sub(1);
        let what = format!("there is no partition {number}: they are 0 to {last}");
        return Err(Error::new(Kind::Usage, what));
    }
    let Some(cluster) = context.owners.cluster() else { return Ok(None) };
    let map = cluster.map();
    let slices =
        Slice::all().filter(|slice| Partition::of(&slice.first(), partitions) == partition);
    let mut owners: BTreeSet<HostId> = slices.map(|slice| map.owner_of(slice)).collect();
    let is_ours = owners.remove(&cluster.us());
    let name = |host| map.member(host).map(|member| member.name.as_str());
    let names = owners.into_iter().filter_map(name).collect::<Vec<_>>().join(", ");
    match (is_ours, names.is_empty()) {
        (false, _) => {
            let what = format!("partition {number} is of {names}: run it there");
            Err(Error::new(Kind::Usage, what))
        }
        (true, true) => Ok(None),
        (true, false) => Ok(Some(Event::Note {
            object: "index".into(),
            message: format!("{names}: the rest of partition {number} is there; run it there, too"),
        })),
    }
}

/// An index that was filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Filled {
    /// Its entries.
    pub entries: u64,
    /// Entries that were read from checkpoints, those of other hosts' parts with them.
    pub from_checkpoints: u64,
}

/// Builds the index anew for another part of the fingerprints: from checkpoints, and for what is not in
/// them from the store's directories. `still` says whether it is still wanted.
///
/// # Errors
/// [`Kind::Busy`] while the store is repaired or the index rebuilt; when the store cannot be read or the
/// index cannot be written; when it is not wanted any more.
pub fn fill_index(
    context: &Context,
    slices: &Slices,
    checkpoints: &mut Checkpoints,
    still: &dyn Fn() -> bool,
) -> Result<Filled> {
    // A repair takes hours: nobody waits so long for what the index is filled for.
    let Ok(_only_one) = context.rebuilding.try_lock() else { return Err(busy()) };
    // Before anything is read: what is learned from here on is kept.
    let mut rebuild = context.owners.here().begin_rebuild(Anew::Part(slices.digest()))?;
    let owns = |fingerprint: &_| slices.contains(Slice::of(fingerprint));
    let wanted = || {
        let outdated = || Error::new(Kind::Busy, "another part is to be filled in");
        if still() { Ok(()) } else { Err(outdated()) }
    };
    let damage = context.damage.map();
    let (from_checkpoints, after) = if slices.is_empty() {
        (0, journal_ends(&context.store)?)
    } else {
        checkpoints.read(&context.store, slices, &damage, &mut |entries| {
            wanted()?;
            feed(&mut rebuild, &owns, entries)
        })?
    };
    let entries = build(context, (rebuild, &after), &owns, &wanted, &mut |problem| {
        eprintln!("fleece-engine: {problem}");
        Ok(())
    })?;
    Ok(Filled { entries, from_checkpoints })
}

fn feed(
    rebuild: &mut Rebuild,
    owns: &dyn Fn(&Fingerprint) -> bool,
    entries: &[(Fingerprint, Address)],
) -> Result<()> {
    let ours = entries.iter().filter(|(fingerprint, _)| owns(fingerprint));
    rebuild.feed(&ours.copied().collect::<Vec<_>>())
}

/// Feeds an index with what this host owns of the containers that are recorded after a place, and puts
/// it in place. Breaks off where it is not `wanted` any more.
fn build(
    context: &Context,
    (mut rebuild, after): (Rebuild, &[Position]),
    owns: &dyn Fn(&Fingerprint) -> bool,
    wanted: &dyn Fn() -> Result<()>,
    problem: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<u64> {
    let (store, damage) = (&context.store, context.damage.map());
    let read = each_entry(store, &damage, &context.work_dir, after, &mut |entries| {
        wanted()?;
        feed(&mut rebuild, owns, entries)
    })?;
    read.problems.iter().try_for_each(|message| problem(message))?;
    let mut watermark = Watermark::default();
    for at in read.watermark {
        watermark.raise(at.incarnation, at.n.into());
    }
    let rebuilt = rebuild.build(watermark)?;
    wanted()?;
    let entries = rebuilt.entries();
    context.owners.here().install(rebuilt)?;
    Ok(entries)
}

fn busy() -> Error {
    let what = "the index is being rebuilt, or the store repaired: wait for that";
    Error::new(Kind::Busy, what)
}

/// Puts good copies in the place of what is marked as damaged, or says what that would do.
/// `true`: every snapshot can be restored whole.
///
/// # Errors
/// [`Kind::Busy`] while another repair or a rebuild runs; when the store cannot be read or
/// written.
pub fn repair(context: &Context, dry_run: bool, now_ms: i64, emit: Emit<'_>) -> Result<bool> {
    let Ok(_only_one) = context.rebuilding.try_lock() else { return Err(busy()) };
    let options = jobs::Options { dry_run, scratch: context.work_dir.clone(), now_ms };
    let mut say = |event: &repair::Event| emit(line(event)?);
    let mut recorded = |at, entries| context.owners.learn(entries, crate::session::position(at));
    let report = repair::repair(&context.store, &options, &mut say, &mut recorded);
    context.damage.reload(&context.store)?;
    Ok(report?.whole())
}

/// Takes away what nobody needs, or says what that would be; gives the number of objects.
///
/// # Errors
/// [`Kind::NotPermitted`] on a host; [`Kind::Busy`] while another one runs; when the store cannot be read or
/// written.
pub fn tidy(context: &Context, dry_run: bool, now_ms: i64, emit: Emit<'_>) -> Result<u64> {
    let Ok(_only_one) = context.tidying.try_lock() else {
        return Err(Error::new(Kind::Busy, "the store is being tidied: wait for that"));
    };
    let options = jobs::Options { dry_run, scratch: context.work_dir.clone(), now_ms };
    let report = tidy::tidy(&context.store, &options, &mut |event| emit(line(event)?))?;
    Ok(report.removed_objects)
}

fn line(event: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(event)
        .map_err(|e| Error::caused(Kind::Failed, "cannot encode an event", e))
}

/// Verifies what `vm` and `snapshot` name, everything for "" and "", and then the index
/// as well. `true`: nothing is wrong.
///
/// # Errors
/// [`Kind::NotFound`] for an unknown VM or snapshot; when the store cannot be read.
pub fn verify(
    context: &Context,
    vm: &str,
    snapshot: &str,
    now_ms: i64,
    emit: Emit<'_>,
) -> Result<bool> {
    let scope = scope(context, vm, snapshot)?;
    let emit = RefCell::new(emit);
    let say = |event: &Event| (emit.borrow_mut())(line(event)?);
    let options = verify::Options { scope, scratch: context.work_dir.clone(), now_ms };
    if scope != Scope::All {
        let report = verify::verify(&context.store, &options, &mut |e| say(e), &mut |_| Ok(()))?;
        context.damage.reload(&context.store)?;
        return Ok(report.clean());
    }
    let mut index = IndexCheck::of_our_part(context, &say)?;
    let report =
        verify::verify(&context.store, &options, &mut |event| say(event), &mut |entries| {
            let Some((index, owns)) = &mut index else { return Ok(()) };
            let ours = entries.iter().filter(|(fingerprint, _)| owns(fingerprint));
            ours.into_iter().try_for_each(|entry| index.compare(entry))
        })?;
    let index_clean = index.map_or(Ok(true), |(index, _)| index.finish())?;
    context.damage.reload(&context.store)?;
    Ok(report.clean() && index_clean)
}

fn scope(context: &Context, vm: &str, snapshot: &str) -> Result<Scope> {
    if vm.is_empty() {
        return Ok(Scope::All);
    }
    let id = context.manifests.find_vm(vm)?;
    if snapshot.is_empty() {
        return Ok(Scope::Vm(id));
    }
    let zone = jiff::tz::TimeZone::system();
    let manifest = context.manifests.find_snapshot(id, snapshot, &zone)?;
    Ok(Scope::Snapshot(SnapshotKey {
        vm: manifest.vm,
        seq: manifest.seq,
        snapshot: manifest.snapshot,
    }))
}

/// Container 8, slot 2, fingerprint 20: sorts by address.
const BY_ADDRESS: usize = 10 + Fingerprint::LEN;
/// Wrong entries that are named one by one.
const NAMED: u64 = 20;

/// The index beside the directories, which are the truth: both ascend by address.
struct IndexCheck<'c> {
    index: Sorted<BY_ADDRESS>,
    partitions: u16,
    next: Option<[u8; BY_ADDRESS]>,
    wrong: u64,
    missing: u64,
    say: &'c dyn Fn(&Event) -> Result<()>,
}

/// Tells whether a fingerprint is to be in the index.
type Owns = Box<dyn Fn(&Fingerprint) -> bool>;

impl<'c> IndexCheck<'c> {
    /// Takes the index, and what it is to have. In a cluster `None`, and a note, while it is being filled:
    /// then it has what it should not have any more, and lacks what it should.
    fn of_our_part(
        context: &Context,
        say: &'c dyn Fn(&Event) -> Result<()>,
    ) -> Result<Option<(Self, Owns)>> {
        let Some(cluster) = context.owners.cluster() else {
            return Ok(Some((Self::new(context, say)?, Box::new(|_| true))));
        };
        if let Some(map) = cluster.settled() {
            let index = Self::new(context, say)?;
            // Another one may have been put in its place meanwhile.
            if cluster.settled().is_some_and(|now| now.epoch() == map.epoch()) {
                let us = cluster.us();
                let owns = move |fingerprint: &_| map.owner(fingerprint) == us;
                return Ok(Some((index, Box::new(owns))));
            }
        }
        say(&Event::Note {
            object: "index".into(),
            message: "it is being filled for another part of the cluster, and was not compared: \
                      verify again for that"
                .into(),
        })?;
        Ok(None)
    }

    /// Takes the index as it is now; containers sealed later are not missed.
    fn new(context: &Context, say: &'c dyn Fn(&Event) -> Result<()>) -> Result<Self> {
        let mut sorter = Sorter::new(&context.work_dir, context.budget.pass / 4);
        let partitions = context.owners.here().partitions();
        for partition in (0..partitions).map(Partition) {
            let mut after = None;
            loop {
                let entries = context.owners.here().entries_after(partition, after)?;
                let Some((last, _)) = entries.last() else { break };
                after = Some(*last);
                for entry in &entries {
                    sorter.push(&by_address(entry))?;
                }
            }
        }
        let mut index = sorter.finish()?;
        let next = index.next()?;
        Ok(IndexCheck { index, partitions, next, wrong: 0, missing: 0, say })
    }

    fn compare(&mut self, sound: &(Fingerprint, Address)) -> Result<()> {
        let sound = by_address(sound);
        while self.next.is_some_and(|next| next < sound) {
            self.wrong_entry()?;
        }
        if self.next == Some(sound) {
            self.next = self.index.next()?;
        } else {
            // Written twice, or sealed just now, or an index that is being refilled.
            self.missing += 1;
        }
        Ok(())
    }

    fn wrong_entry(&mut self) -> Result<()> {
        let Some(entry) = self.next else { return Ok(()) };
        self.wrong += 1;
        self.next = self.index.next()?;
        if self.wrong > NAMED {
            return Ok(());
        }
        let number = |range: std::ops::Range<usize>| {
            entry[range].iter().fold(0_u64, |n, &byte| n << 8 | u64::from(byte))
        };
        let mut fingerprint = Fingerprint([0; Fingerprint::LEN]);
        fingerprint.0.copy_from_slice(&entry[BY_ADDRESS - Fingerprint::LEN..]);
        let Partition(partition) = Partition::of(&fingerprint, self.partitions);
        (self.say)(&Event::Problem {
            what: "index",
            object: format!("{:08x}-{:08x}/{}", number(0..4), number(4..8), number(8..10)),
            message: format!(
                "an entry of the index names a slot that does not hold its block; no harm is done, \
                 fleecectl rebuild-index --partition {partition} mends it"
            ),
        })
    }

    fn finish(mut self) -> Result<bool> {
        while self.next.is_some() {
            self.wrong_entry()?;
        }
        if self.missing > 0 {
            (self.say)(&Event::Note {
                object: "index".into(),
                message: format!("{} stored blocks are not in the index", self.missing),
            })?;
        }
        Ok(self.wrong == 0)
    }
}

fn by_address((fingerprint, address): &(Fingerprint, Address)) -> [u8; BY_ADDRESS] {
    let mut record = [0; BY_ADDRESS];
    record[..4].copy_from_slice(&address.container.incarnation.0.to_be_bytes());
    record[4..8].copy_from_slice(&address.container.counter.to_be_bytes());
    record[8..10].copy_from_slice(&address.slot.0.to_be_bytes());
    record[10..].copy_from_slice(&fingerprint.0);
    record
}

/// What the containers of blocks that are journaled after a watermark hold, one container
/// at a time: at most 65,535 entries.
fn each_container(
    store: &Store,
    after: &Watermark,
    each: &mut dyn FnMut(Position, Vec<(Fingerprint, Address)>) -> Result<()>,
) -> Result<()> {
    for incarnation in store.journals().incarnations()? {
        let after = u32::try_from(after.get(incarnation)).unwrap_or(u32::MAX);
        walk(store, incarnation, after, &mut |position, read| {
            let mut entries = Vec::new();
            match read {
                Ok(recorded) => recorded
                    .iter()
                    .filter(|entry| entry.kind == ContainerKind::Blocks)
                    .try_for_each(|entry| read_entries(store, entry.container, &mut entries))?,
                Err(error) => {
                    eprintln!("fleece-engine: {error}; nothing is deduplicated against it");
                }
            }
            each(position, entries)
        })?;
    }
    Ok(())
}

/// The blocks that a container has; one that is damaged or missing has none.
fn read_entries(
    store: &Store,
    container: ContainerId,
    entries: &mut Vec<(Fingerprint, Address)>,
) -> Result<()> {
    let before = entries.len();
    let read = store.directories().each_slot(container, |slot, info| {
        if let SlotInfo::Present(fingerprint) = info {
            entries.push((fingerprint, Address { container, slot }));
        }
        Ok(())
    });
    match read {
        Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotFound) => {
            eprintln!("fleece-engine: {error}; nothing is deduplicated against it");
            entries.truncate(before);
            Ok(())
        }
        read => read,
    }
}

/// The snapshots of a VM (name or UUID), or of all for "", oldest first; the newest
/// `limit` of each VM.
///
/// # Errors
/// [`Kind::NotFound`] for an unknown VM; when the store cannot be read.
pub fn snapshots(context: &Context, which: &str, limit: usize) -> Result<Vec<Manifest>> {
    let manifests = &context.manifests;
    let vms = if which.is_empty() { manifests.vms()? } else { vec![manifests.find_vm(which)?] };
    let mut found = std::collections::VecDeque::new();
    for vm in vms {
        let mut all = manifests.list(vm)?;
        loop {
            let mut manifest = match all.next() {
                Ok(Some(manifest)) => manifest,
                Ok(None) => break,
                // One that is damaged hides no other; verify names it.
                Err(error) if error.kind() == Kind::Damaged => continue,
                Err(error) => return Err(error),
            };
            manifest.config = Vec::new();
            if found.len() == limit {
                found.pop_front();
            }
            found.push_back(manifest);
        }
    }
    Ok(found.into())
}

/// Whether something that this snapshot needs is known to be damaged, or cannot be read.
#[must_use]
pub fn is_damaged(context: &Context, manifest: &Manifest) -> bool {
    let damage = context.damage.map();
    if damage.is_empty() {
        return false;
    }
    manifest.disks.iter().any(|disk| {
        let shape = disk.shape(context.store.block_size());
        RecipeReader::new(context.store.directories(), disk.root, shape)
            .and_then(|reader| damage.forced_ranges(&reader))
            .map_or(true, |ranges| !ranges.is_empty())
    })
}
