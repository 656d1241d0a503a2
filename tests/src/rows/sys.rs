//! System calls as they are, without what a library makes of them.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Numbers that the libc crate does not have (arch/x86/entry/syscalls/syscall_64.tbl).
pub mod nr {
    /// Since 6.6.
    pub const FCHMODAT2: i64 = 452;
    /// Since 6.13.
    pub const SETXATTRAT: i64 = 463;
    /// Since 6.13.
    pub const REMOVEXATTRAT: i64 = 466;
    /// Since 6.17.
    pub const FILE_SETATTR: i64 = 469;
}

/// The working directory as a directory descriptor.
pub const CWD: usize = libc::AT_FDCWD as usize;

/// Makes a system call.
///
/// # Errors
/// What the kernel says.
pub fn call<const N: usize>(nr: i64, args: [usize; N]) -> io::Result<usize> {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&args);
    let [a, b, c, d, e, f] = all;
    // SAFETY: rows hand in pointers to memory that lives through the call; a wrong one would be EFAULT.
    let result = unsafe { libc::syscall(nr, a, b, c, d, e, f) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
}

/// A path for the kernel.
///
/// # Errors
/// A zero byte in it.
pub fn c(path: impl AsRef<Path>) -> io::Result<CString> {
    Ok(CString::new(path.as_ref().as_os_str().as_bytes())?)
}

/// The address of a string.
#[must_use]
pub fn at(text: &std::ffi::CStr) -> usize {
    text.as_ptr() as usize
}

/// The address of anything.
pub fn address<T: ?Sized>(of: &T) -> usize {
    std::ptr::from_ref(of).cast::<u8>() as usize
}

/// A descriptor as an argument.
#[must_use]
pub fn fd(of: &impl AsRawFd) -> usize {
    of.as_raw_fd() as usize
}

/// Opens.
///
/// # Errors
/// What the kernel says.
pub fn open(path: impl AsRef<Path>, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    let opened = call(libc::SYS_openat, [CWD, at(&c(path)?), flags as usize, mode as usize])?;
    Ok(own(opened))
}

/// Takes over a descriptor that a call gave.
#[must_use]
pub fn own(number: usize) -> OwnedFd {
    // SAFETY: the kernel just gave this descriptor, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(number as i32) }
}

/// A pipe: reading end, writing end.
///
/// # Errors
/// What the kernel says.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0i32; 2];
    call(libc::SYS_pipe2, [std::ptr::from_mut(&mut ends) as usize, 0])?;
    Ok((own(ends[0] as usize), own(ends[1] as usize)))
}

/// `struct iovec`s over some buffers.
#[must_use]
pub fn vectors<B: AsRef<[u8]>>(buffers: &[B]) -> Vec<[usize; 2]> {
    buffers.iter().map(B::as_ref).map(|buffer| [buffer.as_ptr() as usize, buffer.len()]).collect()
}

/// The number of an ioctl (`_IOC`, include/uapi/asm-generic/ioctl.h). `direction`: 1 the kernel reads, 2 it
/// writes.
#[must_use]
pub const fn ioc(direction: usize, kind: u8, number: usize, size: usize) -> usize {
    direction << 30 | size << 16 | (kind as usize) << 8 | number
}

/// Sets an extended attribute.
///
/// # Errors
/// What the kernel says.
pub fn setxattr(path: impl AsRef<Path>, name: &std::ffi::CStr, value: &[u8]) -> io::Result<()> {
    let path = c(path)?;
    call(libc::SYS_setxattr, [at(&path), at(name), address(value), value.len(), 0]).map(drop)
}

/// Forks; runs `child` in the child, which ends with 0 or, after an error, with its number; waits.
///
/// # Errors
/// What the child met.
pub fn in_child(child: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // SAFETY: rows have one thread when they fork, unless they say otherwise.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        let status = child().map_or_else(|e| e.raw_os_error().unwrap_or(255), |()| 0);
        // SAFETY: ends the child without the parent's destructors.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: our child.
    if unsafe { libc::waitpid(pid, &raw mut status, 0) } != pid {
        return Err(io::Error::last_os_error());
    }
    if libc::WIFEXITED(status) {
        return match libc::WEXITSTATUS(status) {
            0 => Ok(()),
            number => Err(io::Error::from_raw_os_error(number)),
        };
    }
    Err(io::Error::other(format!("the child ended with signal {}", libc::WTERMSIG(status))))
}
