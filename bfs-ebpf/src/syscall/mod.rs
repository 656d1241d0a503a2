//! The two ends of every system call of a followed task.
//!
//! `sys_enter` decides whether the call is followed and puts what is known only then into the
//! task's slot; `sys_exit` turns the slot into a record. The slot is `active` from before the start
//! is stamped until after the record stands in the ring: this is what the agent's cut relies on.

mod enter;
mod exit;
pub mod failed;

use aya_ebpf::helpers::generated::bpf_probe_read_user;
use bfs_common::abi::TaskState;

use crate::{
    calls::{CALLS, CLASS, COMPAT, class, nr},
    file::opaque,
    kernel, maps,
};

pub use self::enter::{O_TMPFILE, enter};
pub use self::exit::exit;

/// `TS_COMPAT` (`arch/x86/include/asm/thread_info.h`)
const TS_COMPAT: u32 = 2;
/// `__X32_SYSCALL_BIT` (`arch/x86/include/uapi/asm/unistd.h`)
const X32: u64 = 0x4000_0000;
const X32_PROCESS_VM_WRITEV: u64 = X32 | 540;
const X32_PIDFD_GETFD: u64 = X32 | 438;

pub const O_CREAT: u32 = 0o100;
pub const O_TRUNC: u32 = 0o1_000;

/// Type of the ioctls of loop devices (`include/uapi/linux/loop.h`).
const LOOP: u32 = 0x4c;

/// Registers in a `struct pt_regs`, in words.
mod reg {
    pub const BP: usize = 4;
    pub const BX: usize = 5;
    pub const R10: usize = 7;
    pub const R9: usize = 8;
    pub const R8: usize = 9;
    pub const CX: usize = 11;
    pub const DX: usize = 12;
    pub const SI: usize = 13;
    pub const DI: usize = 14;
    pub const ORIG_AX: usize = 15;
}

#[inline(always)]
fn register(regs: *const u64, index: usize) -> u64 {
    // Note the order: r9 stands below r8 in the struct.
    // SAFETY: the verifier knows the pointer as a struct pt_regs.
    unsafe { regs.add(index).read_volatile() }
}

/// The descriptor of a call that is followed by descriptor.
#[inline(always)]
fn descriptor(number: u32, state: &TaskState) -> u32 {
    (match number {
        nr::SPLICE | nr::COPY_FILE_RANGE => state.args[2],
        nr::MMAP => state.args[4],
        _ => state.args[0],
    }) as u32
}

/// Number and first two arguments of a call of the 64-bit table that ends; none of another table's.
#[inline(always)]
pub fn ended(regs: *const u64) -> Option<(u64, u64, u64)> {
    let number = register(regs, reg::ORIG_AX);
    if number & X32 != 0 || is_compat(kernel::task()) {
        return None;
    }
    Some((number, register(regs, reg::DI), register(regs, reg::SI)))
}

/// [`class`] of a call.
#[inline(always)]
fn class_of(number: u64) -> u8 {
    if number < CALLS as u64 { CLASS[number as usize & (CALLS - 1)] } else { class::NONE }
}

/// A number as the 64-bit table has it; [`CALLS`] or more where it has none that is followed.
#[inline(always)]
fn number_of(number: u64, compat: bool) -> u64 {
    if !compat {
        return number;
    }
    // The mask must stay: the verifier of 6.1 also follows the branch that a larger number would take.
    let like = COMPAT[opaque(&(number as u32)) as usize & (CALLS - 1)];
    if number >= CALLS as u64 || like == 0 { CALLS as u64 } else { u64::from(like) }
}

/// Whether a call may matter at its start, if its task is followed.
#[inline(always)]
pub fn starts(number: u64) -> bool {
    match class_of(number) {
        class::NONE => number & X32 != 0,
        class::MAYBE_COMPAT => is_compat(kernel::task()),
        _ => true,
    }
}

/// Notes that a process reaches into another one; before the selection, because anybody may.
#[inline(always)]
pub fn note_foreign(number: u64) {
    // SAFETY: words that only ever go from 0 to 1.
    unsafe {
        if class_of(number) == class::FOREIGN_STORE || number == X32_PROCESS_VM_WRITEV {
            core::ptr::write_volatile(&raw mut maps::FOREIGN_STORES, 1);
        }
        if class_of(number) == class::FOREIGN_DESCRIPTOR || number == X32_PIDFD_GETFD {
            core::ptr::write_volatile(&raw mut maps::FOREIGN_DESCRIPTORS, 1);
        }
    }
}

/// Whether a call may matter at its end, as far as the number tells: what is harmless in the one table is so in the
/// other.
#[inline(always)]
pub fn may_end(regs: *const u64) -> bool {
    class_of(register(regs, reg::ORIG_AX)) != class::NONE
}

/// The number, as the 64-bit table has it, of a call that may matter at its end, if its task is followed.
#[inline(always)]
pub fn ends(regs: *const u64, task: *const u8) -> Option<u32> {
    let number = number_of(register(regs, reg::ORIG_AX), is_compat(task));
    let matters = !matches!(
        class_of(number),
        class::NONE
            | class::MEMORY
            | class::TABLE
            | class::MAYBE_COMPAT
            | class::FOREIGN_STORE
            | class::FOREIGN_DESCRIPTOR
    );
    matters.then_some(number as u32)
}

/// Whether a call, as the 64-bit table numbers it, opens a file.
#[inline(always)]
pub fn is_open(number: u32) -> bool {
    CLASS[number as usize & (CALLS - 1)] == class::OPEN
}

/// The flags of a call that opened a file; all of them where that would be long to find out.
#[inline(always)]
pub fn opens_as(regs: *const u64, number: u32) -> u32 {
    match number {
        _ if is_compat(kernel::task()) => u32::MAX,
        nr::OPEN => register(regs, reg::SI) as u32,
        nr::CREAT | nr::OPENAT2 => u32::MAX,
        _ => register(regs, reg::DX) as u32,
    }
}

/// Whether the current call is one of the 32-bit table.
#[inline(always)]
fn is_compat(task: *const u8) -> bool {
    kernel::task_status(task) & TS_COMPAT != 0
}

#[inline(always)]
fn is_among(value: u32, list: &[u32]) -> bool {
    let mut i = 0;
    while i < list.len() {
        if list[i] == value {
            return true;
        }
        i += 1;
    }
    false
}

/// Flags of an open, `None` where they cannot be read.
#[inline(always)]
fn open_flags(state: &TaskState, number: u32) -> u32 {
    match number {
        nr::OPEN => state.args[1] as u32,
        nr::CREAT => O_CREAT | O_TRUNC,
        nr::OPENAT2 => {
            let mut flags = 0u64;
            // SAFETY: the first member of struct open_how.
            let read = unsafe { bpf_probe_read_user((&raw mut flags).cast(), 8, state.args[2] as *const _) };
            // Not readable: as if it could change something.
            if read < 0 { O_CREAT | O_TRUNC } else { flags as u32 }
        }
        _ => state.args[2] as u32,
    }
}
