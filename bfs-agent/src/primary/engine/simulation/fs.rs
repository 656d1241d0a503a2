//! The simulated file system: what each call does to it.

use std::collections::BTreeMap;

use bfs_common::record::FileKind;

pub(super) const ROOT: u64 = 1;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Inode {
    pub(super) kind: FileKind,
    pub(super) mode: u32,
    pub(super) mtime: u64,
    pub(super) data: Vec<u8>,
    pub(super) target: Vec<u8>,
    pub(super) entries: BTreeMap<Vec<u8>, u64>,
    pub(super) links: u32,
}

#[derive(Clone, Debug)]
pub(super) enum Call {
    Create {
        directory: u64,
        name: Vec<u8>,
    },
    Write {
        file: u64,
        offset: Option<u64>,
        data: Vec<u8>,
        inline: bool,
    },
    Truncate {
        file: u64,
        size: u64,
    },
    Fchmod {
        file: u64,
        mode: u32,
    },
    Unlink {
        at: At,
    },
    Mkdir {
        at: At,
    },
    Rmdir {
        at: At,
    },
    Symlink {
        at: At,
        target: Vec<u8>,
    },
    Rename {
        from: At,
        to: At,
    },
    Exchange {
        from: At,
        to: At,
    },
    Link {
        from: At,
        to: At,
    },
    Chmod {
        at: At,
        mode: u32,
    },
    TruncateAt {
        at: At,
        size: u64,
    },
    Map {
        file: u64,
    },
    /// Not a call: a store into a mapping. The first into a clean page moves the modification time.
    Store {
        file: u64,
        offset: usize,
        byte: u8,
        faults: bool,
    },
}

/// A directory by inode, and a path below it.
#[derive(Clone, Debug)]
pub(super) struct At {
    pub(super) base: u64,
    pub(super) path: Vec<u8>,
}

#[derive(Clone, Debug)]
pub(super) struct Done {
    pub(super) start_ns: u64,
    pub(super) call: Call,
    pub(super) stamp: u64,
    pub(super) fresh: u64,
    /// Whether it changed anything: a call that found nothing to do because of a later one that
    /// overtook it did nothing, wherever the cut lies.
    pub(super) ok: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Fs {
    pub(super) inodes: BTreeMap<u64, Inode>,
}

/// What the effect of a call was.
#[derive(Clone, Debug, Default)]
pub(super) struct Effect {
    pub(super) ok: bool,
    pub(super) inode: u64,
    pub(super) offset: u64,
}

impl Fs {
    pub(super) fn new() -> Self {
        let mut fs = Self::default();
        fs.inodes.insert(ROOT, Inode { links: 1, ..Self::inode(FileKind::Directory, 0) });
        fs
    }

    pub(super) fn inode(kind: FileKind, mtime: u64) -> Inode {
        Inode { kind, mode: 0o644, mtime, data: vec![], target: vec![], entries: BTreeMap::new(), links: 0 }
    }

    /// The directory that a path leads to, and the name there. Symlinks on the way are followed.
    pub(super) fn find(&self, at: &At) -> Option<(u64, Vec<u8>)> {
        self.walk(at, false)
    }

    /// What a path leads to, also where that is a symlink.
    fn find_followed(&self, at: &At) -> Option<u64> {
        let (dir, name) = self.walk(at, true)?;
        self.inodes[&dir].entries.get(&name).copied()
    }

    fn walk(&self, at: &At, follow: bool) -> Option<(u64, Vec<u8>)> {
        // Paths begin with a name, and no target has a `..`: that leads to where they were.
        let (mut dir, mut above) = (at.base, Vec::new());
        let parts = |path: &[u8]| -> Vec<Vec<u8>> {
            path.split(|b| *b == b'/').filter(|part| !part.is_empty()).map(<[u8]>::to_vec).rev().collect()
        };
        let (mut todo, mut symlinks) = (parts(&at.path), 0);
        while let Some(part) = todo.pop() {
            let here = self.inodes.get(&dir).filter(|d| d.kind == FileKind::Directory && d.links > 0)?;
            let last = todo.is_empty();
            if part == b".." {
                dir = above.pop()?;
                continue;
            }
            let symlink = here.entries.get(&part).map(|inode| &self.inodes[inode]);
            match symlink.filter(|i| i.kind == FileKind::Symlink && (!last || follow)) {
                Some(symlink) => {
                    symlinks += 1;
                    if symlinks > 40 {
                        return None;
                    }
                    let below = symlink.target.strip_prefix(b"/r/");
                    if below.is_some() {
                        (dir, above) = (ROOT, Vec::new());
                    }
                    todo.extend(parts(below.unwrap_or(&symlink.target)));
                }
                None if last => return Some((dir, part)),
                None => {
                    above.push(dir);
                    dir = *here.entries.get(&part)?;
                }
            }
        }
        None
    }

