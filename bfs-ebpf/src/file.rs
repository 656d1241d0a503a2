//! Records of calls on a descriptor: [`FileEvent`] with the dentry's name, [`WriteEvent`] with the bytes of a
//! small write.
//!
//! A record is put together in the scratch. Small ones are copied into the ring as they are; the
//! data of larger writes goes from the program's memory into the ring directly.

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_probe_read_kernel, bpf_probe_read_user};
use bfs_common::abi::{EventHeader, FileEvent, InodeAttr, NAME_MAX, WriteEvent, counter, flag, kind};

use crate::{
    kernel,
    maps::{NO_WAKEUP, RING, SMALL_DATA, Scratch, count, name_suspect, output},
};

/// Bytes of data that travel in the record itself; more go ahead in chunks.
pub const DATA_IN_RECORD: u64 = 16_384;

#[repr(C)]
struct Record {
    event: WriteEvent,
    data: [u8; DATA_IN_RECORD as usize],
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
    // Also bounded by a mask: before 6.2 the verifier forgets a comparison when the value is fetched again.
    let len = opaque(&if len > NAME_MAX as u32 { 0 } else { len }) & NAME_MAX as u32;
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
    let name_len = opaque(&scratch.file_record.event.name_len) & 0xff;
    let len = size_of::<FileEvent>() as u32 + name_len;
    scratch.file_record.event.header.len = len;
    // SAFETY: part of the scratch, and within its size.
    sent(scratch, unsafe { output(&raw const scratch.file_record, len) });
    0
}

/// The same for a write whose place is known, with its data; the caller has stamped it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn emit_written(scratch: *mut Scratch) -> i32 {
    if scratch.is_null() {
        return 0;
    }
    // SAFETY: the verifier checks the pointer that the probe hands in.
    let scratch = unsafe { &mut *scratch };
    let event = &mut scratch.file_record.event;
    event.header.kind = kind::WRITE;
    // From here on it is a `WriteEvent`, whose offset stands here (asserted beside it).
    event.parent.id.ino = event.file_offset;
    let mut done =
        if scratch.data_len <= SMALL_DATA as u32 { send_small(scratch) } else { send_large(scratch) };
    if !done && scratch.data_len > 0 {
        // There may be room for the record without its data.
        by_reference(&mut scratch.file_record.event);
        scratch.file_record.event.header.flags |= flag::DATA_LOST;
        count(counter::DATA_LOST);
        scratch.data_len = 0;
        done = send_small(scratch);
    }
    sent(scratch, done);
    0
}

/// Puts the record of a write of the object in the scratch into the ring, whose data is to be read from the
/// file; where there is no room, the object is named as suspect.
#[inline(always)]
pub fn emit_bare_write(scratch: &mut Scratch, header: EventHeader, dev: u32, offset: u64) {
    let Some(mut entry) = RING.reserve::<WriteEvent>(0) else {
        kernel::object_attr(scratch, dev);
        scratch.file_record.event.header = header;
        name_suspect(scratch);
        return;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: the record was reserved; every field is written.
    unsafe {
        (*event).header = EventHeader { len: size_of::<WriteEvent>() as u32, ..header };
        kernel::object_attr_to(&mut (*event).attr, scratch, dev);
        (*event).file_offset = offset;
    }
    entry.submit(NO_WAKEUP);
    count(counter::WENT_ON);
}

#[inline(always)]
fn sent(scratch: &mut Scratch, done: bool) {
    if done {
        count(counter::RECORDS);
    } else {
        name_suspect(scratch);
    }
}

/// Puts the record in the scratch into the ring.
#[inline(always)]
pub fn emit(scratch: &mut Scratch) {
    emit_file(scratch);
}

/// Puts the record in the scratch into the ring, as that of a write whose place is known.
#[inline(always)]
pub fn emit_write(scratch: &mut Scratch) {
    emit_written(scratch);
}

/// The data is to be read from the file.
#[inline(always)]
fn by_reference(event: &mut FileEvent) {
    event.header.flags = event.header.flags & !flag::INLINE | flag::BY_REFERENCE;
}

/// The data could not be read.
#[inline(always)]
fn unreadable(event: &mut FileEvent) {
    count(counter::USER_UNREADABLE);
    by_reference(event);
}

#[inline(always)]
fn send_small(scratch: &mut Scratch) -> bool {
    // A mask, because the compiler turns a comparison into one that the verifier does not understand.
    let mut data_len = opaque(&scratch.data_len) & SMALL_DATA as u32;
    if data_len > 0 {
        // SAFETY: behind the head there is room for that much data.
        let read = unsafe {
            let to = (&raw mut scratch.file_record).cast::<u8>().add(size_of::<WriteEvent>());
            bpf_probe_read_user(to.cast(), data_len, scratch.data as *const _)
        };
        if read < 0 {
            unreadable(&mut scratch.file_record.event);
            data_len = 0;
        }
    }
    let len = size_of::<WriteEvent>() as u32 + data_len;
    scratch.file_record.event.header.len = len;
    // SAFETY: part of the scratch, and within its size.
    unsafe { output(&raw const scratch.file_record, len) }
}

#[inline(always)]
fn send_large(scratch: &mut Scratch) -> bool {
    let Some(mut entry) = RING.reserve::<Record>(0) else {
        return false;
    };
    let record = entry.as_mut_ptr();
    let mut len = opaque(&scratch.data_len);
    if len > DATA_IN_RECORD as u32 {
        len = DATA_IN_RECORD as u32;
    }
    // SAFETY: the record was reserved; its event is written, and bytes that were not written are
    // not counted in its length.
    unsafe {
        if bpf_probe_read_user((&raw mut (*record).data).cast(), len, scratch.data as *const _) < 0 {
            unreadable(&mut scratch.file_record.event);
            len = 0;
        }
        scratch.file_record.event.header.len = size_of::<WriteEvent>() as u32 + len;
        (*record).event = (&raw const scratch.file_record).cast::<WriteEvent>().read();
    }
    entry.submit(NO_WAKEUP);
    true
}
