//! Shut-off images: qcow2 with bitmaps, raw files with holes, images in use; and the scan
//! over them from map to work.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod nbd_support;

use std::path::Path;
use std::process::{Command, Stdio};

use bytes::Bytes;
use fleece::error::Kind;
use fleece::extents::{Action, PlanInput};
use fleece::image::{BitmapChange, ImageInfo, OpenImage, OpenOptions};
use fleece::nbd::ConnectOptions;
use fleece::source::{DiskSource, Scan};
use nbd_support::*;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

/// What a scan says of every block, checked against the truth: zero means zeros.
async fn scan(image: &OpenImage, dirty_until: Option<u64>, truth: &[u8]) -> Vec<Option<Action>> {
    let disk = image.disk();
    assert_eq!(disk.size(), truth.len() as u64);
    let input =
        PlanInput { size: disk.size(), block_size: BLOCK as u32, dirty_until, forced: Vec::new() };
    let mut blocks = vec![None; disk.size().div_ceil(BLOCK) as usize];
    let mut work = Scan::new(disk, input).unwrap();
    while let Some(item) = work.next().await.unwrap() {
        for number in item.first_block..item.first_block + u64::from(item.blocks) {
            let start = number * BLOCK;
            let end = (start + BLOCK).min(disk.size());
            let expect = &truth[start as usize..end as usize];
            match item.action {
                Action::Zero => assert!(expect.iter().all(|b| *b == 0), "block {number}"),
                Action::Read => {
                    let got = disk.read(start, (end - start) as u32).await.unwrap();
                    assert!(got[..] == *expect, "block {number}");
                }
            }
            blocks[number as usize] = Some(item.action);
        }
    }
    blocks
}

fn count(blocks: &[Option<Action>], action: Option<Action>) -> u64 {
    blocks.iter().filter(|block| **block == action).count() as u64
}

async fn open(file: &Path, format: Option<&str>, bitmap: Option<&str>) -> OpenImage {
    let info = ImageInfo::read(file, format).await.unwrap();
    let options = OpenOptions { bitmap: bitmap.map(str::to_owned), ..OpenOptions::default() };
    OpenImage::open(&info, &options).await.unwrap()
}

#[test]
fn a_sparse_raw_file() {
    let place = Place::new();
    let file = place.path("disk.raw");
    let size = 50 * MIB + 700;
    let truth = sparse_file(&file, size, &[(5 * MIB, 10_000, 1), (40 * MIB, MIB as usize, 2)]);
    run(async {
        let image = open(&file, Some("raw"), None).await;
        // qemu-nbd reports a raw file in sectors: the size is rounded up.
        let mut truth = truth;
        truth.resize(size.next_multiple_of(512) as usize, 0);
        let blocks = scan(&image, None, &truth).await;
        assert_eq!(count(&blocks, None), 0);
        // Holes are not read.
        assert!(count(&blocks, Some(Action::Read)) <= 3 + 256 + 1);
        image.close().await.unwrap();
    });
}

