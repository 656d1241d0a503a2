//! Walking the kernel's structs: task -> files -> file -> inode and dentry.
//!
//! The way from the task to the table of descriptors is loads that the verifier knows by type;
//! behind it are plain addresses, read in blocks of neighbouring fields, because each
//! `bpf_probe_read_kernel` costs about as much as the bytes of a block.

use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_probe_read_kernel};
use bfs_common::abi::{DEVICES_MAX, InodeAttr, InodeId};

use crate::maps::{
    DENTRY_BLOCK, DEVICES, FILE_BLOCK, FOREIGN_DESCRIPTORS, INODE_BLOCK, Scratch, off, setting,
};

/// `S_IFMT` and the types that are followed (`include/uapi/linux/stat.h`).
pub const S_IFMT: u32 = 0o170_000;
const S_IFIFO: u32 = 0o010_000;
pub const S_IFREG: u32 = 0o100_000;
pub const S_IFDIR: u32 = 0o040_000;

/// `f_mode` of a file that may be written to (`include/linux/fs.h`).
pub const FMODE_WRITE: u32 = 2;

/// `BTRFS_SUPER_MAGIC` (`include/uapi/linux/magic.h`).
const BTRFS_MAGIC: u64 = 0x9123_683E;

/// Reads a value from a kernel address; zero where that fails.
#[inline(always)]
pub fn read<T: Copy>(address: u64) -> T {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes the whole value, or zeroes it when it fails
    // (kernel/trace/bpf_trace.c, bpf_probe_read_kernel_common).
    unsafe {
        bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, address as *const _);
        value.assume_init()
    }
}

/// Takes a field out of a block that was read.
#[inline(always)]
pub fn at<T: Copy>(block: *const u64, offset: usize) -> T {
    // SAFETY: the verifier checks the bounds; the kernel aligns its fields.
    unsafe { block.byte_add(offset).cast::<T>().read() }
}

/// Loads a field of a struct that the verifier knows by its BTF type.
///
/// # Safety
/// `base` is a pointer that the verifier tracks, and the field is a member of exactly that size.
#[inline(always)]
pub unsafe fn field<T: Copy>(base: *const u8, offset: usize) -> T {
    // SAFETY: as promised by the caller.
    unsafe { base.add(offset).cast::<T>().read_volatile() }
}

/// The current task.
#[inline(always)]
pub fn task() -> *const u8 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_current_task_btf() as *const u8 }
}

/// `thread_info.status` of the current task.
#[inline(always)]
pub fn task_status(task: *const u8) -> u32 {
    // SAFETY: a u32 member.
    unsafe { field(task, off!(task_status)) }
}

/// What `bpf_get_current_pid_tgid` tells, without the cost of a call.
#[inline(always)]
pub fn pid_tgid(task: *const u8) -> u64 {
    // SAFETY: members of 4 bytes.
    unsafe {
        u64::from(field::<u32>(task, off!(task_tgid))) << 32 | u64::from(field::<u32>(task, off!(task_pid)))
    }
}

/// Whether more than one task uses the memory, or io_uring or AIO may store into it.
#[inline(always)]
pub fn memory_is_shared() -> bool {
    // SAFETY: members of the task and of its mm.
    unsafe {
        let task = task();
        let mm: *const u8 = field(task, off!(task_mm));
        if mm.is_null() {
            return true;
        }
        if field::<u32>(mm, off!(mm_users)) != 1 {
            return true;
        }
        if uses_io_uring() {
            return true;
        }
        off!(mm_aio) != 0 && !field::<*const u8>(mm, off!(mm_aio)).is_null()
    }
}

/// Whether the current task has used io_uring: the kernel may use its descriptors, and close them, when it likes.
#[inline(always)]
pub fn uses_io_uring() -> bool {
    // SAFETY: a member of the task.
    off!(task_io_uring) != 0 && unsafe { !field::<*const u8>(task(), off!(task_io_uring)).is_null() }
}

