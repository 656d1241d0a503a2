//! What agents read from a group: the catalogue and the manifest.
//!
//! Both hold the lock of the tree, so the applier waits while they are made and read: `send` gives
//! up for a peer that reads too slowly. Both are handed out in pieces of bounded size.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;

use bfs_common::record::{FileKind, Name, ObjectId, PathBytes};
use bfs_common::wire::{CatalogObject, Frame, ManifestLine};
use bytes::Bytes;
use rustix::fs::{Mode, OFlags};

use super::error::BackupError;
use super::group::Group;
use super::index::{Base, Node, Place, View};
use super::plan::{Plan, plan};
use super::target::Target;
use crate::log::read_range;
use crate::tree;

/// About how long a frame gets.
const FRAME_BYTES: usize = 1 << 20;
/// Entries of a directory in one line of the catalogue; the same object comes again with more.
const ENTRIES_MAX: usize = 8192;
/// Bytes of extended attributes in one line; the same object comes again with more.
const XATTRS_MAX: usize = 1 << 20;
/// Levels of directories that are held open by a walk.
const OPEN_MAX: usize = 64;

fn xattr_len((name, value): &(String, Bytes)) -> usize {
    name.len() + value.len() + 16
}

/// Pieces of bounded size; none is empty, one value at least is in each.
fn in_pieces(mut xattrs: &[(String, Bytes)]) -> Vec<&[(String, Bytes)]> {
    let mut pieces = Vec::new();
    while !xattrs.is_empty() {
        let mut sum = 0;
        let fits = |x: &&(String, Bytes)| {
            sum += xattr_len(x);
            sum <= XATTRS_MAX
        };
        let (piece, rest) = xattrs.split_at(xattrs.iter().take_while(fits).count().max(1));
        pieces.push(piece);
        xattrs = rest;
    }
    pieces
}

/// The lines of an object, of bounded size: what is too much for one comes in more of the same
/// number. With each, about how many bytes it has.
pub(super) fn lines_of(
    object: ObjectId,
    node: &Node,
    entries: &[(Name, ObjectId)],
) -> Vec<(CatalogObject, usize)> {
    let mut pieces = entries.chunks(ENTRIES_MAX);
    let mut xattr_pieces = in_pieces(&node.xattrs).into_iter();
    let (mut piece, mut xattrs) = (pieces.next(), xattr_pieces.next());
    let mut lines = Vec::new();
    loop {
        let entries = piece.unwrap_or_default().to_vec();
        let some = xattrs.unwrap_or_default();
        let bytes = 200
            + node.target.len()
            + entries.iter().map(|(n, _)| n.as_bytes().len() + 16).sum::<usize>()
            + some.iter().map(xattr_len).sum::<usize>();
        lines.push((line(object, node, some.to_vec(), entries), bytes));
        (piece, xattrs) = (pieces.next(), xattr_pieces.next());
        if piece.is_none() && xattrs.is_none() {
            return lines;
        }
    }
}

/// An object with these of its extended attributes and entries.
pub(super) fn line(
    object: ObjectId,
    node: &Node,
    xattrs: Vec<(String, Bytes)>,
    entries: Vec<(Name, ObjectId)>,
) -> CatalogObject {
    CatalogObject {
        object,
        identity: node.identity,
        kind: node.kind,
        device: node.device,
        meta: node.meta,
        size: node.size,
        xattrs,
        target: node.target.clone(),
        entries,
    }
}

