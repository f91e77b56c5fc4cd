//! The seeds: what real peers say, written down, and tried in every run of the tests.
//!
//! `FLEECE_WRITE_SEEDS=1 cargo test -p fleece --lib fuzzing` writes them anew. What a fuzzer
//! found is kept beside them under a name of its own.

use std::path::PathBuf;
use std::{env, fs};

use serde_json::json;

use crate::engine::fuzzing::seeds::answers as real_answers;
use crate::nbd::fuzzing::BITMAP;
use crate::nbd::wire::{
    self, GREETING_MAGIC, Info, OPTION_MAGIC, Request, answer, chunk, command, flag, option,
};
use crate::qmp::command::ALL;

type Seeds = Vec<(&'static str, Vec<u8>)>;

/// A target's name, and what it does with an input.
type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 4] = [
    ("nbd_client", super::nbd_client),
    ("nbd_server", super::nbd_server),
    ("qmp", super::qmp),
    ("answers", super::answers),
];

fn folder(target: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "fuzz/seeds", target].iter().collect()
}

#[test]
fn every_seed_is_taken_or_refused() {
    for (name, target) in TARGETS {
        let mut tried = 0;
        for entry in fs::read_dir(folder(name)).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            target(&fs::read(path).unwrap());
            tried += 1;
        }
        assert!(tried > 0, "{name} has no seeds");
    }
}

#[test]
fn seeds_are_made_of_what_peers_say() {
    let made: [Seeds; 4] = [servers(), clients(), monitors(), real_answers()];
    for ((name, target), seeds) in TARGETS.into_iter().zip(made) {
        for (seed, bytes) in seeds {
            println!("{name}/{seed}");
            target(&bytes);
            if env::var_os("FLEECE_WRITE_SEEDS").is_some() {
                fs::create_dir_all(folder(name)).unwrap();
                fs::write(folder(name).join(seed), &bytes).unwrap();
            }
        }
    }
}

/// The handshake of a server of a disk of 1 MiB.
fn handshake(contexts: &[&str], structured: bool) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(GREETING_MAGIC.to_be_bytes());
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(3_u16.to_be_bytes());
    let kind = if structured { answer::ACK } else { answer::UNSUPPORTED };
    out.extend(wire::answer_message(option::STRUCTURED_REPLY, kind, &[]));
    for (id, context) in (1_u32..).zip(contexts) {
        let payload = [&id.to_be_bytes()[..], context.as_bytes()].concat();
        out.extend(wire::answer_message(option::SET_META_CONTEXT, answer::META_CONTEXT, &payload));
    }
    out.extend(wire::answer_message(option::SET_META_CONTEXT, answer::ACK, &[]));
    let flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES;
    for info in [Info::Export(1 << 20, flags), Info::BlockSize(1, 4096, 32 << 20)] {
        out.extend(wire::answer_message(option::GO, answer::INFO, &info.encode()));
    }
    out.extend(wire::answer_message(option::GO, answer::ACK, &[]));
    out
}

fn piece(flags: u16, kind: u16, cookie: u64, parts: &[&[u8]]) -> Vec<u8> {
    let payload = parts.concat();
    let head = wire::chunk_head(flags, kind, cookie, payload.len() as u32);
    [&head[..], &payload].concat()
}

fn servers() -> Seeds {
    let both = [wire::BASE_ALLOCATION, BITMAP];
    let status = |id: u32, extents: &[(u32, u32)]| {
        let list = extents.iter().flat_map(|(l, f)| [l.to_be_bytes(), f.to_be_bytes()].concat());
        [&id.to_be_bytes()[..], &list.collect::<Vec<_>>()].concat()
    };
    let mut structured = handshake(&both, true);
    structured.extend(piece(0, chunk::OFFSET_DATA, 0, &[&0_u64.to_be_bytes(), &[5; 1024]]));
    let hole = [&1024_u64.to_be_bytes()[..], &3072_u32.to_be_bytes()].concat();
    structured.extend(piece(chunk::DONE, chunk::OFFSET_HOLE, 0, &[&hole]));
    let whole = [&4096_u64.to_be_bytes()[..], &65536_u32.to_be_bytes()].concat();
    structured.extend(piece(chunk::DONE, chunk::OFFSET_HOLE, 1, &[&whole]));
    let maps = status(1, &[(4096, 0), (1 << 19, 3)]);
    structured.extend(piece(0, chunk::BLOCK_STATUS, 2, &[&maps]));
    let dirty = status(2, &[(65536, 1), (65536, 0)]);
    structured.extend(piece(chunk::DONE, chunk::BLOCK_STATUS, 2, &[&dirty]));
    for cookie in 3..12 {
        structured.extend(wire::simple_reply(0, cookie));
    }
    let mut failing = handshake(&both, true);
    let error = [&5_u32.to_be_bytes()[..], &3_u16.to_be_bytes(), b"bad", &9_u64.to_be_bytes()];
    failing.extend(piece(chunk::DONE, chunk::ERROR_OFFSET, 0, &[&error.concat()]));
    failing.extend(piece(chunk::DONE, chunk::NONE, 1, &[]));
    let mut simple = handshake(&both[..1], false);
    simple.extend([&wire::simple_reply(0, 0)[..], &[3; 4096]].concat());
    simple.extend(wire::simple_reply(5, 1));
    let with = |how: u8, bytes: Vec<u8>| [&[how][..], &bytes].concat();
    vec![
        ("structured", with(1, structured)),
        ("errors", with(1, failing)),
        ("simple", with(0, simple)),
    ]
}

