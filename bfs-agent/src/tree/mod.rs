//! Reading files and attributes, and setting them: what both roles need.
//!
//! Everything goes by descriptor, `O_PATH` ones and ones of symlinks included: what a plain
//! descriptor call refuses for those (EBADF) is asked through `/proc/self/fd/N`, whose magic link
//! ends at the very object and follows nothing further.

mod attributes;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;

use bfs_common::record::{FileKind, Meta};
use bfs_common::wire::DIGEST_BYTES;
use bytes::Bytes;
use rustix::fs::{AtFlags, Stat};
use rustix::io::Errno;

pub use attributes::set_attributes;

/// Names and values of extended attributes.
pub type Xattrs = Vec<(String, Vec<u8>)>;

/// What `stat` says about an object, in the terms of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Type.
    pub kind: FileKind,
    /// Mode, owner, modification time.
    pub meta: Meta,
    /// Size of a regular file in bytes, else 0.
    pub size: u64,
    /// Device number of a device in the user-space form (`makedev`), else 0.
    pub device: u64,
    /// Hard links.
    pub nlink: u64,
    /// Inode number.
    pub ino: u64,
    /// Device that the object lies on, in the user-space form (`st_dev`).
    pub on_device: u64,
    /// Change time, seconds and nanoseconds.
    pub ctime: (i64, u32),
}

impl FileStat {
    /// Major and minor number of the device that the object lies on.
    #[must_use]
    pub fn dev_major_minor(&self) -> (u32, u32) {
        (rustix::fs::major(self.on_device), rustix::fs::minor(self.on_device))
    }

    fn from_stat(stat: &Stat) -> io::Result<Self> {
        let kind = FileKind::from_mode(stat.st_mode).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("file type {:o} unknown", stat.st_mode))
        })?;
        let device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
        #[allow(clippy::unnecessary_cast, reason = "the widths differ between architectures")]
        Ok(Self {
            kind,
            meta: Meta {
                permissions: stat.st_mode & 0o7777,
                uid: stat.st_uid,
                gid: stat.st_gid,
                mtime_sec: stat.st_mtime as i64,
                mtime_nsec: stat.st_mtime_nsec as u32,
            },
            size: if kind == FileKind::Regular { stat.st_size as u64 } else { 0 },
            device: if device { stat.st_rdev as u64 } else { 0 },
            nlink: stat.st_nlink as u64,
            ino: stat.st_ino as u64,
            on_device: stat.st_dev as u64,
            ctime: (stat.st_ctime as i64, stat.st_ctime_nsec as u32),
        })
    }
}

/// `/proc/self/fd/N`: the object behind a descriptor as a path.
#[must_use]
pub fn fd_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Opens what stands at a path, for nothing but to look at it, and follows no symlink at its end.
///
/// # Errors
/// What the system says.
pub fn open_path(path: &std::path::Path) -> io::Result<std::os::fd::OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Stats the object behind a descriptor.
///
/// # Errors
/// What the system says.
pub fn stat_fd(fd: BorrowedFd<'_>) -> io::Result<FileStat> {
    FileStat::from_stat(&rustix::fs::fstat(fd)?)
}

