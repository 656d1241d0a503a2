//! The records of the ring.

use super::{InodeAttr, InodeId, Plain};

/// What a record in the ring is.
pub mod kind {
    /// A call on a descriptor ended: [`super::FileEvent`], then (of an open) the name, then data bytes.
    pub const FILE: u16 = 1;
    /// A call with paths ended: [`super::PathEvent`], then path 1, then path 2.
    pub const PATH: u16 = 2;
    /// The paths of a call as they were at its start, sent only where another thread could have
    /// changed them before the end: [`super::PathEvent`], then path 1, then path 2.
    pub const PATH_ENTER: u16 = 3;
    /// More bytes of a write: [`super::DataEvent`], then data bytes. Comes before the
    /// [`FILE`] record of the same call (same tid, same `start_ns`).
    pub const DATA: u16 = 4;
    /// A followed task made a child: [`super::TaskEvent`].
    pub const FORK: u16 = 5;
    /// A followed task executed a program: [`super::TaskEvent`].
    pub const EXEC: u16 = 6;
    /// A followed task ended: [`super::TaskEvent`].
    pub const EXIT: u16 = 7;
    /// A call that this version does not follow in detail changed, or may have changed, an
    /// object: [`super::FileEvent`] without data. The object's content and attributes count as
    /// suspect.
    pub const TOUCH: u16 = 8;
    /// A writable shared mapping of a file was made: [`super::FileEvent`] without data.
    pub const MAPPED: u16 = 9;
    /// A compat (32-bit or x32) call of a followed task: [`super::TaskEvent`] with the number.
    /// What it wrote is not known.
    pub const COMPAT: u16 = 10;
    /// A process was moved into the selected cgroup: [`super::TaskEvent`].
    pub const JOINED: u16 = 20;
    /// A task was moved out of the selected cgroup: [`super::TaskEvent`]. What it has open others write to now.
    pub const LEFT: u16 = 21;
    /// A selected task hands descriptors to somebody: [`super::TaskEvent`].
    pub const HANDED: u16 = 22;
    /// A task that is not selected changed an object, or opened it for writing: [`super::ForeignEvent`].
    pub const FOREIGN: u16 = 23;
    /// A call of a selected task on a file in scope ended with an error of its disk: [`super::FailedEvent`].
    pub const FAILED: u16 = 24;
    /// A write whose place is known ended: [`super::WriteEvent`], then data bytes. The commonest record,
    /// so the smallest that will do.
    pub const WRITE: u16 = 30;
    /// An operation that goes on beyond this record is going to write a range of a file:
    /// [`super::FileEvent`] without data. It counts when the [`ENDED`] of the same `tid` and
    /// `start_ns` comes.
    pub const FILE_BEGUN: u16 = 11;
    /// The same for an operation with paths: [`super::PathEvent`], then path 1, then path 2.
    pub const PATH_BEGUN: u16 = 12;
    /// What was begun has ended, or a call of which cannot be told which files it changed
    /// ([`super::ending::UNKNOWN`]): [`super::TaskEvent`], whose `value` is one of [`super::ending`].
    pub const ENDED: u16 = 13;
    /// Pages of a file of the map `MAPPED` became dirty, whoever did it: [`super::DirtyEvent`].
    /// From here on, until they are clean again, they can be stored into without a record.
    pub const DIRTIED: u16 = 14;
    /// Writes of one task to one file, each of which went on where the one before had ended:
    /// [`super::RunEvent`]. Their bytes are to be read from the file.
    pub const RUN: u16 = 31;
}

