//! Rows: mode, owner, times, extended attributes, and what changes them by the way.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::symlink;

use super::sys::{self, CWD, address, at as adr, c, call, fd, ioc, nr, setxattr};
use super::{At, Row};

const ACCESS: &CStr = c"system.posix_acl_access";
const DEFAULT: &CStr = c"system.posix_acl_default";
const CAPABILITY: &CStr = c"security.capability";

/// `struct vfs_cap_data`, version 2: cap_net_raw, permitted and effective.
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

const FS_IOC_SETFLAGS: usize = ioc(1, b'f', 2, 8);
const FS_IOC_SETVERSION: usize = ioc(1, b'v', 2, 8);
const FS_IOC_FSSETXATTR: usize = ioc(1, b'X', 32, 28);
const FS_IOC_FSGETXATTR: usize = ioc(2, b'X', 31, 28);
const FS_NODUMP_FL: u64 = 0x40;

pub(super) static ROWS: &[&Row] = &[
    &Row::new("attributes/chmod", chmod),
    &Row::new("attributes/chown", chown),
    &Row::new("attributes/times", times),
    // None of users.
    &Row::new("attributes/xattr", xattr).refused_by(&["tmpfs"]).before(6, 6),
    &Row::new("attributes/xattr-at", xattr_at),
    &Row::new("attributes/acl", acl),
    &Row::new("attributes/capability", capability),
    &Row::new("attributes/dropped-by-writes", dropped_by_writes),
    &Row::new("attributes/inherited", inherited),
    &Row::new("attributes/flags", flags),
    &Row::new("attributes/file-setattr", file_setattr),
    &Row::new("attributes/set-version", set_version).refused_by(&["tmpfs", "xfs", "btrfs"]),
];

fn chmod(at: &At) -> io::Result<()> {
    for name in ["a", "b", "c", "d"] {
        at.file(name, 10)?;
    }
    fs::create_dir(at.path("dir"))?;
    at.pause()?;
    let path = |name: &str| c(at.path(name));
    call(libc::SYS_chmod, [adr(&path("a")?), 0o4711])?;
    call(libc::SYS_fchmod, [fd(&File::open(at.path("b"))?), 0o400])?;
    call(libc::SYS_fchmodat, [CWD, adr(&path("c")?), 0o222])?;
    call(libc::SYS_chmod, [adr(&path("dir")?), 0o3777])?;
    match call(nr::FCHMODAT2, [CWD, adr(&path("d")?), 0o604, libc::AT_SYMLINK_NOFOLLOW as usize]) {
        // Since 6.6.
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => other.map(drop),
    }
}

fn chown(at: &At) -> io::Result<()> {
    for name in ["a", "b", "c", "d"] {
        at.file(name, 10)?;
    }
    symlink("a", at.path("link"))?;
    let path = |name: &str| c(at.path(name));
    call(libc::SYS_chmod, [adr(&path("a")?), 0o6755])?;
    at.pause()?;
    // Clears the two bits.
    call(libc::SYS_chown, [adr(&path("a")?), 1_000, 1_001])?;
    call(libc::SYS_fchown, [fd(&File::open(at.path("b"))?), 1_002, usize::MAX])?;
    call(libc::SYS_lchown, [adr(&path("link")?), 1_003, 1_004])?;
    call(libc::SYS_fchownat, [CWD, adr(&path("c")?), 1_005, 1_006, 0])?;
    let file = File::open(at.path("d"))?;
    call(libc::SYS_fchownat, [fd(&file), adr(c""), 1_007, 1_008, libc::AT_EMPTY_PATH as usize]).map(drop)
}

fn times(at: &At) -> io::Result<()> {
    for name in ["a", "b", "c", "d", "e"] {
        at.file(name, 10)?;
    }
    symlink("a", at.path("link"))?;
    at.pause()?;
    let path = |name: &str| c(at.path(name));
    let old = [[1_000i64, 1], [2_000_000, 123_456_789]];
    let nofollow = libc::AT_SYMLINK_NOFOLLOW as usize;
    call(libc::SYS_utimensat, [CWD, adr(&path("a")?), address(&old), 0])?;
    call(libc::SYS_utimensat, [CWD, adr(&path("link")?), address(&old), nofollow])?;
    let file = File::open(at.path("b"))?;
    call(libc::SYS_utimensat, [fd(&file), 0, address(&old), 0])?;
    let micro = [[5i64, 6], [-7, 8]];
    call(libc::SYS_utimes, [adr(&path("c")?), address(&micro)])?;
    call(libc::SYS_utime, [adr(&path("d")?), address(&[9i64, 10])])?;
    call(libc::SYS_futimesat, [CWD, adr(&path("e")?), 0])?;
    call(libc::SYS_utimensat, [CWD, adr(&c(&at.dir)?), address(&old), 0]).map(drop)
}

