//! The start of a call: whether it is followed, and what is known only then.

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_probe_read_user};
use bfs_common::abi::{InodeId, TaskState, counter, flag, kind, slot};

use super::{
    LOOP, O_CREAT, O_TRUNC, X32, descriptor, is_among, is_compat, number_of, open_flags, reg, register,
};
use crate::{
    aio,
    calls::{CALLS, CLASS, SPECIAL, class, nr, nr32},
    kernel, mapped,
    maps::{SCRATCH, SCRATCH_ENTER, count, setting},
    path, run, task, write,
};

/// `__O_TMPFILE`, without the directory bit.
pub const O_TMPFILE: u32 = 0o20_000_000;

/// `MAP_SHARED`, `MAP_SHARED_VALIDATE` and the mask of the type.
const MAP_TYPE: u64 = 0xf;
const MAP_SHARED: u64 = 1;
const MAP_SHARED_VALIDATE: u64 = 3;

const MADV_REMOVE: u32 = 9;

/// `SOL_SOCKET`, and `SCM_RIGHTS` above it, as they stand in a struct cmsghdr.
const SCM_RIGHTS: u64 = 1 << 32 | 1;

/// ioctls that change no file, of those that programs make on files and directories: FIBMAP, FIGETBSZ,
/// FS_IOC_FIEMAP, FS_IOC_GETFLAGS and FSGETXATTR, GETVERSION, GETFSUUID, GETFSLABEL, FITRIM, FIDEDUPERANGE
/// (it shares bytes that are equal), BTRFS_IOC_TREE_SEARCH, INO_LOOKUP, FS_INFO.
const HARMLESS: [u32; 14] = [
    1,
    2,
    0xc020_660b,
    0x8008_6601,
    0x8004_6601,
    0x801c_581f,
    0x8008_7601,
    0x8011_1500,
    0x8100_9431,
    0xc018_5879,
    0xc018_9436,
    0xd000_9411,
    0xd000_9412,
    0x8400_941f,
];

/// Type of the ioctls of terminals: no file answers them (isatty(3) asks).
const TERMINAL: u32 = 0x54;

/// `include/uapi/linux/loop.h`
const LOOP_SET_FD: u32 = 0x4c00;
const LOOP_CHANGE_FD: u32 = 0x4c06;
const LOOP_CONFIGURE: u32 = 0x4c0a;

/// The start of a call of a followed task.
#[inline(always)]
pub fn enter(state: &mut TaskState, regs: *const u64, number: u64, task: *const u8) {
    let pid_tgid = kernel::pid_tgid(task);
    let compat = is_compat(task);
    let given = number;
    let number = number_of(number, compat);
    if compat || number & X32 != 0 {
        run::end(state, pid_tgid as u32);
        count(counter::COMPAT);
        state.private_start = 0;
        state.private_end = 0;
        state.known_file = 0;
        if number == u64::from(SPECIAL) || !compat {
            task::emit(kind::COMPAT, given as u32, pid_tgid as u32, (pid_tgid >> 32) as u32, given, 0);
            return;
        }
    }
    if number >= CALLS as u64 {
        return;
    }
    let class = CLASS[number as usize & (CALLS - 1)];
    if matches!(class, class::NONE | class::MAYBE_COMPAT | class::FOREIGN_STORE | class::FOREIGN_DESCRIPTOR) {
        return;
    }
    if class == class::MEMORY {
        state.private_start = 0;
        state.private_end = 0;
        return;
    }
    if class == class::TABLE {
        run::end(state, pid_tgid as u32);
        state.known_file = 0;
        if !compat && hands_over(number as u32, register(regs, reg::SI)) {
            task::emit(kind::HANDED, number as u32, pid_tgid as u32, (pid_tgid >> 32) as u32, 0, 0);
        }
        return;
    }
    let number = number as u32;
    state.nr = number;
    state.flags = 0;
    state.file = 0;
    if compat {
        compat_arguments(state, regs, given);
    } else {
        state.args[0] = register(regs, reg::DI);
        state.args[1] = register(regs, reg::SI);
        state.args[2] = register(regs, reg::DX);
        state.args[3] = register(regs, reg::R10);
        state.args[4] = register(regs, reg::R8);
        state.args[5] = register(regs, reg::R9);
    }
    if class == class::CLOSE && state.known_fd == state.args[0] as u32 {
        state.known_file = 0;
    }
    let going_on = class == class::WRITE && goes_on(state, number);
    if !going_on {
        run::end(state, pid_tgid as u32);
    }
    let follow = match class {
        // Nobody wants to know.
        class::CLOSE if setting!(closes) == 0 => false,
        class::WRITE if going_on => true,
        class::AIO => true,
        class::OPEN => opens(state, number),
        class::PATH => takes_path(state, number),
        class::IOCTL => {
            let command = state.args[1] as u32;
            if command >> 8 == LOOP {
                backing_file(state, command);
            }
            !is_harmless(command) && enter_file(state, number, class)
        }
        class::MMAP => {
            state.private_start = 0;
            state.private_end = 0;
            let kind = state.args[3] & MAP_TYPE;
            (kind == MAP_SHARED || kind == MAP_SHARED_VALIDATE) && enter_file(state, number, class)
        }
        class::ADVICE => {
            state.private_start = 0;
            state.private_end = 0;
            let advice = if number == nr::MADVISE { state.args[2] } else { state.args[3] };
            advice as u32 == MADV_REMOVE && enter_file(state, number, class)
        }
        _ => enter_file(state, number, class),
    };
    if !follow {
        return;
    }
    task::begin_call(state);
    // SAFETY: the task's own slot.
    unsafe {
        // A write that may join a run needs no time of its own: that of the run is earlier, and while there is no cut
        // that is all that counts. (A cut that this one does not see yet is still to look at the slot.)
        let start_ns = if going_on && run::goes_on(state) { state.run_first_ns } else { bpf_ktime_get_ns() };
        core::ptr::write_volatile(&raw mut state.start_ns, start_ns);
    }
    if class == class::AIO {
        if let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_ENTER) {
            // SAFETY: this CPU's entry of this hook.
            aio::enter(unsafe { &mut *scratch }, state, pid_tgid);
        }
    } else if state.file == 0 && (class == class::PATH || class == class::OPEN) && kernel::paths_are_shared()
    {
        enter_path(state, number, pid_tgid);
    }
}

