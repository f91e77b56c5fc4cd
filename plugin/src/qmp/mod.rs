//! QEMU through QMP: sessions, bitmaps, views, the guest agent, the guard.
//!
//! The sequence of a backup:
//! ```text
//! let vm      = vms::find(dir, name)? | Vm::at_socket(..)
//! let lock    = running::Lock::take(run_dir, &vm.qmp)?            // Busy: another backup of this VM
//! let session = Session::connect(&vm).await?                      // version, features, identity()
//! let lock2   = running::Lock::of_vm(run_dir, session.identity().uuid)?  // it may have two monitors
//! recover::end_leftovers(run_dir, &session, &mut report).await?   // what dead runs left, not their bitmaps
//! let disks   = disk::list(&session).await?.disks                 // choose with Disk::is_called
//! let named   = bitmap::named_snapshots(&disks, store)            // -> engine.settle(vm, named)
//! let plan    = bitmap::plan(&all disks, Known { store, fates, latest, known }, Uuid::new_v4)
//! bitmap::carry_out(&session, &plan.recovery).await?              // merge back, drop
//! //  engine.openBackup(parents: plan.disks[i].parent(), config: session.configuration())
//! //  parent refused: plan.disks[i].make_full(reason); --full: the same
//! let mut guard = Guard::spawn(&guard::Options { .. }, &vm)?      // before anything is changed
//! let mut view  = View::open(&session, &mut guard, request).await?   // the point in time
//! //  read view.targets() over NBD beside view.broken(&session) in a select!; a failed read: view.explain()
//! //  meanwhile Load::of(&session), for the pace
//! view.still_valid(&session).await?                               // after the last read
//! guard.committing()?
//! //  engine commit(view.point_in_time_ms(), view.bitmaps())
//! //  the engine is gone: engine.resumeBackup, guard.not_committed()?, and again from the reading on
//! view.teardown(&session, Outcome::Committed).await?              // Failed after any error or Ctrl-C
//! guard.done()
//! ```
//! Whatever happens after `Guard::spawn`, the VM goes back to what it was: by `teardown`, or by the
//! guard if this process dies. Drop NBD connections before `teardown`.

pub mod agent;
pub mod bitmap;
#[cfg(test)]
mod bitmap_tests;
pub mod check;
pub mod command;
pub mod disk;
pub mod end;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub mod guard;
pub mod load;
mod names;
mod point;
mod push;
pub mod recover;
pub mod running;
pub mod schema;
pub mod scratch;
pub mod session;
pub mod view;
mod watch;
mod wire;
