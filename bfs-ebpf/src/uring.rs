//! io_uring: which rings are followed, and the two ends of every operation that can change a file.
//!
//! A ring is followed when a followed task made it or submits through it. At submission an operation
//! gets an entry in `REQUESTS`, stamped after it stands there, as calls are in `TASKS`; at completion
//! its record goes into the ring before the entry goes. Operations on a file are read by reference:
//! which file it was is certain only at the end. Paths are sent at the beginning, when the kernel has
//! its own copy of the strings, and count when `ENDED` comes.
//!
//! Some operations end without a word (`IOSQE_CQE_SKIP_SUCCESS`, completions that found no room).
//! Their entry stays until the same `struct io_kiocb` is used again or the agent sees that nobody is
//! left who could carry it out; until then the agent reads what they name in a stop.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid,
    generated::{bpf_ktime_get_ns, bpf_probe_read_kernel},
};
use bfs_common::abi::{
    EventHeader, FileEvent, InodeAttr, InodeId, Request, counter, ending, flag, kind, request,
};

use crate::{
    file::{self, NO_ATTR},
    kernel::{self, at, read},
    maps::{
        REQUEST_BLOCK, REQUESTS, RINGS, SCRATCH, SCRATCH_COMPLETE, SCRATCH_SUBMIT, Scratch, TASKS, count,
        off, rescan,
    },
    syscall::{O_CREAT, O_TMPFILE, O_TRUNC, failed},
    task,
    uring_path::{bases, begun, makes_socket},
    write,
};

/// How an operation is treated.
mod class {
    /// Changes no file.
    pub const NONE: u8 = 0;
    /// Writes a range.
    pub const WRITE: u8 = 1;
    /// Writes a range that another descriptor is read for.
    pub const SPLICE: u8 = 2;
    /// Changes the file in another way.
    pub const FILE: u8 = 3;
    /// Opens, and may create or truncate.
    pub const OPEN: u8 = 4;
    /// Takes one or two paths.
    pub const PATH: u8 = 5;
    /// `madvise`: two sorts of advice change files.
    pub const MADVISE: u8 = 6;
    /// Not known to this version.
    pub const UNKNOWN: u8 = 7;
}

/// `enum io_uring_op` (`include/uapi/linux/io_uring.h`), what is looked at one by one.
pub mod op {
    pub const WRITEV: u32 = 2;
    pub const FALLOCATE: u32 = 17;
    pub const OPENAT: u32 = 18;
    pub const OPENAT2: u32 = 28;
    pub const RENAMEAT: u32 = 35;
    pub const UNLINKAT: u32 = 36;
    pub const MKDIRAT: u32 = 37;
    pub const SYMLINKAT: u32 = 38;
    pub const LINKAT: u32 = 39;
    pub const BIND: u32 = 56;
    pub const WRITEV_FIXED: u32 = 61;
    /// The last one that is known.
    pub const LAST: u32 = 64;
}

/// [`class`] by operation.
static CLASS: [u8; 128] = classes();

const fn classes() -> [u8; 128] {
    let mut table = [class::UNKNOWN; 128];
    let mut i = 0;
    while i <= op::LAST as usize {
        table[i] = match i {
            // WRITEV WRITE_FIXED WRITE WRITEV_FIXED
            2 | 5 | 23 | 61 => class::WRITE,
            30 => class::SPLICE,
            // FALLOCATE FSETXATTR URING_CMD FTRUNCATE URING_CMD128
            17 | 41 | 46 | 55 | 64 => class::FILE,
            18 | 28 => class::OPEN,
            // RENAMEAT UNLINKAT MKDIRAT SYMLINKAT LINKAT SETXATTR BIND
            35..=39 | 42 | 56 => class::PATH,
            25 => class::MADVISE,
            _ => class::NONE,
        };
        i += 1;
    }
    table
}

/// The system call that does the same.
#[inline(always)]
fn call_of(opcode: u32) -> u32 {
    match opcode {
        op::OPENAT => 257,
        op::OPENAT2 => 437,
        op::RENAMEAT => 316,
        op::UNLINKAT => 263,
        op::MKDIRAT => 258,
        op::SYMLINKAT => 266,
        op::LINKAT => 265,
        op::BIND => 49,
        op::FALLOCATE => 285,
        _ => 188,
    }
}

