//! Bringing the primary's files back to a checkpoint.
//!
//! Each line is durable before the next begins:
//! 1. the [`scan`] of what stands, and the [`plan`] (pure): what is restored, made again, removed;
//! 2. everything that is needed is fetched, compared and written into the *staging* folder, on the
//!    same file system, beside the subtree: new objects in `new/`, bytes for files that stay in
//!    `data/`. Until here no file of the program was touched;
//! 3. the [`journal`]: the intent. From here on a crash means that the next agent finishes it, and
//!    it needs no backup for that;
//! 4. every place that loses its object is emptied into `aside/`; then a mark says so;
//! 5. bytes and attributes; places are filled; attributes of directories;
//! 6. sync, and all of it is compared by reading;
//! 7. the journal goes, then the rest of the staging folder.
//!
//! Objects are found by inode (file handles), never by path, so 4 to 6 can be done again from the
//! beginning at any time. Like the applier of the backup, and for the same reasons.

pub mod apply;
pub mod busy;
pub mod journal;
pub mod plan;
pub mod scan;
pub mod stage;

use std::io;
use std::path::{Path, PathBuf};

use super::engine::host::HostError;
use super::reader::ReaderError;
use crate::generation::ReadError;

/// Why files are not brought back.
#[derive(Debug, thiserror::Error)]
pub enum RollbackError {
    /// The backup does not give what is needed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A file of the primary cannot be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A subtree cannot be opened.
    #[error(transparent)]
    Root(#[from] ReaderError),
    /// Something cannot be read, made or changed.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A subtree of the checkpoint is not one of these.
    #[error("{0:?} is a --path of the checkpoint, and none that was given now")]
    NoRoot(PathBuf),
    /// Processes use what would be changed.
    #[error("files that would be changed are in use:\n  {}", .0.join("\n  "))]
    Busy(Vec<String>),
    /// Files of others stand where something has to go.
    #[error("what others made is in the way:\n  {}", .0.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join("\n  "))]
    InTheWay(Vec<PathBuf>),
    /// A mount is in the way.
    #[error("a file system is mounted at {0:?}, which would be moved or removed")]
    Mounted(PathBuf),
    /// The intent cannot be read.
    #[error("{path:?} is damaged: {why}")]
    Journal {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A file that is needed is gone.
    #[error("{0} is gone: it was removed while files were brought back")]
    Gone(String),
    /// The files are not what they should be now.
    #[error("after everything was brought back, these still differ:\n  {}", .0.join("\n  "))]
    Differs(Vec<String>),
}

impl RollbackError {
    pub(super) fn io<E: Into<io::Error>>(
        what: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.as_ref().to_owned();
        move |error| Self::Io { what, path, error: error.into() }
    }
}
