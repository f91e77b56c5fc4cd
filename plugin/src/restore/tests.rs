//! Restoring a stored disk that lives in memory.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::MetadataExt;

use super::*;
use crate::engine::{ImageExtent, SnapshotId};

const BLOCK: usize = 4096;

/// A stored disk in memory; damaged blocks fail as the engine's do.
struct Model {
    bytes: Vec<u8>,
    damaged: Vec<u64>,
}

impl Model {
    /// Every third block is data, from a generator with the seed.
    fn new(blocks: usize, tail: usize, mut seed: u64) -> Model {
        let mut bytes = vec![0; blocks * BLOCK + tail];
        for (i, block) in bytes.chunks_mut(BLOCK).enumerate() {
            for byte in block.iter_mut().filter(|_| i % 3 == 1 || i == blocks) {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (seed >> 56) as u8 | 1;
            }
        }
        Model { bytes, damaged: Vec::new() }
    }

    fn data_blocks(&self) -> Vec<(u64, &[u8])> {
        let blocks = self.bytes.chunks(BLOCK).enumerate();
        blocks
            .filter(|(_, block)| block.iter().any(|byte| *byte != 0))
            .map(|(i, block)| ((i * BLOCK) as u64, block))
            .collect()
    }
}

impl DiskImage for Model {
    async fn read(&self, offset: u64, length: u32, into: &mut Vec<u8>) -> Result<()> {
        let at = offset as usize;
        into.extend_from_slice(&self.bytes[at..at + length as usize]);
        Ok(())
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<ImageExtent>> {
        let end = (offset + length) as usize;
        let at = offset as usize;
        let stop = end.min(at + 7 * BLOCK);
        let pieces = self.bytes[at..stop].chunks(BLOCK).enumerate();
        Ok(pieces
            .map(|(i, block)| ImageExtent {
                offset: (at + i * BLOCK) as u64,
                length: block.len() as u64,
                zero: block.iter().all(|byte| *byte == 0),
            })
            .collect())
    }

    async fn stream<T: BlockTarget + 'static>(
        &self,
        target: Rc<T>,
        ordered: bool,
        damaged_zero: bool,
    ) -> Result<(u64, Vec<Range>)> {
        let mut blocks = self.data_blocks();
        if !ordered {
            blocks.reverse();
        }
        let mut holes = Vec::new();
        let mut written = 0;
        let mut waiting = Vec::new();
        for (offset, block) in blocks {
            if self.damaged.contains(&offset) {
                if !damaged_zero {
                    return Err(Error::new(Kind::Damaged, format!("damaged at {offset}")));
                }
                holes.push(Range { offset, length: block.len() as u64 });
                continue;
            }
            written += block.len() as u64;
            waiting.push((offset, block));
            if waiting.len() == 5 {
                send(&*target, &mut waiting).await?;
            }
        }
        send(&*target, &mut waiting).await?;
        Ok((written, holes))
    }
}

/// Several runs in one message, as the engine does.
async fn send(target: &impl BlockTarget, waiting: &mut Vec<(u64, &[u8])>) -> Result<()> {
    let range =
        |(offset, block): &(u64, &[u8])| Range { offset: *offset, length: block.len() as u64 };
    let runs = waiting.iter().map(range).collect();
    let bytes = waiting.drain(..).flat_map(|(_, block)| block).copied().collect();
    target.write(Scattered::new(runs, bytes)?).await
}

fn disk(model: &Model) -> Disk {
    Disk { uuid: uuid::Uuid::from_u128(1), name: "vda".into(), size: model.bytes.len() as u64 }
}

const RAW: Options = Options { format: Format::Raw, force: false, damaged_zero: false };

fn block_on<F: Future>(work: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

async fn to_file(model: &Model, path: &Path, options: Options) -> Result<(u64, Vec<Range>)> {
    let report = Report::new(true, true);
    let target = FileTarget::create(path, model.bytes.len() as u64, options.force)?;
    run(&report, model, &disk(model), target, options).await
}

#[test]
fn a_file_equals_the_disk_and_is_sparse() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vda.raw");
    let model = Model::new(1000, 1536, 7);
    let (written, holes) = block_on(to_file(&model, &path, RAW)).unwrap();
    assert!(std::fs::read(&path).unwrap() == model.bytes);
    assert_eq!(
        written,
        model.data_blocks().iter().map(|(_, block)| block.len() as u64).sum::<u64>()
    );
    assert!(holes.is_empty());
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.blocks() * 512 < metadata.size(), "{} blocks", metadata.blocks());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn damage_leaves_no_file_unless_zeros_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vda.raw");
    let mut model = Model::new(100, 0, 8);
    model.damaged = vec![4 * BLOCK as u64];
    let error = block_on(to_file(&model, &path, RAW)).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

    let rescue = Options { damaged_zero: true, ..RAW };
    let (_, holes) = block_on(to_file(&model, &path, rescue)).unwrap();
    assert_eq!(holes, [Range { offset: 4 * BLOCK as u64, length: BLOCK as u64 }]);
    model.bytes[4 * BLOCK..5 * BLOCK].fill(0);
    assert!(std::fs::read(&path).unwrap() == model.bytes);
}

