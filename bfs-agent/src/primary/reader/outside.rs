//! What lies outside of the set, as a process sees it: its root, its mounts, its descriptors.
//!
//! Paths are looked at when the record of their call is taken in, some time after the call. What is not
//! there any more counts as outside: only directories, symlinks and mounts outside that lead inside and
//! are gone again within that time could make a difference (docs/write-paths.md). A symlink that was replaced
//! since the call has a younger time of change than that.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::Hash;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use bfs_common::abi::InodeId;
use bfs_common::record::FileKind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Statx, StatxFlags, StatxTimestamp};
use rustix::io::Errno;

use super::handles::Handles;
use super::{Reader, kernel_dev, open_directory};
use crate::generation::wall_ns;
use crate::primary::clock::monotonic_ns;
use crate::primary::engine::host::Seen;
use crate::primary::engine::resolve::Start;
use crate::primary::mount_table::{self, Line};
use crate::tree;

/// What is known of this process's own view.
#[derive(Debug)]
pub(super) struct Outside {
    root: InodeId,
    mount_namespace: u32,
    /// The table of mounts, and as it had them last the roots of bind mounts and where each file system is mounted.
    table: Option<File>,
    bound: HashSet<(u32, u64)>,
    points: HashMap<u32, Vec<PathBuf>>,
    looks: Looks<PathBuf, Seen>,
    paths: Looks<(InodeId, u32), Option<PathBuf>>,
}

/// What was seen, and when. Calls that ended before that are as well served by it as by another look:
/// records come in heaps, and their paths begin alike.
#[derive(Debug)]
struct Looks<K, V>(HashMap<K, (u64, V)>);

/// Looks that are kept.
const LOOKS_MAX: usize = 4_096;

impl<K: Eq + Hash, V: Clone> Looks<K, V> {
    fn since<Q: Eq + Hash + ?Sized>(&self, key: &Q, ended_ns: u64) -> Option<V>
    where
        K: std::borrow::Borrow<Q>,
    {
        self.0.get(key).filter(|(looked_ns, _)| *looked_ns >= ended_ns).map(|(_, seen)| seen.clone())
    }

    /// `looked_ns`: before the look.
    fn keep(&mut self, key: K, looked_ns: u64, seen: V) {
        if self.0.len() >= LOOKS_MAX {
            self.0.clear();
        }
        self.0.insert(key, (looked_ns, seen));
    }
}

impl Outside {
    pub(super) fn new() -> Self {
        let root = rustix::fs::stat("/").map_or(InodeId::NONE, |stat| InodeId {
            ino: stat.st_ino,
            dev: kernel_dev(stat.st_dev),
            generation: 0,
        });
        let mount_namespace = rustix::fs::stat("/proc/self/ns/mnt").map_or(0, |stat| stat.st_ino as u32);
        Self {
            root,
            mount_namespace,
            table: None,
            bound: HashSet::new(),
            points: HashMap::new(),
            looks: Looks(HashMap::new()),
            paths: Looks(HashMap::new()),
        }
    }

    /// It is read again, whether it changes or not.
    pub(super) fn forget_table(&mut self) {
        self.table = None;
    }

    /// Whether the table of mounts is another one than when it was read last.
    fn table_changed(&mut self) -> bool {
        let Some(table) = &self.table else {
            self.table = File::open("/proc/self/mountinfo").ok();
            return true;
        };
        // A change shows as an exceptional condition (proc_pid_mounts(5)).
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(table, PollFlags::PRI)];
        poll(&mut fds, Some(&now)).is_err() || fds[0].revents().intersects(PollFlags::PRI | PollFlags::ERR)
    }
}

impl Reader {
    /// Whether this is the root directory of the host.
    #[must_use]
    pub fn is_host_root(&self, directory: InodeId) -> bool {
        directory.ino == self.outside.root.ino && directory.dev == self.outside.root.dev
    }

    /// Whether the process sees the mounts that we see. 0: nobody knows, so it is assumed.
    #[must_use]
    pub fn same_mounts(&self, start: &Start) -> bool {
        start.mounts == 0 || start.mounts == self.outside.mount_namespace
    }

