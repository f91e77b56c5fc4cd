//! Our server under real clients: nbdinfo, nbdcopy, qemu-img, qemu-io, the nbd crate, ours.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod nbd_support;

use std::io::{Read, Seek, SeekFrom, Write};

use bytes::Bytes;
use fleece::error::{Error, Kind, Result};
use fleece::nbd::server::{ImageSource, Server, Stretch};
use fleece::nbd::wire::BASE_ALLOCATION;
use fleece::nbd::{Address, NbdErrorKind, list_exports};
use nbd_support::*;

const MIB: usize = 1 << 20;

/// A disk in memory; reading the byte at `bad` fails.
struct Memory {
    data: Bytes,
    bad: Option<u64>,
}

impl ImageSource for Memory {
    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Bytes> {
        tokio::task::yield_now().await;
        let range = offset..offset + u64::from(length);
        if self.bad.is_some_and(|bad| range.contains(&bad)) {
            return Err(Error::new(Kind::Damaged, "a frame is damaged"));
        }
        Ok(self.data.slice(range.start as usize..range.end as usize))
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Stretch>> {
        let mut out: Vec<Stretch> = Vec::new();
        let end = (offset + length).min(self.size());
        let mut at = offset;
        while at < end {
            let next = ((at / 4096 + 1) * 4096).min(self.size());
            let zero = self.data[at as usize..next as usize].iter().all(|b| *b == 0);
            match out.last_mut() {
                Some(last) if last.zero == zero => last.length += next - at,
                _ => out.push(Stretch { length: next - at, zero }),
            }
            at = next;
        }
        Ok(out)
    }
}

/// 24 MiB and a bit: noise, a long hole, a little more noise.
fn content() -> Bytes {
    let mut data = vec![0; 24 * MIB + 1000];
    data[..3 * MIB].copy_from_slice(&noise(1, 3 * MIB));
    data[20 * MIB + 7..20 * MIB + 4007].copy_from_slice(&noise(2, 4000));
    data.into()
}

/// Runs a test beside a server with these disks.
fn served(disks: Vec<(&str, Memory)>, test: impl AsyncFnOnce(&Place)) {
    let place = Place::new();
    run(async {
        let disks = disks.into_iter().map(|(name, disk)| (name.to_owned(), disk)).collect();
        let server = Server::bind(&place.socket(), disks).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = server.serve(async {
            let _ = stopped.await;
        });
        let server = tokio::task::spawn_local(server);
        test(&place).await;
        stop.send(()).unwrap();
        server.await.unwrap();
        assert!(!place.socket().exists());
    });
}

fn one(data: &Bytes) -> Vec<(&'static str, Memory)> {
    vec![("vda", Memory { data: data.clone(), bad: None })]
}

async fn ok(program: &'static str, args: &[&str]) -> String {
    let out = tool_async(program, args.iter().map(|a| (*a).to_owned()).collect()).await;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {said}");
    stdout(&out)
}

#[test]
fn nbdinfo_and_nbdcopy() {
    let data = content();
    served(one(&data), async |place| {
        let uri = place.uri("vda");
        let info = ok("nbdinfo", &[&uri]).await;
        for line in ["is_read_only: true", "can_multi_conn: true", "base:allocation", "structured"]
        {
            assert!(info.contains(line), "{line}: {info}");
        }
        assert!(info.contains(&format!("export-size: {}", data.len())), "{info}");
        let map = ok("nbdinfo", &["--map", "--json", &uri]).await;
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let map: Vec<_> = map
            .as_array()
            .unwrap()
            .iter()
            .map(|e| {
                (
                    e["offset"].as_u64().unwrap(),
                    e["length"].as_u64().unwrap(),
                    e["type"].as_u64().unwrap(),
                )
            })
            .collect();
        let (a, b, c) = (3 * MIB as u64, 20 * MIB as u64, data.len() as u64);
        assert_eq!(map, [(0, a, 0), (a, b - a, 3), (b, 4096, 0), (b + 4096, c - b - 4096, 3)]);
        let copy = place.path("copy");
        ok("nbdcopy", &[&uri, copy.to_str().unwrap()]).await;
        assert!(std::fs::read(&copy).unwrap() == data);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&copy).unwrap());
        assert!(blocks * 512 < 5 * MIB as u64, "the copy is not sparse: {blocks}");
        let list = ok("nbdinfo", &["--list", &place.uri("")]).await;
        assert!(list.contains("export=\"vda\""), "{list}");
    });
}

#[test]
fn qemu_img_and_qemu_io() {
    let data = content();
    served(one(&data), async |place| {
        let uri = place.uri("vda");
        let copy = place.path("copy.raw");
        ok("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, copy.to_str().unwrap()]).await;
        // QEMU rounds the size up to a sector.
        let mut truth = data.to_vec();
        truth.resize(data.len().next_multiple_of(512), 0);
        assert!(std::fs::read(&copy).unwrap() == truth);
        let map = ok("qemu-img", &["map", "-f", "raw", "--output=json", &uri]).await;
        assert!(map.contains("\"zero\": true"), "{map}");
        let read = ok("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 4M 8M", &uri]).await;
        assert!(!read.contains("failed"), "{read}");
        // An overlay on it, as `fleece serve` tells people to make, is writable.
        let overlay = place.path("overlay.qcow2");
        let overlay = overlay.to_str().unwrap();
        ok("qemu-img", &["create", "-f", "qcow2", "-F", "raw", "-b", &uri, overlay]).await;
        ok("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 64k", overlay]).await;
        let read = ok("qemu-io", &["-f", "qcow2", "-c", "read -P 5 0 64k", overlay]).await;
        assert!(!read.contains("failed"), "{read}");
    });
}

