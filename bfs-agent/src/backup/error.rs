//! What can go wrong in a store.

use std::io;
use std::path::{Path, PathBuf};

use bfs_common::record::{CheckpointId, ObjectId, Sequence};

use crate::keys::KeyError;
use crate::log::LogError;
use crate::net::AddressError;

/// What can go wrong in a store.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file or folder could not be read, made or changed.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Before-images on another disk.
    #[error("before-images in {folder}: {why}")]
    Images {
        /// Their folder.
        folder: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another process owns the store.
    #[error("the store {store} is in use by process {pid}: stop that one, or give another --store")]
    InUse {
        /// The store.
        store: PathBuf,
        /// Who has it, as far as it said so.
        pid: String,
    },
    /// Not a store, and not empty.
    #[error("{0} is neither a store nor an empty folder: give a folder of its own with --store")]
    NotAStore(PathBuf),
    /// There is no store.
    #[error("{0} is not a store: `bfs-replayer serve --store {0} ...` makes one")]
    NoStore(PathBuf),
    /// Written by a newer release.
    #[error("the store {store} has format {found}, this release knows {known}: install a newer one")]
    NewerFormat {
        /// The store.
        store: PathBuf,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// What was written is not what is there.
    #[error(
        "the store is damaged: {path}: {why}; nothing was changed, keep a copy before anything else is tried"
    )]
    Corrupt {
        /// Where.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// The index is gone, and what it was the index of is there.
    #[error(
        "the store has backup files of group {group:?}, but no index: {path} is missing; nothing was changed. If the file was \
         moved, put it back, but never an older copy of it; else `bfs-replayer check --rebuild-index --store DIR` makes it again"
    )]
    NoIndex {
        /// Where it should be.
        path: PathBuf,
        /// A group that has files.
        group: String,
    },
    /// The index is there, and is not that of the store as it is now.
    #[error(
        "the store's index {path} cannot be used: {why}; nothing was changed. `bfs-replayer check --rebuild-index --store DIR` \
         makes it again"
    )]
    IndexUnusable {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The index cannot be made again.
    #[error("the index cannot be made again from {path}: {why}; nothing was changed")]
    NoRebuild {
        /// The copy, or what of it is in the way.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A batch for the log that does not follow what is in it: a fault of this program.
    #[error("{dir}: records that follow record {follows} cannot stand behind record {stands}")]
    OutOfOrder {
        /// The log.
        dir: PathBuf,
        /// The last record that is there.
        stands: Sequence,
        /// The record that the batch follows.
        follows: Sequence,
    },
    /// A fault of this program: a panic, which the part that had it survives.
    #[error("a fault of this program, please report it: {0}")]
    Panicked(String),
    /// The index failed.
    #[error("the store's index failed: {0}")]
    Index(Box<redb::Error>),
    /// The tree is not what the applier left.
    #[error("{0}: the tree in the store was changed by something else than the replayer")]
    Foreign(String),
    /// Records that cannot be applied.
    #[error("the stream cannot be applied: {0}")]
    Stream(String),
    /// The checkpoint is not kept.
    #[error("group {group:?} has no generation {checkpoint}: {range}; `bfs-replayer generations` lists them")]
    NoGeneration {
        /// The group.
        group: String,
        /// What was asked for.
        checkpoint: CheckpointId,
        /// What there is.
        range: String,
    },
    /// Bytes of a generation are lost.
    #[error(
        "checkpoint {checkpoint}: bytes {start} to {end} of object {object} are lost: its backup file was changed by \
         something else than the replayer, or damaged; `bfs-replayer check --read-data` names all that is"
    )]
    Lost {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// The file.
        object: ObjectId,
        /// Where it begins.
        start: u64,
        /// Where it ends.
        end: u64,
    },
    /// A step is under way, or failed half way.
    #[error(
        "a checkpoint of group {0:?} is half applied: try again when `bfs-replayer status` shows no trouble"
    )]
    Applying(String),
    /// What a reader knew of before-images stands in another file now: it begins again.
    #[error("the before-images from checkpoint {0} on were merged meanwhile")]
    Merged(CheckpointId),
    /// An address to listen on cannot be used.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Nothing can be bound there.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        error: io::Error,
    },
    /// Keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// A crash that a test asked for.
    #[cfg(test)]
    #[error("crash point")]
    Crash,
}

impl BackupError {
    /// For `map_err`: an I/O error with what was tried on what.
    pub(crate) fn io<E: Into<io::Error>>(
        what: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.as_ref().to_path_buf();
        move |error| Self::Io { what, path, error: error.into() }
    }

    /// Whether it may be that a file of images was merged into another one meanwhile: whoever reads looks again.
    pub(crate) fn is_merged(&self) -> bool {
        match self {
            Self::Merged(_) => true,
            Self::Io { error, .. } => error.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }

    pub(crate) fn corrupt(path: impl AsRef<Path>, why: impl ToString) -> Self {
        Self::Corrupt { path: path.as_ref().into(), why: why.to_string() }
    }
}

impl From<LogError> for BackupError {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Io { what, path, error } => Self::Io { what, path, error },
            LogError::Corrupt { path, why } => Self::Corrupt { path, why },
            LogError::OutOfOrder { dir, stands, follows } => Self::OutOfOrder { dir, stands, follows },
        }
    }
}

macro_rules! from_redb {
    ($($error:ty),*) => {
        $(impl From<$error> for BackupError {
            fn from(error: $error) -> Self {
                Self::Index(Box::new(error.into()))
            }
        })*
    };
}
from_redb!(
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);
