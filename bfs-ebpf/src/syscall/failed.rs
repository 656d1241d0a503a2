//! What a call that failed may have left behind.

use bfs_common::abi::TaskState;

use crate::calls::{class, nr};

/// `include/uapi/linux/fs.h`
const RENAME_WHITEOUT: u64 = 4;

/// Whether an open that failed may have created or truncated before. The errors left out come
/// before anything is done: ENOENT, EBADF, EFAULT, EEXIST, ENOTDIR, EISDIR, ENFILE, EMFILE, EROFS.
#[inline(always)]
pub fn open(ret: i64) -> bool {
    !matches!(ret, -2 | -9 | -14 | -17 | -20 | -21 | -23 | -24 | -30)
}

/// Whether a call with paths that failed may have left an effect: the disk failed or was full in the
/// middle (EIO, ENOSPC, EDQUOT), or a whiteout was made and taken back, which moves the directory's time.
#[inline(always)]
pub fn path(state: &TaskState, number: u32, ret: i64) -> bool {
    matches!(ret, -5 | -28 | -122) || number == nr::RENAMEAT2 && state.args[4] & RENAME_WHITEOUT != 0
}

/// Whether a write that failed may have come beyond the checks: the times are set, setuid and the file
/// capability dropped before the first byte is copied (`file_modified()` in `generic_file_write_iter()`
/// and its like). EIO, ENOMEM, EFAULT, ENOSPC, EDQUOT.
#[inline(always)]
pub fn write(ret: i64) -> bool {
    matches!(ret, -5 | -12 | -14 | -28 | -122)
}

/// Whether a call on a descriptor that failed may have left an effect; for writes it depends on
/// the flags too. EBADF, EXDEV, EINVAL-like refusals come first: EBADF, EXDEV, ENOTTY, EOPNOTSUPP.
#[inline(always)]
pub fn descriptor(number: u32, class: u8, ret: i64) -> bool {
    // ext4 sets the times of a file without extents before it says that it cannot (ext4_fallocate()).
    if matches!(ret, -9 | -18 | -25) || ret == -95 && number != nr::FALLOCATE {
        return false;
    }
    match class {
        class::WRITE => true,
        class::DESCRIPTOR => number == nr::FALLOCATE,
        class::COPY => number == nr::COPY_FILE_RANGE,
        _ => true,
    }
}
