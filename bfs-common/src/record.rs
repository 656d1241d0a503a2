//! The records of a group's stream, format version 1.
//!
//! Records speak of *objects* by number and of directory entries as (directory object, name);
//! never of paths or inode numbers, except where a record ties an object to its identity on a
//! host. Each record states a result (these bytes, this entry, these attributes), so that doing
//! it twice is the same as doing it once and the last one wins. Raw bytes (the data of a write,
//! the value of an xattr, a symlink's target) travel behind the record as its *payload* and never
//! through serde.

use serde::{Deserialize, Serialize};

macro_rules! newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The next one.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

newtype! {
    /// An object of a group. Starts at 1 (the number 0 is never given), never used again.
    ObjectId
}
newtype! {
    /// Place of a record in its group's stream. The first record is 1; 0 means "none yet".
    Sequence
}
newtype! {
    /// Number of a checkpoint of a group. The first is 1; 0 means "none yet".
    CheckpointId
}
newtype! {
    /// One life of an agent, granted by the replayer, only upwards.
    Epoch
}

/// Hash over all records up to a place in the stream: blake3(previous hash, encoded record).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChainHash(pub [u8; 32]);

impl ChainHash {
    /// The hash before the first record of a group.
    pub const START: Self = Self([0; 32]);
}

impl std::fmt::Debug for ChainHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for byte in &self.0[..6] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("..")
    }
}

/// Identity of a group, drawn at random when it is made; the name is only a label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupId(pub [u8; 16]);

/// An inode on a host in a form that survives a remount: file system, not device number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Identity {
    /// File system UUID, or what `statfs` gives as `f_fsid` where there is none.
    pub file_system: u128,
    /// Subvolume (btrfs), else 0.
    pub subvolume: u64,
    /// Inode number.
    pub ino: u64,
    /// Inode generation.
    pub generation: u32,
}

/// Type of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FileKind {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Symbolic link; its target is the payload of [`Record::Object`].
    Symlink,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
}

impl FileKind {
    /// From the type bits of a mode (`S_IFMT`); `None` for an unknown type.
    #[must_use]
    pub const fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & 0o170_000 {
            0o100_000 => Self::Regular,
            0o040_000 => Self::Directory,
            0o120_000 => Self::Symlink,
            0o010_000 => Self::Fifo,
            0o140_000 => Self::Socket,
            0o020_000 => Self::CharDevice,
            0o060_000 => Self::BlockDevice,
            _ => return None,
        })
    }

    /// The type bits of a mode.
    #[must_use]
    pub const fn mode_bits(self) -> u32 {
        match self {
            Self::Regular => 0o100_000,
            Self::Directory => 0o040_000,
            Self::Symlink => 0o120_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
        }
    }
}

/// Attributes of an object. The size of a regular file is not one of them: it follows from
/// [`Record::Truncate`] and [`Record::Write`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky (`mode & 0o7777`).
    pub permissions: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime_sec: i64,
    /// Modification time, nanoseconds.
    pub mtime_nsec: u32,
}

/// What is suspect, or repaired again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GapScope {
    /// Everything in the group.
    Everything,
    /// An object and all below it.
    Subtree(ObjectId),
    /// Content and attributes of an object.
    Object(ObjectId),
    /// A byte range of an object: offset and end (exclusive).
    Range(ObjectId, u64, u64),
    /// A directory entry.
    Entry(ObjectId, Name),
}

/// Name of a directory entry: bytes, not text; no slash, no zero byte, not `.` or `..`,
/// 1 to 255 bytes ([`Name::new`] checks).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Name(#[serde(with = "serde_bytes_compat")] Box<[u8]>);

impl Name {
    /// Takes the bytes if they are a valid name of an entry.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let valid = !bytes.is_empty()
            && bytes.len() <= crate::abi::NAME_MAX
            && bytes != b"."
            && bytes != b".."
            && !bytes.iter().any(|b| *b == b'/' || *b == 0);
        valid.then(|| Self(bytes.into()))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The name as the operating system's string type.
    #[must_use]
    pub fn as_os_str(&self) -> &std::ffi::OsStr {
        std::os::unix::ffi::OsStrExt::from_bytes(&self.0)
    }
}

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = serde_bytes_compat::deserialize(deserializer)?;
        Self::new(&bytes).ok_or_else(|| serde::de::Error::custom("not a valid entry name"))
    }
}

/// Bytes as a msgpack binary instead of an array of numbers.
mod serde_bytes_compat {
    use serde::{Deserializer, Serializer, de::Visitor};