/// Bits of [`EventHeader::flags`].
pub mod flag {
    /// The record's data bytes are what the file got (capture rule: nobody else could change the
    /// buffer between the kernel's copy and the probe's).
    pub const INLINE: u16 = 1 << 0;
    /// The data is to be read from the file: `file_offset` and `count` name the range.
    pub const BY_REFERENCE: u16 = 1 << 1;
    /// Where the write landed is not known (shared file position, races of appends): the bytes
    /// lie within `range_start .. range_end` if that is not empty, else anywhere in the object.
    pub const OFFSET_UNKNOWN: u16 = 1 << 2;
    /// The call failed but may have left an effect.
    pub const FAILED: u16 = 1 << 3;
    /// The open created the file (`FMODE_CREATED`).
    pub const CREATED: u16 = 1 << 4;
    /// The open had `O_TRUNC` and succeeded on a file that was there.
    pub const TRUNCATED: u16 = 1 << 5;
    /// A path could not be read (fully).
    pub const PATH_UNREADABLE: u16 = 1 << 6;
    /// More than one thread had the memory or the working directory: a path may differ from the
    /// one that the kernel used; compare with the [`super::kind::PATH_ENTER`] record.
    pub const PATH_SHARED: u16 = 1 << 7;
    /// The inode had no name left (`i_nlink` 0) at the end of the call.
    pub const UNLINKED: u16 = 1 << 8;
    /// The file description is used by more than one descriptor or task (`f_count` > 1).
    pub const SHARED_FILE: u16 = 1 << 9;
    /// Part of the data found no room in the ring: the data is to be read from the file.
    pub const DATA_LOST: u16 = 1 << 10;
    /// The object was opened with `O_APPEND`, or the write asked to append.
    pub const APPEND: u16 = 1 << 11;
    /// [`super::PathEvent`]: `parent1` holds the attributes of the base directory, read at the
    /// end of the call, and path 1 has a single component: that directory is the parent.
    pub const PARENT1_ATTR: u16 = 1 << 12;
    /// The same for path 2.
    pub const PARENT2_ATTR: u16 = 1 << 13;
    /// [`super::PathEvent`]: path 1 begins with a link to a descriptor of the task (`/proc/self/fd/N`,
    /// `/dev/fd/N`); the base is what that descriptor names, and the rest goes on from there.
    pub const DESCRIPTOR1: u16 = 1 << 14;
    /// The same for path 2.
    pub const DESCRIPTOR2: u16 = 1 << 15;
}

/// The start of every record in the ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventHeader {
    /// Bytes that count, this header included.
    pub len: u32,
    /// One of [`kind`].
    pub kind: u16,
    /// Bits of [`flag`].
    pub flags: u16,
    /// When the call started.
    pub start_ns: u64,
    /// When the probe at the end of the call ran.
    pub end_ns: u64,
    /// Thread, in the initial PID namespace.
    pub tid: u32,
    /// Thread group, in the initial PID namespace.
    pub tgid: u32,
    /// System call number (x86-64 table); 0xffff_ffff for what is not a system call.
    pub nr: u32,
    /// How long after `end_ns` the last of what the record tells was read.
    pub read_ns: u32,
    /// Result of the call.
    pub ret: i64,
}

/// A call on a descriptor.
///
/// After the struct come `name_len` bytes of the dentry's name, then the data bytes of an
/// [`flag::INLINE`] write that are not in [`kind::DATA`] records before.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileEvent {
    /// Header; kind is one of [`kind::FILE`], [`kind::TOUCH`], [`kind::MAPPED`].
    pub header: EventHeader,
    /// The object, read at the end of the call.
    pub attr: InodeAttr,
    /// Of an open, the directory of the dentry, read at the end of the call.
    pub parent: InodeAttr,
    /// Address of the `struct file`: equal for all users of one open file description.
    pub file: u64,
    /// First byte that a write changed; the new length for truncations.
    pub file_offset: u64,
    /// Bytes written.
    pub count: u64,
    /// With [`flag::OFFSET_UNKNOWN`]: the range that the write may have touched.
    pub range_start: u64,
    /// End of that range, exclusive; 0 when nothing is known.
    pub range_end: u64,
    /// `f_flags`.
    pub f_flags: u32,
    /// `f_mode`.
    pub f_mode: u32,
    /// Bytes of the name that follow.
    pub name_len: u32,
    /// Data bytes that follow the name.
    pub data_len: u32,
}

/// A write whose place is known, of a file that is known since its open: the head of a [`FileEvent`].
///
/// As many bytes were written as `header.ret` says. After the struct come the data bytes of an
/// [`flag::INLINE`] write that are not in [`kind::DATA`] records before.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteEvent {
    /// Header; kind is [`kind::WRITE`].
    pub header: EventHeader,
    /// The file, read at the end of the call.
    pub attr: InodeAttr,
    /// First byte that it changed.
    pub file_offset: u64,
}

impl From<WriteEvent> for FileEvent {
    fn from(write: WriteEvent) -> Self {
        Self {
            header: EventHeader { kind: kind::FILE, ..write.header },
            attr: write.attr,
            file_offset: write.file_offset,
            count: write.header.ret as u64,
            data_len: write.header.len - size_of::<WriteEvent>() as u32,
            ..Self::default()
        }
    }
}

