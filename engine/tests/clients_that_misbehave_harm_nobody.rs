//! Clients that no program of ours is: they call in the wrong order, lie, flood, say nothing, stop
//! reading. Each is told or cut off, the engine's memory stays bounded, and others are served.
#![allow(clippy::unwrap_used)]

mod rpc_support;

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rpc_support::{BLOCK, Client, Engine, MIB, SOON, image, on_local, scan, submit, write};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What one client may add to the engine's anonymous memory for a while: 4 MiB of calls, 8 MiB of
/// answers, answers in the making, and what the allocator keeps of them.
const ONE_CLIENT: u64 = 24 * MIB;

/// The error of a call, which must be one of ours.
fn refusal<T>(outcome: Result<T, capnp::Error>, kind: &str) -> String {
    let Err(error) = outcome else { panic!("it was not refused") };
    assert!(error.extra.contains(&format!("fleece:{kind}: ")), "{error}");
    error.extra
}

/// Opens a session, breaks it, and sees that it never commits.
async fn broken<T>(
    engine: &Engine,
    kind: &str,
    says: &str,
    misbehave: impl AsyncFn(
        &fleece_schema::engine_capnp::backup_session::Client,
    ) -> Result<T, capnp::Error>,
) {
    let client = Client::connect(engine).await;
    let (_, session) = client.open(9, 100).await.unwrap();
    let told = match misbehave(&session).await {
        // A streaming call is answered by the next one.
        Ok(_) => refusal(session.grants_request().send().promise.await, kind),
        outcome => refusal(outcome, kind),
    };
    assert!(told.contains(says), "no '{says}' in: {told}");
    assert!(session.commit_request().send().promise.await.is_err(), "a broken session committed");
    drop(client);
    let begun = Instant::now();
    while engine.fleecectl(&["sessions"]).stdout != b"no backup runs\n" {
        assert!(begun.elapsed() < SOON, "the session of a client that is gone lives on");
        // Its end of the socket is closed by the same thread.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn wrong_orders_wrong_counts_and_lies_are_told_so() {
    let engine = Engine::start();
    on_local(async {
        let one = |byte| [byte; 20];
        broken(&engine, "usage", "", async |s| s.commit_request().send().promise.await).await;
        broken(&engine, "usage", "granted", async |s| write(s, 0, &[1; BLOCK]).await).await;
        broken(&engine, "usage", "whole blocks", async |s| write(s, 0, &[1; 100]).await).await;
        broken(&engine, "usage", "at most", async |s| write(s, 0, &[1; 600 << 10]).await).await;
        broken(&engine, "usage", "beyond its end", async |s| {
            submit(s, 0, &[(99, 2, true)], &[]).await
        })
        .await;
        broken(&engine, "usage", "beyond its end", async |s| {
            submit(s, 0, &[(u64::MAX, u32::MAX, true)], &[]).await
        })
        .await;
        broken(&engine, "usage", "are missing", async |s| submit(s, 0, &[(5, 1, true)], &[]).await)
            .await;
        broken(&engine, "usage", "no disk number 7", async |s| {
            submit(s, 7, &[(0, 1, true)], &[]).await
        })
        .await;
        broken(&engine, "usage", "no blocks", async |s| submit(s, 0, &[(0, 0, true)], &[]).await)
            .await;
        broken(&engine, "usage", "fingerprints for", async |s| {
            submit(s, 0, &[(0, 2, false)], &one(1)).await
        })
        .await;
        broken(&engine, "usage", "cut short", async |s| {
            submit(s, 0, &[(0, 1, false)], &[1; 19]).await
        })
        .await;
        broken(&engine, "usage", "scan's end", async |s| {
            s.end_scan_request().send().promise.await?;
            submit(s, 0, &[(0, 1, false)], &one(1)).await
        })
        .await;
        // The fingerprint of another block, and a block that was never granted.
        broken(&engine, "failed", "not what the scan saw", async |s| {
            scan(&engine, s, &image(9, 100)).await?;
            s.end_scan_request().send().promise.await?;
            s.grants_request().send().promise.await?;
            write(s, 0, &[0x55; BLOCK]).await
        })
        .await;
        engine.serves_others(1).await;
    });
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let engine = Engine::start();
    on_local(async {
        let client = Client::connect(&engine).await;
        let mut hello = client.engine.hello_request();
        hello.get().set_protocol(77);
        let told = refusal(hello.send().promise.await, "usage");
        assert!(told.contains("protocol 77"), "{told}");

        for (disks, name, vm, config) in [
            (0_u32, "vm".to_owned(), 16_usize, 0_usize),
            (257, "vm".to_owned(), 16, 0),
            (2, "vm".to_owned(), 16, 0),
            (1, "n".repeat(2000), 16, 0),
            (1, String::new(), 16, 0),
            (1, "vm".to_owned(), 5, 0),
            (1, "vm".to_owned(), 16, 300 << 10),
        ] {
            let mut request = client.engine.open_backup_request();
            let mut params = request.get().init_request();
            params.set_vm(&vec![1; vm]);
            params.set_vm_name(&name);
            params.set_config(&vec![1; config]);
            let mut list = params.init_disks(disks);
            for i in 0..disks {
                list.reborrow().get(i).set_uuid(&[7; 16]);
                list.reborrow().get(i).set_name("twice");
            }
            refusal(request.send().promise.await, "usage");
        }
        let mut settle = client.engine.settle_request();
        settle.get().set_vm(&[1; 16]);
        settle.get().init_snapshots(5000);
        refusal(settle.send().promise.await, "usage");
        for (name, kind) in [("no id", "usage"), ("", "usage"), ("abc234", "not-found")] {
            let mut resume = client.engine.resume_backup_request();
            resume.get().set_snapshot(name);
            let mut params = resume.get().init_request();
            params.set_vm(&[1; 16]);
            params.set_vm_name("vm");
            refusal(resume.send().promise.await, kind);
        }
        let (_, _session) = client.open(3, 10).await.unwrap();
        let other = Client::connect(&engine).await;
        refusal(other.open(3, 10).await, "busy");
        engine.serves_others(1).await;
    });
}

#[test]
fn sessions_that_are_never_closed_keep_nobody_out_for_ever() {
    let engine = Engine::start();
    on_local(async {
        let greedy = Client::connect(&engine).await;
        let mut sessions = Vec::new();
        while let Ok(session) = tokio::time::timeout(
            Duration::from_secs(2),
            greedy.open(sessions.len() as u8 + 100, 10),
        )
        .await
        {
            sessions.push(session.unwrap());
        }
        println!("{} sessions at once", sessions.len());
        assert!(sessions.len() >= 4 && sessions.len() <= 64);
        // Others wait before their point in time, and everything else goes on.
        let patient = Client::connect(&engine).await;
        let waiting = patient.open(1, 10);
        let waited = tokio::time::timeout(Duration::from_secs(1), Box::pin(waiting)).await;
        assert!(waited.is_err(), "admission is not bounded");
        assert!(engine.fleecectl(&["status"]).status.success());
        // Who waited and left keeps no place; one that dies gives up what it had.
        drop(patient);
        drop(greedy);
        engine.serves_others(1).await;
    });
}

#[test]
fn thousands_of_silent_connections_keep_nobody_out() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let engine = Engine::start();
    on_local(async {
        engine.serves_others(1).await;
        let before = engine.anonymous();
        let mut silent = Vec::new();
        for number in 0..3000 {
            match UnixStream::connect(engine.socket()) {
                Ok(mut stream) => {
                    // Every third begins a message and never ends it.
                    if number % 3 == 0 {
                        let _ = stream.write_all(&[0, 0, 0, 0, 255, 0, 0, 0]);
                    }
                    silent.push(stream);
                }
                // The backlog is full for a moment, or we have no more descriptors.
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
        assert!(silent.len() > 700, "only {} connections", silent.len());
        engine.serves_others(2).await;
        let begun = Instant::now();
        while engine.open_files() > 400 {
            assert!(begun.elapsed() < SOON, "{} files open", engine.open_files());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let grown = engine.anonymous().saturating_sub(before);
        println!("{} connections: {} KiB more", silent.len(), grown >> 10);
        assert!(grown < 16 * MIB, "{grown} bytes more than before");
        drop(silent);
        engine.serves_others(3).await;
    });
}

#[test]
fn messages_that_are_too_long_or_no_messages_end_their_connection_only() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let engine = Engine::start();
    on_local(async {
        engine.serves_others(1).await;
        let before = engine.anonymous();
        // One segment of 1 GiB, a million segments, then noise.
        let mut frames = vec![vec![0, 0, 0, 0, 0, 0, 0, 8], vec![0xff, 0xff, 0x0f, 0, 1, 0, 0, 0]];
        for _ in 0..200 {
            let length = random.random_range(1..4096);
            frames.push((0..length).map(|_| random.random()).collect());
        }
        for frame in frames {
            let mut stream = UnixStream::connect(engine.socket()).unwrap();
            // It may be cut off while it still writes.
            let _ = stream.write_all(&frame);
        }
        engine.serves_others(2).await;
        let grown = engine.anonymous().saturating_sub(before);
        assert!(grown < 16 * MIB, "{grown} bytes more than before");
    });
}

#[test]
fn a_flood_of_calls_is_cut_off() {
    let engine = Engine::start();
    on_local(async {
        engine.serves_others(1).await;
        let before = engine.anonymous();
        let client = Client::connect(&engine).await;
        // Some begin, all others wait for a place, and nothing makes us wait but ourselves.
        let calls: Vec<_> = (10..210_u8)
            .map(|vm| {
                let mut request = client.engine.open_backup_request();
                let mut params = request.get().init_request();
                params.set_vm(&[vm; 16]);
                params.set_vm_name(format!("vm{vm}"));
                params.set_config(&vec![1; 250 << 10]);
                let mut disk = params.init_disks(1).get(0);
                disk.set_uuid(&[vm; 16]);
                disk.set_name("vda");
                request.send().promise
            })
            .collect();
        let peak = peak_until(&engine, futures::future::join_all(calls)).await;
        println!("peak {} KiB more", peak.saturating_sub(before) >> 10);
        assert!(peak < before + ONE_CLIENT, "{peak} bytes, {before} before");
        drop(client);
        engine.serves_others(2).await;
    });
}

#[test]
fn files_that_nobody_wants_or_can_write_to() {
    let engine = Engine::start();
    on_local(async {
        engine.serves_others(1).await;
        let before = engine.open_files();
        let truth = image(1, 600);
        let client = Client::connect(&engine).await;
        // As it should be: into the file, and no data besides.
        let file = tempfile::NamedTempFile::new().unwrap();
        client.files.borrow_mut().push(file.reopen().unwrap());
        let sent = client.streamed(1, "latest", 1).await.unwrap();
        assert!(sent.iter().all(|byte| *byte == 0) && !sent.is_empty());
        let mut written = std::fs::read(file.path()).unwrap();
        written.resize(truth.len(), 0);
        assert!(written == truth, "the restored file differs");
        // One that never came: data is sent, as to any client without a file.
        assert!(client.streamed(1, "latest", 7).await.unwrap() == truth);
        // One that cannot be written to, and one that may take for ever.
        client.files.borrow_mut().push(File::open(file.path()).unwrap());
        let told = refusal(client.streamed(1, "latest", 2).await, "failed");
        assert!(told.contains("cannot write to the target at"), "{told}");
        let (_reader, pipe) = std::io::pipe().unwrap();
        client.files.borrow_mut().push(File::from(OwnedFd::from(pipe)));
        let told = refusal(client.streamed(1, "latest", 3).await, "usage");
        assert!(told.contains("neither a regular file nor a block device"), "{told}");
        // More than wait for calls end the connection, and none of them stays.
        client.files.borrow_mut().extend((0..20).map(|_| file.reopen().unwrap()));
        let told = client.engine.status_request().send().promise.await.map(drop).unwrap_err();
        assert!(told.extra.contains("files wait for a call"), "{told}");
        lets_go(&engine, before, "files of a client that is gone stay open").await;
        engine.serves_others(2).await;
    });
}

/// Lends a file for a disk; whether it was taken.
async fn lend(
    session: &fleece_schema::engine_capnp::backup_session::Client,
    disk: u16,
    file: u32,
) -> Result<bool, capnp::Error> {
    let mut request = session.lend_request();
    request.get().set_disk(disk);
    request.get().set_file(file);
    Ok(request.send().promise.await?.get()?.get_taken())
}

/// Has granted blocks read from what was lent.
async fn write_lent(
    session: &fleece_schema::engine_capnp::backup_session::Client,
    (disk, first, blocks): (u16, u64, u32),
) -> Result<(), capnp::Error> {
    let mut request = session.write_lent_request();
    let mut run = request.get().init_runs(1).get(0);
    run.set_disk(disk);
    run.set_first_block(first);
    run.set_blocks(blocks);
    request.send().promise.await.map(drop)
}

#[test]
fn images_that_are_lent_and_are_not_the_disk() {
    let engine = Engine::start();
    on_local(async {
        engine.serves_others(1).await;
        let before = engine.open_files();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&image(9, 100)).unwrap();
        // As it should be; and one that never came, which is no reason to end.
        let client = Client::connect(&engine).await;
        let (_, session) = client.open(8, 100).await.unwrap();
        assert!(!lend(&session, 0, 7).await.unwrap());
        client.files.borrow_mut().push(file.try_clone().unwrap());
        assert!(lend(&session, 0, 1).await.unwrap());
        scan(&engine, &session, &image(9, 100)).await.unwrap();
        session.end_scan_request().send().promise.await.unwrap();
        let answer = session.grants_request().send().promise.await.unwrap();
        for grant in answer.get().unwrap().get_extents().unwrap() {
            let run = (0, grant.get_first_block(), grant.get_blocks());
            write_lent(&session, run).await.unwrap();
        }
        session.commit_request().send().promise.await.unwrap();
        drop((answer, session, client));
        lets_go(&engine, before, "an image that was lent stays open").await;
        broken(&engine, "usage", "nothing was lent", async |s| write_lent(s, (0, 0, 1)).await)
            .await;
        broken(&engine, "usage", "nothing was lent", async |s| write_lent(s, (9, 0, 1)).await)
            .await;
        broken(&engine, "usage", "no blocks", async |s| write_lent(s, (0, 0, 0)).await).await;
        broken(&engine, "usage", "at most", async |s| write_lent(s, (0, 0, u32::MAX)).await).await;
        broken(&engine, "usage", "runs to be read", async |s| {
            let mut request = s.write_lent_request();
            request.get().init_runs(2000);
            request.send().promise.await.map(drop)?;
            Ok(())
        })
        .await;
        engine.serves_others(2).await;
    });
}

#[test]
fn a_client_that_stops_reading_is_not_waited_for() {
    let engine = Engine::start();
    on_local(async {
        engine.serves_others(1).await;
        let before = engine.anonymous();
        let client = Client::connect(&engine).await;
        let disk = client.disk(1, "latest").await;
        client.deaf.set(true);
        let reads: Vec<_> = (0..500)
            .map(|_| {
                let mut read = disk.read_request();
                read.get().set_length(512 << 10);
                read.send().promise
            })
            .collect();
        let some_time =
            tokio::time::timeout(Duration::from_secs(3), futures::future::join_all(reads));
        let peak = peak_until(&engine, some_time).await;
        println!("peak {} KiB more", peak.saturating_sub(before) >> 10);
        assert!(peak < before + ONE_CLIENT, "{peak} bytes, {before} before");
        engine.serves_others(2).await;
        drop(client);
        engine.serves_others(3).await;
    });
}

#[test]
fn small_calls_without_end_are_cut_off() {
    let engine = Engine::start();
    on_local(async {
        engine.serves_others(1).await;
        let before = (engine.anonymous(), engine.open_files());
        let client = Client::connect(&engine).await;
        client.deaf.set(true);
        let call = |_| client.engine.sessions_request().send().promise;
        let calls = futures::future::join_all((0..20_000).map(call));
        let some_time = tokio::time::timeout(Duration::from_secs(3), calls);
        let peak = peak_until(&engine, some_time).await;
        println!("peak {} KiB more", peak.saturating_sub(before.0) >> 10);
        assert!(peak < before.0 + ONE_CLIENT, "{peak} bytes, {} before", before.0);
        // Its connection ends although it does not listen.
        lets_go(&engine, before.1, "the engine still keeps this client").await;
        engine.serves_others(2).await;
        drop(client);
    });
}

/// Waits until the engine has as few files open as it had.
async fn lets_go(engine: &Engine, before: usize, otherwise: &str) {
    let begun = Instant::now();
    while engine.open_files() > before {
        assert!(begun.elapsed() < SOON, "{otherwise}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The most anonymous memory of the engine while something is waited for.
async fn peak_until(engine: &Engine, work: impl Future) -> u64 {
    tokio::pin!(work);
    let mut peak = 0;
    loop {
        tokio::select! {
            _ = &mut work => return peak.max(engine.anonymous()),
            () = tokio::time::sleep(Duration::from_millis(5)) => {
                peak = peak.max(engine.anonymous());
            }
        }
    }
}
