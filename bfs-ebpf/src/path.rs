//! Records of calls with paths: [`PathEvent`] and the strings.

use aya_ebpf::helpers::generated::{bpf_probe_read_user, bpf_probe_read_user_str};
use bfs_common::abi::{NAME_MAX, PATH_MAX, PathEvent, TaskState, counter, flag};

use crate::{
    calls::{CALLS, NO_ARG, PATHS, nr},
    file::{NO_ATTR, header, opaque, stamp},
    kernel,
    maps::{Scratch, count, output, rescan},
};

/// `AT_FDCWD`
const AT_FDCWD: i32 = -100;
/// `AF_UNIX`
const AF_UNIX: u16 = 1;

/// Puts the record of the call in `state` into the ring; where there is no room, everything is
/// suspect. The caller has filled in the header.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn emit_path(scratch: *mut Scratch, state: *const TaskState) -> i32 {
    if scratch.is_null() || state.is_null() {
        return 0;
    }
    // SAFETY: the verifier checks the pointers that the probe hands in.
    let (scratch, state) = unsafe { (&mut *scratch, &*state) };
    if send(scratch, state) {
        count(counter::RECORDS);
    } else {
        rescan();
    }
    0
}

/// A record of the paths of the call in `state`.
#[inline(always)]
pub fn emit(
    scratch: &mut Scratch,
    state: &TaskState,
    kind: u16,
    flags: u16,
    nr: u32,
    end_ns: u64,
    ret: i64,
    pid_tgid: u64,
) {
    let start_ns = state.start_ns;
    scratch.path_record.event.header = header(kind, flags, nr, start_ns, end_ns, ret, pid_tgid);
    emit_path(scratch, state);
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

/// Reads a string to `at` in the bytes of the record; the length without the terminating zero, 0 with
/// a flag where it fails.
#[inline(always)]
fn string(scratch: &mut Scratch, at: u32, address: u64) -> u32 {
    // SAFETY: `at` is below PATH_MAX, and behind it there is room for another path.
    let read = unsafe {
        let to = (&raw mut scratch.path_record.bytes).cast::<u8>().add(at as usize);
        bpf_probe_read_user_str(to.cast(), PATH_MAX as u32, address as *const _)
    };
    if read < 0 {
        scratch.path_record.event.header.flags |= flag::PATH_UNREADABLE;
        count(counter::USER_UNREADABLE);
        return 0;
    }
    // Before 6.13 an empty string has no terminating zero that counts (`strncpy_from_user_nofault()` in mm/maccess.c).
    if read == 0 { 0 } else { (read - 1) as u32 }
}

/// Whether the path at `start` in the bytes of the record has no slash and is neither empty nor `.`
/// nor `..`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn path_is_single(scratch: *const Scratch, start: u32, len: u32) -> i32 {
    const SLASHES: u64 = 0x2f2f_2f2f_2f2f_2f2f;
    const ONES: u64 = 0x0101_0101_0101_0101;
    if scratch.is_null() || len == 0 || len > NAME_MAX as u32 {
        return 0;
    }
    let start = opaque(&start) & (PATH_MAX as u32 - 1);
    // SAFETY: behind `start` there is room for another path.
    let bytes = unsafe { (&raw const (*scratch).path_record.bytes).cast::<u8>().add(start as usize) };
    let mut i = 0;
    while i < 32 {
        let before = i as u32 * 8;
        if before >= len {
            break;
        }
        // SAFETY: as above.
        let mut word = unsafe { bytes.cast::<u64>().add(i).read_unaligned() };
        let rest = len - before;
        if rest < 8 {
            word &= (1 << (rest * 8)) - 1;
        }
        if i == 0 && (word == 0x2e || word == 0x2e2e) {
            return 0;
        }
        // A byte of the difference is zero where there is a slash.
        let difference = word ^ SLASHES;
        if difference.wrapping_sub(ONES) & !difference & (ONES << 7) != 0 {
            return 0;
        }
        i += 1;
    }
    1
}

/// Longest descriptor number that is read from a path, in digits.
const DIGITS_MAX: u32 = 7;

/// The descriptor of the task that the path at `start` in the bytes of the record begins with:
/// `/proc/self/fd/N`, `/proc/thread-self/fd/N` or `/dev/fd/N`; -1 without one.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn path_descriptor(scratch: *const Scratch, start: u32, len: u32) -> i32 {
    if scratch.is_null() || len > PATH_MAX as u32 {
        return -1;
    }
    let start = opaque(&start) & (PATH_MAX as u32 - 1);
    // SAFETY: behind `start` there is room for another path, and much more than is read here.
    unsafe {
        let bytes = (&raw const (*scratch).path_record.bytes).cast::<u8>().add(start as usize);
        let word = |at: usize| bytes.add(at).cast::<u64>().read_unaligned();
        let text = |text: &[u8; 8]| u64::from_le_bytes(*text);
        let own = text(b"self/fd/");
        let digits = if word(0) == text(b"/dev/fd/") {
            8
        } else if word(0) == text(b"/proc/se") && word(6) == own {
            14
        } else if word(0) == text(b"/proc/th") && word(8) == text(b"read-sel") && word(13) == own {
            21
        } else {
            return -1;
        };
        if len <= digits {
            return -1;
        }
        let mut number = 0u32;
        let mut i = 0;
        while i < DIGITS_MAX {
            let byte = if digits + i < len { bytes.add((digits + i) as usize).read_volatile() } else { b'/' };
            if byte == b'/' {
                return if i == 0 { -1 } else { number as i32 };
            }
            if !byte.is_ascii_digit() {
                return -1;
            }
            number = number * 10 + u32::from(byte - b'0');
            i += 1;
        }
    }
    -1
}

