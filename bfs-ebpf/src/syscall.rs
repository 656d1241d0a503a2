//! The two ends of every system call of a followed task.
//!
//! `sys_enter` decides whether the call is followed and puts what is known only then into the
//! task's slot; `sys_exit` turns the slot into a record. The slot is `active` from before the start
//! is stamped until after the record stands in the ring: this is what the agent's cut relies on.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_probe_read_user};
use bfs_common::abi::{FileEvent, InodeAttr, NO_CALL, TaskState, counter, flag, kind, slot};

use crate::{
    calls::{CALLS, CLASS, COMPAT, SPECIAL, class, nr, nr32},
    file, kernel,
    maps::{self, SCRATCH, SCRATCH_ENTER, SCRATCH_EXIT, Scratch, count},
    path, task, write,
};

/// `TS_COMPAT` (`arch/x86/include/asm/thread_info.h`)
const TS_COMPAT: u32 = 2;
/// `__X32_SYSCALL_BIT` (`arch/x86/include/uapi/asm/unistd.h`)
const X32: u64 = 0x4000_0000;

const O_CREAT: u32 = 0o100;
const O_TRUNC: u32 = 0o1_000;
const O_DSYNC: u32 = 0o10_000;
const O_DIRECT: u32 = 0o40_000;
const O_SYNC: u32 = 0o4_010_000;
/// `__O_TMPFILE`, without the directory bit.
const O_TMPFILE: u32 = 0o20_000_000;

/// `include/uapi/linux/fs.h`
const RENAME_WHITEOUT: u64 = 4;

/// `include/linux/fs.h`
const FMODE_WRITE: u32 = 2;
const FMODE_CREATED: u32 = 0x10_0000;

/// `MAP_SHARED`, `MAP_SHARED_VALIDATE` and the mask of the type.
const MAP_TYPE: u64 = 0xf;
const MAP_SHARED: u64 = 1;
const MAP_SHARED_VALIDATE: u64 = 3;

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

/// Type of the ioctls of loop devices (`include/uapi/linux/loop.h`).
const LOOP: u32 = 0x4c;
const LOOP_SET_FD: u32 = 0x4c00;
const LOOP_CHANGE_FD: u32 = 0x4c06;
const LOOP_CONFIGURE: u32 = 0x4c0a;

/// Type and number of ioctls that change another file than that of the descriptor as well:
/// EXT4_IOC_MOVE_EXT, XFS_IOC_SWAPEXT, ATTRMULTI_BY_HANDLE, EXCHANGE_RANGE, COMMIT_RANGE.
const OF_OTHERS: [u32; 5] = [0x660f, 0x586d, 0x587b, 0x5881, 0x5883];

/// `include/linux/errno.h`: the call is going to be restarted.
const RESTART: core::ops::RangeInclusive<i64> = -516..=-512;

/// Registers in a `struct pt_regs`, in words.
mod reg {
    pub const BP: usize = 4;
    pub const BX: usize = 5;
    pub const R10: usize = 7;
    pub const R9: usize = 8;
    pub const R8: usize = 9;
    pub const CX: usize = 11;
    pub const DX: usize = 12;
    pub const SI: usize = 13;
    pub const DI: usize = 14;
    pub const ORIG_AX: usize = 15;
}

#[inline(always)]
fn register(regs: *const u64, index: usize) -> u64 {
    // Note the order: r9 stands below r8 in the struct.
    // SAFETY: the verifier knows the pointer as a struct pt_regs.
    unsafe { regs.add(index).read_volatile() }
}

/// The descriptor of a call that is followed by descriptor.
#[inline(always)]
fn descriptor(number: u32, state: &TaskState) -> u32 {
    (match number {
        nr::SPLICE | nr::COPY_FILE_RANGE => state.args[2],
        nr::MMAP => state.args[4],
        _ => state.args[0],
    }) as u32
}

/// [`class`] of a call.
#[inline(always)]
fn class_of(number: u64) -> u8 {
    if number < CALLS as u64 { CLASS[number as usize & (CALLS - 1)] } else { class::NONE }
}

