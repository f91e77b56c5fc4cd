//! Deduplication is full and exact: what the store says it holds is what an independent count of
//! the images finds, even for blocks made to collide, and whatever the index says.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use qemu_tests::content::{BLOCK, mix};
use qemu_tests::fixture::snapshot_id;
use qemu_tests::process::Running;
use qemu_tests::wait::{LONG, SOON};
use qemu_tests::{Fixture, MIB, Result, image};

/// Four images of 160 MiB: duplicates inside each, and between each and the next.
fn images(folder: &Path) -> Result<Vec<PathBuf>> {
    (0..4_u64)
        .map(|number| {
            let path = folder.join(format!("image{number}.raw"));
            let ranges = [
                // The same blocks in all four, at other places.
                (number * 8 * MIB, 40 * MIB, 1),
                // The same as in the next image.
                (72 * MIB, 24 * MIB, 10 + number),
                (96 * MIB, 24 * MIB, 10 + (number + 1) % 4),
                // The image's own, twice within it.
                (120 * MIB, 12 * MIB, 20 + number),
                (140 * MIB, 12 * MIB, 20 + number),
            ];
            image::raw(&path, 160 * MIB, &ranges)?;
            Ok(path)
        })
        .collect()
}

/// Starts the backup of one image as a VM of its own.
fn start(fixture: &Fixture, name: &str, path: &Path, more: &[&str]) -> Result<Running> {
    let disk = format!("--image=vda={}", path.display());
    let mut arguments = vec!["backup", name, &disk];
    arguments.extend(more);
    Running::start(name, &mut fixture.fleece_command(&arguments)?)
}

#[test]
fn four_images_at_once_are_stored_block_by_block_once() -> Result {
    let fixture = Fixture::new()?;
    let paths = images(fixture.folder())?;
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let expected = image::distinct_blocks(&all)?;
    let mut running = Vec::new();
    for (number, path) in paths.iter().enumerate() {
        running.push(start(&fixture, &format!("vm{number}"), path, &[])?);
    }
    let mut snapshots = Vec::new();
    for (number, one) in running.into_iter().enumerate() {
        let finished = one.finish(LONG)?.code(0)?;
        assert!(finished.printed().contains("undetected 0"), "{}", finished.printed());
        snapshots.push(format!("vm{number}@{}", snapshot_id(&finished.printed())?));
    }
    assert_eq!(fixture.figure("unique_blocks")?, expected);
    for (snapshot, path) in snapshots.iter().zip(&paths) {
        image::same(path, &fixture.restore(snapshot, "vda")?)?;
    }
    // Once more: nothing is new.
    for (number, path) in paths.iter().enumerate() {
        start(&fixture, &format!("vm{number}"), path, &[])?.finish(LONG)?.code(0)?;
    }
    assert_eq!(fixture.figure("unique_blocks")?, expected);
    Ok(())
}

/// An image of blocks, each beginning with one of the files.
fn image_of(path: &Path, files: &[&str]) -> Result {
    let mut image = File::create(path)?;
    for name in files {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(name);
        let mut block = fs::read(&data)?;
        block.resize(BLOCK, 0);
        image.write_all(&block)?;
    }
    Ok(())
}

#[test]
fn blocks_whose_plain_sha1_collides_are_two_and_stay_two() -> Result {
    let fixture = Fixture::new()?;
    let files = ["shattered-a.bin", "shattered-b.bin", "shambles-a.bin", "shambles-b.bin"];
    let path = fixture.path("colliding.raw");
    image_of(&path, &files)?;
    fixture.backup_images("colliding", &[("vda", &path)])?;
    assert_eq!(fixture.figure("unique_blocks")?, 4);
    image::same(&path, &fixture.restore("colliding", "vda")?)?;

    // The second of a pair alone, in another VM: a duplicate of itself, not of its twin.
    let twin = fixture.path("twin.raw");
    image_of(&twin, &files[1..2])?;
    fixture.backup_images("twin", &[("vda", &twin)])?;
    assert_eq!(fixture.figure("unique_blocks")?, 4);
    image::same(&twin, &fixture.restore("twin", "vda")?)
}