fn clients() -> Seeds {
    let request = |command, offset, length| {
        Request { flags: 0, command, cookie: 9, offset, length }.encode().to_vec()
    };
    let go = wire::option_message(option::GO, &wire::encode_go("vda", &[wire::info::BLOCK_SIZE]));
    let query = wire::encode_meta_queries("vda", &[wire::BASE_ALLOCATION]);
    let reads = [
        3_u32.to_be_bytes().to_vec(),
        wire::option_message(option::STRUCTURED_REPLY, &[]),
        wire::option_message(option::SET_META_CONTEXT, &query),
        go.clone(),
        request(command::READ, 4096, 65536),
        request(command::BLOCK_STATUS, 0, 1 << 20),
        request(command::READ, (1 << 20) - 512, 1024),
        request(command::FLUSH, 0, 0),
        request(command::DISCONNECT, 0, 0),
    ];
    let plain = [
        3_u32.to_be_bytes().to_vec(),
        wire::option_message(option::LIST, &[]),
        wire::option_message(option::INFO, &wire::encode_go("vda", &[])),
        wire::option_message(option::EXPORT_NAME, b"vda"),
        request(command::READ, 0, 4096),
        request(command::WRITE, 0, 4),
        vec![1; 4],
    ];
    vec![("reads", reads.concat()), ("plain", plain.concat())]
}

fn monitors() -> Seeds {
    let greeting = json!({"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7},
        "package": ""}, "capabilities": ["oob"]}});
    let mut schema: Vec<_> =
        ALL.iter().map(|name| json!({"name": name, "meta-type": "command"})).collect();
    schema.push(json!({"name": "1", "meta-type": "enum", "values": ["snapshot-access",
        "copy-before-write"]}));
    let node = |name: &str, driver: &str| {
        json!({"node-name": name, "drv": driver, "ro": false, "file": "/vda.qcow2",
        "image": {"virtual-size": 1 << 20, "actual-size": 4096,
            "format-specific": {"type": "qcow2", "data": {"compat": "1.1"}}},
        "dirty-bitmaps": [{"name": "fleece:00000000-0000-0000-0000-000000000000:abc234:00000000-0000-0000-0000-000000000001",
            "count": 65536, "granularity": 65536, "recording": true, "busy": false,
            "persistent": true}]})
    };
    let (top, disk) = (node("top", "copy-on-read"), node("disk", "qcow2"));
    let block = json!([{"device": "", "qdev": "vda", "removable": false, "inserted": top}]);
    let graph = json!({"nodes": [{"id": 1, "type": "block-driver", "name": "top"},
        {"id": 2, "type": "block-driver", "name": "disk"}],
        "edges": [{"parent": 1, "child": 2, "name": "file"}]});
    let event = json!({"timestamp": {"seconds": 1, "microseconds": 2},
        "event": "BLOCK_IO_ERROR", "data": {"device": "vda"}});
    let returned = |value: serde_json::Value| json!({ "return": value });
    let missing = json!({"error": {"class": "GenericError", "desc": "no such property"}});
    let lines = [
        greeting,
        returned(json!({})),
        returned(json!(schema)),
        returned(json!({"UUID": "5f0c7b50-6f0c-4e0b-9c1c-8f9f6b1f0001"})),
        returned(json!({"name": "web1"})),
        returned(block.clone()),
        event,
        returned(json!([top, disk])),
        returned(graph),
        missing.clone(),
        missing,
        returned(json!([{"label": "qga0", "filename": "unix:/qga,server=on",
            "frontend-open": true}])),
        returned(block),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
    let agent = b"\xff{\"return\": 7}\n{\"return\": 2}\n{\"return\": \"frozen\"}\n{\"error\": {\"desc\": \"no\"}}\n";
    vec![("monitor", [&[0][..], text.as_bytes()].concat()), ("agent", [&[1][..], agent].concat())]
}
