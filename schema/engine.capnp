@0xd2c1a5b0f3e84c17;
# What the plugin (`fleece`) and the admin's tool (`fleecectl`) say to the
# engine of their host. Numbers are little endian, offsets and lengths are
# bytes unless a name says blocks. UUIDs are 16 bytes. A failed call carries
# "fleece:<kind>: <message>" as its reason; the kinds are those of the exit code table.

const protocolVersion :UInt16 = 2;
# The newest that this version speaks. Raised when a change is not compatible.
const oldestProtocol :UInt16 = 2;
# That of the version before. Both sides speak the newest that both know; where there is none, `hello`
# refuses, and says which program is to be upgraded.

interface Engine {
  hello @0 (program :Text, version :Text, protocol :UInt16, oldestProtocol :UInt16) -> (info :EngineInfo);
  # protocol: the newest that the program speaks; oldestProtocol 0: it speaks no other.

  settle @1 (vm :Data, snapshots :List(Text)) -> (fates :List(Fate), latest :Snapshot);
  # What became of the snapshots that dirty bitmaps of this VM name. One that is
  # neither committed nor ended is ended here for good (a tombstone), so that its
  # bitmap can be merged back. `latest` is null when the VM has no snapshot.
  # Fails with busy while a session of this VM lives.

  openBackup @2 (request :BackupRequest) -> (plan :BackupPlan, session :BackupSession);
  # Waits for a reader's place (memory), before the point in time is taken.

  snapshots @3 (vm :Text) -> (snapshots :List(Snapshot));
  # Of one VM (name or UUID), oldest first, or of all for "".

  openDisk @4 (vm :Text, snapshot :Text, disk :Text) -> (snapshot :Snapshot, disk :Disk, image :DiskImage);
  # snapshot: id, "latest", a date (2026-11-20) or "". disk: name, UUID, or "" where there is one only.

  vmConfig @5 (vm :Text, snapshot :Text) -> (config :Data);

  status @6 () -> (status :Status);
  sessions @7 () -> (sessions :List(SessionStatus), silent :List(Text));
  # Of all hosts of the cluster; silent: the hosts that did not answer in time.

  verify @8 (vm :Text, snapshot :Text, events :EventSink) -> (clean :Bool);
  # Everything, or what one VM or snapshot needs ("" = all).
  rebuildIndex @9 (events :EventSink, partition :Int32 = -1) -> (entries :UInt64);
  # Of this host's index; -1: all partitions. entries: those that were built.
  repair @10 (dryRun :Bool, events :EventSink) -> (whole :Bool);
  # Puts good copies in the place of what is marked as damaged. `whole`: every
  # snapshot can be restored (dryRun: could be, after it).

  hosts @11 () -> (reports :List(Text), owners :Data);
  # All hosts of the cluster, this one first, as JSON (engine/src/hosts.rs); those that do not answer
  # in time are `silent`, or `revoked`. owners: the number of the host that owns each slice of the fingerprints.
  drain @12 (host :Text, drain :Bool) -> ();
  # The host shall own nothing (or its share again); its backups go on.
  rebalance @13 (without :Text) -> (report :Text);
  # What would move if the partition map were computed now, `without` ("" for none) one host: JSON
  # (engine/src/hosts.rs). Changes nothing.
  finalize @14 () -> (level :UInt32);
  # Raises the store to the newest level that this engine knows; refused while a host does not know it.
  useKey @15 () -> (key :UInt32);
  # Has all engines seal what is new under the newest encryption key of this host's key file; refused while
  # a host lacks it.
  resumeBackup @16 (request :BackupRequest, snapshot :Text)
      -> (committed :Snapshot, plan :BackupPlan, session :BackupSession);
  # Goes on with a session whose engine is gone, for the same snapshot, from the first block; the request
  # is that of `openBackup`, with the parents that were granted. `committed`, and nothing else, if that
  # engine had committed it. Fails where the session was ended, or a newer snapshot is there.
  tidy @17 (dryRun :Bool, events :EventSink) -> (removed :UInt64);
  # Takes away objects that nobody needs; refused to an engine that has not the keeper's role, unless dryRun.
  # removed: their number.
}

