//! Comparing the primary's files with a manifest of the backup.
//!
//! The program may be running: what changed while it was read, or since the checkpoint's instant,
//! is *not comparable*, never called equal and never called different. Everything is read from
//! the files themselves, so this is independent of what was captured.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bfs_common::record::{FileKind, Name, ObjectId};
use bfs_common::wire::ManifestLine;
use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;

use super::control::VerifyReport;
use super::engine::filter::Filter;
use super::ship::Manifest;
use crate::tree::{self, FileStat};

/// The kernel stamps files with a clock that lags behind by up to a tick (`current_time()` in
/// fs/inode.c, at most 10 ms).
const CLOCK_SLACK_NS: i64 = 20_000_000;

/// What one object on the primary is, in the terms of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Local {
    stat: FileStat,
    content: [u8; 32],
    xattrs: [u8; 32],
}

/// A path: that of its root, and the way below it.
pub type Place = (Vec<u8>, Vec<u8>);
/// Some of them.
pub type Places = HashSet<Place>;

/// What a comparison found.
#[derive(Debug, Default)]
pub struct Found {
    /// For people; without what is left.
    pub report: VerifyReport,
    /// What could not be compared because it changed, in words.
    pub left: BTreeMap<Place, String>,
    /// What differs, and how; as many as the report has lines.
    pub different: BTreeMap<Place, Vec<String>>,
    /// The objects that differ, and the directories of what is on one side only.
    pub objects: BTreeSet<ObjectId>,
}

/// Compares. `wall_ns` is the wall time of the checkpoint's instant, when it is known: what
/// changed later is not comparable. Without it every difference counts. What the filter leaves out is not
/// looked at. With `only` nothing else is compared.
#[must_use]
pub fn compare(manifest: &Manifest, wall_ns: Option<i64>, filter: &Filter, only: Option<&Places>) -> Found {
    let roots: Vec<Vec<u8>> = manifest.roots.iter().map(|root| root.0.to_vec()).collect();
    let wanted = |l: &&ManifestLine| {
        let root = roots.get(l.root as usize).cloned().unwrap_or_default();
        only.is_none_or(|only| only.contains(&(root, l.path.0.to_vec())))
    };
    let directories = manifest.lines.iter().filter(|l| l.kind == FileKind::Directory);
    let mut compare = Comparison {
        filter,
        only,
        report: VerifyReport { checkpoint: manifest.checkpoint, ..VerifyReport::default() },
        lines: manifest.lines.iter().filter(wanted).map(|l| ((l.root, l.path.0.to_vec()), l)).collect(),
        directories: directories.map(|l| ((l.root, &l.path.0[..]), l.object)).collect(),
        roots: &roots,
        left: BTreeMap::new(),
        different: BTreeMap::new(),
        suspects: BTreeSet::new(),
        skipped: HashSet::new(),
        objects: HashMap::new(),
        inodes: HashMap::new(),
        since: wall_ns.map(|ns| ns.saturating_sub(CLOCK_SLACK_NS)),
    };
    for (index, root) in manifest.roots.iter().enumerate() {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        compare.root(index, root.as_path());
    }
    compare.leftovers(manifest);
    let Comparison { report, left, different, suspects, .. } = compare;
    Found { report, left, different, objects: suspects }
}

struct Comparison<'a> {
    filter: &'a Filter,
    only: Option<&'a Places>,
    report: VerifyReport,
    /// The backup's directories.
    directories: HashMap<(u32, &'a [u8]), ObjectId>,
    roots: &'a [Vec<u8>],
    left: BTreeMap<Place, String>,
    different: BTreeMap<Place, Vec<String>>,
    suspects: BTreeSet<ObjectId>,
    /// Lines that were not met yet, by root and path.
    lines: BTreeMap<(u32, Vec<u8>), &'a ManifestLine>,
    /// Directories whose inside was not compared.
    skipped: HashSet<(u32, Vec<u8>)>,
    /// Which inode an object is, and the other way round: hard links.
    objects: HashMap<ObjectId, (u64, u64)>,
    inodes: HashMap<(u64, u64), ObjectId>,
    since: Option<i64>,
}

