//! Pages of files in the page cache: cleaning them, and what file systems tell of stores into them.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use bfs_common::abi::InodeId;
use rustix::fs::OFlags;

use super::{Form, Reader};
use crate::primary::engine::host::HostError;

/// `statx.stx_attributes`: the file is mapped to the device's memory, past the page cache.
const STATX_ATTR_DAX: u64 = 0x20_0000;

/// `include/uapi/linux/mman.h`, since 6.5.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

impl Reader {
    /// Whether an inode that cannot be opened is gone. On tmpfs it may only never have been asked for its handle:
    /// that is what puts it into the table (shmem_encode_fh() in mm/shmem.c).
    #[must_use]
    pub fn finds_by_number(&self, inode: InodeId) -> bool {
        self.mount(inode.dev).is_none_or(|m| m.handles.form != Form::GenIno64)
    }

    /// The inode behind a descriptor, if it lies on a file system that is known.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn inode_of(&self, fd: BorrowedFd<'_>) -> io::Result<Option<InodeId>> {
        Ok(self.stat_of(fd)?.map(|stat| stat.inode))
    }

    /// Whether a store into a clean page of the file makes it dirty as an event that can be seen
    /// (`page_mkwrite`): on tmpfs, and where there is no page cache, it does not.
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn tells_stores(&self, inode: InodeId) -> Result<bool, HostError> {
        if self.mount(inode.dev).is_none_or(|m| m.handles.form == Form::GenIno64) {
            return Ok(false);
        }
        let Some(fd) = self.descriptor(inode)? else { return Ok(false) };
        let flags = rustix::fs::AtFlags::EMPTY_PATH;
        let stat = rustix::fs::statx(&fd, c"", flags, rustix::fs::StatxFlags::TYPE)
            .map_err(|e| failed("attributes", inode, e.into()))?;
        Ok(stat.stx_attributes.bits() & STATX_ATTR_DAX == 0)
    }

    /// Writes back what is dirty in the ranges, and gives those that were seen clean after that. What becomes
    /// dirty again meanwhile may be among them.
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn clean(&self, inode: InodeId, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>, HostError> {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else { return Ok(Vec::new()) };
        let flags = OFlags::RDONLY | OFlags::NOATIME | OFlags::NONBLOCK;
        let Some(fd) = self.open(inode, flags).map_err(|source| failed("pages", inode, source))? else {
            return Ok(Vec::new());
        };
        // What lies between the ranges is clean already, so that one call does for all.
        let hull = first.start..last.end;
        // btrfs compresses on a thread of its own: the second call waits for what that began
        // (btrfs_fdatawrite_range() in fs/btrfs/file.c).
        let btrfs = self.mount(inode.dev).is_some_and(|m| m.handles.form == Form::Btrfs);
        for _ in 0..1 + u32::from(btrfs) {
            if sync(fd.as_fd(), &hull).is_err() {
                // Not written, for whatever reason: it stays as it was.
                return Ok(Vec::new());
            }
        }
        match is_clean(fd.as_fd(), &hull) {
            Some(true) => Ok(ranges.to_vec()),
            Some(false) => {
                Ok(ranges.iter().filter(|r| is_clean(fd.as_fd(), r) == Some(true)).cloned().collect())
            }
            // A kernel that does not tell: the pages that were dirty before were waited for.
            None => Ok(ranges.to_vec()),
        }
    }
}

fn failed(what: &str, inode: InodeId, source: io::Error) -> HostError {
    HostError::Read { what: format!("{what} of {inode:?}"), source }
}

/// Writes what is dirty and waits for it. All three flags together leave nothing out (`WB_SYNC_ALL`,
/// ksys_sync_file_range() in fs/sync.c).
fn sync(fd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    // To the end where the length is 0 (sync_file_range(2)).
    let length = if range.end >= i64::MAX.cast_unsigned() { 0 } else { range.end - range.start };
    let flags =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open; no memory is passed.
    let result = unsafe {
        libc::sync_file_range(fd.as_raw_fd(), range.start.cast_signed(), length.cast_signed(), flags)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether no page of the range is dirty or being written back; `None` where the kernel does not tell.
fn is_clean(fd: BorrowedFd<'_>, range: &Range<u64>) -> Option<bool> {
    let length = if range.end >= i64::MAX.cast_unsigned() { 0 } else { range.end - range.start };
    let asked = [range.start, length];
    let mut stat = CacheStat::default();
    // SAFETY: the call reads a struct of two u64 and writes one of five.
    let result = unsafe {
        libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), asked.as_ptr(), std::ptr::from_mut(&mut stat), 0)
    };
    (result == 0).then_some(stat.dirty == 0 && stat.writeback == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::Name;

    #[test]
    fn what_was_dirty_is_clean_after_cleaning() {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = Reader::new();
        let root = reader.add_root(dir.path()).unwrap();
        std::fs::write(dir.path().join("f"), vec![7; 8 << 20]).unwrap();
        let inode = reader.child(root.stat.inode, &Name::new(b"f").unwrap()).unwrap().unwrap().inode;
        let ranges = [0..4096, 65_536..u64::MAX];
        if !reader.tells_stores(inode).unwrap() {
            return;
        }
        assert_eq!(reader.clean(inode, &ranges).unwrap(), ranges);
        let file = std::fs::File::options().write(true).open(dir.path().join("f")).unwrap();
        assert_eq!(is_clean(file.as_fd(), &(0..u64::MAX)), Some(true), "this test needs cachestat(2)");
        // Further away than the largest folio reaches, which is dirty as a whole.
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 6 << 20).unwrap();
        assert_eq!(is_clean(file.as_fd(), &(0..4096)), Some(true));
        assert_eq!(is_clean(file.as_fd(), &(6 << 20..(6 << 20) + 4096)), Some(false));
    }
}
