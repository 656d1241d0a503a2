//! The spool: records that the backup cannot take now, durable on the primary.
//!
//! ```text
//! DIR/GROUP/            mode 0700, locked by its owner (flock on the folder)
//!   address             what is needed to send it, JSON; there before the first segment
//!   log/NNNN.log        segments of a log (crate::log), as on the backup
//! ```
//! A spool holds records of one epoch that follow each other. Segments go when the backup has all of them. What
//! an agent leaves is sent by the next one of its group, in the epoch that it is of, or by `bfs-agent flush`.

mod address;
mod read;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bfs_common::record::{GroupId, Sequence};
use bfs_common::wire::Position;
use serde::{Deserialize, Serialize};

pub use address::Address;
pub use read::Reader;

use crate::lock::Lock;
use crate::log::writer::{Batch, LogWriter};
use crate::log::{LogError, segment::SegmentReader, segment_path, segments, sync_dir};

/// Where spools lie unless told otherwise: it outlives the boot.
pub const DIRECTORY: &str = "/var/lib/bfs/spool";
/// Longest segment; a bound gets at least sixteen.
const SEGMENT_BYTES_MAX: u64 = 64 << 20;

/// This part of its room is for notes of what was touched, when the rest is full.
const NOTES_SHARE: u64 = 8;

/// What the user wants of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoolOptions {
    /// The folder of the groups' folders.
    pub directory: PathBuf,
    /// How long it may get; 0 for none.
    pub bytes_max: u64,
    /// How old what is in it may get.
    pub time_max: Duration,
}

impl Default for SpoolOptions {
    fn default() -> Self {
        Self { directory: DIRECTORY.into(), bytes_max: 4 << 30, time_max: Duration::from_secs(24 * 3600) }
    }
}

/// What can go wrong in a spool.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The folder cannot be made or read.
    #[error("cannot {what} the spool {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Another agent has it.
    #[error("the spool {0} is in use by another agent")]
    InUse(PathBuf),
    /// What it says about itself is not understood.
    #[error("{path}: {why}")]
    Address {
        /// The file.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// Its segments.
    #[error("the spool: {0}")]
    Log(#[from] LogError),
    /// Its bound in bytes.
    #[error("the spool holds as much as it may ({0} MiB)")]
    Full(u64),
    /// Its bound in time.
    #[error("the spool holds records that are older than they may get ({} s)", .0.as_secs())]
    Old(Duration),
}

/// See the module.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    log: PathBuf,
    group: GroupId,
    options: SpoolOptions,
    address: Address,
    writer: Option<LogWriter>,
    /// First record -> bytes, and when it was begun.
    segments: BTreeMap<u64, (u64, SystemTime)>,
    _lock: Lock,
}

/// What an agent before left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// How to send it.
    pub address: Address,
    /// The position that its first record follows.
    pub begin: Position,
    /// Its end.
    pub end: Position,
    /// Bytes of its segments.
    pub bytes: u64,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |error| SpoolError::Io { what, path, error }
}

/// The folder of a group.
#[must_use]
pub fn folder(options: &SpoolOptions, group: &str) -> PathBuf {
    options.directory.join(group)
}