/// Whether any process took a descriptor of another one.
#[inline(always)]
pub fn descriptors_were_taken() -> bool {
    // SAFETY: a global word; it only ever goes from 0 to 1.
    unsafe { core::ptr::read_volatile(&raw const FOREIGN_DESCRIPTORS) != 0 }
}

/// Whether more than one task uses the memory.
#[inline(always)]
pub fn has_threads() -> bool {
    // SAFETY: members of the task and of its mm.
    unsafe {
        let mm: *const u8 = field(task(), off!(task_mm));
        mm.is_null() || field::<u32>(mm, off!(mm_users)) != 1
    }
}

/// Direct I/O in flight on the file of a descriptor of the current task; -1 without such a file.
#[inline(always)]
pub fn direct_io(fd: u32) -> i32 {
    let inode = inode_of(fd);
    if inode == 0 { -1 } else { read(inode + off!(inode_dio_count) as u64) }
}

/// The inode of a descriptor of the current task, 0 without one.
#[inline(always)]
pub fn inode_of(fd: u32) -> u64 {
    let (file, _) = file_of(fd);
    if file == 0 { 0 } else { read(file + off!(file_inode) as u64) }
}

/// Whether another thread may change the strings or the working directory of a path call.
#[inline(always)]
pub fn paths_are_shared() -> bool {
    // SAFETY: members of the task, its mm and its fs_struct.
    unsafe {
        let task = task();
        let mm: *const u8 = field(task, off!(task_mm));
        if mm.is_null() || field::<u32>(mm, off!(mm_users)) != 1 {
            return true;
        }
        let fs: *const u8 = field(task, off!(task_fs));
        fs.is_null() || field::<u32>(fs, off!(fs_users)) != 1
    }
}

/// The `struct file` of a descriptor of the current task, 0 without one, and whether the table of
/// descriptors is shared with other tasks.
#[inline(always)]
pub fn file_of(fd: u32) -> (u64, bool) {
    // SAFETY: members of files_struct and fdtable.
    unsafe {
        let files: *const u8 = field(task(), off!(task_files));
        if files.is_null() {
            return (0, false);
        }
        let shared = field::<u32>(files, off!(files_count)) != 1;
        let table: *const u8 = field(files, off!(files_fdt));
        if table.is_null() || fd >= field::<u32>(table, off!(fdt_max_fds)) {
            return (0, false);
        }
        let array: u64 = field(table, off!(fdt_fd));
        (read(array + fd as u64 * 8), shared)
    }
}

/// What is needed of a `struct file`.
#[derive(Clone, Copy)]
pub struct File {
    pub inode: u64,
    pub dentry: u64,
    pub pos: u64,
    pub flags: u32,
    pub mode: u32,
    pub shared: bool,
}

/// What tells whether a write goes on in the file that is known.
pub struct Seen {
    pub address: u64,
    pub inode: u64,
    pub pos: u64,
    pub flags: u32,
    pub shared: bool,
}

/// Looks at the file of a descriptor of the current task.
///
/// The first descriptors' files stand in the `struct files_struct` until the table grows; the verifier knows their
/// type there if it knows the place, so they are loaded without a helper.
#[inline(always)]
pub fn look(task: *const u8, fd: u32, scratch: &mut Scratch) -> Seen {
    // SAFETY: members of files_struct, fdtable and file.
    unsafe {
        let files: *const u8 = field(task, off!(task_files));
        if !files.is_null() {
            let table: *const u8 = field(files, off!(files_fdt));
            let first = files.add(off!(files_fd_array));
            if !table.is_null() && field::<u64>(table, off!(fdt_fd)) == first as u64 {
                let at = place_of(fd);
                if at < FIRST_DESCRIPTORS as u64 * 8 {
                    let file: *const u8 = field(first, at as usize);
                    return Seen {
                        address: file as u64,
                        inode: field(file, off!(file_inode)),
                        pos: field(file, off!(file_pos)),
                        flags: field(file, off!(file_flags)),
                        shared: field::<u32>(files, off!(files_count)) != 1
                            || field::<u32>(file, off!(file_count)) != off!(file_count_one) as u32,
                    };
                }
            }
        }
    }
    let (address, table_shared) = file_of(fd);
    let file = read_file(scratch, address, table_shared);
    Seen { address, inode: file.inode, pos: file.pos, flags: file.flags, shared: file.shared }
}

