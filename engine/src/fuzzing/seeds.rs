//! The seeds: made from real objects and conversations, and tried in every run of the tests.
//!
//! `FLEECE_WRITE_SEEDS=1 cargo test -p fleece-engine --lib fuzzing` writes them anew. What a
//! fuzzer found is kept beside them under a name of its own.

use std::path::PathBuf;
use std::{env, fs};

use super::{containers, conversations, indexes, objects, recipes, recordings};

type Seeds = Vec<(&'static str, Vec<u8>)>;

/// A target's name, and what it does with an input.
type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 6] = [
    ("small_objects", super::small_objects),
    ("container", super::container),
    ("recipe", super::recipe),
    ("index", super::index),
    ("frames", super::frames),
    ("rpc", super::calls),
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
fn seeds_are_made_of_what_is_real() {
    let made: [Seeds; 6] =
        [objects(), containers(), recipes(), indexes(), conversations(), recordings()];
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
