//! What the kernel asks of a mount, and the answers.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bfs_common::past::{Look, Seen};
use bfs_common::record::{FileKind, Name, ObjectId};
use bfs_common::wire::CatalogObject;
use bytes::Bytes;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};

use super::Link;
use super::names::{Ino, Names};

/// How long the kernel may remember what it was told: nothing of it ever changes.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);
/// Objects that are remembered here.
const KNOWN_MAX: usize = 16_384;
/// Bytes that the kernel may read ahead.
const READ_AHEAD_BYTES: u32 = 1 << 20;

/// An object, and how many names it has.
type Known = Arc<(CatalogObject, u32)>;

/// Entries of a directory while it is open: inode, type, name.
type Listing = Arc<Vec<(u64, FileType, Name)>>;

/// A checkpoint.
#[derive(Debug)]
pub struct Files {
    link: Link,
    names: Names,
    /// Of the checkpoint: the directories above the roots get it.
    time: SystemTime,
    known: Mutex<HashMap<ObjectId, Known>>,
    open: Mutex<(u64, HashMap<u64, Listing>)>,
}

impl Files {
    /// What the link leads to, taken at this time.
    #[must_use]
    pub fn new(link: Link, names: Names, wall_ns: i64) -> Self {
        let time = time(wall_ns.div_euclid(1_000_000_000), wall_ns.rem_euclid(1_000_000_000) as u32);
        Self { link, names, time, known: Mutex::default(), open: Mutex::default() }
    }

    fn look(&self, look: Look) -> Result<(Seen, Bytes), Errno> {
        match self.link.look(&look) {
            Ok((Seen::Failed(why), _)) => {
                tracing::error!("{why}");
                Err(Errno::EIO)
            }
            Ok(seen) => Ok(seen),
            Err(error) => {
                tracing::error!("{error}");
                Err(Errno::EIO)
            }
        }
    }

    fn known(&self, look: Look) -> Result<Known, Errno> {
        let (Seen::Object(found), _) = self.look(look)? else { return Err(Errno::EIO) };
        let known = Arc::new(found.ok_or(Errno::ENOENT)?);
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= KNOWN_MAX {
            all.clear();
        }
        all.insert(known.0.object, known.clone());
        Ok(known)
    }

    fn object(&self, object: ObjectId) -> Result<Known, Errno> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&object).cloned();
        known.map_or_else(|| self.known(Look::Object(object)), Ok)
    }

    fn object_of(&self, ino: INodeNo) -> Result<Known, Errno> {
        match self.names.of(ino.0) {
            Some(Ino::Object(object)) => self.object(object),
            Some(Ino::Above(_)) => Err(Errno::EINVAL),
            None => Err(Errno::ENOENT),
        }
    }

    fn attributes(&self, ino: Ino) -> Result<FileAttr, Errno> {
        match ino {
            Ino::Above(_) => Ok(FileAttr {
                ino: INodeNo(ino.number()),
                size: 0,
                blocks: 0,
                atime: self.time,
                mtime: self.time,
                ctime: self.time,
                crtime: self.time,
                kind: FileType::Directory,
                perm: 0o755,
                nlink: 1,
                uid: 0,
                gid: 0,
                rdev: 0,
                blksize: 4096,
                flags: 0,
            }),
            Ino::Object(object) => Ok(attributes(&*self.object(object)?)),
        }
    }

    fn found(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let name = Name::new(name.as_bytes()).ok_or(Errno::ENOENT)?;
        match self.names.of(parent.0).ok_or(Errno::ENOENT)? {
            Ino::Above(directory) => {
                let found = self.names.entries(directory).get(&name).copied();
                self.attributes(found.ok_or(Errno::ENOENT)?)
            }
            Ino::Object(directory) => Ok(attributes(&*self.known(Look::Entry(directory, name))?)),
        }
    }

    fn listing(&self, directory: Ino) -> Result<Vec<(u64, FileType, Name)>, Errno> {
        let mut all = Vec::new();
        match directory {
            Ino::Above(directory) => {
                for (name, ino) in self.names.entries(directory) {
                    all.push((ino.number(), self.attributes(*ino)?.kind, name.clone()));
                }
            }
            Ino::Object(object) => loop {
                let after = all.last().map(|(_, _, name): &(_, _, Name)| name.clone());
                let (Seen::Entries(some, last), _) = self.look(Look::Entries(object, after))? else {
                    return Err(Errno::EIO);
                };
                // Without progress this would never end.
                if some.is_empty() && !last {
                    return Err(Errno::EIO);
                }
                let line = |(name, object, kind)| (Ino::Object(object).number(), type_of(kind), name);
                all.extend(some.into_iter().map(line));
                if last {
                    break;
                }
            },
        }
        Ok(all)
    }

    /// The value of an extended attribute.
    fn value(&self, ino: INodeNo, name: &OsStr) -> Result<Bytes, Errno> {
        let Some(Ino::Object(object)) = self.names.of(ino.0) else { return Err(Errno::NO_XATTR) };
        let known = self.object(object)?;
        let name = name.to_str().filter(|name| known.0.xattrs.iter().any(|(n, _)| n == name));
        let name = name.ok_or(Errno::NO_XATTR)?.to_owned();
        match self.look(Look::Xattr(object, name))? {
            (Seen::Bytes(true), value) => Ok(value),
            _ => Err(Errno::EIO),
        }
    }
}

fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let whole = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    whole.and_then(|t| t.checked_add(Duration::from_nanos(nanoseconds.into()))).unwrap_or(UNIX_EPOCH)
}

fn type_of(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

fn attributes(known: &(CatalogObject, u32)) -> FileAttr {
    let (object, links) = known;
    let mtime = time(object.meta.mtime_sec, object.meta.mtime_nsec);
    let size = match object.kind {
        FileKind::Regular => object.size,
        FileKind::Symlink => object.target.len() as u64,
        _ => 0,
    };
    // The form in which the kernel takes it: include/linux/kdev_t.h, new_decode_dev().
    let (major, minor) = (rustix::fs::major(object.device), rustix::fs::minor(object.device));
    FileAttr {
        ino: INodeNo(Ino::Object(object.object).number()),
        size,
        blocks: size.div_ceil(512),
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: type_of(object.kind),
        perm: object.meta.permissions as u16,
        nlink: if object.kind == FileKind::Directory { 1 } else { *links },
        uid: object.meta.uid,
        gid: object.meta.gid,
        rdev: (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        blksize: 4096,
        flags: 0,
    }
}

/// Answers with bytes as getxattr(2) and listxattr(2) want it.
fn sized(reply: ReplyXattr, size: u32, bytes: &[u8]) {
    match u32::try_from(bytes.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(bytes),
        _ => reply.error(Errno::ERANGE),
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Where the kernel is too old for it, modes alone decide for those who did not mount.
        let _ = config.add_capabilities(InitFlags::FUSE_POSIX_ACL);
        if let Err(most) = config.set_max_readahead(READ_AHEAD_BYTES) {
            // It says what it can do.
            let _ = config.set_max_readahead(most);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.found(parent, name) {
            Ok(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let found = self.names.of(ino.0).ok_or(Errno::ENOENT).and_then(|ino| self.attributes(ino));
        match found {
            Ok(attributes) => reply.attr(&FOR_EVER, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.object_of(ino) {
            Ok(known) => reply.data(&known.0.target),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(Ino::Object(object)) = self.names.of(ino.0) else { return reply.error(Errno::EISDIR) };
        match self.look(Look::Bytes(object, offset, size)) {
            Ok((Seen::Bytes(_), bytes)) => reply.data(&bytes),
            Ok(_) => reply.error(Errno::EIO),
            Err(error) => reply.error(error),
        }
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let Some(directory) = self.names.of(ino.0) else { return reply.error(Errno::ENOENT) };
        match self.listing(directory) {
            Ok(listing) => {
                let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
                open.0 += 1;
                let handle = open.0;
                open.1.insert(handle, Arc::new(listing));
                reply.opened(FileHandle(handle), FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(error) => reply.error(error),
        }
    }

    fn readdir(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listing = self.open.lock().unwrap_or_else(PoisonError::into_inner).1.get(&handle.0).cloned();
        let Some(listing) = listing else { return reply.error(Errno::EBADF) };
        for index in usize::try_from(offset).unwrap_or(usize::MAX)..listing.len().saturating_add(2) {
            let next = index as u64 + 1;
            let full = match index {
                0 => reply.add(ino, next, FileType::Directory, "."),
                1 => reply.add(ino, next, FileType::Directory, ".."),
                _ => {
                    let (number, kind, name) = &listing[index - 2];
                    reply.add(INodeNo(*number), next, *kind, name.as_os_str())
                }
            };
            if full {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).1.remove(&handle.0);
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.value(ino, name) {
            Ok(value) => sized(reply, size, &value),
            Err(error) => reply.error(error),
        }
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let mut list = Vec::new();
        if let Some(Ino::Object(object)) = self.names.of(ino.0) {
            match self.object(object) {
                Ok(known) => {
                    for (name, _) in &known.0.xattrs {
                        list.extend_from_slice(name.as_bytes());
                        list.push(0);
                    }
                }
                Err(error) => return reply.error(error),
            }
        }
        sized(reply, size, &list);
    }
}
