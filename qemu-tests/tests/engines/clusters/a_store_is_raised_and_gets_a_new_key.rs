//! What is changed for all hosts of a store at once, while they run: its level, once all know the next one,
//! and the key for what is new, once all have it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qemu_tests::cluster::{Cluster, images, snapshot};
use qemu_tests::fixture::Fixture;
use qemu_tests::process::Finished;
use qemu_tests::wait::{LONG, SOON, wait_until};
use qemu_tests::{MIB, NEWEST_LEVEL, Result, image};

/// Three hosts are the fewest of which one can be away, and one have something, while a third lacks it.
const HOSTS: usize = 3;

/// All files of a store.
fn objects(store: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut folders = vec![store.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            match path.is_dir() {
                true => folders.push(path),
                false => drop(found.insert(path)),
            }
        }
    }
    Ok(found)
}

/// The number of the encryption key that an object is under, by its header: at its beginning, and of the second
/// copy of a directory in the trailer, its last 160 bytes.
fn key_of(object: &Path) -> Result<u32> {
    let bytes = fs::read(object)?;
    let headers = [bytes.as_slice(), &bytes[bytes.len().saturating_sub(160)..]];
    let header = headers.into_iter().find(|bytes| bytes.starts_with(b"FLEECE\x1a\n"));
    let header = header.with_context(|| format!("{} is no object", object.display()))?;
    let key = header.get(16..20).and_then(|key| key.try_into().ok()).context("cut short")?;
    Ok(u32::from_le_bytes(key))
}

/// Everything that was stored since is under one key.
fn must_be_under(key: u32, before: &BTreeSet<PathBuf>, store: &Path) -> Result {
    let after = objects(store)?;
    let new: Vec<&PathBuf> = after.difference(before).collect();
    for kind in ["containers", "directories", "journal", "manifests", "manifests-copy", "sessions"]
    {
        let folder = store.join(kind);
        ensure!(new.iter().any(|object| object.starts_with(&folder)), "nothing new in {kind}");
    }
    for object in new {
        ensure!(key_of(object)? == key, "{} is under key {}", object.display(), key_of(object)?);
    }
    Ok(())
}

/// Puts a copy of a key file into the place of another one, as an administrator would.
fn copy_key(from: &Path, to: &Path) -> Result {
    let next = to.with_extension("next");
    fs::copy(from, &next)?;
    fs::set_permissions(&next, fs::Permissions::from_mode(0o400))?;
    Ok(fs::rename(&next, to)?)
}

fn key_file(cluster: &Cluster, host: usize) -> PathBuf {
    cluster.fixture.path(&format!("hv{host}.key"))
}

/// Hosts that are down, each with a key file of its own, and a store of the first level: without what raised
/// it an older Fleece has made it.
fn of_level_1() -> Result<Cluster> {
    let mut cluster = Cluster::of_a_list_on_hosts(HOSTS)?;
    for host in 0..HOSTS {
        cluster.kill(host)?;
        copy_key(&cluster.fixture.path("engine.key"), &key_file(&cluster, host))?;
        let config = cluster.config(host).to_owned();
        let (shared, own) = (cluster.fixture.text("engine.key"), key_file(&cluster, host));
        let text = fs::read_to_string(&config)?.replace(&shared, &own.display().to_string());
        fs::write(&config, text)?;
    }
    fs::remove_dir_all(cluster.fixture.store().join("agreed"))?;
    Ok(cluster)
}

/// `fleecectl` with host 0's configuration.
fn fleecectl(cluster: &Cluster, arguments: &[&str]) -> Result<Finished> {
    let config = cluster.config(0).display().to_string();
    let arguments = [&["--config", &config], arguments].concat();
    cluster.begin(0, "fleecectl", &arguments)?.finish(LONG)
}

/// What every host says of itself, as host 0 hears it.
fn everywhere(cluster: &Cluster, name: &str, value: u64) -> Result<bool> {
    Ok(cluster.ask(0, &["hosts"])?.iter().all(|host| host[name] == value))
}

