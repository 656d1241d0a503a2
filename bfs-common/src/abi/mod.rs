//! The kernel/user ABI: what the probes put into the ring and what the agent puts into the maps.
//!
//! Rules: every struct is `repr(C)`, has no padding, and its size is asserted below; a record in
//! the ring starts with an [`EventHeader`], whose `len` says how many bytes count (the ring may
//! hold more, because the probes reserve in size classes). Times are `bpf_ktime_get_ns`, which is
//! `CLOCK_MONOTONIC`.

mod events;
mod offsets;
mod requests;
mod state;

pub use self::events::*;
pub use self::offsets::Offsets;
pub use self::requests::{Request, ending, request};
pub use self::state::*;

/// Changes with every change of layout or meaning in this module; the agent refuses to adopt
/// pinned maps of another version.
pub const ABI_VERSION: u32 = 10;

/// Longest path that the kernel takes, with the terminating zero (`include/uapi/linux/limits.h`).
pub const PATH_MAX: usize = 4096;

/// Longest name of one directory entry, without a terminating zero.
pub const NAME_MAX: usize = 255;

/// Entries of the map of followed tasks.
pub const TASKS_MAX: u32 = 32_768;

/// Entries of the map that names objects whose record found no room in the ring.
pub const SUSPECTS_MAX: u32 = 65_536;

/// Entries of the map of mapped files.
pub const MAPPED_MAX: u32 = 16_384;

/// Entries of the map of asynchronous operations in flight.
pub const REQUESTS_MAX: u32 = 32_768;

/// Entries of the map of followed io_uring contexts.
pub const RINGS_MAX: u32 = 8_192;

/// Entries of the map of changes by others that wait in the ring.
pub const FOREIGN_MAX: u32 = 65_536;

/// Entries of the map of processes that are not selected and changed something.
pub const STRANGERS_MAX: u32 = 1_024;

/// Entries of the map of files of which an I/O error was told.
pub const FAILING_MAX: u32 = 1_024;

/// How many roots the probes tell apart; with more, all of a device counts as in scope for others.
pub const ROOTS_MAX: usize = 16;

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

const _: () = {
    assert!(size_of::<InodeId>() == 16);
    assert!(size_of::<InodeAttr>() == 56);
    assert!(size_of::<EventHeader>() == 48);
    assert!(size_of::<FileEvent>() == 48 + 112 + 40 + 16);
    assert!(size_of::<WriteEvent>() == 48 + 56 + 8);
    assert!(size_of::<RunEvent>() == 48 + 56 + 16);
    // What the probes put together as the one can be sent as the other.
    assert!(core::mem::offset_of!(WriteEvent, attr) == core::mem::offset_of!(FileEvent, attr));
    assert!(core::mem::offset_of!(WriteEvent, file_offset) == core::mem::offset_of!(FileEvent, parent));
    assert!(size_of::<DataEvent>() == 64);
    assert!(size_of::<PathEvent>() == 48 + 112 + 16 + 48 + 16);
    assert!(size_of::<TaskEvent>() == 64);
    assert!(size_of::<DirtyEvent>() == 48 + 16 + 16);
    assert!(size_of::<ForeignEvent>() == 48 + 16 + 8);
    assert!(size_of::<FailedEvent>() == 48 + 16);
    assert!(size_of::<Stranger>() == 32);
    assert!(size_of::<TaskState>() == 24 + 48 + 16 + 16 + 32 + 16 + 16 + 8 + 16);
    assert!(size_of::<Suspect>() == 16);
    assert!(size_of::<Settings>() == 64 + 20);
    assert!(size_of::<Request>() == 80);
    assert!(size_of::<Offsets>() == (69 + 45) * 4);
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
    DirtyEvent,
    RunEvent,
    ForeignEvent,
    FailedEvent,
    Stranger,
    TaskState,
    Request,
    Suspect
);