#[test]
fn the_chain_of_a_shut_off_qcow2() {
    let place = Place::new();
    let file = place.path("disk.qcow2");
    let name = file.to_str().unwrap().to_owned();
    let base = place.path("base.raw");
    let mut truth = sparse_file(&base, 32 * MIB, &[(0, 300_000, 3), (20 * MIB, 900_000, 4)]);
    tool("qemu-img", &["convert", "-O", "qcow2", base.to_str().unwrap(), &name]);
    let add = BitmapChange::Add { granularity: Some(65536), enabled: true };
    run(async {
        let info = ImageInfo::read(&file, None).await.unwrap();
        assert_eq!((info.format.as_str(), info.size), ("qcow2", 32 * MIB));
        assert!(info.can_keep_bitmaps() && info.bitmaps.is_empty() && info.backing.is_none());
        info.change_bitmap("fleece:s:1:d", add).await.unwrap();
        // A write, a write of zeros, a write.
        for (start, length, pattern) in [(MIB, 4096, 7), (20 * MIB, 65536, 0), (31 * MIB, MIB, 8)] {
            let verb = if pattern == 0 { "write -z" } else { "write -P" };
            let pattern_arg = if pattern == 0 { String::new() } else { format!("{pattern} ") };
            let command = format!("{verb} {pattern_arg}{start} {length}");
            tool("qemu-io", &["-f", "qcow2", "-c", &command, &name]);
            truth[start as usize..(start + length) as usize].fill(pattern);
        }
        // The next point in time: new bitmap first, then the old one is frozen.
        info.change_bitmap("fleece:s:2:d", add).await.unwrap();
        info.change_bitmap("fleece:s:1:d", BitmapChange::Disable).await.unwrap();
        let info = ImageInfo::read(&file, Some("qcow2")).await.unwrap();
        let old = info.bitmap("fleece:s:1:d").unwrap();
        assert_eq!((old.enabled, old.in_use, old.granularity), (false, false, 65536));
        assert!(info.bitmap("fleece:s:2:d").unwrap().enabled);

        let image = open(&file, Some("qcow2"), Some("fleece:s:1:d")).await;
        let blocks = scan(&image, Some(32 * MIB), &truth).await;
        let blocks_of = |bytes: u64| bytes / BLOCK;
        assert_eq!(count(&blocks, None), blocks_of(31 * MIB - 2 * 65536));
        // Around the 4 KiB written some of the dirty 64 KiB may be known to be zeros.
        assert!(count(&blocks, Some(Action::Zero)) >= blocks_of(65536));
        assert!(count(&blocks, Some(Action::Read)) >= blocks_of(4096 + MIB));
        // While it is open nobody changes it.
        let busy = info.change_bitmap("fleece:s:1:d", BitmapChange::Remove).await.unwrap_err();
        assert_eq!(busy.kind(), Kind::Busy, "{busy}");
        image.close().await.unwrap();

        // Failed: merge back, forget the new one. Then everything is still known to be dirty.
        info.change_bitmap("fleece:s:1:d", BitmapChange::Enable).await.unwrap();
        let merge = BitmapChange::Merge { from: "fleece:s:2:d" };
        info.change_bitmap("fleece:s:1:d", merge).await.unwrap();
        info.change_bitmap("fleece:s:2:d", BitmapChange::Remove).await.unwrap();
        let image = open(&file, None, Some("fleece:s:1:d")).await;
        let again = scan(&image, Some(32 * MIB), &truth).await;
        // (Which of them are zeros may have changed: the file system finds holes late.)
        assert!(again.iter().zip(&blocks).all(|(a, b)| a.is_some() == b.is_some()));
        image.close().await.unwrap();
    });
}

#[test]
fn what_cannot_be_opened_says_why() {
    let place = Place::new();
    let file = place.path("disk.qcow2");
    tool("qemu-img", &["create", "-f", "qcow2", file.to_str().unwrap(), "4M"]);
    run(async {
        let gone = ImageInfo::read(&place.path("gone"), None).await.unwrap_err();
        assert_eq!(gone.kind(), Kind::NotFound, "{gone}");
        let text = place.path("text");
        std::fs::write(&text, "no image").unwrap();
        let wrong = ImageInfo::read(&text, Some("qcow2")).await.unwrap_err();
        assert!(wrong.to_string().contains("text"), "{wrong}");
        // A guest wrote a qcow2 header into its raw disk: the given format holds.
        let raw = ImageInfo::read(&file, Some("raw")).await.unwrap();
        assert_eq!(raw.format, "raw");
        assert!(raw.size < MIB);

        let info = ImageInfo::read(&file, None).await.unwrap();
        let options = OpenOptions { bitmap: Some("none".into()), ..OpenOptions::default() };
        let missing = OpenImage::open(&info, &options).await.unwrap_err();
        assert!(missing.to_string().contains("none"), "{missing}");

        // In use by a writer, as by a running VM.
        let other = Place::new();
        let _writer = other.qemu_nbd(&["-f", "qcow2", file.to_str().unwrap()]);
        let busy = OpenImage::open(&info, &OpenOptions::default()).await.unwrap_err();
        assert_eq!(busy.kind(), Kind::Busy, "{busy}");
        assert!(busy.to_string().contains("in use"), "{busy}");
        // Looking is still possible.
        assert_eq!(ImageInfo::read(&file, None).await.unwrap().size, 4 * MIB);
    });
}

#[test]
fn writes_reach_the_image() {
    let place = Place::new();
    let file = place.path("disk.qcow2");
    tool("qemu-img", &["create", "-f", "qcow2", file.to_str().unwrap(), "16M"]);
    let data = noise(6, 256 * 1024);
    run(async {
        let info = ImageInfo::read(&file, Some("qcow2")).await.unwrap();
        let options = OpenOptions { writable: true, ..OpenOptions::default() };
        let image = OpenImage::open(&info, &options).await.unwrap();
        let export = image.export();
        export.write(3 * MIB, Bytes::from(data.clone())).await.unwrap();
        export.flush().await.unwrap();
        image.close().await.unwrap();
    });
    let raw = place.path("raw");
    let (image, raw_name) = (file.to_str().unwrap(), raw.to_str().unwrap());
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, raw_name]);
    let mut truth = vec![0; 16 * MIB as usize];
    truth[3 * MIB as usize..][..data.len()].copy_from_slice(&data);
    assert!(std::fs::read(raw).unwrap() == truth);
}

