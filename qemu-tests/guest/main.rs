//! What runs in the test guest, as PID 1: obeys lines on ttyS0, answers each with `ok …` or
//! `err …`. Compiled by ci/setup with rustc alone: std only.
//!
//! write DEV OFFSET LENGTH SEED    content::block(SEED, offset / 4096) over the range, fsync
//! zero DEV OFFSET LENGTH          written zeros, fsync
//! trim DEV OFFSET LENGTH          discard
//! sum DEV OFFSET LENGTH           content::sum of what the guest reads there
//! record DEV                      the number of the record in the first block
//! start SEED BASE SPAN PAUSE_MS DEV…  a thread writes numbered records: record n to the first
//!                                 block and to a block of BASE..BASE+SPAN, on each disk in turn,
//!                                 with fsync after every disk
//! stop | count                    ends the writer | how many records it wrote; its error, if any
//! mount DEV | umount              ext4 at /mnt
//! file NAME LENGTH SEED           a file at /mnt, no fsync
//! shell COMMAND                   for looking into a guest that misbehaves
//! agent | sync | ping | poweroff

#[path = "../src/content.rs"]
#[allow(dead_code)]
mod content;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::str::SplitWhitespace;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use content::BLOCK;

type Answer = Result<String, Box<dyn std::error::Error>>;

#[derive(Default)]
struct Writer {
    written: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    error: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
}

fn main() {
    let _ = Command::new("/bin/busybox").args(["stty", "-F", "/dev/ttyS0", "raw", "-echo"]).status();
    let mut writer = Writer::default();
    let Ok(mut console) = OpenOptions::new().write(true).open("/dev/ttyS0") else { park() };
    let Ok(input) = File::open("/dev/ttyS0") else { park() };
    let _ = console.write_all(b"ready\n");
    for line in BufReader::new(input).lines() {
        let Ok(line) = line else { park() };
        let answer = match obey(&line, &mut writer) {
            Ok(text) => format!("ok {text}\n"),
            Err(error) => format!("err {line}: {error}\n"),
        };
        let _ = console.write_all(answer.as_bytes());
    }
    park()
}

/// PID 1 must not end.
fn park() -> ! {
    loop {
        thread::park();
    }
}

fn obey(line: &str, writer: &mut Writer) -> Answer {
    let mut words = line.split_whitespace();
    let verb = words.next().unwrap_or("");
    match verb {
        "ping" => Ok(String::new()),
        "write" => {
            let (disk, offset, length) = range(&mut words)?;
            let seed = number(&mut words)?;
            fill(&disk, offset, length, |index| content::block(seed, index))
        }
        "zero" => {
            let (disk, offset, length) = range(&mut words)?;
            fill(&disk, offset, length, |_| [0; BLOCK])
        }
        "trim" => {
            let (disk, offset, length) = range(&mut words)?;
            let (offset, length) = (offset.to_string(), length.to_string());
            busybox(&["blkdiscard", "-o", &offset, "-l", &length, &disk])
        }
        "sum" => {
            let (disk, offset, length) = range(&mut words)?;
            checksum(&disk, offset, length)
        }
        "record" => {
            let mut first = [0; BLOCK];
            File::open(device(words.next()))?.read_exact_at(&mut first, 0)?;
            Ok(content::record_number(&first).ok_or("no intact record")?.to_string())
        }
        "start" => start(writer, &mut words),
        "stop" => {
            writer.stop.store(true, Ordering::SeqCst);
            if let Some(thread) = writer.thread.take() {
                thread.join().map_err(|_| "the writer panicked")?;
            }
            count(writer)
        }
        "count" => count(writer),
        "mount" => busybox(&["mount", "-t", "ext4", &device(words.next()), "/mnt"]),
        "umount" => busybox(&["umount", "/mnt"]),
        "file" => {
            let name = words.next().ok_or("no name")?;
            let (length, seed) = (number(&mut words)?, number(&mut words)?);
            let mut file = File::create(format!("/mnt/{name}"))?;
            for index in 0..length / BLOCK as u64 {
                file.write_all(&content::block(seed, index))?;
            }
            Ok(String::new())
        }
        "agent" => agent(),
        "sync" => busybox(&["sync"]),
        "shell" => {
            let output = Command::new("/bin/sh").args(["-c", line.split_at(5).1]).output()?;
            let text = [output.stdout, output.stderr].concat();
            Ok(String::from_utf8_lossy(&text).replace('\n', " | "))
        }
        "poweroff" => busybox(&["poweroff", "-f"]),
        _ => Err("unknown command".into()),
    }
}

