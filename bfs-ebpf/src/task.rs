//! Which tasks are followed: inherited by fork (or by the cgroup that the child is born in), kept
//! through exec, dropped at exit.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, generated::bpf_ktime_get_ns};
use bfs_common::abi::{NO_CALL, TaskEvent, TaskState, counter, kind, role};

use crate::{
    cgroup, foreign,
    kernel::{self, read},
    maps::{NO_WAKEUP, RING, TASKS, count, off, rescan},
    run,
};

/// Set in the exit code when a core was written (coredump_finish() in fs/coredump.c).
const CORE_DUMPED: u32 = 0x80;

/// A state without a call in flight.
pub const IDLE: TaskState = TaskState {
    start_ns: 0,
    active: 0,
    nr: NO_CALL,
    tgid: 0,
    flags: 0,
    args: [0; 6],
    file: 0,
    inode_addr: 0,
    inode: bfs_common::abi::InodeId::NONE,
    pos: 0,
    size: 0,
    private_start: 0,
    private_end: 0,
    known_file: 0,
    known_sb: 0,
    known_end: 0,
    known_fd: 0,
    known_flags: 0,
    run_first_ns: 0,
    run_start: 0,
    run_calls: 0,
    role: role::SELECTED,
};

/// A call of the current task begins that matters; its time is still to be taken.
#[inline(always)]
pub fn begin_call(state: &mut TaskState) {
    // SAFETY: the task's own slot.
    unsafe {
        core::ptr::write_volatile(&raw mut state.active, 1);
        // So that the store is visible to every CPU before the time is taken: whoever reads a later time, and then
        // `active`, sees the call (no membarrier needed).
        add_one(&raw mut state.start_ns);
    }
    compiler_fence(Ordering::SeqCst);
}

/// It has ended, and its record stands in the ring.
#[inline(always)]
pub fn end_call(state: &mut TaskState) {
    // SAFETY: the task's own slot.
    unsafe {
        core::ptr::write_volatile(&raw mut state.start_ns, 0);
        compiler_fence(Ordering::SeqCst);
        core::ptr::write_volatile(&raw mut state.active, 0);
    }
}

/// A locked instruction (`core` has no such operation for this target).
///
/// # Safety
/// The pointer is to a word in a map.
#[inline(always)]
pub unsafe fn add_one(to: *mut u64) {
    // SAFETY: as promised by the caller.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({to} + 0) += {one}",
            to = in(reg) to,
            one = in(reg) 1u64,
        );
    }
}

