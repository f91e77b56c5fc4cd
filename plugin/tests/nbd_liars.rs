//! Servers that lie: every lie is an error that says so, never a panic, never wrong data.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod nbd_support;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use fleece::nbd::wire::{self, Info, Request, answer, chunk, errno, flag, option};
use fleece::nbd::{ConnectOptions, Export, NbdError, NbdErrorKind};
use nbd_support::*;

const SIZE: u64 = 1 << 20;

/// Says what to answer to a request.
type Script = fn(Request) -> Vec<u8>;

/// A server whose handshake is right and whose replies are the script's.
fn serve(listener: &UnixListener, script: Script) {
    for socket in listener.incoming() {
        let mut socket = socket.unwrap();
        if handshake(&mut socket, SIZE).is_some() {
            let mut head = [0; Request::LEN];
            while socket.read_exact(&mut head).is_ok() {
                let request = Request::decode(&head).unwrap();
                if request.command == wire::command::DISCONNECT {
                    return;
                }
                let reply = script(request);
                if reply.is_empty() || socket.write_all(&reply).is_err() {
                    break;
                }
            }
            return;
        }
    }
}

/// `Some` when the client has chosen, `None` when it has gone.
fn handshake(socket: &mut UnixStream, size: u64) -> Option<()> {
    greet(socket)?;
    loop {
        let (asked, payload) = next_option(socket)?;
        let mut say = |kind, payload: &[u8]| {
            socket.write_all(&wire::answer_message(asked, kind, payload)).ok()
        };
        match asked {
            option::INFO | option::GO => {
                let flags = flag::HAS_FLAGS | flag::READ_ONLY;
                say(answer::INFO, &Info::Export(size, flags).encode())?;
                say(answer::ACK, &[])?;
                if asked == option::GO {
                    return Some(());
                }
            }
            option::SET_META_CONTEXT => {
                let (_, names) = wire::decode_meta_queries(&payload).unwrap();
                for (id, name) in names.iter().enumerate() {
                    say(answer::META_CONTEXT, &wire::encode_meta_context(10 + id as u32, name))?;
                }
                say(answer::ACK, &[])?;
            }
            option::ABORT => return None,
            _ => say(answer::ACK, &[])?,
        }
    }
}

fn greet(socket: &mut UnixStream) -> Option<()> {
    let mut greeting = wire::GREETING_MAGIC.to_be_bytes().to_vec();
    greeting.extend(wire::OPTION_MAGIC.to_be_bytes());
    greeting.extend(3u16.to_be_bytes());
    socket.write_all(&greeting).ok()?;
    socket.read_exact(&mut [0; 4]).ok()
}

fn next_option(socket: &mut UnixStream) -> Option<(u32, Vec<u8>)> {
    let mut head = [0; wire::OPTION_HEAD];
    socket.read_exact(&mut head).ok()?;
    let (asked, length) = wire::decode_option_head(&head).unwrap();
    let mut payload = vec![0; length as usize];
    socket.read_exact(&mut payload).ok()?;
    Some((asked, payload))
}

/// Connects to a server that follows `script`, does one thing, and sees the server end.
fn with<T>(script: Script, contexts: &[&str], test: impl AsyncFnOnce(Export) -> T) -> T {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let server = std::thread::spawn(move || serve(&listener, script));
    let options = ConnectOptions { reply_timeout: Duration::from_secs(2), ..options(contexts) };
    let target = place.target("vda");
    let result = run(async { test(Export::connect(&target, &options).await.unwrap()).await });
    server.join().unwrap();
    result
}

fn read(script: Script) -> Result<Vec<u8>, NbdError> {
    with(script, &[], async |export| export.read(4096, 8192).await.map(|b| b.to_vec()))
}

fn status(script: Script) -> Result<Vec<(u64, u64)>, NbdError> {
    with(script, &["a", "b"], async |export| {
        let map = export.block_status("b", 4096, 8192).await?;
        Ok(map.iter().map(|e| (e.offset, e.length)).collect())
    })
}

fn part(done: bool, kind: u16, request: Request, length: u32, payload: &[u8]) -> Vec<u8> {
    let flags = if done { chunk::DONE } else { 0 };
    let mut out = wire::chunk_head(flags, kind, request.cookie, length).to_vec();
    out.extend(payload);
    out
}