impl Comparison<'_> {
    fn root(&mut self, index: u32, root: &Path) {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::open(root, flags, Mode::empty()) {
            Ok(fd) => self.walk(index, root, fd),
            Err(e) => self.skip(index, root, Vec::new(), &e.to_string()),
        }
    }

    fn place(&self, index: u32, path: &[u8]) -> Place {
        (self.roots.get(index as usize).cloned().unwrap_or_default(), path.to_vec())
    }

    /// What changed, and so was not compared, and all below it.
    fn leave(&mut self, index: u32, path: Vec<u8>, line: String) {
        self.left.insert(self.place(index, &path), line);
        self.skipped.insert((index, path));
    }

    fn differ(&mut self, index: u32, path: &[u8], object: Option<ObjectId>, line: String) {
        let up = path.iter().rposition(|b| *b == b'/').map_or(&[][..], |slash| &path[..slash]);
        self.suspects.extend(object.filter(|object| *object != ObjectId::default()));
        self.suspects.extend(self.directories.get(&(index, up)));
        if self.report.different.len() < VerifyReport::LINES_MAX {
            self.different.entry(self.place(index, path)).or_default().push(line.clone());
        }
        self.report.differs(line);
    }

    /// Depth first, with descriptors on a stack of its own: only one path's worth is open.
    fn walk(&mut self, index: u32, root: &Path, fd: OwnedFd) {
        let device = tree::stat_fd(fd.as_fd()).map(|s| s.on_device).ok();
        let mut stack = vec![];
        if let Some(level) = self.entry(index, root, Vec::new(), fd, (device, false)) {
            stack.push(level);
        }
        while let Some(level) = stack.last_mut() {
            let Some(name) = level.names.pop() else {
                stack.pop();
                continue;
            };
            let mut path = level.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            let above = (device, level.moved);
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(&level.fd, OsStr::from_bytes(&name), flags, Mode::empty()) {
                Ok(fd) => {
                    if let Some(level) = self.entry(index, root, path, fd, above) {
                        stack.push(level);
                    }
                }
                Err(Errno::NOENT) => {
                    self.lines.remove(&(index, path.clone()));
                    let line = format!("{}: changed while it was read", place(root, &path).display());
                    self.leave(index, path, line);
                }
                Err(e) => self.skip(index, root, path, &e.to_string()),
            }
        }
    }

    /// Compares one object; a directory comes back to be walked. `device` is that of the root, `moved` whether a
    /// directory above may have come here since the checkpoint.
    fn entry(
        &mut self,
        index: u32,
        root: &Path,
        path: Vec<u8>,
        fd: OwnedFd,
        (device, moved): (Option<u64>, bool),
    ) -> Option<Level> {
        if self.is_left_out(&path, fd.as_fd()) {
            return None;
        }
        if let Some(only) = self.only
            && !only.contains(&self.place(index, &path))
        {
            // Only on the way to others.
            let stat = tree::stat_fd(fd.as_fd()).ok()?;
            if stat.kind != FileKind::Directory || Some(stat.on_device) != device {
                return None;
            }
            let moved = moved || self.may_have_moved(&path, &stat);
            return names(fd.as_fd()).ok().map(|names| Level { fd, path, names, moved });
        }
        let local = match read(fd.as_fd()) {
            Ok(Some(local)) => local,
            Ok(None) => {
                self.lines.remove(&(index, path.clone()));
                let line = format!("{}: changed while it was read", place(root, &path).display());
                self.leave(index, path, line);
                return None;
            }
            Err(e) => {
                self.skip(index, root, path, &e.to_string());
                return None;
            }
        };
        if Some(local.stat.on_device) != device {
            self.skip(index, root, path, "another file system is mounted here");
            return None;
        }
        self.report.bytes += local.stat.size;
        let shown = place(root, &path);
        let in_doubt = moved || self.changed_since(&local.stat);
        let line = self.lines.remove(&(index, path.clone()));
        let mut differences = match line {
            Some(line) => differences(&local, line),
            None => vec!["is not on the backup".to_owned()],
        };
        if let Some(line) = line {
            let inode = (local.stat.on_device, local.stat.ino);
            // What may be another file than the line's says nothing of those that are not.
            if !in_doubt {
                self.inodes.entry(inode).or_insert(line.object);
                self.objects.entry(line.object).or_insert(inode);
            }
            let object = self.inodes.get(&inode).copied().unwrap_or(line.object);
            let as_before = self.objects.get(&line.object).copied().unwrap_or(inode);
            if object != line.object || as_before != inode {
                differences.push("hard links differ".to_owned());
            }
        }
        if differences.is_empty() {
            self.report.compared += 1;
        } else if in_doubt {
            self.leave(index, path.clone(), format!("{}: changed since the checkpoint", shown.display()));
        } else {
            self.report.compared += 1;
            for difference in differences {
                let line_object = line.map(|line| line.object);
                self.differ(index, &path, line_object, format!("{}: {difference}", shown.display()));
            }
        }
        if local.stat.kind != FileKind::Directory {
            return None;
        }
        let moved = moved || self.may_have_moved(&path, &local.stat);
        match names(fd.as_fd()) {
            Ok(names) => Some(Level { fd, path, names, moved }),
            Err(e) => {
                self.skip(index, root, path, &e.to_string());
                None
            }
        }
    }

    fn changed_since(&self, stat: &FileStat) -> bool {
        self.since.is_some_and(|since| ctime_ns(stat) >= since)
    }

    /// Whether a directory may have come to its place since the checkpoint, which nothing in it shows. A root has its.
    fn may_have_moved(&self, path: &[u8], stat: &FileStat) -> bool {
        !path.is_empty() && self.changed_since(stat)
    }

    fn is_left_out(&self, path: &[u8], fd: BorrowedFd<'_>) -> bool {
        if self.filter.is_empty() {
            return false;
        }
        let name = path.rsplit(|b| *b == b'/').next().and_then(Name::new);
        let (Some(name), Ok(stat)) = (name, tree::stat_fd(fd)) else { return false };
        self.filter.verdict(&name, &|| Some(OsStr::from_bytes(path).into())).leaves_out(stat.kind)
    }

    fn skip(&mut self, index: u32, root: &Path, path: Vec<u8>, why: &str) {
        self.lines.remove(&(index, path.clone()));
        self.report.skipped(format!("{}: {why}", place(root, &path).display()));
        self.skipped.insert((index, path));
    }

    /// What is on the backup only.
    fn leftovers(&mut self, manifest: &Manifest) {
        for ((root, path), line) in std::mem::take(&mut self.lines) {
            let Some(at) = manifest.roots.get(root as usize) else {
                self.report.differs(format!("the backup has a line of root {root}, which does not exist"));
                continue;
            };
            let shown = place(at.as_path(), &path);
            if self.below_skipped(root, &path) || self.changed_above(at.as_path(), &shown) {
                let line = format!("{}: changed since the checkpoint", shown.display());
                self.left.insert(self.place(root, &path), line);
            } else {
                let why = format!("{}: is on the backup only", shown.display());
                self.differ(root, &path, Some(line.object), why);
            }
        }
    }

    /// Whether a directory above changed since the checkpoint: the entry may have gone then.
    fn changed_above(&self, root: &Path, shown: &Path) -> bool {
        use std::os::unix::fs::MetadataExt;
        let Some(since) = self.since else { return false };
        shown.ancestors().skip(1).take_while(|a| a.starts_with(root)).any(|directory| {
            std::fs::symlink_metadata(directory).is_ok_and(|m| {
                m.ctime().saturating_mul(1_000_000_000).saturating_add(m.ctime_nsec()) >= since
            })
        })
    }

    fn below_skipped(&self, root: u32, path: &[u8]) -> bool {
        let mut up = path;
        while !up.is_empty() {
            up = up.iter().rposition(|b| *b == b'/').map_or(&[][..], |slash| &up[..slash]);
            if self.skipped.contains(&(root, up.to_vec())) {
                return true;
            }
        }
        self.skipped.contains(&(root, Vec::new()))
    }
}

