//! A shut-off VM: straight from its images, which nobody may start meanwhile.
//!
//! A qcow2 image carries its dirty bitmap. The new one is added before the old one is
//! disabled, so that no write falls between them; a failure merges the new one back. Both
//! need the image for themselves, so they come before it is opened for reading; what somebody
//! writes before that is in the new bitmap only, so the backup must fail then.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use uuid::Uuid;

use super::live::{fates, known_disks};
use super::messages::{Committed, DiskLine, Plan, PointInTime};
use super::resume::{Held, until_committed};
use super::{
    Admitted, Context, Failure, Identity, Options, Stop, choose, commit, forced, forced_again,
    full_for_all, parent, transfer, within,
};
use crate::engine::{BackupPlan, BackupRequest, DiskRequest, Engine, Snapshot};
use crate::error::{Context as _, Error, Kind, Result};
use crate::extents::{Flags, PlanInput};
use crate::image::{BitmapChange, ImageInfo, OpenImage, OpenOptions, Stamp};
use crate::nbd::{ConnectOptions, Export, wire};
use crate::progress::Report;
use crate::qmp::bitmap::{self, Action, Base, Bitmap, BitmapName, DiskPlan, Known};
use crate::qmp::disk::Disk;
use crate::qmp::session::uuid_of_name;
use crate::read_limit::ReadLimit;
use crate::scan::ScanDisk;
use crate::units::now_ms;

/// An image of a disk, as the operator names it.
#[derive(Clone, Debug)]
pub struct ImageOf {
    /// The disk's label.
    pub disk: String,
    /// The image.
    pub file: PathBuf,
    /// Its format, where the operator names it: then it is that.
    pub format: Option<&'static str>,
}

/// Backs up a shut-off VM from its images.
///
/// # Errors
/// Nothing was committed, and the images are as they were.
pub async fn offline(
    report: &Report,
    engine: &Engine,
    (name, images): (&str, &[ImageOf]),
    options: &Options,
    stop: &Stop,
) -> Result<()> {
    let begun = Instant::now();
    let mut found = stop.unless(prepare(engine, name, images, options)).await?;
    if options.dry_run {
        let opened = found.open(ConnectOptions::default()).await?;
        let bytes = found.all_bytes(&opened).await?;
        report.send(&found.message(engine, &bytes, true));
        return close(opened).await;
    }
    let identity = &found.identity;
    let mut request = identity.request(found.disk_requests(), Vec::new(), "shut off".to_owned());
    let (plan, session) = stop.unless(engine.open_backup(&request)).await?;
    found.heed(&plan);
    // What is asked for again after a restart of the engine.
    request.disks = found.disk_requests();
    let context = Context { report, engine, options, stop };
    let mut admitted = Admitted { plan, session };
    // Not before the engine took the VM: one that it refuses must lose nothing.
    let result = match recover(&found).await {
        Ok(()) => backup(&context, &found, &request, &mut admitted).await,
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(snapshot) => {
            report.send(&Committed::new(&snapshot, begun.elapsed()));
            Ok(())
        }
        Err(failure) => {
            failure.give_up(&admitted.session).await;
            Err(failure.error)
        }
    }
}

/// The images and what is to be read of them.
struct Found {
    identity: Identity,
    images: Vec<ImageInfo>,
    disks: Vec<Disk>,
    plans: Vec<DiskPlan>,
    recovery: Vec<Action>,
    forced: Vec<Vec<std::ops::Range<u64>>>,
    latest: Option<Snapshot>,
}

