//! A host whose certificate the cluster's CA took back, while everything runs: the others hang up on it
//! and refuse it both ways, take its part over, and go on, with a key that it never had; invited again, it is
//! one of them again.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qemu_tests::Result;
use qemu_tests::cluster::{Cluster, images, snapshot};
use qemu_tests::process::Finished;
use qemu_tests::wait::{LONG, SOON, wait_until};

/// How a host sees another one.
fn state(cluster: &Cluster, host: usize, other: &str) -> Result<String> {
    let hosts = cluster.ask(host, &["hosts"])?;
    let seen = hosts.iter().find(|one| one["name"] == other);
    let seen = seen.with_context(|| format!("hv{host} knows no {other}"))?;
    Ok(seen["state"].as_str().unwrap_or_default().to_owned())
}

/// Takes hv2's certificates back, and gives the list to everybody.
fn revoke(cluster: &Cluster) -> Result {
    let (ca, list) = (cluster.fixture.text("ca"), cluster.fixture.path("ca/crl.pem"));
    let unknown = ["cluster", "revoke", "hv7", "--dir", &ca];
    cluster.fixture.try_fleecectl(&unknown)?.code(14)?;
    ensure!(!list.exists(), "a list for nobody");
    let revoked = cluster.fixture.fleecectl(&["cluster", "revoke", "hv2", "--dir", &ca])?;
    for step in ["crl.pem", "fleecectl drain hv2", "S3 credentials", "key rotate --use"] {
        ensure!(revoked.printed().contains(step), "{}", revoked.printed());
    }
    // Once more is no mistake, and says the same.
    let again = ["cluster", "revoke", "hv2", "--dir", &ca, "--json"];
    let again = cluster.fixture.fleecectl(&again)?.json()?;
    let said = again.iter().find(|line| line["message_type"] == "revoked").context("not said")?;
    let count = |name: &str| said[name].as_array().map(Vec::len);
    ensure!(count("serials") == Some(1) && count("steps") == Some(5), "{said}");
    // All hosts of this test have their identities in one folder: this is every host's list.
    let beside = cluster.fixture.path("crl.pem");
    let next = cluster.fixture.path("crl.next");
    fs::copy(&list, &next)?;
    fs::rename(&next, &beside)?;
    Ok(())
}

/// Every engine has read the list: hv0 and hv1 talk to one another, and neither to hv2.
fn all_refuse(cluster: &Cluster) -> Result {
    let changed = "the list of revoked certificates has changed";
    wait_until(SOON, "all engines to read the list", || {
        Ok((0..3).all(|host| cluster.printed(host).contains(changed)))
    })?;
    for host in [0, 1] {
        ensure!(state(cluster, host, "hv2")? == "revoked", "hv{host} still talks to hv2");
        let other = format!("hv{}", 1 - host);
        ensure!(state(cluster, host, &other)? == "answers", "{other} is refused, too");
    }
    // The other way as well: it gets no answer of anybody.
    for other in ["hv0", "hv1"] {
        ensure!(state(cluster, 2, other)? == "silent", "{other} answers hv2");
    }
    Ok(())
}

fn key(cluster: &Cluster, arguments: &[&str]) -> Result<Finished> {
    let config = cluster.config(0).display().to_string();
    let arguments = [&["--config", &config, "key"], arguments].concat();
    cluster.begin(0, "fleecectl", &arguments)?.finish(LONG)
}

/// A key for all hosts, while hv2 still is one of them: nobody may count on what it does not know. Gives the key
/// file that hv2 had.
fn wants_another_key(cluster: &Cluster) -> Result<PathBuf> {
    let had = cluster.fixture.path("had.key");
    fs::copy(cluster.fixture.path("engine.key"), &had)?;
    key(cluster, &["rotate"])?.code(0)?;
    let refused = key(cluster, &["rotate", "--use"])?.code(1)?.printed();
    ensure!(refused.contains("hv2 is revoked, and still in the cluster"), "{refused}");
    Ok(had)
}

