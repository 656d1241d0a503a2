//! Writes: where the bytes landed, and whether a copy of the buffer is what the file got.

use aya_ebpf::helpers::generated::{bpf_find_vma, bpf_loop, bpf_probe_read_user};
use bfs_common::abi::{DataEvent, EventHeader, TaskState, counter, flag, kind, slot};

use crate::{
    calls::nr,
    file::{DATA_IN_RECORD, opaque},
    kernel::{self, File, read},
    maps::{FOREIGN_STORES, NO_WAKEUP, RING, Scratch, count, off, setting},
};

/// `include/uapi/asm-generic/fcntl.h`
pub const O_APPEND: u32 = 0o2_000;
/// `include/uapi/linux/fs.h`
const RWF_APPEND: u32 = 0x10;
const RWF_NOAPPEND: u32 = 0x20;
/// `include/linux/mm.h`: `VM_SHARED`, `VM_PFNMAP`, `VM_IO`, `VM_MIXEDMAP`.
const VM_NOT_PRIVATE: u64 = 0x8 | 0x400 | 0x4000 | 0x1000_0000;

/// Bytes of the largest [`DataEvent`] record's data.
const CHUNK: usize = 32_768;
/// Vectors of more buffers than this go by reference.
const VECTORS_MAX: u64 = 8;
/// Steps of the loop over chunks; bounds the largest write that is copied.
const STEPS_MAX: u32 = 80;

/// Fills in where a successful write landed; the flags with what was found.
#[inline(always)]
pub fn place(scratch: &mut Scratch, state: &TaskState, file: &File, flags: u16) -> u16 {
    let event = &mut scratch.file_record.event;
    let mut flags = flags;
    let number = event.header.nr;
    let written = event.header.ret as u64;
    let size = event.attr.size;
    event.count = written;
    let rwf = if number == nr::PWRITEV2 { state.args[5] as u32 } else { 0 };
    let append = state.flags & slot::APPEND != 0;
    let appends = (append || rwf & RWF_APPEND != 0) && rwf & RWF_NOAPPEND == 0;
    let positioned = match number {
        nr::PWRITE64 | nr::PWRITEV => true,
        nr::PWRITEV2 => state.args[3] != u64::MAX,
        _ => false,
    };
    if appends {
        flags |= flag::APPEND;
    }
    if append != (file.flags & O_APPEND != 0) {
        // F_SETFL came in between.
        flags |= flag::OFFSET_UNKNOWN;
    } else if appends {
        if flags & flag::SHARED_FILE == 0 && !positioned {
            event.file_offset = file.pos.wrapping_sub(written);
        } else if state.size + written == size {
            event.file_offset = state.size;
        } else {
            flags |= flag::OFFSET_UNKNOWN;
            if size > state.size {
                event.range_start = state.size;
                event.range_end = size;
            }
        }
    } else if positioned {
        event.file_offset = state.args[3];
    } else if state.pos + written == file.pos {
        event.file_offset = state.pos;
    } else {
        flags |= flag::OFFSET_UNKNOWN;
    }
    flags
}

struct Area {
    start: u64,
    end: u64,
}

extern "C" fn on_vma(_task: *mut u8, vma: *mut u8, area: *mut Area) -> i64 {
    let vma = vma as u64;
    let flags: u64 = read(vma + off!(vma_flags) as u64);
    let file: u64 = read(vma + off!(vma_file) as u64);
    if flags & VM_NOT_PRIVATE == 0 && file == 0 {
        // SAFETY: the context that was handed to bpf_find_vma.
        unsafe {
            (*area).start = read(vma + off!(vma_start) as u64);
            (*area).end = read(vma + off!(vma_end) as u64);
        }
    }
    0
}

/// Whether `start .. start + len` is private anonymous memory; remembers the area that it lies in.
#[inline(always)]
fn is_private(state: &mut TaskState, start: u64, len: u64) -> bool {
    let end = start.wrapping_add(len);
    if end < start {
        return false;
    }
    if start >= state.private_start && end <= state.private_end {
        return true;
    }
    let mut area = Area { start: 0, end: 0 };
    // SAFETY: the callback has the signature that the helper asks for.
    unsafe {
        bpf_find_vma(
            kernel::task() as *mut _,
            start,
            on_vma as *mut core::ffi::c_void,
            (&raw mut area).cast(),
            0,
        );
    }
    state.private_start = area.start;
    state.private_end = area.end;
    start >= area.start && end <= area.end
}

/// Decides how the data travels, and sends what goes ahead of the record.
///
/// Inline is exact only where nobody but this task could change the buffer between the kernel's
/// copy and ours: one user of the memory, no io_uring or AIO that may store into it, nobody who
/// writes into other processes, and pages that no mapping shares.
#[inline(always)]
pub fn data(scratch: &mut Scratch, state: &mut TaskState) {
    let total = scratch.file_record.event.header.ret as u64;
    // SAFETY: a global word; it only ever goes from 0 to 1.
    let foreign = unsafe { core::ptr::read_volatile(&raw const FOREIGN_STORES) };
    let mut inline = false;
    if total <= u64::from(setting!(inline_max)) && foreign == 0 && !kernel::memory_is_shared() {
        let (start, end) = (state.args[1], state.args[1].wrapping_add(total));
        let number = scratch.file_record.event.header.nr;
        let plain = matches!(number, nr::WRITE | nr::PWRITE64) && total <= DATA_IN_RECORD;
        // The usual case: a small write out of the area that the last one came from.
        if plain && start >= state.private_start && end <= state.private_end && start < end {
            scratch.data = start;
            scratch.data_len = total as u32;
            inline = true;
        } else {
            inline = write_data(scratch, state) != 0;
        }
    }
    if inline {
        scratch.file_record.event.header.flags |= flag::INLINE;
        count(counter::INLINE);
    } else {
        scratch.file_record.event.header.flags |= flag::BY_REFERENCE;
        count(counter::BY_REFERENCE);
    }
}

