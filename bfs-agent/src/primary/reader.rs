//! Reading the replicated set by inode: file handles, never paths.
//!
//! A probe names an inode by device, number and generation. The file systems of exportfs encode
//! just that in their handles (ext4 and the generic form: `generic_encode_ino32_fh` in
//! fs/libfs.c; xfs: fs/xfs/xfs_export.c; btrfs: fs/btrfs/export.c; tmpfs: `shmem_encode_fh` in
//! mm/shmem.c), so a handle can be made from what the probe saw, and a handle of an entry tells
//! which inode it names. The form in use is taken from the handle of the root directory and
//! checked against it; a file system with another form is refused by name.

mod handles;
mod others;
mod outside;
mod pages;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bfs_common::abi::InodeId;
use bfs_common::record::{FileKind, Name};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::engine::host::{HostError, Segment, Stat};
use crate::tree::{self, Xattrs};

use handles::{FileHandle, Form, Handles};
use outside::Outside;

/// Bytes read at a time.
const BUFFER: usize = 1 << 20;

/// No hole is shorter: it is a block of a file system.
const HOLE_MIN: usize = 512;

#[derive(Debug)]
struct Mount {
    handles: Handles,
    /// On a copy of the mount that nothing is mounted over: what is mounted inside is not in the way.
    fd: OwnedFd,
    /// On the mount itself, which has paths.
    attached: OwnedFd,
    /// Number of the mount (statx(2)).
    mount_id: u64,
}

