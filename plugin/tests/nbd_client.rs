//! Our client against real servers (qemu-nbd, nbdkit, the nbd crate) and against liars.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod nbd_support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use fleece::extents::Extent;
use fleece::nbd::wire::{self, BASE_ALLOCATION};
use fleece::nbd::{Address, ConnectOptions, Export, NbdErrorKind, list_exports};
use nbd_support::*;

const MIB: u64 = 1 << 20;

fn flags(map: &[Extent]) -> Vec<(u64, u64, u32)> {
    map.iter().map(|e| (e.offset, e.length, e.flags.0)).collect()
}

async fn map_of(export: &Export, context: &str) -> Vec<(u64, u64, u32)> {
    let mut out = Vec::new();
    export.map(context, 0..export.size(), |e| out.push(e)).await.unwrap();
    flags(&out)
}

#[test]
fn reads_a_qcow2_with_its_bitmaps_from_qemu_nbd() {
    let place = Place::new();
    let raw = place.path("raw");
    let image = place.path("d.qcow2");
    let image = image.to_str().unwrap();
    // The size is no multiple of anything nice.
    let size = 40 * MIB + 512;
    let mut truth = sparse_file(&raw, size, &[(0, 100_000, 1), (30 * MIB, MIB as usize, 2)]);
    tool("qemu-img", &["convert", "-O", "qcow2", raw.to_str().unwrap(), image]);
    tool("qemu-img", &["bitmap", "--add", "-g", "65536", image, "b1"]);
    tool("qemu-io", &["-c", "write -P 7 1M 64k", "-c", "write -z 30M 128k", image]);
    tool("qemu-img", &["bitmap", "--add", "-g", "4096", image, "b2"]);
    tool("qemu-io", &["-c", "write -P 9 2052k 4k", image]);
    truth[MIB as usize..][..64 << 10].fill(7);
    truth[30 * MIB as usize..][..128 << 10].fill(0);
    truth[2052 << 10..][..4096].fill(9);

    let _server = place.qemu_nbd(&["-r", "-f", "qcow2", "-B", "b1", "-B", "b2", "-e", "8", image]);
    let contexts = ["qemu:dirty-bitmap:b1", "qemu:dirty-bitmap:b2", BASE_ALLOCATION];
    run(async {
        let export = connect(&place.target("vda"), &contexts).await.unwrap();
        assert_eq!((export.size(), export.is_read_only()), (size, true));
        assert_eq!(export.connections(), 4);
        assert!(read_all(&export).await.unwrap() == truth);
        let dirty = map_of(&export, contexts[0]).await;
        let only: Vec<_> = dirty.iter().filter(|e| e.2 == 1).map(|e| (e.0, e.1)).collect();
        assert_eq!(only, [(MIB, 64 << 10), (2 * MIB, 64 << 10), (30 * MIB, 128 << 10)]);
        let dirty = map_of(&export, contexts[1]).await;
        let only: Vec<_> = dirty.iter().filter(|e| e.2 == 1).map(|e| (e.0, e.1)).collect();
        assert_eq!(only, [(2052 << 10, 4096)]);
        // The allocation never calls bytes zero that are not, and finds the holes.
        let allocation = map_of(&export, BASE_ALLOCATION).await;
        let mut zeros = 0;
        for (offset, length, flags) in &allocation {
            if flags & wire::STATE_ZERO != 0 {
                let bytes = &truth[*offset as usize..(*offset + *length) as usize];
                assert!(bytes.iter().all(|b| *b == 0), "{offset}+{length}");
                zeros += length;
            }
        }
        assert!(zeros > 37 * MIB, "{allocation:?}");

        // With one connection all contexts share it.
        let one = ConnectOptions { connections: 1, ..options(&contexts) };
        let single = Export::connect(&place.target("vda"), &one).await.unwrap();
        assert_eq!(single.connections(), 1);
        for context in contexts {
            assert_eq!(map_of(&single, context).await, map_of(&export, context).await);
        }
        let names = list_exports(&Address::Unix(place.socket()), Duration::from_secs(5)).await;
        assert_eq!(names.unwrap(), ["vda"]);
    });
}

#[test]
fn errors_name_what_is_missing() {
    let place = Place::new();
    let _server = place.qemu_nbd(&["-r", "--image-opts", "driver=null-co,size=1048576"]);
    run(async {
        let kind = |result: Result<Export, fleece::nbd::NbdError>| result.unwrap_err().kind();
        let none = connect(&place.target("nothing"), &[]).await;
        assert!(none.as_ref().unwrap_err().to_string().contains("\"nothing\""));
        assert_eq!(kind(none), NbdErrorKind::NoSuchExport);
        let lost = connect(&place.target("vda"), &["qemu:dirty-bitmap:gone"]).await;
        assert!(lost.as_ref().unwrap_err().to_string().contains("dirty-bitmap:gone"));
        assert_eq!(kind(lost), NbdErrorKind::NoContext);
        let write = ConnectOptions { writable: true, ..options(&[]) };
        let write = Export::connect(&place.target("vda"), &write).await;
        assert_eq!(kind(write), NbdErrorKind::Refused);
        let nobody = fleece::nbd::NbdTarget::unix(place.path("nobody"), "vda");
        assert_eq!(kind(connect(&nobody, &[]).await), NbdErrorKind::Connect);

        let export = connect(&place.target("vda"), &[BASE_ALLOCATION]).await.unwrap();
        for (offset, length) in [(MIB, 1), (MIB - 1, 2), (u64::MAX, 4096), (0, 0), (0, u32::MAX)] {
            let error = export.read(offset, length).await.unwrap_err();
            assert_eq!(error.kind(), NbdErrorKind::Usage, "{error}");
        }
        let error = export.write(0, Bytes::from_static(b"x")).await.unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Refused);
        assert_eq!(export.read(0, 4096).await.unwrap().len(), 4096);
    });
}

