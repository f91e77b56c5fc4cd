//! The frozen view of a VM's disks at one point in time, in one of three ways.

use crate::error::{Context as _, Error, Kind, Result};
use crate::qmp::agent::{self, Agent};
use crate::qmp::bitmap::{BitmapName, DiskPlan};
use crate::qmp::command as cmd;
use crate::qmp::disk::Disk;
use crate::qmp::end;
use crate::qmp::guard::Guard;
use crate::qmp::names::{self, Names};
use crate::qmp::point::{self, Instants, Part};
use crate::qmp::push;
use crate::qmp::scratch::{Need, Scratch};
use crate::qmp::session::{CallError, Session};
use crate::qmp::watch;
use crate::vms::Vm;
use serde_json::json;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::process::Child;

/// How the point in time is held.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Way {
    /// Our own copy-before-write filter: a full scratch breaks the backup, not the guest.
    Filter,
    /// QEMU's backup job: a full scratch pauses the guest until we cancel.
    Job,
    /// Copied into a local scratch image first: an iothread on a QEMU that NBD clients would abort.
    Push,
}

impl Way {
    /// What it means for the guest, for people.
    #[must_use]
    pub fn means(self) -> &'static str {
        match self {
            Way::Filter => "a full scratch breaks the backup, not the guest",
            Way::Job => {
                "a full scratch pauses the guest until the backup is cancelled; its other errors are the guest's"
            }
            Way::Push => {
                "copied into scratch first; a full one pauses the guest until the backup is cancelled; \
                 its other errors are the guest's"
            }
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Filter => "filter",
            Way::Job => "job",
            Way::Push => "push",
        })
    }
}

/// The ways that the point in time of these disks will be held, one each. A push of an incremental
/// disk has what is dirty and nothing else: whoever needs more of it must read it in full.
#[must_use]
pub fn ways_for(session: &Session, disks: &[Disk]) -> Vec<Way> {
    // Only a way that was asked for can be impossible.
    point::choose(session, disks, None).unwrap_or_default()
}

/// fs-freeze around the point in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Freeze {
    /// Not asked for.
    #[default]
    No,
    /// If it fails, warn and go on.
    Try,
    /// If it fails, fail.
    Require,
}

/// What to open.
#[derive(Clone, Debug)]
pub struct Request {
    /// The store's id as it stands in bitmap names.
    pub store: String,
    /// The snapshot's id.
    pub snapshot: String,
    /// The disks with their plans.
    pub disks: Vec<(Disk, DiskPlan)>,
    /// Where scratch images and sockets go (a directory of ours is made in it).
    pub scratch_dir: PathBuf,
    /// The cap on all scratch together, bytes; none: 20 GiB or half of what is free.
    pub scratch_max: Option<u64>,
    /// Bytes per second that a push may copy, of all disks together.
    pub read_limit: Option<u64>,
    /// fs-freeze.
    pub freeze: Freeze,
    /// A way to take instead of the best one (tests, and people who know why).
    pub way: Option<Way>,
}

/// Where one disk of the view is read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// The NBD server's UNIX socket.
    pub socket: PathBuf,
    /// The export's name.
    pub export: String,
    /// The meta context with what is dirty (`qemu:dirty-bitmap:…`); none for a full read.
    pub dirty_context: Option<String>,
    /// Bytes.
    pub size: u64,
    /// The way taken for this disk.
    pub way: Way,
}

/// How a backup ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The manifest is in the store: the old bitmaps go.
    Committed,
    /// It is not: the new bitmaps are merged back into the old ones.
    Failed,
    /// Only the engine knows: the bitmaps stay as they are until the next backup asked it.
    Unknown,
}

/// An open view. It must be ended with [`View::teardown`]; the guard does it otherwise.
#[derive(Debug)]
pub struct View {
    vm: Vm,
    snapshot: String,
    parts: Vec<Part>,
    scratch: Scratch,
    /// Servers of pushed disks.
    servers: Vec<Child>,
    targets: Vec<Target>,
    instants: Instants,
    frozen: Option<Duration>,
    warnings: Vec<String>,
    freeze: Freeze,
    /// The NBD server was started by us.
    server: bool,
    ended: bool,
}