/// Whether a call sends descriptors to somebody (SCM_RIGHTS), or may do so.
#[inline(always)]
fn hands_over(number: u32, message: u64) -> bool {
    if number == nr::SENDMMSG {
        return true;
    }
    if number != nr::SENDMSG {
        return false;
    }
    // `msg_control` and `msg_controllen` of a struct msghdr, `cmsg_len`, `cmsg_level` and `cmsg_type` of the first
    // struct cmsghdr there.
    let mut control = [0u64; 2];
    let mut first = [0u64; 2];
    // SAFETY: the targets have these sizes.
    unsafe {
        if bpf_probe_read_user(control.as_mut_ptr().cast(), 16, (message + 32) as *const _) < 0 {
            return true;
        }
        if control[1] < 16 {
            return false;
        }
        bpf_probe_read_user(first.as_mut_ptr().cast(), 16, control[0] as *const _) < 0
            || first[1] == SCM_RIGHTS
            || control[1] > first[0] + 16
    }
}

/// The usual case: it goes on writing to the file of its last call. Nothing has to be read for that: since then
/// no call of this task's has changed what the descriptor stands for, or has let others use it, so it is the
/// same file, and its position is moved by this task alone. Whether that was so is looked at when the call has
/// ended.
#[inline(always)]
fn goes_on(state: &mut TaskState, number: u32) -> bool {
    if state.known_file == 0
        || state.known_fd != state.args[0] as u32
        || number == nr::PWRITEV2
        // Where that lands only the length at the start tells.
        || state.known_flags & slot::APPEND != 0 && number != nr::WRITE && number != nr::WRITEV
    {
        return false;
    }
    state.file = state.known_file;
    state.flags |= slot::KNOWN | state.known_flags;
    true
}

/// Fills in the arguments of a call of the 32-bit table as the 64-bit table has them.
#[inline(always)]
fn compat_arguments(state: &mut TaskState, regs: *const u64, number: u64) {
    const LOW: u64 = 0xffff_ffff;
    state.flags = slot::COMPAT;
    state.args[0] = register(regs, reg::BX) & LOW;
    state.args[1] = register(regs, reg::CX) & LOW;
    state.args[2] = register(regs, reg::DX) & LOW;
    state.args[3] = register(regs, reg::SI) & LOW;
    state.args[4] = register(regs, reg::DI) & LOW;
    state.args[5] = register(regs, reg::BP) & LOW;
    match number {
        // The offset is in pages.
        nr32::MMAP2 => state.args[5] <<= 12,
        nr32::PWRITE64 | nr32::PWRITEV | nr32::PWRITEV2 => state.args[3] |= state.args[4] << 32,
        nr32::TRUNCATE64 | nr32::FTRUNCATE64 => state.args[1] |= state.args[2] << 32,
        _ => {}
    }
}

