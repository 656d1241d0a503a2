//! A disk that fails where a test says: an image whose bytes go through a file system of this process (FUSE), below a loop
//! device that the replicated directory lies on. So it is ext4 itself, and the block layer, that programs get their
//! errors from.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, Session, WriteFlags,
};

/// Bytes of a block of the file system on it.
pub const BLOCK: u64 = 4096;
/// Name of the image.
pub const DISK: &str = "disk";

const ROOT: INodeNo = INodeNo::ROOT;
const INODE: INodeNo = INodeNo(2);
const SHORT: Duration = Duration::from_secs(1);

/// What is wrong with it, by the numbers of its blocks.
#[derive(Debug, Default)]
struct Faults {
    unreadable: BTreeSet<u64>,
    unwritable: BTreeSet<u64>,
    /// Blocks that cannot be read stay so when they are written: else the disk takes others for them.
    lasting: bool,
}

/// The disk; the test's side.
#[derive(Debug)]
pub struct BadDisk {
    faults: Arc<Mutex<Faults>>,
    image: Arc<File>,
    /// Ends the file system when it is dropped.
    _session: BackgroundSession,
}

#[derive(Debug)]
struct Served {
    faults: Arc<Mutex<Faults>>,
    image: Arc<File>,
    bytes: u64,
}

fn locked(faults: &Mutex<Faults>) -> MutexGuard<'_, Faults> {
    faults.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BadDisk {
    /// One of so many bytes, as the file [`DISK`] below a directory.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn mount(image: &Path, bytes: u64, at: &Path) -> Result<Self> {
        let image = File::options().read(true).write(true).create_new(true).open(image)?;
        image.set_len(bytes)?;
        let (faults, image) = (Arc::new(Mutex::new(Faults::default())), Arc::new(image));
        let served = Served { faults: Arc::clone(&faults), image: Arc::clone(&image), bytes };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("bad-disk".into())];
        let session = Session::new(served, at, &config).context("this needs /dev/fuse")?.spawn()?;
        Ok(Self { faults, image, _session: session })
    }

    /// The block that has these bytes of a file on it.
    ///
    /// # Errors
    /// When there is none.
    pub fn block_of(file: &File, offset: u64) -> Result<u64> {
        let mut block = i32::try_from(offset / BLOCK)?;
        // SAFETY: FIBMAP (1) takes and gives an int.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), 1, &raw mut block) };
        ensure!(done == 0 && block > 0, "no block: {}", std::io::Error::last_os_error());
        Ok(u64::try_from(block)?)
    }

    /// These bytes of a file, which is synced, cannot be read from now on, and are not in memory any more.
    ///
    /// # Errors
    /// When they have no block.
    pub fn lose(&self, file: &File, offset: u64) -> Result<()> {
        file.sync_all()?;
        let block = Self::block_of(file, offset)?;
        locked(&self.faults).unreadable.insert(block);
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(())
    }

    /// Other bytes stand there from now on, without an error.
    ///
    /// # Errors
    /// When they have no block, or it cannot be written.
    pub fn spoil(&self, file: &File, offset: u64, bytes: &[u8]) -> Result<()> {
        file.sync_all()?;
        self.image.write_all_at(bytes, Self::block_of(file, offset)? * BLOCK + offset % BLOCK)?;
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(())
    }

    /// What is written to these bytes of a file fails from now on.
    ///
    /// # Errors
    /// When they have no block.
    pub fn refuse_writes(&self, file: &File, offset: u64) -> Result<()> {
        // To find it may take a read of the disk, which asks what is wrong with it.
        let block = Self::block_of(file, offset)?;
        locked(&self.faults).unwritable.insert(block);
        Ok(())
    }

    /// It takes everything again.
    pub fn accept_writes(&self) {
        locked(&self.faults).unwritable.clear();
    }

    /// Whether blocks that cannot be read stay so when they are written.
    pub fn lasting(&self, lasting: bool) {
        locked(&self.faults).lasting = lasting;
    }

    /// How many blocks cannot be read.
    #[must_use]
    pub fn unreadable(&self) -> usize {
        locked(&self.faults).unreadable.len()
    }
}

fn blocks(offset: u64, len: usize) -> std::ops::RangeInclusive<u64> {
    offset / BLOCK..=(offset + (len as u64).max(1) - 1) / BLOCK
}

impl Served {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, perm, size) = if ino == INODE {
            (FileType::RegularFile, 0o600, self.bytes)
        } else {
            (FileType::Directory, 0o700, 0)
        };
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK as u32,
            flags: 0,
        }
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == DISK {
            reply.entry(&SHORT, &self.attributes(INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&SHORT, &self.attributes(if ino == INODE { INODE } else { ROOT }));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Nothing of it stays in memory, but what the file system on it keeps.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = u64::from(size).min(self.bytes.saturating_sub(offset)) as usize;
        if locked(&self.faults).unreadable.range(blocks(offset, len)).next().is_some() {
            return reply.error(Errno::EIO);
        }
        let mut bytes = vec![0; len];
        match self.image.read_exact_at(&mut bytes, offset) {
            Ok(()) => reply.data(&bytes),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut faults = locked(&self.faults);
        if faults.unwritable.range(blocks(offset, data.len())).next().is_some() {
            return reply.error(Errno::EIO);
        }
        if !faults.lasting {
            faults.unreadable.retain(|block| !blocks(offset, data.len()).contains(block));
        }
        drop(faults);
        match self.image.write_all_at(data, offset) {
            Ok(()) => reply.written(data.len() as u32),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