    /// The root directory of a process with other mounts than ours, as a path, if it is still what it was.
    fn root_of(&self, start: &Start) -> Option<PathBuf> {
        let namespace = rustix::fs::stat(format!("/proc/{}/ns/mnt", start.tgid)).ok()?;
        let root = PathBuf::from(format!("/proc/{}/root/", start.tgid));
        (namespace.st_ino as u32 == start.mounts && is_inode(&root, start.root)).then_some(root)
    }

    /// The absolute path of a directory, as the process sees it: by its inode, or as the working directory
    /// or root of the process.
    #[must_use]
    pub fn outside_path(&mut self, directory: InodeId, start: &Start) -> Option<PathBuf> {
        if !self.same_mounts(start) {
            let root = self.root_of(start)?;
            let path = std::fs::read_link(format!("/proc/{}/cwd", start.tgid)).ok()?;
            let there = root.join(path.strip_prefix("/").ok()?);
            return is_inode(&there, directory).then_some(path);
        }
        let key = (directory, start.tgid);
        if let Some(path) = self.outside.paths.since(&key, start.ended_ns) {
            return path;
        }
        let now = monotonic_ns();
        let path = self
            .real_path(directory)
            .or_else(|| {
                ["cwd", "root"].into_iter().find_map(|what| {
                    let link = PathBuf::from(format!("/proc/{}/{what}", start.tgid));
                    if is_inode(&link, directory) { std::fs::read_link(&link).ok() } else { None }
                })
            })
            .or_else(|| self.path_elsewhere(directory));
        self.outside.paths.keep(key, now, path.clone());
        path
    }

    /// The absolute path of a directory, as we see it.
    #[must_use]
    pub fn real_path(&self, directory: InodeId) -> Option<PathBuf> {
        let mount = self.mount(directory.dev)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = mount.handles.open(mount.attached.as_fd(), directory, flags).ok()??;
        std::fs::read_link(tree::fd_path(fd.as_fd())).ok().filter(|p| p.is_absolute())
    }

    /// What stands at an absolute path, as the process sees it; no symlink is followed. Directories that
    /// cannot be of the set come without an identity.
    #[must_use]
    pub fn look(&mut self, start: &Start, path: &Path) -> Seen {
        // Which process these are of makes no difference to what can be reached through them without a
        // link to what it has open.
        if matches!(path.to_str(), Some("/proc/self" | "/proc/thread-self")) {
            return Seen::Directory(InodeId::NONE);
        }
        if !self.same_mounts(start) {
            let Some(root) = self.root_of(start) else { return Seen::Unknown };
            return self.look_at(&root.join(path.strip_prefix("/").unwrap_or(path)), false);
        }
        if let Some(seen) = self.outside.looks.since(path, start.ended_ns) {
            return seen;
        }
        let now = monotonic_ns();
        let seen = self.look_at(path, true);
        self.outside.looks.keep(path.to_path_buf(), now, seen.clone());
        seen
    }