impl View {
    /// Takes the point in time. On an error everything is as it was. A dropped future leaves
    /// that to the guard: drop it and the session then.
    ///
    /// # Errors
    /// `Busy`: QEMU's one NBD server is taken. `Failed`: no space for scratch, QEMU refused, freeze
    /// was required and failed.
    pub async fn open(session: &Session, guard: &mut Guard, request: Request) -> Result<View> {
        let mut view = View::outline(session, request).await?;
        let (snapshot, directory) = (view.snapshot.clone(), view.scratch.directory().to_owned());
        let qemu = session.peer().and_then(|peer| peer.pid);
        guard.tell(|state| {
            state.snapshot = snapshot;
            state.qemu = qemu;
            state.directory = Some(directory);
        })?;
        match view.begin(session, guard).await {
            Ok(()) => Ok(view),
            Err(error) => {
                // The first error is the one to tell; what cannot be undone is the guard's.
                match view.teardown(session, Outcome::Failed).await {
                    Ok(()) => guard.tell(|state| state.pairs.clear())?,
                    Err(more) => {
                        return Err(Error::caused(error.kind(), format!("{error}; then"), more));
                    }
                }
                Err(error)
            }
        }
    }

    /// Everything that can be decided and made outside QEMU.
    async fn outline(session: &Session, request: Request) -> Result<View> {
        let name = &session.identity().name;
        if request.disks.is_empty() {
            return Err(Error::new(Kind::Usage, format!("VM {name}: no disk to back up")));
        }
        if !names::fits(&request.snapshot, request.disks.len()) {
            return Err(Error::new(
                Kind::Failed,
                format!("{} is no id for a snapshot", request.snapshot),
            ));
        }
        let (disks, plans): (Vec<Disk>, Vec<DiskPlan>) = request.disks.into_iter().unzip();
        let ways = point::choose(session, &disks, request.way)?;
        let mut parts: Vec<Part> = Vec::new();
        for (i, ((disk, plan), way)) in disks.into_iter().zip(plans).zip(ways).enumerate() {
            let name = BitmapName {
                store: request.store.clone(),
                snapshot: request.snapshot.clone(),
                disk: plan.uuid,
            };
            parts.push(Part {
                disk,
                plan,
                way,
                names: Names::new(&request.snapshot, i),
                new: name.to_string(),
                speed: 0,
            });
        }
        point::pauses_on_errors(session, &parts).await?;
        // All pushes begin at once, so they share the limit.
        let pushes = parts.iter().filter(|part| part.way == Way::Push).count() as u64;
        let speed = request.read_limit.map_or(0, |limit| (limit / pushes.max(1)).max(1));
        parts.iter_mut().for_each(|part| part.speed = speed);
        let needs: Vec<Need> = parts.iter().map(need).collect();
        let scratch = Scratch::create(
            &request.scratch_dir,
            &request.snapshot,
            session.peer(),
            &needs,
            request.scratch_max,
        )
        .await?;
        Ok(View {
            vm: session.vm().clone(),
            snapshot: request.snapshot,
            parts,
            scratch,
            servers: Vec::new(),
            targets: Vec::new(),
            instants: Instants::default(),
            frozen: None,
            warnings: Vec::new(),
            freeze: request.freeze,
            server: false,
            ended: false,
        })
    }

    async fn begin(&mut self, session: &Session, guard: &mut Guard) -> Result<()> {
        if self.parts.iter().any(|p| p.way != Way::Push) {
            point::start_server(session, guard, &self.scratch.socket()).await?;
            self.server = true;
        }
        let pairs = self.parts.iter().map(Part::pair).collect();
        guard.tell(|state| state.pairs = pairs)?;
        // Before, for a clear message; after, because that is when it counts.
        point::unchanged(session, &self.parts).await?;
        point::prepare(session, &self.parts, &self.scratch).await?;
        point::unchanged(session, &self.parts).await?;
        self.take(session, guard).await?;
        for (i, part) in self.parts.iter().enumerate() {
            let (socket, dirty) = match part.way {
                Way::Push => {
                    push::copy(session, part, &self.scratch).await?;
                    let socket = self.scratch.push_socket(i);
                    let server = push::serve(&self.scratch.reopen_path(i), &socket, part).await?;
                    let pid = server.id();
                    self.servers.push(server);
                    guard.tell(|state| state.servers.extend(pid))?;
                    (socket, part.dirty().map(|_| push::COPIED))
                }
                Way::Filter | Way::Job => {
                    point::export(session, part).await?;
                    (self.scratch.socket(), part.dirty())
                }
            };
            self.targets.push(Target {
                socket,
                export: part.disk.label.clone(),
                dirty_context: dirty.map(|name| format!("qemu:dirty-bitmap:{name}")),
                size: part.disk.size,
                way: part.way,
            });
        }
        Ok(())
    }

