//! Fetching and comparing everything that a rollback needs, before a file of the program changes.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bfs_common::abi::InodeId;
use bfs_common::record::{FileKind, ObjectId, PathBytes};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::RollbackError;
use super::journal::{self, Bytewise, Journal, Key, Wanted};
use super::plan::Plan;
use crate::generation::{self, Change, Client, Tree};
use crate::primary::reader::{Reader, Root};
use crate::tree;

/// Bytes compared at once, and the grain of what is written again.
const BLOCK: u64 = 4096;
/// Room that is left on a file system for others.
pub(in crate::primary) const ROOM_MIN: u64 = 16 << 20;

/// The paths of a rollback, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Files and directories that stay, and get bytes or attributes.
    pub restored: Vec<PathBuf>,
    /// Those that are made again.
    pub made: Vec<PathBuf>,
    /// Those that go.
    pub removed: Vec<PathBuf>,
    /// What others changed: it is left.
    pub foreign: Vec<PathBuf>,
    /// What others changed: it is brought back with the rest.
    pub theirs: Vec<PathBuf>,
    /// Bytes that are written.
    pub bytes: u64,
}

/// Where each file system's staging is.
#[derive(Debug)]
pub struct Folders {
    /// Device, index of its first root, folder.
    all: Vec<(u32, u32, PathBuf)>,
}

impl Folders {
    /// Of these roots.
    ///
    /// # Errors
    /// If one cannot be looked at.
    pub fn of(roots: &[Root], group: &str) -> Result<Self, RollbackError> {
        let mut all: Vec<(u32, u32, PathBuf)> = Vec::new();
        for (index, root) in roots.iter().enumerate() {
            let dev = root.stat.inode.dev;
            if all.iter().all(|known| known.0 != dev) {
                let folder =
                    journal::folder(&root.path, group).map_err(RollbackError::io("look at", &root.path))?;
                all.push((dev, index as u32, folder));
            }
        }
        Ok(Self { all })
    }

    /// The folder with the journal.
    #[must_use]
    pub fn first(&self) -> &Path {
        &self.all[0].2
    }

    /// All of them.
    pub fn paths(&self) -> impl DoubleEndedIterator<Item = &Path> {
        self.all.iter().map(|(_, _, folder)| folder.as_path())
    }

    /// The folder on a device.
    ///
    /// # Errors
    /// If no root lies there.
    pub fn on(&self, dev: u32) -> Result<&Path, RollbackError> {
        let found = self.all.iter().find(|known| known.0 == dev);
        found.map(|known| known.2.as_path()).ok_or_else(|| RollbackError::Gone(format!("device {dev:#x}")))
    }

    fn key(&self, inode: InodeId) -> Result<Key, RollbackError> {
        let root = self.all.iter().find(|known| known.0 == inode.dev).map(|known| known.1);
        let root = root.ok_or_else(|| RollbackError::Gone(format!("the device of {inode:?}")))?;
        Ok(Key { root, ino: inode.ino, generation: inode.generation })
    }
}

/// What to go back to, and the way.
pub struct Work<'a> {
    /// Name of the group.
    pub group: &'a str,
    /// The checkpoint.
    pub tree: &'a Tree,
    /// The way.
    pub plan: &'a Plan,
    /// Where the files are.
    pub reader: &'a Reader,
    /// Where staging is.
    pub folders: &'a Folders,
    /// Files of which the stream knows every write: only what was written since is compared.
    pub followed: &'a HashSet<ObjectId>,
    /// Only look: write nothing.
    pub dry_run: bool,
}