fn data(done: bool, request: Request, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut payload = offset.to_be_bytes().to_vec();
    payload.extend(bytes);
    part(done, chunk::OFFSET_DATA, request, payload.len() as u32, &payload)
}

fn hole(done: bool, request: Request, offset: u64, length: u32) -> Vec<u8> {
    let mut payload = offset.to_be_bytes().to_vec();
    payload.extend(length.to_be_bytes());
    part(done, chunk::OFFSET_HOLE, request, 12, &payload)
}

fn error(done: bool, request: Request, number: u32) -> Vec<u8> {
    let payload = wire::encode_error(number, "so it is");
    part(done, chunk::ERROR, request, payload.len() as u32, &payload)
}

fn map(done: bool, request: Request, id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    for (length, flags) in extents {
        payload.extend(length.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    part(done, chunk::BLOCK_STATUS, request, payload.len() as u32, &payload)
}

#[test]
fn chunks_in_any_order_are_right() {
    let got = read(|r| {
        let mut out = hole(false, r, 8192, 4000);
        out.extend(data(false, r, 12192, &[2; 96]));
        out.extend(data(false, r, 4096, &[1; 4096]));
        out.extend(part(true, chunk::NONE, r, 0, &[]));
        out
    });
    let mut expect = vec![1; 4096];
    expect.extend([0; 4000]);
    expect.extend([2; 96]);
    assert_eq!(got.unwrap(), expect);
}

#[test]
fn lies_about_reads() {
    let lies: &[(&str, Script)] = &[
        ("magic", |_| vec![7; 64]),
        ("no request", |r| data(true, Request { cookie: r.cookie + 1, ..r }, 4096, &[0; 8192])),
        ("simple reply", |r| wire::simple_reply(0, r.cookie).to_vec()),
        ("gap", |r| data(true, r, 4096, &[1; 4096])),
        ("gap", |r| part(true, chunk::NONE, r, 0, &[])),
        ("twice", |r| [data(false, r, 4096, &[1; 8192]), hole(true, r, 4096, 1)].concat()),
        ("before its request", |r| data(true, r, 0, &[1; 8192])),
        ("past its request", |r| data(true, r, 4096, &[1; 8193])),
        ("past its request", |r| hole(true, r, 4096, u32::MAX)),
        ("past its request", |r| hole(true, r, u64::MAX, 1)),
        ("past its request", |r| {
            part(true, chunk::OFFSET_DATA, r, u32::MAX, &4096u64.to_be_bytes())
        }),
        ("without data", |r| part(true, chunk::OFFSET_DATA, r, 8, &4096u64.to_be_bytes())),
        ("no bytes", |r| hole(true, r, 4096, 0)),
        ("another request", |r| map(true, r, 10, &[(8192, 0)])),
        ("kind 9", |r| part(true, 9, r, 0, &[])),
        ("without end", |r| part(true, chunk::ERROR, r, u32::MAX, &[])),
        ("without an error", |r| error(true, r, 0)),
        ("cut short", |r| part(true, chunk::ERROR, r, 6, &[0, 0, 0, 5, 255, 255])),
        ("too short", |r| part(true, chunk::ERROR, r, 2, &[0, 0])),
    ];
    for (what, lie) in lies {
        let error = read(*lie).unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Protocol, "{what}: {error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
        assert!(error.to_string().contains("\"vda\""), "{error}");
    }
}

#[test]
fn lies_about_block_status() {
    let right: Script = |r| {
        let first = map(false, r, 11, &[(4096, 0), (4096, 0), (1 << 30, 3)]);
        [first, map(true, r, 10, &[(512, 1)])].concat()
    };
    assert_eq!(status(right).unwrap(), [(4096, 8192)]);
    let lies: &[(&str, Script)] = &[
        ("out", |r| map(true, r, 11, &[(8192, 0)])),
        ("another context", |r| map(true, r, 12, &[(8192, 0)])),
        ("another context", |r| {
            [map(false, r, 11, &[(9, 0)]), map(true, r, 11, &[(9, 0)])].concat()
        }),
        ("impossible length", |r| map(true, r, 11, &[])),
        ("impossible length", |r| part(true, chunk::BLOCK_STATUS, r, 7, &[0; 7])),
        ("without end", |r| part(true, chunk::BLOCK_STATUS, r, u32::MAX - 3, &[])),
        ("no bytes", |r| map(true, r, 11, &[(0, 0)])),
        ("not a read", |r| data(true, r, 4096, &[0; 8192])),
        ("out", |r| wire::simple_reply(0, r.cookie).to_vec()),
    ];
    for (what, lie) in lies {
        let error = status(*lie).unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Protocol, "{what}: {error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
}

#[test]
fn errors_are_typed_and_quoted() {
    for number in [errno::EINVAL, errno::ENOTSUP] {
        let script: Script = match number {
            errno::EINVAL => |r| error(true, r, errno::EINVAL),
            _ => |r| [error(false, r, errno::ENOTSUP), hole(true, r, 4096, 10)].concat(),
        };
        let error = read(script).unwrap_err();
        assert!(error.is_view_broken(), "{error}");
        assert!(error.to_string().contains("so it is"), "{error}");
        assert!(status(script).is_err());
    }
    let hangs_up = read(|_| Vec::new()).unwrap_err();
    assert_eq!(hangs_up.kind(), NbdErrorKind::Disconnected);
    let cut = read(|r| data(true, r, 4096, &[0; 8192])[..100].to_vec());
    // The server then waits for the next request, and we for the rest.
    assert_eq!(cut.unwrap_err().kind(), NbdErrorKind::Timeout);
}

/// A server that is wrong from its greeting on.
fn connect_to(server: impl FnOnce(UnixStream) + Send + 'static) -> NbdError {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let thread = std::thread::spawn(move || server(listener.accept().unwrap().0));
    let error = run(Export::connect(&place.target("vda"), &ConnectOptions::default())).unwrap_err();
    thread.join().unwrap();
    error
}

#[test]
fn lies_in_the_handshake() {
    type Lie = fn(&mut UnixStream, u32) -> Option<()>;
    let lies: &[(&str, Lie)] = &[
        ("another option", |s, asked| {
            s.write_all(&wire::answer_message(asked + 1, answer::ACK, &[])).ok()
        }),
        ("does not tell", |s, asked| {
            s.write_all(&wire::answer_message(asked, answer::ACK, &[])).ok()
        }),
        ("without end", |s, asked| {
            let mut head = wire::answer_message(asked, answer::INFO, &[]);
            head[16..].copy_from_slice(&u32::MAX.to_be_bytes());
            s.write_all(&head).ok()
        }),
        ("without end", |s, asked| {
            let info = wire::answer_message(asked, answer::INFO, &[0, 9]);
            (0..300).try_for_each(|_| s.write_all(&info).ok())
        }),
        ("too short", |s, asked| {
            let info = wire::answer_message(asked, answer::INFO, &[0]);
            s.write_all(&[info, wire::answer_message(asked, answer::ACK, &[])].concat()).ok()
        }),
        ("flags", |s, asked| export(s, asked, Info::Export(5, 0))),
        ("an export of", |s, asked| export(s, asked, Info::Export(u64::MAX, flag::HAS_FLAGS))),
        ("block sizes", |s, asked| export(s, asked, Info::BlockSize(3, 9, 9))),
    ];
    for (what, lie) in lies {
        let lie = *lie;
        let error = connect_to(move |mut socket| {
            greet(&mut socket).unwrap();
            let (asked, _) = next_option(&mut socket).unwrap();
            // The client may hang up before all is said.
            let _ = lie(&mut socket, asked);
        });
        assert_eq!(error.kind(), NbdErrorKind::Protocol, "{what}: {error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
    let error = connect_to(|mut socket| socket.write_all(b"220 smtp.example.com ESMTP").unwrap());
    assert!(error.to_string().contains("no NBD server"), "{error}");
    assert_eq!(connect_to(drop).kind(), NbdErrorKind::Disconnected);
}

fn export(socket: &mut UnixStream, asked: u32, info: Info) -> Option<()> {
    let mut out = Vec::new();
    if matches!(info, Info::BlockSize(..)) {
        let size = Info::Export(5, flag::HAS_FLAGS);
        out.extend(wire::answer_message(asked, answer::INFO, &size.encode()));
    }
    out.extend(wire::answer_message(asked, answer::INFO, &info.encode()));
    out.extend(wire::answer_message(asked, answer::ACK, &[]));
    socket.write_all(&out).ok()
}
