//! The group as it is at the last record that was read: the applied checkpoint with what follows it. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bfs_common::record::{FileKind, Meta, Name, ObjectId, PathBytes};
use bytes::Bytes;

use super::super::error::BackupError;
use super::super::index::{Base, Place};
use super::super::target::{Content, ObjectChange, Target};

/// Levels of directories, a bound for the way up.
const DEPTH_MAX: usize = 4096;

/// See the module.
pub(in crate::backup) struct Pending<'a, B: Base> {
    pub(in crate::backup) base: &'a B,
    pub(in crate::backup) target: &'a Target,
    /// The roots at the applied checkpoint.
    pub(in crate::backup) roots: &'a [(PathBytes, ObjectId)],
}

/// A regular file: where its bytes come from, and its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::backup) struct FileState {
    /// Its size at the applied checkpoint; none if it was not there.
    pub(in crate::backup) before: Option<u64>,
    /// What became of its content since.
    pub(in crate::backup) content: Content,
    pub(in crate::backup) meta: Meta,
    pub(in crate::backup) xattrs: Vec<(String, Bytes)>,
}

impl<B: Base> Pending<'_, B> {
    pub(in crate::backup) fn roots(&self) -> &[(PathBytes, ObjectId)] {
        self.target.roots.as_deref().unwrap_or(self.roots)
    }

    fn change(&self, object: ObjectId) -> Option<&ObjectChange> {
        self.target.objects.get(&object)
    }

    fn is_gone(&self, object: ObjectId) -> bool {
        self.change(object).is_some_and(|change| change.forgotten)
    }

    pub(in crate::backup) fn kind(&self, object: ObjectId) -> Result<Option<FileKind>, BackupError> {
        if self.is_gone(object) {
            return Ok(None);
        }
        match self.change(object).and_then(|change| change.created.as_ref()) {
            Some(created) => Ok(Some(created.kind)),
            None => Ok(self.base.node(object)?.map(|node| node.kind)),
        }
    }

    pub(in crate::backup) fn entry(
        &self,
        directory: ObjectId,
        name: &Name,
    ) -> Result<Option<ObjectId>, BackupError> {
        match self.target.entries.get(&(directory, name.clone())) {
            Some(entry) => Ok(*entry),
            None => self.base.entry(directory, name),
        }
    }

    fn entries(&self, directory: ObjectId) -> Result<BTreeMap<Name, ObjectId>, BackupError> {
        let mut all: BTreeMap<Name, ObjectId> = self.base.entries(directory)?.into_iter().collect();
        let first = Name::new(&[1]).expect("a name of one byte");
        let changed = self.target.entries.range((directory, first)..);
        for ((_, name), object) in changed.take_while(|((of, _), _)| *of == directory) {
            match object {
                Some(object) => all.insert(name.clone(), *object),
                None => all.remove(name),
            };
        }
        Ok(all)
    }

    /// The primary's path of a directory; none if it stands nowhere.
    pub(in crate::backup) fn path(&self, directory: ObjectId) -> Result<Option<PathBuf>, BackupError> {
        let (mut at, mut names) = (directory, Vec::new());
        while names.len() < DEPTH_MAX {
            if let Some((root, _)) = self.roots().iter().find(|(_, object)| *object == at) {
                let below = names.iter().rev().map(|name: &Name| name.as_os_str());
                return Ok(Some(root.as_path().join(below.collect::<PathBuf>())));
            }
            let Some((parent, name)) = self.place(at)? else { return Ok(None) };
            names.push(name);
            at = parent;
        }
        Ok(None)
    }

    /// The one place of a directory.
    fn place(&self, directory: ObjectId) -> Result<Option<(ObjectId, Name)>, BackupError> {
        if let Some((parent, name)) = self.target.last_place.get(&directory) {
            let there = self.entry(*parent, name)? == Some(directory);
            return Ok(there.then(|| (*parent, name.clone())));
        }
        for place in self.base.node(directory)?.map(|node| node.places).unwrap_or_default() {
            if let Place::Entry(parent, name) = place
                && self.entry(parent, &name)? == Some(directory)
            {
                return Ok(Some((parent, name)));
            }
        }
        Ok(None)
    }

    /// What stands at a path of the primary.
    pub(in crate::backup) fn at_path(&self, path: &std::path::Path) -> Result<Option<ObjectId>, BackupError> {
        for (root, object) in self.roots() {
            let Ok(below) = path.strip_prefix(root.as_path()) else { continue };
            let mut at = *object;
            for name in below {
                let Some(name) = Name::new(name.as_encoded_bytes()) else { return Ok(None) };
                match self.entry(at, &name)? {
                    Some(next) => at = next,
                    None => return Ok(None),
                }
            }
            return Ok(Some(at));
        }
        Ok(None)
    }

    /// All regular files below an object that stands at a path, or it itself.
    pub(in crate::backup) fn files(
        &self,
        object: ObjectId,
        path: PathBuf,
        each: &mut dyn FnMut(PathBuf, ObjectId),
    ) -> Result<(), BackupError> {
        let mut todo = vec![(object, path)];
        while let Some((object, path)) = todo.pop() {
            match self.kind(object)? {
                Some(FileKind::Regular) => each(path, object),
                Some(FileKind::Directory) if path.components().count() < DEPTH_MAX => {
                    let below = self.entries(object)?.into_iter();
                    todo.extend(below.map(|(name, child)| (child, path.join(name.as_os_str()))));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A regular file; none if it is not there.
    pub(in crate::backup) fn file(&self, object: ObjectId) -> Result<Option<FileState>, BackupError> {
        if self.kind(object)? != Some(FileKind::Regular) {
            return Ok(None);
        }
        let change = self.change(object);
        let node = match change.and_then(|change| change.created.as_ref()) {
            Some(_) => None,
            None => self.base.node(object)?,
        };
        let had = node.as_ref().map(|node| node.xattrs.clone()).unwrap_or_default();
        let mut xattrs: BTreeMap<String, Bytes> = had.into_iter().collect();
        for (name, value) in change.into_iter().flat_map(|change| &change.xattrs) {
            match value {
                Some(value) => xattrs.insert(name.clone(), value.clone()),
                None => xattrs.remove(name),
            };
        }
        let meta = change.and_then(|change| change.meta).or(node.as_ref().map(|node| node.meta));
        Ok(Some(FileState {
            before: node.map(|node| node.size),
            content: change.map(|change| change.content.clone()).unwrap_or_default(),
            meta: meta.unwrap_or_default(),
            xattrs: xattrs.into_iter().collect(),
        }))
    }
}
