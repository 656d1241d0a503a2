//! io_uring operations with paths: the kernel's copies of the strings, and where they start from.

use aya_ebpf::helpers::generated::bpf_probe_read_kernel_str;
use bfs_common::abi::{PATH_MAX, PathEvent, counter, flag};

use crate::{
    file::{NO_ATTR, opaque},
    kernel::{self, at, read},
    maps::{Scratch, count, off, output, rescan},
    uring::op,
};

const AT_FDCWD: i32 = -100;

/// The path of a `bind`: a `struct sockaddr_un` in the memory of the request, the path behind the
/// family. On some kernels the address stands in a `struct io_async_msghdr`, on others by itself.
#[inline(always)]
fn socket_path(block: *const u64) -> u64 {
    let data: u64 = at(block, off!(req_async_data));
    // The message begins with an aligned pointer or zero, the address with its family.
    if read::<u16>(data) & 7 != 0 { data + 2 } else { data + off!(msg_addr) as u64 + 2 }
}

/// Whether a `bind` makes a file: `AF_UNIX`, and a path that does not begin with a zero.
#[inline(always)]
pub fn makes_socket(block: *const u64) -> bool {
    let start: u32 = read(socket_path(block) - 2);
    start & 0xffff == 1 && start >> 16 & 0xff != 0
}

/// The descriptors of the directories that the paths of an operation start from.
#[inline(always)]
fn directories(block: *const u64, opcode: u32) -> (i32, i32) {
    match opcode {
        op::OPENAT | op::OPENAT2 => (at(block, off!(open_dfd)), AT_FDCWD),
        op::RENAMEAT => (at(block, off!(rename_old_dfd)), at(block, off!(rename_new_dfd))),
        op::UNLINKAT => (at(block, off!(unlink_dfd)), AT_FDCWD),
        op::MKDIRAT => (at(block, off!(mkdir_dfd)), AT_FDCWD),
        op::SYMLINKAT => (AT_FDCWD, at(block, off!(link_new_dfd))),
        op::LINKAT => (at(block, off!(link_old_dfd)), at(block, off!(link_new_dfd))),
        _ => (AT_FDCWD, AT_FDCWD),
    }
}

#[inline(always)]
fn has_second(opcode: u32) -> bool {
    matches!(opcode, op::RENAMEAT | op::SYMLINKAT | op::LINKAT)
}

/// The inodes that relative paths of an operation start from.
#[inline(always)]
pub fn bases(block: *const u64, opcode: u32) -> (u64, u64) {
    let (first, second) = directories(block, opcode);
    let second = if has_second(opcode) { directory(second) } else { 0 };
    (directory(first), second)
}

#[inline(always)]
fn directory(fd: i32) -> u64 {
    if fd == AT_FDCWD {
        return kernel::directory(false);
    }
    let (file, _) = kernel::file_of(fd as u32);
    if file == 0 { 0 } else { read(file + off!(file_inode) as u64) }
}

/// The strings of an operation in kernel memory, 0 without one.
#[inline(always)]
fn names(block: *const u64, opcode: u32) -> (u64, u64) {
    let (first, second): (u64, u64) = match opcode {
        op::OPENAT | op::OPENAT2 => (at(block, off!(open_name)), 0),
        op::RENAMEAT => (at(block, off!(rename_old)), at(block, off!(rename_new))),
        op::UNLINKAT => (at(block, off!(unlink_name)), 0),
        op::MKDIRAT => (at(block, off!(mkdir_name)), 0),
        op::SYMLINKAT | op::LINKAT => (at(block, off!(link_old)), at(block, off!(link_new))),
        op::BIND => return (socket_path(block), 0),
        _ => (at(block, off!(xattr_name)), 0),
    };
    let name = |filename: u64| {
        // The lowest bit marks a name whose audit is still to come (fs/namei.c, delayed_getname).
        let filename = filename & !1;
        if filename == 0 { 0 } else { read::<u64>(filename + off!(filename_name) as u64) }
    };
    (name(first), name(second))
}

