//! etcd by TLS: it lets in who has a certificate of the cluster, hosts believe it only if it has one too, and
//! who is revoked is out.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qemu_tests::cluster::{Cluster, images, snapshot};
use qemu_tests::wait::{LONG, wait_until};
use qemu_tests::{Result, image};

/// What a host prints that is started with a changed configuration, and ends.
fn refused(cluster: &Cluster, change: &dyn Fn(&str) -> String, code: i32) -> Result<String> {
    let config = cluster.config(1);
    let text = fs::read_to_string(config)?;
    fs::write(config, change(&text))?;
    let ended = cluster.start_another(1)?.finish(LONG)?.code(code)?;
    fs::write(config, text)?;
    Ok(ended.printed())
}

/// A host's line of the configuration with another value.
fn with(text: &str, name: &str, value: &Path) -> String {
    let wanted = format!("{name} = ");
    let line = |line: &str| match line.starts_with(&wanted) {
        true => format!("{wanted}{:?}\n", value.display().to_string()),
        false => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

/// Nobody comes in, or believes etcd, by what is not of the cluster's CA, or only half there.
fn what_does_not_fit_is_refused(cluster: &Cluster) -> Result {
    let fixture = &cluster.fixture;
    let (other, stranger) = (fixture.text("other"), fixture.path("stranger.pem"));
    let out = stranger.display().to_string();
    fixture.fleecectl(&["cluster", "init", "--dir", &other])?;
    fixture.fleecectl(&["cluster", "invite", "hv1", "--dir", &other, "--out", &out])?;

    let half = |text: &str| format!("{text}etcd_certificate = {out:?}\n");
    let said = refused(cluster, &half, 2)?;
    ensure!(said.contains("etcd_key go together"), "{said}");
    let open = fixture.path("open.key");
    fs::copy(&stranger, &open)?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644))?;
    let both = |text: &str| format!("{}etcd_key = {:?}\n", half(text), open.display().to_string());
    let said = refused(cluster, &both, 12)?;
    ensure!(said.contains("open.key") && said.contains("chmod 0400"), "{said}");
    let said = refused(cluster, &|text| text.replace("https://", "http://"), 2)?;
    ensure!(said.contains("etcd_ca"), "{said}");
    ensure!(!fixture.path("another-state").exists(), "something was touched before");

    let authority = Path::new(&other).join("ca.pem");
    let said = refused(cluster, &|text| with(text, "etcd_ca", &authority), 1)?;
    ensure!(
        said.contains("etcd at https://") && said.contains("invalid peer certificate"),
        "{said}"
    );
    let said = refused(cluster, &|text| with(text, "identity", &stranger), 1)?;
    ensure!(
        said.contains("etcd at https://") && said.contains("this host's certificate"),
        "{said}"
    );
    Ok(())
}

/// Whose bundle is of a host with a certificate of its own for etcd is told where to put its own.
fn a_certificate_of_its_own_is_each_hosts(cluster: &Cluster) -> Result {
    let fixture = &cluster.fixture;
    let (from, ca, bundle) =
        (fixture.text("own.toml"), fixture.text("ca"), fixture.text("own.bundle"));
    let own = "etcd_certificate = \"/a.pem\"\netcd_key = \"/a.key\"\n";
    fs::write(&from, format!("{}{own}", fs::read_to_string(cluster.config(0))?))?;
    let passphrase = fixture.text("passphrase");
    let invite = ["--config", &from, "cluster", "invite", "hv9", "--dir", &ca, "--out", &bundle];
    fixture.fleecectl(&[&invite[..], &["--passphrase-file", &passphrase]].concat())?;
    let to = fixture.text("hv9/engine.toml");
    let join = ["--config", &to, "cluster", "join", &bundle, "--address", "10.0.0.9:7420"];
    let joined = fixture.fleecectl(&[&join[..], &["--passphrase-file", &passphrase]].concat())?;
    ensure!(joined.printed().contains("etcd.key"), "{}", joined.printed());
    let text = fs::read_to_string(&to)?;
    for (name, file) in
        [("etcd_certificate", "etcd.pem"), ("etcd_key", "etcd.key"), ("etcd_ca", "etcd-ca.pem")]
    {
        let line = format!("{name} = {:?}", fixture.text(&format!("hv9/{file}")));
        ensure!(text.contains(&line), "no {line} in {text}");
    }
    Ok(())
}

#[test]
fn a_cluster_meets_over_https_and_nobody_else_does() -> Result {
    let mut cluster = Cluster::with_secure_etcd()?;
    cluster.join()?;
    // The CA of the cluster is what it goes by if none is named; the bundle brings the one that is.
    let (config, ca) = (cluster.config(0).to_owned(), cluster.fixture.text("ca"));
    let named = format!("{}etcd_ca = \"{ca}/ca.pem\"\n", fs::read_to_string(&config)?);
    fs::write(&config, named)?;
    cluster.join_by_bundle()?;
    ensure!(
        cluster.config(1).with_file_name("etcd-ca.pem").exists(),
        "no CA of etcd in the bundle"
    );
    cluster.wait_members(2)?;

    let paths = images(cluster.fixture.folder(), 2)?;
    let all: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let expected = image::distinct_blocks(&all)?;
    let mut snapshots = Vec::new();
    for (host, vm, path) in [(0, "first", all[0]), (1, "second", all[1]), (1, "again", all[0])] {
        let finished = cluster.backup(host, vm, path)?.finish(LONG)?.code(0)?;
        let printed = finished.printed();
        ensure!(printed.contains("undetected 0"), "{printed}");
        ensure!(vm != "again" || printed.contains("new 0 B"), "{printed}");
        snapshots.push((snapshot(vm, &finished)?, path));
    }
    wait_until(LONG, "what the owners learn", || {
        Ok(cluster.figure(0, "unique_blocks")? == expected)
    })?;
    what_does_not_fit_is_refused(&cluster)?;
    a_certificate_of_its_own_is_each_hosts(&cluster)?;

    // Its certificate is of the right CA, and of another name.
    let elsewhere = cluster.fixture.path("elsewhere.pem");
    let (host, out) = ("etcd.elsewhere", elsewhere.display().to_string());
    cluster.fixture.fleecectl(&["cluster", "invite", host, "--dir", &ca, "--out", &out])?;
    let etcd = cluster.etcd.as_mut().context("no etcd")?;
    etcd.kill()?;
    let proofs = etcd.proofs.as_mut().context("no TLS")?;
    let right = std::mem::replace(&mut proofs.identity, elsewhere);
    etcd.start_again()?;
    let said = refused(&cluster, &|text| text.to_owned(), 1)?;
    ensure!(said.contains("not valid for name"), "{said}");

    // It has its own again, and hv1 is revoked: etcd lets it in no more, and its place ends with its lease.
    cluster.fixture.fleecectl(&["cluster", "revoke", "hv1", "--dir", &ca])?;
    let etcd = cluster.etcd.as_mut().context("no etcd")?;
    etcd.kill()?;
    let proofs = etcd.proofs.as_mut().context("no TLS")?;
    (proofs.identity, proofs.revoked) = (right, Some(Path::new(&ca).join("crl.pem")));
    etcd.start_again()?;
    wait_until(LONG, "hv1 to be out", || Ok(cluster.ask(0, &["hosts"])?.len() == 1))?;
    cluster.kill(1)?;
    cluster.wait_members(1)?;
    cluster.must_be_whole(&snapshots)
}