/// A subtree cannot be replicated.
#[derive(Debug, thiserror::Error)]
pub enum ReaderError {
    /// The file system's handles are not understood.
    #[error(
        "{path:?} lies on a file system (type {magic:#x}) that cannot be read by inode: ext4, xfs, btrfs and tmpfs can be replicated"
    )]
    FileSystem {
        /// The subtree.
        path: PathBuf,
        /// `f_type` of statfs(2).
        magic: u64,
    },
    /// A call failed.
    #[error("cannot open {path:?}: {source}")]
    Open {
        /// The subtree.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Opens inodes of the file systems that the subtrees lie on.
#[derive(Debug)]
pub struct Reader {
    mounts: Vec<Mount>,
    outside: Outside,
    buffer: Vec<u8>,
}

/// A subtree's root, opened.
#[derive(Clone, Debug)]
pub struct Root {
    /// Its canonical absolute path.
    pub path: PathBuf,
    /// The directory.
    pub stat: Stat,
    /// UUID of its file system.
    pub file_system: u128,
    /// Its subvolume.
    pub subvolume: u64,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// Knows no file system yet.
    #[must_use]
    pub fn new() -> Self {
        Self { mounts: Vec::new(), outside: Outside::new(), buffer: vec![0; BUFFER] }
    }

    /// Makes the file system of a subtree known.
    ///
    /// # Errors
    /// [`ReaderError`].
    pub fn add_root(&mut self, path: &Path) -> Result<Root, ReaderError> {
        let fail = |source: io::Error| ReaderError::Open { path: path.to_path_buf(), source };
        let fd = open_directory(path).map_err(fail)?;
        let stat = tree::stat_fd(fd.as_fd()).map_err(fail)?;
        let dev = kernel_dev(stat.on_device);
        let file_system = file_system_id(fd.as_fd()).map_err(fail)?;
        if self.mount(dev).is_none() {
            let mount = mount_of(&fd, dev).map_err(fail)?.ok_or_else(|| ReaderError::FileSystem {
                path: path.to_path_buf(),
                magic: magic_of(fd.as_fd()),
            })?;
            self.mounts.push(mount);
            self.outside.forget_table();
        }
        let subvolume = self.mount(dev).map_or(0, |m| m.handles.subvolume);
        let stat = self.stat_of(fd.as_fd()).map_err(fail)?.ok_or_else(|| fail(Errno::XDEV.into()))?;
        Ok(Root { path: path.to_path_buf(), stat, file_system, subvolume })
    }

    /// Lets go of the file systems that no subtree lies on any more, so that they can be unmounted.
    pub fn keep(&mut self, of_roots: impl Fn(u32) -> bool) {
        self.mounts.retain(|mount| of_roots(mount.handles.dev));
    }

    /// The devices of the subtrees, as the kernel numbers them.
    #[must_use]
    pub fn devices(&self) -> Vec<u32> {
        self.mounts.iter().map(|m| m.handles.dev).collect()
    }

    /// Whether one of the subtrees lies on btrfs.
    #[must_use]
    pub fn has_btrfs(&self) -> bool {
        self.mounts.iter().any(|m| m.handles.form == Form::Btrfs)
    }

    fn mount(&self, dev: u32) -> Option<&Mount> {
        self.mounts.iter().find(|m| m.handles.dev == dev)
    }

    fn open(&self, inode: InodeId, flags: OFlags) -> io::Result<Option<OwnedFd>> {
        let Some(mount) = self.mount(inode.dev) else { return Ok(None) };
        mount.handles.open(mount.fd.as_fd(), inode, flags)
    }

    /// The inode and attributes behind a descriptor; `None` on a file system that is not known.
    fn stat_of(&self, fd: BorrowedFd<'_>) -> io::Result<Option<Stat>> {
        let stat = tree::stat_fd(fd)?;
        let Some(mount) = self.mount(kernel_dev(stat.on_device)) else { return Ok(None) };
        let handle = FileHandle::of(fd)?;
        let Some(inode) = mount.handles.inode(&handle) else { return Ok(None) };
        let target = match stat.kind {
            FileKind::Symlink => rustix::fs::readlinkat(fd, c"", Vec::new())?.into_bytes(),
            _ => Vec::new(),
        };
        Ok(Some(Stat {
            inode,
            kind: stat.kind,
            meta: stat.meta,
            size: stat.size,
            device: stat.device,
            target,
            links: u32::try_from(stat.nlink).unwrap_or(u32::MAX),
        }))
    }

    /// What an entry names; `None` when absent, or not on the file system of its directory.
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn child(&self, directory: InodeId, name: &Name) -> Result<Option<Stat>, HostError> {
        let inner = || -> io::Result<Option<Stat>> {
            let Some(dir) = self.open(directory, OFlags::PATH | OFlags::DIRECTORY)? else { return Ok(None) };
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(&dir, name.as_os_str(), flags, Mode::empty()) {
                Ok(fd) => match self.stat_of(fd.as_fd()) {
                    Ok(Some(found)) if found.inode.dev == directory.dev => Ok(Some(found)),
                    // Nothing that is mounted is seen here, so it is a part of the file system itself.
                    Ok(_) => Err(io::Error::other(
                        "it is a btrfs subvolume of its own, which cannot be replicated as a part of another \
                         one: move it out of the subtree, or give it a --path of its own",
                    )),
                    // Removed between the two calls.
                    Err(e) if gone(&e) => Ok(None),
                    Err(e) => Err(e),
                },
                Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
                Err(e) => Err(e.into()),
            }
        };
        inner().map_err(|source| HostError::Read { what: format!("entry {name:?} of {directory:?}"), source })
    }

    /// The names in a directory; `None` when it is gone.
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn list(&self, directory: InodeId) -> Result<Option<Vec<Name>>, HostError> {
        let inner = || -> io::Result<Option<Vec<Name>>> {
            let Some(fd) = self.open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME)? else {
                return Ok(None);
            };
            let mut names = Vec::new();
            for entry in Dir::new(fd)? {
                let entry = entry?;
                names.extend(Name::new(entry.file_name().to_bytes()));
            }
            Ok(Some(names))
        };
        inner().map_err(|source| HostError::Read { what: format!("directory {directory:?}"), source })
    }

    /// Attributes of an inode; `None` when it is gone.
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn stat(&self, inode: InodeId) -> Result<Option<Stat>, HostError> {
        let inner = || -> io::Result<Option<Stat>> {
            let Some(fd) = self.open(inode, OFlags::PATH)? else { return Ok(None) };
            self.stat_of(fd.as_fd())
        };
        inner().map_err(|source| HostError::Read { what: format!("attributes of {inode:?}"), source })
    }

    /// A descriptor of an inode, not for reading; `None` when it is gone.
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn descriptor(&self, inode: InodeId) -> Result<Option<OwnedFd>, HostError> {
        self.open(inode, OFlags::PATH)
            .map_err(|source| HostError::Read { what: format!("the file {inode:?}"), source })
    }

    /// A regular file, to be read and written by who brings it back; `None` when it is gone.
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn open_to_mend(&self, inode: InodeId) -> Result<Option<File>, HostError> {
        let opened = self.open(inode, OFlags::RDWR | OFlags::NOATIME | OFlags::NONBLOCK);
        opened
            .map(|fd| fd.map(File::from))
            .map_err(|source| HostError::Read { what: format!("the file {inode:?}"), source })
    }

    /// Extended attributes of an inode; `None` when it is gone.
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn xattrs(&self, inode: InodeId) -> Result<Option<Xattrs>, HostError> {
        let inner = || -> io::Result<Option<Xattrs>> {
            let Some(fd) = self.open(inode, OFlags::PATH)? else { return Ok(None) };
            tree::xattrs(fd.as_fd()).map(Some)
        };
        inner().map_err(|source| HostError::Read { what: format!("xattrs of {inode:?}"), source })
    }

    /// Reads a range of a regular file in segments; `None` when it is gone. Unless `holes` is set nobody looks for
    /// holes.
    ///
    /// # Errors
    /// [`HostError::Read`].
    pub fn read(
        &mut self,
        inode: InodeId,
        range: Range<u64>,
        holes: bool,
        each: &mut dyn FnMut(Segment<'_>),
    ) -> Result<Option<()>, HostError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.read_with(inode, range, holes, &mut buffer, each);
        self.buffer = buffer;
        result.map_err(|source| HostError::Read { what: format!("content of {inode:?}"), source })
    }

    fn read_with(
        &self,
        inode: InodeId,
        range: Range<u64>,
        holes: bool,
        buffer: &mut [u8],
        each: &mut dyn FnMut(Segment<'_>),
    ) -> io::Result<Option<()>> {
        let flags = OFlags::RDONLY | OFlags::NOATIME | OFlags::NONBLOCK;
        let Some(fd) = self.open(inode, flags)? else { return Ok(None) };
        let mut at = range.start;
        while at < range.end {
            let want = ((range.end - at) as usize).min(buffer.len());
            let bytes = match rustix::io::pread(&fd, &mut buffer[..want], at) {
                Ok(n) => &buffer[..n],
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            if bytes.is_empty() {
                break;
            }
            // What is not zero is no hole.
            if holes && bytes[..bytes.len().min(HOLE_MIN)].iter().all(|byte| *byte == 0) {
                let data = data_from(&fd, at, range.end)?;
                if data > at {
                    each(Segment::Hole(at, data - at));
                    at = data;
                    continue;
                }
            }
            each(Segment::Data(at, bytes));
            at += bytes.len() as u64;
        }
        Ok(Some(()))
    }
}

fn gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESTALE))
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOATIME;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

