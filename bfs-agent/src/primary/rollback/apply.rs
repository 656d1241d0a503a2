//! Doing what the journal says. All of it can be done again at any time, until it is done.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use bfs_common::abi::InodeId;
use bfs_common::record::{FileKind, Name};
use rustix::fs::{AtFlags, RenameFlags};
use rustix::io::Errno;

use super::RollbackError;
use super::journal::{self, Journal, Key, Wanted};
use super::stage::Folders;
use crate::primary::reader::{Reader, Root};
use crate::tree;

/// Bytes copied at once.
const COPY: usize = 1 << 20;

/// Finishes the intent: afterwards the files are as at the checkpoint, durably, and were compared
/// by reading. The staging folders go.
///
/// # Errors
/// [`RollbackError`]; then it can be called again.
pub fn finish(
    journal: &Journal,
    reader: &Reader,
    roots: &[Root],
    folders: &Folders,
) -> Result<(), RollbackError> {
    let work = Work { journal, reader, roots, folders };
    let mark = folders.first().join("detached");
    if !mark.exists() {
        work.detach()?;
        work.sync()?;
        File::create(&mark).map_err(RollbackError::io("make", &mark))?;
        journal::sync(folders.first())?;
    }
    let begun = Instant::now();
    work.objects(false)?;
    work.attach()?;
    work.objects(true)?;
    let written = begun.elapsed();
    work.sync()?;
    let synced = begun.elapsed();
    work.verify()?;
    tracing::debug!(?written, ?synced, compared = ?begun.elapsed(), "going back: since the intent");
    // The first one last: it has the journal.
    for folder in folders.paths().rev() {
        journal::remove_folder(folder)?;
    }
    // A folder that lay in a root moved its times.
    for (folder, root) in folders.paths().flat_map(|f| roots.iter().map(move |r| (f, r))) {
        if folder.parent() == Some(root.path.as_path()) {
            work.times_of(root)?;
        }
    }
    Ok(())
}

struct Work<'a> {
    journal: &'a Journal,
    reader: &'a Reader,
    roots: &'a [Root],
    folders: &'a Folders,
}

