//! The maps and globals that the probes share with the agent, and the counters.
//!
//! Every map is preallocated. `OFFSETS` and `SETTINGS` stand in read-only data that the agent fills
//! before loading, so the verifier takes them for constants and drops what they switch off.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use bfs_common::abi::{
    DEVICES_MAX, InodeId, Offsets, SUSPECTS_MAX, Settings, Suspect, TASKS_MAX, TaskState, counter,
};

/// Records on their way to the agent; the agent sets the size.
#[map]
pub static RING: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// The followed tasks, and the call that each of them is in.
#[map]
pub static TASKS: HashMap<u32, TaskState> = HashMap::with_max_entries(TASKS_MAX, 0);

/// Objects whose records found no room in the ring.
#[map]
pub static SUSPECTS: HashMap<InodeId, Suspect> = HashMap::with_max_entries(SUSPECTS_MAX, 0);

/// [`counter`], one array per CPU.
#[map]
pub static COUNTERS: PerCpuArray<[u64; counter::COUNT as usize]> = PerCpuArray::with_max_entries(1, 0);

/// What a successor checks before it adopts: `[ABI_VERSION, bytes of the ring, 0, 0]`.
#[map]
pub static META: Array<[u64; 4]> = Array::with_max_entries(1, 0);

/// Working memory; one entry per hook, because on kernels where probes can be preempted only
/// runs of the same probe exclude each other.
#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(3, 0);

/// Bytes read at once from a `struct file`.
pub const FILE_BLOCK: usize = 184;
/// Bytes read at once from a `struct inode`.
pub const INODE_BLOCK: usize = 128;
/// Bytes read at once from a `struct dentry`.
pub const DENTRY_BLOCK: usize = 56;

/// Blocks of kernel memory as they were read.
#[repr(C)]
pub struct Scratch {
    pub file: [u64; FILE_BLOCK / 8],
    pub inode: [u64; INODE_BLOCK / 8],
    pub parent: [u64; INODE_BLOCK / 8],
    pub dentry: [u64; DENTRY_BLOCK / 8],
    /// Generations of `inode` and `parent`, where they lie outside the block.
    pub generation: [u32; 2],
    pub chunks: crate::write::Chunks,
}

/// Index into [`SCRATCH`] of `sys_enter`.
pub const SCRATCH_ENTER: u32 = 0;
/// Index into [`SCRATCH`] of `sys_exit`.
pub const SCRATCH_EXIT: u32 = 1;

/// Filled by the agent before loading.
#[unsafe(no_mangle)]
// SAFETY: integers only, so zero is a value.
pub static OFFSETS: Offsets = unsafe { core::mem::zeroed() };

/// Filled by the agent before loading.
#[unsafe(no_mangle)]
pub static SETTINGS: Settings =
    Settings { devices: [0; DEVICES_MAX], inline_max: 0, log: 0, own_tgid: 0, reserved: 0 };

/// 1 once any process wrote into the memory of another one: no buffer is private any more.
#[unsafe(no_mangle)]
pub static mut FOREIGN_STORES: u32 = 0;

/// An offset of [`OFFSETS`], read so that the compiler does not take the zero for its value.
macro_rules! off {
    ($field:ident) => {
        // SAFETY: a static that lives for ever; volatile because the agent fills it in.
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::OFFSETS.$field) } as usize
    };
}
pub(crate) use off;

/// A field of [`SETTINGS`].
macro_rules! setting {
    ($field:ident) => {
        // SAFETY: as for `off!`.
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::SETTINGS.$field) }
    };
    ($field:ident, $index:expr) => {
        // SAFETY: as for `off!`; the index is bounded by the caller's loop.
        unsafe {
            core::ptr::read_volatile((&raw const $crate::maps::SETTINGS.$field).cast::<u32>().add($index))
        }
    };
}
pub(crate) use setting;

/// Adds one to a counter.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the verifier checks the bounds; nothing else runs on this CPU's array.
        unsafe { (*counters)[index as usize] += 1 };
    }
}

/// Names an object whose record was lost, or, where there is no room for the name, all of them.
#[inline(never)]
pub fn suspect(id: &InodeId, now: u64) -> i64 {
    count(counter::RESERVE_FAILED);
    if let Some(entry) = SUSPECTS.get_ptr_mut(id) {
        // SAFETY: a preallocated map's entry; a lost increment does no harm, the entry is there.
        unsafe {
            (*entry).lost += 1;
            (*entry).last_ns = now;
        }
    }
    // Also when it was there: the agent may have taken it out just before the increment.
    else if SUSPECTS.insert(id, Suspect { lost: 1, last_ns: now }, 0).is_err() {
        count(counter::RESCAN);
    }
    0
}

/// A record without a single object was lost.
#[inline(always)]
pub fn rescan() {
    count(counter::RESERVE_FAILED);
    count(counter::RESCAN);
}