/// A number as the 64-bit table has it; [`CALLS`] or more where it has none that is followed.
#[inline(always)]
fn number_of(number: u64) -> u64 {
    if kernel::task_status() & TS_COMPAT == 0 {
        return number;
    }
    let like = if number < CALLS as u64 { COMPAT[number as usize & (CALLS - 1)] } else { 0 };
    if like == 0 { CALLS as u64 } else { u64::from(like) }
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
        nr32::PWRITE64 | nr32::PWRITEV | nr32::PWRITEV2 => state.args[3] |= state.args[4] << 32,
        nr32::TRUNCATE64 | nr32::FTRUNCATE64 => state.args[1] |= state.args[2] << 32,
        _ => {}
    }
}

/// Whether a call may matter at its start, if its task is followed.
#[inline(always)]
pub fn starts(number: u64) -> bool {
    match class_of(number) {
        class::NONE => number & X32 != 0,
        class::MAYBE_COMPAT => kernel::task_status() & TS_COMPAT != 0,
        _ => true,
    }
}

/// Notes that a process stores into the memory of another one; before the selection, because anybody may.
#[inline(always)]
pub fn note_foreign_store(number: u64) {
    if class_of(number) == class::FOREIGN_STORE || number == 0x4000_021c {
        // SAFETY: a word that only ever goes from 0 to 1.
        unsafe { core::ptr::write_volatile(&raw mut maps::FOREIGN_STORES, 1) };
    }
}

/// Whether a call may matter at its end, if its task is followed.
#[inline(always)]
pub fn ends(regs: *const u64) -> bool {
    let number = register(regs, reg::ORIG_AX);
    // What is harmless in the one table is so in the other.
    class_of(number) != class::NONE
        && !matches!(
            class_of(number_of(number)),
            class::NONE | class::MEMORY | class::MAYBE_COMPAT | class::FOREIGN_STORE
        )
}

