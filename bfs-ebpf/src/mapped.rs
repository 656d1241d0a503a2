//! Files that are mapped, shared and writable: which of their pages become dirty, and whether a mapping is left.
//!
//! Where the file system has to know of a store before it happens (`page_mkwrite`: ext4, xfs, btrfs), a store
//! into a clean page faults, and the folio is marked dirty before the page can be written
//! (`__folio_mark_dirty` in mm/page-writeback.c). It stays writable, and silent, until it is cleaned: then
//! the kernel takes the right to write away first (`folio_clear_dirty_for_io`).

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid,
    generated::{bpf_find_vma, bpf_ktime_get_ns},
};
use bfs_common::abi::{DirtyEvent, EventHeader, InodeAttr, counter, kind};

use crate::{
    file,
    kernel::{self, field, read},
    maps::{MAPPED, NO_WAKEUP, RING, SCRATCH, SCRATCH_DIRTIED, Scratch, count, name_suspect, off},
};

const PAGE_SHIFT: u64 = 12;
/// No folio is larger, and each is aligned to its size (`MAX_PAGECACHE_ORDER`, include/linux/pagemap.h).
const WINDOW_PAGES: u64 = 512;

/// `writeback_dirty_folio(folio, mapping)`: with interrupts off and the lock of the mapping held.
#[inline(always)]
pub fn dirtied(folio: *const u8, mapping: *const u8) {
    if mapping.is_null() {
        return;
    }
    // SAFETY: a pointer member of a struct address_space, which the verifier knows.
    let inode = unsafe { field::<*const u8>(mapping, off!(mapping_host)) } as u64;
    let Some(scratch) = SCRATCH.get_ptr_mut(SCRATCH_DIRTIED) else {
        return;
    };
    // SAFETY: this CPU's entry of this hook.
    let scratch = unsafe { &mut *scratch };
    kernel::read_inode(scratch, inode);
    let (dev, _) = kernel::object_device(scratch, inode);
    if !kernel::in_scope(dev) {
        return;
    }
    let id = kernel::object_id(scratch, dev);
    // SAFETY: a word that only the agent writes.
    if unsafe { MAPPED.get(&id) }.is_none_or(|followed| *followed == 0) {
        return;
    }
    scratch.file_record.event.attr = InodeAttr { id, ..file::NO_ATTR };
    // SAFETY: members of a struct folio, which the verifier knows.
    let (flags, index) = unsafe { (field::<u64>(folio, 0), field::<u64>(folio, off!(folio_index))) };
    let (mut first, mut pages) = (index, 1);
    if off!(folio_pages) == 0 {
        pages = 0;
    } else if flags >> (off!(folio_head) & 63) & 1 != 0 {
        pages = u64::from(read::<u32>(folio as u64 + off!(folio_pages) as u64));
    }
    if pages == 0 || pages > WINDOW_PAGES {
        first = index & !(WINDOW_PAGES - 1);
        pages = WINDOW_PAGES;
    }
    emit(scratch, first << PAGE_SHIFT, pages << PAGE_SHIFT);
}

#[inline(always)]
fn emit(scratch: &mut Scratch, offset: u64, len: u64) {
    let pid_tgid = bpf_get_current_pid_tgid();
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let header = EventHeader {
        len: size_of::<DirtyEvent>() as u32,
        ..file::header(kind::DIRTIED, 0, u32::MAX, now, now, 0, pid_tgid)
    };
    let id = scratch.file_record.event.attr.id;
    match RING.reserve::<DirtyEvent>(0) {
        Some(mut entry) => {
            *entry = core::mem::MaybeUninit::new(DirtyEvent { header, id, offset, len });
            entry.submit(NO_WAKEUP);
            count(counter::RECORDS);
        }
        None => {
            scratch.file_record.event.header.end_ns = now;
            name_suspect(scratch);
        }
    }
}

struct Area {
    end: u64,
    file: u64,
}

extern "C" fn on_area(_task: *mut u8, vma: *mut u8, area: *mut Area) -> i64 {
    let vma = vma as u64;
    // SAFETY: the context that was handed to bpf_find_vma.
    unsafe {
        (*area).end = read(vma + off!(vma_end) as u64);
        (*area).file = read(vma + off!(vma_file) as u64);
    }
    0
}

/// The `struct file` that is mapped at a range of addresses of the current task, if all of it is one area and the
/// kernel tells: it does not while another thread changes the memory map.
#[inline(always)]
pub fn file_at(address: u64, len: u64) -> u64 {
    let mut area = Area { end: 0, file: 0 };
    // SAFETY: the callback has the signature that the helper asks for.
    unsafe {
        bpf_find_vma(
            kernel::task() as *mut _,
            address,
            on_area as *mut core::ffi::c_void,
            (&raw mut area).cast(),
            0,
        );
    }
    if address.wrapping_add(len) > area.end { 0 } else { area.file }
}

/// How many mappings through which the file of a descriptor of the current task may be written there are, in
/// whatever process, and one more; 0 where that cannot be told.
///
/// `i_mmap_writable` counts the areas that are shared and may be made writable; it falls when their pages
/// have been taken out of the page tables (`unlink_file_vma` after `unmap_vmas`, mm/memory.c).
#[inline(always)]
pub fn writable(descriptor: u32) -> i32 {
    let inode = kernel::inode_of(descriptor);
    if inode == 0 {
        return 0;
    }
    let mapping: u64 = read(inode + off!(inode_mapping) as u64);
    if mapping == 0 {
        return 0;
    }
    let count: i32 = read(mapping + off!(mapping_writable) as u64);
    // Below 0: writable mappings are denied.
    if count < 0 { 1 } else { count.saturating_add(1) }
}