/// `pwrite64`: what a write that is read by reference is called.
const NR_PWRITE: u32 = 18;

/// Bits of `req->flags` that are those of the submission (`io_uring_types.h`).
const FIXED_FILE: u32 = 1 << 0;
/// `IO_DRAIN`, `IO_LINK`, `IO_HARDLINK`, `FORCE_ASYNC`: it is not carried out at once.
const LATER: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4;
const CQE_SKIP: u32 = 1 << 6;

/// Low bits of an entry in the table of fixed files (`io_uring/filetable.h`).
const FILE_FLAGS: u64 = 7;

/// `MADV_REMOVE`, `MADV_POPULATE_WRITE`
const MADV_REMOVE: u32 = 9;
const MADV_POPULATE_WRITE: u32 = 23;

/// `include/uapi/linux/fs.h`
const RWF_APPEND: u32 = 0x10;
const RWF_NOAPPEND: u32 = 0x20;

/// `io_uring_create(fd, ctx, ...)`
#[inline(always)]
pub fn create(ring: u64) {
    let pid_tgid = bpf_get_current_pid_tgid();
    if TASKS.get_ptr(pid_tgid as u32).is_some() {
        follow(ring, (pid_tgid >> 32) as u32);
    } else {
        // The memory may have been that of a followed ring.
        let _ = RINGS.remove(ring);
    }
}

#[inline(always)]
fn follow(ring: u64, tgid: u32) {
    if RINGS.insert(ring, tgid, 0).is_err() {
        count(counter::REQUESTS_FULL);
    }
}

/// Whether a ring is followed; one that a followed task submits through is from now on.
#[inline(always)]
fn is_followed(ring: u64, pid_tgid: u64) -> bool {
    if RINGS.get_ptr(ring).is_some() {
        return true;
    }
    if TASKS.get_ptr(pid_tgid as u32).is_none() {
        return false;
    }
    follow(ring, (pid_tgid >> 32) as u32);
    true
}

#[inline(always)]
fn class_of(opcode: u32) -> u8 {
    if opcode < 128 { CLASS[opcode as usize & 127] } else { class::UNKNOWN }
}

/// An operation of the current task, which may change all of a file as long as no more is known of it.
#[inline(always)]
fn whole_file(pid_tgid: u64, id: u32, opcode: u32) -> Request {
    Request {
        start_ns: 0,
        inode_addr: 0,
        inode: InodeId::NONE,
        offset: 0,
        end: u64::MAX,
        size: 0,
        tid: pid_tgid as u32,
        tgid: (pid_tgid >> 32) as u32,
        id,
        opcode,
        flags: 0,
        reserved: 0,
    }
}

/// Reads the request into the scratch; its opcode.
#[inline(always)]
fn read_request(scratch: &mut Scratch, req: u64) -> u32 {
    let block = scratch.request.as_mut_ptr();
    // SAFETY: the block is writable map memory of that size.
    unsafe { bpf_probe_read_kernel(block.cast(), REQUEST_BLOCK as u32, req as *const _) };
    u32::from(at::<u8>(block, off!(req_opcode)))
}

/// What distinguishes the records of an operation: its memory, folded.
#[inline(always)]
fn id_of(scratch: &mut Scratch, req: u64) -> u32 {
    // Out of a map it is a number to the verifier, not a pointer that cannot be computed with.
    let address = &raw mut scratch.address;
    // SAFETY: a field of the scratch.
    let req = unsafe {
        core::ptr::write_volatile(address, req);
        core::ptr::read_volatile(address)
    };
    0x8000_0000 | ((req >> 8) ^ (req >> 39)) as u32
}

