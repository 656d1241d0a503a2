//! The kernel/user ABI: what the probes put into the ring and what the agent puts into the maps.
//!
//! Rules: every struct is `repr(C)`, has no padding, and its size is asserted below; a record in
//! the ring starts with an [`EventHeader`], whose `len` says how many bytes count (the ring may
//! hold more, because the probes reserve in size classes). Times are `bpf_ktime_get_ns`, which is
//! `CLOCK_MONOTONIC`.

pub use crate::requests::{Request, ending, request};

/// Changes with every change of layout or meaning in this module; the agent refuses to adopt
/// pinned maps of another version.
pub const ABI_VERSION: u32 = 4;

/// Longest path that the kernel takes, with the terminating zero (`include/uapi/linux/limits.h`).
pub const PATH_MAX: usize = 4096;

/// Longest name of one directory entry, without a terminating zero.
pub const NAME_MAX: usize = 255;

/// Entries of the map of followed tasks.
pub const TASKS_MAX: u32 = 32_768;

/// Entries of the map that names objects whose record found no room in the ring.
pub const SUSPECTS_MAX: u32 = 65_536;

/// Entries of the map of asynchronous operations in flight.
pub const REQUESTS_MAX: u32 = 32_768;

/// Entries of the map of followed io_uring contexts.
pub const RINGS_MAX: u32 = 8_192;

/// How many devices (`s_dev`) with subtrees in scope the probes tell apart.
pub const DEVICES_MAX: usize = 16;

/// An inode as the kernel knows it at the time of a call.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId {
    /// `inode.i_ino`; 0 means "no inode".
    pub ino: u64,
    /// `super_block.s_dev` in the kernel's form (major << 20 | minor); on btrfs the anonymous
    /// device of the subvolume.
    pub dev: u32,
    /// `inode.i_generation`.
    pub generation: u32,
}

impl InodeId {
    /// No inode.
    pub const NONE: Self = Self { ino: 0, dev: 0, generation: 0 };

    /// Whether there is an inode at all.
    #[must_use]
    pub const fn is_some(&self) -> bool {
        self.ino != 0
    }
}

/// Attributes of an inode, read in the probe at the end of the call.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InodeAttr {
    /// Which inode.
    pub id: InodeId,
    /// `i_size` in bytes.
    pub size: u64,
    /// `i_mtime`, seconds.
    pub mtime_sec: i64,
    /// `i_mtime`, nanoseconds.
    pub mtime_nsec: u32,
    /// `i_mode`, type and permission bits.
    pub mode: u32,
    /// `i_uid` as the kernel holds it (initial user namespace).
    pub uid: u32,
    /// `i_gid` as the kernel holds it (initial user namespace).
    pub gid: u32,
    /// `i_nlink`.
    pub nlink: u32,
    /// Zero.
    pub reserved: u32,
}

/// What a record in the ring is.
pub mod kind {
    /// A call on a descriptor ended: [`super::FileEvent`], then name bytes, then data bytes.
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
    /// A write whose place is known ended: [`super::WriteEvent`], then data bytes. The commonest record,
    /// so the smallest that will do.
    pub const WRITE: u16 = 30;
    /// An operation that goes on beyond this record is going to write a range of a file:
    /// [`super::FileEvent`] without data. It counts when the [`ENDED`] of the same `tid` and
    /// `start_ns` comes.
    pub const FILE_BEGUN: u16 = 11;
    /// The same for an operation with paths: [`super::PathEvent`], then path 1, then path 2.
    pub const PATH_BEGUN: u16 = 12;
    /// What was begun has ended: [`super::TaskEvent`], whose `value` is one of
    /// [`super::ending`].
    pub const ENDED: u16 = 13;
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
    /// The directory of the dentry through which it was opened, read at the end of the call.
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

/// Value of the map `TASKS`, keyed by tid: a followed task and the call that it is in.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskState {
    /// When the call in flight started; 0 when there is none. Written after `active`.
    pub start_ns: u64,
    /// 1 from before `start_ns` is taken until after the record of the call stands in the ring.
    pub active: u32,
    /// The call in flight.
    pub nr: u32,
    /// Thread group.
    pub tgid: u32,
    /// Bits of [`slot`].
    pub flags: u32,
    /// The first six arguments of the call.
    pub args: [u64; 6],
    /// `struct file` of the descriptor, 0 for calls without one.
    pub file: u64,
    /// Address of the descriptor's inode in the kernel, 0 without one.
    pub inode_addr: u64,
    /// Inode of the descriptor.
    pub inode: InodeId,
    /// `f_pos` at the start.
    pub pos: u64,
    /// `i_size` at the start.
    pub size: u64,
    /// Start of the range of addresses last seen to be private anonymous memory.
    pub private_start: u64,
    /// End of that range; 0 when nothing is known.
    pub private_end: u64,
    /// `struct file` that the last call on a descriptor had, if it was a regular file in scope whose inode
    /// is `inode`; else 0.
    pub known_file: u64,
    /// Its super block.
    pub known_sb: u64,
    /// One of [`role`]; the only field that others than the task itself change.
    pub role: u32,
    /// Zero.
    pub reserved: u32,
}

