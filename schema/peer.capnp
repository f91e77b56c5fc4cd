@0xb9f1c6d27a53e08d;
# What the engines of a cluster say to each other, over TLS with certificates on both sides. A host
# calls to send; what comes back is sent by a call of the other one.

const peerProtocol :UInt16 = 2;
# The newest that this version speaks. Raised when a change is not compatible. 2: frames hand grants over
# whose slices move.
const oldestPeerProtocol :UInt16 = 1;
# That of the version before. Two hosts speak the newest that both know; where there is none, `greet`
# refuses, and says which host is to be upgraded.

interface Peer {
  greet @0 (us :Greeting) -> (you :Greeting, received :UInt64, unreached :Bool);
  # First of all. `received`: the last frame of the caller's process that was taken. `unreached`: its
  # frames are not taken, because who is called has given the caller up and cannot reach it to answer.

  deliver @1 (number :UInt64, frame :Data) -> ();
  # A frame of messages (engine/src/cluster/frame.rs), numbered from 1 in each process of the
  # sender. Answered once it was taken in; a number that was taken before is passed over. Number
  # 0 is a sign of life without a frame. Refused to who was given up, or has to greet again.

  describe @2 () -> (report :Text);
  # How it is with the host, as JSON (engine/src/hosts.rs).
  sessions @3 () -> (sessions :Text);
  # The backups that run on it, as JSON, likewise.
}

struct Greeting {
  host @0 :Text;         # must be the name in the certificate
  store @1 :Data;        # the store's id: 16 bytes
  mapDigest @2 :UInt64;  # of cluster.static; 0 where etcd says who is in the cluster
  instance @3 :UInt64;   # what this process says to that host; another one: it knows nothing of what was said
  protocol @4 :UInt16;   # the oldest that it speaks
  version @5 :Text;
  newestProtocol @6 :UInt16;  # 0: it speaks no other
}