    /// The point in time, inside fs-freeze if that was asked for.
    async fn take(&mut self, session: &Session, guard: &mut Guard) -> Result<()> {
        let frozen = self.freeze(session, guard).await?;
        let result = point::take(session, guard, &self.parts).await;
        if result.is_err() && guard.state().stopped {
            // A guest that stands still cannot thaw; the guard does both.
            return result.map(drop);
        }
        if let Some((path, mut agent, begin)) = frozen {
            let thawed = match agent.thaw().await {
                Ok(n) => n,
                Err(_) => {
                    // The agent takes one client at a time.
                    drop(agent);
                    thaw(&path).await?
                }
            };
            self.frozen = Some(begin.elapsed());
            guard.tell(|state| state.frozen = None)?;
            if thawed == 0 {
                self.inconsistent(Error::new(
                    Kind::Failed,
                    "the guest thawed its file systems before the point in time was over",
                ))?;
            }
        }
        self.instants = result?;
        Ok(())
    }

    /// Freezes; a failure is a warning or an error, as asked for.
    async fn freeze(
        &mut self,
        session: &Session,
        guard: &mut Guard,
    ) -> Result<Option<(PathBuf, Agent, Instant)>> {
        if self.freeze == Freeze::No {
            return Ok(None);
        }
        let error = match self.try_freeze(session, guard).await {
            Ok(frozen) => return Ok(Some(frozen)),
            Err(error) => error,
        };
        if let Some(path) = guard.state().frozen.clone() {
            // It may be half frozen, or freeze yet; a thaw is harmless.
            thaw(&path).await?;
            guard.tell(|state| state.frozen = None)?;
        }
        self.inconsistent(error)?;
        Ok(None)
    }

    /// The file systems are not frozen: a warning, or an error if that was asked for.
    fn inconsistent(&mut self, error: Error) -> Result<()> {
        if self.freeze == Freeze::Require {
            return Err(Error::caused(error.kind(), "fs-freeze was required", error));
        }
        self.warnings.push(format!("not frozen, the snapshot is crash-consistent only: {error}"));
        Ok(())
    }

    async fn try_freeze(
        &self,
        session: &Session,
        guard: &mut Guard,
    ) -> Result<(PathBuf, Agent, Instant)> {
        // The agent of a guest that stands still cannot answer, and would freeze it later.
        let status = session.call(cmd::QueryStatus(json!({})), "").await?;
        if !status.running {
            return Err(Error::new(Kind::Failed, format!("the guest is {}", status.status)));
        }
        let Some(path) = agent::find(session).await? else {
            let text = format!(
                "VM {}: no guest agent is known (agent = \"SOCKET\" in vms.d)",
                self.vm.name
            );
            return Err(Error::new(Kind::Failed, text));
        };
        let mut agent = Agent::connect(&path).await?;
        let told = path.clone();
        guard.tell(|state| state.frozen = Some(told))?;
        let begin = Instant::now();
        if agent.freeze().await? == 0 {
            return Err(Error::new(
                Kind::Failed,
                "the guest has no file system that can be frozen",
            ));
        }
        Ok((path, agent, begin))
    }

    /// One per disk, in the order of the request.
    #[must_use]
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// The new bitmaps' names, in the order of the request.
    #[must_use]
    pub fn bitmaps(&self) -> Vec<String> {
        self.parts.iter().map(|p| p.new.clone()).collect()
    }

    /// When it was, Unix milliseconds.
    #[must_use]
    pub fn point_in_time_ms(&self) -> i64 {
        self.instants.time_ms
    }

    /// How long the guest's CPUs stood still for it.
    #[must_use]
    pub fn stopped(&self) -> Duration {
        self.instants.stopped
    }

    /// How long the guest's file systems were frozen, if they were.
    #[must_use]
    pub fn frozen(&self) -> Option<Duration> {
        self.frozen
    }

    /// What did not go as asked, for people (exit code 3).
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The most that the scratch images took together so far, bytes.
    #[must_use]
    pub fn scratch_peak(&self) -> u64 {
        self.scratch.peak()
    }

    /// The cap on all scratch images together, bytes.
    #[must_use]
    pub fn scratch_cap(&self) -> u64 {
        self.scratch.total()
    }

