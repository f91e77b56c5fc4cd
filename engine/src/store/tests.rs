//! A store as a whole: made, opened, refused.

use std::path::PathBuf;

use super::format::HEADER_LEN;
use super::testing::TestStore;
use super::*;

fn open(test: &TestStore, key: StoreKey) -> Result<Store> {
    Store::open_to_read(test.store.location(), key, StoreOptions::default())
}

fn key_of(test: &TestStore) -> StoreKey {
    StoreKey::from_text(&test.key_text).unwrap()
}

/// The error of opening the store after its header object was changed.
fn opened_after(change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Error {
    let test = TestStore::new();
    let path = test.path(names::STORE);
    fs::write(&path, change(fs::read(&path).unwrap())).unwrap();
    open(&test, key_of(&test)).map(|_| ()).unwrap_err()
}

/// A header object with another field in its first 76 bytes, and a right checksum.
fn with_header(mut bytes: Vec<u8>, at: usize, value: &[u8]) -> Vec<u8> {
    bytes[at..at + value.len()].copy_from_slice(value);
    let crc = crc32c::crc32c(&bytes[..76]);
    bytes[76..HEADER_LEN].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn a_new_store_opens_and_says_what_it_is() {
    for encrypt in [true, false] {
        let init = InitOptions { encrypt, block_size: 8192, now_ms: 77, ..InitOptions::default() };
        let test = TestStore::with(&init, StoreOptions::default());
        let store = open(&test, key_of(&test)).unwrap();
        assert_eq!(
            (store.block_size(), store.encrypted(), store.info().created_ms),
            (8192, encrypt, 77)
        );
        assert_eq!(store.id(), key_of(&test).store());
        assert!(store.journal().is_err(), "it is only read");
        assert_eq!(test.store.fingerprinter().of(&[1; 8192]), store.fingerprinter().of(&[1; 8192]));
        store.create_sealed(ObjectKind::Damage, "damage/x", b"plain words").unwrap();
        let stored = store.objects().read_all("damage/x", 1000).unwrap();
        assert_eq!(stored.windows(11).any(|w| w == b"plain words"), !encrypt);
        assert_eq!(test.store.read_sealed(ObjectKind::Damage, "damage/x").unwrap(), b"plain words");
    }
}

#[test]
fn a_place_that_is_taken_or_strange_is_refused() {
    let test = TestStore::new();
    let init = |location: &Location, options: &InitOptions| {
        Store::init(location, options, |_| panic!("a key was made")).map(|_| ()).unwrap_err()
    };
    let error = init(test.store.location(), &InitOptions::default());
    assert_eq!(error.kind(), Kind::Usage);
    assert!(error.to_string().contains("already"), "{error}");

    let foreign = test.dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.txt"), b"").unwrap();
    let error = init(&Location::Directory(foreign.clone()), &InitOptions::default());
    assert_eq!(error.kind(), Kind::Usage);
    assert!(error.to_string().contains("thesis.txt"), "{error}");
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);

    let new = Location::Directory(test.dir.path().join("new"));
    for block_size in [0, 512, 5000, 131_072] {
        let error = init(&new, &InitOptions { block_size, ..InitOptions::default() });
        assert_eq!(error.kind(), Kind::Usage, "{block_size}");
    }
    let parse = |text| Location::parse(text, &Access::default());
    for wrong in ["", "s3://", "s3:///folder", "s3://bucket/a//b", "ftp://host/folder"] {
        assert_eq!(parse(wrong).unwrap_err().kind(), Kind::Usage, "{wrong}");
    }
    assert_eq!(parse("/a/b").unwrap(), Location::Directory(PathBuf::from("/a/b")));
    for (text, shown) in [("s3://bucket/a/b/", "s3://bucket/a/b"), ("s3://bucket", "s3://bucket")] {
        assert_eq!(parse(text).unwrap().to_string(), shown);
    }
}

#[test]
fn a_key_that_cannot_be_kept_makes_no_store() {
    let dir = tempfile::tempdir().unwrap();
    let location = Location::Directory(dir.path().join("store"));
    let no_room = |_: &StoreKey| Err(Error::new(Kind::Key, "no room for the key"));
    assert_eq!(
        Store::init(&location, &InitOptions::default(), no_room).unwrap_err().kind(),
        Kind::Key
    );
    Store::init(&location, &InitOptions::default(), |_| Ok(())).unwrap();
}

#[test]
fn every_wrong_store_or_key_has_its_own_answer() {
    let test = TestStore::new();
    let error = open(&test, StoreKey::generate("default").unwrap()).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Key);
    assert!(error.to_string().contains(&test.store.id().to_string()), "{error}");

    // A key that bears the right store's name, but is another one.
    let mut bytes = key_of(&test).encode().to_vec();
    bytes[60] ^= 1;
    let body = bytes.len() - 8;
    use sha2::Digest;
    let sum = sha2::Sha256::digest(&bytes[..body]);
    bytes[body..].copy_from_slice(&sum[..8]);
    let other = StoreKey::decode(&bytes).unwrap();
    assert_eq!(open(&test, other).map(|_| ()).unwrap_err().kind(), Kind::Key);

    let nothing = Location::Directory(test.dir.path().to_owned());
    let error = Store::open_to_read(&nothing, key_of(&test), StoreOptions::default())
        .map(|_| ())
        .unwrap_err();
    assert_eq!(error.kind(), Kind::NoStore);
    assert!(error.to_string().contains("fleecectl init"), "{error}");

    assert_eq!(opened_after(|_| b"just a file named store".to_vec()).kind(), Kind::NoStore);
    let newer = opened_after(|bytes| with_header(bytes, 8, &9_u16.to_le_bytes()));
    assert_eq!(newer.kind(), Kind::NoStore);
    assert!(newer.to_string().contains("newer Fleece (format 9)"), "{newer}");
    let feature = opened_after(|bytes| {
        let text = String::from_utf8_lossy(&bytes[HEADER_LEN..bytes.len() - 16])
            .replace(r#""incompatible":[]"#, r#""incompatible":["holograms"]"#);
        [&bytes[..HEADER_LEN], text.as_bytes(), &bytes[bytes.len() - 16..]].concat()
    });
    assert_eq!(feature.kind(), Kind::NoStore);
    assert!(feature.to_string().contains("holograms"), "{feature}");
    let damaged = opened_after(|bytes| {
        String::from_utf8_lossy(&bytes[HEADER_LEN..])
            .replace("4096", "8192")
            .into_bytes()
            .splice(..0, bytes[..HEADER_LEN].iter().copied())
            .collect()
    });
    assert!(matches!(damaged.kind(), Kind::Damaged | Kind::NoStore), "{damaged}");
}

#[test]
fn a_changed_header_object_is_never_believed() {
    let test = TestStore::new();
    let path = test.path(names::STORE);
    let bytes = fs::read(&path).unwrap();
    for place in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[place] ^= 1;
        fs::write(&path, changed).unwrap();
        assert!(open(&test, key_of(&test)).is_err(), "byte {place}");
    }
    fs::write(&path, &bytes).unwrap();
    open(&test, key_of(&test)).unwrap();
}

