//! What the operator sees: lines for people, or JSON lines with a `message_type`.

use std::cell::{Cell, RefCell};
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::engine::Counts;
use crate::error::Error;
use crate::units::{human_bytes, human_duration, human_rate};

/// How often a bar is redrawn: often enough to look alive, too seldom to cost anything.
const BAR_INTERVAL: Duration = Duration::from_millis(200);

/// How often a JSON progress line is written.
const JSON_INTERVAL: Duration = Duration::from_secs(1);

/// How often a plain progress line is written, into logs mostly.
const LINE_INTERVAL: Duration = Duration::from_secs(15);

/// Something worth telling.
pub trait Message: Serialize {
    /// The `message_type` of its JSON line.
    const TYPE: &'static str;

    /// What people read; may have several lines.
    fn human(&self) -> String;
}

/// A message without a type of its own: a note, a warning.
#[derive(Serialize)]
struct Text<'a> {
    message: &'a str,
}

#[derive(Serialize)]
struct Typed<'a, M> {
    message_type: &'static str,
    #[serde(flatten)]
    message: &'a M,
}

#[derive(Serialize)]
struct Failure<'a> {
    kind: &'static str,
    code: u8,
    message: &'a str,
}

/// Where messages go.
pub struct Report {
    json: bool,
    /// Standard output carries a disk: messages go to standard error.
    stdout_is_data: bool,
    bar: RefCell<Option<ProgressBar>>,
    warnings: Cell<u32>,
}

impl Report {
    /// Lines for people, or JSON lines.
    #[must_use]
    pub fn new(json: bool, stdout_is_data: bool) -> Report {
        Report { json, stdout_is_data, bar: RefCell::new(None), warnings: Cell::new(0) }
    }

    /// Whether it speaks JSON.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Tells it, at once.
    pub fn send<M: Message>(&self, message: &M) {
        if self.json {
            self.json_line(M::TYPE, message, false);
        } else {
            self.line(&message.human(), false);
        }
    }

    /// A sentence that only people need.
    pub fn note(&self, text: &str) {
        match self.json {
            true => self.json_line("note", &Text { message: text }, false),
            false => self.line(text, false),
        }
    }

    /// Something that did not stop us but should be known; makes the exit code 3.
    pub fn warn(&self, text: &str) {
        self.warnings.set(self.warnings.get() + 1);
        match self.json {
            true => self.json_line("warning", &Text { message: text }, false),
            false => self.line(&format!("warning: {text}"), true),
        }
    }

    /// How many warnings there were.
    #[must_use]
    pub fn warnings(&self) -> u32 {
        self.warnings.get()
    }

    /// Why a verb failed; on standard error in either form.
    pub fn fail(&self, error: &Error) {
        let message = error.to_string();
        if self.json {
            let (kind, code) = (error.kind().word(), error.kind().exit_code());
            self.json_line("error", &Failure { kind, code, message: &message }, true);
        } else {
            self.line(&format!("fleece: {message}"), true);
        }
    }

    /// Begins to show progress towards `total` bytes.
    #[must_use]
    pub fn progress(&self, what: &str, total: u64) -> Progress<'_> {
        if !self.json && io::stderr().is_terminal() {
            let bar =
                ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(5));
            let template =
                "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} eta {eta} {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_prefix(what.to_owned());
            *self.bar.borrow_mut() = Some(bar);
        }
        let now = Instant::now();
        Progress { report: self, what: what.to_owned(), total, begun: now, told: Cell::new(now) }
    }

    fn json_line<M: Serialize>(&self, message_type: &'static str, message: &M, to_stderr: bool) {
        // A message of ours always serialises; were it not so, silence is all that is left.
        if let Ok(line) = serde_json::to_string(&Typed { message_type, message }) {
            self.line(&line, to_stderr);
        }
    }

    /// Writes and flushes: tests and scripts wait for our lines. A closed pipe is no
    /// reason to break a backup.
    fn line(&self, text: &str, to_stderr: bool) {
        let write = || {
            let _ = if to_stderr || self.stdout_is_data {
                writeln!(io::stderr().lock(), "{text}")
            } else {
                let mut stdout = io::stdout().lock();
                writeln!(stdout, "{text}").and_then(|()| stdout.flush())
            };
        };
        match self.bar.borrow().as_ref() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

/// Progress of one piece of work; its end removes the bar.
pub struct Progress<'a> {
    report: &'a Report,
    what: String,
    total: u64,
    begun: Instant,
    told: Cell<Instant>,
}

#[derive(Serialize)]
struct ProgressLine<'a> {
    what: &'a str,
    bytes_done: u64,
    bytes_total: u64,
    bytes_per_second: u64,
    seconds_remaining: Option<u64>,
    #[serde(flatten)]
    counts: Option<Counts>,
}

impl Progress<'_> {
    /// Tells how far we are, where it is time to.
    pub fn update(&self, done: u64, counts: Option<Counts>) {
        let interval = match (self.report.json, self.report.bar.borrow().is_some()) {
            (true, _) => JSON_INTERVAL,
            (false, true) => BAR_INTERVAL,
            (false, false) => LINE_INTERVAL,
        };
        if self.told.get().elapsed() < interval {
            return;
        }
        self.told.set(Instant::now());
        if let Some(bar) = self.report.bar.borrow().as_ref() {
            bar.set_position(done.min(self.total));
            bar.set_message(counts.map_or_else(String::new, |counts| mix(&counts)));
            return;
        }
        self.line(done, counts);
    }

    fn line(&self, done: u64, counts: Option<Counts>) {
        let elapsed = self.begun.elapsed();
        let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
        let left = self.total.saturating_sub(done) as f64;
        let remaining = (done > 0).then(|| (left / rate) as u64);
        if self.report.json {
            let line = ProgressLine {
                what: &self.what,
                bytes_done: done,
                bytes_total: self.total,
                bytes_per_second: rate as u64,
                seconds_remaining: remaining,
                counts,
            };
            self.report.json_line("progress", &line, false);
            return;
        }
        let eta = remaining.map_or_else(String::new, |seconds| {
            format!(", {} left", human_duration(Duration::from_secs(seconds)))
        });
        let mix = counts.map_or_else(String::new, |counts| format!(", {}", mix(&counts)));
        let (what, total) = (&self.what, human_bytes(self.total));
        let (done, rate) = (human_bytes(done), human_rate(done, elapsed));
        self.report.line(&format!("{what}: {done} of {total}, {rate}{eta}{mix}"), false);
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = self.report.bar.borrow_mut().take() {
            bar.finish_and_clear();
        }
    }
}

fn mix(counts: &Counts) -> String {
    let (new, duplicate, zero) = (counts.new, counts.duplicate + counts.unchanged, counts.zero);
    let (new, duplicate, zero) = (human_bytes(new), human_bytes(duplicate), human_bytes(zero));
    format!("new {new} duplicate {duplicate} zero {zero}")
}
