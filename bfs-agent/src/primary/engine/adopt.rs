//! Taking over a tree that a backup gave out: its objects are known by other inodes, so each is found by its name.
//!
//! What has the same name, type, device and target is taken for the same object; its content and attributes are read and
//! compared like everything at a new epoch. So a wrong guess costs what differs, and never exactness.

use std::path::{Path, PathBuf};

use bfs_common::record::{GapScope, Name, ObjectId};

use super::Engine;
use super::host::Stat;

/// Where a path of the host before stands below the directory that was promoted to.
#[must_use]
pub fn promoted_place(to: &Path, root: &Path) -> PathBuf {
    to.join(root.strip_prefix("/").unwrap_or(root))
}

/// Whether a directory of this host is what was promoted of a root that the stream has: at its place below `to`, or, where
/// an agent before this one began with that, by the path that the stream has now.
#[must_use]
pub fn is_promoted(to: &Path, root: &Path, path: &Path) -> bool {
    promoted_place(to, root) == path || root == path && root.starts_with(to)
}

impl Engine {
    /// What the model knows of inodes is of another host; roots that were promoted to `to` keep their objects.
    /// To be called before [`Engine::set_roots`].
    pub fn adopt_roots(&mut self, to: &Path, roots: &[(PathBuf, Stat)]) {
        self.model.unbind();
        let known = self.model.roots().to_vec();
        for (path, stat) in roots {
            let same = known.iter().find(|(root, _)| is_promoted(to, root, path));
            if let Some((_, object)) = same {
                self.bind(*object, stat);
            }
        }
    }

    /// The object that an entry names, if what stands there can be it.
    pub(super) fn adopt(&mut self, directory: ObjectId, name: &Name, stat: &Stat) -> Option<ObjectId> {
        let object = self.model.entry(directory, name)?;
        self.bind(object, stat).then_some(object)
    }

    fn bind(&mut self, object: ObjectId, stat: &Stat) -> bool {
        let bound = self.model.bind(object, stat, &mut self.out);
        if bound {
            self.suspect(&GapScope::Subtree(object), u64::MAX);
            self.mark_mapped(object, stat.inode);
            self.mark_foreign(object, stat.inode);
        }
        bound
    }
}