fn is_raised_once_all_answer(cluster: &mut Cluster) -> Result {
    cluster.start(0)?;
    cluster.start(1)?;
    let shown = fleecectl(cluster, &["upgrade"])?.code(0)?.printed();
    let newest = format!("levels up to {NEWEST_LEVEL}");
    ensure!(shown.contains("at level 1") && shown.contains(&newest), "{shown}");
    let refused = fleecectl(cluster, &["key", "rotate"])?.code(2)?.printed();
    ensure!(refused.contains("upgrade --finalize first"), "{refused}");
    let refused = fleecectl(cluster, &["upgrade", "--finalize"])?.code(1)?.printed();
    ensure!(refused.contains("hv2 does not answer") && !refused.contains("hv1"), "{refused}");
    ensure!(!cluster.fixture.store().join("agreed").exists(), "raised all the same");

    cluster.start(2)?;
    let done = fleecectl(cluster, &["upgrade", "--finalize"])?.code(0)?.printed();
    let raised = format!("at level {NEWEST_LEVEL}");
    ensure!(done.contains(&raised) && done.contains("all hosts go by that"), "{done}");
    ensure!(everywhere(cluster, "level", NEWEST_LEVEL)?, "not all follow");
    // Once more changes nothing.
    fleecectl(cluster, &["upgrade", "--finalize", "--json"])?.code(0).map(drop)
}

/// The key file goes from host to host while engines run; the key is used once all have it.
fn gets_a_new_key(cluster: &Cluster) -> Result {
    let added = fleecectl(cluster, &["key", "rotate"])?.code(0)?.printed();
    ensure!(added.contains("has the encryption key 2, which is not used yet"), "{added}");
    let file = fs::read(key_file(cluster, 0))?;
    fleecectl(cluster, &["key", "rotate"])?.code(0)?;
    ensure!(fs::read(key_file(cluster, 0))? == file, "a third key, while the second waits");
    let refused = fleecectl(cluster, &["key", "rotate", "--use"])?.code(1)?.printed();
    ensure!(refused.contains("hv1 lacks it") && refused.contains("hv2 lacks it"), "{refused}");

    copy_key(&key_file(cluster, 0), &key_file(cluster, 1))?;
    let has = |host: usize| {
        let hosts = cluster.ask(0, &["hosts"])?;
        Ok(hosts
            .iter()
            .any(|one| one["name"] == format!("hv{host}") && one["keys"]["2"].is_string()))
    };
    wait_until(SOON, "hv1 to take its new key file", || has(1))?;
    let refused = fleecectl(cluster, &["key", "rotate", "--use"])?.code(1)?.printed();
    ensure!(refused.contains("hv2 lacks it") && !refused.contains("hv1"), "{refused}");
    ensure!(everywhere(cluster, "key", 1)?, "it is used all the same");

    copy_key(&key_file(cluster, 0), &key_file(cluster, 2))?;
    wait_until(SOON, "hv2 to take its new key file", || has(2))?;
    let done = fleecectl(cluster, &["key", "rotate", "--use"])?.code(0)?.printed();
    ensure!(done.contains("under the encryption key 2"), "{done}");
    ensure!(done.contains("all hosts go by that"), "{done}");
    // There is no third one.
    fleecectl(cluster, &["key", "rotate", "--use"])?.code(2).map(drop)
}

#[test]
fn a_cluster_goes_over_to_a_new_level_and_a_new_key_once_all_hosts_have_it() -> Result {
    let mut cluster = of_level_1()?;
    let store = cluster.fixture.store();
    is_raised_once_all_answer(&mut cluster)?;
    let paths = images(cluster.fixture.folder(), 2 * HOSTS as u64)?;
    let mut snapshots = Vec::new();
    let mut back_up = |cluster: &Cluster, host: usize, n: usize| {
        let done = cluster.backup(host, &format!("vm{n}"), &paths[n])?.finish(LONG)?.code(0)?;
        ensure!(done.printed().contains("undetected 0"), "{}", done.printed());
        snapshots.push((snapshot(&format!("vm{n}"), &done)?, paths[n].as_path()));
        Ok(())
    };
    for host in 0..HOSTS {
        back_up(&cluster, host, host)?;
    }
    let old = cluster.fixture.path("old.key");
    copy_key(&key_file(&cluster, 2), &old)?;
    gets_a_new_key(&cluster)?;
    let before = objects(&store)?;
    for host in 0..HOSTS {
        back_up(&cluster, host, HOSTS + host)?;
    }
    must_be_under(2, &before, &store)?;
    cluster.must_be_whole(&snapshots)?;

    // Whoever comes with the old file is told which one is old.
    cluster.kill(2)?;
    let new = cluster.fixture.path("new.key");
    copy_key(&key_file(&cluster, 2), &new)?;
    copy_key(&old, &key_file(&cluster, 2))?;
    let refused = cluster.start_another(2)?.finish(LONG)?.code(12)?.printed();
    let named =
        format!("the encryption key 2, which the key file {}", key_file(&cluster, 2).display());
    ensure!(refused.contains(&named), "{refused}");
    let check = fleecectl(&cluster, &["key", "check", &old.display().to_string()])?.code(12)?;
    ensure!(check.printed().contains("encryption key 2"), "{}", check.printed());
    // The engine that looks at all of it once more in the end has a file of its own.
    for file in [key_file(&cluster, 2), cluster.fixture.path("engine.key")] {
        copy_key(&new, &file)?;
    }
    cluster.start(2)?;
    wait_until(LONG, "hv2 to answer", || everywhere(&cluster, "key", 2))?;
    cluster.must_be_whole(&snapshots)
}