/// The state at the last durable record, as frames. `send` gives up with false.
///
/// # Errors
/// If index or log cannot be read.
pub fn catalog(group: &Group, send: &mut dyn FnMut(Frame) -> bool) -> Result<(), BackupError> {
    let row = group.tree.lock().unwrap_or_else(PoisonError::into_inner);
    let to = group.progress().borrow().durable.sequence;
    let mut target = Target::default();
    read_range(&group.log, row.id, row.applied.sequence, to, |found| {
        target.fold(found.record, &found.payload, found.at).map_err(|e| BackupError::Stream(e.to_string()))
    })?;
    let view = group.index.view(row.number)?;
    let plan = plan(&view, &row.roots, &target)?;
    let mut changes: BTreeMap<ObjectId, BTreeMap<Name, Option<ObjectId>>> = BTreeMap::new();
    for (places, wanted) in [(&plan.detach, false), (&plan.attach, true)] {
        for (place, object) in places {
            if let Place::Entry(directory, name) = place {
                changes.entry(*directory).or_default().insert(name.clone(), wanted.then_some(*object));
            }
        }
    }
    let mut objects = Vec::new();
    let mut bytes = 0;
    let mut each = |object: ObjectId, node: &Node| -> Result<bool, BackupError> {
        let mut entries = Vec::new();
        if node.kind == FileKind::Directory {
            let mut all: BTreeMap<Name, ObjectId> = view.entries(object)?.into_iter().collect();
            for (name, to) in changes.remove(&object).unwrap_or_default() {
                match to {
                    Some(to) => all.insert(name, to),
                    None => all.remove(&name),
                };
            }
            entries = all.into_iter().collect();
        }
        for (line, len) in lines_of(object, node, &entries) {
            objects.push(line);
            bytes += len;
            if bytes >= FRAME_BYTES {
                bytes = 0;
                if !send(Frame::Catalog { objects: std::mem::take(&mut objects), last: false }) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    };
    if walk_objects(&view, &plan, &mut each)? {
        send(Frame::Catalog { objects, last: true });
    }
    Ok(())
}

/// All objects after the plan; false if `each` gave up.
fn walk_objects(
    view: &View,
    plan: &Plan,
    each: &mut dyn FnMut(ObjectId, &Node) -> Result<bool, BackupError>,
) -> Result<bool, BackupError> {
    let walked = view.each(|object, node| {
        let node = plan.objects.get(&object).map_or(Some(node), |t| t.after.as_ref());
        node.map_or(Ok(true), |node| each(object, node))
    });
    if !walked? {
        return Ok(false);
    }
    for (object, touched) in &plan.objects {
        if let (None, Some(node)) = (&touched.before, &touched.after)
            && !each(*object, node)?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The files of the applied tree as they are, as frames. `send` gives up with false.
///
/// # Errors
/// If the tree cannot be read.
pub fn manifest(group: &Group, send: &mut dyn FnMut(Frame) -> bool) -> Result<(), BackupError> {
    let row = group.tree.lock().unwrap_or_else(PoisonError::into_inner);
    let view = group.index.view(row.number)?;
    let roots: Vec<PathBytes> = row.roots.iter().map(|(path, _)| path.clone()).collect();
    let frame =
        |lines, last| Frame::Manifest { checkpoint: row.checkpoint, roots: roots.clone(), lines, last };
    let mut writer =
        ManifestWriter { view: &view, lines: Vec::new(), bytes: 0, frame: &frame, send, goes_on: true };
    for (index, (path, object)) in row.roots.iter().enumerate() {
        if let Some(fd) = group.area.open_root(path.as_path())? {
            writer.walk(index as u32, *object, fd)?;
        }
    }
    if writer.goes_on {
        let lines = std::mem::take(&mut writer.lines);
        send(frame(lines, true));
    }
    Ok(())
}

struct ManifestWriter<'a> {
    view: &'a View,
    lines: Vec<ManifestLine>,
    bytes: usize,
    frame: &'a dyn Fn(Vec<ManifestLine>, bool) -> Frame,
    send: &'a mut dyn FnMut(Frame) -> bool,
    goes_on: bool,
}

/// A directory that a walk is in.
struct Level {
    object: ObjectId,
    /// (device, inode)
    identity: (u64, u64),
    /// Length of its path.
    path: usize,
    /// What is still to come, in reverse.
    names: Vec<Name>,
}

impl ManifestWriter<'_> {
    /// A root and all below it. Of deep trees only the last levels are held open; the way up again
    /// is `..`, checked: nobody but the applier, which waits, moves a directory here.
    fn walk(&mut self, root: u32, object: ObjectId, fd: OwnedFd) -> Result<(), BackupError> {
        let mut path = Vec::new();
        let mut levels: Vec<Level> = Vec::new();
        // Of the last of them.
        let mut open: VecDeque<OwnedFd> = VecDeque::new();
        let enter = |writer: &mut Self, object, fd: OwnedFd, path: &[u8], open: &mut VecDeque<_>| {
            let level = writer.line(root, path, object, &fd)?;
            if level.is_some() {
                if open.len() >= OPEN_MAX {
                    open.pop_front();
                }
                open.push_back(fd);
            }
            Ok::<_, BackupError>(level)
        };
        levels.extend(enter(self, object, fd, &path, &mut open)?);
        while self.goes_on
            && let Some(level) = levels.last_mut()
        {
            path.truncate(level.path);
            let Some(name) = level.names.pop() else {
                levels.pop();
                let gone = open.pop_back();
                if let (Some(above), Some(gone), true) = (levels.last(), gone, open.is_empty()) {
                    open.push_back(up(&gone, above.identity, &path)?);
                }
                continue;
            };
            let Some(fd) = open.back() else { break };
            let shown = || String::from_utf8_lossy(&path).into_owned();
            let child = super::apply::open_beneath(fd, name.as_bytes(), OFlags::PATH)
                .map_err(|e| BackupError::io("open an entry of", shown())(e))?;
            let object = self.view.entry(level.object, &name)?.unwrap_or_default();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.as_bytes());
            levels.extend(enter(self, object, child, &path, &mut open)?);
        }
        Ok(())
    }

    /// Writes the line of a file; of a directory, what is in it.
    fn line(
        &mut self,
        root: u32,
        path: &[u8],
        object: ObjectId,
        fd: &OwnedFd,
    ) -> Result<Option<Level>, BackupError> {
        let shown = String::from_utf8_lossy(path).into_owned();
        let io = |what: &'static str| BackupError::io::<std::io::Error>(what, &shown);
        let stat = tree::stat_fd(fd.as_fd()).map_err(io("stat"))?;
        let content = match stat.kind {
            FileKind::Regular => {
                let file = tree::reopen_read(fd.as_fd()).map_err(io("open"))?;
                tree::content_digest(file.as_fd()).map_err(io("read"))?
            }
            FileKind::Symlink => tree::bytes_digest(&tree::readlink(fd.as_fd()).map_err(io("read"))?),
            _ => tree::bytes_digest(b""),
        };
        let xattrs = tree::xattr_digest(&tree::xattrs(fd.as_fd()).map_err(io("read the attributes of"))?);
        self.bytes += 300 + path.len();
        self.lines.push(ManifestLine {
            root,
            path: PathBytes(path.into()),
            object,
            kind: stat.kind,
            meta: stat.meta,
            size: stat.size,
            device: stat.device,
            content,
            xattrs,
        });
        if self.bytes >= FRAME_BYTES {
            self.bytes = 0;
            let lines = std::mem::take(&mut self.lines);
            self.goes_on = (self.send)((self.frame)(lines, false));
        }
        if stat.kind != FileKind::Directory {
            return Ok(None);
        }
        let mut names = Vec::new();
        let dir = tree::reopen_read(fd.as_fd()).map_err(io("open"))?;
        for entry in rustix::fs::Dir::read_from(&dir).map_err(|e| io("read")(e.into()))? {
            let entry = entry.map_err(|e| io("read")(e.into()))?;
            names.extend(Name::new(entry.file_name().to_bytes()));
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Some(Level { object, identity: (stat.on_device, stat.ino), path: path.len(), names }))
    }
}

/// The directory above, if it is the one that we came from.
fn up(from: &OwnedFd, identity: (u64, u64), below: &[u8]) -> Result<OwnedFd, BackupError> {
    let shown = || String::from_utf8_lossy(below).into_owned();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(from, c"..", flags, Mode::empty())
        .map_err(BackupError::io("open the directory above", shown()))?;
    let stat = tree::stat_fd(fd.as_fd()).map_err(BackupError::io("stat", shown()))?;
    if (stat.on_device, stat.ino) == identity {
        Ok(fd)
    } else {
        Err(BackupError::Foreign(format!("the directory above {}", shown())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_attributes_come_in_several_lines() {
        assert!(in_pieces(&[]).is_empty());
        let many: Vec<_> = (0..40).map(|n| (format!("user.{n}"), Bytes::from(vec![0; 65_536]))).collect();
        let pieces = in_pieces(&many);
        assert_eq!(pieces.len(), 3);
        assert!(pieces.iter().all(|p| p.iter().map(xattr_len).sum::<usize>() <= XATTRS_MAX));
        assert_eq!(pieces.concat(), many);
    }
}
