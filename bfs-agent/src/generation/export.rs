//! Writing a generation as a tar archive.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bfs_common::record::{FileKind, ObjectId};

use super::tar::{self, Extents, Kind, Member};
use super::{Client, Object, ReadError, RestoreError, Tree};
use crate::tree;

/// Files up to this size are asked for together, and held in memory.
const SMALL: u64 = 1 << 20;
/// And so many bytes of them at once.
const TOGETHER: u64 = 32 << 20;
/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Files, directories and so on; of hard links each name.
    pub names: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Sockets: an archive cannot have them.
    pub left_out: Vec<PathBuf>,
}

/// Writes a tree, or what stands at `only` in it, as an archive.
///
/// # Errors
/// [`RestoreError`]; what was written then is no archive.
pub fn export(
    client: &mut Client,
    group: &str,
    tree: &Tree,
    only: Option<&Path>,
    out: &mut dyn Write,
) -> Result<Exported, RestoreError> {
    let mut tops = Vec::new();
    match only {
        Some(path) => {
            let object = tree.find(path).ok_or_else(|| RestoreError::NoPath(path.into()))?;
            tops.push((object, path.to_owned()));
        }
        None => tops.extend(tree.roots.iter().map(|(root, object)| (*object, root.as_path().to_owned()))),
    }
    let mut archive =
        Archive { client, group, tree, out, written: 0, done: Exported::default(), waiting: Vec::new() };
    let mut named: HashMap<ObjectId, PathBuf> = HashMap::new();
    tops.reverse();
    while let Some((object, path)) = tops.pop() {
        let node = archive.object(object)?;
        let path = path.strip_prefix("/").map_or(path.clone(), Path::to_owned);
        archive.done.names += 1;
        if node.kind == FileKind::Socket {
            archive.done.names -= 1;
            archive.done.left_out.push(path);
            continue;
        }
        if let Some(first) = named.get(&object) {
            archive.member(Entry { object, path, first: Some(first.clone()) })?;
            continue;
        }
        // The last is taken first: so they come in the order of their names.
        let children = node.entries.iter().rev();
        tops.extend(children.map(|(name, child)| (*child, path.join(name.as_os_str()))));
        named.insert(object, path.clone());
        archive.member(Entry { object, path, first: None })?;
    }
    archive.end()
}

/// A name in the archive.
struct Entry {
    object: ObjectId,
    path: PathBuf,
    /// It is another name of this one.
    first: Option<PathBuf>,
}

struct Archive<'a> {
    client: &'a mut Client,
    group: &'a str,
    tree: &'a Tree,
    out: &'a mut dyn Write,
    written: u64,
    done: Exported,
    /// Members that wait for the bytes of small files.
    waiting: Vec<Entry>,
}