    /// Whether the guest is better off if it is read slowly: QEMU reads some of it, and what the guest
    /// overwrites until that is done has room in the scratch.
    #[must_use]
    pub fn bears_slow_reads(&self) -> bool {
        let read = self.parts.iter().enumerate().filter(|(_, part)| part.way != Way::Push);
        let mut room = read.map(|(i, _)| self.scratch.has_room(i)).peekable();
        room.peek().is_some() && room.all(|has_room| has_room)
    }

    /// Watches the view beside the reading; returns only when it is broken (scratch full, job or
    /// export ended by someone, QEMU gone). The guest was set going again if it stood because of us.
    pub async fn broken(&self, session: &Session) -> Error {
        watch::broken(session, &self.parts, &self.scratch).await
    }

    /// A read that failed, and why where that is known: the scratch image is full, QEMU is gone, ….
    pub async fn explain(&self, session: &Session, failed: Error) -> Error {
        watch::explain(session, &self.parts, &self.scratch, failed).await
    }

    /// Was everything that was read so far the point in time? To be asked after the last read.
    ///
    /// # Errors
    /// It was not: the backup must fail.
    pub async fn still_valid(&mut self, session: &Session) -> Result<()> {
        for server in &mut self.servers {
            if !matches!(server.try_wait(), Ok(None)) {
                return Err(Error::new(Kind::Failed, "the server of a pushed disk has ended"));
            }
        }
        watch::still_valid(session, &self.parts).await
    }

    /// Ends the view and settles the bitmaps. Can be called again, and after QEMU went away.
    ///
    /// # Errors
    /// Something is left; `fleece cleanup` can try again.
    pub async fn teardown(&mut self, session: &Session, outcome: Outcome) -> Result<()> {
        if self.ended {
            return Ok(());
        }
        self.scratch.used();
        for mut server in self.servers.drain(..) {
            // It may have ended by itself.
            drop(server.kill().await);
        }
        let result = match self.end(session, outcome).await {
            Err(error) if error.is_gone() => match Session::connect(&self.vm).await {
                Ok(again) => self.end(&again, outcome).await,
                Err(error) if error.kind() == Kind::NotFound => Ok(Vec::new()),
                Err(error) => return Err(error),
            },
            other => other,
        };
        let left = result?;
        if !left.is_empty() {
            let text = format!(
                "VM {}: something of the backup is left in QEMU: {}",
                self.vm.name,
                left.join("; ")
            );
            return Err(Error::new(Kind::Failed, text));
        }
        self.scratch.remove();
        self.ended = true;
        Ok(())
    }

    /// What could not be ended.
    async fn end(
        &self,
        session: &Session,
        outcome: Outcome,
    ) -> std::result::Result<Vec<String>, CallError> {
        let mut report =
            end::end_views(session, &names::of_snapshot(&self.snapshot), self.server).await?;
        if self.parts.iter().any(|p| p.way != Way::Filter) {
            end::let_guest_go_on(session, false).await?;
        }
        match outcome {
            Outcome::Committed => {
                for part in &self.parts {
                    if let Some(old) = &part.plan.bitmap {
                        end::remove_bitmap(session, &part.disk.node, old).await?;
                    }
                }
            }
            Outcome::Unknown => {}
            Outcome::Failed => {
                let pairs: Vec<_> = self.parts.iter().map(Part::pair).collect();
                report.left.extend(end::merge_back(session, &pairs).await?.left);
            }
        }
        Ok(report.left)
    }
}

/// A guest that stays frozen is worse than no backup: the view is then ended, and the guard goes on.
async fn thaw(path: &Path) -> Result<u64> {
    agent::thaw_patiently(path)
        .await
        .context(|| "the guest's file systems may still be frozen, the guard goes on trying".into())
}

/// A push copies everything, or what is dirty; the other ways only what the guest overwrites.
fn need(part: &Part) -> Need {
    let dirty = part.plan.bitmap.as_ref().and_then(|name| {
        part.disk.bitmaps.iter().find(|b| b.name.to_string() == *name).map(|b| b.dirty)
    });
    let certain = match (part.way, part.dirty()) {
        (Way::Push, Some(_)) => dirty.unwrap_or(0),
        (Way::Push, None) => part.disk.allocated.min(part.disk.size),
        _ => 0,
    };
    Need { size: part.disk.size, certain }
}