/// A directory on the way down.
struct Level {
    fd: OwnedFd,
    path: Vec<u8>,
    names: Vec<Vec<u8>>,
    /// It may have come here since the checkpoint.
    moved: bool,
}

fn place(root: &Path, path: &[u8]) -> PathBuf {
    if path.is_empty() { root.to_owned() } else { root.join(OsStr::from_bytes(path)) }
}

fn ctime_ns(stat: &FileStat) -> i64 {
    stat.ctime.0.saturating_mul(1_000_000_000).saturating_add(i64::from(stat.ctime.1))
}

fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(directory, c".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::new(opened)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable_by(|a, b| b.cmp(a));
    Ok(names)
}

/// Reads an object; `None` when it changed meanwhile.
fn read(fd: BorrowedFd<'_>) -> io::Result<Option<Local>> {
    let stat = tree::stat_fd(fd)?;
    let content = match stat.kind {
        FileKind::Regular => tree::content_digest(tree::reopen_read(fd)?.as_fd())?,
        FileKind::Symlink => tree::bytes_digest(&tree::readlink(fd)?),
        _ => tree::bytes_digest(b""),
    };
    let xattrs = tree::xattr_digest(&tree::xattrs(fd)?);
    let again = tree::stat_fd(fd)?;
    Ok((again == stat).then_some(Local { stat, content, xattrs }))
}