/// Run by the test below as a process of its own, to be killed; nothing to do otherwise.
#[test]
fn hold_an_image_open() {
    let Some(file) = std::env::var_os("FLEECE_TEST_IMAGE") else { return };
    run(async {
        let _image = open(Path::new(&file), Some("qcow2"), None).await;
        println!("open");
        std::future::pending::<()>().await;
    });
}

#[test]
fn no_server_outlives_us() {
    let place = Place::new();
    let file = place.path("disk.qcow2");
    let name = file.to_str().unwrap();
    tool("qemu-img", &["create", "-f", "qcow2", name, "4M"]);
    let myself = std::env::current_exe().unwrap();
    let mut child = Running(
        Command::new(myself)
            .args(["--exact", "--nocapture", "hold_an_image_open"])
            .env("FLEECE_TEST_IMAGE", &file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let out = child.0.stdout.take().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(out));
    assert!(lines.any(|line| line.unwrap().contains("open")));
    // Taken: a writer gets no lock. After kill -9 of our process it does.
    let writable = || tool_unchecked("qemu-io", &["-f", "qcow2", "-c", "write 0 512", name]);
    assert!(!writable().status.success());
    child.0.kill().unwrap();
    wait_for("the image is free", || writable().status.success());
}

#[test]
fn throughput_beside_nbdcopy() {
    // A number to look at (`--nocapture`), not a limit: machines differ. 256 MiB keeps it short;
    // FLEECE_TEST_MIB sets another size.
    let mib: u64 =
        std::env::var("FLEECE_TEST_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(256);
    let place = Place::new();
    let file = place.path("disk.qcow2");
    let name = file.to_str().unwrap().to_owned();
    let size = mib * MIB;
    tool("qemu-img", &["create", "-f", "qcow2", &name, &format!("{mib}M")]);
    for start in (0..mib).step_by(128) {
        let fill = format!("write -P 170 {start}M {}M", (mib - start).min(128));
        tool("qemu-io", &["-f", "qcow2", "-c", &fill, &name]);
    }
    let _server = place.qemu_nbd(&["-r", "-f", "qcow2", "-e", "8", &name]);
    let uri = place.uri("vda");
    tool("nbdcopy", &[&uri, "null:"]);
    let rate = |begin: std::time::Instant| (mib as f64 / begin.elapsed().as_secs_f64()) as u64;
    for _ in 0..3 {
        let begin = std::time::Instant::now();
        tool("nbdcopy", &["--connections=4", "--requests=4", "--no-extents", &uri, "null:"]);
        let theirs = rate(begin);
        let ours = run(async {
            use futures::stream::{StreamExt, TryStreamExt};
            let options = ConnectOptions::default();
            let export =
                fleece::nbd::Export::connect(&place.target("vda"), &options).await.unwrap();
            let begin = std::time::Instant::now();
            let reads = (0..size / (256 << 10)).map(|i| export.read(i * (256 << 10), 256 << 10));
            let mut reads = futures::stream::iter(reads).buffered(16);
            while let Some(buffer) = reads.try_next().await.unwrap() {
                assert_eq!(buffer[0], 170);
            }
            rate(begin)
        });
        println!("{mib} MiB from qemu-nbd: nbdcopy {theirs} MiB/s, we {ours} MiB/s");
    }
}

#[test]
fn what_cannot_keep_track_is_known() {
    let place = Place::new();
    let made = |name: &str, with: String| {
        let file = place.path(name);
        tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", &with, file.to_str().unwrap(), "1M"],
        );
        run(async { ImageInfo::read(&file, None).await.unwrap() })
    };
    let old = made("old.qcow2", "compat=0.10".to_owned());
    assert!(old.old_version && !old.can_keep_bitmaps() && !old.external_data);
    let data = place.path("data.raw");
    let outside = made("outside.qcow2", format!("data_file={}", data.display()));
    assert!(outside.external_data && !outside.old_version);
    let plain = made("plain.qcow2", "compat=1.1".to_owned());
    assert!(plain.can_keep_bitmaps() && plain.is_writable() && !plain.external_data);
}