enum Fate { committed @0; ended @1; }

struct EngineInfo {
  version @0 :Text;
  storeId @1 :Data;
  blockSize @2 :UInt32;
  segmentSize @3 :UInt32;
  fingerprintState @4 :List(UInt32);
  # The five words of SHA-1's state after the 64 secret bytes. The message's
  # length in its padding is 64 + blockSize.
  host @5 :Text;
  encrypted @6 :Bool;
  takesFiles @7 :Bool;
  # Files may be handed over (see DiskImage.stream, BackupSession.lend). To another engine they must not be: its
  # reading of the socket may stop at one for ever.
}

struct Disk {
  uuid @0 :Data;
  name @1 :Text;
  size @2 :UInt64;
}

struct Snapshot {
  id @0 :Text;
  vm @1 :Data;
  vmName @2 :Text;
  timeMs @3 :Int64;      # the point in time, Unix milliseconds
  parent @4 :Text;       # "" for none
  disks @5 :List(Disk);
  counts @6 :Counts;
  host @7 :Text;
  durationMs @8 :UInt64;
  damaged @9 :Bool;
}

struct Counts {
  # Bytes of disk, each byte read in one of them; stored is after compression.
  read @0 :UInt64;
  zero @1 :UInt64;
  unchanged @2 :UInt64;   # settled by the parent snapshot
  duplicate @3 :UInt64;
  new @4 :UInt64;
  stored @5 :UInt64;
  undetected @6 :UInt64;  # stored again because another writer was silent
}

struct BackupRequest {
  vm @0 :Data;
  vmName @1 :Text;
  adopt @2 :Bool;         # this VM takes over the snapshots of `vm`, whatever its name was
  disks @3 :List(DiskRequest);
  config @4 :Data;        # the VM's configuration, kept in the manifest (at most 256 KiB)
  hypervisor @5 :Text;
}

struct DiskRequest {
  uuid @0 :Data;
  name @1 :Text;
  size @2 :UInt64;
  parent @3 :Text;        # the snapshot that its valid dirty bitmap names, or "" for a full read
}

struct BackupPlan {
  snapshot @0 :Text;
  disks @1 :List(DiskPlan);
  inFlight @2 :UInt32;    # bytes of reads that this session may have in flight
  cache @3 :UInt32;       # bytes of read blocks it may keep instead of reading them again
}

struct DiskPlan {
  incremental @0 :Bool;
  reason @1 :Text;        # why not, where a parent was asked for and refused
  forced @2 :List(Range); # damaged in the parent: to be read though the bitmap is clean
}

struct Range { offset @0 :UInt64; length @1 :UInt64; }

interface BackupSession {
  # Disks in the order of the request, each ascending; a position is never sent twice.
  # Dropping this capability without commit ends the session.

  submit @0 (disk :UInt16, extents :List(Extent), fingerprints :Data) -> stream;
  # fingerprints: 20 bytes for each block of the extents of kind data, in order.
  # A disk read in full must be covered without a gap; of an incremental one
  # only what is dirty is sent, everything else is as in the parent.

  endWindow @1 () -> ();
  # The scan of this window is complete (BlocksPerWindow data blocks at most).
  # Returns when the next window may begin.

  endScan @2 () -> ();
  # No further window comes. An open one is ended with it.

  grants @3 () -> (extents :List(Grant), done :Bool);
  # The next blocks to write, in order, at most GrantsPerCall extents; waits for
  # them. `done`: everything is settled, commit may follow. Blocks of later
  # grants can come from any earlier position (another session's that it gave up).

  write @4 (runs :List(Grant), data :Data) -> stream;
  # Granted blocks, in the order of the grants, of one or more of them: at most
  # MaxWrite bytes in MaxRuns runs; whole blocks, a disk's last one padded with zeros.

  commit @5 (pointInTimeMs :Int64, bitmaps :List(Text)) -> (snapshot :Snapshot);
  abort @6 (reason :Text) -> ();
  progress @7 () -> (counts :Counts, stage :Text);