/// The inode that a path starts from.
#[inline(always)]
fn base(first: u8, len: u32, directory: u16, state: &TaskState, descriptor: i32) -> u64 {
    let mut fd = if directory == NO_ARG { AT_FDCWD } else { argument(state, directory) as i32 };
    if descriptor >= 0 {
        fd = descriptor;
    } else if len > 0 && first == b'/' {
        return kernel::directory(true);
    }
    if fd == AT_FDCWD {
        return kernel::directory(false);
    }
    let (file, _) = kernel::file_of(fd as u32);
    if file == 0 { 0 } else { kernel::read(file + crate::maps::off!(file_inode) as u64) }
}

/// Puts into the record where the path at `start` in its bytes starts from.
#[inline(always)]
fn from(scratch: &mut Scratch, state: &TaskState, second: bool, start: u32, len: u32, directory: u16) {
    let first = scratch.path_record.bytes[start as usize];
    let descriptor = path_descriptor(scratch, start, len);
    if descriptor >= 0 {
        scratch.path_record.event.header.flags |= if second { flag::DESCRIPTOR2 } else { flag::DESCRIPTOR1 };
    }
    let inode = base(first, len, directory, state, descriptor);
    if inode != 0 {
        kernel::read_inode(scratch, inode);
        let (dev, _) = kernel::object_device(scratch, inode);
        kernel::base_attr(scratch, second, dev);
        if path_is_single(scratch, start, len) != 0 {
            let attr = if second { flag::PARENT2_ATTR } else { flag::PARENT1_ATTR };
            scratch.path_record.event.header.flags |= attr;
        }
    }
}

#[inline(always)]
fn send(scratch: &mut Scratch, state: &TaskState) -> bool {
    let number = scratch.path_record.event.header.nr;
    let spec = PATHS[number as usize & (CALLS - 1)];
    let (directory1, path1) = (spec & 7, spec >> 4 & 7);
    let (directory2, path2) = (spec >> 8 & 7, spec >> 12 & 7);
    let mut address = argument(state, path1);
    let mut limit = PATH_MAX as u32 - 1;
    if number == nr::BIND {
        address += 2;
        limit = (state.args[2] as u32).wrapping_sub(2) & (PATH_MAX as u32 - 1);
    }
    let len1 = string(scratch, 0, address);
    scratch.path_record.event.path1_len = if len1 > limit { limit } else { len1 };
    let len1 = opaque(&scratch.path_record.event.path1_len) & (PATH_MAX as u32 - 1);
    scratch.path_record.event.path2_len = 0;
    if path2 != NO_ARG {
        let len2 = string(scratch, len1, argument(state, path2));
        scratch.path_record.event.path2_len = len2;
    }
    let len2 = opaque(&scratch.path_record.event.path2_len) & (PATH_MAX as u32 - 1);
    scratch.path_record.event.base1 = NO_ATTR;
    scratch.path_record.event.base2 = NO_ATTR;
    // symlink: the first path is text, not a path from here.
    if number != nr::SYMLINK && number != nr::SYMLINKAT {
        from(scratch, state, false, 0, len1, directory1);
    }
    if path2 != NO_ARG {
        from(scratch, state, true, len1, len2, directory2);
    }
    let root = kernel::directory(true);
    kernel::read_parent(scratch, root);
    let (dev, _) = kernel::parent_device(scratch, root);
    scratch.path_record.event.root = kernel::parent_id(scratch, dev);
    scratch.path_record.event.args = state.args;
    scratch.path_record.event.mounts = kernel::mount_namespace();
    scratch.path_record.event.reserved = 0;
    let len = size_of::<PathEvent>() as u32 + len1 + len2;
    scratch.path_record.event.header.len = len;
    stamp(&mut scratch.path_record.event.header);
    // SAFETY: part of the scratch, and within its size.
    unsafe { output(&raw const scratch.path_record, len) }
}

/// Whether the address of a `bind` is a path.
#[inline(always)]
pub fn is_unix_path(state: &TaskState) -> bool {
    let mut start = [0u8; 4];
    // SAFETY: the target has that size.
    let read = unsafe { bpf_probe_read_user((&raw mut start).cast(), 4, state.args[1] as *const _) };
    read >= 0 && state.args[2] > 2 && u16::from_ne_bytes([start[0], start[1]]) == AF_UNIX && start[2] != 0
}