/// The kernel writes to a loop device's file when it likes, as a mapping would: the call counts as one on
/// that file.
#[inline(always)]
fn backing_file(state: &mut TaskState, command: u32) {
    let mut fd = state.args[2] as u32;
    if command == LOOP_CONFIGURE {
        // The first member of struct loop_config.
        // SAFETY: the target has that size.
        unsafe { bpf_probe_read_user((&raw mut fd).cast(), 4, state.args[2] as *const _) };
    } else if command != LOOP_SET_FD && command != LOOP_CHANGE_FD {
        return;
    }
    state.args[0] = u64::from(fd);
}

#[inline(always)]
fn is_harmless(command: u32) -> bool {
    command >> 8 & 0xff == TERMINAL || is_among(command, &HARMLESS)
}

#[inline(always)]
fn opens(state: &TaskState, number: u32) -> bool {
    // Without a name (O_TMPFILE) it concerns nobody yet.
    let flags = open_flags(state, number);
    flags & (O_CREAT | O_TRUNC) != 0 && flags & O_TMPFILE == 0
}

#[inline(always)]
fn takes_path(state: &mut TaskState, number: u32) -> bool {
    if (number == nr::UTIMENSAT || number == nr::FUTIMESAT) && state.args[1] == 0 {
        state.flags |= slot::BY_DESCRIPTOR;
        return enter_file(state, number, class::DESCRIPTOR);
    }
    // acct(NULL) ends the accounting.
    if number == nr::ACCT {
        return state.args[0] != 0;
    }
    number != nr::BIND || path::is_unix_path(state)
}

/// Resolves the descriptor and takes what is known only now. Whether the call is followed.
#[inline(always)]
fn enter_file(state: &mut TaskState, number: u32, class: u8) -> bool {
    let (address, table_shared) = if class == class::ADVICE {
        let by_address = number == nr::MADVISE;
        (if by_address { mapped::file_at(state.args[0], state.args[1]) } else { 0 }, true)
    } else {
        kernel::file_of(descriptor(number, state))
    };
    if address == 0 {
        // Which files are mapped there could not be told: the call is followed without one.
        state.inode = InodeId::NONE;
        state.known_file = 0;
        return class == class::ADVICE;
    }
    let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_ENTER) else {
        return false;
    };
    // SAFETY: this CPU's entry of this hook.
    let scratch = unsafe { &mut *scratch };
    let file = kernel::read_file(scratch, address, table_shared);
    let writable = file.mode & kernel::FMODE_WRITE != 0;
    if (class == class::CLOSE || class == class::MMAP || class == class::SEEK) && !writable {
        return false;
    }
    if class == class::SEEK && !file.shared {
        return false;
    }
    kernel::read_inode(scratch, file.inode);
    let followed = match class {
        // Writing to a FIFO moves its modification time (pipe_write() in fs/pipe.c).
        class::WRITE => kernel::object_is_file(scratch) || kernel::object_is_fifo(scratch),
        class::DESCRIPTOR => true,
        _ => kernel::object_is_followed(scratch),
    };
    // A file that has no name yet may get one while the call runs (linkat of an O_TMPFILE).
    if !followed || class == class::CLOSE && kernel::object_links(scratch) == 0 {
        return false;
    }
    let (dev, btrfs) = kernel::object_device(scratch, file.inode);
    if !kernel::in_scope(dev) {
        return false;
    }
    state.file = address;
    let keep = class != class::CLOSE
        && kernel::object_is_file(scratch)
        && kernel::object_links(scratch) != 0
        && !btrfs
        && !file.shared
        && !kernel::uses_io_uring()
        && !kernel::descriptors_were_taken();
    state.known_file = if keep { address } else { 0 };
    state.known_sb = kernel::object_sb(scratch);
    state.known_end = u64::MAX;
    state.known_fd = descriptor(number, state);
    state.inode_addr = file.inode;
    state.inode = kernel::object_id(scratch, dev);
    state.pos = file.pos;
    state.size = kernel::object_size(scratch);
    let mut flags = state.flags;
    if file.shared {
        flags |= slot::SHARED_FILE;
    }
    state.known_flags = 0;
    if file.flags & write::O_APPEND != 0 {
        flags |= slot::APPEND;
        state.known_flags = slot::APPEND;
    }
    if btrfs {
        flags |= slot::BTRFS;
    }
    if kernel::object_links(scratch) == 0 {
        flags |= slot::NAMELESS;
    }
    state.flags = flags;
    true
}

#[inline(always)]
fn enter_path(state: &mut TaskState, number: u32, pid_tgid: u64) {
    if number == nr::OPEN_BY_HANDLE_AT {
        return;
    }
    state.flags |= slot::PATH_SHARED;
    if let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_ENTER) {
        // SAFETY: this CPU's entry of this hook.
        let scratch = unsafe { &mut *scratch };
        let start_ns = state.start_ns;
        path::emit(scratch, state, kind::PATH_ENTER, flag::PATH_SHARED, number, start_ns, 0, pid_tgid);
    }
}