/// `io_uring_submit_req(req)`: the operation is prepared and not begun.
#[inline(always)]
pub fn submit(req: u64) {
    let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_SUBMIT) else {
        return;
    };
    // SAFETY: this CPU's entry of this hook.
    let scratch = unsafe { &mut *scratch };
    let opcode = read_request(scratch, req);
    let ring: u64 = at(scratch.request.as_ptr(), off!(req_ctx));
    let pid_tgid = bpf_get_current_pid_tgid();
    if !is_followed(ring, pid_tgid) {
        return;
    }
    // The memory is used again: what it was before has ended, without a word.
    end(scratch, req, 0, 0, ending::DONE, false);
    let class = class_of(opcode);
    let block = scratch.request.as_ptr();
    let matters = match class {
        class::NONE => false,
        class::OPEN => opens(block),
        class::MADVISE => {
            let advice: u32 = at(block, off!(madvise_advice));
            advice == MADV_REMOVE || advice == MADV_POPULATE_WRITE
        }
        class::PATH => opcode != op::BIND || makes_socket(block),
        _ => true,
    };
    if !matters {
        return;
    }
    let flags: u32 = at(block, off!(req_flags));
    let id = id_of(scratch, req);
    scratch.entry = whole_file(pid_tgid, id, opcode);
    let entry = &mut scratch.entry;
    if flags & CQE_SKIP != 0 {
        entry.flags = request::SILENT;
    }
    if !on_file(class) {
        entry.flags |= request::PATH;
    } else if !resolve(scratch, class, flags, ring) {
        return;
    }
    // First the counter: whoever sees that it stands still need not look for entries.
    count(counter::ASYNC);
    if REQUESTS.insert(req, scratch.entry, 0).is_err() {
        count(counter::REQUESTS_FULL);
        return;
    }
    let Some(entry) = REQUESTS.get_ptr_mut(req) else {
        return;
    };
    // SAFETY: the entry of a request that only this task knows. The insertion took a lock, so it is
    // visible to every CPU before the time is taken.
    let start_ns = unsafe {
        compiler_fence(Ordering::SeqCst);
        let now = bpf_ktime_get_ns();
        core::ptr::write_volatile(&raw mut (*entry).start_ns, now);
        now
    };
    if class == class::OPEN || class == class::PATH {
        scratch.path_record.event.header =
            header(kind::PATH_BEGUN, call_of(opcode), &scratch.entry, start_ns);
        begun(scratch);
        // SAFETY: as above.
        unsafe {
            (*entry).inode_addr = scratch.entry.inode_addr;
            (*entry).offset = scratch.entry.offset;
        }
    }
}

/// Whether the operations of a class change the file of their descriptor.
#[inline(always)]
fn on_file(class: u8) -> bool {
    class == class::WRITE || class == class::SPLICE || class == class::FILE
}

/// Whether an open may create or truncate.
#[inline(always)]
fn opens(block: *const u64) -> bool {
    at::<u32>(block, off!(open_flags)) & (O_CREAT | O_TRUNC | O_TMPFILE) != 0
}

#[inline(always)]
fn header(kind: u16, nr: u32, entry: &Request, start_ns: u64) -> EventHeader {
    EventHeader {
        len: 0,
        kind,
        flags: 0,
        start_ns,
        end_ns: start_ns,
        tid: entry.id,
        tgid: entry.tgid,
        nr,
        read_ns: 0,
        ret: 0,
    }
}

