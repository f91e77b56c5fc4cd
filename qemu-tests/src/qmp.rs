//! A small QMP client of the harness's own: an independent witness of what QEMU says.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use crate::Result;
use crate::wait::{SOON, wait_for};

/// One monitor connection.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects, waiting for QEMU to listen.
    ///
    /// # Errors
    /// When nothing listens or greets in time.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = wait_for(SOON, &format!("QMP on {}", socket.display()), || {
            Ok(UnixStream::connect(socket).ok())
        })?;
        stream.set_read_timeout(Some(SOON))?;
        let mut qmp = Qmp { reader: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.read()?;
        ensure!(greeting.get("QMP").is_some(), "no QMP greeting: {greeting}");
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives its `return`.
    ///
    /// # Errors
    /// QEMU's, or the connection's.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            } else {
                bail!("{command} {arguments}: {answer}");
            }
        }
    }

    /// Waits for an event of a name; others are kept.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn wait_event(&mut self, name: &str) -> Result<Value> {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at));
            }
            let event = self.read().with_context(|| format!("waiting for {name}"))?;
            self.events.push(event);
        }
    }

    /// Has QEMU said this event since the connection was made?
    ///
    /// # Errors
    /// The connection's.
    pub fn has_seen(&mut self, name: &str) -> Result<bool> {
        self.execute("query-status", &json!({}))?;
        Ok(self.events.iter().any(|event| event["event"] == name))
    }

    /// Is the guest running?
    ///
    /// # Errors
    /// The connection's.
    pub fn runs(&mut self) -> Result<bool> {
        Ok(self.status()? == "running")
    }

    /// The state of the machine: `running`, `paused`, `io-error`, …
    ///
    /// # Errors
    /// The connection's.
    pub fn status(&mut self) -> Result<String> {
        let status = self.execute("query-status", &json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().into())
    }

    /// Bitmaps of Fleece's on any node: (node, name, recording).
    ///
    /// # Errors
    /// The connection's.
    pub fn bitmaps(&mut self) -> Result<Vec<(String, String, bool)>> {
        let nodes = self.execute("query-named-block-nodes", &json!({ "flat": true }))?;
        let mut found = Vec::new();
        for node in nodes.as_array().context("no nodes")? {
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                let name = bitmap["name"].as_str().unwrap_or_default();
                if name.starts_with("fleece") {
                    let recording = bitmap["recording"].as_bool().unwrap_or_default();
                    found.push((
                        node["node-name"].as_str().unwrap_or_default().into(),
                        name.into(),
                        recording,
                    ));
                }
            }
        }
        Ok(found)
    }

    /// What a backup must not leave behind: exports, jobs and nodes that are not the guest's own.
    ///
    /// # Errors
    /// The connection's.
    pub fn leftovers(&mut self, own_nodes: &[String]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for export in
            self.execute("query-block-exports", &json!({}))?.as_array().into_iter().flatten()
        {
            found.push(format!("export {}", export["id"]));
        }
        for job in self.execute("query-jobs", &json!({}))?.as_array().into_iter().flatten() {
            found.push(format!("job {}", job["id"]));
        }
        for node in self
            .execute("query-named-block-nodes", &json!({ "flat": true }))?
            .as_array()
            .into_iter()
            .flatten()
        {
            let name = node["node-name"].as_str().unwrap_or_default();
            if !own_nodes.iter().any(|own| own == name) && !name.starts_with('#') {
                found.push(format!("node {name}"));
            }
        }
        Ok(found)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).context("reading from QMP")?;
        ensure!(length > 0, "QEMU closed the QMP connection");
        Ok(serde_json::from_str(&line)?)
    }

    /// Limits how long an answer may take.
    ///
    /// # Errors
    /// The system's.
    pub fn patience(&self, limit: Duration) -> Result {
        Ok(self.reader.get_ref().set_read_timeout(Some(limit))?)
    }
}
