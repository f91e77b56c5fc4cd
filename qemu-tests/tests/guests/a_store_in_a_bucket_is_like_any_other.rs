//! A store behind S3, with a policy as README has it: live and shut-off VMs, answers that are lost, a server
//! that goes and comes back, what is refused, and a keeper that takes away what nobody needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use qemu_tests::fixture::{Places, snapshot_id};
use qemu_tests::s3::{BUCKET, LossyWire, Policy, S3};
use qemu_tests::wait::{LONG, SOON, wait_until};
use qemu_tests::{Fixture, MIB, Machine, Result, image, take};

/// A server, the wire to it, and what goes through both.
struct Behind {
    fixture: Fixture,
    server: S3,
    wire: LossyWire,
    _home: tempfile::TempDir,
}

fn places(home: &Path, wire: &LossyWire, bucket: &str) -> Result<Places> {
    let credentials = home.join("credentials.toml");
    if !credentials.exists() {
        S3::write_credentials(&credentials)?;
    }
    let init = [
        "--s3-endpoint".to_owned(),
        format!("http://{}", wire.address()),
        "--s3-region".to_owned(),
        "us-east-1".to_owned(),
        "--s3-credentials".to_owned(),
        credentials.display().to_string(),
    ];
    let store = Some(PathBuf::from(format!("s3://{bucket}/cluster one")));
    Ok(Places { store, init: init.into(), ..Places::default() })
}

impl Behind {
    fn new() -> Result<Self> {
        let home = tempfile::Builder::new().prefix("fleece-s3").tempdir()?;
        let server = S3::start(&home.path().join("s3"))?;
        let wire = LossyWire::to(server.address(), Policy::Host)?;
        let mut fixture = Fixture::at(places(home.path(), &wire, BUCKET)?)?;
        fixture.start_engine()?;
        Ok(Behind { fixture, server, wire, _home: home })
    }

    /// Every object, by its name.
    fn objects(&self) -> Result<Vec<PathBuf>> {
        let (mut found, mut folders) = (Vec::new(), vec![self.server.bucket().join("cluster one")]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else {
                    found.push(entry.path());
                }
            }
        }
        Ok(found)
    }
}

#[test]
fn a_live_guest_is_backed_up_incrementally_and_restored() -> Result {
    let behind = Behind::new()?;
    let fixture = &behind.fixture;
    let machine = Machine::new(fixture.folder(), "live")?.with_disk("qcow2", 64 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {} 1", 8 * MIB, 24 * MIB))?;
    let first = take(fixture, &machine, &mut guest, "full")?;
    guest.obey(&format!("write vda {} {} 2", 20 * MIB, 4 * MIB))?;
    let second = take(fixture, &machine, &mut guest, "increment")?;
    assert!(second.printed.printed().contains("incremental"), "{}", second.printed.printed());
    assert!(fixture.bytes_read("live")? < 16 * MIB);
    first.restores_exactly(fixture)?;
    second.restores_exactly(fixture)?;
    let unique = fixture.figure("unique_blocks")?;
    let truths: Vec<&Path> = [&first, &second].map(|taken| &*taken.truths[0].1).into();
    assert_eq!(unique, image::distinct_blocks(&truths)?);
    fixture.verify()?;
    assert_eq!(behind.wire.refused(), 0, "a host asked for more than to create and to read");
    Ok(())
}

#[test]
fn a_keeper_takes_away_what_nobody_needs_and_hosts_may_not() -> Result {
    let mut behind = Behind::new()?;
    let path = behind.fixture.path("image.raw");
    image::raw(&path, 48 * MIB, &[(0, 24 * MIB, 1)])?;
    let (id, _) = behind.fixture.backup_images("vm", &[("vda", &path)])?;
    let manifest = behind
        .objects()?
        .into_iter()
        .find(|object| object.components().any(|folder| folder.as_os_str() == "manifests"));
    let manifest = manifest.context("no manifest")?;
    let mut bytes = fs::read(&manifest)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&manifest, &bytes)?;
    behind.fixture.try_fleecectl(&["verify"])?.code(16)?;
    // A host cannot: neither does it ask for it, nor would it get it.
    let named = manifest.file_name().and_then(|name| name.to_str()).context("no name")?;
    let planned = behind.fixture.fleecectl(&["tidy", "--dry-run"])?.printed();
    ensure!(planned.contains(named) && planned.contains("\n1 objects would"), "{planned}");
    let told = behind.fixture.try_fleecectl(&["tidy"])?.code(17)?.printed();
    ensure!(told.contains("role = \"keeper\""), "{told}");
    ensure!(behind.wire.refused() == 0, "a host asked for more than to create and to read");
    let config = behind.fixture.path("engine.toml");
    let host = fs::read_to_string(&config)?;
    fs::write(&config, format!("role = \"keeper\"\n{host}"))?;
    behind.fixture.stop_engine()?;
    behind.fixture.start_engine()?;
    let refused = behind.fixture.try_fleecectl(&["tidy"])?.code(17)?.printed();
    ensure!(refused.contains(named) && behind.wire.refused() > 0, "{refused}");
    ensure!(fs::read(&manifest)? == bytes, "the policy was passed by");
    // One with rights of its own can.
    let rights = LossyWire::to(behind.server.address(), Policy::Keeper)?;
    let text = fs::read_to_string(&config)?;
    let [ours, theirs] = [behind.wire.address(), rights.address()].map(|at| at.to_string());
    ensure!(text.contains(&ours), "{text}");
    fs::write(&config, text.replace(&ours, &theirs))?;
    behind.fixture.stop_engine()?;
    behind.fixture.start_engine()?;
    let done = behind.fixture.fleecectl(&["tidy", "--json"])?.json()?;
    let summary = done.last().context("nothing was said")?;
    ensure!(summary["copies"] == 1 && summary["removed_objects"] == 1, "{summary}");
    behind.fixture.verify()?;
    ensure!(rights.refused() == 0 && manifest.exists(), "it was not made again");
    // What the restore registers itself with is left alone for as long as it may run.
    image::same(&path, &behind.fixture.restore(&format!("vm@{id}"), "vda")?)?;
    let again = behind.fixture.fleecectl(&["tidy", "--json"])?.json()?;
    ensure!(again.last().context("nothing was said")?["removed_objects"] == 0, "{again:?}");
    Ok(())
}

