//! What others than the selected tasks change.
//!
//! The kernel's own sign is taken: whoever changes entries, content or attributes of an inode gives it a new
//! `ctime`, which a tracepoint tells (`include/trace/events/timestamp.h`, since 6.13) *before* others can see the
//! change by a name, and while the inode is locked. So what others do elsewhere costs them the look whether the
//! inode lies below a root, and calls that change nothing cost them nothing.
//!
//! The slot of the task is active from its first change until the end of the call, when there is a record of each
//! inode that it changed: as it is with the calls of selected tasks. Only where there is no end that could be seen
//! (a store into a mapping, io_uring, threads of the kernel) the record is made at once.
//!
//! A second write within one tick of the clock changes no time, if nobody has asked for the time meanwhile. So who
//! opens a file for writing is told as well.

use aya_ebpf::helpers::{
    bpf_get_current_comm,
    generated::{bpf_ktime_get_ns, bpf_task_pt_regs},
};
use bfs_common::abi::{
    EventHeader, ForeignEvent, InodeId, ROOTS_MAX, Stranger, TaskState, counter, foreign, kind, role,
};

use crate::{
    file,
    kernel::{self, field, read},
    maps::{self, BPF_NOEXIST, FOREIGN, META, NO_WAKEUP, RING, ROOTS, STRANGERS, TASKS, count, off, setting},
    syscall, task,
};

/// A path has so many components at most; what lies deeper counts as in scope.
const DEPTH_MAX: u32 = 48;

/// `PF_IO_WORKER`, `PF_USER_WORKER`, `PF_KTHREAD` (include/linux/sched.h).
const PF_WORKERS: u32 = 0x10 | 0x4000 | 0x20_0000;

const O_ACCMODE: u32 = 3;

/// A change without an end that is seen began at most so long ago.
const UNSEEN_NS: u64 = 20_000_000;

/// Answers of [`is_in_scope`]; 0: it has none.
const HERE: i32 = 1;
const MAYBE: i32 = 2;

/// Inodes of one call that have room in the slot.
const INODES_MAX: u32 = 4;

/// An inode gets a new `ctime`.
#[inline(always)]
pub fn changed(inode: *const u8) {
    if setting!(foreign) == 0 || inode.is_null() {
        return;
    }
    // SAFETY: members of the inode and of its super block, which the verifier knows.
    let (sb, dev) = unsafe {
        let sb = field::<*const u8>(inode, off!(inode_sb));
        if sb.is_null() {
            return;
        }
        (sb as u64, field::<u32>(sb, off!(sb_dev)))
    };
    let (dev, _) = kernel::device_of(sb, inode as u64, dev);
    if !kernel::in_scope(dev) {
        return;
    }
    let task = kernel::task();
    let pid_tgid = kernel::pid_tgid(task);
    let (tid, tgid) = (pid_tgid as u32, (pid_tgid >> 32) as u32);
    if is_agent(tgid) {
        return;
    }
    let slot = TASKS.get_ptr_mut(tid);
    // SAFETY: the entry of the current task.
    if slot.is_some_and(|state| unsafe { (*state).role } != role::FOREIGN) {
        return;
    }
    // SAFETY: a member of the task.
    let worker = unsafe { field::<u32>(task, off!(task_flags)) } & PF_WORKERS != 0;
    // Workers of io_uring change what the task wants that they belong to, and that has its own record.
    // SAFETY: the map's entry.
    if worker && TASKS.get_ptr_mut(tgid).is_some_and(|state| unsafe { (*state).role } != role::FOREIGN) {
        return;
    }
    // The same as plain numbers.
    let sb: u64 = read(inode as u64 + off!(inode_sb) as u64);
    let inode: u64 = read(inode as u64 + off!(inode_self) as u64);
    match is_in_scope(inode, sb) {
        0 => return,
        HERE => tally(tgid),
        _ => {}
    }
    let id = id_of(inode, dev);
    // SAFETY: the registers of the current task, which the helper gives as the verifier knows them.
    let call = if worker {
        None
    } else {
        let regs = unsafe { bpf_task_pt_regs(task as *mut _) as *const u64 };
        if syscall::may_end(regs) { syscall::ends(regs, task) } else { None }
    };
    let noted = match call {
        Some(number) => match slot.or_else(|| make_slot(tid, tgid)) {
            // SAFETY: the entry of the current task.
            Some(state) => note(unsafe { &mut *state }, number, id),
            None => false,
        },
        None => false,
    };
    if !noted {
        let now = now();
        emit(id, now.saturating_sub(UNSEEN_NS), u32::MAX, foreign::CHANGED, pid_tgid, false);
    }
}