/// [`TaskState::role`]: how the task stands to the selection.
pub mod role {
    /// It is selected.
    pub const SELECTED: u32 = 0;
    /// It was moved out of the selected cgroup. Its slot goes, by its own hand, when the call that it
    /// is in has its record.
    pub const LEAVES: u32 = 1;
}

/// Bits of [`TaskState::flags`]: what the probe at the start of a call found.
pub mod slot {
    /// The file description had more users than this one descriptor.
    pub const SHARED_FILE: u32 = 1 << 0;
    /// The descriptor had `O_APPEND`.
    pub const APPEND: u32 = 1 << 1;
    /// The file system is btrfs: the device is that of the subvolume.
    pub const BTRFS: u32 = 1 << 2;
    /// A call that usually takes a path took a descriptor (`utimensat` without a path).
    pub const BY_DESCRIPTOR: u32 = 1 << 3;
    /// A record of the paths at the start was made.
    pub const PATH_SHARED: u32 = 1 << 4;
    /// The descriptor's file had no name.
    pub const NAMELESS: u32 = 1 << 5;
    /// The inode was not read at the start: it seemed to be that of the call before.
    pub const KNOWN: u32 = 1 << 16;
    /// A call of the 32-bit table; number and arguments are those of its like in the 64-bit table.
    pub const COMPAT: u32 = 1 << 6;
    /// What the call takes could not be read at its start.
    pub const UNREADABLE: u32 = 1 << 7;
}

/// `nr` of a [`TaskState`] between two calls.
pub const NO_CALL: u32 = u32::MAX;

/// Value of the map `SUSPECTS`: an object whose records were lost.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Suspect {
    /// Records lost.
    pub lost: u64,
    /// When the last one was lost.
    pub last_ns: u64,
}

/// Indices into the array `COUNTERS` (u64 each).
pub mod counter {
    /// Records put into the ring.
    pub const RECORDS: u32 = 0;
    /// Reserves that failed; each is named in `SUSPECTS` or by [`RESCAN`].
    pub const RESERVE_FAILED: u32 = 1;
    /// Names could not be kept: the whole replicated set is suspect. Rises, never falls.
    pub const RESCAN: u32 = 2;
    /// Writes whose bytes were copied in the probe.
    pub const INLINE: u32 = 3;
    /// Writes whose bytes are read from the file.
    pub const BY_REFERENCE: u32 = 4;
    /// Reads of user memory that failed.
    pub const USER_UNREADABLE: u32 = 5;
    /// `sys_exit` without `sys_enter` (answered by seccomp, or entered before we came).
    pub const NO_ENTER: u32 = 6;
    /// Compat calls.
    pub const COMPAT: u32 = 7;
    /// Tasks that found no room in `TASKS`.
    pub const TASKS_FULL: u32 = 8;
    /// Large writes whose bytes found no room in the ring and go by reference.
    pub const DATA_LOST: u32 = 9;
    /// io_uring and AIO operations that may change a file. Rises before the operation is in
    /// `REQUESTS`.
    pub const ASYNC: u32 = 10;
    /// Operations that found no room in `REQUESTS`, or rings in `RINGS`.
    pub const REQUESTS_FULL: u32 = 11;
    /// How many counters there are.
    pub const COUNT: u32 = 16;
}

