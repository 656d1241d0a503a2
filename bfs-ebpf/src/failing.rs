//! Calls that see an error of the disk: which file it was.
//!
//! Reads are followed for nothing else, so a call that went well must not pay for this: its result is compared with 0,
//! and that is all.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use bfs_common::abi::{EventHeader, FailedEvent, counter, kind, role};

use crate::{
    file, kernel, mapped,
    maps::{BPF_NOEXIST, FAILING, NO_WAKEUP, RING, SCRATCH, SCRATCH_EXIT, TASKS, count},
    syscall,
};

/// Numbers of `sendfile` and `msync`, which do not begin with the descriptor that matters.
const SENDFILE: u32 = 40;
const MSYNC: u32 = 26;

/// Whether a call reads, writes or syncs a file: `read` `write` `pread64` `pwrite64` `readv` `writev` `msync` `sendfile`
/// `fsync` `fdatasync` `splice` `sync_file_range` `preadv` `pwritev` `copy_file_range` `preadv2` `pwritev2`. Not `close`:
/// only `f_op->flush` can fail there (`filp_flush` in fs/open.c), and no file system that is replicated has it.
#[inline(always)]
fn is_of_file(number: u64) -> bool {
    matches!(number, 0 | 1 | 17..=20 | 26 | 40 | 74 | 75 | 275 | 277 | 295 | 296 | 326..=328)
}

/// A call ended so.
#[inline(always)]
pub fn told(regs: *const u64, ret: i64) {
    if let Some((number, first, second)) = syscall::ended(regs)
        && is_of_file(number)
    {
        failed_call(number as u32, first, second, ret);
    }
}

/// Tells of the file, if it is one of a selected task, in scope, and was not told yet.
///
/// Takes plain numbers: so the verifier looks at it once and by itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn failed_call(number: u32, first: u64, second: u64, ret: i64) -> i32 {
    let pid_tgid = kernel::pid_tgid(kernel::task());
    let selected = TASKS.get_ptr(pid_tgid as u32);
    // SAFETY: the entry of the current task.
    if selected.is_none_or(|state| unsafe { (*state).role } != role::SELECTED) {
        return 0;
    }
    let address = match number {
        MSYNC => mapped::file_at(first, second),
        SENDFILE => kernel::file_of(second as u32).0,
        _ => kernel::file_of(first as u32).0,
    };
    if address == 0 {
        count(counter::FAILED_LOST);
        return 0;
    }
    let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_EXIT) else {
        return 0;
    };
    // SAFETY: this CPU's entry of this hook.
    let scratch = unsafe { &mut *scratch };
    let inode = kernel::read_file(scratch, address, true).inode;
    kernel::read_inode(scratch, inode);
    let (dev, _) = kernel::object_device(scratch, inode);
    if !kernel::object_is_file(scratch) || !kernel::in_scope(dev) {
        return 0;
    }
    // On the stack: before 6.2 the verifier takes a key from nowhere else.
    let id = kernel::object_id(scratch, dev);
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the map's entry is only asked for.
    if unsafe { FAILING.get(&id) }.is_some() {
        return 0;
    }
    if FAILING.insert(&id, now, BPF_NOEXIST).is_err() {
        count(counter::FAILED_LOST);
        return 0;
    }
    let Some(mut entry) = RING.reserve::<FailedEvent>(0) else {
        // The next one is told then.
        let _ = FAILING.remove(&id);
        count(counter::FAILED_LOST);
        return 0;
    };
    let header = EventHeader {
        len: size_of::<FailedEvent>() as u32,
        ..file::header(kind::FAILED, 0, number, now, now, ret, pid_tgid)
    };
    *entry = core::mem::MaybeUninit::new(FailedEvent { header, id });
    entry.submit(NO_WAKEUP);
    0
}