impl<'a> Archive<'a> {
    fn object(&self, object: ObjectId) -> Result<&'a Object, RestoreError> {
        let found = self.tree.objects.get(&object);
        found.ok_or_else(|| RestoreError::Tree(format!("object {object} is missing")))
    }

    fn member(&mut self, entry: Entry) -> Result<(), RestoreError> {
        let node = self.object(entry.object)?;
        if node.kind == FileKind::Regular && entry.first.is_none() && node.size > SMALL {
            self.flush()?;
            return self.large(&entry, node);
        }
        self.waiting.push(entry);
        let bytes = self.waiting.iter().filter(|entry| entry.first.is_none());
        let bytes: u64 = bytes.map(|e| self.tree.objects.get(&e.object).map_or(0, |node| node.size)).sum();
        if bytes > TOGETHER || self.waiting.len() >= super::FILES_AT_ONCE { self.flush() } else { Ok(()) }
    }

    /// Writes what waits.
    fn flush(&mut self) -> Result<(), RestoreError> {
        let waiting = std::mem::take(&mut self.waiting);
        let tree = self.tree;
        let is_file = |entry: &&Entry| {
            let node = tree.objects.get(&entry.object);
            entry.first.is_none() && node.is_some_and(|node| node.kind == FileKind::Regular && node.size > 0)
        };
        let files: Vec<ObjectId> = waiting.iter().filter(is_file).map(|entry| entry.object).collect();
        let mut contents: HashMap<ObjectId, Vec<(u64, Vec<u8>)>> = HashMap::new();
        self.client.contents(self.group, tree.checkpoint, &files, |object, offset, bytes| {
            let pieces = contents.entry(object).or_default();
            pieces
                .extend(tree::without_holes(offset, bytes).into_iter().map(|(at, part)| (at, part.to_vec())));
            Ok(())
        })?;
        for entry in waiting {
            let node = self.object(entry.object)?;
            let pieces = contents.remove(&entry.object).unwrap_or_default();
            let is_file = node.kind == FileKind::Regular && entry.first.is_none();
            let mut extents = Vec::new();
            pieces.iter().for_each(|(at, part)| add(&mut extents, *at, part.len() as u64));
            let extents = (is_file && !is_whole(&extents, node.size)).then_some(&extents[..]);
            self.header(&entry, node, extents)?;
            if is_file {
                for (_, part) in &pieces {
                    self.write(part)?;
                }
                self.pad(node.size, extents)?;
            }
        }
        Ok(())
    }

    /// A file that is read twice: its holes have to be known before its first byte.
    fn large(&mut self, entry: &Entry, node: &Object) -> Result<(), RestoreError> {
        let (group, at) = (self.group, self.tree.checkpoint);
        let mut pieces = Vec::new();
        self.client.contents(group, at, &[entry.object], |_, offset, bytes| {
            for (at, part) in tree::without_holes(offset, bytes) {
                add(&mut pieces, at, part.len() as u64);
            }
            Ok(())
        })?;
        let extents = (!is_whole(&pieces, node.size)).then_some(&pieces[..]);
        self.header(entry, node, extents)?;
        let (out, written, done) = (&mut *self.out, &mut self.written, &mut self.done);
        let mut bytes_written = 0;
        self.client.contents(group, at, &[entry.object], |_, offset, bytes| {
            for (_, part) in tree::without_holes(offset, bytes) {
                out.write_all(part)?;
                bytes_written += part.len() as u64;
            }
            Ok(())
        })?;
        *written += bytes_written;
        done.bytes += bytes_written;
        if bytes_written != pieces.iter().map(|(_, len)| len).sum::<u64>() {
            return Err(RestoreError::Tree(format!("object {} is not the same twice", entry.object)));
        }
        self.pad(node.size, extents)
    }

    fn header(
        &mut self,
        entry: &Entry,
        node: &Object,
        extents: Option<&Extents>,
    ) -> Result<(), RestoreError> {
        let first = entry.first.as_ref().map(|first| first.as_os_str().as_bytes());
        let bytes = tar::header(
            &Member {
                path: entry.path.as_os_str().as_bytes(),
                kind: first.map_or(Kind::Object(node.kind), Kind::HardLink),
                meta: &node.meta,
                xattrs: &node.xattrs,
                target: &node.target,
                device: (rustix::fs::major(node.device), rustix::fs::minor(node.device)),
                size: node.size,
            },
            extents,
        );
        self.put(&bytes)
    }

    fn pad(&mut self, size: u64, extents: Option<&Extents>) -> Result<(), RestoreError> {
        self.put(&vec![0; tar::padding(tar::stored(size, extents))])
    }

    /// Bytes of a file.
    fn write(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        self.done.bytes += bytes.len() as u64;
        self.put(bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        self.written += bytes.len() as u64;
        Ok(self.out.write_all(bytes).map_err(ReadError::Sink)?)
    }

    fn end(mut self) -> Result<Exported, RestoreError> {
        self.flush()?;
        self.put(&tar::trailer(self.written))?;
        self.out.flush().map_err(ReadError::Sink)?;
        Ok(self.done)
    }
}

/// Whether these ranges are all of a file.
fn is_whole(extents: &Extents, size: u64) -> bool {
    size == 0 || *extents == [(0, size)]
}

/// One more range, behind all others.
fn add(ranges: &mut Vec<(u64, u64)>, at: u64, len: u64) {
    match ranges.last_mut() {
        Some((start, before)) if *start + *before == at => *before += len,
        _ => ranges.push((at, len)),
    }
}
