//! What stands in the maps: the calls in flight, what was lost, the counters, the settings.

use super::{DEVICES_MAX, EventHeader, InodeAttr, InodeId, RunEvent, flag, kind};

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
    /// `struct file` that the last call on a descriptor had, if it was a regular file in scope whose inode is
    /// `inode`, and only this task could use it; 0 when that is not so, or may no longer be so.
    pub known_file: u64,
    /// Its super block.
    pub known_sb: u64,
    /// Where its last write ended; `u64::MAX` before the first.
    pub known_end: u64,
    /// Its descriptor.
    pub known_fd: u32,
    /// [`slot::APPEND`] if it had that.
    pub known_flags: u32,
    /// Writes that went on and have no record yet: when the first one started.
    pub run_first_ns: u64,
    /// The first byte that they changed; the last one stands before `known_end`.
    pub run_start: u64,
    /// How many there are: a *run*. It gets its record before anything else of the task does.
    pub run_calls: u32,
    /// One of [`role`]; the only field that others than the task itself change.
    pub role: u32,
}

impl TaskState {
    /// The record of the run that the slot of thread `tid` held at `now`, without attributes; `None` where there was
    /// no run.
    #[must_use]
    pub fn run(&self, tid: u32, now: u64) -> Option<RunEvent> {
        (self.run_calls != 0).then(|| RunEvent {
            header: EventHeader {
                len: size_of::<RunEvent>() as u32,
                kind: kind::RUN,
                flags: flag::BY_REFERENCE,
                start_ns: self.run_first_ns,
                end_ns: now,
                tid,
                tgid: self.tgid,
                nr: u32::MAX,
                read_ns: 0,
                ret: self.known_end.wrapping_sub(self.run_start) as i64,
            },
            attr: InodeAttr { id: self.inode, ..InodeAttr::default() },
            file_offset: self.run_start,
            calls: self.run_calls,
            reserved: 0,
        })
    }
}

/// [`TaskState::role`]: how the task stands to the selection.
pub mod role {
    /// It is selected.
    pub const SELECTED: u32 = 0;
    /// It was moved out of the selected cgroup. Its slot goes, by its own hand, when the call that it
    /// is in has its record.
    pub const LEAVES: u32 = 1;
    /// It is not selected, and was seen to change something in scope. While it is in such a call, the slot is
    /// active from the first change on, and holds what it changed: the first inode in `inode`, up to three
    /// more in `args`, `known_flags` of them in all.
    pub const FOREIGN: u32 = 2;
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
    /// Nothing was read at the start: it is the file of the call before, and nobody else can use it.
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
    /// Writes that went on where the last one had ended, and are counted nowhere else: by reference, several of them
    /// in one record.
    pub const WENT_ON: u32 = 12;
    /// Calls that saw an error of the disk on a file in scope, of which nothing could be told.
    pub const FAILED_LOST: u32 = 13;
    /// Tasks that are not followed any more. Rises before the entry in `TASKS` goes.
    pub const LET_GO: u32 = 14;
    /// How many counters there are.
    pub const COUNT: u32 = 16;
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
    /// 1: a close of a descriptor that could be written to has a record.
    pub closes: u32,
    /// 1 where it is looked at what others change.
    pub foreign: u32,
}

/// Value of the map `STRANGERS`, keyed by thread group: a process that is not selected and changed something.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stranger {
    /// How often it changed something: each time that an inode got new times.
    pub changes: u64,
    /// When the last one was.
    pub last_ns: u64,
    /// The command name of the thread that was seen first.
    pub command: [u8; 16],
}
