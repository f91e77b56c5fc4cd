//! The guest agent: freezing and thawing the guest's file systems.
//!
//! The agent's line can hold anything of an earlier client, so a conversation begins with 0xFF and
//! guest-sync-delimited, and everything up to the answer's own 0xFF is skipped.

use crate::error::{Error, Kind, Result};
use crate::qmp::command as cmd;
use crate::qmp::session::Session;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

/// An agent that lives answers in milliseconds; one that is not installed never does.
const SYNC_LIMIT: Duration = Duration::from_secs(3);
/// Freezing flushes the guest's file systems; Windows gives up by itself after 10 s.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// Thawing has nothing to wait for.
const THAW_LIMIT: Duration = Duration::from_secs(5);
/// How long the worker tries to thaw before it leaves that to the guard, which goes on trying.
const PATIENCE: Duration = Duration::from_secs(60);
/// Answers are short; more than this is not the agent.
const MAX_ANSWER: usize = 64 << 10;
/// Begins our conversation and the agent's answer to it.
const DELIMITER: u8 = 0xFF;

/// A conversation with the agent of one VM.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    path: PathBuf,
    pending: Vec<u8>,
}

impl Agent {
    /// Connects and synchronises.
    ///
    /// # Errors
    /// Nobody listens, or nobody answers.
    pub async fn connect(path: &Path) -> Result<Agent> {
        let mut agent = Agent::reach(path).await?;
        let (line, id) = sync_line();
        timeout(SYNC_LIMIT, agent.synchronise(&line, id))
            .await
            .map_err(|_| silent(path, "guest-sync-delimited"))??;
        Ok(agent)
    }

    /// Talks to whoever is at the other end of a socket, for the fuzzer.
    #[cfg(any(test, fuzzing))]
    pub(super) async fn over(stream: UnixStream, id: i64) -> Result<Agent> {
        let mut agent = Agent { stream, path: PathBuf::from("agent"), pending: Vec::new() };
        agent.synchronise(b"\n", id).await?;
        Ok(agent)
    }

    async fn reach(path: &Path) -> Result<Agent> {
        let fail = |e| Error::caused(Kind::Failed, format!("guest agent at {}", path.display()), e);
        let connected = timeout(SYNC_LIMIT, UnixStream::connect(path)).await;
        let stream = connected.map_err(|_| silent(path, "connect"))?.map_err(fail)?;
        Ok(Agent { stream, path: path.to_owned(), pending: Vec::new() })
    }

    async fn synchronise(&mut self, line: &[u8], id: i64) -> Result<()> {
        self.send(line).await?;
        loop {
            self.skip_to_delimiter().await?;
            if self.answer().await?["return"] == json!(id) {
                return Ok(());
            }
        }
    }

    /// Freezes all file systems; how many.
    ///
    /// # Errors
    /// The agent refused, or was silent for 10 s. Thaw in any case.
    pub async fn freeze(&mut self) -> Result<u64> {
        self.ask("guest-fsfreeze-freeze", FREEZE_LIMIT).await.map(|v| v.as_u64().unwrap_or(0))
    }

    /// Thaws all; how many were frozen. Harmless if none was.
    ///
    /// # Errors
    /// The agent refused, or was silent for 5 s.
    pub async fn thaw(&mut self) -> Result<u64> {
        self.ask("guest-fsfreeze-thaw", THAW_LIMIT).await.map(|v| v.as_u64().unwrap_or(0))
    }

    /// `frozen` or `thawed`.
    ///
    /// # Errors
    /// The agent refused, or was silent.
    pub async fn status(&mut self) -> Result<String> {
        self.ask("guest-fsfreeze-status", THAW_LIMIT)
            .await
            .map(|v| v.as_str().unwrap_or_default().to_owned())
    }

    async fn ask(&mut self, command: &str, limit: Duration) -> Result<Value> {
        let talk = async {
            self.send(&request_line(command)).await?;
            self.answer().await
        };
        let answer = timeout(limit, talk).await;
        let answer = answer.map_err(|_| silent(&self.path, command))??;
        Self::returned(answer, command)
    }

    fn returned(mut answer: Value, command: &str) -> Result<Value> {
        if answer.get("error").is_some() {
            let words = answer["error"]["desc"].as_str().unwrap_or("no reason given");
            return Err(Error::new(
                Kind::Failed,
                format!("guest agent refused {command}: {words}"),
            ));
        }
        Ok(answer["return"].take())
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.map_err(|e| self.broken(e))
    }

    async fn skip_to_delimiter(&mut self) -> Result<()> {
        loop {
            if let Some(at) = self.pending.iter().position(|&b| b == DELIMITER) {
                self.pending.drain(..=at);
                return Ok(());
            }
            self.pending.clear();
            self.more().await?;
        }
    }

    /// The next line that is JSON with an answer in it.
    async fn answer(&mut self) -> Result<Value> {
        loop {
            while let Some(end) = self.pending.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let line = line.strip_prefix(&[DELIMITER]).unwrap_or(&line);
                if let Ok(value @ Value::Object(_)) = serde_json::from_slice(line) {
                    return Ok(value);
                }
            }
            self.more().await?;
        }
    }

    async fn more(&mut self) -> Result<()> {
        let n = self.stream.read_buf(&mut self.pending).await.map_err(|e| self.broken(e))?;
        if n == 0 {
            return Err(self.broken(std::io::ErrorKind::UnexpectedEof.into()));
        }
        if self.pending.len() > MAX_ANSWER {
            return Err(Error::new(
                Kind::Failed,
                format!("{} is not a guest agent", self.path.display()),
            ));
        }
        Ok(())
    }

    fn broken(&self, error: std::io::Error) -> Error {
        Error::caused(
            Kind::Failed,
            format!("guest agent at {} went away", self.path.display()),
            error,
        )
    }
}