/// Bytes of a large write, in order, before its [`FileEvent`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataEvent {
    /// Header; `tid` and `start_ns` tie it to the write.
    pub header: EventHeader,
    /// Offset of these bytes from the start of the write.
    pub offset: u64,
    /// Data bytes that follow.
    pub data_len: u32,
    /// Zero.
    pub reserved: u32,
}

/// A call with one or two paths, relative to the directories `base1` and `base2`.
///
/// After the struct come `path1_len` bytes of the first and `path2_len` bytes of the second path,
/// without terminating zeros. For symlink the first path is the target of the link.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathEvent {
    /// Header; kind is [`kind::PATH`] or [`kind::PATH_ENTER`].
    pub header: EventHeader,
    /// The directory that relative path 1 starts from (working directory or dirfd), or, with
    /// `AT_EMPTY_PATH` and an empty path, the object itself.
    pub base1: InodeAttr,
    /// The same for path 2.
    pub base2: InodeAttr,
    /// The root directory of the process.
    pub root: InodeId,
    /// System call arguments as the kernel got them.
    pub args: [u64; 6],
    /// Bytes of path 1.
    pub path1_len: u32,
    /// Bytes of path 2.
    pub path2_len: u32,
    /// Number of the mount namespace of the process.
    pub mounts: u32,
    /// Zero.
    pub reserved: u32,
}

/// A followed task was made, executed a program, or ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskEvent {
    /// Header; `tid` and `tgid` are those of the task that the event is about (FORK: of the
    /// child).
    pub header: EventHeader,
    /// FORK: the parent's tid. EXEC: the tid before. COMPAT: the number of the call. EXIT: 1 if the
    /// kernel wrote a core.
    pub value: u64,
    /// EXIT: 1 if this was the last thread of its process, else 0.
    pub last_thread: u32,
    /// Zero.
    pub reserved: u32,
}

/// Pages of a file became dirty. Comes before the first store that this allows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyEvent {
    /// Header; the task is the one that dirtied them, start and end are the same.
    pub header: EventHeader,
    /// The file.
    pub id: InodeId,
    /// Where they begin.
    pub offset: u64,
    /// How many bytes they are.
    pub len: u64,
}

/// Writes of one task that followed each other without a gap, in one record.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunEvent {
    /// Header: from the start of the first one to when the record was made, after the last one; `ret` is the sum of their bytes.
    pub header: EventHeader,
    /// The file, read when the record was made; a `mode` of 0: its attributes could not be told any more.
    pub attr: InodeAttr,
    /// First byte that they changed.
    pub file_offset: u64,
    /// How many there were.
    pub calls: u32,
    /// Zero.
    pub reserved: u32,
}

impl RunEvent {
    /// The attributes of the file, where they are known.
    #[must_use]
    pub fn known_attr(&self) -> Option<InodeAttr> {
        (self.attr.mode != 0).then_some(self.attr)
    }
}

/// Somebody who is not selected changed an object.
///
/// While a record of an object waits in the ring (the map `FOREIGN` says so), others of it that started later
/// have none of their own: this one stands for all that were made until it is taken out.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForeignEvent {
    /// Header; the start is that of the first change that the call made.
    pub header: EventHeader,
    /// The object.
    pub id: InodeId,
    /// One of [`foreign`].
    pub how: u32,
    /// Zero.
    pub reserved: u32,
}

/// [`ForeignEvent::how`].
pub mod foreign {
    /// Its entries, content or attributes changed.
    pub const CHANGED: u32 = 0;
    /// It was opened for writing.
    pub const OPENED: u32 = 1;
}

/// A call on a file ended with an error that says that bytes are lost, or may not be kept.
///
/// From the first record of a file on there is no other one of it until the agent takes it out of the map `FAILING`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FailedEvent {
    /// Header; `nr` is the call and `ret` the error. Start and end are the same.
    pub header: EventHeader,
    /// The file.
    pub id: InodeId,
}

/// Whether a result says that bytes are lost, or may not be kept: EIO; and by which a file system says that what stands
/// on the disk is not what it wrote (EBADMSG, EUCLEAN), or a block device that a place cannot be read (ENODATA, EILSEQ,
/// EREMOTEIO: `blk_errors` in block/blk-core.c). Not ENOSPC and its like, nor that nobody can be reached.
#[inline(always)]
#[must_use]
pub const fn is_of_disk(ret: i64) -> bool {
    ret < 0 && matches!(ret, -5 | -61 | -74 | -84 | -117 | -121)
}