fn xattr(at: &At) -> io::Result<()> {
    for name in ["a", "b"] {
        at.file(name, 10)?;
        setxattr(at.path(name), c"trusted.goes", b"1")?;
        setxattr(at.path(name), c"trusted.changes", b"1")?;
    }
    fs::create_dir(at.path("dir"))?;
    symlink("a", at.path("link"))?;
    at.pause()?;
    setxattr(at.path("a"), c"trusted.changes", &[7; 300])?;
    setxattr(at.path("dir"), c"trusted.new", b"")?;
    let path = |name: &str| c(at.path(name));
    call(libc::SYS_removexattr, [adr(&path("a")?), adr(c"trusted.goes")])?;
    let value = b"of the link";
    call(libc::SYS_lsetxattr, [adr(&path("link")?), adr(c"trusted.link"), address(value), value.len(), 0])?;
    call(libc::SYS_lremovexattr, [adr(&path("b")?), adr(c"trusted.goes")])?;
    let file = File::open(at.path("b"))?;
    call(libc::SYS_fsetxattr, [fd(&file), adr(c"user.x"), address(value), value.len(), 0])?;
    call(libc::SYS_fremovexattr, [fd(&file), adr(c"trusted.changes")]).map(drop)
}

fn xattr_at(at: &At) -> io::Result<()> {
    at.file("a", 10)?;
    setxattr(at.path("a"), c"trusted.goes", b"1")?;
    at.pause()?;
    let value = b"by setxattrat";
    // struct xattr_args: address, size, flags.
    let args = [address(value) as u64, value.len() as u64];
    let path = c(at.path("a"))?;
    call(nr::SETXATTRAT, [CWD, adr(&path), 0, adr(c"trusted.new"), address(&args), 16])?;
    let file = File::open(at.path("a"))?;
    let empty = libc::AT_EMPTY_PATH as usize;
    call(nr::SETXATTRAT, [fd(&file), adr(c""), empty, adr(c"trusted.by-fd"), address(&args), 16])?;
    call(nr::REMOVEXATTRAT, [CWD, adr(&path), 0, adr(c"trusted.goes")]).map(drop)
}