/// The engine's local state, all files below it.
fn files_below(folder: &Path, found: &mut Vec<PathBuf>) -> Result {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files_below(&path, found)?;
        } else if path.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

#[test]
fn a_store_without_any_index_restores_and_deduplicates_again() -> Result {
    let mut fixture = Fixture::new()?;
    let paths = images(fixture.folder())?;
    let (first, _) = fixture.backup_images("vm0", &[("vda", &paths[0])])?;
    fixture.stop_engine()?;
    fs::remove_dir_all(fixture.path("state"))?;
    fixture.start_engine()?;
    image::same(&paths[0], &fixture.restore(&format!("vm0@{first}"), "vda")?)?;
    fixture.fleecectl(&["rebuild-index"])?;
    let (second, _) = fixture.backup_images("vm1", &[("vda", &paths[1])])?;
    image::same(&paths[1], &fixture.restore(&format!("vm1@{second}"), "vda")?)?;
    let expected = image::distinct_blocks(&[&paths[0], &paths[1]])?;
    assert_eq!(fixture.figure("unique_blocks")?, expected);
    Ok(())
}

/// Entries of each partition: exact where nothing is left in memory.
fn partitions(fixture: &Fixture) -> Result<Vec<u64>> {
    let lines = fixture.fleecectl(&["partitions", "--json"])?.json()?;
    lines.iter().map(|line| line["of"]["entries"].as_u64().context("no entries")).collect()
}

#[test]
fn an_index_that_lost_everything_is_rebuilt_partition_by_partition_while_backups_go_on() -> Result {
    let mut fixture = Fixture::new()?;
    let paths = images(fixture.folder())?;
    let expected = image::distinct_blocks(&[&paths[0]])?;
    let (first, _) = fixture.backup_images("vm0", &[("vda", &paths[0])])?;
    fixture.fleecectl(&["rebuild-index"])?;
    let before = partitions(&fixture)?;
    assert_eq!(before.iter().sum::<u64>(), expected);

    // An index that is refilled while the store's containers are away has read all journals, and nothing.
    fixture.stop_engine()?;
    fs::remove_dir_all(fixture.state().join("index"))?;
    let (containers, away) = (fixture.store().join("containers"), fixture.path("away"));
    fs::rename(&containers, &away)?;
    fixture.start_engine()?;
    fixture.stop_engine()?;
    fs::remove_dir_all(&containers).or_else(|error| match error.kind() {
        ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })?;
    fs::rename(&away, &containers)?;
    fixture.start_engine()?;
    assert_eq!(fixture.figure("unique_blocks")?, 0);

    let refused = fixture.try_fleecectl(&["rebuild-index", "--partition", "16"])?.code(2)?;
    assert!(refused.printed().contains("0 to 15"), "{}", refused.printed());
    fixture.try_fleecectl(&["rebuild-index", "--partition", "three"])?.code(2)?;
    fixture.fleecectl(&["rebuild-index", "--partition", "3"])?;
    let only: Vec<u64> = (0..16).map(|p| if p == 3 { before[p] } else { 0 }).collect();
    assert_eq!(partitions(&fixture)?, only);

    // What is backed up meanwhile has nothing in common with it, so that it is exact whatever comes first.
    let other = fixture.path("other.raw");
    image::raw(&other, 160 * MIB, &[(0, 150 * MIB, 99)])?;
    let running = start(&fixture, "other", &other, &[])?;
    let rebuild = |fixture: &Fixture| {
        (0..16).try_for_each(|p| {
            fixture.fleecectl(&["rebuild-index", "--partition", &p.to_string()]).map(drop)
        })
    };
    rebuild(&fixture)?;
    running.finish(LONG)?.code(0)?;
    // What was learned and read at once counts twice until it is merged, or rebuilt.
    rebuild(&fixture)?;
    let expected = image::distinct_blocks(&[&paths[0], &other])?;
    assert_eq!(fixture.figure("unique_blocks")?, expected);
    assert_eq!(fixture.figure("double_blocks")?, 0);
    for (vm, path) in [("again", &paths[0]), ("other-again", &other)] {
        let (id, finished) = fixture.backup_images(vm, &[("vda", path)])?;
        assert!(finished.printed().contains("new 0 B"), "{}", finished.printed());
        image::same(path, &fixture.restore(&format!("{vm}@{id}"), "vda")?)?;
    }
    image::same(&paths[0], &fixture.restore(&format!("vm0@{first}"), "vda")?)
}