fn device(word: Option<&str>) -> String {
    format!("/dev/{}", word.unwrap_or(""))
}

fn number(words: &mut SplitWhitespace<'_>) -> Result<u64, Box<dyn std::error::Error>> {
    Ok(words.next().ok_or("a number is missing")?.parse()?)
}

fn range(words: &mut SplitWhitespace<'_>) -> Result<(String, u64, u64), Box<dyn std::error::Error>> {
    Ok((device(words.next()), number(words)?, number(words)?))
}

fn fill(disk: &str, offset: u64, length: u64, block: impl Fn(u64) -> [u8; BLOCK]) -> Answer {
    let file = OpenOptions::new().write(true).open(disk)?;
    let mut chunk = Vec::with_capacity(256 * BLOCK);
    let mut at = offset;
    while at < offset + length {
        chunk.clear();
        let end = (at + 256 * BLOCK as u64).min(offset + length);
        for place in (at..end).step_by(BLOCK) {
            chunk.extend_from_slice(&block(place / BLOCK as u64));
        }
        chunk.truncate((end - at) as usize);
        file.write_all_at(&chunk, at)?;
        at = end;
    }
    file.sync_all()?;
    Ok(String::new())
}

fn checksum(disk: &str, offset: u64, length: u64) -> Answer {
    let file = File::open(disk)?;
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(content::sum(&bytes).to_string())
}

fn start(writer: &mut Writer, words: &mut SplitWhitespace<'_>) -> Answer {
    if writer.thread.is_some() {
        return Err("the writer runs already".into());
    }
    let (seed, base, span, pause) = (number(words)?, number(words)?, number(words)?, number(words)?);
    let disks = words
        .map(|name| OpenOptions::new().write(true).open(device(Some(name))))
        .collect::<Result<Vec<_>, _>>()?;
    writer.stop.store(false, Ordering::SeqCst);
    let (stop, written, error) = (writer.stop.clone(), writer.written.clone(), writer.error.clone());
    writer.thread = Some(thread::spawn(move || {
        while !stop.load(Ordering::SeqCst) {
            let number = written.load(Ordering::SeqCst) + 1;
            let record = content::record(seed, number);
            let place = base + content::mix(seed ^ number) % (span / BLOCK as u64) * BLOCK as u64;
            for disk in &disks {
                let done = disk
                    .write_all_at(&record, place)
                    .and_then(|()| disk.write_all_at(&record, 0))
                    .and_then(|()| disk.sync_data());
                if let Err(failure) = done {
                    *error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) =
                        Some(format!("record {number}: {failure}"));
                    return;
                }
            }
            written.store(number, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(pause));
        }
    }));
    Ok(String::new())
}

fn count(writer: &Writer) -> Answer {
    let error = writer.error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    match error {
        Some(error) => Err(error.into()),
        None => Ok(writer.written.load(Ordering::SeqCst).to_string()),
    }
}

/// Starts the guest agent on the only virtio-serial port.
fn agent() -> Answer {
    let port = std::fs::read_dir("/dev")?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|name| name.starts_with("vport"))
        .ok_or("no virtio-serial port")?;
    Command::new("/bin/qemu-ga")
        .args(["-m", "virtio-serial", "-p", &format!("/dev/{port}"), "-t", "/run", "-f", "/run/qga.pid"])
        .spawn()?;
    Ok(String::new())
}

fn busybox(arguments: &[&str]) -> Answer {
    let output = Command::new("/bin/busybox").args(arguments).output()?;
    if output.status.success() {
        Ok(String::new())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ").into())
    }
}