fn request_line(command: &str) -> Vec<u8> {
    format!("{}\n", json!({"execute": command})).into_bytes()
}

/// What begins a conversation, and the number that its answer holds.
fn sync_line() -> (Vec<u8>, i64) {
    // Any number will do as long as the next conversation's differs.
    let id = i64::from(std::process::id()) << 16
        | i64::from(std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.subsec_micros() & 0xFFFF));
    let line = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}}).to_string();
    ([&[DELIMITER], line.as_bytes(), b"\n"].concat(), id)
}

fn silent(path: &Path, command: &str) -> Error {
    Error::new(
        Kind::Failed,
        format!(
            "guest agent at {} does not answer {command}: is it running in the guest?",
            path.display()
        ),
    )
}

/// The agent's socket: from vms.d, else the one character device of QEMU that looks like it.
///
/// # Errors
/// QEMU went away.
pub async fn find(session: &Session) -> Result<Option<PathBuf>> {
    if let Some(path) = &session.vm().agent {
        return Ok(Some(path.clone()));
    }
    let chardevs = session.call(cmd::QueryChardev(json!({})), "").await?;
    let looks = |text: &str| ["qga", "guest_agent", "guest-agent"].iter().any(|w| text.contains(w));
    let chardev = chardevs.iter().find(|c| looks(&c.label) || looks(&c.filename));
    Ok(chardev.and_then(|c| unix_path(&c.filename)))
}

/// The path in `disconnected:unix:/run/x.sock,server=on`.
fn unix_path(filename: &str) -> Option<PathBuf> {
    let rest = filename.split_once("unix:")?.1;
    let path = rest.split([',', ' ']).next().unwrap_or(rest);
    (path.starts_with('/')).then(|| PathBuf::from(path))
}

/// Thaws in a conversation of its own: the one that froze may be broken. The thaw goes out with the
/// beginning: an agent that is still busy freezing finds it when it is done, even if nobody listens
/// to its answer any more.
///
/// # Errors
/// The agent cannot be reached or refuses.
pub async fn thaw_at(path: &Path) -> Result<u64> {
    const COMMAND: &str = "guest-fsfreeze-thaw";
    let mut agent = Agent::reach(path).await?;
    let (mut lines, id) = sync_line();
    lines.extend(request_line(COMMAND));
    let talk = async {
        agent.synchronise(&lines, id).await?;
        agent.answer().await
    };
    let answer = timeout(SYNC_LIMIT + THAW_LIMIT, talk).await;
    let answer = answer.map_err(|_| silent(path, COMMAND))??;
    Agent::returned(answer, COMMAND).map(|v| v.as_u64().unwrap_or(0))
}

/// Thaws, and tries for a while.
///
/// # Errors
/// It did not work within a minute.
pub async fn thaw_patiently(path: &Path) -> Result<u64> {
    let begin = Instant::now();
    let mut pause = Duration::from_millis(250);
    loop {
        let result = thaw_at(path).await;
        if result.is_ok() || begin.elapsed() + pause > PATIENCE {
            return result;
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    #[test]
    fn paths_of_chardevs() {
        let path = |s: &str| unix_path(s).map(|p| p.display().to_string());
        assert_eq!(path("disconnected:unix:/run/a.sock,server=on").unwrap(), "/run/a.sock");
        assert_eq!(path("unix:/run/a.sock").unwrap(), "/run/a.sock");
        assert_eq!(path("pty:/dev/pts/3"), None);
    }

    /// An agent as it really is: first a parse error for the 0xFF, then the answers.
    async fn pretend(listener: UnixListener, rubbish: &'static [u8]) {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read);
        write.write_all(rubbish).await.unwrap();
        loop {
            let mut line = Vec::new();
            if lines.read_until(b'\n', &mut line).await.unwrap() == 0 {
                return;
            }
            let text = line.strip_prefix(&[DELIMITER]).unwrap_or(&line);
            let request: Value = serde_json::from_slice(text).unwrap();
            let answer = match request["execute"].as_str().unwrap() {
                "guest-sync-delimited" => {
                    let id = &request["arguments"]["id"];
                    let error = b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n";
                    [error, format!("\u{0}{{\"return\": {id}}}\n").replace('\0', "").as_bytes()]
                        .concat()
                }
                "guest-fsfreeze-freeze" => b"{\"return\": 1}\n".to_vec(),
                "guest-fsfreeze-thaw" if rubbish.is_empty() => b"{\"return\": 2}\n".to_vec(),
                _ => b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"frozen\"}}\n"
                    .to_vec(),
            };
            let answer = match request["execute"] == "guest-sync-delimited" {
                true => {
                    let cut = answer.iter().position(|&b| b == b'\n').unwrap() + 1;
                    [&answer[..cut], &[DELIMITER], &answer[cut..]].concat()
                }
                false => answer,
            };
            write.write_all(&answer).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_an_earlier_client_left_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qga.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server =
            tokio::spawn(pretend(listener, b"{\"return\": 99}\n\xff{\"return\": 3}\nhalf a li"));
        let mut agent = Agent::connect(&path).await.unwrap();
        assert_eq!(agent.freeze().await.unwrap(), 1);
        let error = agent.thaw().await.unwrap_err();
        assert!(error.to_string().contains("refused guest-fsfreeze-thaw: frozen"), "{error}");
        drop(agent);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_thaw_goes_out_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qga.sock");
        let server = tokio::spawn(pretend(UnixListener::bind(&path).unwrap(), b""));
        assert_eq!(thaw_at(&path).await.unwrap(), 2);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn an_agent_that_is_silent_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qga.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = Agent::connect(&path).await.unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
    }
}
