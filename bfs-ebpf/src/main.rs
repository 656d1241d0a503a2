//! The probes of bfs: BTF tracepoints at both ends of every system call, at fork, exec and exit, and
//! where tasks are moved between cgroups.
//!
//! A probe may assume that [`maps::OFFSETS`] and [`maps::SETTINGS`] were filled before it was
//! loaded. It promises: nothing of a task that is not in [`maps::TASKS`]; every mutation of one
//! that is, as a record in the ring, or as a name in [`maps::SUSPECTS`], or as a rise of the
//! counter `RESCAN`; and of each file in [`maps::MAPPED`] every range that becomes dirty, whoever does it, in the
//! same three ways.
//!
//! Diagnostics go through aya-log. Its level stands in read-only data as well, so what is not asked for
//! the verifier drops.
#![feature(asm_experimental_arch)]
#![no_std]
#![no_main]

mod aio;
mod calls;
mod cgroup;
mod failing;
mod file;
mod foreign;
mod kernel;
mod mapped;
mod maps;
mod path;
mod run;
mod syscall;
mod task;
mod uring;
mod uring_path;
mod write;

use aya_ebpf::{
    macros::btf_tracepoint,
    programs::{BtfTracePointContext, RawTracePointContext},
};
use aya_log_ebpf::{debug, trace};
use bfs_common::abi::role;

/// `sys_enter(regs, nr)`
#[btf_tracepoint(function = "sys_enter")]
pub fn sys_enter(ctx: BtfTracePointContext) -> i32 {
    let number: u64 = ctx.arg(1);
    // The number first: most calls change nothing, whoever makes them, and a look into a table that
    // is loaded anyway costs less than the search for the task.
    if !syscall::starts(number) {
        return 0;
    }
    syscall::note_foreign(number);
    let task = kernel::task();
    let pid_tgid = kernel::pid_tgid(task);
    if let Some(state) = maps::TASKS.get_ptr_mut(pid_tgid as u32) {
        // SAFETY: the entry of the current task, which (but for its role) only that task changes.
        let state = unsafe { &mut *state };
        if task::leaves(state, pid_tgid) {
            return 0;
        }
        syscall::enter(state, ctx.arg(0), number, task);
    }
    0
}

/// `sys_exit(regs, ret)`
#[btf_tracepoint(function = "sys_exit")]
pub fn sys_exit(ctx: BtfTracePointContext) -> i32 {
    // Of calls that change nothing this is all that is looked at, and of those that went well.
    if bfs_common::abi::is_of_disk(ctx.arg(1)) {
        failing::told(ctx.arg(0), ctx.arg(1));
    }
    if !syscall::may_end(ctx.arg(0)) {
        return 0;
    }
    let task = kernel::task();
    let Some(number) = syscall::ends(ctx.arg(0), task) else {
        return 0;
    };
    let pid_tgid = kernel::pid_tgid(task);
    let slot = maps::TASKS.get_ptr_mut(pid_tgid as u32);
    // SAFETY: the entry of the current task, and the map's own.
    if slot.is_none_or(|state| unsafe { (*state).role } == role::FOREIGN) {
        // SAFETY: as above.
        if let Some(state) = slot {
            foreign::ended(unsafe { &mut *state }, pid_tgid);
        }
        foreign::opened(ctx.arg(0), number, ctx.arg(1), pid_tgid);
    } else if let Some(state) = slot {
        // SAFETY: as above.
        let state = unsafe { &mut *state };
        syscall::exit(state, number, ctx.arg(1), task);
        task::leaves(state, pid_tgid);
        trace!(&ctx, "call {} of thread {} ended with {}", number, pid_tgid as u32, ctx.arg::<i64>(1));
    }
    0
}

/// `sched_process_fork(parent, child)`
#[btf_tracepoint(function = "sched_process_fork")]
pub fn sched_process_fork(ctx: BtfTracePointContext) -> i32 {
    if let Some(child) = task::fork(ctx.arg(1)) {
        debug!(&ctx, "thread {} is followed", child);
    }
    0
}

/// `sched_process_exec(task, old_pid, bprm)`
#[btf_tracepoint(function = "sched_process_exec")]
pub fn sched_process_exec(ctx: BtfTracePointContext) -> i32 {
    task::exec(ctx.arg(1));
    0
}

/// `sched_process_exit(task)`
#[btf_tracepoint(function = "sched_process_exit")]
pub fn sched_process_exit(ctx: BtfTracePointContext) -> i32 {
    if let Some(tid) = task::exit(ctx.arg(0)) {
        debug!(&ctx, "thread {} has ended", tid);
    }
    0
}