impl Work<'_> {
    /// Fetches and compares; afterwards everything but the journal itself is on the disk.
    ///
    /// # Errors
    /// [`RollbackError`]; nothing that counts was changed then.
    pub fn prepare(&self, client: &mut Client, roots: &[Root]) -> Result<(Journal, Summary), RollbackError> {
        if !self.dry_run {
            self.room()?;
            for folder in self.folders.paths() {
                journal::make_folder(folder)?;
            }
        }
        let mut objects = Vec::new();
        let mut bytes = 0;
        let compared = self.compare(client)?;
        let mut changed: std::collections::BTreeMap<ObjectId, Compared> = compared.into_iter().collect();
        for object in &self.plan.attributes {
            changed.entry(*object).or_default();
        }
        let mut summary = Summary {
            removed: self.plan.removed.clone(),
            foreign: self.plan.foreign.clone(),
            theirs: self.plan.theirs.clone(),
            ..Summary::default()
        };
        for (object, compared) in changed {
            bytes += compared.ranges.iter().map(|(start, end)| end - start).sum::<u64>();
            summary.restored.push(self.plan.paths[&object].clone());
            let key = self.folders.key(self.plan.inodes[&object])?;
            let bytewise = compared.digest.map(|_| Bytewise { ranges: compared.ranges });
            objects.push(self.wanted(object, key, compared.digest, bytewise));
        }
        let mut keys: std::collections::HashMap<ObjectId, Key> = std::collections::HashMap::new();
        for (object, _) in &self.plan.made {
            summary.made.push(self.plan.paths[object].clone());
            bytes += self.tree.objects[object].size;
        }
        summary.bytes = bytes;
        summary.restored.sort();
        summary.made.sort();
        if !self.dry_run {
            for Made { object, inode, digest } in self.make(client)? {
                let key = self.folders.key(inode)?;
                keys.insert(object, key);
                objects.push(self.wanted(object, key, digest, None));
            }
            for folder in self.folders.paths() {
                let open = File::open(folder).map_err(RollbackError::io("open", folder))?;
                rustix::fs::syncfs(&open).map_err(RollbackError::io("sync", folder))?;
            }
        }
        let key_of = |object: &ObjectId| match (keys.get(object), self.plan.inodes.get(object)) {
            (Some(key), _) => Ok(*key),
            (None, Some(inode)) => self.folders.key(*inode),
            // Only in a dry run, which looks at nothing of it.
            (None, None) => Ok(Key { root: 0, ino: 0, generation: 0 }),
        };
        let mut journal = Journal {
            group: self.group.into(),
            checkpoint: self.tree.checkpoint,
            roots: roots.iter().map(|r| PathBytes::new(&r.path)).collect(),
            detach: Vec::new(),
            attach: Vec::new(),
            objects,
        };
        for (directory, name, what) in &self.plan.detach {
            journal.detach.push((self.folders.key(*directory)?, name.clone(), self.folders.key(*what)?));
        }
        for (directory, name, what) in &self.plan.attach {
            let is_directory = self.tree.objects[what].kind == FileKind::Directory;
            journal.attach.push((key_of(directory)?, name.clone(), key_of(what)?, is_directory));
        }
        Ok((journal, summary))
    }

    fn wanted(
        &self,
        object: ObjectId,
        key: Key,
        content: Option<[u8; 32]>,
        bytes: Option<Bytewise>,
    ) -> Wanted {
        let node = &self.tree.objects[&object];
        Wanted {
            key,
            path: PathBytes::new(&self.plan.paths[&object]),
            kind: node.kind,
            meta: node.meta,
            xattrs: node.xattrs.clone(),
            size: node.size,
            content,
            bytes,
        }
    }

    /// Whether what is made again has room.
    fn room(&self) -> Result<(), RollbackError> {
        for folder in self.folders.paths() {
            let above = folder.parent().unwrap_or(folder);
            let now = rustix::fs::statvfs(above).map_err(RollbackError::io("look at", above))?;
            let made =
                self.plan.made.iter().filter(|(_, dev)| self.folders.on(*dev).is_ok_and(|f| f == folder));
            let need = made.map(|(object, _)| self.tree.objects[object].size).sum::<u64>() + ROOM_MIN;
            if now.f_bavail * now.f_frsize < need {
                let error = io::Error::from(io::ErrorKind::StorageFull);
                return Err(RollbackError::io("stage what is made again beside", above)(error));
            }
        }
        Ok(())
    }

    fn open(&self, inode: InodeId) -> Result<File, RollbackError> {
        let fd = self.reader.descriptor(inode)?.ok_or_else(|| RollbackError::Gone(format!("{inode:?}")))?;
        tree::reopen_read(fd.as_fd()).map_err(RollbackError::io("open", tree::fd_path(fd.as_fd())))
    }

    /// Compares files that stay with what they had; gives those that differ.
    fn compare(&self, client: &mut Client) -> Result<Vec<(ObjectId, Compared)>, RollbackError> {
        let (followed, whole): (Vec<_>, Vec<_>) =
            self.plan.compare.iter().copied().partition(|object| self.followed.contains(object));
        let mut comparing = Comparing { work: self, found: Vec::new(), open: None, failed: None };
        let (group, at) = (self.group, self.tree.checkpoint);
        let result = client
            .changes(group, at, &followed, |object, at, change| {
                comparing.take(object, |comparison| match change {
                    Change::Bytes(bytes) => comparison.bytes_at(at, bytes).map(|()| false),
                    Change::Zeros(len) => comparison.zeros_at(at, len).map(|()| false),
                    Change::End => Ok(true),
                })
            })
            .and_then(|()| {
                client.contents(group, at, &whole, |object, at, bytes| {
                    comparing.take(object, |comparison| {
                        comparison.zeros_to(if bytes.is_empty() { comparison.size } else { at })?;
                        comparison.bytes_at(at, bytes).map(|()| bytes.is_empty())
                    })
                })
            });
        match comparing.failed {
            Some(error) => Err(error),
            None => result.map(|()| comparing.found).map_err(Into::into),
        }
    }

    fn begin(&self, object: ObjectId) -> Result<Comparison, RollbackError> {
        let inode = self.plan.inodes[&object];
        let file = self.open(inode)?;
        let now =
            tree::stat_fd(file.as_fd()).map_err(RollbackError::io("stat", &self.plan.paths[&object]))?;
        let data = self.folders.on(inode.dev)?.join("data").join(self.folders.key(inode)?.name());
        Ok(Comparison {
            file,
            now: now.size,
            size: self.tree.objects[&object].size,
            at: 0,
            ranges: Vec::new(),
            hasher: blake3::Hasher::new(),
            data: (!self.dry_run).then_some(data),
            written: None,
        })
    }

    /// Makes again what is gone, in `new/`.
    fn make(&self, client: &mut Client) -> Result<Vec<Made>, RollbackError> {
        let mut made = Vec::new();
        let mut files = Vec::new();
        for (object, dev) in &self.plan.made {
            let node = &self.tree.objects[object];
            let new = self.folders.on(*dev)?.join("new");
            let at = new.join(format!("object-{object}"));
            generation::make(node, &at).map_err(RollbackError::io("make", &at))?;
            let fd = tree::open_path(&at).map_err(RollbackError::io("open", &at))?;
            let inode = self.reader.inode_of(fd.as_fd()).map_err(RollbackError::io("look at", &at))?;
            let inode = inode.ok_or_else(|| RollbackError::Gone(at.display().to_string()))?;
            let to = new.join(self.folders.key(inode)?.name());
            fs::rename(&at, &to).map_err(RollbackError::io("name", &to))?;
            if node.kind == FileKind::Regular {
                files.push((*object, to));
            }
            made.push(Made { object: *object, inode, digest: None });
        }
        let objects: Vec<ObjectId> = files.iter().map(|(object, _)| *object).collect();
        let mut left = files.into_iter();
        let mut open: Option<Filling> = None;
        let mut digests = std::collections::HashMap::new();
        client.contents(self.group, self.tree.checkpoint, &objects, |object, at, bytes| {
            let mut current = match open.take() {
                Some(current) => current,
                None => {
                    let (_, path) = left.next().ok_or(io::ErrorKind::InvalidData)?;
                    let size = self.tree.objects[&object].size;
                    Filling {
                        file: File::options().write(true).open(path)?,
                        size,
                        at: 0,
                        hasher: blake3::Hasher::new(),
                    }
                }
            };
            if bytes.is_empty() {
                tree::hash_zeros(&mut current.hasher, current.size - current.at.min(current.size));
                digests.insert(object, *current.hasher.finalize().as_bytes());
                return Ok(());
            }
            tree::hash_zeros(&mut current.hasher, at - current.at);
            current.hasher.update(bytes);
            current.file.write_all_at(bytes, at)?;
            current.at = at + bytes.len() as u64;
            open = Some(current);
            Ok(())
        })?;
        for made in &mut made {
            made.digest = digests.get(&made.object).copied();
        }
        Ok(made)
    }
}