#[test]
fn answers_that_are_lost_change_nothing() -> Result {
    let behind = Behind::new()?;
    let path = behind.fixture.path("image.raw");
    image::raw(&path, 96 * MIB, &[(0, 40 * MIB, 1), (64 * MIB, 16 * MIB, 2)])?;
    behind.wire.lose(7);
    let (id, _) = behind.fixture.backup_images("vm", &[("vda", &path)])?;
    assert_eq!(behind.wire.left(), 0, "answers were to be lost");
    image::same(&path, &behind.fixture.restore(&format!("vm@{id}"), "vda")?)
}

#[test]
fn a_server_that_goes_and_comes_back_is_waited_for() -> Result {
    let mut behind = Behind::new()?;
    let path = behind.fixture.path("image.raw");
    image::raw(&path, 256 * MIB, &[(0, 200 * MIB, 1)])?;
    let disk = format!("--image=vda={}", path.display());
    let mut command = behind.fixture.fleece_command(&["backup", "vm", &disk])?;
    let mut running = qemu_tests::process::Running::start("fleece backup", &mut command)?;
    let before = behind.objects()?.len();
    wait_until(SOON, "the first containers", || {
        anyhow::ensure!(running.ended()?.is_none(), "it ended: {}", running.printed());
        Ok(behind.objects()?.len() > before + 2)
    })?;
    behind.server.kill()?;
    // As long as a service needs to start anew.
    thread::sleep(Duration::from_secs(2));
    behind.server.start_again()?;
    let printed = running.finish(LONG)?.code(0)?.printed();
    let snapshot = format!("vm@{}", snapshot_id(&printed)?);
    image::same(&path, &behind.fixture.restore(&snapshot, "vda")?)
}

#[test]
fn what_cannot_be_a_store_is_refused_before_anything_is_made() -> Result {
    let behind = Behind::new()?;
    let refused = |places: Places, code: i32, words: &str| -> Result {
        let config = behind.fixture.text("refused.toml");
        let store = places.store.unwrap_or_default().display().to_string();
        let mut init = vec!["init", "--store", &store, "--config", &config];
        init.extend(places.init.iter().map(String::as_str));
        let printed = behind.fixture.try_fleecectl(&init)?.code(code)?.printed();
        assert!(printed.contains(words), "{printed}");
        assert!(!Path::new(&config).exists() && !Path::new(&config).with_extension("key").exists());
        Ok(())
    };
    let home = tempfile::tempdir()?;
    // There is a store already.
    refused(places(home.path(), &behind.wire, BUCKET)?, 2, "already")?;
    // No such bucket.
    refused(places(home.path(), &behind.wire, "nobodys")?, 1, "s3://nobodys")?;
    // Others may read the secret.
    let credentials = home.path().join("credentials.toml");
    fs::set_permissions(&credentials, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    refused(places(home.path(), &behind.wire, BUCKET)?, 12, "chmod 0400")?;
    // Another secret.
    fs::write(&credentials, "access_key_id = \"fleece-test\"\nsecret_access_key = \"guess\"\n")?;
    fs::set_permissions(&credentials, std::os::unix::fs::PermissionsExt::from_mode(0o400))?;
    refused(places(home.path(), &behind.wire, BUCKET)?, 17, "s3://backups")
}