/// The bytes of an ACL: owner, one user, group, mask, others.
fn acl_bytes(user: u32, permissions: u16) -> Vec<u8> {
    let none = u32::MAX;
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1u16, 7u16, none), (2, permissions, user), (4, 5, none), (16, permissions, none), (32, 0, none)]
    {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn acl(at: &At) -> io::Result<()> {
    at.file("a", 10)?;
    at.file("b", 10)?;
    fs::create_dir(at.path("dir"))?;
    setxattr(at.path("b"), ACCESS, &acl_bytes(1_000, 6))?;
    at.pause()?;
    // Changes the mode too.
    setxattr(at.path("a"), ACCESS, &acl_bytes(1_000, 4))?;
    // chmod rewrites the list.
    call(libc::SYS_chmod, [adr(&c(at.path("b"))?), 0o710])?;
    setxattr(at.path("dir"), DEFAULT, &acl_bytes(1_001, 7))?;
    at.pause()?;
    fs::write(at.path("dir/f"), "inherits")?;
    fs::create_dir(at.path("dir/inner"))?;
    fs::write(at.path("dir/inner/f"), "inherits too")?;
    fs::hard_link(at.path("a"), at.path("dir/link"))?;
    call(libc::SYS_removexattr, [adr(&c(at.path("dir"))?), adr(DEFAULT)]).map(drop)
}

fn capability(at: &At) -> io::Result<()> {
    at.file("a", 10)?;
    at.file("b", 10)?;
    setxattr(at.path("b"), CAPABILITY, &NET_RAW)?;
    at.pause()?;
    setxattr(at.path("a"), CAPABILITY, &NET_RAW)?;
    // chown takes it away.
    call(libc::SYS_chown, [adr(&c(at.path("b"))?), 5, 5]).map(drop)
}

/// Writes, truncations and allocations take away capabilities and the setuid bit, silently.
fn dropped_by_writes(at: &At) -> io::Result<()> {
    let names = ["write", "truncate", "ftruncate", "fallocate", "open", "copy"];
    for name in names {
        at.file(name, 10_000)?;
        setxattr(at.path(name), CAPABILITY, &NET_RAW)?;
    }
    for name in names.map(|name| format!("{name}-suid")) {
        at.file(&name, 10_000)?;
        call(libc::SYS_chmod, [adr(&c(at.path(&name))?), 0o6777])?;
    }
    // Who is not root may not enter otherwise.
    call(libc::SYS_chmod, [adr(&c(&at.dir)?), 0o777])?;
    at.pause()?;
    let each = |suffix: &str| -> io::Result<()> {
        let path = |name: &str| at.path(&format!("{name}{suffix}"));
        File::options().write(true).open(path("write"))?.write_all(b"x")?;
        call(libc::SYS_truncate, [adr(&c(path("truncate"))?), 5_000])?;
        File::options().write(true).open(path("ftruncate"))?.set_len(5_000)?;
        let file = File::options().write(true).open(path("fallocate"))?;
        call(libc::SYS_fallocate, [fd(&file), 0, 0, 20_000])?;
        File::options().write(true).truncate(true).open(path("open"))?;
        let copy = File::options().write(true).open(path("copy"))?;
        call(libc::SYS_copy_file_range, [fd(&File::open(path("write"))?), 0, fd(&copy), 0, 100, 0]).map(drop)
    };
    each("")?;
    sys::in_child(|| {
        call(libc::SYS_setgid, [1_000])?;
        call(libc::SYS_setuid, [1_000])?;
        each("-suid")
    })
}

fn inherited(at: &At) -> io::Result<()> {
    fs::create_dir(at.path("dir"))?;
    let dir = c(at.path("dir"))?;
    call(libc::SYS_chown, [adr(&dir), 0, 1_234])?;
    call(libc::SYS_chmod, [adr(&dir), 0o2755])?;
    at.pause()?;
    fs::write(at.path("dir/f"), "has the group")?;
    fs::create_dir(at.path("dir/d"))?;
    fs::write(at.path("dir/d/f"), "here too")?;
    symlink("x", at.path("dir/s"))?;
    call(libc::SYS_mknod, [adr(&c(at.path("dir/fifo"))?), (libc::S_IFIFO | 0o600) as usize, 0]).map(drop)
}

fn flags(at: &At) -> io::Result<()> {
    let (a, b) = (at.file("a", 10)?, at.file("b", 10)?);
    at.pause()?;
    call(libc::SYS_ioctl, [fd(&a), FS_IOC_SETFLAGS, address(&FS_NODUMP_FL)])?;
    let mut attributes = [0u32; 7];
    call(libc::SYS_ioctl, [fd(&b), FS_IOC_FSGETXATTR, std::ptr::from_mut(&mut attributes) as usize])?;
    // FS_XFLAG_NODUMP
    attributes[0] |= 0x80;
    call(libc::SYS_ioctl, [fd(&b), FS_IOC_FSSETXATTR, address(&attributes)]).map(drop)
}

fn file_setattr(at: &At) -> io::Result<()> {
    at.file("a", 10)?;
    at.pause()?;
    // struct file_attr: xflags, extsize, nextents, projid, cowextsize.
    let attributes = [0x80u64, 0, 0];
    call(nr::FILE_SETATTR, [CWD, adr(&c(at.path("a"))?), address(&attributes), 24, 0]).map(drop)
}

fn set_version(at: &At) -> io::Result<()> {
    let file = at.file("a", 1_000)?;
    at.pause()?;
    call(libc::SYS_ioctl, [fd(&file), FS_IOC_SETVERSION, address(&77u64)])?;
    // The generation is part of what an inode is called by: what follows must still reach it.
    let mut file = file;
    file.write_all(b"under the new generation")
}
