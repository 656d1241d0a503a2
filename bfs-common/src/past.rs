//! What is asked about checkpoints that are kept, beside their whole trees: what differs between two, which
//! of them changed a path, and single looks into one, for a mount.

use serde::{Deserialize, Serialize};

use crate::record::{CheckpointId, CheckpointLabel, FileKind, Meta, Name, ObjectId, PathBytes};
use crate::wire::CatalogObject;

/// In what an object differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aspect {
    /// Its names.
    Names,
    /// Bytes or size of a file, target of a symlink.
    Content,
    /// Permission bits.
    Mode,
    /// User or group.
    Owner,
    /// Time of modification.
    Time,
    /// Extended attributes.
    Xattrs,
}

/// An object at a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// Where it stands, sorted; at least one.
    pub paths: Vec<PathBytes>,
    /// Its type.
    pub kind: FileKind,
    /// Size of a regular file.
    pub size: u64,
    /// Attributes.
    pub meta: Meta,
}

/// One difference between two checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// At the older one.
    pub before: Option<Side>,
    /// At the newer one.
    pub after: Option<Side>,
    /// In what it differs, if it is there at both.
    pub changed: Vec<Aspect>,
    /// How many bytes of a file differ, with those that it became longer or shorter.
    pub bytes: u64,
}

/// What a checkpoint did to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// It is the oldest that is kept: what changed in it is not known any more.
    Oldest,
    /// It came.
    Created,
    /// It is the same object, changed.
    Changed,
    /// Another object stands there.
    Replaced,
    /// It is gone.
    Removed,
}

/// A checkpoint that changed a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionLine {
    /// Its number.
    pub checkpoint: CheckpointId,
    /// Its label.
    pub label: CheckpointLabel,
    /// What it did.
    pub event: Event,
    /// The object after it; none if it is gone.
    pub after: Option<Side>,
    /// What it changed. Content that was written counts, even if it was the same.
    pub changed: Vec<Aspect>,
}

/// A look into a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Look {
    /// Which roots has it? Answered by [`Seen::Roots`].
    Roots,
    /// An object. Answered by [`Seen::Object`].
    Object(ObjectId),
    /// What a name of a directory stands for. Answered by [`Seen::Object`].
    Entry(ObjectId, Name),
    /// Entries of a directory, those behind a name or all. Answered by [`Seen::Entries`].
    Entries(ObjectId, Option<Name>),
    /// The value of an extended attribute. Answered by [`Seen::Bytes`].
    Xattr(ObjectId, String),
    /// Bytes of a file: from where on, and how many at most. Answered by [`Seen::Bytes`].
    Bytes(ObjectId, u64, u32),
}

/// Most bytes of a file in one answer.
pub const LOOK_BYTES_MAX: u32 = 1 << 20;

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seen {
    /// The label and the roots.
    Roots(CheckpointLabel, Vec<(PathBytes, ObjectId)>),
    /// An object without its entries and without the values of its extended attributes, and how many names it
    /// has. None if it is not there.
    Object(Option<(CatalogObject, u32)>),
    /// Some entries, in the order of their names, and whether they are the last.
    Entries(Vec<(Name, ObjectId, FileKind)>, bool),
    /// Bytes, in the body of the frame: of a file fewer than asked for only at its end. False if there is no such
    /// attribute.
    Bytes(bool),
    /// It cannot be read, and why.
    Failed(String),
}