async fn prepare(
    engine: &Engine,
    name: &str,
    images: &[ImageOf],
    options: &Options,
) -> Result<Found> {
    let labels: Vec<&str> = images.iter().map(|image| image.disk.as_str()).collect();
    if let Some(twice) = labels.iter().enumerate().find(|(i, label)| labels[..*i].contains(label)) {
        return Err(Error::new(Kind::Usage, format!("two images for disk {}", twice.1)));
    }
    let chosen = choose(name, &labels, options, |i, word| labels[i] == word)?;
    let (mut infos, mut disks) = (Vec::new(), Vec::new());
    for i in chosen {
        let info = look_at(&images[i]).await?;
        disks.push(describe(&images[i].disk, &info));
        infos.push(info);
    }
    let identity = identify(engine, name, options).await?;
    let (fates, latest) = fates(engine, identity.uuid, &disks, options).await?;
    let known = known_disks(latest.as_ref());
    let store = engine.info().store.to_string();
    let latest_id = latest.as_ref().map_or("", |snapshot| snapshot.id.0.as_str());
    let known = Known { store: &store, fates: &fates, latest: latest_id, known: &known };
    let mut plan = bitmap::plan(&disks, known, Uuid::new_v4);
    if let Some(reason) = full_for_all(engine, identity.uuid, latest.as_ref(), options).await? {
        plan.disks.iter_mut().for_each(|disk| disk.make_full(reason.as_str()));
    }
    let forced = vec![Vec::new(); disks.len()];
    let (mut plans, mut recovery) = (plan.disks, plan.recovery);
    for (i, disk) in disks.iter().enumerate().filter(|(i, _)| !infos[*i].is_writable()) {
        let of_disk = |action: &Action| action.node() == disk.node;
        if recovery.iter().any(of_disk) {
            plans[i].make_full("a dead run's dirty bitmap is in it, and it cannot be written to");
            recovery.retain(|action| !of_disk(action));
        }
    }
    Ok(Found { identity, images: infos, disks, plans, recovery, forced, latest })
}

/// Images do not say whose they are: a name that the store knows means that VM, another one
/// gets an identity made of the name.
async fn identify(engine: &Engine, name: &str, options: &Options) -> Result<Identity> {
    let stored = options.rename.as_deref().unwrap_or(name);
    let known = match engine.snapshots(stored).await {
        Err(error) if error.kind() == Kind::NotFound => None,
        other => other?.pop().map(|snapshot| snapshot.vm),
    };
    Ok(Identity::new(known.unwrap_or_else(|| uuid_of_name(stored)), name, options))
}

/// Looks at an image. What a guest writes onto a raw disk can look like any other format, with
/// files of the host behind it: so an image that names others, and what is on a block device, is one
/// only if the operator says so.
async fn look_at(image: &ImageOf) -> Result<ImageInfo> {
    let ImageOf { disk, file, .. } = image;
    // A name that ends in `.raw` is taken by its word.
    let by_name = file.extension().is_some_and(|end| end == "raw").then_some("raw");
    let known = image.format.or(by_name);
    let info = ImageInfo::read(file, known).await?;
    let doubt = match &info.backing {
        _ if known.is_some() || info.format == "raw" => None,
        Some(backing) => Some(format!("with a backing file, {backing:?}")),
        None if info.external_data => Some("with its data in other files".to_owned()),
        None => is_block_device(file).then(|| "on a block device".to_owned()),
    };
    let Some(doubt) = doubt else { return Ok(info) };
    let (file, format) = (file.display(), &info.format);
    let what = format!(
        "{file} seems to be {format} {doubt}. A guest can write that onto a raw disk, to have files \
         backed up that are not its own; say which it is: --image {disk}={format}:{file}, or --image \
         {disk}=raw:{file}"
    );
    Err(Error::new(Kind::Usage, what))
}

fn is_block_device(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|file| file.file_type().is_block_device())
}

/// The image as a disk of a VM, for the same decisions.
fn describe(label: &str, info: &ImageInfo) -> Disk {
    let ours = info.bitmaps.iter().filter_map(|bitmap| {
        let name = BitmapName::parse(&bitmap.name)?;
        let (recording, inconsistent) = (bitmap.enabled, bitmap.in_use);
        Some(Bitmap { name, recording, inconsistent, busy: false, dirty: 0 })
    });
    let blocks = std::fs::metadata(&info.file).map(|file| {
        use std::os::unix::fs::MetadataExt;
        file.blocks() * 512
    });
    Disk {
        label: label.to_owned(),
        node: label.to_owned(),
        file: info.file.display().to_string(),
        format: info.format.clone(),
        size: info.size,
        allocated: blocks.unwrap_or(info.size),
        persistent: info.can_keep_bitmaps(),
        external_data: info.external_data,
        bitmaps: ours.collect(),
        ..Disk::default()
    }
}

impl Found {
    fn disk_requests(&self) -> Vec<DiskRequest> {
        let pairs = self.disks.iter().zip(&self.plans);
        pairs
            .map(|(disk, plan)| DiskRequest {
                uuid: plan.uuid,
                name: disk.label.clone(),
                size: disk.size,
                parent: parent(plan.parent()),
            })
            .collect()
    }

