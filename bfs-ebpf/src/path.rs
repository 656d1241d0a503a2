//! Records of calls with paths: [`PathEvent`] and the strings.

use aya_ebpf::helpers::generated::{bpf_probe_read_user, bpf_probe_read_user_str};
use bfs_common::abi::{InodeId, NAME_MAX, PATH_MAX, PathEvent, TaskState, counter, flag};

use crate::{
    calls::{CALLS, NO_ARG, PATHS, nr},
    file::{NO_WAKEUP, opaque},
    kernel,
    maps::{RING, Scratch, count, rescan},
};

/// `AT_FDCWD`
const AT_FDCWD: i32 = -100;
/// `AF_UNIX`
const AF_UNIX: u16 = 1;

/// What a path record says beside the paths.
#[derive(Clone, Copy)]
pub struct Out {
    pub kind: u16,
    pub flags: u16,
    pub nr: u32,
    pub start_ns: u64,
    pub end_ns: u64,
    pub ret: i64,
    pub pid_tgid: u64,
    /// Bytes of path 1 and path 2, once read.
    len1: u32,
    len2: u32,
    /// Whether a string was longer than the record's class.
    too_long: u32,
}

impl Out {
    /// A record to be.
    #[inline(always)]
    pub fn new(
        kind: u16,
        flags: u16,
        nr: u32,
        state: &TaskState,
        end_ns: u64,
        ret: i64,
        pid_tgid: u64,
    ) -> Self {
        let start_ns = state.start_ns;
        Self { kind, flags, nr, start_ns, end_ns, ret, pid_tgid, len1: 0, len2: 0, too_long: 0 }
    }
}

#[repr(C)]
struct Record<const S: usize> {
    event: PathEvent,
    path1: [u8; S],
    path2: [u8; S],
}

/// Puts the record into the ring; where there is no room, everything is suspect.
#[inline(never)]
pub fn emit(out: &mut Out, state: &TaskState, scratch: &mut Scratch) -> i64 {
    // Short paths first: nearly all are.
    let mut sent = send::<256>(out, state, scratch);
    if out.too_long != 0 {
        sent = send::<PATH_MAX>(out, state, scratch);
    }
    if sent {
        count(counter::RECORDS);
    } else {
        rescan();
    }
    0
}

#[inline(always)]
fn argument(state: &TaskState, index: u16) -> u64 {
    // Not an array access, so that the verifier has nothing to doubt.
    match index & 7 {
        0 => state.args[0],
        1 => state.args[1],
        2 => state.args[2],
        3 => state.args[3],
        _ => 0,
    }
}

/// Reads a string; the length without the terminating zero, 0 with a flag where it fails.
#[inline(always)]
fn string<const S: usize>(out: &mut Out, to: *mut u8, address: u64) -> u32 {
    // SAFETY: `to` has room for S bytes.
    let read = unsafe { bpf_probe_read_user_str(to.cast(), S as u32, address as *const _) };
    if read <= 0 {
        out.flags |= flag::PATH_UNREADABLE;
        count(counter::USER_UNREADABLE);
        return 0;
    }
    if read as usize >= S {
        out.too_long = 1;
    }
    (read - 1) as u32
}

/// Whether `path` has no slash and is neither empty nor `.` nor `..`.
#[inline(always)]
fn is_single(path: *const u8, len: u32) -> bool {
    const SLASHES: u64 = 0x2f2f_2f2f_2f2f_2f2f;
    const ONES: u64 = 0x0101_0101_0101_0101;
    if len == 0 || len > NAME_MAX as u32 {
        return false;
    }
    let words = path.cast::<u64>();
    let mut i = 0;
    while i < 32 {
        let before = i as u32 * 8;
        if before >= len {
            break;
        }
        // SAFETY: both classes have more than 256 bytes here, aligned to 8.
        let mut word = unsafe { words.add(i).read() };
        let rest = len - before;
        if rest < 8 {
            word &= (1 << (rest * 8)) - 1;
        }
        if i == 0 && (word == 0x2e || word == 0x2e2e) {
            return false;
        }
        // A byte of the difference is zero where there is a slash.
        let difference = word ^ SLASHES;
        if difference.wrapping_sub(ONES) & !difference & (ONES << 7) != 0 {
            return false;
        }
        i += 1;
    }
    true
}

/// The inode that a path starts from.
#[inline(always)]
fn base(first: u8, len: u32, directory: u16, state: &TaskState) -> u64 {
    if len > 0 && first == b'/' {
        return kernel::directory(true);
    }
    let fd = if directory == NO_ARG { AT_FDCWD } else { argument(state, directory) as i32 };
    if fd == AT_FDCWD {
        return kernel::directory(false);
    }
    let (file, _) = kernel::file_of(fd as u32);
    if file == 0 { 0 } else { kernel::read(file + crate::maps::off!(file_inode) as u64) }
}

