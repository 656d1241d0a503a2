//! Reading what others may be changing.

use std::io;
use std::os::fd::AsFd;

use bfs_common::abi::InodeId;
use bfs_common::record::FileKind;
use rustix::fs::{Dir, OFlags, SeekFrom};
use rustix::io::Errno;

use super::Reader;
use crate::primary::engine::host::HostError;

impl Reader {
    /// From now on each change of the inode gives it a new `ctime`, and whoever was changing it when this was called,
    /// with its lock held, is done. `false` when the inode is gone.
    ///
    /// A time that was asked for is followed by a later one (`fill_mg_cmtime()` in fs/stat.c,
    /// `inode_set_ctime_current()` in fs/inode.c, since 6.13). Writers hold the lock of the inode from before they
    /// set the time until their bytes are there; looking for a hole takes it on ext4, btrfs and tmpfs
    /// (`ext4_llseek()`, `find_desired_extent()`, `shmem_file_llseek()`), reading on xfs
    /// (`xfs_file_buffered_read()`), and listing a directory everywhere (`iterate_dir()`). (Direct I/O need not hold
    /// it: the engine waits for that by itself.)
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn await_others(&self, inode: InodeId) -> Result<bool, HostError> {
        let inner = || -> io::Result<bool> {
            let Some(fd) = self.open(inode, OFlags::PATH)? else { return Ok(false) };
            // It asks for the times.
            let Some(stat) = self.stat_of(fd.as_fd())? else { return Ok(false) };
            let flags = OFlags::RDONLY | OFlags::NOATIME | OFlags::NONBLOCK;
            match stat.kind {
                FileKind::Regular => {
                    let Some(file) = self.open(inode, flags)? else { return Ok(false) };
                    match rustix::fs::seek(&file, SeekFrom::Hole(0)) {
                        // An empty file.
                        Ok(_) | Err(Errno::NXIO | Errno::INVAL) => {}
                        Err(e) => return Err(e.into()),
                    }
                    rustix::io::pread(&file, &mut [0u8; 1], 0)?;
                }
                FileKind::Directory => {
                    let Some(directory) = self.open(inode, flags | OFlags::DIRECTORY)? else {
                        return Ok(false);
                    };
                    if let Some(entry) = Dir::new(directory)?.next() {
                        entry?;
                    }
                }
                _ => {}
            }
            Ok(true)
        };
        inner().map_err(|source| HostError::Read { what: format!("what others do to {inode:?}"), source })
    }
}
