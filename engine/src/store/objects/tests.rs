//! Objects in a real directory: created once, whole or not at all, swept after a kill.

use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;

fn objects() -> (tempfile::TempDir, Objects) {
    let dir = tempfile::tempdir().unwrap();
    let objects = Objects::local(dir.path()).unwrap();
    (dir, objects)
}

#[test]
fn an_object_is_created_once() {
    let (dir, objects) = objects();
    assert_eq!(objects.create("a/b/c", &b"one"[..]).unwrap(), Created::Ours);
    // As after an answer that was lost: the same bytes are ours.
    assert_eq!(objects.create("a/b/c", &b"one"[..]).unwrap(), Created::Ours);
    for other in [&b"two"[..], b"longer", b"o", b""] {
        assert_eq!(objects.create("a/b/c", other).unwrap(), Created::Exists);
    }
    assert_eq!(objects.read_all("a/b/c", 3).unwrap(), &b"one"[..]);
    assert_eq!(fs::read(dir.path().join("a/b/c")).unwrap(), b"one");
    assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1, "nothing staged is left");
}

#[test]
fn what_is_written_across_a_network_is_there_whole_and_once() {
    let objects = Objects::in_memory().unwrap();
    let mut writer = objects.writer("a/b").unwrap();
    writer.write(Bytes::from_static(b"one ")).unwrap();
    writer.write(Bytes::from_static(b"two")).unwrap();
    assert!(!objects.exists("a/b").unwrap(), "nothing is there before the end");
    assert_eq!(writer.finish().unwrap(), 7);
    assert_eq!(objects.read_all("a/b", 7).unwrap(), &b"one two"[..]);
    // Another's bytes stay; the same ones are ours.
    for (bytes, written) in [(&b"three"[..], false), (b"one two", true)] {
        let mut writer = objects.writer("a/b").unwrap();
        writer.write(Bytes::from_static(bytes)).unwrap();
        assert_eq!(writer.finish().is_ok(), written);
        assert_eq!(objects.read_all("a/b", 7).unwrap(), &b"one two"[..]);
    }
    let empty = objects.writer("empty").unwrap();
    assert_eq!(empty.finish().unwrap(), 0);
    drop(objects.writer("never").unwrap());
    assert!(!objects.exists("never").unwrap());
}

#[test]
fn of_many_creators_one_wins() {
    let (_dir, objects) = objects();
    let winners: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8_u8)
            .map(|n| {
                let objects = objects.clone();
                scope
                    .spawn(move || objects.create("commit", vec![n; 100]).unwrap() == Created::Ours)
            })
            .collect();
        threads.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
    });
    assert_eq!(winners, 1);
}

#[test]
fn a_written_object_appears_whole_at_its_end_or_never() {
    let (dir, objects) = objects();
    let mut writer = objects.writer("containers/x/1").unwrap();
    for n in 0..10_u8 {
        writer.write(Bytes::from(vec![n; 1000])).unwrap();
    }
    assert!(!objects.exists("containers/x/1").unwrap());
    assert_eq!(writer.finish().unwrap(), 10_000);
    let bytes = objects.read_all("containers/x/1", 10_000).unwrap();
    assert!(
        bytes.chunks(1000).enumerate().all(|(n, chunk)| chunk.iter().all(|b| usize::from(*b) == n))
    );

    let mut dropped = objects.writer("containers/x/2").unwrap();
    dropped.write(Bytes::from_static(b"half")).unwrap();
    drop(dropped);
    assert!(!objects.exists("containers/x/2").unwrap());
    assert_eq!(fs::read_dir(dir.path().join("containers/x")).unwrap().count(), 1);

    let mut late = objects.writer("containers/x/1").unwrap();
    late.write(Bytes::from_static(b"other")).unwrap();
    assert!(late.finish().unwrap_err().to_string().contains("never overwritten"));
    assert_eq!(objects.size("containers/x/1").unwrap(), 10_000);
}

#[test]
fn what_is_not_there_is_not_found_and_what_is_short_is_damaged() {
    let (_dir, objects) = objects();
    for error in [
        objects.read("a/b", 0..1).unwrap_err(),
        objects.read_many("a/b", &[0..1, 5..6]).unwrap_err(),
        objects.read_tail("a/b", 10).map(|_| ()).unwrap_err(),
        objects.read_all("a/b", 10).unwrap_err(),
        objects.size("a/b").unwrap_err(),
    ] {
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
        assert!(error.to_string().contains("a/b"), "{error}");
    }
    objects.create("short", &b"12345"[..]).unwrap();
    for error in [
        objects.read("short", 3..6).unwrap_err(),
        objects.read("short", 5..6).unwrap_err(),
        objects.read("short", 900..1000).unwrap_err(),
        objects.read_many("short", &[0..1, 3..6]).unwrap_err(),
        objects.read_all("short", 4).unwrap_err(),
    ] {
        assert_eq!(error.kind(), Kind::Damaged, "{error}");
    }
    assert_eq!(objects.read_tail("short", 100).unwrap(), (Bytes::from_static(b"12345"), 5));
    assert_eq!(objects.read_tail("short", 2).unwrap(), (Bytes::from_static(b"45"), 5));
    let Err(error) = Objects::local(FsPath::new("/nonexistent/store")) else { panic!("opened") };
    assert_eq!(error.kind(), Kind::NoStore);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn many_ranges_are_read_as_one_by_one(
        starts in prop::collection::vec((0..1_990_000_u64, 1..9000_u64), 0..60),
    ) {
        let (_dir, objects) = objects();
        let whole: Vec<u8> = (0..2_000_000_u32).map(|n| (n ^ (n >> 8)) as u8).collect();
        objects.create("big", whole.clone()).unwrap();
        let ranges: Vec<_> = starts.iter().map(|(start, length)| *start..*start + length).collect();
        let plan = coalesce(&ranges);
        prop_assert!(plan.windows(2).all(|pair| pair[0].end < pair[1].start + 1));
        let read = objects.read_many("big", &ranges).unwrap();
        for (range, bytes) in ranges.iter().zip(read) {
            prop_assert!(bytes == whole[range.start as usize..range.end as usize]);
        }
    }
}