/// Puts a [`TaskEvent`] into the ring.
#[inline(always)]
pub fn emit(kind: u16, nr: u32, tid: u32, tgid: u32, value: u64, last_thread: u32) {
    let Some(mut entry) = RING.reserve::<TaskEvent>(0) else {
        rescan();
        return;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: the record was reserved; every field is written.
    unsafe {
        let now = bpf_ktime_get_ns();
        let header = &raw mut (*event).header;
        (*header).len = size_of::<TaskEvent>() as u32;
        (*header).kind = kind;
        (*header).flags = 0;
        (*header).start_ns = now;
        (*header).end_ns = now;
        (*header).tid = tid;
        (*header).tgid = tgid;
        (*header).nr = nr;
        (*header).read_ns = 0;
        (*header).ret = 0;
        (*event).value = value;
        (*event).last_thread = last_thread;
        (*event).reserved = 0;
    }
    entry.submit(NO_WAKEUP);
    count(counter::RECORDS);
}

/// Puts the end of what was begun into the ring.
#[inline(always)]
pub fn emit_ended(start_ns: u64, nr: u32, tid: u32, tgid: u32, ret: i64, how: u64) {
    let Some(mut entry) = RING.reserve::<TaskEvent>(0) else {
        rescan();
        return;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: the record was reserved; every field is written.
    unsafe {
        let header = &raw mut (*event).header;
        (*header).len = size_of::<TaskEvent>() as u32;
        (*header).kind = kind::ENDED;
        (*header).flags = 0;
        (*header).start_ns = start_ns;
        (*header).end_ns = bpf_ktime_get_ns();
        (*header).tid = tid;
        (*header).tgid = tgid;
        (*header).nr = nr;
        (*header).read_ns = 0;
        (*header).ret = ret;
        (*event).value = how;
        (*event).last_thread = 0;
        (*event).reserved = 0;
    }
    entry.submit(NO_WAKEUP);
    count(counter::RECORDS);
}

/// `sched_process_fork(parent, child)`: runs in the parent, before the child's first instruction.
#[inline(always)]
pub fn fork(child: u64) -> Option<u32> {
    let parent = bpf_get_current_pid_tgid() as u32;
    let state = TASKS.get_ptr_mut(parent);
    // A thread that shares the memory may change its mappings; a child has the descriptors too.
    // SAFETY: the parent's own entry, and the parent is the current task.
    let selected = state.is_some_and(|state| unsafe {
        run::end(&mut *state, parent);
        (*state).private_start = 0;
        (*state).private_end = 0;
        (*state).known_file = 0;
        (*state).role == role::SELECTED
    });
    // A child can be born into another cgroup than its parent's (clone3(2), CLONE_INTO_CGROUP), and
    // between a move of its parent and the event that tells of it.
    if if cgroup::is_selection() { !cgroup::holds(child) } else { !selected } {
        return None;
    }
    let tid: u32 = read(child + off!(task_pid) as u64);
    let tgid: u32 = read(child + off!(task_tgid) as u64);
    follow(tid, tgid);
    emit(kind::FORK, u32::MAX, tid, tgid, u64::from(parent), 0);
    Some(tid)
}

/// A task is followed from now on.
#[inline(always)]
pub fn follow(tid: u32, tgid: u32) {
    follow_task(tid, tgid);
}

/// By itself, so that its room on the stack is not that of the probes of every call.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn follow_task(tid: u32, tgid: u32) -> i32 {
    let mut idle = IDLE;
    idle.tgid = tgid;
    if TASKS.insert(tid, idle, 0).is_err() {
        count(counter::TASKS_FULL);
        count(counter::RESCAN);
    }
    0
}

/// A task is not followed any more. Whoever reads that nobody is can tell from the counter whether somebody went
/// meanwhile, who may have left a child.
#[inline(always)]
fn let_go(tid: u32) {
    count(counter::LET_GO);
    let _ = TASKS.remove(tid);
}

/// Takes the slot of the current task away if it was moved out of the selection. Whether the task is not, or no
/// longer, selected.
///
/// Whoever moves it back in meanwhile may have found the slot that goes: so where the task stands
/// is looked at once more when the slot is gone.
#[inline(always)]
pub fn leaves(state: &mut TaskState, pid_tgid: u64) -> bool {
    // SAFETY: the task's own slot; whoever moves it changes this field.
    match unsafe { core::ptr::read_volatile(&raw const state.role) } {
        role::SELECTED => return false,
        role::FOREIGN => return true,
        _ => {}
    }
    let (tid, tgid) = (pid_tgid as u32, (pid_tgid >> 32) as u32);
    run::end(state, tid);
    let_go(tid);
    if cgroup::holds(kernel::task() as u64) {
        follow(tid, tgid);
    } else {
        emit(kind::LEFT, u32::MAX, tid, tgid, 0, 0);
    }
    true
}

/// `sched_process_exec(task, old_pid, bprm)`: a thread that is not the leader takes the leader's tid.
#[inline(always)]
pub fn exec(old_tid: u32) {
    let pid_tgid = bpf_get_current_pid_tgid();
    let (tid, tgid) = (pid_tgid as u32, (pid_tgid >> 32) as u32);
    let Some(state) = TASKS.get_ptr_mut(old_tid) else {
        return;
    };
    // SAFETY: the entry of the map.
    if unsafe { (*state).role } == role::FOREIGN {
        if old_tid != tid {
            let _ = TASKS.remove(old_tid);
        }
        return;
    }
    // SAFETY: the entry of the current task, which was that thread.
    run::end(unsafe { &mut *state }, old_tid);
    // The memory is new, and execve itself is not followed: nothing of the old state counts.
    follow(tid, tgid);
    if old_tid != tid {
        let_go(old_tid);
    }
    emit(kind::EXEC, u32::MAX, tid, tgid, u64::from(old_tid), 0);
}

/// `sched_process_exit(task)`: the entry goes, whatever call it was in.
#[inline(always)]
pub fn exit(task: u64) -> Option<u32> {
    let pid_tgid = bpf_get_current_pid_tgid();
    let (tid, tgid) = (pid_tgid as u32, (pid_tgid >> 32) as u32);
    let state = TASKS.get_ptr_mut(tid)?;
    // SAFETY: the task's own slot.
    if unsafe { (*state).role } == role::FOREIGN {
        // SAFETY: as above.
        foreign::ended(unsafe { &mut *state }, pid_tgid);
        let _ = TASKS.remove(tid);
        return None;
    }
    // SAFETY: the entry of the current task.
    run::end(unsafe { &mut *state }, tid);
    let signal: u64 = read(task + off!(task_signal) as u64);
    let live: u32 = read(signal + off!(signal_live) as u64);
    let code: u32 = read(signal + off!(signal_exit_code) as u64);
    let dumped = u64::from(code & CORE_DUMPED != 0);
    // The record first: while the entry is there the agent waits for it.
    emit(kind::EXIT, u32::MAX, tid, tgid, dumped, u32::from(live == 0));
    let_go(tid);
    Some(tid)
}
