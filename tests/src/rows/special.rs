//! Rows: what the kernel does by itself, and calls that are not what they seem.

use std::fs::{self, File};
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
const LOOP_SET_FD: usize = 0x4c00;
const LOOP_CLR_FD: usize = 0x4c01;
const LOOP_CTL_GET_FREE: usize = 0x4c82;

pub(super) static ROWS: &[&Row] = &[
    &Row::new("special/answered-by-seccomp", seccomp),
    &Row::new("special/space-ioctls", space_ioctls).refused_by(&["tmpfs", "btrfs"]),
    &Row::new("special/move-extents", move_extents).refused_by(EXT4_ONLY).everything(),
    &Row::new("special/swap-boot", swap_boot).refused_by(EXT4_ONLY),
    &Row::new("special/exchange-range", exchange_range).refused_by(NEWEST_XFS).everything(),
    &Row::new("special/encoded-write", encoded_write).refused_by(BTRFS_ONLY),
    &Row::new("special/core-dump", core_dump).everything(),
    &Row::new("special/accounting", accounting),
    &Row::new("special/loop-device", loop_device),
    &Row::new("special/32-bit-calls", compat),
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

/// A process dies and the kernel writes its core, if this system has them written to files.
fn core_dump(at: &At) -> io::Result<()> {
    fs::write(at.path("core"), "an older one")?;
    at.pause()?;
    let died = sys::in_child(|| {
        std::env::set_current_dir(&at.dir)?;
        let limit = libc::rlimit { rlim_cur: 16 << 20, rlim_max: 16 << 20 };
        // SAFETY: the struct is ours; abort ends this process.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &raw const limit);
            libc::signal(libc::SIGABRT, libc::SIG_DFL);
            libc::abort()
        }
    });
    assert!(died.is_err());
    Ok(())
}

/// Every process of a PID namespace that ends leaves a record.
fn accounting(at: &At) -> io::Result<()> {
    fs::write(at.path("acct"), "")?;
    at.pause()?;
    sys::in_child(|| {
        call(libc::SYS_unshare, [libc::CLONE_NEWPID as usize])?;
        sys::in_child(|| {
            call(libc::SYS_acct, [adr(&c(at.path("acct"))?)])?;
            (0..3).try_for_each(|_| sys::in_child(|| Ok(())))?;
            at.pause()?;
            (0..3).try_for_each(|_| sys::in_child(|| Ok(())))?;
            at.pause()?;
            call(libc::SYS_acct, [0])?;
            Ok(())
        })
    })
}

fn loop_device(at: &At) -> io::Result<()> {
    let file = at.file("image", 1 << 20)?;
    at.pause()?;
    let control = sys::open("/dev/loop-control", libc::O_RDWR, 0)?;
    let number = call(libc::SYS_ioctl, [fd(&control), LOOP_CTL_GET_FREE])?;
    let device = File::from(sys::open(format!("/dev/loop{number}"), libc::O_RDWR, 0)?);
    call(libc::SYS_ioctl, [fd(&device), LOOP_SET_FD, fd(&file)])?;
    let done = (|| -> io::Result<()> {
        device.write_all_at(&pattern(8_192, 32), 4_096)?;
        device.sync_all()?;
        at.pause()?;
        device.write_all_at(&pattern(8_192, 33), 65_536)?;
        device.sync_all()
    })();
    call(libc::SYS_ioctl, [fd(&device), LOOP_CLR_FD, 0])?;
    done
}

/// A call by the gate of 32-bit programs.
fn int80(nr: u32, args: [u32; 4]) -> io::Result<u32> {
    let result: i32;
    // SAFETY: pointers among the arguments lie below 4 GiB and live through the call. The gate keeps all
    // registers but the result (entry_INT80_compat), rbx is put back for LLVM.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {b}",
            "int 0x80",
            "xchg rbx, {b}",
            b = inout(reg) u64::from(args[0]) => _,
            inlateout("eax") nr => result,
            in("ecx") args[1],
            in("edx") args[2],
            in("esi") args[3],
            in("edi") 0,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as u32) }
}

/// Numbers of arch/x86/entry/syscalls/syscall_32.tbl.
fn compat(at: &At) -> io::Result<()> {
    fs::write(at.path("goes"), "goes")?;
    fs::write(at.path("cut"), pattern(5_000, 34))?;
    at.pause()?;
    // A kernel without that gate answers with SIGSEGV: tried in a child.
    sys::in_child(|| int80(20, [0; 4]).map(drop)).map_err(|_| io::Error::from_raw_os_error(libc::ENOSYS))?;
    // SAFETY: a new mapping, in reach of 32 bits.
    let low = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            65_536,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
            -1,
            0,
        )
    };
    assert_ne!(low, libc::MAP_FAILED);
    let put = |offset: usize, bytes: &[u8]| -> u32 {
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), low.cast::<u8>().add(offset), bytes.len()) };
        low as u32 + offset as u32
    };
    let text = |offset: usize, name: &str| -> io::Result<u32> {
        Ok(put(offset, c(at.path(name))?.as_bytes_with_nul()))
    };
    let file = int80(5, [text(0, "f")?, (libc::O_CREAT | libc::O_RDWR) as u32, 0o640, 0])?;
    int80(4, [file, put(8_192, b"written by 32 bits"), 18, 0])?;
    // pwrite64: the offset in two halves.
    int80(181, [file, put(8_192, b"far"), 3, 100_000])?;
    let vector = [low as u32 + 8_192, 3, low as u32 + 8_192, 2];
    let vector: Vec<u8> = vector.iter().flat_map(|word| word.to_le_bytes()).collect();
    int80(146, [file, put(4_096, &vector), 2, 0])?;
    // ftruncate64, fchmod, close.
    int80(194, [file, 120_000, 0, 0])?;
    int80(94, [file, 0o600, 0, 0])?;
    int80(6, [file, 0, 0, 0])?;
    int80(39, [text(0, "directory")?, 0o700, 0, 0])?;
    int80(38, [text(0, "f")?, text(4_096, "directory/f")?, 0, 0])?;
    int80(10, [text(0, "goes")?, 0, 0, 0])?;
    int80(193, [text(0, "cut")?, 1_000, 0, 0])?;
    int80(15, [text(0, "cut")?, 0o4711, 0, 0])?;
    int80(9, [text(0, "cut")?, text(4_096, "second")?, 0, 0]).map(drop)
}