  lend @8 (disk :UInt16, file :UInt32) -> (taken :Bool);
  # file: one that this connection handed over, numbered as in DiskImage.stream, which holds the disk's
  # bytes at their offsets and is written to by nobody while the session lives. Granted blocks of the
  # disk need not be sent then. Not taken: it did not arrive, or the session has eight of them.

  writeLent @9 (runs :List(Grant)) -> ();
  # As `write`, of disks that were lent: the engine reads the blocks itself. At most MaxLent bytes.
  # Of this and `lend` one call at a time.
}

const blocksPerWindow :UInt32 = 4194304;
const grantsPerCall :UInt32 = 4096;
const maxWrite :UInt32 = 524288;
const maxRuns :UInt32 = 128;
# As many as MaxWrite holds of the smallest blocks.
const maxLent :UInt32 = 4194304;
# A call's way there and back is short beside it, and whoever else has a word for the session waits
# for no more than that.
const blocksPerSubmit :UInt32 = 8192;

struct Extent {
  firstBlock @0 :UInt64;
  blocks @1 :UInt32;
  zero @2 :Bool;
}

struct Grant {
  firstBlock @0 :UInt64;
  blocks @1 :UInt32;
  disk @2 :UInt16;
}

interface DiskImage {
  read @0 (offset :UInt64, length :UInt32) -> (data :Data);
  # At most MaxWrite bytes, zeros included; for serving at random.
  extents @1 (offset :UInt64, length :UInt64) -> (extents :List(ImageExtent));
  # At most 4096, from offset on, adjacent ones of a kind merged.
  stream @2 (sink :BlockSink, ordered :Bool, damagedZero :Bool, file :UInt32)
      -> (written :UInt64, holes :List(Range));
  # All that is not zero; by container, out of disk order, unless `ordered`.
  # file: 0, or which of the files that this connection handed over (SCM_RIGHTS; the first is 1)
  # to write into: `sink` then only learns how much was. Where that file did not arrive, the data
  # are sent.
  # holes: ranges left out because they are damaged (only with damagedZero).
}

struct ImageExtent { offset @0 :UInt64; length @1 :UInt64; zero @2 :Bool; }

interface BlockSink {
  write @0 (runs :List(Range), data :Data) -> stream;
  # The bytes of all runs, one after the other: at most MaxWrite. Changed blocks
  # are scattered; a message for each would cost more than its bytes.
  wrote @1 (bytes :UInt64) -> stream;
  # So many more bytes are in the file that was handed over.
}

interface EventSink {
  event @0 (json :Text) -> stream;
}

struct Status {
  logicalBytes @0 :UInt64;   # sizes of all disks of all snapshots
  uniqueBlocks @1 :UInt64;   # distinct fingerprints
  uniqueBytes @2 :UInt64;
  storedBytes @3 :UInt64;    # the store's objects, all of them
  snapshots @4 :UInt64;
  vms @5 :UInt64;
  indexBytes @6 :UInt64;
  host @7 :Text;
  store @8 :Text;
  storeId @9 :Data;
  encrypted @10 :Bool;
  memoryBudget @11 :UInt64;
  peakAnonymous @12 :UInt64; # RssAnon seen, bytes
  sessions @13 :List(SessionStatus);
  undetectedBlocks @14 :UInt64;
  damagedBlocks @15 :UInt64;
  version @16 :Text;
  hosts @17 :UInt32;         # of the cluster
  hostsSilent @18 :UInt32;   # of them those that did not say what they have: uniqueBlocks lacks it
  doubleBlocks @19 :UInt64;  # found stored a second time
}

struct SessionStatus {
  vm @0 :Data;
  vmName @1 :Text;
  snapshot @2 :Text;
  stage @3 :Text;
  counts @4 :Counts;
  ageMs @5 :UInt64;
  requested @6 :UInt64;      # blocks whose fingerprint was asked
  host @8 :Text;
  stageMs @7 :List(UInt64);  # milliseconds so far of scan, detect, write, settle, publish
}
