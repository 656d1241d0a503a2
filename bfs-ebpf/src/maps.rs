//! The maps and globals that the probes share with the agent, and the counters.
//!
//! Every map is preallocated. `OFFSETS` and `SETTINGS` stand in read-only data that the agent fills
//! before loading, so the verifier takes them for constants and drops what they switch off.

use aya_ebpf::{
    helpers::generated::bpf_ringbuf_output,
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use bfs_common::abi::{
    DEVICES_MAX, FAILING_MAX, FOREIGN_MAX, FileEvent, InodeId, MAPPED_MAX, Offsets, PATH_MAX, PathEvent,
    REQUESTS_MAX, RINGS_MAX, ROOTS_MAX, Request, STRANGERS_MAX, SUSPECTS_MAX, Settings, Stranger, Suspect,
    TASKS_MAX, TaskState, counter,
};

/// `BPF_RB_NO_WAKEUP`: the agent polls, because a wakeup costs more than a record.
pub const NO_WAKEUP: u64 = 1;

/// Only where there is no entry yet (`include/uapi/linux/bpf.h`).
pub const BPF_NOEXIST: u64 = 1;

/// Records on their way to the agent; the agent sets the size.
#[map]
pub static RING: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// The followed tasks, and the call that each of them is in.
#[map]
pub static TASKS: HashMap<u32, TaskState> = HashMap::with_max_entries(TASKS_MAX, 0);

/// The io_uring operations in flight that may change a file, by the address of their request.
#[map]
pub static REQUESTS: HashMap<u64, Request> = HashMap::with_max_entries(REQUESTS_MAX, 0);

/// The followed io_uring contexts by address, each with the process that made it or used it first.
#[map]
pub static RINGS: HashMap<u64, u32> = HashMap::with_max_entries(RINGS_MAX, 0);

/// Objects whose records found no room in the ring.
#[map]
pub static SUSPECTS: HashMap<InodeId, Suspect> = HashMap::with_max_entries(SUSPECTS_MAX, 0);

/// Files that a process may store into through a mapping. Of those with the value 1 the pages that become dirty
/// are recorded. The agent fills it; a successor finds in it what the one before knew.
#[map]
pub static MAPPED: HashMap<InodeId, u32> = HashMap::with_max_entries(MAPPED_MAX, 0);

/// [`counter`], one array per CPU.
#[map]
pub static COUNTERS: PerCpuArray<[u64; counter::COUNT as usize]> = PerCpuArray::with_max_entries(1, 0);

/// Objects of which a record of a change by others waits in the ring, with its start. The agent takes it out as it
/// takes the record out.
#[map]
pub static FOREIGN: HashMap<InodeId, u64> = HashMap::with_max_entries(FOREIGN_MAX, 0);

/// Files of which an I/O error was told, with when. The agent takes them out when another one is to be told.
#[map]
pub static FAILING: HashMap<InodeId, u64> = HashMap::with_max_entries(FAILING_MAX, 0);

/// The processes that are not selected and changed something, by thread group; 0 for those that found no room.
#[map]
pub static STRANGERS: HashMap<u32, Stranger> = HashMap::with_max_entries(STRANGERS_MAX, 0);

/// Inode numbers of the roots; 0 ends the list, and `u64::MAX` at its start says that they are not told apart.
#[map]
pub static ROOTS: Array<[u64; ROOTS_MAX]> = Array::with_max_entries(1, 0);

/// What a successor checks before it adopts, and what the agent tells the probes:
/// `[ABI_VERSION, bytes of the ring, 1 while each write is to have a record of its own,
/// thread group of the agent]`.
#[map]
pub static META: Array<[u64; 4]> = Array::with_max_entries(1, 0);

/// Further devices with subtrees in scope, which came while the probes ran; 0 ends the list.
#[map]
pub static DEVICES: Array<[u32; DEVICES_MAX]> = Array::with_max_entries(1, 0);

/// Working memory; one entry per hook, because on kernels where probes can be preempted only
/// runs of the same probe exclude each other.
#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(5, 0);

/// Bytes read at once from a `struct file`.
pub const FILE_BLOCK: usize = 184;
/// Bytes read at once from a `struct inode`.
pub const INODE_BLOCK: usize = 128;
/// Bytes read at once from a `struct dentry`.
pub const DENTRY_BLOCK: usize = 56;
/// Bytes read at once from a `struct io_kiocb`.
pub const REQUEST_BLOCK: usize = 256;

/// Bytes of data that are put together with their record before it goes into the ring, which then takes as
/// much room as it needs; more are copied into the ring directly, into room of a fixed size. A mask.
pub const SMALL_DATA: usize = 0x1fff;

/// A record of a call on a descriptor, before it goes into the ring.
#[repr(C)]
pub struct FileRecord {
    pub event: FileEvent,
    /// The name, or of a write, which has none and a shorter head, the data.
    pub bytes: [u8; SMALL_DATA + 1],
}

/// A record of a call with paths, before it goes into the ring.
#[repr(C)]
pub struct PathRecord {
    pub event: PathEvent,
    pub bytes: [u8; 2 * PATH_MAX],
}

/// Blocks of kernel memory as they were read, and records as they are put together.
///
/// What lies here the verifier does not follow value by value, as it does with the stack: that keeps
/// the number of states small in which it has to look at a probe.
#[repr(C)]
pub struct Scratch {
    pub file: [u64; FILE_BLOCK / 8],
    pub inode: [u64; INODE_BLOCK / 8],
    pub parent: [u64; INODE_BLOCK / 8],
    pub dentry: [u64; DENTRY_BLOCK / 8],
    /// Generations of `inode` and `parent`, where they lie outside the block.
    pub generation: [u32; 2],
    pub chunks: crate::write::Chunks,
    /// A `struct io_kiocb`.
    pub request: [u64; REQUEST_BLOCK / 8],
    /// What is known of it.
    pub entry: Request,
    /// Its address.
    pub address: u64,
    pub submission: crate::aio::Submission,
    /// Address in user memory of the data that go with `file_record`, and how many.
    pub data: u64,
    pub data_len: u32,
    pub reserved: u32,
    pub file_record: FileRecord,
    pub path_record: PathRecord,
}

/// Index into [`SCRATCH`] of `sys_enter`.
pub const SCRATCH_ENTER: u32 = 0;
/// Index into [`SCRATCH`] of `sys_exit`.
pub const SCRATCH_EXIT: u32 = 1;
/// Index into [`SCRATCH`] of `io_uring_submit_req`.
pub const SCRATCH_SUBMIT: u32 = 2;
/// Index into [`SCRATCH`] of `io_uring_complete`.
pub const SCRATCH_COMPLETE: u32 = 3;
/// Index into [`SCRATCH`] of `writeback_dirty_folio`.
pub const SCRATCH_DIRTIED: u32 = 4;

/// Filled by the agent before loading.
#[unsafe(no_mangle)]
// SAFETY: integers only, so zero is a value.
pub static OFFSETS: Offsets = unsafe { core::mem::zeroed() };

/// Filled by the agent before loading.
#[unsafe(no_mangle)]
pub static SETTINGS: Settings = Settings {
    devices: [0; DEVICES_MAX],
    inline_max: 0,
    cgroup_low: 0,
    cgroup_high: 0,
    closes: 0,
    foreign: 0,
};

/// 1 once any process wrote into the memory of another one: no buffer is private any more.
#[unsafe(no_mangle)]
pub static mut FOREIGN_STORES: u32 = 0;

/// 1 once any process took a descriptor of another one: what a task has open may have other users, of which
/// it knows nothing.
#[unsafe(no_mangle)]
pub static mut FOREIGN_DESCRIPTORS: u32 = 0;

/// Loads what the agent filled in, so that the compiler does not take the zero for its value.
#[inline(always)]
pub fn filled_in<T: Copy>(value: *const T) -> T {
    // SAFETY: called with the address of a part of a static, which lives for ever.
    unsafe { core::ptr::read_volatile(value) }
}

/// An offset of [`OFFSETS`].
macro_rules! off {
    ($field:ident) => {
        $crate::maps::filled_in(&raw const $crate::maps::OFFSETS.$field) as usize
    };
}
pub(crate) use off;

/// A field of [`SETTINGS`].
macro_rules! setting {
    ($field:ident) => {
        $crate::maps::filled_in(&raw const $crate::maps::SETTINGS.$field)
    };
    ($field:ident, $index:expr) => {
        $crate::maps::filled_in((&raw const $crate::maps::SETTINGS.$field).cast::<u32>().wrapping_add($index))
    };
}
pub(crate) use setting;

/// Puts `len` bytes at `record` into the ring. Whether there was room.
///
/// # Safety
/// `record` is in map memory, of at least `len` bytes.
#[inline(always)]
pub unsafe fn output<T>(record: *const T, len: u32) -> bool {
    // SAFETY: as promised by the caller; the map's definition is what the loader replaces.
    unsafe {
        bpf_ringbuf_output(
            (&raw const RING).cast_mut().cast(),
            record.cast_mut().cast(),
            u64::from(len),
            NO_WAKEUP,
        ) == 0
    }
}

/// Adds one to a counter.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the verifier checks the bounds; nothing else runs on this CPU's array.
        unsafe { (*counters)[index as usize] += 1 };
    }
}