    /// `same_mounts`: the path is one of ours.
    fn look_at(&self, there: &Path, same_mounts: bool) -> Seen {
        let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID | StatxFlags::CTIME;
        let statx = match rustix::fs::statx(CWD, there, AtFlags::SYMLINK_NOFOLLOW, wanted) {
            Ok(statx) => statx,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::SRCH) => return Seen::Nothing,
            Err(_) => return Seen::Unknown,
        };
        match FileKind::from_mode(u32::from(statx.stx_mode)) {
            Some(FileKind::Symlink) => match std::fs::read_link(there) {
                Ok(target) => Seen::Symlink {
                    target: target.into_os_string().into_vec(),
                    changed_ns: monotonic_of(&statx.stx_ctime),
                },
                Err(_) => Seen::Unknown,
            },
            Some(FileKind::Directory) => {
                let known = self.mount(dev_of(&statx));
                // By its own mount a directory of the set is found by its path.
                if known.is_none_or(|mount| same_mounts && mount.mount_id == statx.stx_mnt_id) {
                    return Seen::Directory(InodeId::NONE);
                }
                self.identify(there)
            }
            // A file of the set can have a name outside too.
            _ if self.mount(dev_of(&statx)).is_some() => self.identify(there),
            _ => Seen::Leaf(InodeId::NONE),
        }
    }

    fn identify(&self, path: &Path) -> Seen {
        let flags = OFlags::NOFOLLOW | OFlags::PATH | OFlags::CLOEXEC;
        let Ok(fd) = rustix::fs::openat(CWD, path, flags, Mode::empty()) else { return Seen::Unknown };
        match (self.stat_of(fd.as_fd()), tree::stat_fd(fd.as_fd())) {
            (Ok(Some(stat)), _) if stat.kind == FileKind::Directory => Seen::Directory(stat.inode),
            (Ok(Some(stat)), _) => Seen::Leaf(stat.inode),
            (Ok(None), Ok(stat)) if stat.kind == FileKind::Directory => Seen::Directory(InodeId::NONE),
            (Ok(None), Ok(_)) => Seen::Leaf(InodeId::NONE),
            _ => Seen::Unknown,
        }
    }

    /// Whether a directory is the root of a bind mount.
    #[must_use]
    pub fn is_bound(&mut self, directory: InodeId) -> bool {
        if !self.knows_table() {
            return true;
        }
        self.outside.bound.contains(&(directory.dev, directory.ino))
    }

    /// Reads the table of mounts where it changed; `false` when it cannot be read.
    fn knows_table(&mut self) -> bool {
        if !self.outside.table_changed() {
            return true;
        }
        let mut text = Vec::new();
        let Some(table) = &mut self.outside.table else { return false };
        if table.seek(SeekFrom::Start(0)).and_then(|_| table.read_to_end(&mut text)).is_err() {
            self.outside.forget_table();
            return false;
        }
        let ours: Vec<u32> = self.mounts.iter().map(|m| m.handles.dev).collect();
        self.outside.bound.clear();
        self.outside.points.clear();
        for Line { dev, root, point } in mount_table::lines(&text) {
            // On btrfs the number is not the subvolume's: all of them are looked at.
            if root != Path::new("/")
                && (dev >> 20 == 0 || ours.contains(&dev))
                && let Ok(stat) = rustix::fs::stat(&point)
            {
                self.outside.bound.insert((kernel_dev(stat.st_dev), stat.st_ino));
            }
            self.outside.points.entry(dev).or_default().push(point);
        }
        true
    }

    /// The absolute path of a directory on a file system that no subtree lies on. Nothing there stays open: who mounted it
    /// has to be able to unmount it.
    fn path_elsewhere(&mut self, directory: InodeId) -> Option<PathBuf> {
        if self.mount(directory.dev).is_some() || !self.knows_table() {
            return None;
        }
        self.outside.points.get(&directory.dev)?.iter().find_map(|point| {
            let there = open_directory(point).ok()?;
            // It may be hidden by another mount.
            if kernel_dev(rustix::fs::fstat(&there).ok()?.st_dev) != directory.dev {
                return None;
            }
            let handles = Handles::of(there.as_fd(), directory.dev).ok()??;
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let fd = handles.open(there.as_fd(), directory, flags).ok()??;
            let path = std::fs::read_link(tree::fd_path(fd.as_fd())).ok()?;
            // Through a bind mount not every directory of the file system has a path.
            is_inode(&path, directory).then_some(path)
        })
    }
}

fn dev_of(statx: &Statx) -> u32 {
    statx.stx_dev_major << 20 | statx.stx_dev_minor
}

fn is_inode(path: &Path, inode: InodeId) -> bool {
    let Ok(stat) = rustix::fs::stat(path) else { return false };
    stat.st_ino == inode.ino && kernel_dev(stat.st_dev) == inode.dev
}

/// A time in an inode by the monotonic clock; 0 for what was before that began.
fn monotonic_of(time: &StatxTimestamp) -> u64 {
    let then_ns = i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec);
    let since_ns = i128::from(wall_ns()) - then_ns;
    u64::try_from(i128::from(monotonic_ns()) - since_ns).unwrap_or(0)
}