/// What is stored from then on is under a key that hv2 never had: the others have one file, but for the host that
/// came by a bundle.
fn changes_the_key(cluster: &Cluster, fourth: usize, had: &Path) -> Result {
    wait_until(LONG, "a map without hv2", || {
        Ok(cluster.ask(0, &["hosts"])?.iter().all(|host| host["name"] != "hv2"))
    })?;
    let file = cluster.fixture.path("engine.key");
    let lacks = key(cluster, &["rotate", "--use"])?.code(1)?.printed();
    ensure!(lacks.contains(&format!("hv{fourth} lacks it")), "{lacks}");
    let (theirs, next) =
        (format!("hv{fourth}/engine.key"), cluster.fixture.path("engine.key.next"));
    fs::copy(&file, &next)?;
    fs::rename(&next, cluster.fixture.path(&theirs))?;
    wait_until(SOON, "every host to have the key", || {
        Ok(key(cluster, &["rotate", "--use"])?.code(0).is_ok())
    })?;
    // That is the key that hv2 had.
    let old = key(cluster, &["check", &had.display().to_string()])?.code(12)?.printed();
    ensure!(old.contains("needs the encryption key 2"), "{old}");
    key(cluster, &["check", &file.display().to_string()])?.code(0).map(drop)
}

/// Invited again, with the same list about, it is one of them: it finds what is known.
fn comes_back(cluster: &mut Cluster, known: &Path) -> Result {
    let (ca, identity) = (cluster.fixture.text("ca"), cluster.fixture.text("hv2.pem"));
    fs::remove_file(&identity)?;
    let invite = ["cluster", "invite", "hv2", "--dir", &ca, "--out", &identity];
    cluster.fixture.fleecectl(&invite)?;
    cluster.start(2)?;
    cluster.ask(0, &["drain", "hv2", "--undo"])?;
    cluster.wait_members(4)?;
    let back = cluster.backup(2, "back", known)?.finish(LONG)?.code(0)?;
    let printed = back.printed();
    ensure!(printed.contains("new 0 B") && printed.contains("undetected 0"), "{printed}");
    Ok(())
}

#[test]
fn a_host_that_is_revoked_gets_nothing_and_the_others_go_on() -> Result {
    let mut cluster = Cluster::of_etcd(3)?;
    let paths = images(cluster.fixture.folder(), 3)?;
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let first = cluster.backup(2, "vm0", all[0])?.finish(LONG)?.code(0)?;
    ensure!(state(&cluster, 0, "hv2")? == "answers", "hv2 does not answer before");

    // It asks the others all the time, by links that there are when it is revoked.
    let disk = format!("--image=vda={}", all[2].display());
    let asking = cluster.begin(2, "fleece", &["backup", "slow", &disk, "--read-limit", "4M"])?;
    wait_until(LONG, "its first questions", || {
        let sessions = cluster.ask(2, &["sessions"])?;
        Ok(sessions.iter().any(|one| one["vm"] == "slow" && one["requested"].as_u64() > Some(0)))
    })?;

    revoke(&cluster)?;
    all_refuse(&cluster)?;
    // What was not answered before is not answered any more, so it stores that anew.
    let asking = asking.finish(LONG)?.code(0)?;
    ensure!(!asking.printed().contains("undetected 0"), "{}", asking.printed());

    // Nobody waits for it, whether its part has been taken over or not.
    let during = cluster.backup(0, "vm1", all[1])?.finish(LONG)?.code(0)?;
    cluster.ask(0, &["drain", "hv2"])?;
    wait_until(LONG, "the others to have taken its part over", || {
        let hosts = cluster.ask(1, &["hosts"])?;
        let living = hosts.iter().filter(|host| host["name"] != "hv2");
        let filled = living.clone().all(|host| host["index_epoch"] == host["map_epoch"]);
        Ok(filled && living.filter_map(|host| host["slices"].as_u64()).sum::<u64>() == 4096)
    })?;
    for (host, vm, path) in [(0, "again0", all[0]), (1, "again1", all[1])] {
        let again = cluster.backup(host, vm, path)?.finish(LONG)?.code(0)?;
        let printed = again.printed();
        ensure!(printed.contains("new 0 B") && printed.contains("undetected 0"), "{printed}");
    }
    // Who is invited now gets the list with all the rest.
    let fourth = cluster.join_by_bundle()?;
    let given = fs::read(cluster.fixture.path(&format!("hv{fourth}/crl.pem")))?;
    ensure!(!given.is_empty(), "no list in the bundle");
    ensure!(state(&cluster, fourth, "hv2")? == "revoked", "hv{fourth} talks to hv2");
    let had = wants_another_key(&cluster)?;
    // It does not start again, and says why.
    cluster.kill(2)?;
    let refused = cluster.start(2).err().context("a revoked host started")?.to_string();
    ensure!(refused.contains("this host's certificate is revoked"), "{refused}");
    changes_the_key(&cluster, fourth, &had)?;
    let both = [(snapshot("vm0", &first)?, all[0]), (snapshot("vm1", &during)?, all[1])];
    cluster.must_be_whole(&both)?;

    comes_back(&mut cluster, all[0])?;
    cluster.must_be_whole(&both)
}
