//! Two backups that hold the same blocks: in crossed order, with a writer that dies, with one
//! that is silent, with an engine that goes away. Every session ends, nothing is lost.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use qemu_tests::content::{BLOCK, block};
use qemu_tests::fixture::snapshot_id;
use qemu_tests::process::Running;
use qemu_tests::scenario::POINT_IN_TIME;
use qemu_tests::wait::{LONG, SOON, wait_until};
use qemu_tests::{Fixture, MIB, Result, image};
use rustix::process::Signal;

/// How many blocks the images have.
const BLOCKS: u64 = 48 * MIB / BLOCK as u64;

/// Two images of the same blocks, the second in reverse order.
fn crossed(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let (forth, back) = (folder.join("forth.raw"), folder.join("back.raw"));
    image::raw(&forth, 48 * MIB, &[(0, 48 * MIB, 1)])?;
    let file = File::create(&back)?;
    for index in 0..BLOCKS {
        file.write_all_at(&block(1, BLOCKS - 1 - index), index * BLOCK as u64)?;
    }
    Ok((forth, back))
}

fn start(fixture: &Fixture, name: &str, path: &Path, more: &[&str]) -> Result<Running> {
    let disk = format!("--image=vda={}", path.display());
    let mut arguments = vec!["backup", name, &disk];
    arguments.extend(more);
    Running::start(name, &mut fixture.fleece_command(&arguments)?)
}

fn restores(fixture: &Fixture, name: &str, path: &Path, running: Running) -> Result {
    let finished = running.finish(LONG)?.code(0)?;
    let snapshot = format!("{name}@{}", snapshot_id(&finished.printed())?);
    image::same(path, &fixture.restore(&snapshot, "vda")?)
}

/// Waits until the engine knows of `count` sessions.
fn sessions(fixture: &Fixture, count: usize) -> Result {
    wait_until(SOON, "the engine listing the sessions", || {
        let listed = fixture.fleecectl(&["sessions", "--json"])?.json()?;
        Ok(listed.iter().filter(|one| one.to_string().contains("snapshot")).count() >= count)
    })
}

#[test]
fn crossed_orders_end_and_store_every_block_once() -> Result {
    let fixture = Fixture::new()?;
    let (forth, back) = crossed(fixture.folder())?;
    for round in 0..3 {
        let (a, b) = (format!("forth{round}"), format!("back{round}"));
        let first = start(&fixture, &a, &forth, &[])?;
        let second = start(&fixture, &b, &back, &[])?;
        restores(&fixture, &a, &forth, first)?;
        restores(&fixture, &b, &back, second)?;
        assert_eq!(fixture.figure("unique_blocks")?, BLOCKS, "round {round}");
    }
    Ok(())
}

#[test]
fn a_writer_that_dies_leaves_its_blocks_to_the_other() -> Result {
    let fixture = Fixture::new()?;
    let (forth, back) = crossed(fixture.folder())?;
    let first = start(&fixture, "forth", &forth, &["--read-limit", "16M"])?;
    sessions(&fixture, 1)?;
    let second = start(&fixture, "back", &back, &["--read-limit", "16M"])?;
    sessions(&fixture, 2)?;
    first.kill()?;
    restores(&fixture, "back", &back, second)?;
    assert_eq!(fixture.figure("unique_blocks")?, BLOCKS);
    let again = start(&fixture, "forth", &forth, &[])?;
    restores(&fixture, "forth", &forth, again)?;
    assert_eq!(fixture.figure("unique_blocks")?, BLOCKS);
    Ok(())
}

#[test]
fn a_silent_writer_is_not_waited_for() -> Result {
    let fixture = Fixture::new()?;
    let (forth, back) = crossed(fixture.folder())?;
    let first = start(&fixture, "forth", &forth, &["--read-limit", "16M"])?;
    sessions(&fixture, 1)?;
    let second = start(&fixture, "back", &back, &["--read-limit", "16M"])?;
    sessions(&fixture, 2)?;
    first.signal(Signal::STOP)?;
    restores(&fixture, "back", &back, second)?;
    first.signal(Signal::CONT)?;
    restores(&fixture, "forth", &forth, first)?;
    assert_eq!(
        fixture.figure("unique_blocks")?,
        BLOCKS,
        "counted by fingerprint, however often stored"
    );
    Ok(())
}

#[test]
fn an_engine_that_dies_under_two_sessions_loses_nothing() -> Result {
    let mut fixture = Fixture::new()?;
    let (forth, back) = crossed(fixture.folder())?;
    let mut first = start(&fixture, "forth", &forth, &["--read-limit", "8M"])?;
    let mut second = start(&fixture, "back", &back, &["--read-limit", "8M"])?;
    for one in [&mut first, &mut second] {
        one.wait_printed(SOON, POINT_IN_TIME)?;
    }
    fixture.kill_engine()?;
    fixture.start_engine()?;
    // Both go on in the next one.
    restores(&fixture, "forth", &forth, first)?;
    restores(&fixture, "back", &back, second)?;
    assert_eq!(fixture.figure("unique_blocks")?, BLOCKS);
    Ok(())
}

#[test]
fn two_backups_of_one_vm_at_once_are_refused() -> Result {
    let fixture = Fixture::new()?;
    let (forth, _) = crossed(fixture.folder())?;
    let first = start(&fixture, "same", &forth, &["--read-limit", "4M"])?;
    sessions(&fixture, 1)?;
    start(&fixture, "same", &forth, &[])?.finish(LONG)?.code(11)?;
    first.signal(Signal::INT)?;
    first.finish(LONG)?.code(130)?;
    let again = start(&fixture, "same", &forth, &[])?;
    restores(&fixture, "same", &forth, again)
}