/// Whether the data goes inline; sends what goes ahead of the record.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn write_data(scratch: *mut Scratch, state: *mut TaskState) -> i32 {
    if scratch.is_null() || state.is_null() {
        return 0;
    }
    // SAFETY: the verifier checks the pointers that the probe hands in.
    let (scratch, state) = unsafe { (&mut *scratch, &mut *state) };
    let header = scratch.file_record.event.header;
    let total = header.ret as u64;
    let mut buffer = [state.args[1], total];
    let mut vectors = 1;
    if !matches!(header.nr, nr::WRITE | nr::PWRITE64) {
        vectors = state.args[2];
        // Those of 32-bit programs are of another size.
        if state.flags & slot::COMPAT != 0
            || vectors == 0
            || vectors > VECTORS_MAX
            || !read_vector(&mut buffer, state.args[1])
        {
            return 0;
        }
        if vectors == 1 {
            buffer[1] = total;
        }
    }
    if !is_private(state, buffer[0], buffer[1]) {
        return 0;
    }
    if vectors == 1 && total <= DATA_IN_RECORD {
        scratch.data = buffer[0];
        scratch.data_len = total as u32;
        return 1;
    }
    scratch.chunks = Chunks {
        header,
        flags: 0,
        size: 0,
        base: buffer[0],
        left: buffer[1],
        vector: if vectors == 1 { 0 } else { state.args[1] + 16 },
        vectors: vectors - 1,
        offset: 0,
        total,
        private_start: state.private_start,
        private_end: state.private_end,
    };
    // SAFETY: the callback has the signature that the helper asks for.
    unsafe {
        let mut chunks = &raw mut scratch.chunks;
        bpf_loop(STEPS_MAX, step as *mut core::ffi::c_void, (&raw mut chunks).cast(), 0);
    }
    if scratch.chunks.offset != total {
        scratch.file_record.event.header.flags |= scratch.chunks.flags as u16;
        return 0;
    }
    1
}

/// Reads a `struct iovec`.
#[inline(always)]
fn read_vector(vector: &mut [u64; 2], address: u64) -> bool {
    // SAFETY: the target has the size of a struct iovec.
    unsafe { bpf_probe_read_user((&raw mut *vector).cast(), 16, address as *const _) >= 0 }
}

/// Where the loop over the chunks of a write stands.
///
/// It lives in a map: what is on the stack the verifier follows value by value through the loop,
/// without end.
#[repr(C)]
pub struct Chunks {
    header: EventHeader,
    flags: u32,
    size: u32,
    base: u64,
    left: u64,
    vector: u64,
    vectors: u64,
    offset: u64,
    total: u64,
    private_start: u64,
    private_end: u64,
}

extern "C" fn step(_index: u32, chunks: *mut *mut Chunks) -> i64 {
    // SAFETY: the context that was handed to bpf_loop.
    let chunks = unsafe { &mut **chunks };
    if chunks.left == 0 {
        let mut vector = [0; 2];
        if chunks.vectors == 0 || !read_vector(&mut vector, chunks.vector) {
            return 1;
        }
        chunks.vectors -= 1;
        chunks.vector += 16;
        chunks.base = vector[0];
        chunks.left = vector[1];
        if chunks.left == 0 {
            return 0;
        }
        let end = chunks.base.wrapping_add(chunks.left);
        if chunks.base < chunks.private_start || end > chunks.private_end || end < chunks.base {
            return 1;
        }
    }
    let mut take = chunks.total - chunks.offset;
    if take > chunks.left {
        take = chunks.left;
    }
    if take > CHUNK as u64 {
        take = CHUNK as u64;
    }
    chunks.size = take as u32;
    let sent = if take <= 512 {
        send::<512>(chunks)
    } else if take <= 4096 {
        send::<4096>(chunks)
    } else {
        send::<CHUNK>(chunks)
    };
    if !sent {
        return 1;
    }
    chunks.offset += take;
    chunks.base += take;
    chunks.left -= take;
    i64::from(chunks.offset >= chunks.total)
}

#[repr(C)]
struct Record<const D: usize> {
    event: DataEvent,
    data: [u8; D],
}

#[inline(always)]
fn send<const D: usize>(chunks: &mut Chunks) -> bool {
    let Some(mut entry) = RING.reserve::<Record<D>>(0) else {
        chunks.flags = u32::from(flag::DATA_LOST);
        count(counter::DATA_LOST);
        return false;
    };
    let record = entry.as_mut_ptr();
    let mut len = opaque(&chunks.size);
    if len as usize > D {
        len = D as u32;
    }
    // SAFETY: the record was reserved; every field of the event is written.
    unsafe {
        if bpf_probe_read_user((&raw mut (*record).data).cast(), len, chunks.base as *const _) < 0 {
            entry.discard(NO_WAKEUP);
            count(counter::USER_UNREADABLE);
            return false;
        }
        let event = &raw mut (*record).event;
        let len_all = size_of::<DataEvent>() as u32 + len;
        (*event).header = EventHeader { len: len_all, kind: kind::DATA, flags: 0, ret: 0, ..chunks.header };
        (*event).offset = chunks.offset;
        (*event).data_len = len;
        (*event).reserved = 0;
    }
    entry.submit(NO_WAKEUP);
    count(counter::RECORDS);
    true
}
