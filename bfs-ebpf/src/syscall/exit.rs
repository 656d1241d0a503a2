//! The end of a call: its record.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use bfs_common::abi::{FileEvent, InodeAttr, NO_CALL, TaskState, counter, ending, flag, kind, slot};

use super::{LOOP, O_TRUNC, descriptor, failed, is_among, open_flags};
use crate::{
    aio,
    calls::{CALLS, CLASS, class, nr},
    file, kernel,
    maps::{SCRATCH, SCRATCH_EXIT, Scratch, count},
    path, run, task, write,
};

const O_DSYNC: u32 = 0o10_000;
const O_DIRECT: u32 = 0o40_000;
const O_SYNC: u32 = 0o4_010_000;

/// `include/linux/fs.h`
const FMODE_CREATED: u32 = 0x10_0000;

/// Type and number of ioctls that change another file than that of the descriptor as well:
/// EXT4_IOC_MOVE_EXT, XFS_IOC_SWAPEXT, ATTRMULTI_BY_HANDLE, EXCHANGE_RANGE, COMMIT_RANGE.
const OF_OTHERS: [u32; 5] = [0x660f, 0x586d, 0x587b, 0x5881, 0x5883];

/// `include/linux/errno.h`: the call is going to be restarted.
const RESTART: core::ops::RangeInclusive<i64> = -516..=-512;

/// The end of a call of a followed task that may matter.
#[inline(always)]
pub fn exit(state: &mut TaskState, number: u32, ret: i64, task: *const u8) {
    let class = CLASS[number as usize & (CALLS - 1)];
    if state.nr != number {
        count(counter::NO_ENTER);
        return;
    }
    if state.active != 0 {
        if !RESTART.contains(&ret) {
            if let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_EXIT) {
                // SAFETY: this CPU's entry of this hook.
                record(state, number, class, ret, task, unsafe { &mut *scratch });
            }
        }
        task::end_call(state);
    }
    state.nr = NO_CALL;
}