/// Finds the file of an operation as far as that is possible at its submission, and the range.
/// Whether it is followed.
#[inline(always)]
fn resolve(scratch: &mut Scratch, class: u8, flags: u32, ring: u64) -> bool {
    let opcode = scratch.entry.opcode;
    let block = scratch.request.as_ptr();
    let (mut bits, mut rwf) = (0, 0);
    let (mut offset, mut end) = (0u64, u64::MAX);
    if class == class::WRITE {
        rwf = at(block, off!(rw_flags));
        offset = at(block, off!(rw_pos));
        // The length of a vector is the number of its pieces.
        if opcode != op::WRITEV && opcode != op::WRITEV_FIXED {
            end = offset.wrapping_add(u64::from(at::<u32>(block, off!(rw_len))));
        }
    } else if class == class::SPLICE {
        offset = at(block, off!(splice_off_out));
        end = offset.wrapping_add(at::<u64>(block, off!(splice_len)));
    }
    if offset as i64 == -1 {
        bits = request::AT_POSITION;
        offset = 0;
        end = u64::MAX;
    }
    if rwf & RWF_APPEND != 0 {
        bits = request::APPEND;
    }
    scratch.entry.offset = offset;
    scratch.entry.end = if end < offset { u64::MAX } else { end };
    scratch.entry.flags |= bits;
    let fd: u32 = at(block, off!(req_fd));
    let address = if flags & FIXED_FILE != 0 { fixed_file(ring, fd) } else { kernel::file_of(fd).0 };
    // A chain may put another file there before it is this one's turn.
    let later = flags & LATER != 0 || read::<u64>(ring + off!(ring_link_head) as u64) != 0;
    if address == 0 {
        return later;
    }
    let file = kernel::read_file(scratch, address, true);
    kernel::read_inode(scratch, file.inode);
    let (dev, _) = kernel::object_device(scratch, file.inode);
    if !kernel::object_is_followed(scratch) || !kernel::in_scope(dev) {
        return later;
    }
    if file.flags & write::O_APPEND != 0 {
        bits = if rwf & RWF_NOAPPEND != 0 { request::AT_POSITION } else { request::APPEND };
        scratch.entry.flags |= bits;
    }
    if bits != 0 {
        scratch.entry.offset = 0;
        scratch.entry.end = u64::MAX;
    }
    scratch.entry.inode = kernel::object_id(scratch, dev);
    scratch.entry.inode_addr = file.inode;
    scratch.entry.size = kernel::object_size(scratch);
    true
}

/// The `struct file` in a ring's table of fixed files.
#[inline(always)]
fn fixed_file(ring: u64, index: u32) -> u64 {
    let count: u32 = read(ring + off!(ring_files_count) as u64);
    if index >= count {
        return 0;
    }
    let table: u64 = read(ring + off!(ring_files) as u64);
    let entry: u64 = read(table + u64::from(index) * 8);
    let file =
        if off!(ring_has_nodes) != 0 && entry != 0 { read(entry + off!(node_file) as u64) } else { entry };
    file & !FILE_FLAGS
}

/// `io_uring_complete(ctx, req, ...)` with a request.
#[inline(always)]
pub fn complete(ring: u64, req: u64, result: i32) {
    let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_COMPLETE) else {
        return;
    };
    // SAFETY: this CPU's entry of this hook.
    let scratch = unsafe { &mut *scratch };
    if REQUESTS.get_ptr(req).is_some() {
        read_request(scratch, req);
        let block = scratch.request.as_ptr();
        let file: u64 = at(block, off!(req_file));
        let opcode = u32::from(at::<u8>(block, off!(req_opcode)));
        let nothing = match class_of(opcode) {
            class::OPEN => result < 0 && !failed::open(i64::from(result)),
            class::PATH => result < 0,
            class::WRITE | class::SPLICE | class::FILE => file == 0,
            _ => false,
        };
        end(scratch, req, file, result, if nothing { ending::NOTHING } else { ending::DONE }, true);
        return;
    }
    // It was submitted before anybody followed it, or to a file that was none of ours.
    let opcode = u32::from(read::<u8>(req + off!(req_opcode) as u64));
    let class = class_of(opcode);
    if class == class::NONE || !is_followed(ring, bpf_get_current_pid_tgid()) {
        return;
    }
    read_request(scratch, req);
    if !on_file(class) {
        let block = scratch.request.as_ptr();
        if (class == class::PATH && opcode != op::BIND) || (class == class::OPEN && opens(block)) {
            rescan();
        }
        return;
    }
    let pid_tgid = bpf_get_current_pid_tgid();
    let id = id_of(scratch, req);
    scratch.entry = Request { start_ns: 1, flags: request::AT_POSITION, ..whole_file(pid_tgid, id, opcode) };
    let file: u64 = at(scratch.request.as_ptr(), off!(req_file));
    ended_file(scratch, file, result, true);
}

/// The entry of a request, if there is one, becomes a record and goes.
#[inline(always)]
fn end(scratch: &mut Scratch, req: u64, file: u64, result: i32, how: u64, told: bool) {
    let Some(entry) = REQUESTS.get_ptr(req) else {
        return;
    };
    // SAFETY: the entry of a request that is at its end, so nobody else changes it.
    scratch.entry = unsafe { *entry };
    if scratch.entry.flags & request::PATH != 0 {
        ended_path(scratch, how, result, told);
    } else if how != ending::NOTHING {
        ended_file(scratch, file, result, told);
    }
    let _ = REQUESTS.remove(req);
}