/// An object that was made again, in `new/`.
struct Made {
    object: ObjectId,
    inode: InodeId,
    /// blake3 of the bytes of a file.
    digest: Option<[u8; 32]>,
}

/// A file that gets its bytes.
struct Filling {
    file: File,
    size: u64,
    at: u64,
    hasher: blake3::Hasher,
}

/// Files that are compared, one after the other.
struct Comparing<'a> {
    work: &'a Work<'a>,
    found: Vec<(ObjectId, Compared)>,
    open: Option<(ObjectId, Comparison)>,
    failed: Option<RollbackError>,
}

impl Comparing<'_> {
    /// Lets `each` compare; it says whether that was all of the file.
    fn take(
        &mut self,
        object: ObjectId,
        each: impl FnOnce(&mut Comparison) -> io::Result<bool>,
    ) -> io::Result<()> {
        let mut comparison = match self.open.take() {
            Some((of, comparison)) if of == object => comparison,
            _ => self.work.begin(object).map_err(|e| {
                self.failed = Some(e);
                io::Error::other("see above")
            })?,
        };
        if each(&mut comparison)? {
            self.found.extend(comparison.end().map(|compared| (object, compared)));
        } else {
            self.open = Some((object, comparison));
        }
        Ok(())
    }
}

/// What the comparison of a file found.
#[derive(Debug, Default)]
struct Compared {
    ranges: Vec<(u64, u64)>,
    /// Of the bytes that these should have; `None` if only attributes differ.
    digest: Option<[u8; 32]>,
}

