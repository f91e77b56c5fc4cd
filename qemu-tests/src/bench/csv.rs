//! Comma-separated values, for the plots and for whoever wants to reckon again.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, ensure};

use crate::Result;

/// A file of values under a line of names.
pub struct Csv {
    file: BufWriter<File>,
    columns: usize,
}

impl Csv {
    /// A new file with its first line.
    ///
    /// # Errors
    /// The system's.
    pub fn create(path: &Path, columns: &[&str]) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        let mut csv = Csv { file: BufWriter::new(file), columns: columns.len() };
        csv.row(columns)?;
        Ok(csv)
    }

    /// One more line, on the disk at once: a part that fails later keeps what it measured.
    ///
    /// # Errors
    /// When the number of values is not that of the names, or the system's.
    pub fn row<T: AsRef<str>>(&mut self, values: &[T]) -> Result {
        ensure!(
            values.len() == self.columns,
            "{} values for {} columns",
            values.len(),
            self.columns
        );
        let line: Vec<String> = values.iter().map(|value| quoted(value.as_ref())).collect();
        writeln!(self.file, "{}", line.join(","))?;
        Ok(self.file.flush()?)
    }
}

fn quoted(value: &str) -> String {
    if value.contains([',', '"', '\n']) {
        format!("\"{}\"", value.replace('"', "\"\""))
    } else {
        value.to_owned()
    }
}