    #[allow(clippy::borrowed_box, reason = "the signature that serde's `with` asks for")]
    pub fn serialize<S: Serializer>(bytes: &Box<[u8]>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<[u8]>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Box<[u8]>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: serde::de::Error>(self, v: &[u8]) -> Result<Self::Value, E> {
                Ok(v.into())
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

/// Trigger of a checkpoint that is not wanted any longer than the replayer's floor keeps it.
pub const DISCARDED: &str = "discarded";

/// Why a checkpoint was taken, and what its caller wants to find it by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointLabel {
    /// Wall time of the instant, nanoseconds since 1970. A label only: order is by number.
    pub wall_ns: i64,
    /// The user's tag; empty when there is none.
    pub tag: String,
    /// What triggered it: `every`, `bytes`, `ops`, `manual`, `start`, `end`.
    pub trigger: String,
    /// For how long selected processes stood, microseconds; 0 when nobody was stopped.
    pub stopped_us: u64,
}

/// A line of the policy table (the meaning comes with the policies; the record is here so that
/// the format holds it from version 1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyLine {
    /// Path or glob.
    pub pattern: String,
    /// Key and value pairs, checked by the reader.
    pub settings: Vec<(String, String)>,
}

/// One record of the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// The first record of an agent's life.
    EpochBegin {
        /// As granted.
        epoch: Epoch,
        /// `/proc/sys/kernel/random/boot_id` of the primary.
        boot_id: [u8; 16],
        /// Whether capture went on without a hole since the last record of the epoch before.
        complete: bool,
    },
    /// The subtrees of the group. Replaces the list before. A root is an entry of no directory:
    /// its object is named here.
    Roots {
        /// The primary's absolute path and the directory object of each.
        roots: Vec<(PathBytes, ObjectId)>,
    },
    /// An object enters the group. Payload: the target of a symlink, else empty. A regular file
    /// starts empty, a directory without entries.
    Object {
        /// Its number, higher than any before.
        object: ObjectId,
        /// Which inode of the primary it is.
        identity: Identity,
        /// Its type.
        kind: FileKind,
        /// Device number of a device in the user-space form (`makedev`), else 0.
        device: u64,
        /// Its attributes.
        meta: Meta,
    },
    /// The object is now this inode of the primary.
    Rebind {
        /// The object.
        object: ObjectId,
        /// Its new identity.
        identity: Identity,
    },
    /// The object left the group for good; it has no entry any more.
    Forget {
        /// The object.
        object: ObjectId,
    },
    /// The entry is (now) this object, whatever it was before.
    EntrySet {
        /// The directory.
        directory: ObjectId,
        /// The entry.
        name: Name,
        /// What it names.
        object: ObjectId,
    },
    /// The entry is absent.
    EntryDelete {
        /// The directory.
        directory: ObjectId,
        /// The entry.
        name: Name,
    },
    /// The bytes at this offset are the payload; the file grows if it was shorter.
    Write {
        /// The file.
        object: ObjectId,
        /// First byte.
        offset: u64,
    },
    /// This range reads as zeros (a hole where the file system can); the file does not grow.
    Zero {
        /// The file.
        object: ObjectId,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The file has this length: cut, or grown with zeros.
    Truncate {
        /// The file.
        object: ObjectId,
        /// Bytes.
        size: u64,
    },
    /// The object has these attributes.
    Meta {
        /// The object.
        object: ObjectId,
        /// All of them.
        meta: Meta,
    },
    /// The object has this extended attribute. Payload: its value.
    XattrSet {
        /// The object.
        object: ObjectId,
        /// Name with its namespace, e.g. `user.colour`.
        name: String,
    },
    /// The object has no such extended attribute.
    XattrRemove {
        /// The object.
        object: ObjectId,
        /// Name with its namespace.
        name: String,
    },
    /// The last writing descriptor of the file was closed (backup class `close`).
    Closed {
        /// The file.
        object: ObjectId,
    },
    /// What is named here may not be exact on the backup. No checkpoint counts while it is open.
    Gap {
        /// What.
        scope: GapScope,
    },
    /// What is named here is exact again; `Everything` closes all gaps.
    Repaired {
        /// What.
        scope: GapScope,
    },
    /// The policy table of the group, as a whole.
    Policies {
        /// Its lines.
        lines: Vec<PolicyLine>,
    },
    /// Process state that belongs to the next checkpoint. Payload: a piece of the image.
    ProcessImage {
        /// Name of the image file.
        file: String,
        /// Offset of this piece.
        offset: u64,
    },
    /// A rollback to a checkpoint was decided and begins.
    RollbackIntent {
        /// The checkpoint to go back to.
        to: CheckpointId,
    },
    /// The rollback is complete.
    RollbackDone {
        /// The checkpoint that was gone back to.
        to: CheckpointId,
    },
    /// A new history begins here; it continues the parent at this checkpoint.
    History {
        /// The new history.
        history: [u8; 16],
        /// The one before.
        parent: [u8; 16],
        /// The last checkpoint that both have.
        at: CheckpointId,
    },
    /// A checkpoint: it covers exactly the records before this one.
    Checkpoint {
        /// Its number.
        checkpoint: CheckpointId,
        /// What people know it by.
        label: CheckpointLabel,
    },
}

/// An absolute path as bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PathBytes(#[serde(with = "serde_bytes_compat")] pub Box<[u8]>);

impl PathBytes {
    /// From a path.
    #[must_use]
    pub fn new(path: &std::path::Path) -> Self {
        Self(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).into())
    }

    /// As a path.
    #[must_use]
    pub fn as_path(&self) -> &std::path::Path {
        std::path::Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&self.0))
    }
}

impl std::fmt::Debug for PathBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_path().fmt(f)
    }
}