/// Makes the record of a call that ended.
#[inline(always)]
fn record(state: &mut TaskState, number: u32, class: u8, ret: i64, task: *const u8, scratch: &mut Scratch) {
    let pid_tgid = kernel::pid_tgid(task);
    if state.flags & slot::KNOWN != 0 && go_on(state, number, ret, task, scratch) {
        return;
    }
    let end_ns = now();
    let by_descriptor = state.file != 0;
    let failed = ret < 0;
    if class == class::AIO {
        aio::exit(scratch, state, ret, pid_tgid);
        return;
    }
    if class == class::PATH && !by_descriptor {
        if !failed || failed::path(state, number, ret) {
            let flags = if failed { flag::FAILED } else { 0 };
            exit_path(state, number, flags, end_ns, ret, pid_tgid, scratch);
        }
        return;
    }
    if class == class::WRITE && ret > 0 && record_write(state, number, ret, end_ns, pid_tgid, scratch) {
        return;
    }
    let opened = class == class::OPEN;
    if opened && failed {
        if number != nr::OPEN_BY_HANDLE_AT && failed::open(ret) {
            exit_path(state, number, flag::FAILED, end_ns, ret, pid_tgid, scratch);
        }
        return;
    }
    let mut kind = kind::FILE;
    let mut flags = 0;
    if failed {
        match class {
            class::WRITE | class::COPY | class::IOCTL | class::DESCRIPTOR => {
                if !failed::descriptor(number, class, ret) {
                    return;
                }
            }
            class::CLOSE => {}
            // It may have come half way.
            class::ADVICE => {}
            _ => return,
        }
        if class != class::CLOSE {
            kind = kind::TOUCH;
            flags = flag::FAILED;
        }
    } else if (class == class::WRITE || class == class::COPY) && ret == 0 {
        return;
    }
    if class == class::ADVICE && !by_descriptor {
        let (tid, tgid) = (pid_tgid as u32, (pid_tgid >> 32) as u32);
        task::emit_ended(state.start_ns, number, tid, tgid, ret, ending::UNKNOWN);
        return;
    }
    begin(scratch, state, ret, end_ns, number, pid_tgid);
    if class == class::CLOSE || class == class::ADVICE {
        if class == class::ADVICE {
            kind = kind::TOUCH;
        }
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
        && !failed::write(ret)
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
    // What is changed by descriptor is known since its open.
    let name = if opened { kernel::read_dentry(scratch, file.dentry) } else { kernel::Name::NONE };
    if name.parent != 0 {
        kernel::read_parent(scratch, name.parent);
        kernel::parent_attr(scratch, kernel::parent_device_like(name.parent, dev, btrfs));
        file::name(scratch, name.address, name.len);
    }
    send(scratch, kind, flags);
}

/// The end of a write that goes on in a known file. `true`: it has its record, or needs none; `false`: it is
/// for the common way, with what its start left open filled in.
#[inline(always)]
fn go_on(state: &mut TaskState, number: u32, ret: i64, task: *const u8, scratch: &mut Scratch) -> bool {
    let pid_tgid = kernel::pid_tgid(task);
    let file = kernel::look(task, state.known_fd, scratch);
    let appends = file.flags & write::O_APPEND != 0;
    let same = file.address == state.known_file
        && appends == (state.known_flags & slot::APPEND != 0)
        && !kernel::descriptors_were_taken();
    let written = ret as u64;
    let positioned = number != nr::WRITE && number != nr::WRITEV;
    let offset = if positioned { state.args[3] } else { file.pos.wrapping_sub(written) };
    if same && ret > 0 && !file.shared && run::join(state, offset, written, pid_tgid as u32) {
        return true;
    }
    run::end(state, pid_tgid as u32);
    kernel::read_inode(scratch, file.inode);
    if !same
        || kernel::object_sb(scratch) != state.known_sb
        || kernel::object_id(scratch, state.inode.dev) != state.inode
        || !kernel::object_is_file(scratch)
    {
        return lost_sight(state, file.address, file.inode, scratch);
    }
    if ret <= 0 || kernel::object_links(scratch) == 0 || file.shared {
        // A call that failed, or whose file has lost its name; or somebody else looks at it just now
        // (/proc/PID/fdinfo).
        state.pos = offset;
        state.known_file = 0;
        return false;
    }
    let goes_on = offset == state.known_end;
    state.known_end = offset.wrapping_add(written);
    let mut flags = if appends { flag::APPEND } else { 0 };
    // What follows the bytes before it is seldom written again soon: without a copy it costs least.
    if !goes_on {
        kernel::object_attr(scratch, state.inode.dev);
        let event = &mut scratch.file_record.event;
        event.header = file::header(kind::FILE, flags, number, state.start_ns, now(), ret, pid_tgid);
        event.file_offset = offset;
        scratch.data_len = 0;
        write::data(scratch, state);
        file::emit_write(scratch);
        return true;
    }
    flags |= flag::BY_REFERENCE;
    let header = file::header(kind::WRITE, flags, number, state.start_ns, now(), ret, pid_tgid);
    file::emit_bare_write(scratch, header, state.inode.dev, offset);
    true
}

/// What the descriptor stands for was changed behind the task's back: the file is the one that it stands for
/// now, and where in it is not known.
#[inline(always)]
fn lost_sight(state: &mut TaskState, address: u64, inode: u64, scratch: &mut Scratch) -> bool {
    state.known_file = 0;
    if address == 0 {
        count(counter::RESCAN);
        return true;
    }
    state.file = address;
    state.inode_addr = inode;
    state.pos = u64::MAX;
    let (dev, btrfs) = kernel::object_device(scratch, inode);
    state.inode = kernel::object_id(scratch, dev);
    if btrfs {
        state.flags |= slot::BTRFS;
    }
    !kernel::in_scope(dev)
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
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
    kernel::read_inode(scratch, file.inode);
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
    let event = &scratch.file_record.event;
    state.known_end = event.file_offset.wrapping_add(event.count);
    true
}

/// Where a write landed, and its bytes. Without the name and the directory: the file is known since its open.
#[inline(always)]
fn written(scratch: &mut Scratch, state: &mut TaskState, file: &kernel::File, flags: u16) {
    let flags = write::place(scratch, state, file, flags);
    let event = &mut scratch.file_record.event;
    if flags & flag::OFFSET_UNKNOWN == 0 {
        event.header.flags = flags;
        file::stamp(&mut event.header);
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
