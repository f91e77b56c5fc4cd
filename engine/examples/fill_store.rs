//! Fills a store with distinct blocks, as an engine would after many backups, but for snapshots:
//! what is in it is in containers and journals only.
//!
//! ```text
//! cargo run --release -p fleece-engine --example fill_store -- CONFIG STATE BLOCKS
//! ```
//!
//! CONFIG is an `engine.toml`; STATE a state directory of its own, as it numbers containers like any engine.
//! Blocks are nearly empty, so that the store stays small; fingerprints, directories and journals are
//! what they would be.

use std::path::Path;

use fleece_engine::config::Config;
use fleece_engine::store::container::{ContainerKind, Packer};
use fleece_engine::store::keys::StoreKey;
use fleece_engine::store::{Store, StoreOptions};

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Packers at once: hashing is most of it.
const PACKERS: u64 = 2;
/// Blocks after which containers that are full are seen to.
const BATCH: u64 = 4096;

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [config, state, blocks] = &words[..] else {
        return Err("fill_store CONFIG STATE BLOCKS".into());
    };
    let (config, blocks) = (Config::load(Path::new(config))?, blocks.parse::<u64>()?);
    std::fs::create_dir_all(state)?;
    let key = StoreKey::load(&config.key)?;
    let options = StoreOptions { compression: config.compression_level, ..StoreOptions::default() };
    let store = Store::open(&config.location()?, key, Path::new(state), options)?;
    std::thread::scope(|scope| {
        let fill = |n| {
            let store = &store;
            scope.spawn(move || pack(store, blocks * n / PACKERS..blocks * (n + 1) / PACKERS))
        };
        let threads: Vec<_> = (0..PACKERS).map(fill).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(packed) => packed,
            Err(_) => Err("a packer failed".into()),
        })
    })
}

fn pack(store: &Store, numbers: std::ops::Range<u64>) -> Outcome<()> {
    let mut packer = Packer::new(store, ContainerKind::Blocks, "fill_store");
    let mut block = vec![0; store.block_size() as usize];
    for n in numbers {
        block[..8].copy_from_slice(&n.to_le_bytes());
        packer.push(store.fingerprinter().of(&block), &block)?;
        if n % BATCH == 0 {
            packer.take_sealed()?;
        }
    }
    packer.seal()?;
    packer.take_sealed()?;
    Ok(())
}