/// Offsets and constants that the agent reads from the running kernel's BTF and hands to the
/// probes as one global before they are loaded. All offsets are in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each field is named after the kernel's struct and member")]
pub struct Offsets {
    pub task_files: u32,
    pub task_fs: u32,
    pub task_mm: u32,
    pub task_pid: u32,
    pub task_tgid: u32,
    pub task_status: u32,
    pub task_signal: u32,
    pub signal_live: u32,
    pub signal_exit_code: u32,
    pub task_nsproxy: u32,
    pub nsproxy_mounts: u32,
    pub mounts_number: u32,
    pub mm_users: u32,
    /// `task_struct.io_uring` (0 without io_uring): set once the task used a ring.
    pub task_io_uring: u32,
    /// `mm_struct.ioctx_table` (0 without AIO): set once the process used AIO.
    pub mm_aio: u32,
    pub files_count: u32,
    pub files_fdt: u32,
    pub fdt_max_fds: u32,
    pub fdt_fd: u32,
    pub fs_root: u32,
    pub fs_pwd: u32,
    pub fs_users: u32,
    pub path_dentry: u32,
    pub file_inode: u32,
    pub file_pos: u32,
    pub file_flags: u32,
    pub file_mode: u32,
    pub file_path: u32,
    /// `f_count` (atomic_long_t) before 6.13, `f_ref` (file_ref_t, which is 0 for one user) after.
    pub file_count: u32,
    /// Value of the word at `file_count` for exactly one user: 1 for `f_count`, 0 for `f_ref`.
    pub file_count_one: u32,
    pub inode_mode: u32,
    pub inode_uid: u32,
    pub inode_gid: u32,
    pub inode_sb: u32,
    pub inode_ino: u32,
    pub inode_nlink: u32,
    pub inode_size: u32,
    pub inode_mtime_sec: u32,
    pub inode_mtime_nsec: u32,
    pub inode_generation: u32,
    pub sb_dev: u32,
    pub sb_magic: u32,
    pub dentry_parent: u32,
    pub dentry_name: u32,
    pub dentry_inode: u32,
    pub qstr_len: u32,
    pub qstr_name: u32,
    pub vma_start: u32,
    pub vma_end: u32,
    pub vma_flags: u32,
    pub vma_file: u32,
    /// `btrfs_inode.root` relative to the embedded inode (negative), 0 without btrfs.
    pub btrfs_root: i32,
    pub btrfs_anon_dev: u32,
    pub task_flags: u32,
    pub task_thread_node: u32,
    pub signal_thread_head: u32,
    pub task_cgroups: u32,
    pub css_set_cgroup: u32,
    pub cgroup_level: u32,
    pub cgroup_ancestors: u32,
    pub cgroup_node: u32,
    pub node_id: u32,
    /// `inode.i_dio_count`: direct I/O in flight.
    pub inode_dio_count: u32,
    /// 1 where the third argument of `io_uring_complete` is the completion, 0 where the fourth is
    /// the result. What follows is zero without io_uring.
    pub uring_cqe: u32,
    pub req_file: u32,
    pub req_opcode: u32,
    pub req_flags: u32,
    pub req_fd: u32,
    pub req_ctx: u32,
    pub req_async_data: u32,
    pub ring_link_head: u32,
    /// Table of fixed files: 1 where it holds nodes, 0 where it holds the files.
    pub ring_has_nodes: u32,
    pub ring_files: u32,
    pub ring_files_count: u32,
    pub node_file: u32,
    pub rw_pos: u32,
    pub rw_len: u32,
    pub rw_flags: u32,
    pub splice_off_out: u32,
    pub splice_len: u32,
    pub madvise_advice: u32,
    pub open_dfd: u32,
    pub open_name: u32,
    pub open_flags: u32,
    pub rename_old_dfd: u32,
    pub rename_new_dfd: u32,
    pub rename_old: u32,
    pub rename_new: u32,
    pub rename_flags: u32,
    pub unlink_dfd: u32,
    pub unlink_name: u32,
    pub mkdir_dfd: u32,
    pub mkdir_name: u32,
    pub link_old_dfd: u32,
    pub link_new_dfd: u32,
    pub link_old: u32,
    pub link_new: u32,
    pub link_flags: u32,
    pub xattr_name: u32,
    pub filename_name: u32,
    pub msg_addr: u32,
    pub bind_addr_len: u32,
}