impl Spool {
    /// Takes the spool of a group. `address` is for what will be written.
    ///
    /// # Errors
    /// [`SpoolError`].
    pub fn open(options: SpoolOptions, address: Address) -> Result<Self, SpoolError> {
        let dir = folder(&options, &address.group);
        let lock = lock(&dir)?;
        let (log, group) = (dir.join("log"), address.group_id);
        match DirBuilder::new().mode(0o700).create(&log) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed("make", &log)(e)),
            _ => {}
        }
        let mut spool =
            Self { dir, log, group, options, address, writer: None, segments: BTreeMap::new(), _lock: lock };
        spool.look()?;
        Ok(spool)
    }

    /// Its folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder of its segments.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// What the user wants of it.
    #[must_use]
    pub fn options(&self) -> &SpoolOptions {
        &self.options
    }

    /// Whose records it holds.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// What it was opened for is of this epoch.
    pub fn set_epoch(&mut self, epoch: bfs_common::record::Epoch) {
        self.address.epoch = epoch;
    }

    /// What an agent before left in it, if anything. A torn tail is cut.
    ///
    /// # Errors
    /// Damage.
    pub fn left(&mut self) -> Result<Option<Left>, SpoolError> {
        let Some(first) = segments(&self.log)?.first().copied() else {
            // Whoever removed them may have been killed before that was durable.
            sync_dir(&self.log)?;
            return Ok(None);
        };
        let address = Address::read(&self.dir)?;
        let begin = SegmentReader::open(&self.log, first, self.group)?.header.before;
        let (writer, opened) = LogWriter::open(&self.log, self.group, begin, |_| Ok::<_, LogError>(()))?;
        if let Some((path, bytes)) = opened.cut {
            tracing::warn!("{}: {bytes} bytes of a torn batch were cut", path.display());
        }
        let end = writer.durable();
        self.keep(writer);
        self.look()?;
        let bytes = self.bytes();
        Ok((end.sequence > begin.sequence).then_some(Left { address, begin, end, bytes }))
    }

    /// Appends batches that follow `before`, durably: what is there ends with that. `notes`: they only say what
    /// was touched, so they may use the room that is kept for that, whatever the age of the rest.
    ///
    /// # Errors
    /// [`SpoolError`]; what was there before is there still.
    pub fn append(&mut self, before: Position, batches: &[Batch], notes: bool) -> Result<(), SpoolError> {
        let bytes = batches.iter().map(|b| b.bytes.len() as u64).sum::<u64>();
        let bytes_max = self.options.bytes_max;
        let kept = if notes { 0 } else { bytes_max / NOTES_SHARE };
        if self.bytes() + bytes > bytes_max - kept {
            return Err(SpoolError::Full(bytes_max >> 20));
        }
        let age = self.oldest().and_then(|at| at.elapsed().ok());
        if !notes && age.is_some_and(|age| age > self.options.time_max) {
            return Err(SpoolError::Old(self.options.time_max));
        }
        if self.writer.is_none() {
            self.address.write(&self.dir)?;
            let (writer, _) = LogWriter::open(&self.log, self.group, before, |_| Ok::<_, LogError>(()))?;
            self.keep(writer);
        }
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let appended = writer.append(batches);
        if let Some((number, synced)) = writer.segment() {
            self.segments.entry(number).or_insert((0, SystemTime::now())).0 = synced;
        }
        Ok(appended?)
    }

    fn keep(&mut self, mut writer: LogWriter) {
        writer.limit_segments((self.options.bytes_max / 16).min(SEGMENT_BYTES_MAX));
        self.writer = Some(writer);
    }

    /// Whether there is a segment, not the last one, of which the backup has every record.
    #[must_use]
    pub fn has_done(&self, up_to: Sequence) -> bool {
        self.segments.keys().nth(1).is_some_and(|second| *second <= up_to.0 + 1)
    }

    /// Segments of which the backup has every record go.
    ///
    /// # Errors
    /// What the system says.
    pub fn acknowledged(&mut self, up_to: Sequence) -> Result<(), SpoolError> {
        LogWriter::remove_applied(&self.log, up_to, 0)?;
        self.look()
    }

    /// Everything in it was sent, or is not wanted.
    ///
    /// # Errors
    /// What the system says.
    pub fn clear(&mut self) -> Result<(), SpoolError> {
        self.writer = None;
        // Oldest first: what a crash leaves is the end of it.
        let all = segments(&self.log)?;
        for number in &all {
            let path = segment_path(&self.log, *number);
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
        // Also when an earlier try removed them and failed here.
        if !all.is_empty() || !self.segments.is_empty() {
            // Before another epoch is asked for: back after a power cut they would be of one that is over.
            sync_dir(&self.log)?;
        }
        self.segments.clear();
        Ok(())
    }

    /// Whether it can begin anywhere: it holds no segment, and none is being made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty() && self.writer.is_none()
    }

    /// What its segments need on the disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.segments.values().map(|(bytes, _)| bytes).sum()
    }

    /// When the oldest segment was begun.
    #[must_use]
    pub fn oldest(&self) -> Option<SystemTime> {
        self.segments.values().next().map(|(_, begun)| *begun)
    }

    fn look(&mut self) -> Result<(), SpoolError> {
        let mut found = BTreeMap::new();
        for number in segments(&self.log)? {
            let path = segment_path(&self.log, number);
            let meta = fs::metadata(&path).map_err(failed("look at", &path))?;
            let begun = meta.created().or_else(|_| meta.modified()).unwrap_or_else(|_| SystemTime::now());
            found.insert(number, (meta.len(), begun));
        }
        self.segments = found;
        Ok(())
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // An empty one leaves nothing behind; the lock goes with the folder.
        if self.segments.is_empty() && segments(&self.log).is_ok_and(|all| all.is_empty()) {
            Address::remove(&self.dir);
            let _ = fs::remove_dir(&self.log);
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Makes the folder and those above it, durably: without its name nothing in it would be found again.
fn make(dir: &Path) -> Result<(), SpoolError> {
    let Some(above) = dir.parent() else { return Ok(()) };
    // Of a relative path with one name nothing is left.
    let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
    if !above.exists() {
        make(above)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(failed("make", dir)(e)),
        _ => Ok(sync_dir(above)?),
    }
}

/// Makes the folder and takes its lock. Who has it removes it when it is empty, so it may have to be made
/// again.
fn lock(dir: &Path) -> Result<Lock, SpoolError> {
    loop {
        make(dir)?;
        let folder = match File::open(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            opened => opened.map_err(failed("open", dir))?,
        };
        let Ok(lock) = Lock::take(folder).map_err(failed("lock", dir))? else {
            return Err(SpoolError::InUse(dir.into()));
        };
        let ours = lock.file().metadata().map_err(failed("look at", dir))?;
        if fs::metadata(dir).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
            return Ok(lock);
        }
    }
}

#[cfg(test)]
mod tests;