/// The start of a call of a followed task.
#[inline(always)]
pub fn enter(state: &mut TaskState, regs: *const u64, number: u64, pid_tgid: u64) {
    let compat = kernel::task_status() & TS_COMPAT != 0;
    let given = number;
    let number = number_of(number);
    if compat || number & X32 != 0 {
        count(counter::COMPAT);
        state.private_start = 0;
        state.private_end = 0;
        if number == u64::from(SPECIAL) || !compat {
            task::emit(kind::COMPAT, given as u32, pid_tgid as u32, (pid_tgid >> 32) as u32, given, 0);
            return;
        }
    }
    if number >= CALLS as u64 {
        return;
    }
    let class = CLASS[number as usize & (CALLS - 1)];
    if matches!(class, class::NONE | class::MAYBE_COMPAT | class::FOREIGN_STORE) {
        return;
    }
    if class == class::MEMORY {
        state.private_start = 0;
        state.private_end = 0;
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
    let follow = match class {
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
        _ => enter_file(state, number, class),
    };
    if !follow {
        return;
    }
    // SAFETY: the task's own slot.
    unsafe {
        core::ptr::write_volatile(&raw mut state.active, 1);
        // A locked instruction, so that the store is visible to every CPU before the time is taken:
        // whoever reads a later time, and then `active`, sees the call (no membarrier needed).
        // (`core` has no such operation for this target.)
        core::arch::asm!(
            "lock *(u64 *)({start} + 0) += {one}",
            start = in(reg) &raw mut state.start_ns,
            one = in(reg) 1u64,
        );
        compiler_fence(Ordering::SeqCst);
        core::ptr::write_volatile(&raw mut state.start_ns, bpf_ktime_get_ns());
    }
    if state.file == 0 && (class == class::PATH || class == class::OPEN) && kernel::paths_are_shared() {
        enter_path(state, number, pid_tgid);
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
fn is_among(value: u32, list: &[u32]) -> bool {
    let mut i = 0;
    while i < list.len() {
        if list[i] == value {
            return true;
        }
        i += 1;
    }
    false
}

/// Flags of an open, `None` where they cannot be read.
#[inline(always)]
fn open_flags(state: &TaskState, number: u32) -> u32 {
    match number {
        nr::OPEN => state.args[1] as u32,
        nr::CREAT => O_CREAT | O_TRUNC,
        nr::OPENAT2 => {
            let mut flags = 0u64;
            // SAFETY: the first member of struct open_how.
            let read = unsafe { bpf_probe_read_user((&raw mut flags).cast(), 8, state.args[2] as *const _) };
            // Not readable: as if it could change something.
            if read < 0 { O_CREAT | O_TRUNC } else { flags as u32 }
        }
        _ => state.args[2] as u32,
    }
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
    let (address, table_shared) = kernel::file_of(descriptor(number, state));
    if address == 0 {
        return false;
    }
    let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_ENTER) else {
        return false;
    };
    // SAFETY: this CPU's entry of this hook.
    let scratch = unsafe { &mut *scratch };
    let file = kernel::read_file(scratch, address, table_shared);
    let writable = file.mode & FMODE_WRITE != 0;
    if (class == class::CLOSE || class == class::MMAP || class == class::SEEK) && !writable {
        return false;
    }
    if class == class::SEEK && !file.shared {
        return false;
    }
    // The usual case: it goes on writing to the file of its last write. Whether it really is that file is
    // looked at when the call has ended; what an append needs of the inode is needed now.
    if class == class::WRITE
        && address == state.known_file
        && file.inode == state.inode_addr
        && !file.shared
        && file.flags & write::O_APPEND == 0
        && number != nr::PWRITEV2
    {
        state.file = address;
        state.pos = file.pos;
        state.flags |= slot::KNOWN;
        return true;
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
    let keep = kernel::object_is_file(scratch) && kernel::object_links(scratch) != 0 && !btrfs;
    state.known_file = if keep { address } else { 0 };
    state.known_sb = kernel::object_sb(scratch);
    state.inode_addr = file.inode;
    state.inode = kernel::object_id(scratch, dev);
    state.pos = file.pos;
    state.size = kernel::object_size(scratch);
    let mut flags = state.flags;
    if file.shared {
        flags |= slot::SHARED_FILE;
    }
    if file.flags & write::O_APPEND != 0 {
        flags |= slot::APPEND;
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

/// The end of a call of a followed task; gives its number.
#[inline(always)]
pub fn exit(state: &mut TaskState, regs: *const u64, ret: i64, pid_tgid: u64) -> u64 {
    let number = number_of(register(regs, reg::ORIG_AX));
    if number >= CALLS as u64 {
        return number;
    }
    let class = CLASS[number as usize & (CALLS - 1)];
    if matches!(class, class::NONE | class::MEMORY | class::MAYBE_COMPAT | class::FOREIGN_STORE) {
        return number;
    }
    if state.nr != number as u32 {
        count(counter::NO_ENTER);
        return number;
    }
    if state.active != 0 {
        if !RESTART.contains(&ret) {
            if let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_EXIT) {
                // SAFETY: this CPU's entry of this hook.
                record(state, number as u32, class, ret, pid_tgid, unsafe { &mut *scratch });
            }
        }
        // SAFETY: the task's own slot.
        unsafe {
            core::ptr::write_volatile(&raw mut state.start_ns, 0);
            compiler_fence(Ordering::SeqCst);
            core::ptr::write_volatile(&raw mut state.active, 0);
        }
    }
    state.nr = NO_CALL;
    number
}

/// Makes the record of a call that ended.
#[inline(always)]
fn record(state: &mut TaskState, number: u32, class: u8, ret: i64, pid_tgid: u64, scratch: &mut Scratch) {
    // SAFETY: a helper without arguments.
    let end_ns = unsafe { bpf_ktime_get_ns() };
    let by_descriptor = state.file != 0;
    let failed = ret < 0;
    if class == class::PATH && !by_descriptor {
        if !failed || path_may_have_changed(state, number, ret) {
            let flags = if failed { flag::FAILED } else { 0 };
            exit_path(state, number, flags, end_ns, ret, pid_tgid, scratch);
        }
        return;
    }
    if state.flags & slot::KNOWN != 0 && !is_known(state, scratch) {
        return;
    }
    if class == class::WRITE && ret > 0 && record_write(state, number, ret, end_ns, pid_tgid, scratch) {
        return;
    }
    let opened = class == class::OPEN;
    if opened && failed {
        if number != nr::OPEN_BY_HANDLE_AT && open_may_have_changed(ret) {
            exit_path(state, number, flag::FAILED, end_ns, ret, pid_tgid, scratch);
        }
        return;
    }
    let mut kind = kind::FILE;
    let mut flags = 0;
    if failed {
        match class {
            class::WRITE | class::COPY | class::IOCTL | class::DESCRIPTOR => {
                if !failure_may_have_changed(number, class, ret) {
                    return;
                }
            }
            class::CLOSE => {}
            _ => return,
        }
        if class != class::CLOSE {
            kind = kind::TOUCH;
            flags = flag::FAILED;
        }
    } else if (class == class::WRITE || class == class::COPY) && ret == 0 {
        return;
    }
    begin(scratch, state, ret, end_ns, number, pid_tgid);
    if class == class::CLOSE {
        // The file may be gone, and with it the inode: only an inode that is still the same counts.
        kernel::read_inode(scratch, state.inode_addr);
        let id = kernel::object_id(scratch, state.inode.dev);
        if state.flags & slot::SHARED_FILE != 0 {
            flags |= flag::SHARED_FILE;
        }
        if id == state.inode {
            kernel::object_attr(scratch, id.dev);
            if kernel::object_links(scratch) == 0 {
                flags |= flag::UNLINKED;
            }
        }
        send(scratch, kind, flags);
        return;
    }
    // What only this task has open nobody can have closed in mid-call.
    let (address, table_shared) = if !opened && state.flags & slot::SHARED_FILE == 0 {
        (state.file, false)
    } else {
        kernel::file_of(if opened { ret as u32 } else { descriptor(number, state) })
    };
    if address == 0 || (!opened && address != state.file) {
        if opened {
            // Closed again by another thread before we could look.
            exit_path(state, number, flag::FAILED, end_ns, ret, pid_tgid, scratch);
            return;
        }
        // The descriptor was replaced in mid-call; the object is known, the rest is not.
        send(scratch, kind::TOUCH, flags | flag::BY_REFERENCE | flag::OFFSET_UNKNOWN);
        return;
    }
    let file = kernel::read_file(scratch, address, table_shared);
    if failed
        && class == class::WRITE
        && file.flags & (O_SYNC | O_DSYNC | O_DIRECT) == 0
        && !write_may_have_begun(ret)
    {
        return;
    }
    kernel::read_inode(scratch, file.inode);
    let mut dev = state.inode.dev;
    let mut btrfs = state.flags & slot::BTRFS != 0;
    if opened {
        (dev, btrfs) = kernel::object_device(scratch, file.inode);
        if !kernel::object_is_file(scratch) || !kernel::in_scope(dev) {
            return;
        }
        if file.mode & FMODE_CREATED != 0 {
            flags |= flag::CREATED;
        } else if open_flags(state, number) & O_TRUNC != 0 {
            flags |= flag::TRUNCATED;
        } else {
            // It was there, and is as it was.
            return;
        }
    }
    // Without a name all the time: it is in nobody's tree, and if it gets one, all of it is read.
    if state.flags & slot::NAMELESS != 0 && kernel::object_links(scratch) == 0 && class != class::MMAP {
        return;
    }
    kernel::object_attr(scratch, dev);
    scratch.file_record.event.file = address;
    scratch.file_record.event.f_flags = file.flags;
    scratch.file_record.event.f_mode = file.mode;
    if file.shared || state.flags & slot::SHARED_FILE != 0 {
        flags |= flag::SHARED_FILE;
    }
    if scratch.file_record.event.attr.nlink == 0 {
        flags |= flag::UNLINKED;
    }
    if class == class::WRITE && !kernel::object_is_file(scratch) {
        send(scratch, kind::FILE, flags);
        return;
    }
    if class == class::WRITE && !failed {
        written(scratch, state, &file, flags);
        return;
    }
    let event = &mut scratch.file_record.event;
    match class {
        class::DESCRIPTOR if number == nr::FTRUNCATE => event.file_offset = state.args[1],
        class::DESCRIPTOR if number == nr::FALLOCATE => {
            kind = kind::TOUCH;
            event.file_offset = state.args[2];
            event.count = state.args[3];
        }
        class::COPY => {
            kind = kind::TOUCH;
            if !failed {
                event.count = ret as u64;
            }
        }
        class::IOCTL => {
            kind = kind::TOUCH;
            if state.args[1] as u32 >> 8 == LOOP {
                kind = kind::MAPPED;
            }
            // It may have changed the generation, by which the object is known.
            event.attr.id = state.inode;
            if is_among(state.args[1] as u32 & 0xffff, &OF_OTHERS) {
                count(counter::RESCAN);
            }
        }
        class::MMAP => {
            kind = kind::MAPPED;
            event.file_offset = state.args[5];
            event.count = state.args[1];
        }
        _ => {}
    }
    let name = kernel::read_dentry(scratch, file.dentry);
    if name.parent != 0 {
        kernel::read_parent(scratch, name.parent);
        kernel::parent_attr(scratch, kernel::parent_device_like(name.parent, dev, btrfs));
        file::name(scratch, name.address, name.len);
    }
    send(scratch, kind, flags);
}

/// Whether the call was on a file in scope, where its start only took it for the one of the call before;
/// finds out which one it was. The inode is in the scratch then.
#[inline(always)]
fn is_known(state: &mut TaskState, scratch: &mut Scratch) -> bool {
    kernel::read_inode(scratch, state.inode_addr);
    if kernel::object_sb(scratch) == state.known_sb
        && kernel::object_id(scratch, state.inode.dev) == state.inode
    {
        return true;
    }
    // Another file at the same address.
    state.known_file = 0;
    let (dev, btrfs) = kernel::object_device(scratch, state.inode_addr);
    state.inode = kernel::object_id(scratch, dev);
    if btrfs {
        state.flags |= slot::BTRFS;
    }
    kernel::in_scope(dev)
}

/// Makes the record of a write to a file that nobody else has open through this description: the call that
/// counts. `false`: it is not of that kind.
#[inline(always)]
fn record_write(
    state: &mut TaskState,
    number: u32,
    ret: i64,
    end_ns: u64,
    pid_tgid: u64,
    scratch: &mut Scratch,
) -> bool {
    if state.flags & slot::SHARED_FILE != 0 {
        return false;
    }
    // What only this task has open nobody can have closed in mid-call.
    let file = kernel::read_file(scratch, state.file, false);
    if file.shared {
        return false;
    }
    if state.flags & slot::KNOWN == 0 {
        kernel::read_inode(scratch, file.inode);
    }
    if !kernel::object_is_file(scratch) || kernel::object_links(scratch) == 0 {
        return false;
    }
    scratch.data_len = 0;
    kernel::object_attr(scratch, state.inode.dev);
    let event = &mut scratch.file_record.event;
    event.header = file::header(kind::FILE, 0, number, state.start_ns, end_ns, ret, pid_tgid);
    event.range_start = 0;
    event.range_end = 0;
    written(scratch, state, &file, 0);
    true
}

/// Where a write landed, and its bytes. Without the name and the directory: the file is known since its open.
#[inline(always)]
fn written(scratch: &mut Scratch, state: &mut TaskState, file: &kernel::File, flags: u16) {
    let flags = write::place(scratch, state, file, flags);
    let event = &mut scratch.file_record.event;
    if flags & flag::OFFSET_UNKNOWN == 0 {
        event.header.flags = flags;
        write::data(scratch, state);
        file::emit_write(scratch);
        return;
    }
    event.header.flags = flags | flag::BY_REFERENCE;
    event.parent = file::NO_ATTR;
    event.file = state.file;
    event.f_flags = file.flags;
    event.f_mode = file.mode;
    event.file_offset = 0;
    event.name_len = 0;
    event.data_len = 0;
    count(counter::BY_REFERENCE);
    file::emit(scratch);
}

/// Begins the record of a call on a descriptor: what is known from its start.
#[inline(always)]
fn begin(scratch: &mut Scratch, state: &TaskState, ret: i64, end_ns: u64, number: u32, pid_tgid: u64) {
    scratch.data_len = 0;
    scratch.file_record.event = FileEvent {
        header: file::header(kind::FILE, 0, number, state.start_ns, end_ns, ret, pid_tgid),
        attr: InodeAttr { id: state.inode, ..file::NO_ATTR },
        parent: file::NO_ATTR,
        file: state.file,
        file_offset: 0,
        count: 0,
        range_start: 0,
        range_end: 0,
        f_flags: 0,
        f_mode: 0,
        name_len: 0,
        data_len: 0,
    };
}

/// Sends the record of a call on a descriptor.
#[inline(always)]
fn send(scratch: &mut Scratch, kind: u16, flags: u16) {
    scratch.file_record.event.header.kind = kind;
    scratch.file_record.event.header.flags = flags;
    file::emit(scratch);
}

#[inline(always)]
fn exit_path(
    state: &TaskState,
    number: u32,
    flags: u16,
    end_ns: u64,
    ret: i64,
    pid_tgid: u64,
    scratch: &mut Scratch,
) {
    let mut flags = flags;
    if state.flags & slot::PATH_SHARED != 0 || kernel::paths_are_shared() {
        flags |= flag::PATH_SHARED;
    }
    path::emit(scratch, state, kind::PATH, flags, number, end_ns, ret, pid_tgid);
}

/// Whether an open that failed may have created or truncated before. The errors left out come
/// before anything is done: ENOENT, EBADF, EFAULT, EEXIST, ENOTDIR, EISDIR, ENFILE, EMFILE, EROFS.
#[inline(always)]
fn open_may_have_changed(ret: i64) -> bool {
    !matches!(ret, -2 | -9 | -14 | -17 | -20 | -21 | -23 | -24 | -30)
}

/// Whether a call with paths that failed may have left an effect: the disk failed or was full in the
/// middle (EIO, ENOSPC, EDQUOT), or a whiteout was made and taken back, which moves the directory's time.
#[inline(always)]
fn path_may_have_changed(state: &TaskState, number: u32, ret: i64) -> bool {
    matches!(ret, -5 | -28 | -122) || number == nr::RENAMEAT2 && state.args[4] & RENAME_WHITEOUT != 0
}

/// Whether a write that failed may have come beyond the checks: the times are set, setuid and the file
/// capability dropped before the first byte is copied (`file_modified()` in `generic_file_write_iter()`
/// and its like). EIO, ENOMEM, EFAULT, ENOSPC, EDQUOT.
#[inline(always)]
fn write_may_have_begun(ret: i64) -> bool {
    matches!(ret, -5 | -12 | -14 | -28 | -122)
}

/// Whether a call on a descriptor that failed may have left an effect; for writes it depends on
/// the flags too. EBADF, EXDEV, EINVAL-like refusals come first: EBADF, EXDEV, ENOTTY, EOPNOTSUPP.
#[inline(always)]
fn failure_may_have_changed(number: u32, class: u8, ret: i64) -> bool {
    // ext4 sets the times of a file without extents before it says that it cannot (ext4_fallocate()).
    if matches!(ret, -9 | -18 | -25) || ret == -95 && number != nr::FALLOCATE {
        return false;
    }
    match class {
        class::WRITE => true,
        class::DESCRIPTOR => number == nr::FALLOCATE,
        class::COPY => number == nr::COPY_FILE_RANGE,
        _ => true,
    }
}