    fn heed(&mut self, plan: &BackupPlan) {
        for (i, decided) in plan.disks.iter().enumerate() {
            if !decided.incremental && !self.plans[i].parent().is_empty() {
                self.plans[i].make_full(decided.reason.as_str());
            }
            self.forced[i] = forced(decided);
        }
    }

    /// The bitmap that says what to read of a disk.
    fn dirty(&self, i: usize) -> Option<&str> {
        let plan = &self.plans[i];
        plan.bitmap.as_deref().filter(|_| !plan.parent().is_empty())
    }

    /// Opens all images for reading: from here on no VM can start on them.
    async fn open(&self, connect: ConnectOptions) -> Result<Vec<OpenImage>> {
        let mut opened = Vec::new();
        for (i, info) in self.images.iter().enumerate() {
            let bitmap = self.dirty(i).map(str::to_owned);
            let options = OpenOptions { bitmap, writable: false, connect: connect.clone() };
            opened.push(OpenImage::open(info, &options).await?);
        }
        Ok(opened)
    }

    /// How much is to be read of each disk. It stays so: nobody can change them.
    async fn all_bytes(&self, opened: &[OpenImage]) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        for (i, image) in opened.iter().enumerate() {
            all.push(self.bytes(i, image.export()).await?);
        }
        Ok(all)
    }

    async fn bytes(&self, i: usize, export: &Export) -> Result<u64> {
        let Some(name) = self.dirty(i) else {
            return Ok(self.disks[i].allocated.min(self.disks[i].size));
        };
        let context = wire::dirty_bitmap(name);
        let mut dirty = 0;
        let whole = 0..self.disks[i].size;
        export
            .map(&context, whole, |extent| {
                dirty += if Flags::is_dirty(extent.flags) { extent.length } else { 0 };
            })
            .await
            .context(|| format!("cannot read the dirty bitmap of {}", self.disks[i].label))?;
        Ok(dirty)
    }

    fn message(&self, engine: &Engine, bytes: &[u64], dry_run: bool) -> Plan {
        let mut lines = Vec::new();
        for ((disk, plan), bytes) in self.disks.iter().zip(&self.plans).zip(bytes) {
            let id = plan.parent();
            let latest = self.latest.as_ref().filter(|latest| latest.id.0 == id);
            lines.push(DiskLine {
                name: disk.label.clone(),
                uuid: plan.uuid,
                size: disk.size,
                incremental: !id.is_empty(),
                parent: parent(id).map(|id| id.0),
                parent_time_ms: latest.map(|latest| latest.time_ms),
                reason: match &plan.base {
                    Base::Full { reason } => reason.clone(),
                    Base::Incremental { .. } => String::new(),
                },
                bytes: *bytes,
            });
        }
        Plan {
            vm: self.identity.name.clone(),
            uuid: self.identity.uuid,
            host: engine.info().host.clone(),
            hypervisor: "shut off".to_owned(),
            way: "image".to_owned(),
            means: "the VM cannot start until this ends".to_owned(),
            disks: lines,
            skipped: Vec::new(),
            dry_run,
        }
    }
}

/// Carries out what the plan found necessary for bitmaps of dead runs.
async fn recover(found: &Found) -> Result<()> {
    for action in &found.recovery {
        let node = action.node();
        let Some(at) = found.disks.iter().position(|disk| disk.node == node) else { continue };
        let image = &found.images[at];
        match action {
            Action::Remove { name, .. } => image.change_bitmap(name, BitmapChange::Remove).await?,
            Action::MergeBack { from, into, .. } => merge_back(image, from, into).await?,
        }
    }
    Ok(())
}

/// The old bitmap goes on recording with what the new ones have, and they go. In an order that
/// can stop anywhere: until the old one has everything it does not record, which is the sign
/// that a merge is due, and after that a merge done again adds nothing wrong.
async fn merge_back(image: &ImageInfo, from: &[String], into: &str) -> Result<()> {
    for name in from {
        image.change_bitmap(into, BitmapChange::Merge { from: name }).await?;
    }
    image.change_bitmap(into, BitmapChange::Enable).await?;
    for name in from {
        image.change_bitmap(name, BitmapChange::Remove).await?;
    }
    Ok(())
}

/// A new bitmap in an image, until it is settled one way or the other.
struct Swap<'a> {
    image: &'a ImageInfo,
    new: String,
    old: Option<&'a str>,
    /// How it left the image; none where that cannot be told.
    left: Option<Stamp>,
}