/// Stats an entry of a directory, without following a symlink.
///
/// # Errors
/// What the system says.
pub fn stat_at(directory: BorrowedFd<'_>, name: impl rustix::path::Arg) -> io::Result<FileStat> {
    FileStat::from_stat(&rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Whether an attribute of this name is copied: those of the `system` namespace other than the POSIX
/// ACLs are made up by file systems and cannot be set; xfs shows the ACLs a second time in its own form
/// (fs/xfs/xfs_acl.h); and those of btrfs are properties of its storage, which no other file system has.
#[must_use]
pub fn xattr_is_copied(name: &str) -> bool {
    if name.starts_with("btrfs.") || name == "trusted.SGI_ACL_FILE" || name == "trusted.SGI_ACL_DEFAULT" {
        return false;
    }
    match name.strip_prefix("system.") {
        Some(rest) => rest == "posix_acl_access" || rest == "posix_acl_default",
        None => true,
    }
}

/// Names and values of all extended attributes that can be copied, sorted by name. A file system
/// without attributes has none.
///
/// # Errors
/// What the system says, or `InvalidData` for a name that is not UTF-8 (the kernel's namespaces
/// allow one; the stream does not).
pub fn xattrs(fd: BorrowedFd<'_>) -> io::Result<Xattrs> {
    let path = fd_path(fd);
    let list = match grown(|buffer| rustix::fs::listxattr(&path, buffer)) {
        Ok(list) => list,
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for name in list.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let name = std::str::from_utf8(name)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("xattr name: {e}")))?;
        if !xattr_is_copied(name) {
            continue;
        }
        match grown(|buffer| rustix::fs::getxattr(&path, name, buffer)) {
            Ok(value) => found.push((name.to_owned(), value)),
            // Removed since it was listed.
            Err(Errno::NODATA) => {}
            // Listed by the file system, but not for us to read (e.g. a module not loaded).
            Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    found.sort();
    Ok(found)
}

/// The value of one extended attribute; `None` if the object has none of this name.
///
/// # Errors
/// What the system says.
pub fn xattr(fd: BorrowedFd<'_>, name: &str) -> io::Result<Option<Vec<u8>>> {
    match grown(|buffer| rustix::fs::getxattr(fd_path(fd), name, buffer)) {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Calls with a larger buffer until it fits.
fn grown(mut call: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    // The kernel's cap for values and lists (XATTR_SIZE_MAX, include/uapi/linux/limits.h).
    const LIMIT: usize = 64 << 10;
    let mut buffer = vec![0; 512];
    loop {
        match call(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < LIMIT => buffer.resize(LIMIT, 0),
            Err(error) => return Err(error),
        }
    }
}

/// The digest of sorted extended attributes, as a manifest has it: for each, u32 length and name,
/// u32 length and value (little-endian).
#[must_use]
pub fn xattr_digest(sorted: &[(String, Vec<u8>)]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for (name, value) in sorted {
        for part in [name.as_bytes(), value] {
            hasher.update(&(part.len() as u32).to_le_bytes());
            hasher.update(part);
        }
    }
    *hasher.finalize().as_bytes()
}

/// blake3 of the bytes of a regular file, from its start; the descriptor's position does not
/// matter and is not moved.
///
/// # Errors
/// What the system says.
pub fn content_digest(fd: BorrowedFd<'_>) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    let mut offset = 0;
    loop {
        match rustix::io::pread(fd, &mut buffer[..], offset) {
            Ok(0) => return Ok(*hasher.finalize().as_bytes()),
            Ok(len) => {
                hasher.update(&buffer[..len]);
                offset += len as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// blake3 of ranges of a file (offset and end), one behind the other; what lies beyond its end is left out.
///
/// # Errors
/// What the system says.
pub fn ranges_digest(fd: BorrowedFd<'_>, ranges: &[(u64, u64)]) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    for (start, end) in ranges {
        let mut at = *start;
        while at < *end {
            let len = (end - at).min(buffer.len() as u64) as usize;
            match rustix::io::pread(fd, &mut buffer[..len], at) {
                Ok(0) => break,
                Ok(len) => {
                    hasher.update(&buffer[..len]);
                    at += len as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(*hasher.finalize().as_bytes())
}

/// What tells the blocks of files apart: the first [`DIGEST_BYTES`] of their blake3.
#[must_use]
pub fn block_digest(bytes: &[u8]) -> [u8; DIGEST_BYTES] {
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(&blake3::hash(bytes).as_bytes()[..DIGEST_BYTES]);
    digest
}

/// Hashes so many zeros.
pub fn hash_zeros(hasher: &mut blake3::Hasher, mut len: u64) {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while len > 0 {
        let some = len.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..some as usize]);
        len -= some;
    }
}

/// blake3 of some bytes: the content of a symlink in a manifest, and with no bytes that of a
/// directory, fifo, socket or device.
#[must_use]
pub fn bytes_digest(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

/// The target of a symlink behind an `O_PATH | O_NOFOLLOW` descriptor.
///
/// # Errors
/// What the system says.
pub fn readlink(fd: BorrowedFd<'_>) -> io::Result<Bytes> {
    let target = rustix::fs::readlinkat(fd, c"", Vec::new())?;
    Ok(Bytes::copy_from_slice(target.as_bytes()))
}

/// Opens the object behind a descriptor again, for reading its content.
///
/// # Errors
/// What the system says.
pub fn reopen_read(fd: BorrowedFd<'_>) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    File::options().read(true).custom_flags(flags).open(fd_path(fd))
}

/// Zeros of this length, at a multiple of it, are a hole.
const HOLE: usize = 4096;

/// The parts of some bytes of a file that are no holes, with where they stand.
#[must_use]
pub fn without_holes(at: u64, bytes: &[u8]) -> Vec<(u64, &[u8])> {
    let mut found: Vec<(u64, &[u8])> = Vec::new();
    let (mut from, mut done) = (0, 0);
    while done < bytes.len() {
        let to = (HOLE - (at as usize + done) % HOLE + done).min(bytes.len());
        if to - done == HOLE && bytes[done..to].iter().all(|byte| *byte == 0) {
            if from < done {
                found.push((at + from as u64, &bytes[from..done]));
            }
            from = to;
        }
        done = to;
    }
    if from < bytes.len() {
        found.push((at + from as u64, &bytes[from..]));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags, XattrFlags};
    use std::os::fd::AsFd;

    #[test]
    fn zeros_that_fill_a_page_are_holes() {
        let mut bytes = vec![0; 5 * HOLE];
        assert_eq!(without_holes(0, &bytes), []);
        assert_eq!(without_holes(7, &bytes[..HOLE]), [(7, &bytes[..HOLE])], "none of its pages is whole");
        bytes[HOLE + 5] = 1;
        let page = &bytes[HOLE..2 * HOLE];
        assert_eq!(without_holes(3 * HOLE as u64, &bytes), [(4 * HOLE as u64, page)]);
        let lengths = |at: usize, bytes: &[u8]| -> Vec<(u64, usize)> {
            without_holes(at as u64, bytes).iter().map(|(at, part)| (*at, part.len())).collect()
        };
        // Not at a multiple: the part of a page counts as bytes.
        assert_eq!(lengths(100, &bytes[100..]), [(100, 2 * HOLE - 100)]);
        bytes[4 * HOLE] = 2;
        assert_eq!(lengths(0, &bytes), [(HOLE as u64, HOLE), (4 * HOLE as u64, HOLE)]);
    }

    #[test]
    fn files_and_symlinks_are_read_through_path_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"content").unwrap();
        rustix::fs::setxattr(&file, "user.b", &[b'x'; 3000], XattrFlags::empty()).unwrap();
        rustix::fs::setxattr(&file, "user.a", b"", XattrFlags::empty()).unwrap();
        std::os::unix::fs::symlink("no/where", dir.path().join("link")).unwrap();

        let open = |name: &str| {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::open(dir.path().join(name), flags, Mode::empty()).unwrap()
        };
        let fd = open("file");
        let stat = stat_fd(fd.as_fd()).unwrap();
        assert_eq!((stat.kind, stat.size, stat.nlink), (FileKind::Regular, 7, 1));
        assert_eq!(stat, stat_at(open(".").as_fd(), "file").unwrap());
        let attributes = xattrs(fd.as_fd()).unwrap();
        let expected = vec![("user.a".to_owned(), vec![]), ("user.b".to_owned(), vec![b'x'; 3000])];
        assert_eq!(attributes, expected);
        assert_eq!(xattr(fd.as_fd(), "user.b").unwrap().unwrap().len(), 3000);
        assert_eq!(xattr(fd.as_fd(), "user.c").unwrap(), None);
        let opened = reopen_read(fd.as_fd()).unwrap();
        assert_eq!(content_digest(opened.as_fd()).unwrap(), bytes_digest(b"content"));

        let link = open("link");
        assert_eq!(stat_fd(link.as_fd()).unwrap().kind, FileKind::Symlink);
        assert_eq!(&readlink(link.as_fd()).unwrap()[..], b"no/where");
        assert!(xattrs(link.as_fd()).unwrap().is_empty());
    }

    #[test]
    fn the_digest_tells_name_from_value() {
        let one = xattr_digest(&[("user.a".into(), b"bc".to_vec())]);
        let other = xattr_digest(&[("user.ab".into(), b"c".to_vec())]);
        assert_ne!(one, other);
    }
}
