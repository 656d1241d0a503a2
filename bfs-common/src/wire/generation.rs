//! Checkpoints that are kept: what is said of them, of their objects and of the blocks of their files; and one file newer than they are.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::CatalogObject;
use crate::record::{CheckpointId, CheckpointLabel, Meta, ObjectId};

/// A checkpoint that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationLine {
    /// Its number.
    pub checkpoint: CheckpointId,
    /// Its label.
    pub label: CheckpointLabel,
    /// Objects that changed since the one before.
    pub changed: u64,
    /// Bytes of files that were written since.
    pub bytes: u64,
    /// Bytes of the images of its processes; none where it has files only.
    pub process: Option<u64>,
}

/// One object of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeObject {
    /// It, as it was; what is too much for one line comes in more of the same number.
    pub object: CatalogObject,
    /// Something about it changed since.
    pub changed: bool,
    /// blake3 of the content of a regular file, if it was asked for.
    pub content: Option<[u8; 32]>,
}

/// Of which files of a generation digests are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Digests {
    /// Of none.
    None,
    /// Of those that changed since.
    Changed,
    /// Of all.
    All,
}

/// Bytes of a block that has a digest of its own.
pub const DIGEST_BLOCK: u64 = 4096;
/// Bytes of a digest: the first of its blake3.
pub const DIGEST_BYTES: usize = 16;

/// Digests of a file's blocks; more of the same file come in the next lines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestLine {
    /// The file.
    pub object: ObjectId,
    /// The digests, [`DIGEST_BYTES`] each; the last block ends with the file.
    pub digests: Bytes,
}

/// A regular file that no checkpoint has so yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewestFile {
    /// Its size in bytes.
    pub size: u64,
    /// Attributes.
    pub meta: Meta,
    /// Names and values of the extended attributes.
    pub xattrs: Vec<(String, Bytes)>,
}