/// Names the object of the record in the scratch, which was lost, or, where there is no room for
/// the name, all of them.
///
/// Global, as every function with `no_mangle` here: the verifier looks at it once and by itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn suspect(scratch: *mut Scratch) -> i32 {
    if scratch.is_null() {
        return 0;
    }
    // SAFETY: a part of the scratch.
    unsafe {
        name(&(*scratch).file_record.event.attr.id, (*scratch).file_record.event.header.end_ns);
    }
    0
}

/// Names an object of which a record was lost.
#[inline(always)]
pub fn name(id: &InodeId, now: u64) {
    count(counter::RESERVE_FAILED);
    // On the stack: before 6.2 the verifier takes a key from nowhere else.
    let id = *id;
    // SAFETY: the map's own entry.
    unsafe {
        // A lost increment does no harm, the entry is there.
        if let Some(entry) = SUSPECTS.get_ptr_mut(&id) {
            (*entry).lost += 1;
            (*entry).last_ns = now;
        }
        // Also when it was there: the agent may have taken it out just before the increment.
        else if SUSPECTS.insert(&id, Suspect { lost: 1, last_ns: now }, 0).is_err() {
            count(counter::RESCAN);
        }
    }
}

/// Names the object of the record in the scratch.
#[inline(always)]
pub fn name_suspect(scratch: &mut Scratch) {
    suspect(scratch);
}

/// A record without a single object was lost.
#[inline(always)]
pub fn rescan() {
    count(counter::RESERVE_FAILED);
    count(counter::RESCAN);
}
