//! What stands on the primary now: every inode of the subtrees, by number, with what names it.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use bfs_common::abi::InodeId;
use bfs_common::record::{FileKind, Name};
use bytes::Bytes;

use super::RollbackError;
use crate::primary::engine::host::Stat;
use crate::primary::reader::{Reader, Root};

/// An inode.
#[derive(Clone, Debug)]
pub struct LocalNode {
    /// Its attributes.
    pub stat: Stat,
    /// Its extended attributes, sorted by name.
    pub xattrs: Vec<(String, Bytes)>,
    /// Of a directory.
    pub entries: BTreeMap<Name, InodeId>,
    /// One of its paths.
    pub path: PathBuf,
}

/// The subtrees.
#[derive(Clone, Debug, Default)]
pub struct Local {
    /// All inodes.
    pub nodes: HashMap<InodeId, LocalNode>,
    /// Path and directory of each root.
    pub roots: Vec<(PathBuf, InodeId)>,
}

/// Reads the subtrees; nobody should be changing them. `skip` is a name in a root that is ours.
///
/// # Errors
/// If something cannot be read.
pub fn scan(reader: &Reader, roots: &[Root], skip: &Name) -> Result<Local, RollbackError> {
    let mut local = Local::default();
    for root in roots {
        let top = root.stat.inode;
        local.roots.push((root.path.clone(), top));
        let mut to_do = vec![(root.stat.clone(), root.path.clone())];
        while let Some((stat, path)) = to_do.pop() {
            let inode = stat.inode;
            if local.nodes.contains_key(&inode) {
                continue;
            }
            let mut entries = BTreeMap::new();
            if stat.kind == FileKind::Directory {
                for name in reader.list(inode)?.unwrap_or_default() {
                    if inode == top && name == *skip {
                        continue;
                    }
                    let Some(child) = reader.child(inode, &name)? else { continue };
                    entries.insert(name.clone(), child.inode);
                    to_do.push((child, path.join(name.as_os_str())));
                }
            }
            let xattrs = reader.xattrs(inode)?.unwrap_or_default();
            let xattrs = xattrs.into_iter().map(|(name, value)| (name, value.into())).collect();
            local.nodes.insert(inode, LocalNode { stat, xattrs, entries, path });
        }
    }
    Ok(local)
}