#[inline(always)]
fn send<const S: usize>(out: &mut Out, state: &TaskState, scratch: &mut Scratch) -> bool {
    let Some(mut entry) = RING.reserve::<Record<S>>(0) else {
        out.too_long = 0;
        return false;
    };
    let record = entry.as_mut_ptr();
    let spec = PATHS[out.nr as usize & (CALLS - 1)];
    out.too_long = 0;
    out.flags &= !flag::PATH_UNREADABLE;
    // SAFETY: the record was reserved; every field of the event is written.
    unsafe {
        let event = &raw mut (*record).event;
        let bytes = (&raw mut (*record).path1).cast::<u8>();
        let (directory1, path1) = (spec & 7, spec >> 4 & 7);
        let (directory2, path2) = (spec >> 8 & 7, spec >> 12 & 7);
        let mut address = argument(state, path1);
        let mut limit = S as u32 - 1;
        if out.nr == nr::BIND {
            address += 2;
            limit = (state.args[2] as u32).wrapping_sub(2) & (S as u32 - 1);
        }
        out.len1 = string::<S>(out, bytes, address);
        if out.len1 > limit {
            out.len1 = limit;
        }
        let first1 = *bytes;
        let single1 = is_single(bytes, out.len1);
        let mut len1 = opaque(&out.len1);
        if len1 as usize > S - 1 {
            len1 = 0;
        }
        out.len2 = 0;
        let mut first2 = 0;
        let mut single2 = false;
        if path2 != NO_ARG {
            // Read where it can be looked at, then moved behind path 1.
            let second = (&raw mut (*record).path2).cast::<u8>();
            out.len2 = string::<S>(out, second, argument(state, path2));
            first2 = *second;
            single2 = is_single(second, out.len2);
            let mut len2 = opaque(&out.len2);
            if len2 as usize > S - 1 {
                len2 = 0;
            }
            if len2 > 0 {
                aya_ebpf::helpers::generated::bpf_probe_read_kernel(
                    bytes.add(len1 as usize).cast(),
                    len2,
                    second as *const _,
                );
            }
        }
        if out.too_long != 0 && S < PATH_MAX {
            entry.discard(NO_WAKEUP);
            return false;
        }
        // symlink: the first path is text, not a path from here.
        let is_text = out.nr == 88 || out.nr == 266;
        let inode = if is_text { 0 } else { base(first1, out.len1, directory1, state) };
        if inode != 0 {
            kernel::read_inode(scratch, inode);
            let (dev, _) = kernel::object_device(scratch, inode);
            kernel::object_attr(&raw mut (*event).base1, scratch, dev);
            if single1 {
                out.flags |= flag::PARENT1_ATTR;
            }
        } else {
            kernel::bare_attr(&raw mut (*event).base1, InodeId::NONE);
        }
        let inode = if path2 == NO_ARG { 0 } else { base(first2, out.len2, directory2, state) };
        if inode != 0 {
            kernel::read_inode(scratch, inode);
            let (dev, _) = kernel::object_device(scratch, inode);
            kernel::object_attr(&raw mut (*event).base2, scratch, dev);
            if single2 {
                out.flags |= flag::PARENT2_ATTR;
            }
        } else {
            kernel::bare_attr(&raw mut (*event).base2, InodeId::NONE);
        }
        let root = kernel::directory(true);
        kernel::read_parent(scratch, root);
        let (dev, _) = kernel::parent_device(scratch, root);
        (*event).root = kernel::parent_id(scratch, dev);
        (*event).args = state.args;
        (*event).path1_len = out.len1;
        (*event).path2_len = out.len2;
        let header = &raw mut (*event).header;
        (*header).len = size_of::<PathEvent>() as u32 + out.len1 + out.len2;
        (*header).kind = out.kind;
        (*header).flags = out.flags;
        (*header).start_ns = out.start_ns;
        (*header).end_ns = out.end_ns;
        (*header).tid = out.pid_tgid as u32;
        (*header).tgid = (out.pid_tgid >> 32) as u32;
        (*header).nr = out.nr;
        (*header).read_ns = 0;
        (*header).ret = out.ret;
    }
    entry.submit(NO_WAKEUP);
    true
}

/// Whether the address of a `bind` is a path.
#[inline(always)]
pub fn is_unix_path(state: &TaskState) -> bool {
    let mut start = [0u8; 4];
    // SAFETY: the target has that size.
    let read = unsafe { bpf_probe_read_user((&raw mut start).cast(), 4, state.args[1] as *const _) };
    read >= 0 && state.args[2] > 2 && u16::from_ne_bytes([start[0], start[1]]) == AF_UNIX && start[2] != 0
}
