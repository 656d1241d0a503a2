//! What the engine needs from the outside world, as one trait: so that the decisions run against
//! the real kernel and file systems, and in tests against a simulated world.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_common::abi::{InodeId, RunEvent};
use bfs_common::record::{FileKind, Meta, Name, ObjectId, Sequence};

use super::outbox::Batch;
use super::resolve::Start;
use super::same::Known;
use crate::tree::Xattrs;

/// An inode as read from the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Which.
    pub inode: InodeId,
    /// Its type.
    pub kind: FileKind,
    /// Attributes.
    pub meta: Meta,
    /// Bytes of a regular file, else 0.
    pub size: u64,
    /// Device number (`makedev` form) of a device.
    pub device: u64,
    /// Target of a symlink.
    pub target: Vec<u8>,
    /// Hard links.
    pub links: u32,
}

/// What stands at a path outside of the set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A directory.
    Directory(InodeId),
    /// Something else that ends a path.
    Leaf(InodeId),
    /// A symlink.
    Symlink {
        /// Its target.
        target: Vec<u8>,
        /// When its inode was changed last, by the monotonic clock: made or renamed, above all. 0 where that is
        /// not known: what is left out, for a process with mounts of its own.
        changed_ns: u64,
    },
    /// Nothing (any more).
    Nothing,
    /// It cannot be told any more.
    Unknown,
}

/// A piece of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment<'a> {
    /// Bytes at an offset.
    Data(u64, &'a [u8]),
    /// A hole: offset and length.
    Hole(u64, u64),
}

/// A call that a followed task is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// Thread.
    pub tid: u32,
    /// Process.
    pub tgid: u32,
    /// System call number.
    pub nr: u32,
    /// When it started.
    pub start_ns: u64,
    /// Not a call that a task is in, but an operation that goes on by itself.
    pub request: Option<Request>,
}

/// An asynchronous operation that is not known to have ended. In a stop it may rest unfinished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// By which the probes know it.
    pub key: u64,
    /// The `tid` of its records.
    pub id: u32,
    /// What it changes.
    pub target: Target,
    /// Nobody tells its end: there is no use in waiting.
    pub silent: bool,
}

/// What an asynchronous operation changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Bytes and attributes of a file.
    File {
        /// Which.
        inode: InodeId,
        /// First byte.
        start: u64,
        /// Behind the last.
        end: u64,
    },
    /// What its record at the beginning says.
    Paths,
    /// Not known.
    Unknown,
}

/// A record of the ring, copied out, and the ring position after it.
#[derive(Clone, Debug, Default)]
pub struct OwnedEvent {
    /// The record.
    pub bytes: Vec<u8>,
    /// Ring position behind it.
    pub ring_position: u64,
}

/// Losses that the probes named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Objects whose records were lost.
    pub inodes: Vec<InodeId>,
    /// Something was lost that has no name: everything is suspect.
    pub everything: bool,
}

/// Why the engine cannot go on for now.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Reading the replicated set failed in a way that is not "gone".
    #[error("cannot read {what}: {source}")]
    Read {
        /// What was read.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The destination is away and the bound of what is kept for it is reached.
    #[error("the destination is away and {0} bytes wait for it: detached")]
    Detached(u64),
    /// The destination is away and there is no room for more bytes: from now on only what is touched is to be
    /// noted. What was handed over was taken.
    #[error("the backup is away and there is no room for what it misses: {0}")]
    NoRoom(String),
    /// The probes cannot be read any more.
    #[error("the probes cannot be read: {0}")]
    Probes(String),
    /// The processes could not be stopped.
    #[error("the processes could not be stopped: {0}")]
    Stop(String),
}

/// The outside world. Reads by inode give `None` when the inode is gone.
pub trait Host {
    /// `CLOCK_MONOTONIC` in nanoseconds.
    fn now(&self) -> u64;

    /// What an entry of a directory names; `None` when it is absent or lies on another file
    /// system.
    ///
    /// # Errors
    /// [`HostError::Read`]; a directory that is gone is an absent entry.
    fn child(&mut self, directory: InodeId, name: &Name) -> Result<Option<Stat>, HostError>;