/// `st_dev` as the kernel numbers it inside (`MKDEV`, include/linux/kdev_t.h).
#[must_use]
pub fn kernel_dev(st_dev: u64) -> u32 {
    rustix::fs::major(st_dev) << 20 | rustix::fs::minor(st_dev)
}

fn magic_of(fd: BorrowedFd<'_>) -> u64 {
    rustix::fs::fstatfs(fd).map_or(0, |s| s.f_type.cast_unsigned())
}

/// The same directory on a private copy of its mount, without what is mounted below (open_tree(2)).
fn uncovered(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use rustix::mount::{OpenTreeFlags, open_tree};
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let copy = open_tree(fd, c"", flags)?;
    // What open_tree gives is as if opened with O_PATH, which open_by_handle_at does not take.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOATIME;
    Ok(rustix::fs::openat(&copy, c".", flags, Mode::empty())?)
}

/// The mount that a directory lies on; `None` if its file system's handles are not understood.
fn mount_of(fd: &OwnedFd, dev: u32) -> io::Result<Option<Mount>> {
    let Some(handles) = Handles::of(fd.as_fd(), dev)? else { return Ok(None) };
    let mount_id = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
    Ok(Some(Mount { handles, fd: uncovered(fd.as_fd())?, attached: fd.try_clone()?, mount_id }))
}

/// UUID of the file system, or what `statfs` gives as its id where the kernel tells none
/// (`FS_IOC_GETFSUUID`, include/uapi/linux/fs.h, since 6.9).
fn file_system_id(fd: BorrowedFd<'_>) -> io::Result<u128> {
    const FS_IOC_GETFSUUID: libc::c_ulong = 0x8011_1500;
    let mut uuid = [0u8; 17];
    // SAFETY: the call writes one struct fsuuid2 of 17 bytes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_GETFSUUID, uuid.as_mut_ptr()) };
    if result == 0 && uuid[0] == 16 {
        return Ok(u128::from_le_bytes(uuid[1..].try_into().unwrap_or([0; 16])));
    }
    let file = File::from(fd.try_clone_to_owned()?);
    // SAFETY: an all-zero statfs is a valid value to be written over.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the struct is ours.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fsid_t is two ints.
    let id: [u32; 2] = unsafe { std::mem::transmute(stat.f_fsid) };
    Ok(u128::from(id[0]) << 32 | u128::from(id[1]))
}

