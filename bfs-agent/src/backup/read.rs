//! What agents read from a group: the catalogue and the manifest.
//!
//! Both hold the lock of the tree, so the applier waits while they are made and read: `send` gives
//! up for a peer that reads too slowly. Both are handed out in pieces of bounded size.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;

use bfs_common::record::{FileKind, Name, ObjectId, PathBytes};
use bfs_common::wire::{CatalogObject, Frame, ManifestLine};
use rustix::fs::OFlags;

use super::error::BackupError;
use super::group::Group;
use super::index::{Base, Node, Place, View};
use super::log::read_range;
use super::plan::{Plan, plan};
use super::target::Target;
use crate::tree;

/// About how long a frame gets.
const FRAME_BYTES: usize = 1 << 20;
/// Entries of a directory in one line of the catalogue; the same object comes again with more.
const ENTRIES_MAX: usize = 8192;

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
        let mut pieces = entries.chunks(ENTRIES_MAX);
        let mut piece = pieces.next();
        loop {
            let entries = piece.unwrap_or_default().to_vec();
            bytes += 200 + node.target.len();
            bytes += entries.iter().map(|(n, _)| n.as_bytes().len() + 16).sum::<usize>();
            bytes += node.xattrs.iter().map(|(n, v)| n.len() + v.len() + 16).sum::<usize>();
            objects.push(CatalogObject {
                object,
                identity: node.identity,
                kind: node.kind,
                device: node.device,
                meta: node.meta,
                size: node.size,
                xattrs: node.xattrs.clone(),
                target: node.target.clone(),
                entries,
            });
            if bytes >= FRAME_BYTES {
                bytes = 0;
                if !send(Frame::Catalog { objects: std::mem::take(&mut objects), last: false }) {
                    return Ok(false);
                }
            }
            piece = pieces.next();
            if piece.is_none() {
                return Ok(true);
            }
        }
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
    const AT_ONCE: usize = 1024;
    let mut from = ObjectId(0);
    loop {
        let some = view.objects(from, AT_ONCE)?;
        for (object, node) in &some {
            let node = plan.objects.get(object).map_or(Some(node), |t| t.after.as_ref());
            if let Some(node) = node
                && !each(*object, node)?
            {
                return Ok(false);
            }
        }
        match some.last() {
            Some((last, _)) => from = last.next(),
            None => break,
        }
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
            writer.walk(index as u32, Vec::new(), *object, &fd)?;
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

impl ManifestWriter<'_> {
    fn walk(&mut self, root: u32, path: Vec<u8>, object: ObjectId, fd: &OwnedFd) -> Result<(), BackupError> {
        if !self.goes_on {
            return Ok(());
        }
        let shown = String::from_utf8_lossy(&path).into_owned();
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
            path: PathBytes(path.clone().into()),
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
            return Ok(());
        }
        let mut names = Vec::new();
        let dir = tree::reopen_read(fd.as_fd()).map_err(io("open"))?;
        for entry in rustix::fs::Dir::read_from(&dir).map_err(|e| io("read")(e.into()))? {
            let entry = entry.map_err(|e| io("read")(e.into()))?;
            if let Some(name) = Name::new(entry.file_name().to_bytes()) {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            let child = super::apply::open_beneath(fd, name.as_bytes(), OFlags::PATH)
                .map_err(|e| io("open an entry of")(e.into()))?;
            let object = self.view.entry(object, &name)?.unwrap_or_default();
            let mut below = path.clone();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend_from_slice(name.as_bytes());
            self.walk(root, below, object, &child)?;
        }
        Ok(())
    }
}
