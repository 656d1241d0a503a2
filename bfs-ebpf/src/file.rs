//! Records of calls on a descriptor: [`FileEvent`], the dentry's name, the bytes of a small write.

use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_probe_read_user};
use bfs_common::abi::{FileEvent, InodeId, NAME_MAX, counter, flag};

use crate::{
    kernel,
    maps::{RING, Scratch, count, suspect},
};

/// `BPF_RB_NO_WAKEUP`: the agent polls, because a wakeup costs more than a record.
pub const NO_WAKEUP: u64 = 1;

/// Bytes of data that travel in the record itself; more go ahead in chunks.
pub const DATA_IN_RECORD: u64 = 16_384;

/// What goes into a [`FileEvent`]; the attributes come from the scratch.
#[derive(Clone, Copy)]
pub struct Out {
    pub kind: u16,
    pub flags: u16,
    pub nr: u32,
    pub start_ns: u64,
    pub end_ns: u64,
    pub ret: i64,
    pub pid_tgid: u64,
    /// Identity of the object, also where its attributes are not known.
    pub id: InodeId,
    /// The scratch holds the object's attributes.
    pub has_attr: bool,
    /// The scratch holds the directory's attributes.
    pub has_parent: bool,
    pub parent_dev: u32,
    pub file: u64,
    pub f_flags: u32,
    pub f_mode: u32,
    pub file_offset: u64,
    pub count: u64,
    pub range_start: u64,
    pub range_end: u64,
    pub name: u64,
    pub name_len: u32,
    /// Bytes at `data` that travel in the record.
    pub data_len: u32,
    /// Address in user memory.
    pub data: u64,
}

#[repr(C)]
struct Record<const N: usize, const D: usize> {
    event: FileEvent,
    name: [u8; N],
    data: [u8; D],
}

/// A value that the compiler must load again, so that a bound tested here is one that the verifier
/// sees.
#[inline(always)]
pub fn opaque(value: &u32) -> u32 {
    // SAFETY: a reference is readable.
    unsafe { core::ptr::read_volatile(value) }
}

/// Puts the record into the ring; where there is no room, the object is named as suspect.
#[inline(never)]
pub fn emit(out: &mut Out, scratch: &mut Scratch) -> i64 {
    if out.name_len > NAME_MAX as u32 {
        out.name_len = 0;
    }
    let sent = match (out.name_len, out.data_len) {
        (..=64, 0) => send::<64, 0>(out, scratch),
        (..=64, ..=128) => send::<64, 128>(out, scratch),
        (_, ..=256) => send::<256, 256>(out, scratch),
        (_, ..=1024) => send::<256, 1024>(out, scratch),
        (_, ..=4096) => send::<256, 4096>(out, scratch),
        _ => send::<256, { DATA_IN_RECORD as usize }>(out, scratch),
    };
    if sent {
        count(counter::RECORDS);
    } else {
        suspect(&out.id, out.end_ns);
    }
    0
}

#[inline(always)]
fn send<const N: usize, const D: usize>(out: &mut Out, scratch: &mut Scratch) -> bool {
    let Some(mut entry) = RING.reserve::<Record<N, D>>(0) else {
        return false;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the record was reserved; every field of the event is written, and the bytes behind
    // it that were not written are not counted in its length.
    unsafe {
        let event = &raw mut (*record).event;
        let bytes = (&raw mut (*record).name).cast::<u8>();
        let mut name_len = opaque(&out.name_len);
        if name_len > N as u32 {
            name_len = 0;
        }
        // Lengths of zero are not told apart: the compiler would turn both tests into one on a
        // shifted copy, and the verifier would lose the bound.
        if bpf_probe_read_kernel(bytes.cast(), name_len, out.name as *const _) < 0 {
            name_len = 0;
        }
        let mut data_len = 0;
        if D > 0 {
            data_len = opaque(&out.data_len);
            if data_len > D as u32 {
                data_len = 0;
            }
            if bpf_probe_read_user(bytes.add(name_len as usize).cast(), data_len, out.data as *const _) < 0 {
                count(counter::USER_UNREADABLE);
                data_len = 0;
                out.flags = out.flags & !flag::INLINE | flag::BY_REFERENCE;
            }
        }
        let header = &raw mut (*event).header;
        (*header).len = size_of::<FileEvent>() as u32 + name_len + data_len;
        (*header).kind = out.kind;
        (*header).flags = out.flags;
        (*header).start_ns = out.start_ns;
        (*header).end_ns = out.end_ns;
        (*header).tid = out.pid_tgid as u32;
        (*header).tgid = (out.pid_tgid >> 32) as u32;
        (*header).nr = out.nr;
        (*header).read_ns = 0;
        (*header).ret = out.ret;
        if out.has_attr {
            kernel::object_attr(&raw mut (*event).attr, scratch, out.id.dev);
        } else {
            kernel::bare_attr(&raw mut (*event).attr, out.id);
        }
        if out.has_parent {
            kernel::parent_attr(&raw mut (*event).parent, scratch, out.parent_dev);
        } else {
            kernel::bare_attr(&raw mut (*event).parent, InodeId::NONE);
        }
        (*event).file = out.file;
        (*event).file_offset = out.file_offset;
        (*event).count = out.count;
        (*event).range_start = out.range_start;
        (*event).range_end = out.range_end;
        (*event).f_flags = out.f_flags;
        (*event).f_mode = out.f_mode;
        (*event).name_len = name_len;
        (*event).data_len = data_len;
    }
    entry.submit(NO_WAKEUP);
    true
}