#[test]
fn listing_gives_all_below_a_folder_and_lets_read_meanwhile() {
    let (_dir, objects) = objects();
    for key in ["m/a/1", "m/a/2", "m/b/3", "n/c", "ma/4"] {
        objects.create(key, key.as_bytes().to_vec()).unwrap();
    }
    let list = |prefix: &str| {
        let mut found = Vec::new();
        objects
            .list(prefix, |key, size| {
                assert_eq!(size, key.len() as u64);
                assert_eq!(objects.read_all(key, 10).unwrap(), key.as_bytes());
                found.push(key.to_owned());
                Ok(())
            })
            .unwrap();
        found.sort();
        found
    };
    assert_eq!(list("m"), ["m/a/1", "m/a/2", "m/b/3"]);
    assert_eq!(list("m/b"), ["m/b/3"]);
    assert_eq!(list("missing"), [""; 0]);
    assert_eq!(list("").len(), 5);
    let mut dirs = objects.list_dirs("m").unwrap();
    dirs.sort();
    assert_eq!(dirs, ["a", "b"]);
    assert_eq!(objects.list_dirs("missing").unwrap(), [""; 0]);
    let error = objects.list("m", |_, _| Err(Error::new(Kind::Busy, "enough"))).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
}

#[test]
fn what_a_killed_writer_left_is_swept() {
    let (dir, objects) = objects();
    objects.create("containers/1/a", &b"kept"[..]).unwrap();
    let mut writer = objects.writer("containers/1/b").unwrap();
    writer.write(Bytes::from_static(b"left")).unwrap();
    // As after a kill: nobody cleans up.
    std::mem::forget(writer);
    assert_eq!(fs::read_dir(dir.path().join("containers/1")).unwrap().count(), 2);
    let _writer = objects.join_writers().unwrap().unwrap();
    let left: Vec<_> = fs::read_dir(dir.path().join("containers/1"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["a"]);
}

#[test]
fn a_failure_names_the_object_and_the_way_out() {
    let (dir, objects) = objects();
    objects.create("m/1", &b"x"[..]).unwrap();
    if rustix::process::geteuid().is_root() {
        // Root may write anywhere: a file in the way is what can fail.
        fs::write(dir.path().join("f"), b"").unwrap();
        let error = objects.create("f/1", &b"y"[..]).unwrap_err();
        assert!(error.to_string().contains("f/1"), "{error}");
        return;
    }
    fs::set_permissions(dir.path().join("m"), fs::Permissions::from_mode(0o500)).unwrap();
    let error = objects.create("m/2", &b"y"[..]).unwrap_err();
    assert_eq!(error.kind(), Kind::NotPermitted);
    assert!(error.to_string().contains("m/2") && error.to_string().contains("user"), "{error}");
    let error = objects.writer("m/3").map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::NotPermitted);
    fs::set_permissions(dir.path().join("m"), fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_full_file_system_says_so() {
    let error = object_store::Error::Generic {
        store: "local",
        source: Box::new(io::Error::from(io::ErrorKind::StorageFull)),
    };
    assert!(hopeless(&error));
    let error = failed("write object", "containers/1/2", error);
    assert_eq!(error.kind(), Kind::Failed);
    assert!(
        error.to_string().starts_with("cannot write object containers/1/2 (the store is full"),
        "{error}"
    );
}

/// A server that passes conditions over.
#[derive(Debug)]
struct Overwriting(object_store::memory::InMemory);

impl std::fmt::Display for Overwriting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("overwriting")
    }
}

type Stored<T> = object_store::Result<T>;

#[async_trait::async_trait]
impl ObjectStore for Overwriting {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        _: object_store::PutOptions,
    ) -> Stored<object_store::PutResult> {
        self.0.put(location, payload).await
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: object_store::PutMultipartOptions,
    ) -> Stored<Box<dyn object_store::MultipartUpload>> {
        Err(object_store::Error::NotImplemented {
            operation: "multipart".into(),
            implementer: self.to_string(),
        })
    }

    async fn get_opts(&self, location: &Path, o: GetOptions) -> Stored<object_store::GetResult> {
        self.0.get_opts(location, o).await
    }

    fn delete_stream(
        &self,
        locations: futures::stream::BoxStream<'static, Stored<Path>>,
    ) -> futures::stream::BoxStream<'static, Stored<Path>> {
        locations
    }

    fn list(
        &self,
        prefix: Option<&Path>,
    ) -> futures::stream::BoxStream<'static, Stored<object_store::ObjectMeta>> {
        self.0.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Stored<object_store::ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: object_store::CopyOptions) -> Stored<()> {
        Ok(())
    }
}

#[test]
fn a_server_that_overwrites_is_refused() {
    let server = Arc::new(Overwriting(object_store::memory::InMemory::new()));
    let objects = Objects::over(server, None, &std::env::temp_dir()).unwrap();
    let error = objects.must_keep_what_is_there().unwrap_err();
    assert_eq!(error.kind(), Kind::NoStore);
    assert!(error.to_string().contains("If-None-Match"), "{error}");
    let objects = Objects::in_memory().unwrap();
    for _ in 0..2 {
        objects.must_keep_what_is_there().unwrap();
    }
}
