//! Records of calls on a descriptor: [`FileEvent`], the dentry's name, the bytes of a small write.
//!
//! A record is put together in the scratch. Small ones are copied into the ring as they are; the
//! data of larger writes goes from the program's memory into the ring directly.

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_probe_read_kernel, bpf_probe_read_user};
use bfs_common::abi::{EventHeader, FileEvent, InodeAttr, NAME_MAX, counter, flag};

use crate::maps::{NO_WAKEUP, RING, SMALL_DATA, Scratch, count, name_suspect, output};

/// Bytes of data that travel in the record itself; more go ahead in chunks.
pub const DATA_IN_RECORD: u64 = 16_384;

#[repr(C)]
struct Record<const D: usize> {
    event: FileEvent,
    data: [u8; D],
}

/// A value that the compiler must load again, so that a bound tested here is one that the verifier
/// sees.
#[inline(always)]
pub fn opaque(value: &u32) -> u32 {
    // SAFETY: a reference is readable.
    unsafe { core::ptr::read_volatile(value) }
}

/// Sets attributes to "nothing known".
pub const NO_ATTR: InodeAttr = InodeAttr {
    id: bfs_common::abi::InodeId::NONE,
    size: 0,
    mtime_sec: 0,
    mtime_nsec: 0,
    mode: 0,
    uid: 0,
    gid: 0,
    nlink: 0,
    reserved: 0,
};

/// A header; the length is filled in last.
#[inline(always)]
pub fn header(
    kind: u16,
    flags: u16,
    nr: u32,
    start_ns: u64,
    end_ns: u64,
    ret: i64,
    pid_tgid: u64,
) -> EventHeader {
    EventHeader {
        len: 0,
        kind,
        flags,
        start_ns,
        end_ns,
        tid: pid_tgid as u32,
        tgid: (pid_tgid >> 32) as u32,
        nr,
        read_ns: 0,
        ret,
    }
}

/// Everything that the record tells was read by now (but the data of a write, which nobody else
/// can change).
#[inline(always)]
pub fn stamp(header: &mut EventHeader) {
    // SAFETY: a helper without arguments.
    header.read_ns = unsafe { bpf_ktime_get_ns() }.wrapping_sub(header.end_ns) as u32;
}

/// Puts the name at `address` behind the event in the scratch.
#[inline(always)]
pub fn name(scratch: &mut Scratch, address: u64, len: u32) {
    let len = if len > NAME_MAX as u32 { 0 } else { len };
    // SAFETY: the scratch has room for a name.
    let read = unsafe {
        bpf_probe_read_kernel((&raw mut scratch.file_record.bytes).cast(), len, address as *const _)
    };
    scratch.file_record.event.name_len = if read < 0 { 0 } else { len };
}

/// Puts the record in the scratch into the ring; where there is no room, the object is named as
/// suspect.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn emit_file(scratch: *mut Scratch) -> i32 {
    if scratch.is_null() {
        return 0;
    }
    // SAFETY: the verifier checks the pointer that the probe hands in.
    let scratch = unsafe { &mut *scratch };
    stamp(&mut scratch.file_record.event.header);
    let sent = match scratch.data_len {
        ..=128 => send_small(scratch),
        ..=1024 => send::<1024>(scratch),
        ..=4096 => send::<4096>(scratch),
        _ => send::<{ DATA_IN_RECORD as usize }>(scratch),
    };
    if sent {
        count(counter::RECORDS);
    } else {
        name_suspect(scratch);
    }
    0
}

/// Puts the record in the scratch into the ring.
#[inline(always)]
pub fn emit(scratch: &mut Scratch) {
    emit_file(scratch);
}

/// The data could not be read: it is to be read from the file.
#[inline(always)]
fn unreadable(event: &mut FileEvent) {
    count(counter::USER_UNREADABLE);
    event.header.flags = event.header.flags & !flag::INLINE | flag::BY_REFERENCE;
    event.data_len = 0;
}

#[inline(always)]
fn send_small(scratch: &mut Scratch) -> bool {
    let name_len = opaque(&scratch.file_record.event.name_len) & 0xff;
    let mut data_len = opaque(&scratch.data_len);
    if data_len > SMALL_DATA as u32 {
        data_len = 0;
    }
    scratch.file_record.event.data_len = data_len;
    if data_len > 0 {
        // SAFETY: behind the longest name there is room for that much data.
        let read = unsafe {
            let to = (&raw mut scratch.file_record.bytes).cast::<u8>().add(name_len as usize);
            bpf_probe_read_user(to.cast(), data_len, scratch.data as *const _)
        };
        if read < 0 {
            unreadable(&mut scratch.file_record.event);
            data_len = 0;
        }
    }
    let len = size_of::<FileEvent>() as u32 + name_len + data_len;
    scratch.file_record.event.header.len = len;
    // SAFETY: part of the scratch, and within its size.
    unsafe { output(&raw const scratch.file_record, len) }
}

/// Only writes have data, and their records have no name.
#[inline(always)]
fn send<const D: usize>(scratch: &mut Scratch) -> bool {
    let Some(mut entry) = RING.reserve::<Record<D>>(0) else {
        return false;
    };
    let record = entry.as_mut_ptr();
    let mut len = opaque(&scratch.data_len);
    if len > D as u32 {
        len = D as u32;
    }
    scratch.file_record.event.name_len = 0;
    scratch.file_record.event.data_len = len;
    // SAFETY: the record was reserved; its event is written, and bytes that were not written are
    // not counted in its length.
    unsafe {
        if bpf_probe_read_user((&raw mut (*record).data).cast(), len, scratch.data as *const _) < 0 {
            unreadable(&mut scratch.file_record.event);
            len = 0;
        }
        scratch.file_record.event.header.len = size_of::<FileEvent>() as u32 + len;
        (*record).event = scratch.file_record.event;
    }
    entry.submit(NO_WAKEUP);
    true
}