/// Where the next data stand in a file at `at` or behind it, and before `end`: up to there it is a hole.
///
/// A file system without holes says "data". ext4 walks the extents for it, with the inode locked (ext4_llseek() in
/// fs/ext4/file.c): 0.4 ms where some 100 MB were just written.
fn data_from(fd: &OwnedFd, at: u64, end: u64) -> io::Result<u64> {
    match rustix::fs::seek(fd, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => Ok(data.min(end)),
        // No data after this: a hole to the end, if the end is not here already.
        Err(Errno::NXIO) => Ok(rustix::fs::fstat(fd)?.st_size.cast_unsigned().min(end).max(at)),
        Err(Errno::INVAL) => Ok(at),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::engine::resolve::Start;

    #[test]
    fn what_is_mounted_over_a_directory_does_not_hide_it() {
        // Mounts of a thread of its own.
        std::thread::spawn(|| {
            let dir = tempfile::tempdir().unwrap();
            let point = dir.path().join("point");
            std::fs::create_dir(&point).unwrap();
            std::fs::write(point.join("hidden"), b"hidden").unwrap();
            // SAFETY: calls without memory of ours but constant strings and a path that outlives them.
            unsafe {
                assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0, "this test needs root");
                let private = libc::MS_REC | libc::MS_PRIVATE;
                let none = std::ptr::null();
                assert_eq!(libc::mount(none, c"/".as_ptr(), none, private, none.cast()), 0);
                let path = std::ffi::CString::new(point.as_os_str().as_encoded_bytes()).unwrap();
                let tmpfs = c"tmpfs".as_ptr();
                assert_eq!(libc::mount(tmpfs, path.as_ptr(), tmpfs, 0, none.cast()), 0);
            }
            std::fs::write(point.join("not-ours"), b"x").unwrap();
            let mut reader = Reader::new();
            let root = reader.add_root(dir.path()).unwrap();
            let found = reader.child(root.stat.inode, &Name::new(b"point").unwrap()).unwrap().unwrap();
            assert_eq!(found.inode.dev, root.stat.inode.dev);
            let names = reader.list(found.inode).unwrap().unwrap();
            assert_eq!(names, vec![Name::new(b"hidden").unwrap()]);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn an_inode_is_found_again_by_what_its_handle_says() {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = Reader::new();
        let root = reader.add_root(dir.path()).unwrap();
        std::fs::write(dir.path().join("f"), b"hello").unwrap();
        let name = Name::new(b"f").unwrap();
        let stat = reader.child(root.stat.inode, &name).unwrap().unwrap();
        assert_eq!(stat.kind, FileKind::Regular);
        assert_eq!(reader.stat(stat.inode).unwrap().unwrap(), stat);
        let mut content = Vec::new();
        reader
            .read(stat.inode, 0..100, false, &mut |s| match s {
                Segment::Data(_, bytes) => content.extend_from_slice(bytes),
                Segment::Hole(_, n) => content.extend(std::iter::repeat_n(0, n as usize)),
            })
            .unwrap()
            .unwrap();
        assert_eq!(content, b"hello");
        assert_eq!(reader.list(root.stat.inode).unwrap().unwrap(), vec![name.clone()]);
        std::fs::remove_file(dir.path().join("f")).unwrap();
        assert_eq!(reader.child(root.stat.inode, &name).unwrap(), None);
        // Another test may just be starting a process, which holds a copy of the descriptor that the write
        // used until its exec: the inode may live on for that long, but without a name.
        assert!(reader.stat(stat.inode).unwrap().is_none_or(|s| s.links == 0));
        let start = Start {
            base: InodeId::NONE,
            root: InodeId::NONE,
            tgid: std::process::id(),
            mounts: 0,
            ended_ns: u64::MAX,
        };
        let back = reader.outside_path(root.stat.inode, &start).unwrap();
        assert_eq!(back, dir.path());
    }

    #[test]
    fn holes_are_told_from_data() {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = Reader::new();
        let root = reader.add_root(dir.path()).unwrap();
        let file = File::create(dir.path().join("f")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 1 << 20).unwrap();
        file.set_len(4 << 20).unwrap();
        let stat = reader.child(root.stat.inode, &Name::new(b"f").unwrap()).unwrap().unwrap();
        let (mut data, mut hole) = (0, 0);
        reader
            .read(stat.inode, 0..u64::MAX, true, &mut |s| match s {
                Segment::Data(_, bytes) => data += bytes.len() as u64,
                Segment::Hole(_, n) => hole += n,
            })
            .unwrap();
        assert_eq!(data + hole, 4 << 20);
        assert!(hole >= 3 << 20 || data == 4 << 20);
        let (mut zeros, mut others) = (0, 0);
        reader
            .read(stat.inode, 0..u64::MAX, false, &mut |s| match s {
                Segment::Data(_, bytes) => {
                    zeros += bytes.iter().filter(|b| **b == 0).count();
                    others += bytes.iter().filter(|b| **b != 0).count();
                }
                Segment::Hole(..) => panic!("nobody asked for holes"),
            })
            .unwrap();
        assert_eq!((zeros, others), ((4 << 20) - 1, 1));
    }
}