impl<'a> Swap<'a> {
    /// Adds the new bitmap, then stops the old one: each write is in one of them at least.
    async fn make(image: &'a ImageInfo, new: String, old: Option<&'a str>) -> Result<Swap<'a>> {
        let add = BitmapChange::Add { granularity: None, enabled: true };
        image.change_bitmap(&new, add).await?;
        let mut swap = Swap { image, new, old, left: None };
        if let Err(error) = swap.complete().await {
            swap.undo().await?;
            return Err(error);
        }
        Ok(swap)
    }

    async fn complete(&mut self) -> Result<()> {
        if let Some(old) = self.old {
            self.image.change_bitmap(old, BitmapChange::Disable).await?;
        }
        self.left = self.image.stamp()?;
        Ok(())
    }

    /// Whether nobody wrote to the image since, to be asked when it is open and others are kept out:
    /// the old bitmap lacks such a write, and the snapshot would.
    ///
    /// # Errors
    /// [`Kind::Busy`]: somebody did.
    fn untouched(&self) -> Result<()> {
        if self.image.stamp()? == self.left {
            return Ok(());
        }
        let what = format!(
            "another program wrote to {} while the backup began: try again when nothing else works \
             on it",
            self.image.file.display()
        );
        Err(Error::new(Kind::Busy, what))
    }

    async fn undo(&self) -> Result<()> {
        match self.old {
            Some(old) => merge_back(self.image, std::slice::from_ref(&self.new), old).await,
            None => self.image.change_bitmap(&self.new, BitmapChange::Remove).await,
        }
    }

    async fn keep(&self) -> Result<()> {
        match self.old {
            Some(old) => self.image.change_bitmap(old, BitmapChange::Remove).await,
            None => Ok(()),
        }
    }
}

/// From the first change of a bitmap to the last.
async fn backup(
    context: &Context<'_>,
    found: &Found,
    request: &BackupRequest,
    admitted: &mut Admitted,
) -> std::result::Result<Snapshot, Failure> {
    let mut swaps = Vec::new();
    let result = match swap_all(context, found, &admitted.plan, &mut swaps).await {
        Ok(()) => read_and_commit(context, found, request, admitted, &swaps).await,
        Err(error) => Err(error.into()),
    };
    for swap in &swaps {
        let settled = match &result {
            Ok(_) => swap.keep().await,
            Err(failure) if failure.ambiguous => Ok(()),
            Err(_) => swap.undo().await,
        };
        // The next backup asks the engine what became of this one, and settles it then.
        if let Err(error) = settled {
            let name = &swap.new;
            context.report.warn(&format!("the dirty bitmap {name} is left as it is: {error}"));
        }
    }
    result
}

async fn swap_all<'a>(
    context: &Context<'_>,
    found: &'a Found,
    plan: &BackupPlan,
    swaps: &mut Vec<Swap<'a>>,
) -> Result<()> {
    for (image, decided) in found.images.iter().zip(&found.plans) {
        if image.can_keep_bitmaps() && !image.is_writable() {
            context.report.note(&format!(
                "{} cannot be written to: no new dirty bitmap begins in it",
                image.file.display()
            ));
        } else if image.can_keep_bitmaps() {
            let store = context.engine.info().store.to_string();
            let snapshot = plan.snapshot.0.clone();
            let new = BitmapName { store, snapshot, disk: decided.uuid }.to_string();
            swaps.push(Swap::make(image, new, decided.bitmap.as_deref()).await?);
        }
    }
    Ok(())
}