/// A record of the ring, with the bytes that follow its struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A call on a descriptor ([`kind::FILE`], [`kind::WRITE`], [`kind::TOUCH`], [`kind::MAPPED`]).
    File {
        /// The struct.
        event: FileEvent,
        /// Name of the dentry.
        name: &'a [u8],
        /// Data bytes.
        data: &'a [u8],
    },
    /// Bytes of a large write.
    Data {
        /// The struct.
        event: DataEvent,
        /// Data bytes.
        data: &'a [u8],
    },
    /// A call with paths ([`kind::PATH`], [`kind::PATH_ENTER`]).
    Path {
        /// The struct.
        event: PathEvent,
        /// First path.
        path1: &'a [u8],
        /// Second path.
        path2: &'a [u8],
    },
    /// A task event ([`kind::FORK`], [`kind::EXEC`], [`kind::EXIT`], [`kind::COMPAT`],
    /// [`kind::JOINED`], [`kind::ENDED`]).
    Task {
        /// The struct.
        event: TaskEvent,
    },
    /// Writes that followed each other ([`kind::RUN`]).
    Run {
        /// The struct.
        event: RunEvent,
    },
    /// Pages became dirty ([`kind::DIRTIED`]).
    Dirty {
        /// The struct.
        event: DirtyEvent,
    },
    /// Somebody else changed something ([`kind::FOREIGN`]).
    Foreign {
        /// The struct.
        event: ForeignEvent,
    },
    /// A call saw an error of the disk ([`kind::FAILED`]).
    Failed {
        /// The struct.
        event: FailedEvent,
    },
}

impl<'a> Event<'a> {
    /// Takes a record of the ring apart; `None` if it is malformed (shorter than it says, or of
    /// an unknown kind).
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header = EventHeader::read_from(bytes)?;
        let bytes = bytes.get(..header.len as usize)?;
        match header.kind {
            kind::FILE | kind::TOUCH | kind::MAPPED | kind::FILE_BEGUN => {
                let event = FileEvent::read_from(bytes)?;
                let (name, data) = two(bytes.get(size_of::<FileEvent>()..)?, event.name_len, event.data_len)?;
                Some(Self::File { event, name, data })
            }
            kind::WRITE => {
                let event = WriteEvent::read_from(bytes)?;
                Some(Self::File {
                    event: event.into(),
                    name: &[],
                    data: bytes.get(size_of::<WriteEvent>()..)?,
                })
            }
            kind::DATA => {
                let event = DataEvent::read_from(bytes)?;
                let (data, _) = two(bytes.get(size_of::<DataEvent>()..)?, event.data_len, 0)?;
                Some(Self::Data { event, data })
            }
            kind::PATH | kind::PATH_ENTER | kind::PATH_BEGUN => {
                let event = PathEvent::read_from(bytes)?;
                let (path1, path2) =
                    two(bytes.get(size_of::<PathEvent>()..)?, event.path1_len, event.path2_len)?;
                Some(Self::Path { event, path1, path2 })
            }
            kind::FORK
            | kind::EXEC
            | kind::EXIT
            | kind::COMPAT
            | kind::JOINED
            | kind::LEFT
            | kind::HANDED
            | kind::ENDED => Some(Self::Task { event: TaskEvent::read_from(bytes)? }),
            kind::RUN => Some(Self::Run { event: RunEvent::read_from(bytes)? }),
            kind::DIRTIED => Some(Self::Dirty { event: DirtyEvent::read_from(bytes)? }),
            kind::FOREIGN => Some(Self::Foreign { event: ForeignEvent::read_from(bytes)? }),
            kind::FAILED => Some(Self::Failed { event: FailedEvent::read_from(bytes)? }),
            _ => None,
        }
    }

    /// The header, whatever the kind.
    #[must_use]
    pub fn header(&self) -> &EventHeader {
        match self {
            Self::File { event, .. } => &event.header,
            Self::Data { event, .. } => &event.header,
            Self::Path { event, .. } => &event.header,
            Self::Task { event } => &event.header,
            Self::Run { event } => &event.header,
            Self::Dirty { event } => &event.header,
            Self::Foreign { event } => &event.header,
            Self::Failed { event } => &event.header,
        }
    }
}

fn two(bytes: &[u8], first: u32, second: u32) -> Option<(&[u8], &[u8])> {
    let (first, second) = (first as usize, second as usize);
    let rest = bytes.get(first..)?;
    Some((&bytes[..first], rest.get(..second)?))
}