fn differences(local: &Local, line: &ManifestLine) -> Vec<String> {
    let (stat, mut found) = (&local.stat, Vec::new());
    if stat.kind != line.kind {
        return vec![format!("is a {:?}, on the backup a {:?}", stat.kind, line.kind)];
    }
    let (ours, theirs) = (stat.meta, line.meta);
    // A symlink's permissions mean nothing and cannot be set (symlink(7)).
    if stat.kind != FileKind::Symlink && ours.permissions != theirs.permissions {
        found.push(format!("mode {:04o}, on the backup {:04o}", ours.permissions, theirs.permissions));
    }
    if (ours.uid, ours.gid) != (theirs.uid, theirs.gid) {
        found.push(format!("owner {}:{}, on the backup {}:{}", ours.uid, ours.gid, theirs.uid, theirs.gid));
    }
    if (ours.mtime_sec, ours.mtime_nsec) != (theirs.mtime_sec, theirs.mtime_nsec) {
        found.push(format!(
            "mtime {}.{:09}, on the backup {}.{:09}",
            ours.mtime_sec, ours.mtime_nsec, theirs.mtime_sec, theirs.mtime_nsec
        ));
    }
    if stat.size != line.size {
        found.push(format!("{} bytes, on the backup {}", stat.size, line.size));
    } else if local.content != line.content {
        let what = if stat.kind == FileKind::Symlink { "target" } else { "content" };
        found.push(format!("{what} differs"));
    }
    if stat.device != line.device {
        found.push(format!("device {:x}, on the backup {:x}", stat.device, line.device));
    }
    if local.xattrs != line.xattrs {
        found.push("extended attributes differ".to_owned());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::{CheckpointId, PathBytes};
    use std::fs;

    /// The manifest that a perfect backup would give.
    fn manifest(root: &Path) -> Manifest {
        fn add(root: &Path, path: &Path, lines: &mut Vec<ManifestLine>) {
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            let fd = rustix::fs::open(path, flags, Mode::empty()).unwrap();
            let local = read(fd.as_fd()).unwrap().unwrap();
            lines.push(ManifestLine {
                root: 0,
                path: PathBytes::new(path.strip_prefix(root).unwrap()),
                object: ObjectId(local.stat.ino),
                kind: local.stat.kind,
                meta: local.stat.meta,
                size: local.stat.size,
                device: local.stat.device,
                content: local.content,
                xattrs: local.xattrs,
            });
            if local.stat.kind == FileKind::Directory {
                for entry in fs::read_dir(path).unwrap() {
                    add(root, &entry.unwrap().path(), lines);
                }
            }
        }
        let mut lines = Vec::new();
        add(root, root, &mut lines);
        Manifest { checkpoint: CheckpointId(4), roots: vec![PathBytes::new(root)], lines }
    }

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/f"), "content").unwrap();
        fs::hard_link(dir.path().join("d/f"), dir.path().join("g")).unwrap();
        std::os::unix::fs::symlink("d/f", dir.path().join("l")).unwrap();
        dir
    }

    #[test]
    fn an_equal_tree_is_equal() {
        let dir = tree();
        let report = compare(&manifest(dir.path()), None, &Filter::default(), None).report;
        assert_eq!((report.different_count, report.not_compared_count, report.compared), (0, 0, 5));
    }

    #[test]
    fn each_difference_is_listed() {
        let dir = tree();
        let mut expected = manifest(dir.path());
        let line =
            |m: &mut Manifest, p: &str| m.lines.iter().position(|l| &*l.path.0 == p.as_bytes()).unwrap();
        let (f, g, l) = (line(&mut expected, "d/f"), line(&mut expected, "g"), line(&mut expected, "l"));
        expected.lines[f].content = [1; 32];
        expected.lines[g].object = ObjectId(1);
        expected.lines[l].path = PathBytes((*b"only").into());
        let report = compare(&expected, None, &Filter::default(), None).report;
        let text = report.different.join("\n");
        for part in [
            "d/f: content differs",
            "g: hard links differ",
            "l: is not on the backup",
            "only: is on the backup only",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(report.different_count, 4);
    }

    #[test]
    fn what_is_left_out_is_not_looked_at() {
        let dir = tree();
        let mut expected = manifest(dir.path());
        let below_d = |l: &ManifestLine| l.path.0.starts_with(b"d");
        expected.lines.retain(|l| !below_d(l) && &*l.path.0 != b"l");
        let filter = Filter::new(&[], &["/d".into(), "l".into()]).unwrap();
        let report = compare(&expected, None, &filter, None).report;
        assert_eq!((report.different_count, report.not_compared_count, report.compared), (0, 0, 2));
    }

    #[test]
    fn what_changed_since_the_checkpoint_is_not_compared() {
        let dir = tree();
        let expected = manifest(dir.path());
        fs::write(dir.path().join("d/f"), "other").unwrap();
        fs::remove_file(dir.path().join("l")).unwrap();
        let found = compare(&expected, Some(0), &Filter::default(), None);
        assert_eq!((found.report.different_count, found.report.not_compared_count), (0, 0), "{found:?}");
        assert!(found.left.len() >= 3, "{found:?}");
        // At a later checkpoint, only these.
        let later = manifest(dir.path());
        let only: Places = found.left.into_keys().collect();
        let found = compare(&later, Some(i64::MAX), &Filter::default(), Some(&only));
        assert!(found.left.is_empty() && found.report.different_count == 0, "{found:?}");
        // The symlink is gone on both sides.
        assert_eq!(found.report.compared as usize, only.len() - 1, "{found:?}");
    }

    /// The files in a directory that is moved keep their times.
    #[test]
    fn what_is_in_a_directory_that_moved_since_is_not_compared() {
        use std::os::unix::fs::MetadataExt;
        let dir = tree();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("e/deep")).unwrap();
        fs::write(at("e/f"), "other").unwrap();
        fs::write(at("e/deep/h"), "more").unwrap();
        let expected = manifest(dir.path());
        let files = ["d/f", "e/f", "e/deep", "e/deep/h"].map(|name| fs::symlink_metadata(at(name)).unwrap());
        let last = files.iter().map(|m| m.ctime() * 1_000_000_000 + m.ctime_nsec()).max().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(60));
        let since = Some(last + CLOCK_SLACK_NS + 20_000_000);
        // They change places, and one goes on to where nothing was.
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        rustix::fs::renameat_with(rustix::fs::CWD, at("d"), rustix::fs::CWD, at("e"), flags).unwrap();
        fs::rename(at("e"), at("new")).unwrap();
        let found = compare(&expected, since, &Filter::default(), None);
        assert_eq!(found.report.different, [""; 0], "{found:?}");
        let only: Places = found.left.into_keys().collect();
        for name in ["d/f", "d/deep/h", "new/f"] {
            let place = (dir.path().as_os_str().as_bytes().to_vec(), name.into());
            assert!(only.contains(&place), "{name} in {only:?}");
        }
        let found = compare(&manifest(dir.path()), Some(i64::MAX), &Filter::default(), Some(&only));
        assert!(found.left.is_empty() && found.report.different_count == 0, "{found:?}");
        // Where nothing moved they differ.
        let found = compare(&expected, None, &Filter::default(), None);
        assert!(found.report.different.iter().any(|line| line.contains("d/f")), "{found:?}");
    }

    #[test]
    fn what_differs_names_its_objects() {
        let dir = tree();
        let mut expected = manifest(dir.path());
        let at = |m: &Manifest, p: &str| m.lines.iter().position(|l| &*l.path.0 == p.as_bytes()).unwrap();
        let (l, d) = (at(&expected, "l"), at(&expected, ""));
        expected.lines[l].content = [1; 32];
        let found = compare(&expected, None, &Filter::default(), None);
        let both = [expected.lines[l].object, expected.lines[d].object];
        assert_eq!(found.objects, BTreeSet::from(both));
        let place = (dir.path().as_os_str().as_bytes().to_vec(), b"l".to_vec());
        assert_eq!(found.different.into_keys().collect::<Vec<_>>(), [place]);
    }
}