/// `cgroup_attach_task(dst_cgrp, path, task, threadgroup)`
#[btf_tracepoint(function = "cgroup_attach_task")]
pub fn cgroup_attach_task(ctx: BtfTracePointContext) -> i32 {
    let whole: u32 = ctx.arg(3);
    cgroup::moved(ctx.arg(2), whole & 0xff != 0);
    0
}

/// `io_uring_create(fd, ctx, sq_entries, cq_entries, flags)`
#[btf_tracepoint(function = "io_uring_create")]
pub fn io_uring_create(ctx: BtfTracePointContext) -> i32 {
    uring::create(ctx.arg(1));
    0
}

/// `io_uring_submit_req(req)`; on 6.1 `io_uring_submit_sqe(req, force_nonblock)`
#[btf_tracepoint(function = "io_uring_submit_req")]
pub fn io_uring_submit_req(ctx: BtfTracePointContext) -> i32 {
    uring::submit(ctx.arg(0));
    0
}

/// `io_uring_complete(ctx, req, cqe)`; before 6.14 or so `(ctx, req, user_data, res, ...)`. A
/// completion without a request is one of several of an operation that goes on.
#[btf_tracepoint(function = "io_uring_complete")]
pub fn io_uring_complete(ctx: BtfTracePointContext) -> i32 {
    let req: u64 = ctx.arg(1);
    if req == 0 {
        return 0;
    }
    let result = if maps::off!(uring_cqe) != 0 {
        // struct io_uring_cqe: the result stands behind the user's 8 bytes.
        kernel::read::<i32>(ctx.arg::<u64>(2) + 8)
    } else {
        ctx.arg::<i64>(3) as i32
    };
    uring::complete(ctx.arg(0), req, result);
    0
}

/// `writeback_dirty_folio(folio, mapping)`
#[btf_tracepoint(function = "writeback_dirty_folio")]
pub fn writeback_dirty_folio(ctx: BtfTracePointContext) -> i32 {
    mapped::dirtied(ctx.arg(0), ctx.arg(1));
    0
}

/// `inode_set_ctime_to_ts(inode, ctime)`
#[btf_tracepoint(function = "inode_set_ctime_to_ts")]
pub fn inode_set_ctime_to_ts(ctx: BtfTracePointContext) -> i32 {
    foreign::changed(ctx.arg(0));
    0
}

/// `ctime_ns_xchg(inode, old, new, cur)`
#[btf_tracepoint(function = "ctime_ns_xchg")]
pub fn ctime_ns_xchg(ctx: BtfTracePointContext) -> i32 {
    foreign::changed(ctx.arg(0));
    0
}

/// `ctime_xchg_skip(inode, ctime)`: it had that `ctime` already.
#[btf_tracepoint(function = "ctime_xchg_skip")]
pub fn ctime_xchg_skip(ctx: BtfTracePointContext) -> i32 {
    foreign::changed(ctx.arg(0));
    0
}

/// Attached to nothing: the agent runs it (`BPF_PROG_TEST_RUN`) with one of its own descriptors, to
/// learn how much direct I/O is in flight on that file. (Not by the macro: that returns nothing.)
///
/// # Safety
/// The context is that of a raw tracepoint with an argument.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp/direct_io")]
pub unsafe fn direct_io(ctx: *mut core::ffi::c_void) -> i32 {
    kernel::direct_io(RawTracePointContext::new(ctx).arg::<u64>(0) as u32)
}

/// The same for whether that file has a name below a root, or may have one.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp/concerns")]
pub unsafe fn concerns(ctx: *mut core::ffi::c_void) -> i32 {
    foreign::concerns(RawTracePointContext::new(ctx).arg::<u64>(0) as u32)
}

/// The same for how many open files, of whoever, may write to it, and one more.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp/writers")]
pub unsafe fn writers(ctx: *mut core::ffi::c_void) -> i32 {
    foreign::writers(RawTracePointContext::new(ctx).arg::<u64>(0) as u32)
}

/// The same for how many mappings there are through which that file may be written.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp/writable_mappings")]
pub unsafe fn writable_mappings(ctx: *mut core::ffi::c_void) -> i32 {
    mapped::writable(RawTracePointContext::new(ctx).arg::<u64>(0) as u32)
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // The verifier refuses a probe in which this can be reached.
    loop {}
}

/// Some helpers are only for programs under a licence that is compatible with the kernel's.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