#[test]
fn flipped_bits_in_the_index_waste_space_at_most() -> Result {
    let mut fixture = Fixture::new()?;
    let paths = images(fixture.folder())?;
    fixture.backup_images("vm0", &[("vda", &paths[0])])?;
    fixture.stop_engine()?;
    let mut shards = Vec::new();
    files_below(&fixture.path("state"), &mut shards)?;
    shards.retain(|path| path.extension().is_some_and(|extension| extension == "mdb"));
    let mut flipped = 0;
    for shard in &shards {
        let mut bytes = fs::read(shard)?;
        // Every 512 bytes one bit, past LMDB's two meta pages.
        for place in (2 * BLOCK..bytes.len()).step_by(512) {
            let place = place + (mix(place as u64) % 512) as usize;
            if let Some(byte) = bytes.get_mut(place) {
                *byte ^= 1 << (place % 8);
                flipped += 1;
            }
        }
        fs::write(shard, bytes)?;
    }
    // With LMDB's own page headers hit as well, opening may fail: then the shard is rebuilt.
    println!("{flipped} bits flipped in {} files", shards.len());
    fixture.start_engine()?;
    for number in [0, 1] {
        let (id, _) = fixture.backup_images(&format!("vm{number}"), &[("vda", &paths[number])])?;
        image::same(&paths[number], &fixture.restore(&format!("vm{number}@{id}"), "vda")?)?;
    }
    fixture.fleecectl(&["rebuild-index"])?;
    Ok(())
}

#[test]
fn one_flipped_bit_in_a_container_is_found_and_named() -> Result {
    let mut fixture = Fixture::new()?;
    fixture.leave_damaged();
    let path = fixture.path("one.raw");
    image::raw(&path, 24 * MIB, &[(0, 20 * MIB, 1)])?;
    fixture.backup_images("one", &[("vda", &path)])?;
    fixture.stop_engine()?;
    let mut objects = Vec::new();
    files_below(&fixture.path("store"), &mut objects)?;
    let largest = objects.iter().max_by_key(|path| fs::metadata(path).map_or(0, |data| data.len()));
    let largest = largest.expect("objects");
    let mut bytes = fs::read(largest)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let mut permissions = fs::metadata(largest)?.permissions();
    #[allow(clippy::permissions_set_readonly_false)]
    permissions.set_readonly(false);
    fs::set_permissions(largest, permissions)?;
    fs::write(largest, bytes)?;
    fixture.start_engine()?;

    let found = fixture.try_fleecectl(&["verify"])?.code(16)?;
    assert!(found.printed().contains("one"), "the VM is named: {}", found.printed());
    let to = fixture.text("out.raw");
    fixture.try_fleece(&["restore", "one", "--to", &to])?.code(16)?;
    let rescued = fixture
        .try_fleece(&["restore", "one", "--to", &to, "--force", "--damaged=zero"])?
        .code(3)?;
    assert!(!rescued.printed().trim().is_empty());

    // The next session of this VM heals what is damaged.
    fixture.backup_images("one", &[("vda", &path)])?;
    image::same(&path, &fixture.restore("one", "vda")?)
}

#[test]
fn an_engine_that_starts_twice_on_one_state_is_refused() -> Result {
    let mut fixture = Fixture::new()?;
    let (config, state) = (fixture.text("engine.toml"), fixture.text("state"));
    let other = fixture.text("other.sock");
    let mut command = qemu_tests::tools::fleece("fleece-engine")?;
    command.args(["--config", &config, "--state-dir", &state, "--socket", &other]);
    Running::start("second engine", &mut command)?.finish(SOON)?.code(11)?;
    fixture.engine()?;
    Ok(())
}