    /// The names in a directory.
    ///
    /// # Errors
    /// [`HostError::Read`].
    fn list(&mut self, directory: InodeId) -> Result<Option<Vec<Name>>, HostError>;

    /// The attributes of an inode.
    ///
    /// # Errors
    /// [`HostError::Read`].
    fn stat(&mut self, inode: InodeId) -> Result<Option<Stat>, HostError>;

    /// The extended attributes of an inode.
    ///
    /// # Errors
    /// [`HostError::Read`].
    fn xattrs(&mut self, inode: InodeId) -> Result<Option<Xattrs>, HostError>;

    /// Asks the destination what it has as of this record, which was shipped, of objects up to this number: from now on
    /// [`Self::known`] tells of that.
    fn ask(&mut self, position: Sequence, highest: ObjectId);

    /// What the destination is known to have of a file of the model, as the stream was when it was asked.
    fn known(&mut self, object: ObjectId) -> Known;

    /// Reads a range of a regular file, in order, in segments; what lies beyond its end is not
    /// given. `None` when the inode is gone. Unless `holes` is set nobody asks the file system for holes, which
    /// holds up who writes to the file: what there is of them is read as zeros.
    ///
    /// # Errors
    /// [`HostError::Read`].
    fn read(
        &mut self,
        inode: InodeId,
        range: Range<u64>,
        holes: bool,
        each: &mut dyn FnMut(Segment<'_>),
    ) -> Result<Option<()>, HostError>;

    /// The absolute path of a directory that the model does not know, as the process sees it, if it can
    /// be found: through the inode, or as working directory of the process.
    fn outside_path(&mut self, directory: InodeId, start: &Start) -> Option<PathBuf>;

    /// The absolute path of a directory that the model does not know, as the host sees it.
    fn real_path(&mut self, directory: InodeId) -> Option<PathBuf>;

    /// What stands at an absolute path, as the process sees it; no symlink is followed.
    fn look(&mut self, start: &Start, path: &Path) -> Seen;

    /// Whether the process sees the same mounts as the host.
    fn same_mounts(&mut self, start: &Start) -> bool;

    /// Whether something is mounted of which this directory is the root: then what is above it depends
    /// on the way that led to it.
    fn is_bound(&mut self, directory: InodeId) -> bool;

    /// Whether the kernel writes the core of a process that dies to a file.
    fn cores_are_files(&mut self) -> bool;

    /// Whether this is the root directory of the host.
    fn is_host_root(&mut self, directory: InodeId) -> bool;

    /// The calls in flight that may have started at or before `t`.
    ///
    /// # Errors
    /// [`HostError::Probes`].
    fn in_flight(&mut self, t: u64) -> Result<Vec<InFlight>, HostError>;

    /// Takes the calls that have ended out of the list.
    ///
    /// # Errors
    /// [`HostError::Probes`].
    fn drop_ended(&mut self, flying: &mut Vec<InFlight>) -> Result<(), HostError>;

    /// The files that a process has mapped, shared, so that they may be written; `None` when it changes its
    /// mappings all the time.
    ///
    /// # Errors
    /// [`HostError::Read`].
    fn mapped_by(&mut self, tgid: u32) -> Result<Option<Vec<InodeId>>, HostError>;

    /// Whether no direct I/O is in flight on a file: what was written into it stands in it, and
    /// nothing comes by itself. Also when the inode is gone.
    ///
    /// # Errors
    /// [`HostError`].
    fn is_at_rest(&mut self, inode: InodeId) -> Result<bool, HostError>;

    /// Whether a call that does not end waits at a point before which it changes nothing, such as
    /// the open of a FIFO that waits for the other side.
    fn is_idle(&mut self, call: &InFlight) -> bool;

    /// Copies the next record of the ring into `event`, whose buffer is used again; says whether
    /// there was one.
    ///
    /// # Errors
    /// [`HostError::Probes`].
    fn next_event(&mut self, event: &mut OwnedEvent) -> Result<bool, HostError>;

    /// From now on, until [`Self::join_writes`], each write has a record of its own. Gives the runs of writes that
    /// have no record yet; what is not among them stands in the ring, or belongs to a call that is in flight.
    ///
    /// # Errors
    /// [`HostError::Probes`].
    fn part_writes(&mut self) -> Result<Vec<RunEvent>, HostError>;

    /// Writes that go on where the last one ended may have one record together.
    fn join_writes(&mut self);

    /// What was lost since the last call.
    ///
    /// # Errors
    /// [`HostError::Probes`].
    fn losses(&mut self) -> Result<Losses, HostError>;

    /// Keeps in mind, for a successor, that a file is mapped; and if `pages` says so, records from now on which
    /// of its pages become dirty, as an event before they can be stored into. `false` where that is not done:
    /// stores into clean pages cannot be told there, or there is no room.
    ///
    /// # Errors
    /// [`HostError::Probes`].
    fn follow_mapped(&mut self, inode: InodeId, pages: bool) -> Result<bool, HostError>;

    /// These objects have several names, of which some may lie outside. A successor that goes on with the ring has to know,
    /// before the host releases what is shipped from now on.
    fn keep_multiple(&mut self, objects: &[ObjectId]);

    /// These objects are gone. Until the stream is durable up to `sealed` a successor may still have them. What is kept
    /// again meanwhile stays.
    fn forget_multiple(&mut self, objects: Vec<ObjectId>, sealed: Sequence);

    /// These files are not mapped any more. Until the stream is durable up to `sealed` a successor has to find them all the
    /// same: it would not know that they have to be read. What is followed again meanwhile stays.
    fn forget_mapped(&mut self, files: Vec<InodeId>, sealed: Sequence);

    /// How many shared mappings there are, in whatever process, that may be made writable; 0 when the inode is
    /// gone, `None` when that cannot be told: on tmpfs, before the inode was looked up by a name.
    ///
    /// # Errors
    /// [`HostError::Read`].
    fn writable_mappings(&mut self, inode: InodeId) -> Result<Option<u32>, HostError>;

    /// From now on each change of the inode shows as an event, and whoever was changing it when this was called,
    /// with its lock held, is done. `false` when the inode is gone.
    ///
    /// # Errors
    /// [`HostError::Read`].
    fn await_others(&mut self, inode: InodeId) -> Result<bool, HostError>;

    /// How many open files, of whoever, may write to the inode; 0 when it is gone, `None` when that cannot be told.
    ///
    /// # Errors
    /// [`HostError::Read`].
    fn open_for_writing(&mut self, inode: InodeId) -> Result<Option<u32>, HostError>;

    /// The files that processes which are not selected have open for writing, each with one of them.
    ///
    /// # Errors
    /// [`HostError::Probes`].
    fn foreign_writers(&mut self) -> Result<Vec<(InodeId, u32)>, HostError>;

    /// What the process is called, or was.
    fn command_of(&mut self, tgid: u32) -> Option<String>;

    /// Cleans ranges of a file: writes back what was dirty when it was called, so that the next store makes it
    /// dirty anew. Gives those ranges where that came about.
    ///
    /// # Errors
    /// [`HostError::Read`].
    fn clean(&mut self, inode: InodeId, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>, HostError>;

    /// Lets a little time pass.
    fn pause(&mut self, time: Duration);

    /// Hands batches to the shipper. Where too much is queued already it waits as long as the
    /// destination makes progress.
    ///
    /// # Errors
    /// [`HostError::NoRoom`] where bytes are not to be sent on; [`HostError::Detached`] past the bound.
    fn ship(&mut self, batches: Vec<Batch>) -> Result<(), HostError>;

    /// Everything that was read from the ring up to here is in what was shipped.
    fn ship_position(&mut self, position: u64);

    /// Stops the selected processes.
    ///
    /// # Errors
    /// [`HostError::Stop`]; they run then.
    fn stop(&mut self) -> Result<(), HostError>;

    /// Whether they still stand: asked after the last read, before it is believed.
    fn standing(&mut self) -> bool;

    /// Lets them go.
    fn go(&mut self);
}