/// So many descriptors are looked at without a helper.
const FIRST_DESCRIPTORS: u32 = 8;

/// The place of one of the first descriptors, in bytes, each time as a constant; or one behind them.
#[inline(always)]
fn place_of(fd: u32) -> u64 {
    let mut place = FIRST_DESCRIPTORS as u64 * 8;
    let mut i = 0;
    while i < FIRST_DESCRIPTORS {
        if fd == i {
            place = constant(i as u64 * 8);
        }
        i += 1;
    }
    place
}

/// A value of which the compiler makes nothing else.
#[inline(always)]
fn constant(value: u64) -> u64 {
    let mut value = value;
    // SAFETY: no instruction.
    unsafe { core::arch::asm!("/* {value} */", value = inout(reg) value) };
    value
}

/// Reads a `struct file`.
#[inline(always)]
pub fn read_file(scratch: &mut Scratch, address: u64, table_shared: bool) -> File {
    let block = scratch.file.as_mut_ptr();
    // SAFETY: the block is writable map memory of that size.
    unsafe { bpf_probe_read_kernel(block.cast(), FILE_BLOCK as u32, address as *const _) };
    let users: u32 = at(block, off!(file_count));
    File {
        inode: at(block, off!(file_inode)),
        dentry: at(block, off!(file_path) + off!(path_dentry)),
        pos: at(block, off!(file_pos)),
        flags: at(block, off!(file_flags)),
        mode: at(block, off!(file_mode)),
        shared: table_shared || users != off!(file_count_one) as u32,
    }
}

/// Reads the block of an inode.
#[inline(always)]
fn read_block(block: *mut u64, generation: &mut u32, inode: u64) {
    // SAFETY: the block is writable map memory of that size.
    unsafe { bpf_probe_read_kernel(block.cast(), INODE_BLOCK as u32, inode as *const _) };
    let offset = off!(inode_generation);
    *generation = if offset + 4 <= INODE_BLOCK { at(block, offset) } else { read(inode + offset as u64) };
}

/// Reads the object's inode into the scratch.
#[inline(always)]
pub fn read_inode(scratch: &mut Scratch, inode: u64) {
    read_block(scratch.inode.as_mut_ptr(), &mut scratch.generation[0], inode);
}

/// Reads the inode of a directory into the scratch.
#[inline(always)]
pub fn read_parent(scratch: &mut Scratch, inode: u64) {
    read_block(scratch.parent.as_mut_ptr(), &mut scratch.generation[1], inode);
}

/// The device of the inode in `block`, and whether its file system is btrfs.
#[inline(always)]
fn device(block: *const u64, inode: u64) -> (u32, bool) {
    let sb: u64 = at(block, off!(inode_sb));
    device_of(sb, inode, read(sb + off!(sb_dev) as u64))
}

/// The same, given the inode's super block and that one's number.
#[inline(always)]
pub fn device_of(sb: u64, inode: u64, dev: u32) -> (u32, bool) {
    // A number that is in scope is not that of a btrfs super block: its subvolumes, and only they
    // are ever in scope, have numbers of their own.
    if off!(btrfs_root) as u32 != 0
        && !in_scope(dev)
        && read::<u64>(sb + off!(sb_magic) as u64) == BTRFS_MAGIC
    {
        return (btrfs_device(inode), true);
    }
    (dev, false)
}

