//! A part of the kernel/user ABI ([`super`]): asynchronous operations in flight.

use super::InodeId;

/// Value of the map `REQUESTS`, keyed by the address of the kernel's `struct io_kiocb`: an
/// io_uring operation that may change a file and is not known to have ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// When it was submitted; 0 until that is known.
    pub start_ns: u64,
    /// The file's inode in the kernel (of an operation with paths: the first base), 0 if unknown.
    pub inode_addr: u64,
    /// The file.
    pub inode: InodeId,
    /// First byte that it may change (of an operation with paths: the second base's inode).
    pub offset: u64,
    /// Behind the last one; `u64::MAX` where that is not known.
    pub end: u64,
    /// `i_size` when it was submitted.
    pub size: u64,
    /// Thread that submitted it.
    pub tid: u32,
    /// Its thread group.
    pub tgid: u32,
    /// What stands in the `tid` of its records: operations of one thread have no order.
    pub id: u32,
    /// `IORING_OP_*`.
    pub opcode: u32,
    /// Bits of [`request`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

/// Bits of [`Request::flags`].
pub mod request {
    /// Its success is not told (`IOSQE_CQE_SKIP_SUCCESS`).
    pub const SILENT: u32 = 1 << 0;
    /// It takes paths, which a [`kind::PATH_BEGUN`](super::kind::PATH_BEGUN) record holds.
    pub const PATH: u32 = 1 << 1;
    /// It appends.
    pub const APPEND: u32 = 1 << 2;
    /// It writes at the file position.
    pub const AT_POSITION: u32 = 1 << 3;
}

/// How an operation ended whose records were sent when it began.
pub mod ending {
    /// It did what its records say, or may have.
    pub const DONE: u64 = 0;
    /// It changed nothing.
    pub const NOTHING: u64 = 1;
    /// Its records may not tell what it changed.
    pub const UNKNOWN: u64 = 2;
}