    pub(super) fn drop_entry(&mut self, dir: u64, name: &[u8]) {
        let inode = self.inodes.get_mut(&dir).unwrap().entries.remove(name).unwrap();
        self.inodes.get_mut(&inode).unwrap().links -= 1;
    }

    pub(super) fn below(&self, dir: u64, inode: u64) -> bool {
        dir == inode || self.inodes[&inode].entries.values().any(|c| self.below(dir, *c))
    }

    /// Does a call. `fresh` is the inode number that a new inode gets.
    pub(super) fn run(&mut self, call: &Call, stamp: u64, fresh: u64) -> Effect {
        self.try_run(call, stamp, fresh).unwrap_or_default()
    }

    pub(super) fn try_run(&mut self, call: &Call, stamp: u64, fresh: u64) -> Option<Effect> {
        let ok = |inode| Some(Effect { ok: true, inode, ..Effect::default() });
        match call {
            Call::Create { directory, name } => {
                let d = self.inodes.get_mut(directory).filter(|d| d.links > 0)?;
                if let Some(there) = d.entries.get(name).copied() {
                    // Opened, not made: no record is due.
                    return Some(Effect { ok: false, inode: there, ..Effect::default() });
                }
                d.entries.insert(name.clone(), fresh);
                d.mtime = stamp;
                self.inodes.insert(fresh, Inode { links: 1, ..Self::inode(FileKind::Regular, stamp) });
                ok(fresh)
            }
            Call::Write { file, offset, data, .. } => {
                let f = self.inodes.get_mut(file)?;
                let at = offset.unwrap_or(f.data.len() as u64) as usize;
                let end = at + data.len();
                if f.data.len() < end {
                    f.data.resize(end, 0);
                }
                f.data[at..end].copy_from_slice(data);
                f.mtime = stamp;
                Some(Effect { ok: true, inode: *file, offset: at as u64 })
            }
            Call::Truncate { file, size } => {
                let f = self.inodes.get_mut(file)?;
                f.data.resize(*size as usize, 0);
                f.mtime = stamp;
                ok(*file)
            }
            Call::Map { file } => ok(*file),
            Call::Store { file, offset, byte, faults } => {
                let f = self.inodes.get_mut(file)?;
                *f.data.get_mut(*offset)? = *byte;
                if *faults {
                    f.mtime = stamp;
                }
                ok(*file)
            }
            Call::Fchmod { file, mode } => {
                self.inodes.get_mut(file)?.mode = *mode;
                ok(*file)
            }
            Call::Unlink { at } => {
                let (dir, name) = self.find(at)?;
                let inode = *self.inodes[&dir].entries.get(&name)?;
                if self.inodes[&inode].kind == FileKind::Directory {
                    return None;
                }
                self.drop_entry(dir, &name);
                self.inodes.get_mut(&dir)?.mtime = stamp;
                ok(inode)
            }
            Call::Rmdir { at } => {
                let (dir, name) = self.find(at)?;
                let inode = *self.inodes[&dir].entries.get(&name)?;
                let i = &self.inodes[&inode];
                if i.kind != FileKind::Directory || !i.entries.is_empty() {
                    return None;
                }
                self.drop_entry(dir, &name);
                self.inodes.get_mut(&dir)?.mtime = stamp;
                ok(inode)
            }
            Call::Mkdir { at } | Call::Symlink { at, .. } => {
                let (dir, name) = self.find(at)?;
                let d = self.inodes.get_mut(&dir)?;
                if d.entries.contains_key(&name) {
                    return None;
                }
                d.entries.insert(name, fresh);
                d.mtime = stamp;
                let mut new = Self::inode(FileKind::Directory, stamp);
                if let Call::Symlink { target, .. } = call {
                    new.kind = FileKind::Symlink;
                    new.target.clone_from(target);
                }
                self.inodes.insert(fresh, Inode { links: 1, ..new });
                ok(fresh)
            }
            Call::Rename { from, to } => {
                let (d1, n1) = self.find(from)?;
                let (d2, n2) = self.find(to)?;
                let inode = *self.inodes[&d1].entries.get(&n1)?;
                let directory = self.inodes[&inode].kind == FileKind::Directory;
                if directory && self.below(d2, inode) {
                    return None;
                }
                if let Some(old) = self.inodes[&d2].entries.get(&n2).copied() {
                    let o = &self.inodes[&old];
                    if old == inode {
                        return ok(inode);
                    }
                    if (o.kind == FileKind::Directory) != directory || !o.entries.is_empty() {
                        return None;
                    }
                    self.drop_entry(d2, &n2);
                }
                self.inodes.get_mut(&d1)?.entries.remove(&n1);
                self.inodes.get_mut(&d2)?.entries.insert(n2, inode);
                self.inodes.get_mut(&d1)?.mtime = stamp;
                self.inodes.get_mut(&d2)?.mtime = stamp;
                ok(inode)
            }
            Call::Exchange { from, to } => {
                let (d1, n1) = self.find(from)?;
                let (d2, n2) = self.find(to)?;
                let one = *self.inodes[&d1].entries.get(&n1)?;
                let two = *self.inodes[&d2].entries.get(&n2)?;
                if self.below(d2, one) || self.below(d1, two) {
                    return None;
                }
                self.inodes.get_mut(&d1)?.entries.insert(n1, two);
                self.inodes.get_mut(&d2)?.entries.insert(n2, one);
                self.inodes.get_mut(&d1)?.mtime = stamp;
                self.inodes.get_mut(&d2)?.mtime = stamp;
                ok(one)
            }
            Call::TruncateAt { at, size } => {
                let inode = self.find_followed(at)?;
                let f = self.inodes.get_mut(&inode).filter(|f| f.kind == FileKind::Regular)?;
                f.data.resize(*size as usize, 0);
                f.mtime = stamp;
                ok(inode)
            }
            Call::Link { from, to } => {
                let (d1, n1) = self.find(from)?;
                let (d2, n2) = self.find(to)?;
                let inode = *self.inodes[&d1].entries.get(&n1)?;
                if self.inodes[&inode].kind == FileKind::Directory
                    || self.inodes[&d2].entries.contains_key(&n2)
                {
                    return None;
                }
                self.inodes.get_mut(&d2)?.entries.insert(n2, inode);
                self.inodes.get_mut(&d2)?.mtime = stamp;
                self.inodes.get_mut(&inode)?.links += 1;
                ok(inode)
            }
            Call::Chmod { at, mode } => {
                let inode = self.find_followed(at)?;
                self.inodes.get_mut(&inode)?.mode = *mode;
                ok(inode)
            }
        }
    }

    /// The tree below the root as text, for the comparison: what is taken of it, by path and kind.
    pub(super) fn dump(&self, takes: &dyn Fn(&str, FileKind) -> bool) -> Vec<String> {
        let mut lines = Vec::new();
        let mut todo = vec![(String::new(), ROOT)];
        while let Some((path, inode)) = todo.pop() {
            let i = &self.inodes[&inode];
            lines.push(format!(
                "{path} {:?} {:o} {} {:?} {:?}",
                i.kind,
                i.mode,
                i.mtime,
                i.data,
                String::from_utf8_lossy(&i.target)
            ));
            for (name, child) in &i.entries {
                let path = format!("{path}/{}", String::from_utf8_lossy(name));
                if takes(&path, self.inodes[child].kind) {
                    todo.push((path, *child));
                }
            }
        }
        lines.sort();
        lines
    }
}