#[test]
fn several_exports_and_several_clients() {
    let data = content();
    let other = Bytes::from(noise(4, 5 * MIB));
    let disks = vec![
        ("vda", Memory { data: data.clone(), bad: None }),
        ("vdb", Memory { data: other.clone(), bad: None }),
    ];
    served(disks, async |place| {
        let names = list_exports(&Address::Unix(place.socket()), PATIENCE).await.unwrap();
        assert_eq!(names, ["vda", "vdb"]);
        let none = connect(&place.target(""), &[]).await.unwrap_err();
        assert_eq!(none.kind(), NbdErrorKind::NoSuchExport);
        let (a, b) = futures::future::try_join(
            connect(&place.target("vda"), &[BASE_ALLOCATION]),
            connect(&place.target("vdb"), &[]),
        )
        .await
        .unwrap();
        assert_eq!((a.connections(), b.connections()), (4, 4));
        let (x, y) = futures::future::try_join(read_all(&a), read_all(&b)).await.unwrap();
        assert!(x == data && y == other);
        let gone = connect(&place.target("vda"), &["qemu:dirty-bitmap:b"]).await.unwrap_err();
        assert_eq!(gone.kind(), NbdErrorKind::NoContext);
    });
}

#[test]
fn damage_is_an_error_of_its_place_only() {
    let data = content();
    let disk = Memory { data: data.clone(), bad: Some(MIB as u64 + 5) };
    served(vec![("vda", disk)], async |place| {
        let export = connect(&place.target("vda"), &[]).await.unwrap();
        // Half of the answer is out before the damage is met.
        let error = export.read(512 << 10, 1 << 20).await.unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Io(5));
        assert!(error.to_string().contains("a frame is damaged"), "{error}");
        assert!(export.read(2 << 20, 4096).await.unwrap()[..] == data[2 << 20..][..4096]);
    });
}

#[test]
fn the_nbd_crate_reads_us_and_cannot_write() {
    let data = content();
    let truth = data.clone();
    served(one(&data), async move |place| {
        let socket = place.socket();
        let client = move || {
            let mut socket = std::os::unix::net::UnixStream::connect(socket).unwrap();
            let export = nbd::client::handshake(&mut socket, b"vda").unwrap();
            assert_eq!((export.size, export.readonly), (truth.len() as u64, true));
            let mut client = nbd::client::NbdClient::new(&mut socket, &export);
            let mut all = Vec::new();
            client.read_to_end(&mut all).unwrap();
            assert!(all == truth);
            client.seek(SeekFrom::Start(4096)).unwrap();
            let error = client.write(&[1; 70_000]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            // In step after the refused write: the crate moved on only if it had succeeded.
            let mut some = [0; 16];
            client.read_exact(&mut some).unwrap();
            assert_eq!(some[..], truth[4096..4112]);
        };
        tokio::task::spawn_blocking(client).await.unwrap();
    });
}

#[test]
fn writers_are_refused() {
    served(one(&content()), async |place| {
        let uri = place.uri("vda");
        let args = ["-f", "raw", "-c", "write 0 4k", &uri].map(str::to_owned).to_vec();
        let out = tool_async("qemu-io", args).await;
        let said = stdout(&out) + &String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("read-only") || said.contains("Permission denied"), "{said}");
    });
}

#[test]
fn rubbish_ends_only_its_own_client() {
    served(one(&content()), async |place| {
        let export = connect(&place.target("vda"), &[]).await.unwrap();
        let socket = place.socket();
        let rubbish = move || {
            for seed in 1..60 {
                let mut socket = std::os::unix::net::UnixStream::connect(&socket).unwrap();
                let mut bytes = 3u32.to_be_bytes().to_vec();
                if seed % 3 > 0 {
                    bytes.extend(b"IHAVEOPT\0\0\0");
                    bytes.push(seed as u8 % 12);
                    let length = if seed % 3 == 1 { 40 } else { u32::MAX };
                    bytes.extend(length.to_be_bytes());
                }
                bytes.extend(noise(seed, 400));
                let _ = socket.write_all(&bytes);
                let _ = socket.shutdown(std::net::Shutdown::Write);
                let mut answer = Vec::new();
                let _ = socket.read_to_end(&mut answer);
                assert_eq!(answer[..8], *b"NBDMAGIC");
            }
        };
        tokio::task::spawn_blocking(rubbish).await.unwrap();
        assert_eq!(export.read(0, 4096).await.unwrap().len(), 4096);
    });
}

#[test]
fn sockets_in_the_way() {
    let place = Place::new();
    run(async {
        let kind = |path: &std::path::Path| match Server::<Memory>::bind(path, Vec::new()) {
            Ok(_) => None,
            Err(e) => Some(e.kind()),
        };
        std::fs::write(place.path("file"), "").unwrap();
        assert_eq!(kind(&place.path("file")), Some(Kind::Target));
        drop(std::os::unix::net::UnixListener::bind(place.path("dead")).unwrap());
        assert!(place.path("dead").exists());
        assert_eq!(kind(&place.path("dead")), None);
        let _alive = std::os::unix::net::UnixListener::bind(place.path("alive")).unwrap();
        assert_eq!(kind(&place.path("alive")), Some(Kind::Busy));
        assert!(place.path("alive").exists());
    });
}