#[test]
fn a_level_that_nobody_here_knows_is_refused_by_name() {
    let test = TestStore::new();
    let reader = test.reader();
    assert_eq!(reader.agreed().level, StoreLevel::NEWEST);
    // Whatever is in it: only its name has to be read.
    let higher = names::level(StoreLevel::NEWEST.0 + 1);
    fs::write(test.path(&higher), b"of a later Fleece").unwrap();
    for error in [open(&test, key_of(&test)).map(|_| ()), reader.follow().map(|_| ())] {
        let error = error.unwrap_err();
        assert_eq!(error.kind(), Kind::NoStore);
        let told = error.to_string();
        let newest = StoreLevel::NEWEST.0;
        let (at, known) = (format!("at level {}", newest + 1), format!("levels up to {newest}"));
        assert!(told.contains(&at) && told.contains(&known), "{told}");
    }
    fs::remove_file(test.path(&higher)).unwrap();
    // One that no engine made counts for nothing, and no store goes back.
    let raised = test.path(&names::level(StoreLevel::NEWEST.0));
    let bytes = fs::read(&raised).unwrap();
    fs::write(&raised, [&bytes[..], b"x"].concat()).unwrap();
    assert_eq!(open(&test, key_of(&test)).map(|_| ()).unwrap_err().kind(), Kind::Damaged);
    fs::remove_file(&raised).unwrap();
    assert_eq!(reader.follow().unwrap().level, StoreLevel::NEWEST);
    assert_eq!(open(&test, key_of(&test)).unwrap().agreed().level, StoreLevel::FIRST);
}

#[test]
fn a_passphrase_brings_the_key_back() {
    let init = InitOptions { passphrase: Some("open sesame".into()), ..InitOptions::default() };
    let test = TestStore::with(&init, StoreOptions::default());
    let key = Store::recover_key(test.store.location(), "open sesame").unwrap();
    assert_eq!(*key, key_of(&test));
    let error = Store::recover_key(test.store.location(), "guess").unwrap_err();
    assert_eq!(error.kind(), Kind::Key);
    let without = TestStore::new();
    let error = Store::recover_key(without.store.location(), "open sesame").unwrap_err();
    assert_eq!(error.kind(), Kind::Key);
    assert!(error.to_string().contains("key file"), "{error}");
}

#[test]
fn the_newest_copy_under_a_passphrase_is_the_one_that_counts() {
    let init = InitOptions { passphrase: Some("first".into()), ..InitOptions::default() };
    let test = TestStore::with(&init, StoreOptions::default());
    let location = test.store.location();
    let next = Arc::new(key_of(&test).rotated().unwrap());
    test.store.take_key(StoreKey::decode(&next.encode()).unwrap()).unwrap();
    test.store.use_newest_of(&next, 7).unwrap();
    // The one that there is opens what is older.
    let old = Store::recover_key(location, "first").unwrap();
    assert_eq!(*old, key_of(&test));
    assert_eq!(Store::check_key(location, old).unwrap_err().kind(), Kind::Key);
    Store::keep_key(location, &next, "second").unwrap();
    assert_eq!(Store::recover_key(location, "second").unwrap(), next);
    assert_eq!(Store::recover_key(location, "first").unwrap_err().kind(), Kind::Key);
    assert_eq!(Store::check_key(location, Arc::clone(&next)).unwrap().key, next.newest());
    Store::keep_key(location, &next, "second").unwrap();
    let again = Store::keep_key(location, &next, "third").unwrap_err();
    assert_eq!(again.kind(), Kind::Usage, "{again}");
}

#[test]
fn only_its_owner_can_look_into_a_new_store() {
    let test = TestStore::new();
    let mode = fs::metadata(test.path("")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}
