//! Damage in the store is found and named, never restored, read again by the next backup though
//! the bitmap is clean, and healed for the old snapshots, too.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qemu_tests::{Fixture, MIB, Result, image};

/// The largest container of the store: it holds blocks.
fn largest_container(fixture: &Fixture) -> Result<PathBuf> {
    let mut largest = None;
    for folder in fs::read_dir(fixture.path("store/containers"))? {
        for file in fs::read_dir(folder?.path())? {
            let file = file?;
            largest = largest.max(Some((file.metadata()?.len(), file.path())));
        }
    }
    Ok(largest.context("no container")?.1)
}

fn flip(path: &Path, at: usize) -> Result {
    let mut bytes = fs::read(path)?;
    bytes[at] ^= 4;
    Ok(fs::write(path, bytes)?)
}

/// A shut-off VM of 12 MiB of data, with its truth.
fn filled(fixture: &Fixture) -> Result<(PathBuf, PathBuf)> {
    let (truth, path) = (fixture.path("web.raw"), fixture.path("web.qcow2"));
    image::raw(&truth, 64 * MIB, &[(MIB, 12 * MIB, 1)])?;
    image::convert(&truth, "raw", &path, "qcow2")?;
    Ok((truth, path))
}

#[test]
fn a_flipped_bit_is_named_refused_read_again_and_repaired() -> Result {
    named_refused_read_again_and_repaired(|container| flip(container, 500_000))
}

#[test]
fn a_missing_container_is_named_refused_read_again_and_repaired() -> Result {
    named_refused_read_again_and_repaired(|container| Ok(fs::remove_file(container)?))
}

fn named_refused_read_again_and_repaired(harm: impl Fn(&Path) -> Result) -> Result {
    let mut fixture = Fixture::new()?;
    let (truth, path) = filled(&fixture)?;
    let (old, _) = fixture.backup_images("web", &[("vda", &path)])?;
    fixture.stop_engine()?;
    harm(&largest_container(&fixture)?)?;
    fixture.start_engine()?;

    let refused = |snapshot: &str| -> Result {
        let (name, to) = (format!("web@{snapshot}"), fixture.text("refused.raw"));
        let arguments = ["restore", &name, "--to", &to, "-O", "raw", "--force"];
        fixture.try_fleece(&arguments)?.code(16)?;
        Ok(())
    };
    refused(&old)?;
    let found = fixture.try_fleecectl(&["verify"])?.code(16)?;
    ensure!(found.out.contains(&old), "verify does not name {old}: {}", found.out);
    ensure!(found.out.contains("container "), "verify names no container: {}", found.out);
    ensure!(fixture.figure("damaged_blocks")? > 0, "status knows of no damage");
    // Without a good copy nothing can be done, and the snapshot is named.
    let lost = fixture.try_fleecectl(&["repair"])?.code(16)?;
    ensure!(lost.out.contains(&old), "repair does not name {old}: {}", lost.out);

    // Nothing was written since, and yet the lost ranges are read again.
    let (new, printed) = fixture.backup_images("web", &[("vda", &path)])?;
    ensure!(printed.printed().contains("incremental since"), "{}", printed.printed());
    image::same(&truth, &fixture.restore(&format!("web@{new}"), "vda")?)?;
    refused(&old)?;

    fixture.fleecectl(&["repair", "--dry-run"])?;
    refused(&old)?;
    let repaired = fixture.fleecectl(&["repair", "--json"])?.json()?;
    let summary = repaired.last().context("repair printed nothing")?;
    ensure!(summary["message_type"] == "summary", "{summary}");
    ensure!(summary["rewritten_containers"] == 1, "{summary}");
    image::same(&truth, &fixture.restore(&format!("web@{old}"), "vda")?)?;
    image::same(&truth, &fixture.restore(&format!("web@{new}"), "vda")?)?;
    fixture.verify()?;
    ensure!(fixture.figure("damaged_blocks")? == 0, "damage is remembered");
    // An engine that starts now knows it from the store alone.
    fixture.kill_engine()?;
    fixture.start_engine()?;
    image::same(&truth, &fixture.restore(&format!("web@{old}"), "vda")?)
}

#[test]
fn a_damaged_store_header_is_a_clear_refusal() -> Result {
    let mut fixture = Fixture::new()?;
    let (truth, path) = filled(&fixture)?;
    let (id, _) = fixture.backup_images("web", &[("vda", &path)])?;
    fixture.stop_engine()?;
    let header = fixture.path("store/store");
    let pristine = fs::read(&header)?;
    flip(&header, 120)?;
    let error = fixture.start_engine().err().context("an engine began on a damaged store")?;
    ensure!(format!("{error:#}").contains("damaged"), "{error:#}");
    fs::write(&header, &pristine[..60])?;
    let error = fixture.start_engine().err().context("an engine began on half a header")?;
    ensure!(format!("{error:#}").contains("damaged"), "{error:#}");
    fs::remove_file(&header)?;
    let error = fixture.start_engine().err().context("an engine began without a store")?;
    ensure!(format!("{error:#}").contains("store"), "{error:#}");
    fs::write(&header, pristine)?;
    fixture.start_engine()?;
    image::same(&truth, &fixture.restore(&format!("web@{id}"), "vda")?)
}