#[test]
fn a_lone_host_changes_its_key_and_finds_it_again_by_a_passphrase() -> Result {
    let mut fixture = Fixture::new()?;
    let config = fixture.text("engine.toml");
    let key = |fixture: &Fixture, arguments: &[&str]| {
        fixture.try_fleecectl(&[&["--config", &config, "key"], arguments].concat())
    };
    let path = fixture.path("disk.raw");
    image::raw(&path, 32 * MIB, &[(0, 8 * MIB, 1)])?;
    let (first, _) = fixture.backup_images("vm", &[("vda", &path)])?;
    let truth = fixture.path("truth.raw");
    fs::copy(&path, &truth)?;

    let passphrase = fixture.text("passphrase");
    fs::write(&passphrase, "correct horse\n")?;
    key(&fixture, &["rotate", "--use"])?.code(2)?;
    key(&fixture, &["rotate", "--passphrase-file", &passphrase])?.code(0)?;
    key(&fixture, &["rotate", "--use"])?.code(0)?;
    let before = objects(&fixture.store())?;
    image::raw(&path, 32 * MIB, &[(0, 8 * MIB, 1), (16 * MIB, 8 * MIB, 2)])?;
    let (second, printed) = fixture.backup_images("vm", &[("vda", &path)])?;
    ensure!(!printed.printed().contains("new 0 B"), "{}", printed.printed());
    must_be_under(2, &before, &fixture.store())?;

    // The key file is lost; the newest copy in the store has all.
    fixture.stop_engine()?;
    let file = fixture.path("engine.key");
    let lost = fs::read_to_string(&file)?;
    fs::remove_file(&file)?;
    let export = key(&fixture, &["export", "--passphrase-file", &passphrase])?.code(0)?.printed();
    ensure!(export.trim_end() == lost.trim_end(), "another key came back");
    fs::write(&file, lost)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o400))?;
    fixture.start_engine()?;
    for (snapshot, truth) in [(first, &truth), (second, &path)] {
        image::same(truth, &fixture.restore(&format!("vm@{snapshot}"), "vda")?)?;
    }
    fixture.verify()?.code(0).map(drop)
}

#[test]
fn an_engine_that_cannot_go_by_what_the_others_do_ends_by_name() -> Result {
    let mut fixture = Fixture::new()?;
    let (config, key) = (fixture.text("engine.toml"), fixture.text("engine.key"));
    // As a later Fleece makes the one, and hosts that have a newer key file the other: their names are enough.
    let later = NEWEST_LEVEL + 1;
    let (higher, refusal) =
        (format!("agreed/level-{later:08x}"), format!("is at level {later}, and this Fleece"));
    for (name, code, said) in [
        (&*higher, 10, &*refusal),
        ("agreed/key-00000002", 12, "needs the encryption key 2, which the key file"),
    ] {
        let object = fixture.store().join(name);
        fs::write(&object, b"of others")?;
        let mut ended = None;
        wait_until(SOON, "the engine to end", || {
            ended = fixture.engine()?.ended()?;
            Ok(ended.is_some())
        })?;
        let ended = ended.and_then(|status| status.code());
        ensure!(ended == Some(code), "it ended with {ended:?}");
        fixture.engine()?.wait_printed(SOON, said)?;
        fixture.kill_engine()?;
        // None starts with it, and fleecectl says the same.
        let refused = fixture.start_engine().err().context("it started")?.to_string();
        ensure!(refused.contains(said), "{refused}");
        let checked = fixture.try_fleecectl(&["--config", &config, "key", "check", &key])?;
        ensure!(checked.code(code)?.printed().contains(said.split(',').next().unwrap_or(said)));
        fs::remove_file(&object)?;
        fixture.start_engine()?;
    }
    fixture.verify()?.code(0).map(drop)
}