/// `btrfs_inode.root->anon_dev`.
#[inline(always)]
fn btrfs_device(inode: u64) -> u32 {
    let root: u64 = read(inode.wrapping_add(off!(btrfs_root) as u32 as i32 as i64 as u64));
    read(root + off!(btrfs_anon_dev) as u64)
}

/// The device of the object in the scratch.
#[inline(always)]
pub fn object_device(scratch: &Scratch, inode: u64) -> (u32, bool) {
    device(scratch.inode.as_ptr(), inode)
}

/// The device of the directory in the scratch.
#[inline(always)]
pub fn parent_device(scratch: &Scratch, inode: u64) -> (u32, bool) {
    device(scratch.parent.as_ptr(), inode)
}

/// The device of the directory in the scratch when the object in the scratch is of device `known`:
/// both are of one super block, which on btrfs has many devices.
#[inline(always)]
pub fn parent_device_like(inode: u64, known: u32, btrfs: bool) -> u32 {
    if off!(btrfs_root) as u32 != 0 && btrfs { btrfs_device(inode) } else { known }
}

/// The super block of the object in the scratch.
#[inline(always)]
pub fn object_sb(scratch: &Scratch) -> u64 {
    at(scratch.inode.as_ptr(), off!(inode_sb))
}

/// Identity of the object in the scratch.
#[inline(always)]
pub fn object_id(scratch: &Scratch, dev: u32) -> InodeId {
    InodeId { ino: at(scratch.inode.as_ptr(), off!(inode_ino)), dev, generation: scratch.generation[0] }
}

/// Identity of the directory in the scratch.
#[inline(always)]
pub fn parent_id(scratch: &Scratch, dev: u32) -> InodeId {
    InodeId { ino: at(scratch.parent.as_ptr(), off!(inode_ino)), dev, generation: scratch.generation[1] }
}

/// `i_size` of the object in the scratch.
#[inline(always)]
pub fn object_size(scratch: &Scratch) -> u64 {
    at(scratch.inode.as_ptr(), off!(inode_size))
}

/// `i_nlink` of the object in the scratch.
#[inline(always)]
pub fn object_links(scratch: &Scratch) -> u32 {
    at(scratch.inode.as_ptr(), off!(inode_nlink))
}

/// Whether the object in the scratch is a regular file.
#[inline(always)]
pub fn object_is_file(scratch: &Scratch) -> bool {
    u32::from(at::<u16>(scratch.inode.as_ptr(), off!(inode_mode))) & S_IFMT == S_IFREG
}

/// Whether the object in the scratch is a FIFO.
#[inline(always)]
pub fn object_is_fifo(scratch: &Scratch) -> bool {
    u32::from(at::<u16>(scratch.inode.as_ptr(), off!(inode_mode))) & S_IFMT == S_IFIFO
}

/// Whether the object in the scratch is a regular file or a directory.
#[inline(always)]
pub fn object_is_followed(scratch: &Scratch) -> bool {
    let kind = u32::from(at::<u16>(scratch.inode.as_ptr(), off!(inode_mode))) & S_IFMT;
    kind == S_IFREG || kind == S_IFDIR
}

/// The attributes in a block.
#[inline(always)]
fn attr(to: &mut InodeAttr, block: *const u64, generation: u32, dev: u32) {
    to.id.ino = at(block, off!(inode_ino));
    to.id.dev = dev;
    to.id.generation = generation;
    to.size = at(block, off!(inode_size));
    to.mtime_sec = at(block, off!(inode_mtime_sec));
    to.mtime_nsec = at(block, off!(inode_mtime_nsec));
    to.mode = u32::from(at::<u16>(block, off!(inode_mode)));
    to.uid = at(block, off!(inode_uid));
    to.gid = at(block, off!(inode_gid));
    to.nlink = at(block, off!(inode_nlink));
    to.reserved = 0;
}