/// Reads a string of the kernel to `to` in the bytes of the record.
#[inline(always)]
fn string(scratch: &mut Scratch, to: u32, address: u64) -> u32 {
    // SAFETY: `to` is below PATH_MAX, and behind it there is room for another path.
    let read = unsafe {
        let to = (&raw mut scratch.path_record.bytes).cast::<u8>().add(to as usize);
        bpf_probe_read_kernel_str(to.cast(), PATH_MAX as u32, address as *const _)
    };
    if read <= 0 {
        scratch.path_record.event.header.flags |= flag::PATH_UNREADABLE;
        return 0;
    }
    (read - 1) as u32
}

/// Sends the record of an operation with paths that begins, and keeps the bases of its relative paths
/// in the entry of the scratch; where there is no room, everything is suspect.
#[inline(always)]
pub fn begun(scratch: &mut Scratch) {
    begun_path(scratch);
}

/// See [`begun`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn begun_path(scratch: *mut Scratch) -> i32 {
    if scratch.is_null() {
        return 0;
    }
    // SAFETY: the verifier checks the pointer that the probe hands in.
    let scratch = unsafe { &mut *scratch };
    let opcode = scratch.entry.opcode;
    let (one, two) = names(scratch.request.as_ptr(), opcode);
    let mut len1 = string(scratch, 0, one);
    if opcode == op::BIND {
        // Not ended by a zero yet.
        let limit = (at::<u32>(scratch.request.as_ptr(), off!(bind_addr_len))).wrapping_sub(2);
        if len1 > limit {
            len1 = limit;
        }
    }
    scratch.path_record.event.path1_len = len1;
    let len1 = opaque(&scratch.path_record.event.path1_len) & (PATH_MAX as u32 - 1);
    scratch.path_record.event.path2_len = 0;
    if has_second(opcode) {
        let len2 = string(scratch, len1, two);
        scratch.path_record.event.path2_len = len2;
    }
    let len2 = opaque(&scratch.path_record.event.path2_len) & (PATH_MAX as u32 - 1);
    scratch.path_record.event.base1 = NO_ATTR;
    scratch.path_record.event.base2 = NO_ATTR;
    let (relative1, relative2) = bases(scratch.request.as_ptr(), opcode);
    let (mut kept1, mut kept2) = (0, 0);
    // symlink: the first path is text.
    if opcode != op::SYMLINKAT {
        let absolute = len1 > 0 && scratch.path_record.bytes[0] == b'/';
        let inode = if absolute { kernel::directory(true) } else { relative1 };
        if !absolute {
            kept1 = inode;
        }
        base(scratch, false, inode);
    }
    if has_second(opcode) {
        let absolute = len2 > 0 && scratch.path_record.bytes[len1 as usize] == b'/';
        let inode = if absolute { kernel::directory(true) } else { relative2 };
        if !absolute {
            kept2 = inode;
        }
        base(scratch, true, inode);
    }
    let root = kernel::directory(true);
    kernel::read_parent(scratch, root);
    let (dev, _) = kernel::parent_device(scratch, root);
    scratch.path_record.event.root = kernel::parent_id(scratch, dev);
    scratch.path_record.event.mounts = kernel::mount_namespace();
    scratch.path_record.event.reserved = 0;
    let block = scratch.request.as_ptr();
    let bits = match opcode {
        op::RENAMEAT => at::<u32>(block, off!(rename_flags)),
        op::LINKAT => at::<u32>(block, off!(link_flags)),
        _ => 0,
    };
    scratch.path_record.event.args = [0, 0, 0, 0, u64::from(bits), 0];
    let len = size_of::<PathEvent>() as u32 + len1 + len2;
    scratch.path_record.event.header.len = len;
    scratch.entry.inode_addr = kept1;
    scratch.entry.offset = kept2;
    // SAFETY: part of the scratch, and within its size.
    if unsafe { output(&raw const scratch.path_record, len) } {
        count(counter::RECORDS);
    } else {
        rescan();
    }
    0
}

#[inline(always)]
fn base(scratch: &mut Scratch, second: bool, inode: u64) {
    if inode != 0 {
        kernel::read_inode(scratch, inode);
        let (dev, _) = kernel::object_device(scratch, inode);
        kernel::base_attr(scratch, second, dev);
    }
}
