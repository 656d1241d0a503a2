//! Setting the attributes of a file that is given back, or of a backup file.
//!
//! The order matters: chown clears setuid and file capabilities, chmod rewrites the mask of an
//! ACL, and both and every write move ctime and some mtime; so owner, mode, extended attributes,
//! and the time last.

use std::io;
use std::os::fd::BorrowedFd;

use bfs_common::record::{FileKind, Meta};
use bytes::Bytes;
use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;

use super::{fd_path, stat_fd, xattrs};

/// Gives the file behind a descriptor (`O_PATH` will do) these attributes. What fits already is
/// left alone.
///
/// # Errors
/// What the system says; the name of an attribute that it does not take.
pub fn set_attributes(
    fd: BorrowedFd<'_>,
    kind: FileKind,
    meta: &Meta,
    wanted: &[(String, Bytes)],
) -> io::Result<()> {
    let path = fd_path(fd);
    let now = stat_fd(fd)?;
    let owner = now.meta.uid != meta.uid || now.meta.gid != meta.gid;
    if owner {
        let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
        rustix::fs::chownat(fd, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    }
    // The mode of a symlink means nothing and cannot be set.
    if kind != FileKind::Symlink && (owner || now.meta.permissions != meta.permissions) {
        rustix::fs::chmod(&path, Mode::from_raw_mode(meta.permissions))?;
    }
    let have = xattrs(fd)?;
    for (name, _) in &have {
        if !wanted.iter().any(|(n, _)| n == name) {
            match rustix::fs::removexattr(&path, name.as_str()) {
                // A label that the security module of this host puts on every file.
                Err(Errno::ACCESS | Errno::PERM) if name == "security.selinux" => {}
                Ok(()) | Err(Errno::NODATA) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    for (name, value) in wanted {
        if !have.iter().any(|(n, v)| n == name && v[..] == value[..]) {
            rustix::fs::setxattr(&path, name.as_str(), value, XattrFlags::empty()).map_err(|e| {
                io::Error::new(io::Error::from(e).kind(), format!("extended attribute {name}: {e}"))
            })?;
        }
    }
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: meta.mtime_sec, tv_nsec: meta.mtime_nsec.into() },
    };
    // Through the magic link of the descriptor, which ends at the object itself, also a symlink.
    rustix::fs::utimensat(rustix::fs::CWD, &path, &times, AtFlags::empty())?;
    Ok(())
}