/// A file, compared with the bytes that come.
struct Comparison {
    file: File,
    /// Its size now.
    now: u64,
    /// Its size then.
    size: u64,
    /// Up to where it was compared.
    at: u64,
    ranges: Vec<(u64, u64)>,
    /// Of what stands in them.
    hasher: blake3::Hasher,
    /// Where different bytes go.
    data: Option<PathBuf>,
    written: Option<File>,
}

impl Comparison {
    /// It should have these bytes here, behind what was compared before.
    fn bytes_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.at = at + bytes.len() as u64;
        let mut have = vec![0; bytes.len()];
        read_up_to(&self.file, &mut have, at)?;
        let mut start = 0;
        while start < bytes.len() {
            // Up to the next multiple of the grain.
            let here = at + start as u64;
            let end = (start + (BLOCK - here % BLOCK) as usize).min(bytes.len());
            if have[start..end] != bytes[start..end] {
                self.differs(here, at + end as u64);
                self.hasher.update(&bytes[start..end]);
                if let Some(path) = &self.data {
                    let file = match &self.written {
                        Some(file) => file,
                        None => {
                            let file =
                                OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
                            self.written.insert(file)
                        }
                    };
                    file.write_all_at(&bytes[start..end], here)?;
                }
            }
            start = end;
        }
        Ok(())
    }

    fn differs(&mut self, start: u64, end: u64) {
        match self.ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => self.ranges.push((start, end)),
        }
    }

    /// It should have zeros here, behind what was compared before.
    fn zeros_at(&mut self, at: u64, len: u64) -> io::Result<()> {
        self.at = at;
        self.zeros_to(at + len)
    }

    /// Zeros up to here: what is there now and is not zero, differs.
    fn zeros_to(&mut self, to: u64) -> io::Result<()> {
        let end = to.min(self.now);
        let mut buffer = [0; BLOCK as usize];
        let mut at = self.at;
        while at < end {
            at = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data.max(at),
                Err(Errno::NXIO) => end,
                Err(error) => return Err(error.into()),
            };
            if at >= end {
                break;
            }
            let len = (BLOCK - at % BLOCK).min(end - at);
            let block = &mut buffer[..len as usize];
            block.fill(0);
            read_up_to(&self.file, block, at)?;
            if block.iter().any(|b| *b != 0) {
                self.differs(at, at + len);
                tree::hash_zeros(&mut self.hasher, len);
            }
            at += len;
        }
        self.at = to;
        Ok(())
    }

    /// What was found; `None` if the file is as it was.
    fn end(self) -> Option<Compared> {
        let differs = !self.ranges.is_empty() || self.now != self.size;
        let digest = Some(*self.hasher.finalize().as_bytes());
        differs.then_some(Compared { ranges: self.ranges, digest })
    }
}

/// Reads what is there; beyond the end the buffer stays as it is.
fn read_up_to(file: &File, mut buffer: &mut [u8], mut at: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, at) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                buffer = &mut buffer[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
