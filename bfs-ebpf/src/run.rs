//! Runs: writes of one task that go on where the one before ended have one record together.
//!
//! A run stands in the task's slot until it is long enough, or until the task does anything else that is followed, or
//! makes a child, or ends. While a cut is made every write has a record of its own: the agent says so in `META`, then
//! looks at the slots, then reads the ring. A write that joins a run looks into `META` again *after* its run stands in
//! the slot, with a locked instruction between: so either the agent finds the run in the slot, or the record in
//! the ring. (It may find both, and reads the range once too often.) In the same way, at its start: a write that
//! finds no cut in `META` after it set `active` is seen by the agent's next look at the slots, and started before
//! any instant that is chosen after that look.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use bfs_common::abi::{EventHeader, InodeAttr, RunEvent, TaskState, counter, flag, kind};

use crate::{
    calls::nr,
    kernel,
    maps::{self, META, NO_WAKEUP, RING, count, off},
};

/// Longer runs get their record: the agent reads what they wrote while the program goes on.
const BYTES_MAX: u64 = 1 << 20;
/// The same for calls.
const CALLS_MAX: u32 = 1024;

/// Whether each write is to have a record of its own.
#[inline(always)]
fn is_held() -> bool {
    // SAFETY: a word that only the agent writes, at once; it must be loaded again each time.
    META.get(0).is_none_or(|meta| unsafe { core::ptr::read_volatile(&raw const meta[2]) != 0 })
}

/// Whether there is a run, which the next write may join.
#[inline(always)]
pub fn goes_on(state: &TaskState) -> bool {
    state.run_calls != 0 && !is_held()
}

/// A write at `offset` to the file of the task's last write joins the run if it goes on where that one ended.
/// `false`: it needs a record of its own.
#[inline(always)]
pub fn join(state: &mut TaskState, offset: u64, written: u64, tid: u32) -> bool {
    if offset != state.known_end || is_held() {
        return false;
    }
    if state.run_calls == 0 {
        state.run_start = offset;
        state.run_first_ns = state.start_ns;
    }
    state.known_end = offset.wrapping_add(written);
    count(counter::WENT_ON);
    compiler_fence(Ordering::SeqCst);
    // A locked instruction: the run is visible to every CPU before `META` is looked at again.
    // (`core` has no such operation for this target.)
    // SAFETY: the task's own slot.
    unsafe {
        core::arch::asm!(
            "lock *(u32 *)({calls} + 0) += {one}",
            calls = in(reg) &raw mut state.run_calls,
            one = in(reg) 1u64,
        );
    }
    compiler_fence(Ordering::SeqCst);
    if is_held() || state.known_end.wrapping_sub(state.run_start) >= BYTES_MAX || state.run_calls >= CALLS_MAX
    {
        end(state, tid);
    }
    true
}

/// The run in the slot, if there is one, gets its record.
#[inline(always)]
pub fn end(state: &mut TaskState, tid: u32) {
    // SAFETY: the task's own slot; the compiler does not know of the locked instruction.
    if unsafe { core::ptr::read_volatile(&raw const state.run_calls) } != 0 {
        end_run(state, tid);
    }
}

/// By itself, so that its room on the stack is not that of the probes of every call.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn end_run(state: *mut TaskState, tid: u32) -> i32 {
    if state.is_null() {
        return 0;
    }
    // SAFETY: the verifier checks the pointer that the probe hands in.
    let state = unsafe { &mut *state };
    let mut attr = InodeAttr { id: state.inode, ..crate::file::NO_ATTR };
    // SAFETY: a helper without arguments.
    let end_ns = unsafe { bpf_ktime_get_ns() };
    read_attr(&mut attr, state);
    match RING.reserve::<RunEvent>(0) {
        Some(mut entry) => {
            let event = entry.as_mut_ptr();
            // SAFETY: the record was reserved; every field is written.
            unsafe {
                (*event).header = EventHeader {
                    len: size_of::<RunEvent>() as u32,
                    kind: kind::RUN,
                    flags: flag::BY_REFERENCE,
                    start_ns: state.run_first_ns,
                    end_ns,
                    tid,
                    tgid: state.tgid,
                    nr: nr::WRITE,
                    read_ns: bpf_ktime_get_ns().wrapping_sub(end_ns) as u32,
                    ret: state.known_end.wrapping_sub(state.run_start) as i64,
                };
                (*event).attr = attr;
                (*event).file_offset = state.run_start;
                (*event).calls = state.run_calls;
                (*event).reserved = 0;
            }
            entry.submit(NO_WAKEUP);
        }
        None => maps::name(&state.inode, end_ns),
    }
    // The record first: whoever finds no run in the slot finds it in the ring.
    compiler_fence(Ordering::SeqCst);
    // SAFETY: the task's own slot.
    unsafe { core::ptr::write_volatile(&raw mut state.run_calls, 0) };
    0
}

/// The attributes of the file, if the inode at its address still is that file's.
#[inline(always)]
fn read_attr(attr: &mut InodeAttr, state: &TaskState) {
    let inode = state.inode_addr;
    if kernel::read::<u64>(inode + off!(inode_sb) as u64) != state.known_sb
        || kernel::read::<u64>(inode + off!(inode_ino) as u64) != state.inode.ino
        || kernel::read::<u32>(inode + off!(inode_generation) as u64) != state.inode.generation
    {
        return;
    }
    attr.size = kernel::read(inode + off!(inode_size) as u64);
    attr.mtime_sec = kernel::read(inode + off!(inode_mtime_sec) as u64);
    attr.mtime_nsec = kernel::read(inode + off!(inode_mtime_nsec) as u64);
    attr.uid = kernel::read(inode + off!(inode_uid) as u64);
    attr.gid = kernel::read(inode + off!(inode_gid) as u64);
    attr.nlink = kernel::read(inode + off!(inode_nlink) as u64);
    attr.mode = u32::from(kernel::read::<u16>(inode + off!(inode_mode) as u64));
}