#[test]
fn a_stream_has_every_byte_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    std::fs::write(&path, b"").unwrap();
    let model = Model::new(50, 512, 9);
    let target = StreamTarget::open(Some(&path), model.bytes.len() as u64).unwrap();
    let report = Report::new(true, true);
    block_on(run(&report, &model, &disk(&model), target, RAW)).unwrap();
    assert!(std::fs::read(&path).unwrap() == model.bytes);
}

#[test]
fn targets_are_refused_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("there.raw");
    std::fs::write(&file, b"precious").unwrap();
    let refused =
        |path: &Path, options| Place::check(path, options).unwrap_err().kind() == Kind::Target;
    assert!(refused(&file, RAW));
    assert!(refused(folder.path(), RAW));
    assert!(refused(&folder.path().join("no/such/folder.raw"), RAW));
    assert!(refused(Path::new("-"), Options { format: Format::Qcow2, ..RAW }));
    assert!(refused(Path::new("/dev/null"), Options { format: Format::Qcow2, ..RAW }));
    let force = Options { force: true, ..RAW };
    assert!(matches!(Place::check(&file, force), Ok(Place::File(_))));
    assert!(matches!(Place::check(Path::new("-"), RAW), Ok(Place::Stream(None))));
    assert!(matches!(Place::check(Path::new("/dev/null"), RAW), Ok(Place::Stream(Some(_)))));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let link = folder.path().join("link.raw");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    assert!(refused(&link, RAW));
    assert!(matches!(Place::check(&link, force), Ok(Place::File(_))));
}

#[test]
fn what_appeared_during_the_restore_is_overwritten_by_force_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vda.raw");
    let model = Model::new(10, 0, 10);
    let report = Report::new(true, true);
    let restored_over = |options: Options| {
        let size = model.bytes.len() as u64;
        let target = FileTarget::create(&path, size, options.force).unwrap();
        std::fs::write(&path, b"precious").unwrap();
        block_on(run(&report, &model, &disk(&model), target, options))
    };
    let error = restored_over(RAW).unwrap_err();
    assert_eq!(error.kind(), Kind::Target, "{error}");
    assert!(error.to_string().contains("add --force"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    restored_over(Options { force: true, ..RAW }).unwrap();
    assert!(std::fs::read(&path).unwrap() == model.bytes);
}

#[test]
fn labels_cannot_lead_elsewhere() {
    let mut disk = disk(&Model::new(1, 0, 1));
    assert_eq!(safe_name(&disk), "vda");
    for bad in ["../vda", "a/b", "", ".hidden", "a b\n"] {
        disk.name = bad.into();
        assert_eq!(safe_name(&disk), disk.uuid.to_string());
    }
}

#[test]
fn the_hole_list_names_the_ranges() {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("vda.raw.holes");
    let model = Model::new(1, 0, 1);
    let snapshot = Snapshot {
        id: SnapshotId("8d4x1c".into()),
        vm: uuid::Uuid::nil(),
        vm_name: "web1".into(),
        time_ms: 0,
        parent: None,
        disks: Vec::new(),
        counts: crate::engine::Counts::default(),
        host: "hv3".into(),
        duration_ms: 0,
        damaged: true,
    };
    write_holes(&list, &snapshot, &disk(&model), &[Range { offset: 8192, length: 4096 }]).unwrap();
    let text = std::fs::read_to_string(&list).unwrap();
    assert!(text.contains("web1@8d4x1c vda"), "{text}");
    assert!(text.ends_with("\n8192 4096\n"), "{text}");
}

#[tokio::test]
async fn an_image_in_use_is_not_replaced() {
    use crate::image::{ImageInfo, OpenImage, OpenOptions};
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk.raw");
    std::fs::write(&file, [0; 16 * BLOCK]).unwrap();
    let options = Options { format: Format::Raw, force: true, damaged_zero: false };
    let info = ImageInfo::read(&file, Some("raw")).await.unwrap();
    let opened = OpenImage::open(&info, &OpenOptions::default()).await.unwrap();
    let error = Place::check(&file, options).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    opened.close().await.unwrap();
    Place::check(&file, options).unwrap();
}