#[test]
fn writes_zeroes_trims_and_flushes_into_qemu_nbd() {
    let place = Place::new();
    let image = place.path("new.qcow2");
    let image = image.to_str().unwrap();
    tool("qemu-img", &["create", "-f", "qcow2", image, "8M"]);
    let _server = place.qemu_nbd(&["-f", "qcow2", "-e", "8", "--discard=unmap", image]);
    let data = noise(5, 2 * MIB as usize);
    run(async {
        let options = ConnectOptions { writable: true, ..options(&[BASE_ALLOCATION]) };
        let export = Export::connect(&place.target("vda"), &options).await.unwrap();
        let writes = data
            .chunks(300_000)
            .enumerate()
            .map(|(i, part)| export.write(MIB + i as u64 * 300_000, Bytes::copy_from_slice(part)));
        futures::future::try_join_all(writes).await.unwrap();
        export.write_zeroes(2 * MIB, 64 << 10).await.unwrap();
        export.trim(4 * MIB, 4 * MIB).await.unwrap();
        export.flush().await.unwrap();
        let mut truth = vec![0; 8 * MIB as usize];
        truth[MIB as usize..3 * MIB as usize].copy_from_slice(&data);
        truth[2 * MIB as usize..][..64 << 10].fill(0);
        assert!(read_all(&export).await.unwrap() == truth);
        let zero_at = |map: &[(u64, u64, u32)], at: u64| {
            map.iter().any(|(o, l, f)| *o <= at && at < o + l && f & wire::STATE_ZERO != 0)
        };
        let map = map_of(&export, BASE_ALLOCATION).await;
        assert!(zero_at(&map, 2 * MIB) && zero_at(&map, 5 * MIB) && !zero_at(&map, MIB), "{map:?}");
    });
}

#[test]
fn nbdkit_sparse_slow_and_out_of_order() {
    // Delays per read differ, so replies of a connection come out of order.
    let place = Place::new();
    let _server =
        place.nbdkit(&["--filter=delay", "sparse-random", "size=64M", "seed=3", "rdelay=20ms"]);
    run(async {
        let export = connect(&place.target(""), &[BASE_ALLOCATION]).await.unwrap();
        let begin = Instant::now();
        let data = read_all(&export).await.unwrap();
        // 256 reads of 20 ms each, one after the other, would take 5 s.
        assert!(begin.elapsed() < Duration::from_millis(2500), "{:?}", begin.elapsed());
        let copy = place.path("copy");
        tool("nbdcopy", &[&place.uri(""), copy.to_str().unwrap()]);
        assert!(data == std::fs::read(copy).unwrap());
        for (offset, length, flags) in map_of(&export, BASE_ALLOCATION).await {
            let bytes = &data[offset as usize..(offset + length) as usize];
            assert!(flags & 2 == 0 || bytes.iter().all(|b| *b == 0));
        }
    });
}

#[test]
fn a_failing_server_fails_the_request_and_not_the_connection() {
    let place = Place::new();
    let trigger = place.path("fail");
    let file = format!("error-file={}", trigger.display());
    let args = ["--filter=error", "pattern", "size=16M", "error=EIO", "error-rate=100%", &file];
    let _server = place.nbdkit(&args);
    run(async {
        let export = connect(&place.target(""), &[]).await.unwrap();
        let whole = read_all(&export).await.unwrap();
        std::fs::write(&trigger, "").unwrap();
        let error = export.read(4096, 8192).await.unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Io(wire::errno::EIO));
        let text = error.to_string();
        assert!(text.contains("read of 8192 bytes at offset 4096"), "{text}");
        std::fs::remove_file(&trigger).unwrap();
        assert!(read_all(&export).await.unwrap() == whole);
    });
}

#[test]
fn a_broken_view_is_told_apart() {
    let place = Place::new();
    let args = ["--filter=error", "pattern", "size=1M", "error=EINVAL", "error-pread-rate=100%"];
    let _server = place.nbdkit(&args);
    run(async {
        let export = connect(&place.target(""), &[]).await.unwrap();
        let error = export.read(0, 4096).await.unwrap_err();
        assert!(error.is_view_broken(), "{error}");
    });
}

