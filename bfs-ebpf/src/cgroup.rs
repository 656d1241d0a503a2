//! Selection by cgroup: who is in it, and who is moved in or out.
//!
//! Where a task stands is read from the task itself (`task_struct.cgroups`), never taken from an
//! event, so the order of events does not matter: after every change of a slot, or of the task's
//! place, somebody looks at both.

use aya_ebpf::helpers::generated::bpf_loop;
use bfs_common::abi::{TASKS_MAX, counter, kind, role};

use crate::{
    kernel::read,
    maps::{TASKS, count, off, setting},
    task,
};

/// Cgroups can lie this deep in each other; what lies deeper is not looked at.
const DEPTH_MAX: u32 = 64;

/// `PF_EXITING` (include/linux/sched.h)
const PF_EXITING: u32 = 4;

/// Whether tasks are selected by a cgroup.
#[inline(always)]
pub fn is_selection() -> bool {
    setting!(cgroup_low) != 0 || setting!(cgroup_high) != 0
}

/// Whether a task is in the selected cgroup, or in one below it.
#[inline(always)]
pub fn holds(task: u64) -> bool {
    is_selection() && in_cgroup(read(task + off!(task_cgroups) as u64)) != 0
}

/// Takes the `css_set` and not the task: the verifier wants plain numbers for plain numbers.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn in_cgroup(set: u64) -> i32 {
    let wanted = u64::from(setting!(cgroup_high)) << 32 | u64::from(setting!(cgroup_low));
    let cgroup: u64 = read(set + off!(css_set_cgroup) as u64);
    let level: u32 = read(cgroup + off!(cgroup_level) as u64);
    let mut i = 0;
    while i < DEPTH_MAX {
        if i > level {
            return 0;
        }
        let ancestor: u64 = read(cgroup + off!(cgroup_ancestors) as u64 + u64::from(i) * 8);
        let node: u64 = read(ancestor + off!(cgroup_node) as u64);
        if read::<u64>(node + off!(node_id) as u64) == wanted {
            return 1;
        }
        i += 1;
    }
    0
}

struct Walk {
    node: u64,
    head: u64,
    joined: u64,
}

/// Puts the slot of a task in order with where it stands; 1 when it came in.
#[inline(always)]
fn place(task: u64) -> u64 {
    let tid: u32 = read(task + off!(task_pid) as u64);
    let entry = TASKS.get_ptr_mut(tid);
    if !holds(task) {
        if let Some(state) = entry {
            // SAFETY: the entry of the map; nobody else changes this field.
            unsafe {
                if (*state).role != role::FOREIGN {
                    core::ptr::write_volatile(&raw mut (*state).role, role::LEAVES);
                }
            }
        }
        return 0;
    }
    if let Some(state) = entry {
        // SAFETY: as above.
        unsafe {
            if (*state).role != role::FOREIGN {
                core::ptr::write_volatile(&raw mut (*state).role, role::SELECTED);
                return 0;
            }
            // Of the call that it is in nobody will tell the end.
            if (*state).active != 0 {
                count(counter::RESCAN);
            }
        }
    }
    let mut idle = task::IDLE;
    idle.tgid = read(task + off!(task_tgid) as u64);
    if TASKS.insert(tid, idle, 0).is_err() {
        count(counter::TASKS_FULL);
        count(counter::RESCAN);
    }
    // The probe at its exit ran before this, or comes still.
    if read::<u32>(task + off!(task_flags) as u64) & PF_EXITING != 0 {
        let _ = TASKS.remove(tid);
    }
    1
}

extern "C" fn step(_index: u32, walk: *mut Walk) -> i64 {
    // SAFETY: the context that was handed to bpf_loop.
    let walk = unsafe { &mut *walk };
    if walk.node == walk.head || walk.node == 0 {
        return 1;
    }
    walk.joined |= place(walk.node.wrapping_sub(off!(task_thread_node) as u64));
    walk.node = read(walk.node);
    0
}

/// A task, or with `whole` its process, was moved: it is in its new place already.
#[inline(always)]
pub fn moved(task: u64, whole: bool) {
    if !is_selection() {
        return;
    }
    let joined = if whole {
        let signal: u64 = read(task + off!(task_signal) as u64);
        let head = signal + off!(signal_thread_head) as u64;
        let mut walk = Walk { node: read(head), head, joined: 0 };
        // SAFETY: the callback has the signature that the helper asks for.
        unsafe { bpf_loop(TASKS_MAX, step as *mut core::ffi::c_void, (&raw mut walk).cast(), 0) };
        walk.joined
    } else {
        place(task)
    };
    if joined != 0 {
        let tid: u32 = read(task + off!(task_pid) as u64);
        let tgid: u32 = read(task + off!(task_tgid) as u64);
        task::emit(kind::JOINED, u32::MAX, tid, tgid, 0, 0);
    }
}