#[inline(always)]
fn id_of(inode: u64, dev: u32) -> InodeId {
    InodeId {
        ino: read(inode + off!(inode_ino) as u64),
        dev,
        generation: read(inode + off!(inode_generation) as u64),
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn is_agent(tgid: u32) -> bool {
    META.get(0).is_some_and(|meta| meta[3] == u64::from(tgid))
}

/// Whether an inode has a name below a root ([`HERE`]), or may have one ([`MAYBE`]).
///
/// Takes plain numbers: so the verifier looks at it once and by itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_in_scope(inode: u64, sb: u64) -> i32 {
    let Some(roots) = ROOTS.get(0) else { return MAYBE };
    if roots[0] == u64::MAX {
        return MAYBE;
    }
    let mode = u32::from(read::<u16>(inode + off!(inode_mode) as u64));
    let links: u32 = read(inode + off!(inode_nlink) as u64);
    // Without a name it is of no concern: what took it away, or will give it one, tells of the directory.
    if links == 0 {
        return 0;
    }
    // The names that the kernel has in memory are not all that there are.
    let elsewhere = if links > 1 && mode & kernel::S_IFMT != kernel::S_IFDIR { MAYBE } else { 0 };
    let alias: u64 = read(inode + off!(inode_aliases) as u64);
    if alias == 0 {
        return elsewhere;
    }
    let mut dentry = alias - off!(dentry_alias) as u64;
    let top: u64 = read(sb + off!(sb_root) as u64);
    let mut depth = 0;
    while depth < DEPTH_MAX {
        let at: u64 = read(dentry + off!(dentry_inode) as u64);
        let number: u64 = read(at + off!(inode_ino) as u64);
        let mut i = 0;
        while i < ROOTS_MAX {
            if roots[i] == number {
                return HERE;
            }
            if roots[i] == 0 {
                break;
            }
            i += 1;
        }
        if dentry == top {
            return elsewhere;
        }
        let parent: u64 = read(dentry + off!(dentry_parent) as u64);
        // Opened by its number, and not yet connected with its directory.
        if parent == dentry {
            return MAYBE;
        }
        dentry = parent;
        depth += 1;
    }
    MAYBE
}

/// The slot of a task that has none.
#[inline(always)]
fn make_slot(tid: u32, tgid: u32) -> Option<*mut TaskState> {
    insert_slot(tid, tgid);
    TASKS.get_ptr_mut(tid)
}

/// By itself, so that its room on the stack is not that of its callers.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn insert_slot(tid: u32, tgid: u32) -> i32 {
    let mut idle = task::IDLE;
    idle.tgid = tgid;
    idle.role = role::FOREIGN;
    // Without room its changes have their records at once; also when it was selected since it was looked for.
    let _ = TASKS.insert(tid, idle, BPF_NOEXIST);
    0
}

/// Puts an inode into the slot of the call that changes it; whether there was room.
#[inline(always)]
fn note(state: &mut TaskState, number: u32, id: InodeId) -> bool {
    if state.role != role::FOREIGN {
        return false;
    }
    if state.active == 0 {
        state.nr = number;
        state.known_flags = 0;
        task::begin_call(state);
        // SAFETY: the task's own slot.
        unsafe { core::ptr::write_volatile(&raw mut state.start_ns, now()) };
    }
    let second = u64::from(id.generation) << 32 | u64::from(id.dev);
    let known = state.known_flags;
    let args = &state.args;
    let is_known = known > 0 && state.inode == id
        || known > 1 && args[0] == id.ino && args[1] == second
        || known > 2 && args[2] == id.ino && args[3] == second
        || known > 3 && args[4] == id.ino && args[5] == second;
    if is_known {
        return true;
    }
    match known {
        0 => state.inode = id,
        1 => (state.args[0], state.args[1]) = (id.ino, second),
        2 => (state.args[2], state.args[3]) = (id.ino, second),
        3 => (state.args[4], state.args[5]) = (id.ino, second),
        _ => return false,
    }
    state.known_flags = known + 1;
    true
}