#[test]
fn a_server_that_dies_fails_everything_in_flight() {
    let place = Place::new();
    let mut server = place.nbdkit(&["--filter=delay", "memory", "size=64M", "rdelay=30"]);
    run(async {
        let export = connect(&place.target(""), &[]).await.unwrap();
        let reads = futures::future::join_all((0..16).map(|i| export.read(i * 4096, 4096)));
        let kill = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            server.0.kill().unwrap();
        };
        let (results, ()) = tokio::join!(reads, kill);
        for result in results {
            assert_eq!(result.unwrap_err().kind(), NbdErrorKind::Disconnected);
        }
        assert_eq!(export.read(0, 4096).await.unwrap_err().kind(), NbdErrorKind::Disconnected);
    });
}

#[test]
fn silence_is_not_waited_for() {
    let place = Place::new();
    let _server = place.nbdkit(&["--filter=delay", "memory", "size=64M", "rdelay=30"]);
    run(async {
        let soon = Duration::from_millis(300);
        let options = ConnectOptions { reply_timeout: soon, ..options(&[]) };
        let export = Export::connect(&place.target(""), &options).await.unwrap();
        let error = export.read(8192, 4096).await.unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Timeout);
        assert!(error.to_string().contains("offset 8192"), "{error}");

        // A listener that never greets.
        let mute = place.path("mute");
        let _listener = std::os::unix::net::UnixListener::bind(&mute).unwrap();
        let target = fleece::nbd::NbdTarget::unix(&mute, "vda");
        let options = ConnectOptions { connect_timeout: soon, ..ConnectOptions::default() };
        let error = Export::connect(&target, &options).await.unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Timeout, "{error}");
    });
}

#[test]
fn exhausted_connections_leave_us_with_fewer() {
    let place = Place::new();
    // Three places, one of which we take first.
    let args = ["-r", "-e", "3", "--image-opts", "driver=null-co,size=1048576"];
    let _server = place.qemu_nbd(&args);
    run(async {
        let one = ConnectOptions { connections: 1, ..ConnectOptions::default() };
        let _first = Export::connect(&place.target("vda"), &one).await.unwrap();
        let four =
            ConnectOptions { connect_timeout: Duration::from_secs(2), ..ConnectOptions::default() };
        let export = Export::connect(&place.target("vda"), &four).await.unwrap();
        assert!((1..=2).contains(&export.connections()), "{}", export.connections());
        assert_eq!(export.read(0, 4096).await.unwrap().len(), 4096);
    });
}

#[test]
fn dropped_reads_keep_the_connection_in_step() {
    let place = Place::new();
    let _server = place.nbdkit(&["pattern", "size=16M"]);
    run(async {
        let one = ConnectOptions { connections: 1, ..ConnectOptions::default() };
        let export = Export::connect(&place.target(""), &one).await.unwrap();
        for i in 0..200u64 {
            let read = export.read(i * 4096, 256 * 1024);
            let tick = tokio::task::yield_now();
            tokio::select! { biased; _ = read => {}, () = tick => {} }
        }
        let got = export.read(1 << 20, 16).await.unwrap();
        let expect: Vec<u8> =
            [1u64 << 20, (1 << 20) + 8].iter().flat_map(|n| n.to_be_bytes()).collect();
        assert_eq!(&got[..], expect);
    });
}

#[test]
fn the_nbd_crate_serves_us() {
    let place = Place::new();
    let listener = std::os::unix::net::UnixListener::bind(place.socket()).unwrap();
    let data = noise(9, 3 * MIB as usize + 100);
    let content = data.clone();
    // It takes one client after the other: `look` and the connection itself.
    let server = std::thread::spawn(move || {
        for socket in listener.incoming().take(2) {
            let mut socket = socket.unwrap();
            let export: nbd::Export =
                nbd::Export { size: content.len() as u64, ..nbd::Export::default() };
            if nbd::server::handshake(&mut socket, |_| Ok(export)).is_ok() {
                let memory = std::io::Cursor::new(content.clone());
                let _ = nbd::server::transmission(&mut socket, memory);
            }
        }
    });
    run(async {
        let export = connect(&place.target("any"), &[]).await.unwrap();
        assert_eq!(export.connections(), 1);
        assert!(read_all(&export).await.unwrap() == data);
        export.write(4096, Bytes::from(vec![1; 4096])).await.unwrap();
        assert!(export.read(4096, 4096).await.unwrap().iter().all(|b| *b == 1));
    });
    server.join().unwrap();
}

#[test]
fn tcp_works_too() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap().to_string());
    let data = noise(8, MIB as usize);
    let content = data.clone();
    let server = std::thread::spawn(move || {
        for socket in listener.incoming().take(2) {
            let mut socket = socket.unwrap();
            let size = content.len() as u64;
            let export: nbd::Export =
                nbd::Export { size, readonly: true, ..nbd::Export::default() };
            if nbd::server::handshake(&mut socket, |_| Ok(export)).is_ok() {
                let memory = std::io::Cursor::new(content.clone());
                let _ = nbd::server::transmission(&mut socket, memory);
            }
        }
    });
    run(async {
        let target = fleece::nbd::NbdTarget { address, export: String::new() };
        let export = connect(&target, &[]).await.unwrap();
        assert!(read_all(&export).await.unwrap() == data);
    });
    server.join().unwrap();
}