/// The end of an operation on a file. `told`: with a result; else it may have done all that its
/// entry says.
#[inline(always)]
fn ended_file(scratch: &mut Scratch, file: u64, result: i32, told: bool) {
    if told && result == 0 && (CLASS[scratch.entry.opcode as usize & 127] != class::FILE) {
        return;
    }
    // SAFETY: a helper without arguments.
    let end_ns = unsafe { bpf_ktime_get_ns() };
    let mut inode = scratch.entry.inode_addr;
    let mut f_flags = 0;
    if file != 0 {
        let file = kernel::read_file(scratch, file, true);
        inode = file.inode;
        f_flags = file.flags;
    }
    if inode == 0 {
        return;
    }
    kernel::read_inode(scratch, inode);
    let (dev, _) = kernel::object_device(scratch, inode);
    let followed = kernel::object_is_followed(scratch) && kernel::in_scope(dev);
    let known = scratch.entry.inode;
    let mut kind = kind::FILE;
    let mut flags = flag::BY_REFERENCE;
    let entry = &scratch.entry;
    scratch.file_record.event = FileEvent {
        header: header(kind, NR_PWRITE, entry, entry.start_ns),
        attr: InodeAttr { id: known, ..NO_ATTR },
        parent: NO_ATTR,
        file,
        file_offset: entry.offset,
        count: result as u64,
        range_start: entry.offset,
        range_end: entry.end,
        f_flags,
        f_mode: 0,
        name_len: 0,
        data_len: 0,
    };
    scratch.data_len = 0;
    if followed && (file != 0 || kernel::object_id(scratch, dev) == known) {
        kernel::object_attr(scratch, dev);
    } else if file == 0 && known.is_some() {
        // The inode is not in memory any more: what it is now has to be read.
        kind = kind::TOUCH;
    } else {
        return;
    }
    let bits = scratch.entry.flags;
    let event = &mut scratch.file_record.event;
    if CLASS[scratch.entry.opcode as usize & 127] == class::FILE {
        kind = kind::TOUCH;
    } else if bits & request::APPEND != 0 {
        flags |= flag::OFFSET_UNKNOWN | flag::APPEND;
        // As for calls: whoever truncated the file meanwhile overlaps.
        let grown = known == event.attr.id && event.attr.size > scratch.entry.size;
        event.range_start = scratch.entry.size;
        event.range_end = if grown { event.attr.size } else { 0 };
    } else if bits & request::AT_POSITION != 0 || f_flags & write::O_APPEND != 0 {
        flags |= flag::OFFSET_UNKNOWN;
        event.range_end = 0;
    } else if !told || result < 0 {
        // How far it came is not known.
        flags |= flag::OFFSET_UNKNOWN;
    }
    event.header.kind = kind;
    event.header.flags = flags;
    event.header.end_ns = end_ns;
    event.header.ret = i64::from(result);
    file::emit(scratch);
}

/// The end of an operation with paths.
#[inline(always)]
fn ended_path(scratch: &mut Scratch, how: u64, result: i32, told: bool) {
    let mut how = how;
    let class = CLASS[scratch.entry.opcode as usize & 127];
    if how == ending::DONE && class != class::OPEN && class != class::PATH {
        how = ending::UNKNOWN;
    } else if how == ending::DONE && told {
        // Another working directory, or another directory behind a descriptor, than at first.
        let (first, second) = bases(scratch.request.as_ptr(), scratch.entry.opcode);
        if (scratch.entry.inode_addr != 0 && first != scratch.entry.inode_addr)
            || (scratch.entry.offset != 0 && second != scratch.entry.offset)
        {
            how = ending::UNKNOWN;
        }
    }
    let entry = &scratch.entry;
    let (start, nr) = (entry.start_ns, call_of(entry.opcode));
    task::emit_ended(start, nr, entry.id, entry.tgid, i64::from(result), how);
}
