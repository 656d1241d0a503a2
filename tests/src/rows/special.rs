//! Rows: what the kernel does by itself, and calls that are not what they seem.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::sys::{self, address, at as adr, c, call, fd, ioc};
use super::{At, Row, pattern};

const EXT4_ONLY: &[&str] = &["xfs", "btrfs", "tmpfs"];
/// Only xfs has it, made by a newer mkfs.xfs than that of Debian 12.
const NEWEST_XFS: &[&str] = &["ext4", "btrfs", "tmpfs", "xfs"];
const BTRFS_ONLY: &[&str] = &["ext4", "xfs", "tmpfs"];

const EXT4_IOC_MOVE_EXT: usize = ioc(3, b'f', 15, 40);
const EXT4_IOC_SWAP_BOOT: usize = ioc(0, b'f', 17, 0);
const FS_IOC_UNRESVSP64: usize = ioc(1, b'X', 43, 48);
const FS_IOC_ZERO_RANGE: usize = ioc(1, b'X', 57, 48);
const XFS_IOC_EXCHANGE_RANGE: usize = ioc(1, b'X', 129, 40);
const BTRFS_IOC_ENCODED_WRITE: usize = ioc(1, 0x94, 64, 128);

pub(super) static ROWS: &[&Row] = &[
    &Row::new("special/answered-by-seccomp", seccomp),
    &Row::new("special/space-ioctls", space_ioctls).refused_by(&["tmpfs", "btrfs"]),
    &Row::new("special/move-extents", move_extents).refused_by(EXT4_ONLY).everything(),
    &Row::new("special/swap-boot", swap_boot).refused_by(EXT4_ONLY),
    &Row::new("special/exchange-range", exchange_range).refused_by(NEWEST_XFS).everything(),
    &Row::new("special/encoded-write", encoded_write).refused_by(BTRFS_ONLY),
];

/// A filter answers mkdir with success: nothing happened.
fn seccomp(at: &At) -> io::Result<()> {
    fs::write(at.path("stays"), "stays")?;
    at.pause()?;
    sys::in_child(|| {
        // Load the number; mkdir and unlink are answered with 0, everything else is let through.
        let filter = [
            bpf(0x20, 0, 0, 0),
            bpf(0x15, 1, 0, libc::SYS_mkdir as u32),
            bpf(0x15, 0, 1, libc::SYS_unlink as u32),
            bpf(0x06, 0, 0, 0x0005_0000),
            bpf(0x06, 0, 0, 0x7fff_0000),
        ];
        let program = [filter.len(), filter.as_ptr() as usize];
        call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0, 0, 0])?;
        call(libc::SYS_seccomp, [1, 0, address(&program)])?;
        call(libc::SYS_mkdir, [adr(&c(at.path("never"))?), 0o700])?;
        call(libc::SYS_unlink, [adr(&c(at.path("stays"))?)]).map(drop)
    })
}

/// `struct sock_filter`.
const fn bpf(code: u16, yes: u8, no: u8, k: u32) -> u64 {
    code as u64 | (yes as u64) << 16 | (no as u64) << 24 | (k as u64) << 32
}

/// `struct space_resv`: type and whence, start, length, the rest unused.
fn space(start: u64, len: u64) -> [u64; 6] {
    [0, start, len, 0, 0, 0]
}

fn space_ioctls(at: &At) -> io::Result<()> {
    let file = at.file("f", 64 << 10)?;
    at.pause()?;
    call(libc::SYS_ioctl, [fd(&file), FS_IOC_UNRESVSP64, address(&space(5_000, 10_000))])?;
    call(libc::SYS_ioctl, [fd(&file), FS_IOC_ZERO_RANGE, address(&space(30_000, 10_000))]).map(drop)
}

fn move_extents(at: &At) -> io::Result<()> {
    let (file, donor) = (at.file("f", 64 << 10)?, at.file("donor", 64 << 10)?);
    donor.write_all_at(&pattern(64 << 10, 30), 0)?;
    file.sync_all()?;
    donor.sync_all()?;
    at.pause()?;
    // struct move_extent: reserved and donor, start here, start there, blocks, moved.
    let mut extents = [(donor.as_raw_fd() as u64) << 32, 0, 0, 16, 0];
    call(libc::SYS_ioctl, [fd(&file), EXT4_IOC_MOVE_EXT, std::ptr::from_mut(&mut extents) as usize]).map(drop)
}

/// The content goes to the boot loader's inode, and that one's comes here.
fn swap_boot(at: &At) -> io::Result<()> {
    let file = at.file("f", 64 << 10)?;
    file.sync_all()?;
    at.pause()?;
    call(libc::SYS_ioctl, [fd(&file), EXT4_IOC_SWAP_BOOT, 0]).map(drop)
}

fn exchange_range(at: &At) -> io::Result<()> {
    let (a, b) = (at.file("a", 64 << 10)?, at.file("b", 64 << 10)?);
    b.write_all_at(&pattern(64 << 10, 31), 0)?;
    at.pause()?;
    // struct xfs_exchange_range: the other file, its offset, the offset here, length, flags.
    let range = [a.as_raw_fd() as u64, 0, 0, 32 << 10, 0];
    call(libc::SYS_ioctl, [fd(&b), XFS_IOC_EXCHANGE_RANGE, address(&range)]).map(drop)
}

/// `pattern(16384, 0)`, by zlib.
const ENCODED: [u8; 484] = *include_bytes!("encoded.zlib");

fn encoded_write(at: &At) -> io::Result<()> {
    let file = at.file("f", 64 << 10)?;
    at.pause()?;
    let vector = [[ENCODED.as_ptr() as usize, ENCODED.len()]];
    // struct btrfs_ioctl_encoded_io_args: buffers, how many, offset, flags, length, length decoded, offset
    // decoded, compression (1: zlib) and encryption.
    let mut arguments = [0u64; 16];
    arguments[..8].copy_from_slice(&[address(&vector) as u64, 1, 16 << 10, 0, 16 << 10, 16 << 10, 0, 1]);
    call(libc::SYS_ioctl, [fd(&file), BTRFS_IOC_ENCODED_WRITE, address(&arguments)]).map(drop)
}