/// Reads the images while nobody can change them, and commits.
async fn read_and_commit(
    context: &Context<'_>,
    found: &Found,
    request: &BackupRequest,
    admitted: &mut Admitted,
    swaps: &[Swap<'_>],
) -> std::result::Result<Snapshot, Failure> {
    let Context { report, engine, stop, .. } = *context;
    stop.check()?;
    let disks = u32::try_from(found.disks.len()).unwrap_or(u32::MAX).max(1);
    let in_flight = (admitted.plan.in_flight / disks).max(super::LEAST_IN_FLIGHT);
    let opened = found.open(ConnectOptions { in_flight, ..ConnectOptions::default() }).await?;
    swaps.iter().try_for_each(Swap::untouched)?;
    let (since, time_ms) = (Instant::now(), now_ms());
    let bytes = found.all_bytes(&opened).await?;
    report.send(&found.message(engine, &bytes, false));
    report.send(&PointInTime {
        vm: found.identity.name.clone(),
        snapshot: admitted.plan.snapshot.0.clone(),
        time_ms,
        frozen_seconds: None,
        stopped_seconds: None,
    });
    let forced = found.forced.clone();
    let bitmaps = swaps.iter().map(|swap| swap.new.clone()).collect();
    let mut held = HeldImages { context, found, opened, bytes, forced, bitmaps, since, time_ms };
    let result = until_committed(context, request, &mut held, admitted).await;
    if let Err(error) = close(held.opened).await
        && result.is_ok()
    {
        report.warn(&format!("committed, but an image was not closed as it should be: {error}"));
    }
    result
}

/// Images that are open: no VM can start on them.
struct HeldImages<'a> {
    context: &'a Context<'a>,
    found: &'a Found,
    opened: Vec<OpenImage>,
    bytes: Vec<u64>,
    forced: Vec<Vec<std::ops::Range<u64>>>,
    bitmaps: Vec<String>,
    since: Instant,
    time_ms: i64,
}

impl Held for HeldImages<'_> {
    async fn attempt(&mut self, admitted: &Admitted) -> std::result::Result<Snapshot, Failure> {
        self.keep(self.read(admitted)).await?;
        self.opened.iter_mut().try_for_each(OpenImage::still_held)?;
        commit(&admitted.session, (self.time_ms, &self.bitmaps), self.context.stop).await
    }

    async fn keep<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let Context { options, stop, .. } = *self.context;
        within(options, self.since, stop.unless(work)).await
    }

    fn begin_again(&mut self, plan: &mut BackupPlan) -> Result<()> {
        self.forced = forced_again(&self.found.plans, plan)?;
        Ok(())
    }
}

impl HeldImages<'_> {
    async fn read(&self, admitted: &Admitted) -> Result<()> {
        let found = self.found;
        let mut disks = Vec::new();
        let mut total = 0;
        for (i, image) in self.opened.iter().enumerate() {
            let size = found.disks[i].size;
            let dirty_until = found.dirty(i).map(|_| size);
            total += match dirty_until {
                Some(_) => self.bytes[i],
                None => size,
            };
            let block_size = self.context.engine.info().block_size;
            let forced = self.forced[i].clone();
            let input = PlanInput { size, block_size, dirty_until, forced };
            disks.push(ScanDisk { source: Rc::new(image.disk().clone()), input });
        }
        let limit = Rc::new(ReadLimit::new(self.context.options.read_limit));
        transfer(self.context, admitted, disks, total, &limit).await
    }
}

async fn close(opened: Vec<OpenImage>) -> Result<()> {
    let mut result = Ok(());
    for image in opened {
        result = result.and(image.close().await);
    }
    result
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Command;

    use super::*;

    fn tool(program: &str, arguments: &[&str]) {
        let output = Command::new(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    }

    #[tokio::test]
    async fn a_write_between_the_swap_and_the_opening_is_noticed_and_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vda.qcow2");
        let name = file.to_str().unwrap();
        tool("qemu-img", &["create", "-q", "-f", "qcow2", name, "4M"]);
        let image = ImageInfo::read(&file, Some("qcow2")).await.unwrap();
        Swap::make(&image, "first".to_owned(), None).await.unwrap().untouched().unwrap();
        let swap = Swap::make(&image, "second".to_owned(), Some("first")).await.unwrap();
        let options = OpenOptions { bitmap: Some("first".to_owned()), ..OpenOptions::default() };
        let opened = OpenImage::open(&image, &options).await.unwrap();
        swap.untouched().unwrap();
        opened.close().await.unwrap();
        swap.untouched().unwrap();

        tool("qemu-io", &["-f", "qcow2", "-c", "write 1M 4k", name]);
        let error = swap.untouched().unwrap_err();
        assert_eq!(error.kind(), Kind::Busy, "{error}");
        assert!(error.to_string().contains("vda.qcow2"), "{error}");
        swap.undo().await.unwrap();
        let info = ImageInfo::read(&file, Some("qcow2")).await.unwrap();
        let left: Vec<_> = info.bitmaps.iter().map(|b| (b.name.as_str(), b.enabled)).collect();
        assert_eq!(left, [("first", true)]);
    }
}
