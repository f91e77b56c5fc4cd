//! Images that were lent: what is granted is read from them, and nothing wrong comes of them.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use super::*;
use crate::error::Error;
use crate::session::MAX_LENT;
use crate::session::write::MAX_IMAGES;

fn file_of(image: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(image).unwrap();
    file
}

impl Client {
    fn lend(&self, disk: u16, file: File) -> Result<bool> {
        self.call(|reply| Event::Lend { disk, file, alone: None, reply })
    }

    fn write_lent(&self, runs: &[GrantExtent]) -> Result<()> {
        self.call(|reply| Event::WriteLent { runs: runs.to_vec(), alone: None, reply })
    }

    /// Has everything read that is granted.
    fn write_all_lent(&self) -> Result<()> {
        loop {
            let grants = self.grants()?;
            for runs in grants.extents.chunks(7) {
                self.write_lent(runs)?;
            }
            if grants.done {
                return Ok(());
            }
        }
    }
}

#[test]
fn a_lent_image_is_read_by_the_session() {
    let host = Host::new();
    let full = image(11, 3000, 700);
    let client = host.begin(1, "", &full).unwrap();
    assert!(client.lend(0, file_of(&full)).unwrap());
    client.scan_all().unwrap();
    client.write_all_lent().unwrap();
    let manifest = client.commit().unwrap();
    host.must_restore(&manifest, &full);
    host.must_be_exact(&[&full]);

    // Long runs; and the file may end in the middle of the last block, which is padded.
    let long: Vec<u8> = (10_000..10_600).flat_map(block_of).collect();
    let mut padded = long[..long.len() - 1000].to_vec();
    padded.resize(long.len(), 0);
    let client = host.begin(2, "", &padded).unwrap();
    let (mut file, path) = tempfile::NamedTempFile::new().unwrap().into_parts();
    file.write_all(&padded[..long.len() - 1000]).unwrap();
    client.lend(0, file).unwrap();
    client.scan_all().unwrap();
    client.write_all_lent().unwrap();
    assert!(is_open(&path));
    let manifest = client.commit().unwrap();
    assert!(!is_open(&path), "it is closed before the answer");
    host.must_restore(&manifest, &padded);
    host.must_be_exact(&[&full, &padded]);
}

#[test]
fn blocks_may_come_either_way() {
    let host = Host::new();
    let image = image(12, 2000, 1500);
    let client = host.begin(1, "", &image).unwrap();
    client.lend(0, file_of(&image)).unwrap();
    client.scan_all().unwrap();
    loop {
        let grants = client.grants().unwrap();
        for (n, run) in grants.extents.iter().enumerate() {
            match n % 2 {
                0 => client.write_lent(&[*run]).unwrap(),
                _ => client.write(run.at, run.blocks.into()).unwrap(),
            }
        }
        if grants.done {
            break;
        }
    }
    host.must_restore(&client.commit().unwrap(), &image);
    host.must_be_exact(&[&image]);
}

fn is_open(path: &Path) -> bool {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(|target| target == path)
}

#[test]
fn a_session_has_so_many_images_and_gives_them_back() {
    let host = Host::new();
    let image = image(15, 10, 5);
    let mut request = request(1, "", image.len() as u64);
    let one = request.disks.remove(0);
    let disk = |n: u16| DiskSpec {
        uuid: DiskId(Uuid::from_u128(n.into())),
        name: format!("vd{n}"),
        ..one.clone()
    };
    request.disks = (0..=MAX_IMAGES as u16).map(disk).collect();
    let begun = begin(&host.context, request, 0).unwrap();
    let client = Client { begun, image, context: host.context.clone() };
    let mut paths = Vec::new();
    for disk in 0..=MAX_IMAGES as u16 {
        let (file, path) = tempfile::NamedTempFile::new().unwrap().into_parts();
        let taken = client.lend(disk, file).unwrap();
        assert_eq!(taken, usize::from(disk) < MAX_IMAGES, "{disk}");
        paths.push(path);
    }
    let open = || paths.iter().filter(|path| is_open(path)).count();
    assert_eq!(open(), MAX_IMAGES);
    client.call(|reply| Event::Abort { reason: "enough".into(), reply }).unwrap();
    assert_eq!(open(), 0, "they are closed before the answer");
}

/// What becomes of a session whose image is another one by the time of its writing.
fn with_another(other: File) -> Error {
    let host = Host::new();
    let image = image(13, 500, 400);
    let client = host.begin(1, "", &image).unwrap();
    client.lend(0, other).unwrap();
    client.scan_all().unwrap();
    let error = client.write_all_lent().unwrap_err();
    assert!(client.commit().is_err());
    client.die();
    // Nothing of it is in the way of the next one, which sends its blocks.
    wait_until("the session's end", || host.begin(1, "", &image).is_ok());
    let manifest = host.begin(2, "", &image).unwrap().run().unwrap();
    host.must_restore(&manifest, &image);
    host.must_be_clean();
    error
}

#[test]
fn an_image_that_changed_or_ended_or_cannot_be_read_ends_the_session() {
    let image = image(13, 500, 400);
    let mut changed = image.clone();
    changed[300 * BLOCK..400 * BLOCK].fill(7);
    for other in [&changed[..], &image[..250 * BLOCK], &[]] {
        let error = with_another(file_of(other));
        assert!(error.to_string().contains("is not what the scan saw"), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let error = with_another(File::create(dir.path().join("for writing only")).unwrap());
    let said = error.to_string();
    assert!(said.contains("cannot read") && said.contains("of vda"), "{said}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let image = image(14, 3000, 2500);
    let refused = |act: &dyn Fn(&Client) -> Result<()>| {
        let host = Host::new();
        let client = host.begin(1, "", &image).unwrap();
        client.scan_all().unwrap();
        assert!(!client.grants().unwrap().extents.is_empty());
        let error = act(&client).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error}");
        error.to_string()
    };
    let run = |disk, block, blocks| GrantExtent { at: Position { disk, block }, blocks };
    let said = refused(&|client| client.lend(1, file_of(&image)).map(drop));
    assert!(said.contains("disk number 1"), "{said}");
    let said = refused(&|client| client.lend(0, File::open("/").unwrap()).map(drop));
    assert!(said.contains("neither a file nor"), "{said}");
    let (read, _write) = std::io::pipe().unwrap();
    let read = std::sync::Mutex::new(Some(File::from(std::os::fd::OwnedFd::from(read))));
    let said = refused(&|client| client.lend(0, read.lock().unwrap().take().unwrap()).map(drop));
    assert!(said.contains("neither a file nor"), "{said}");
    let said = refused(&|client| client.write_lent(&[]));
    assert!(said.contains("no blocks"), "{said}");
    let said = refused(&|client| client.write_lent(&[run(0, 0, 1)]));
    assert!(said.contains("nothing was lent"), "{said}");
    let most = (MAX_LENT / BLOCK as u64) as u32;
    let lent = |client: &Client, runs: &[GrantExtent]| {
        client.lend(0, file_of(&image))?;
        client.write_lent(runs)
    };
    let said = refused(&|client| lent(client, &[run(0, 0, most), run(0, most.into(), 1)]));
    assert!(said.contains("at most"), "{said}");
    let said = refused(&|client| lent(client, &[run(0, 3000, 2)]));
    assert!(said.contains("not granted"), "{said}");
    let said = refused(&|client| lent(client, &[run(5, 0, 1)]));
    assert!(said.contains("nothing was lent"), "{said}");
}