/// A call of a task that is not selected ended, or the task.
#[inline(always)]
pub fn ended(state: &mut TaskState, pid_tgid: u64) {
    if state.active == 0 {
        return;
    }
    emit_noted(state, pid_tgid);
    task::end_call(state);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn emit_noted(state: *mut TaskState, pid_tgid: u64) -> i32 {
    if state.is_null() {
        return 0;
    }
    // SAFETY: the verifier checks the pointer that the probe hands in.
    let state = unsafe { &mut *state };
    let known = state.known_flags;
    let mut i = 0;
    while i < INODES_MAX {
        if i >= known {
            break;
        }
        let (ino, second) = match i {
            0 => (state.inode.ino, u64::from(state.inode.generation) << 32 | u64::from(state.inode.dev)),
            1 => (state.args[0], state.args[1]),
            2 => (state.args[2], state.args[3]),
            _ => (state.args[4], state.args[5]),
        };
        let id = InodeId { ino, dev: second as u32, generation: (second >> 32) as u32 };
        emit(id, state.start_ns, state.nr, foreign::CHANGED, pid_tgid, true);
        i += 1;
    }
    0
}

/// A call that opens files ended, of a task that is not selected.
#[inline(always)]
pub fn opened(regs: *const u64, number: u32, ret: i64, pid_tgid: u64) {
    if setting!(foreign) == 0
        || ret < 0
        || !syscall::is_open(number)
        || syscall::opens_as(regs, number) & O_ACCMODE == 0
    {
        return;
    }
    let (address, _) = kernel::file_of(ret as u32);
    if address == 0 || read::<u32>(address + off!(file_mode) as u64) & kernel::FMODE_WRITE == 0 {
        return;
    }
    let inode: u64 = read(address + off!(file_inode) as u64);
    let sb: u64 = read(inode + off!(inode_sb) as u64);
    let (dev, _) = kernel::device_of(sb, inode, read(sb + off!(sb_dev) as u64));
    let mode = u32::from(read::<u16>(inode + off!(inode_mode) as u64));
    if !kernel::in_scope(dev)
        || mode & kernel::S_IFMT != kernel::S_IFREG
        || is_agent((pid_tgid >> 32) as u32)
        || is_in_scope(inode, sb) == 0
    {
        return;
    }
    emit(id_of(inode, dev), now(), number, foreign::OPENED, pid_tgid, false);
}

/// Whether the file of a descriptor of the current task has a name below a root, or may have one.
#[inline(always)]
pub fn concerns(descriptor: u32) -> i32 {
    let inode = kernel::inode_of(descriptor);
    is_in_scope(inode, read(inode + off!(inode_sb) as u64))
}

/// How many open files, of whoever, may write to the file of a descriptor of the current task, and one more; 0
/// where that cannot be told.
#[inline(always)]
pub fn writers(descriptor: u32) -> i32 {
    let inode = kernel::inode_of(descriptor);
    if inode == 0 {
        return 0;
    }
    let count: i32 = read(inode + off!(inode_writers) as u64);
    // Below 0: it is executed, and writing is denied.
    if count < 0 { 1 } else { count.saturating_add(1) }
}

/// Makes a record, where none of a change that began before waits in the ring. `waits`: others may rely on this
/// one, for the slot of the task is active until it stands there.
#[inline(always)]
fn emit(id: InodeId, start_ns: u64, number: u32, how: u32, pid_tgid: u64, waits: bool) {
    if how == foreign::CHANGED {
        // SAFETY: a word that is never changed.
        if unsafe { FOREIGN.get(&id) }.is_some_and(|start| *start <= start_ns) {
            return;
        }
        // Before the record: when the agent has that, it takes the entry out.
        if waits {
            let _ = FOREIGN.insert(&id, start_ns, 0);
        }
    }
    let Some(mut entry) = RING.reserve::<ForeignEvent>(0) else {
        let _ = FOREIGN.remove(&id);
        maps::name(&id, now());
        return;
    };
    let header = EventHeader {
        len: size_of::<ForeignEvent>() as u32,
        ..file::header(kind::FOREIGN, 0, number, start_ns, now(), 0, pid_tgid)
    };
    *entry = core::mem::MaybeUninit::new(ForeignEvent { header, id, how, reserved: 0 });
    entry.submit(NO_WAKEUP);
    count(counter::RECORDS);
}

/// Counts a change for its process. (One that may lie elsewhere does not count.)
#[inline(always)]
fn tally(tgid: u32) {
    count_stranger(tgid);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn count_stranger(tgid: u32) -> i32 {
    if STRANGERS.get_ptr_mut(&tgid).is_none() {
        let command = bpf_get_current_comm().unwrap_or([0; 16]);
        let _ = STRANGERS.insert(&tgid, Stranger { changes: 0, last_ns: 0, command }, 0);
    }
    if let Some(known) = STRANGERS.get_ptr_mut(&tgid) {
        // SAFETY: the map's own entry.
        unsafe {
            task::add_one(&raw mut (*known).changes);
            core::ptr::write_volatile(&raw mut (*known).last_ns, now());
        }
    } else if let Some(others) = STRANGERS.get_ptr_mut(&0) {
        // SAFETY: as above.
        unsafe { task::add_one(&raw mut (*others).changes) };
    } else {
        let _ = STRANGERS.insert(&0, Stranger { changes: 1, last_ns: now(), command: [0; 16] }, 0);
    }
    0
}