impl Work<'_> {
    fn inode(&self, key: &Key) -> Result<InodeId, RollbackError> {
        let root = self.roots.get(key.root as usize);
        let dev = root
            .map(|r| r.stat.inode.dev)
            .ok_or_else(|| RollbackError::Gone(format!("root {}", key.root)))?;
        Ok(InodeId { dev, ino: key.ino, generation: key.generation })
    }

    fn open(&self, key: &Key) -> Result<OwnedFd, RollbackError> {
        let inode = self.inode(key)?;
        self.reader.descriptor(inode)?.ok_or_else(|| RollbackError::Gone(format!("inode {}", key.ino)))
    }

    /// A folder of staging, on the same mount as what is moved into it (rename(2): EXDEV).
    fn folder(&self, key: &Key, name: &str) -> Result<OwnedFd, RollbackError> {
        let path = self.folders.on(self.inode(key)?.dev)?.join(name);
        let fd = tree::open_path(&path).map_err(RollbackError::io("open", &path))?;
        let inode = self.reader.inode_of(fd.as_fd()).map_err(RollbackError::io("look at", &path))?;
        let inode = inode.ok_or_else(|| RollbackError::Gone(path.display().to_string()))?;
        self.reader.descriptor(inode)?.ok_or_else(|| RollbackError::Gone(path.display().to_string()))
    }

    /// What stands at an entry now.
    fn child(&self, directory: &Key, name: &Name) -> Result<Option<InodeId>, RollbackError> {
        Ok(self.reader.child(self.inode(directory)?, name)?.map(|stat| stat.inode))
    }

    fn detach(&self) -> Result<(), RollbackError> {
        for (directory, name, what) in &self.journal.detach {
            if self.child(directory, name)? != Some(self.inode(what)?) {
                continue;
            }
            let from = self.open(directory)?;
            let aside = self.folder(what, "aside")?;
            let moved = rustix::fs::renameat_with(
                &from,
                name.as_os_str(),
                &aside,
                what.name(),
                RenameFlags::NOREPLACE,
            );
            match moved {
                Ok(()) => {}
                // Another name of the same file.
                Err(Errno::EXIST) => rustix::fs::unlinkat(&from, name.as_os_str(), AtFlags::empty())
                    .map_err(RollbackError::io("unlink", Path::new(name.as_os_str())))?,
                Err(error) => {
                    return Err(RollbackError::io("move aside", Path::new(name.as_os_str()))(error));
                }
            }
        }
        Ok(())
    }

    /// Bytes and attributes, of directories or of everything else.
    fn objects(&self, directories: bool) -> Result<(), RollbackError> {
        for wanted in &self.journal.objects {
            if (wanted.kind == FileKind::Directory) != directories {
                continue;
            }
            let fd = self.open(&wanted.key)?;
            let path = wanted.path.as_path();
            if wanted.bytes.is_some() {
                self.bytes(wanted, &fd).map_err(RollbackError::io("write", path))?;
            }
            tree::set_attributes(fd.as_fd(), wanted.kind, &wanted.meta, &wanted.xattrs)
                .map_err(RollbackError::io("set the attributes of", path))?;
        }
        Ok(())
    }

    fn bytes(&self, wanted: &Wanted, fd: &OwnedFd) -> io::Result<()> {
        let file = File::options().write(true).open(tree::fd_path(fd.as_fd()))?;
        file.set_len(wanted.size)?;
        let Some(bytes) = &wanted.bytes else { return Ok(()) };
        let inode = self.inode(&wanted.key).map_err(io::Error::other)?;
        let folder = self.folders.on(inode.dev).map_err(io::Error::other)?;
        let data = match File::open(folder.join("data").join(wanted.key.name())) {
            Ok(data) => Some(data),
            // Only zeros are written.
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let mut buffer = vec![0; COPY];
        for (start, end) in &bytes.ranges {
            let mut at = *start;
            while at < *end {
                let len = (end - at).min(COPY as u64) as usize;
                buffer[..len].fill(0);
                if let Some(data) = &data {
                    // Beyond its end it has zeros, too.
                    let mut got = 0;
                    while got < len {
                        match data.read_at(&mut buffer[got..len], at + got as u64)? {
                            0 => break,
                            n => got += n,
                        }
                    }
                }
                file.write_all_at(&buffer[..len], at)?;
                at += len as u64;
            }
        }
        Ok(())
    }

    fn attach(&self) -> Result<(), RollbackError> {
        for (directory, name, what, is_directory) in &self.journal.attach {
            let there = self.child(directory, name)?;
            if there == Some(self.inode(what)?) {
                continue;
            }
            let to = self.open(directory)?;
            let path = Path::new(name.as_os_str());
            if *is_directory {
                let mut moved = Err(Errno::NOENT);
                for folder in ["aside", "new"] {
                    if moved == Err(Errno::NOENT) {
                        let from = self.folder(what, folder)?;
                        let names = (what.name(), name.as_os_str());
                        moved =
                            rustix::fs::renameat_with(&from, names.0, &to, names.1, RenameFlags::NOREPLACE);
                    }
                }
                moved.map_err(RollbackError::io("move into place", path))?;
            } else {
                let from = self.open(what)?;
                rustix::fs::linkat(&from, c"", &to, name.as_os_str(), AtFlags::EMPTY_PATH)
                    .map_err(RollbackError::io("link into place", path))?;
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), RollbackError> {
        for folder in self.folders.paths() {
            let open = File::open(folder).map_err(RollbackError::io("open", folder))?;
            rustix::fs::syncfs(&open).map_err(RollbackError::io("sync", folder))?;
        }
        Ok(())
    }

    /// Compares by reading.
    fn verify(&self) -> Result<(), RollbackError> {
        let mut differ = Vec::new();
        for wanted in &self.journal.objects {
            let path = wanted.path.as_path();
            let fd = self.open(&wanted.key)?;
            let now = tree::stat_fd(fd.as_fd()).map_err(RollbackError::io("stat", path))?;
            let mut meta = now.meta;
            if wanted.kind == FileKind::Symlink {
                meta.permissions = wanted.meta.permissions;
            }
            let xattrs =
                tree::xattrs(fd.as_fd()).map_err(RollbackError::io("read the attributes of", path))?;
            let same_xattrs = xattrs.len() == wanted.xattrs.len()
                && xattrs.iter().zip(&wanted.xattrs).all(|(a, b)| a.0 == b.0 && a.1[..] == b.1[..]);
            let mut wrong = Vec::new();
            if meta != wanted.meta {
                wrong.push("mode, owner or time");
            }
            if now.size != wanted.size {
                wrong.push("size");
            }
            if !same_xattrs {
                wrong.push("extended attributes");
            }
            if let Some(content) = wanted.content {
                let file = tree::reopen_read(fd.as_fd()).map_err(RollbackError::io("open", path))?;
                let digest = match &wanted.bytes {
                    Some(bytes) => tree::ranges_digest(file.as_fd(), &bytes.ranges),
                    None => tree::content_digest(file.as_fd()),
                };
                let digest = digest.map_err(RollbackError::io("read", path))?;
                if digest != content {
                    wrong.push("bytes");
                }
            }
            if !wrong.is_empty() {
                differ.push(format!("{}: {}", path.display(), wrong.join(", ")));
            }
        }
        for (directory, name, what, _) in &self.journal.attach {
            if self.child(directory, name)? != Some(self.inode(what)?) {
                differ.push(format!("entry {name:?}"));
            }
        }
        if differ.is_empty() { Ok(()) } else { Err(RollbackError::Differs(differ)) }
    }

    /// The attributes of a root, once more.
    fn times_of(&self, root: &Root) -> Result<(), RollbackError> {
        for wanted in &self.journal.objects {
            if self.inode(&wanted.key)? == root.stat.inode {
                let fd = self.open(&wanted.key)?;
                tree::set_attributes(fd.as_fd(), wanted.kind, &wanted.meta, &wanted.xattrs)
                    .map_err(RollbackError::io("set the attributes of", &root.path))?;
            }
        }
        Ok(())
    }
}
