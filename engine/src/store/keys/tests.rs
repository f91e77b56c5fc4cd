//! The key in all its forms: file, passphrase, paper.

use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;

fn key() -> StoreKey {
    StoreKey::generate("default").unwrap().rotated().unwrap()
}

#[test]
fn a_key_file_round_trips_and_is_for_its_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.key");
    let key = key();
    key.save(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o400);
    assert_eq!(StoreKey::load(&path).unwrap(), key);
    assert_eq!(key.save(&path).unwrap_err().kind(), Kind::Key, "an existing one is kept");

    fs::set_permissions(&path, fs::Permissions::from_mode(0o440)).unwrap();
    let error = StoreKey::load(&path).unwrap_err();
    assert_eq!(error.kind(), Kind::Key);
    assert!(error.to_string().contains("chmod 0400"), "{error}");

    let error = StoreKey::load(&dir.path().join("missing")).unwrap_err();
    assert_eq!(error.kind(), Kind::Key);
}

#[test]
fn a_key_file_is_replaced_whole_by_one_that_has_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.key");
    let (key, linked) = (key(), dir.path().join("linked.key"));
    key.save(&path).unwrap();
    std::os::unix::fs::symlink(&path, &linked).unwrap();
    let next = key.rotated().unwrap();
    next.replace(&linked).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o400);
    assert!(fs::symlink_metadata(&linked).unwrap().is_symlink());
    assert_eq!(StoreKey::load(&path).unwrap(), next);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside it");
    assert_eq!((key.newest(), next.newest(), next.first()), (KeyId(2), KeyId(3), KeyId(1)));
    let (second, third) = (KeyId(2), KeyId(3));
    assert!(next.extends(&key, second) && next.extends(&next, third) && !key.extends(&next, third));
    // Another one of the same number is another one.
    let other = key.rotated().unwrap();
    assert!(!other.extends(&next, third) && other.checks()[&2] == next.checks()[&2]);
    assert!(other.extends(&next, second), "what was never used may be replaced");
    assert_ne!(other.checks()[&3], next.checks()[&3]);
    assert!(!StoreKey::generate("default").unwrap().rotated().unwrap().extends(&key, second));
    assert_eq!(key.replace(&dir.path().join("missing")).unwrap_err().kind(), Kind::Key);
}

#[test]
fn no_message_shows_the_key() {
    let key = key();
    let hex: String = key.encode().iter().map(|b| format!("{b:02x}")).collect();
    let text = key.to_text().replace("key = ", "key == ");
    let error = StoreKey::from_text(&text).unwrap_err();
    assert!(!error.to_string().contains(&hex[60..80]), "{error}");
    assert!(!format!("{key:?}").contains(&hex[60..80]));
}

#[test]
fn any_change_of_the_key_is_found() {
    let key = key();
    let bytes = key.encode();
    assert_eq!(StoreKey::decode(&bytes).unwrap(), key);
    for place in 0..bytes.len() {
        let mut changed = bytes.to_vec();
        changed[place] ^= 1;
        assert_eq!(StoreKey::decode(&changed).unwrap_err().kind(), Kind::Key, "byte {place}");
        assert_eq!(StoreKey::decode(&bytes[..place]).unwrap_err().kind(), Kind::Key);
    }
}

#[test]
fn a_passphrase_opens_what_it_wrapped_and_no_other_does() {
    let key = key();
    let wrapped = key.wrap("correct horse").unwrap();
    assert_eq!(StoreKey::unwrap(&wrapped, "correct horse").unwrap(), key);
    assert_ne!(wrapped, key.wrap("correct horse").unwrap(), "every copy has its own salt");
    let error = StoreKey::unwrap(&wrapped, "wrong").unwrap_err();
    assert_eq!(error.kind(), Kind::Key);
    assert!(error.to_string().contains("passphrase"), "{error}");
    for place in [0, 9, 30, 50, 79, 100, wrapped.len() - 1] {
        let mut changed = wrapped.clone();
        changed[place] ^= 1;
        assert!(StoreKey::unwrap(&changed, "correct horse").is_err(), "byte {place}");
    }
    // Whoever can write into the store cannot make us use gigabytes.
    let mut greedy = wrapped.clone();
    greedy[format::HEADER_LEN + 3] = 0xff;
    assert_eq!(StoreKey::unwrap(&greedy, "correct horse").unwrap_err().kind(), Kind::Damaged);
    assert!(StoreKey::unwrap(&wrapped[..85], "x").is_err());
}

#[test]
fn paper_survives_typing_and_finds_the_slip() {
    let key = key();
    let paper = key.to_paper();
    assert_eq!(StoreKey::from_paper(&paper).unwrap(), key);
    let sloppy = paper.to_uppercase().replace('\n', " \n\n").replace(": ", ":");
    assert_eq!(StoreKey::from_paper(&sloppy).unwrap(), key);

    let lines: Vec<&str> = paper.lines().collect();
    let third = lines[3];
    let digit = if third.as_bytes()[4] == b'7' { "8" } else { "7" };
    let slipped = format!("{}{digit}{}", &third[..4], &third[5..]);
    let error = StoreKey::from_paper(&paper.replace(third, &slipped)).unwrap_err();
    assert!(error.to_string().contains("line 03"), "{error}");
    let missing = paper.replace(&format!("{third}\n"), "");
    assert!(StoreKey::from_paper(&missing).unwrap_err().to_string().contains("missing"));
    assert_eq!(StoreKey::from_paper("").unwrap_err().kind(), Kind::Key);
}

#[test]
fn fingerprints_depend_on_secret_size_and_domain_only() {
    let key = key();
    let block = [5; 4096];
    let fingerprint = key.fingerprinter(4096).of(&block);
    let rotated = key.rotated().unwrap();
    assert_eq!(rotated.fingerprinter(4096).of(&block), fingerprint);
    assert_ne!(key.fingerprinter(8192).of(&block), fingerprint);
    assert_ne!(StoreKey::generate("default").unwrap().fingerprinter(4096).of(&block), fingerprint);
    let mut elsewhere = StoreKey::decode(&key.encode()).unwrap();
    elsewhere.domain = "other".into();
    assert_ne!(elsewhere.fingerprinter(4096).of(&block), fingerprint);
    assert_eq!(StoreKey::generate(&"x".repeat(65)).unwrap_err().kind(), Kind::Usage);
}

proptest! {
    #[test]
    fn nothing_makes_the_readers_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), text in ".{0,200}") {
        let _ = StoreKey::decode(&bytes);
        let _ = StoreKey::unwrap(&bytes, "x");
        let _ = StoreKey::from_text(&text);
        let _ = StoreKey::from_paper(&text);
    }
}
