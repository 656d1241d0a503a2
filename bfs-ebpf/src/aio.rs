//! AIO: the writes that `io_submit` hands in.
//!
//! A buffered write is done when `io_submit` returns; a direct one goes on, and its end shows in no
//! call of the program: it may take the result out of memory that it shares with the kernel. So the
//! records only say which ranges are being written (`FILE_BEGUN` at the start, `ENDED` at the end of
//! the call), and the agent reads them when no direct I/O is in flight on the inode.
//!
//! The descriptions of the writes stand in the program's memory. They are read at the start, when
//! they must be complete; where another thread could have changed them, or where they could not be
//! read then, at the end as well.

use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user};
use bfs_common::abi::{FileEvent, InodeAttr, TaskState, counter, ending, flag, kind, slot};

use crate::{
    calls::nr,
    file::{self, NO_ATTR},
    kernel,
    maps::{Scratch, count},
    task, write,
};

/// Operations of one call that are looked at; with more of them everything is suspect.
const SUBMITTED_MAX: u64 = 4096;

/// `IOCB_CMD_PWRITE`, `IOCB_CMD_PWRITEV` (`include/uapi/linux/aio_abi.h`)
const PWRITE: u16 = 1;
const PWRITEV: u16 = 8;

/// `RWF_APPEND`
const RWF_APPEND: u32 = 0x10;

/// A call of `io_submit` while its operations are gone through.
#[repr(C)]
pub struct Submission {
    /// The array of pointers.
    list: u64,
    start_ns: u64,
    pid_tgid: u64,
    /// Not 0: something could not be read.
    unreadable: u64,
    /// Not 0: the call is at its start.
    begins: u64,
}

/// Buffers of a vector whose lengths are added up; of a longer one the end is not known.
const VECTOR_MAX: u64 = 8;

/// The start of a call.
#[inline(always)]
pub fn enter(scratch: &mut Scratch, state: &mut TaskState, pid_tgid: u64) {
    count(counter::ASYNC);
    if !send(scratch, state, pid_tgid, state.args[1], true) {
        state.flags |= slot::UNREADABLE;
    }
}

/// The end of a call.
#[inline(always)]
pub fn exit(scratch: &mut Scratch, state: &TaskState, ret: i64, pid_tgid: u64) {
    let mut how = if ret > 0 { ending::DONE } else { ending::NOTHING };
    if ret > 0
        && (state.flags & slot::UNREADABLE != 0 || kernel::has_threads())
        && !send(scratch, state, pid_tgid, ret as u64, false)
    {
        how = ending::UNKNOWN;
    }
    let (tid, tgid) = (pid_tgid as u32, (pid_tgid >> 32) as u32);
    task::emit_ended(state.start_ns, nr::IO_SUBMIT, tid, tgid, ret, how);
}

/// Sends what the first `number` operations of the call are going to write. Whether all were read.
#[inline(always)]
fn send(scratch: &mut Scratch, state: &TaskState, pid_tgid: u64, number: u64, begins: bool) -> bool {
    if number > SUBMITTED_MAX {
        return false;
    }
    scratch.submission = Submission {
        list: state.args[2],
        start_ns: state.start_ns,
        pid_tgid,
        unreadable: 0,
        begins: u64::from(begins),
    };
    // SAFETY: the callback has the signature that the helper asks for.
    unsafe {
        let mut context = &raw mut *scratch;
        bpf_loop(number as u32, each as *mut core::ffi::c_void, (&raw mut context).cast(), 0);
    }
    scratch.submission.unreadable == 0
}

extern "C" fn each(index: u32, scratch: *mut *mut Scratch) -> i64 {
    // SAFETY: the context that was handed to bpf_loop.
    let scratch = unsafe { &mut **scratch };
    let mut address = 0u64;
    // struct iocb: data, key and flags, opcode with priority and descriptor, buffer, bytes, offset.
    let mut iocb = [0u64; 6];
    // SAFETY: the targets have those sizes.
    let failed = unsafe {
        let entry = scratch.submission.list.wrapping_add(u64::from(index) * 8);
        bpf_probe_read_user((&raw mut address).cast(), 8, entry as *const _) < 0
            || bpf_probe_read_user((&raw mut iocb).cast(), 48, address as *const _) < 0
    };
    if failed {
        scratch.submission.unreadable = 1;
        return 1;
    }
    let opcode = iocb[2] as u16;
    if opcode != PWRITE && opcode != PWRITEV {
        return 0;
    }
    let (file, _) = kernel::file_of((iocb[2] >> 32) as u32);
    if file == 0 {
        return 0;
    }
    let file = kernel::read_file(scratch, file, true);
    kernel::read_inode(scratch, file.inode);
    let (dev, _) = kernel::object_device(scratch, file.inode);
    if !kernel::object_is_file(scratch) || !kernel::in_scope(dev) {
        return 0;
    }
    let id = kernel::object_id(scratch, dev);
    let appends = file.flags & write::O_APPEND != 0 || (iocb[1] >> 32) as u32 & RWF_APPEND != 0;
    let (start, end) = if appends {
        // Whoever truncates the file meanwhile overlaps.
        (if scratch.submission.begins != 0 { kernel::object_size(scratch) } else { 0 }, u64::MAX)
    } else {
        let len = if opcode == PWRITEV { length(iocb[3], iocb[4]) } else { iocb[4] };
        (iocb[5], iocb[5].saturating_add(len))
    };
    let submission = &scratch.submission;
    let start_ns = submission.start_ns;
    let header = file::header(
        kind::FILE_BEGUN,
        flag::OFFSET_UNKNOWN | flag::BY_REFERENCE,
        nr::IO_SUBMIT,
        start_ns,
        start_ns,
        0,
        submission.pid_tgid,
    );
    scratch.data_len = 0;
    scratch.file_record.event = FileEvent {
        header,
        attr: InodeAttr { id, ..NO_ATTR },
        parent: NO_ATTR,
        file: 0,
        file_offset: start,
        count: 0,
        range_start: start,
        range_end: end,
        f_flags: file.flags,
        f_mode: file.mode,
        name_len: 0,
        data_len: 0,
    };
    file::emit(scratch);
    0
}

/// Bytes of the buffers of a vector; `u64::MAX` where that is not known.
#[inline(always)]
fn length(vector: u64, buffers: u64) -> u64 {
    if buffers > VECTOR_MAX {
        return u64::MAX;
    }
    let mut sum = 0u64;
    let mut i = 0;
    while i < VECTOR_MAX {
        if i >= buffers {
            break;
        }
        let mut iovec = [0u64; 2];
        // SAFETY: the target has the size of a struct iovec.
        let read = unsafe { bpf_probe_read_user((&raw mut iovec).cast(), 16, (vector + i * 16) as *const _) };
        if read < 0 {
            return u64::MAX;
        }
        sum = sum.saturating_add(iovec[1]);
        i += 1;
    }
    sum
}
