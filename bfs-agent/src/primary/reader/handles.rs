//! File handles, made from what a probe saw of an inode (see the module above).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use bfs_common::abi::InodeId;
use rustix::fs::OFlags;

use super::{gone, magic_of};

/// How often an inode number that is just being given away is tried again.
const CREATING_MAX: u32 = 100_000;

/// Longest handle (`MAX_HANDLE_SZ`, include/uapi/linux/fcntl.h).
const HANDLE_MAX: usize = 128;

#[repr(C)]
pub(super) struct FileHandle {
    bytes: u32,
    kind: i32,
    data: [u8; HANDLE_MAX],
}

/// How a file system puts inode number and generation into a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// u32 number, u32 generation (ext4, xfs with small numbers).
    Ino32Gen,
    /// u64 number, u32 generation (xfs).
    Ino64Gen,
    /// u32 generation, u32 low and high half of the number (tmpfs).
    GenIno64,
    /// u64 number, u64 subvolume, u32 generation (btrfs).
    Btrfs,
}

/// The handles of one file system.
#[derive(Debug)]
pub(super) struct Handles {
    /// The file system, as the kernel numbers it.
    pub(super) dev: u32,
    /// The form in use.
    pub(super) form: Form,
    kind: i32,
    /// 0 where there are none.
    pub(super) subvolume: u64,
}

impl FileHandle {
    /// That of an open file.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let mut handle = Self { bytes: HANDLE_MAX as u32, kind: 0, data: [0; HANDLE_MAX] };
        let mut mount_id = 0i32;
        let empty: &CStr = c"";
        // SAFETY: the handle has room for the HANDLE_MAX bytes that its length field promises.
        let result = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                fd.as_raw_fd(),
                empty.as_ptr(),
                std::ptr::from_mut(&mut handle),
                std::ptr::from_mut(&mut mount_id),
                libc::AT_EMPTY_PATH,
            )
        };
        if result == 0 { Ok(handle) } else { Err(io::Error::last_os_error()) }
    }

    fn open(&self, mount: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC;
        // SAFETY: the handle is a valid struct file_handle whose length field fits its data.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                std::ptr::from_ref(self),
                flags.bits(),
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

impl Handles {
    /// Of the file system that a directory lies on; `None` if they are not understood.
    pub(super) fn of(fd: BorrowedFd<'_>, dev: u32) -> io::Result<Option<Self>> {
        let handle = match FileHandle::of(fd) {
            Ok(handle) => handle,
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(None),
            Err(e) => return Err(e),
        };
        let ino = rustix::fs::fstat(fd)?.st_ino;
        let form = match (magic_of(fd), handle.bytes) {
            (0xEF53 | 0x5846_5342, 8) => Form::Ino32Gen,
            (0x5846_5342, 12) => Form::Ino64Gen,
            (0x0102_1994, 12) => Form::GenIno64,
            (0x9123_683E, 20) => Form::Btrfs,
            _ => return Ok(None),
        };
        let subvolume = match form {
            Form::Btrfs => u64::from_ne_bytes(handle.data[8..16].try_into().unwrap_or([0; 8])),
            _ => 0,
        };
        let handles = Self { dev, form, kind: handle.kind, subvolume };
        Ok(handles.inode(&handle).is_some_and(|i| i.ino == ino).then_some(handles))
    }

    /// The inode, by a descriptor on a mount of its file system; `None` when it is gone.
    pub(super) fn open(
        &self,
        at: BorrowedFd<'_>,
        inode: InodeId,
        flags: OFlags,
    ) -> io::Result<Option<OwnedFd>> {
        let handle = self.handle(inode);
        let mut creating = 0;
        loop {
            match handle.open(at, flags) {
                Ok(fd) => return Ok(Some(fd)),
                Err(e) if gone(&e) => return Ok(None),
                // The number is just being given to a new inode (I_CREATING: iget_locked() in
                // fs/inode.c has nothing to return, and ext4_iget() calls that ENOMEM). When that
                // is done the generation tells that ours is gone.
                Err(e) if e.raw_os_error() == Some(libc::ENOMEM) && creating < CREATING_MAX => {
                    creating += 1;
                    std::thread::yield_now();
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn handle(&self, inode: InodeId) -> FileHandle {
        let mut data = [0; HANDLE_MAX];
        let mut len = 0;
        let mut put = |bytes: &[u8]| {
            data[len..len + bytes.len()].copy_from_slice(bytes);
            len += bytes.len();
        };
        let generation = inode.generation.to_ne_bytes();
        match self.form {
            Form::Ino32Gen => {
                put(&(inode.ino as u32).to_ne_bytes());
                put(&generation);
            }
            Form::Ino64Gen => {
                put(&inode.ino.to_ne_bytes());
                put(&generation);
            }
            Form::GenIno64 => {
                put(&generation);
                put(&(inode.ino as u32).to_ne_bytes());
                put(&((inode.ino >> 32) as u32).to_ne_bytes());
            }
            Form::Btrfs => {
                put(&inode.ino.to_ne_bytes());
                put(&self.subvolume.to_ne_bytes());
                put(&generation);
            }
        }
        FileHandle { bytes: len as u32, kind: self.kind, data }
    }

    /// The inode that a handle names.
    pub(super) fn inode(&self, handle: &FileHandle) -> Option<InodeId> {
        if handle.kind != self.kind {
            return None;
        }
        let u32_at = |at: usize| Some(u32::from_ne_bytes(handle.data.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_ne_bytes(handle.data.get(at..at + 8)?.try_into().ok()?));
        let (ino, generation) = match self.form {
            Form::Ino32Gen => (u64::from(u32_at(0)?), u32_at(4)?),
            Form::Ino64Gen => (u64_at(0)?, u32_at(8)?),
            Form::GenIno64 => (u64::from(u32_at(4)?) | u64::from(u32_at(8)?) << 32, u32_at(0)?),
            Form::Btrfs => (u64_at(0)?, u32_at(16)?),
        };
        Some(InodeId { ino, dev: self.dev, generation })
    }
}
