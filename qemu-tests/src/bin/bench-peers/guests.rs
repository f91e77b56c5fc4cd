//! The guests that `ci/bench-guests` made, and what is in them, counted by a program of our own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qemu_tests::Result;
use qemu_tests::bench::Bench;
use qemu_tests::bench::blocks::{self, Distinct};
use qemu_tests::content::BLOCK;
use zstd::bulk::Compressor;

/// Days that every guest has.
pub(crate) const DAYS: usize = 3;

/// zstd's level: the engine's default.
pub(crate) const LEVEL: i32 = 1;

/// Blocks that are compressed together, by the engine and for the floor: 64 KiB.
pub(crate) const FRAME: usize = 16 * BLOCK;

/// Guests of a quick run.
const QUICK: usize = 2;

/// Images of guests, by name and day.
pub(crate) struct Guests {
    folder: PathBuf,
    /// Their names.
    pub(crate) names: Vec<String>,
}

impl Guests {
    /// All that are complete.
    pub(crate) fn find(bench: &Bench) -> Result<Self> {
        let folder = fs::canonicalize(&bench.guests).with_context(|| {
            format!("no guests in {}: run ci/bench-guests", bench.guests.display())
        })?;
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.join(".key").exists() {
                names.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
            }
        }
        names.sort();
        if bench.quick {
            names.truncate(QUICK);
        }
        ensure!(!names.is_empty(), "no guests in {}: run ci/bench-guests", folder.display());
        Ok(Guests { folder, names })
    }

    /// One guest alone, in a folder of its own: no image of a day, only what [`Guests::put_file`]
    /// puts there.
    pub(crate) fn alone(folder: &Path, name: &str) -> Self {
        Guests { folder: folder.to_owned(), names: vec![name.to_owned()] }
    }

    /// Puts a file where the peers find it as the image of a guest that is alone, and reads it once.
    pub(crate) fn put_file(&self, image: &Path) -> Result {
        let current = self.folder.join("current");
        fs::create_dir_all(&current)?;
        for name in &self.names {
            let place = current.join(format!("{name}.raw"));
            if place.exists() {
                fs::remove_file(&place)?;
            }
            fs::hard_link(image, &place)?;
            blocks::warm(&place)?;
        }
        Ok(())
    }

    /// The folder of all of them.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// One guest's image of one day, from 1.
    pub(crate) fn image(&self, name: &str, day: usize) -> PathBuf {
        self.folder.join(name).join(format!("day{day}.raw"))
    }

    /// Puts the images of a day where the peers find them under the same names every day:
    /// `current/NAME.raw`.
    pub(crate) fn put(&self, day: usize) -> Result {
        let current = self.folder.join("current");
        if current.exists() {
            fs::remove_dir_all(&current)?;
        }
        fs::create_dir(&current)?;
        for name in &self.names {
            fs::hard_link(self.image(name, day), current.join(format!("{name}.raw")))?;
        }
        Ok(())
    }

    /// Reads all images of a day, so that every tool finds them in the page cache.
    pub(crate) fn warm(&self, day: usize) -> Result {
        for name in &self.names {
            blocks::warm(&self.image(name, day))?;
        }
        Ok(())
    }
}

/// Where a block lies.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Which guest.
    pub(crate) guest: usize,
    /// Byte of its first day's image.
    pub(crate) offset: u64,
}

/// What the images of one day hold.
#[derive(Clone, Default)]
pub(crate) struct Day {
    /// Bytes of blocks that are not zero, of each guest.
    pub(crate) nonzero: Vec<u64>,
    /// Different blocks up to this day.
    pub(crate) distinct: u64,
    /// What these take in frames of 64 KiB, in disk order, compressed.
    pub(crate) floor: u64,
}

impl Day {
    /// Bytes that are not zero, of all guests.
    pub(crate) fn bytes(&self) -> u64 {
        self.nonzero.iter().sum()
    }
}

/// What all images hold.
pub(crate) struct Survey {
    /// Day by day.
    pub(crate) days: Vec<Day>,
    /// The blocks of the first day that had not been seen before, in order.
    pub(crate) new: Vec<Place>,
}

impl Survey {
    /// Reads everything once.
    pub(crate) fn make(guests: &Guests) -> Result<Self> {
        let mut distinct = Distinct::default();
        let mut frames =
            Frames { compressor: Compressor::new(LEVEL)?, buffer: Vec::new(), bytes: 0 };
        let mut survey = Survey { days: Vec::new(), new: Vec::new() };
        for day in 1..=DAYS {
            let mut found = Day::default();
            for (guest, name) in guests.names.iter().enumerate() {
                let mut nonzero = 0;
                blocks::each_block(&guests.image(name, day), |offset, block| {
                    nonzero += BLOCK as u64;
                    if distinct.add(block) {
                        frames.add(block)?;
                        if day == 1 {
                            survey.new.push(Place { guest, offset });
                        }
                    }
                    Ok(())
                })?;
                // A backup's frames hold nothing of another backup.
                frames.flush()?;
                found.nonzero.push(nonzero);
            }
            found.distinct = distinct.count();
            found.floor = frames.bytes;
            survey.days.push(found);
        }
        Ok(survey)
    }
}

/// Compresses blocks in frames and keeps the sizes only.
struct Frames {
    compressor: Compressor<'static>,
    buffer: Vec<u8>,
    bytes: u64,
}

impl Frames {
    fn add(&mut self, block: &[u8]) -> Result {
        self.buffer.extend_from_slice(block);
        if self.buffer.len() >= FRAME { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result {
        if !self.buffer.is_empty() {
            let compressed = self.compressor.compress(&self.buffer)?.len();
            self.bytes += compressed.min(self.buffer.len()) as u64;
            self.buffer.clear();
        }
        Ok(())
    }
}