/// What the agent decides when it loads the probes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Devices (`s_dev`, kernel form; anonymous device on btrfs) with subtrees in scope; 0 = none.
    pub devices: [u32; DEVICES_MAX],
    /// Largest write, in bytes, whose data is copied in the probe.
    pub inline_max: u32,
    /// Identity of the cgroup whose tasks are selected, lower half; 0 in both: selection is by
    /// process tree.
    pub cgroup_low: u32,
    /// Upper half.
    pub cgroup_high: u32,
}

const _: () = {
    assert!(size_of::<InodeId>() == 16);
    assert!(size_of::<InodeAttr>() == 56);
    assert!(size_of::<EventHeader>() == 48);
    assert!(size_of::<FileEvent>() == 48 + 112 + 40 + 16);
    assert!(size_of::<WriteEvent>() == 48 + 56 + 8);
    // What the probes put together as the one can be sent as the other.
    assert!(core::mem::offset_of!(WriteEvent, attr) == core::mem::offset_of!(FileEvent, attr));
    assert!(core::mem::offset_of!(WriteEvent, file_offset) == core::mem::offset_of!(FileEvent, parent));
    assert!(size_of::<DataEvent>() == 64);
    assert!(size_of::<PathEvent>() == 48 + 112 + 16 + 48 + 16);
    assert!(size_of::<TaskEvent>() == 64);
    assert!(size_of::<TaskState>() == 24 + 48 + 16 + 16 + 32 + 16 + 8);
    assert!(size_of::<Suspect>() == 16);
    assert!(size_of::<Settings>() == 64 + 12);
    assert!(size_of::<Request>() == 80);
    assert!(size_of::<Offsets>() == (62 + 40) * 4);
};

/// A struct of this ABI that may be copied out of bytes: any bit pattern is a value.
///
/// # Safety
/// Only for `repr(C)` structs of integers without padding.
pub unsafe trait Plain: Copy {
    /// Copies a value out of the start of `bytes`; `None` if they are too few.
    fn read_from(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was checked, the implementor promises that any bit pattern is a
        // value, and the read does not ask for alignment.
        Some(unsafe { core::ptr::read_unaligned(bytes.as_ptr().cast()) })
    }
}

macro_rules! plain {
    ($($t:ty),*) => { $(
        // SAFETY: integers only, no padding (sizes asserted above).
        unsafe impl Plain for $t {}
    )* };
}
plain!(
    InodeId,
    InodeAttr,
    EventHeader,
    FileEvent,
    WriteEvent,
    DataEvent,
    PathEvent,
    TaskEvent,
    TaskState,
    Request,
    Suspect
);

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
    /// [`kind::JOINED`]).
    Task {
        /// The struct.
        event: TaskEvent,
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
            kind::FORK | kind::EXEC | kind::EXIT | kind::COMPAT | kind::JOINED | kind::ENDED => {
                Some(Self::Task { event: TaskEvent::read_from(bytes)? })
            }
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
        }
    }
}

fn two(bytes: &[u8], first: u32, second: u32) -> Option<(&[u8], &[u8])> {
    let (first, second) = (first as usize, second as usize);
    let rest = bytes.get(first..)?;
    Some((&bytes[..first], rest.get(..second)?))
}