/// The attributes of the object in the scratch go into `to`.
#[inline(always)]
pub fn object_attr_to(to: &mut InodeAttr, scratch: &Scratch, dev: u32) {
    attr(to, scratch.inode.as_ptr(), scratch.generation[0], dev);
}

/// The attributes of the object in the scratch go into the file record.
#[inline(always)]
pub fn object_attr(scratch: &mut Scratch, dev: u32) {
    attr(&mut scratch.file_record.event.attr, scratch.inode.as_ptr(), scratch.generation[0], dev);
}

/// The attributes of the directory in the scratch go into the file record.
#[inline(always)]
pub fn parent_attr(scratch: &mut Scratch, dev: u32) {
    attr(&mut scratch.file_record.event.parent, scratch.parent.as_ptr(), scratch.generation[1], dev);
}

/// The attributes of the object in the scratch go into the path record, as those of the second or
/// of the first base.
#[inline(always)]
pub fn base_attr(scratch: &mut Scratch, second: bool, dev: u32) {
    let event = &mut scratch.path_record.event;
    let to = if second { &mut event.base2 } else { &mut event.base1 };
    attr(to, scratch.inode.as_ptr(), scratch.generation[0], dev);
}

/// A name in its directory, as the dentry has it.
#[derive(Clone, Copy)]
pub struct Name {
    /// Inode of the directory.
    pub parent: u64,
    /// Address of the name.
    pub address: u64,
    /// Bytes of the name.
    pub len: u32,
}

impl Name {
    /// No name.
    pub const NONE: Self = Self { parent: 0, address: 0, len: 0 };
}

/// Reads a dentry.
#[inline(always)]
pub fn read_dentry(scratch: &mut Scratch, dentry: u64) -> Name {
    let block = scratch.dentry.as_mut_ptr();
    // SAFETY: the block is writable map memory of that size.
    unsafe { bpf_probe_read_kernel(block.cast(), DENTRY_BLOCK as u32, dentry as *const _) };
    let parent: u64 = at(block, off!(dentry_parent));
    Name {
        parent: read(parent + off!(dentry_inode) as u64),
        address: at(block, off!(dentry_name) + off!(qstr_name)),
        len: at(block, off!(dentry_name) + off!(qstr_len)),
    }
}

/// The inode of the working directory (or of the root directory) of the current task.
#[inline(always)]
pub fn directory(root: bool) -> u64 {
    // SAFETY: members of the task and of its fs_struct.
    let fs = unsafe { field::<*const u8>(task(), off!(task_fs)) } as u64;
    let path = if root { off!(fs_root) } else { off!(fs_pwd) };
    let dentry: u64 = read(fs + (path + off!(path_dentry)) as u64);
    read(dentry + off!(dentry_inode) as u64)
}

/// Number of the current task's mount namespace.
#[inline(always)]
pub fn mount_namespace() -> u32 {
    let proxy: u64 = read(task() as u64 + off!(task_nsproxy) as u64);
    let mounts: u64 = read(proxy + off!(nsproxy_mounts) as u64);
    read(mounts + off!(mounts_number) as u64)
}

/// Whether a device has subtrees in scope.
#[inline(always)]
pub fn in_scope(dev: u32) -> bool {
    let mut i = 0;
    while i < DEVICES_MAX {
        let device = setting!(devices, i);
        if device == 0 {
            break;
        }
        if device == dev {
            return true;
        }
        i += 1;
    }
    came_later(dev) != 0
}

/// The same of those that came while the probes ran. Not a part of the caller: the first look mostly finds it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn came_later(dev: u32) -> i32 {
    let Some(devices) = DEVICES.get(0) else { return 0 };
    let mut i = 0;
    while i < DEVICES_MAX {
        // SAFETY: within the array. The agent may be writing it: one number is written at once.
        let device = unsafe { core::ptr::read_volatile(&raw const devices[i]) };
        if device == 0 {
            return 0;
        }
        if device == dev {
            return 1;
        }
        i += 1;
    }
    0
}
