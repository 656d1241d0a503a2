//! From a checkpoint and what stands now to what has to be done: pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;

use bfs_common::abi::InodeId;
use bfs_common::record::{FileKind, Identity, Name, ObjectId};

use super::RollbackError;
use super::scan::{Local, LocalNode};
use crate::generation::{Object, Tree};

/// What has to be done.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Objects that are there, and which inode each is.
    pub inodes: BTreeMap<ObjectId, InodeId>,
    /// Objects that are made again, parents first, with the device that they go to.
    pub made: Vec<(ObjectId, u32)>,
    /// Places that lose what they name: directory, name, what.
    pub detach: Vec<(InodeId, Name, InodeId)>,
    /// Places that are filled: directory, name, what.
    pub attach: Vec<(ObjectId, Name, ObjectId)>,
    /// Files whose bytes have to be compared.
    pub compare: Vec<ObjectId>,
    /// Objects that are there whose attributes are set.
    pub attributes: BTreeSet<ObjectId>,
    /// Paths that are removed.
    pub removed: Vec<PathBuf>,
    /// Paths that others changed, which are left as they are.
    pub foreign: Vec<PathBuf>,
    /// Paths that others changed, which are brought back too.
    pub theirs: Vec<PathBuf>,
    /// Where each object of the checkpoint stands.
    pub paths: HashMap<ObjectId, PathBuf>,
    /// All inodes that are changed, bytes that have to be compared apart.
    pub changed: BTreeSet<InodeId>,
    /// All inodes that are moved or removed.
    pub moved: BTreeSet<InodeId>,
}

/// Who changed what.
pub struct Origin<'a> {
    /// Whether the stream knows the inode: else somebody made it who is not followed.
    pub known: &'a dyn Fn(InodeId) -> bool,
    /// What others changed is brought back, too.
    pub include_foreign: bool,
}

/// Plans the way from what stands to the checkpoint. `device_of` gives the device of an identity.
///
/// # Errors
/// [`RollbackError::NoRoot`], [`RollbackError::InTheWay`].
pub fn plan(
    tree: &Tree,
    local: &Local,
    device_of: &dyn Fn(&Identity) -> Option<u32>,
    origin: &Origin<'_>,
) -> Result<Plan, RollbackError> {
    let mut planner = Planner {
        tree,
        local,
        origin,
        plan: Plan::default(),
        objects: HashMap::new(),
        in_the_way: Vec::new(),
    };
    planner.find(device_of)?;
    planner.directories();
    planner.leaving();
    planner.differences();
    if planner.in_the_way.is_empty() {
        Ok(planner.plan)
    } else {
        Err(RollbackError::InTheWay(planner.in_the_way))
    }
}

struct Planner<'a> {
    tree: &'a Tree,
    local: &'a Local,
    origin: &'a Origin<'a>,
    plan: Plan,
    /// The way back from an inode.
    objects: HashMap<InodeId, ObjectId>,
    in_the_way: Vec<PathBuf>,
}

impl<'a> Planner<'a> {
    /// Which inode each object of the checkpoint is now, if it is there.
    fn find(&mut self, device_of: &dyn Fn(&Identity) -> Option<u32>) -> Result<(), RollbackError> {
        for (path, object) in &self.tree.roots {
            let path = path.as_path();
            let Some((_, top)) = self.local.roots.iter().find(|(p, _)| p == path) else {
                return Err(RollbackError::NoRoot(path.into()));
            };
            self.is(*object, *top);
            let mut to_do = vec![(*object, path.to_owned())];
            while let Some((object, path)) = to_do.pop() {
                let Some(node) = self.tree.objects.get(&object) else { continue };
                if self.plan.paths.contains_key(&object) {
                    continue;
                }
                if !self.plan.inodes.contains_key(&object) {
                    let id = &node.identity;
                    let inode = device_of(id).filter(|dev| *dev == top.dev).map(|dev| InodeId {
                        dev,
                        ino: id.ino,
                        generation: id.generation,
                    });
                    match inode.filter(|inode| self.fits(node, *inode)) {
                        Some(inode) => self.is(object, inode),
                        None => self.plan.made.push((object, top.dev)),
                    }
                }
                to_do.extend(node.entries.iter().map(|(name, o)| (*o, path.join(name.as_os_str()))));
                self.plan.paths.insert(object, path);
            }
        }
        Ok(())
    }

    fn is(&mut self, object: ObjectId, inode: InodeId) {
        self.plan.inodes.insert(object, inode);
        self.objects.insert(inode, object);
    }

    /// Whether the object can be this inode: what cannot be changed about one is as it was.
    fn fits(&self, node: &Object, inode: InodeId) -> bool {
        !self.objects.contains_key(&inode)
            && self.local.nodes.get(&inode).is_some_and(|l| {
                l.stat.kind == node.kind
                    && l.stat.device == node.device
                    && l.stat.target[..] == node.target[..]
            })
    }

    fn is_known(&self, inode: InodeId) -> bool {
        self.objects.contains_key(&inode) || (self.origin.known)(inode)
    }

    fn ours(&self, inode: InodeId) -> bool {
        self.origin.include_foreign || self.is_known(inode)
    }

    /// Others changed this, and it is brought back all the same.
    fn note_theirs(&mut self, path: &std::path::Path) {
        if self.origin.include_foreign {
            self.plan.theirs.push(path.into());
        }
    }

    /// Entries of the directories of the checkpoint.
    fn directories(&mut self) {
        let (tree, local) = (self.tree, self.local);
        let none = BTreeMap::new();
        let mut order: Vec<ObjectId> = self.plan.paths.keys().copied().collect();
        order.sort_unstable();
        for object in order {
            let Some(node) = tree.objects.get(&object).filter(|n| n.kind == FileKind::Directory) else {
                continue;
            };
            let inode = self.plan.inodes.get(&object).copied();
            let now = inode.and_then(|inode| local.nodes.get(&inode)).map_or(&none, |l| &l.entries);
            let wanted: BTreeMap<&Name, ObjectId> = node.entries.iter().map(|(n, o)| (n, *o)).collect();
            let path = self.plan.paths[&object].clone();
            let mut changes = false;
            for (name, what) in now {
                let stays = wanted.get(name).is_some_and(|o| self.plan.inodes.get(o) == Some(what));
                if stays {
                    continue;
                }
                let path = path.join(name.as_os_str());
                if !node.changed || !self.is_known(*what) {
                    self.note_theirs(&path);
                }
                let foreign = !self.ours(*what) || !(node.changed || self.origin.include_foreign);
                match (foreign, wanted.contains_key(name)) {
                    (true, true) => self.in_the_way.push(path),
                    (true, false) => self.plan.foreign.push(path),
                    (false, _) => {
                        if let Some(directory) = inode {
                            self.detach(directory, name, *what);
                        }
                        changes = true;
                    }
                }
            }
            for (name, what) in wanted {
                let there = now.get(name);
                if there.is_some() && there == self.plan.inodes.get(&what) {
                    continue;
                }
                if inode.is_some() && !node.changed && !self.origin.include_foreign {
                    self.plan.foreign.push(path.join(name.as_os_str()));
                    continue;
                }
                if inode.is_some() && !node.changed {
                    self.note_theirs(&path.join(name.as_os_str()));
                }
                self.plan.attach.push((object, name.clone(), what));
                changes = true;
            }
            if changes && let Some(inode) = inode {
                self.plan.attributes.insert(object);
                self.plan.changed.insert(inode);
            }
        }
    }

    fn detach(&mut self, directory: InodeId, name: &Name, what: InodeId) {
        if !self.objects.contains_key(&what)
            && let Some(node) = self.local.nodes.get(&directory)
        {
            self.plan.removed.push(node.path.join(name.as_os_str()));
        }
        self.plan.moved.insert(what);
        self.plan.detach.push((directory, name.clone(), what));
    }

    /// Directories that go: what stays is taken out of them, and others may have put nothing there.
    fn leaving(&mut self) {
        let local = self.local;
        let mut seen = HashSet::new();
        let mut to_do: Vec<InodeId> =
            self.plan.detach.iter().map(|d| d.2).filter(|i| !self.objects.contains_key(i)).collect();
        while let Some(inode) = to_do.pop() {
            let Some(node) = local.nodes.get(&inode) else { continue };
            if !seen.insert(inode) {
                continue;
            }
            self.plan.moved.insert(inode);
            for (name, what) in &node.entries {
                if self.objects.contains_key(what) {
                    self.plan.moved.insert(*what);
                    self.plan.detach.push((inode, name.clone(), *what));
                } else if !self.ours(*what) {
                    self.in_the_way.push(node.path.join(name.as_os_str()));
                } else {
                    to_do.push(*what);
                }
            }
        }
    }

    /// Attributes and bytes of what is there.
    fn differences(&mut self) {
        let moved: HashSet<ObjectId> = self.plan.attach.iter().map(|(_, _, what)| *what).collect();
        for (object, inode) in self.plan.inodes.clone() {
            let (Some(node), Some(now)) = (self.tree.objects.get(&object), self.local.nodes.get(&inode))
            else {
                continue;
            };
            let attributes = attributes_differ(node, now);
            let bytes = node.kind == FileKind::Regular
                && (node.changed
                    || now.stat.size != node.size
                    || now.stat.meta.mtime_sec != node.meta.mtime_sec
                    || now.stat.meta.mtime_nsec != node.meta.mtime_nsec);
            if (attributes || bytes) && !node.changed && !self.origin.include_foreign {
                self.plan.foreign.push(self.plan.paths[&object].clone());
                continue;
            }
            if (attributes || bytes) && !node.changed {
                let path = self.plan.paths[&object].clone();
                self.note_theirs(&path);
            }
            // A directory that is moved gets its times again, too.
            if attributes || moved.contains(&object) {
                self.plan.attributes.insert(object);
                self.plan.changed.insert(inode);
            }
            if bytes {
                self.plan.compare.push(object);
            }
        }
        self.plan.foreign.sort();
        self.plan.foreign.dedup();
        self.plan.theirs.sort();
        self.plan.theirs.dedup();
        self.plan.removed.sort();
    }
}

/// Whether mode, owner, times or extended attributes are others.
pub fn attributes_differ(node: &Object, now: &LocalNode) -> bool {
    let (mut ours, theirs) = (now.stat.meta, node.meta);
    if node.kind == FileKind::Symlink {
        // They mean nothing (symlink(7)).
        ours.permissions = theirs.permissions;
    }
    ours != theirs || now.xattrs != node.xattrs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::engine::host::Stat;
    use bfs_common::record::{CheckpointId, CheckpointLabel, Meta, PathBytes};
    use bytes::Bytes;
    use proptest::prelude::*;

    const ROOT: &str = "/r";

    /// A file system in memory: inode number to its kind, bytes and entries.
    #[derive(Clone, Debug, Default)]
    struct World {
        nodes: BTreeMap<u64, (bool, u8, BTreeMap<Name, u64>)>,
        next: u64,
    }

    impl World {
        fn new() -> Self {
            let mut world = Self { next: 1, ..Self::default() };
            world.make(true);
            world
        }

        fn make(&mut self, directory: bool) -> u64 {
            self.next += 1;
            self.nodes.insert(self.next - 1, (directory, 0, BTreeMap::new()));
            self.next - 1
        }

        fn below(&self, top: u64, inode: u64) -> bool {
            top == inode || self.nodes[&top].2.values().any(|child| self.below(*child, inode))
        }

        fn reachable(&self) -> BTreeSet<u64> {
            let (mut found, mut to_do) = (BTreeSet::new(), vec![1]);
            while let Some(inode) = to_do.pop() {
                if found.insert(inode) {
                    to_do.extend(self.nodes[&inode].2.values());
                }
            }
            found
        }

        fn op(&mut self, (op, a, b, c): (u8, u8, u8, u8)) {
            let there = self.reachable();
            let dirs: Vec<u64> = there.iter().copied().filter(|i| self.nodes[i].0).collect();
            let files: Vec<u64> = there.iter().copied().filter(|i| !self.nodes[i].0).collect();
            let (from, to) = (dirs[a as usize % dirs.len()], dirs[b as usize % dirs.len()]);
            let name = |n: u8| Name::new(format!("n{}", n % 4).as_bytes()).unwrap();
            let (old, new) = (name(b), name(c));
            let at = |world: &Self, dir: u64, name: &Name| world.nodes[&dir].2.get(name).copied();
            match op % 6 {
                0 | 1 => {
                    if at(self, from, &new).is_none_or(|gone| !self.below(gone, from)) {
                        let made = self.make(op % 6 == 0);
                        self.nodes.get_mut(&from).unwrap().2.insert(new, made);
                    }
                }
                2 => drop(self.nodes.get_mut(&from).unwrap().2.remove(&new)),
                3 if !files.is_empty() => {
                    let file = files[b as usize % files.len()];
                    if at(self, from, &new).is_none_or(|gone| !self.below(gone, from)) {
                        self.nodes.get_mut(&from).unwrap().2.insert(new, file);
                    }
                }
                4 if !files.is_empty() => self.nodes.get_mut(&files[a as usize % files.len()]).unwrap().1 = c,
                _ => {
                    let Some(what) = at(self, from, &old) else { return };
                    let there = at(self, to, &new);
                    if self.below(what, to) || there.is_some_and(|t| self.below(t, from)) {
                        return;
                    }
                    self.nodes.get_mut(&from).unwrap().2.remove(&old);
                    self.nodes.get_mut(&to).unwrap().2.insert(new, what);
                }
            }
        }

        fn tree(&self) -> Tree {
            let object = |inode: &u64| {
                let (directory, byte, entries) = &self.nodes[inode];
                Object {
                    identity: Identity { ino: *inode, ..Identity::default() },
                    kind: if *directory { FileKind::Directory } else { FileKind::Regular },
                    device: 0,
                    meta: Meta { permissions: u32::from(*byte), ..Meta::default() },
                    size: 0,
                    xattrs: Vec::new(),
                    target: Bytes::new(),
                    // Objects have numbers of their own.
                    entries: entries.iter().map(|(name, i)| (name.clone(), ObjectId(i + 1000))).collect(),
                    changed: true,
                    content: None,
                }
            };
            Tree {
                checkpoint: CheckpointId(1),
                label: CheckpointLabel::default(),
                roots: vec![(PathBytes::new(ROOT.as_ref()), ObjectId(1001))],
                objects: self.reachable().iter().map(|i| (ObjectId(i + 1000), object(i))).collect(),
            }
        }

        fn local(&self) -> Local {
            let node = |inode: &u64| {
                let (directory, byte, entries) = &self.nodes[inode];
                let stat = Stat {
                    inode: id(*inode),
                    kind: if *directory { FileKind::Directory } else { FileKind::Regular },
                    meta: Meta { permissions: u32::from(*byte), ..Meta::default() },
                    size: 0,
                    device: 0,
                    target: Vec::new(),
                    links: 1,
                };
                let entries = entries.iter().map(|(name, i)| (name.clone(), id(*i))).collect();
                LocalNode { stat, xattrs: Vec::new(), entries, path: PathBuf::from(ROOT) }
            };
            let nodes = self.reachable().iter().map(|i| (id(*i), node(i))).collect();
            Local { nodes, roots: vec![(ROOT.into(), id(1))] }
        }

        /// Does a plan, as apply.rs would; each move must be possible.
        fn follow(&mut self, plan: &Plan, tree: &Tree) {
            let mut inodes: BTreeMap<ObjectId, u64> = plan.inodes.iter().map(|(o, i)| (*o, i.ino)).collect();
            for (object, _) in &plan.made {
                let directory = tree.objects[object].kind == FileKind::Directory;
                inodes.insert(*object, self.make(directory));
            }
            for (directory, name, what) in &plan.detach {
                let gone = self.nodes.get_mut(&directory.ino).unwrap().2.remove(name);
                assert_eq!(gone, Some(what.ino));
            }
            for (directory, name, what) in &plan.attach {
                let (directory, inode) = (inodes[directory], inodes[what]);
                let named =
                    |(_, _, entries): &(bool, u8, BTreeMap<Name, u64>)| entries.values().any(|i| *i == inode);
                let is_directory = self.nodes[&inode].0;
                assert!(!is_directory || !self.nodes.values().any(named), "a directory gets a second name");
                let old = self.nodes.get_mut(&directory).unwrap().2.insert(name.clone(), inode);
                assert_eq!(old, None, "a place is filled that was not empty");
            }
            for object in plan.attributes.iter().chain(plan.made.iter().map(|(o, _)| o)) {
                self.nodes.get_mut(&inodes[object]).unwrap().1 = tree.objects[object].meta.permissions as u8;
            }
        }

        /// Everything below an inode, with hard links told apart.
        fn shape(&self, inode: u64, path: &str, seen: &mut BTreeMap<u64, String>, out: &mut Vec<String>) {
            let (directory, byte, entries) = &self.nodes[&inode];
            let first = seen.entry(inode).or_insert_with(|| path.to_owned()).clone();
            out.push(format!("{path} {directory} {byte} {first}"));
            for (name, child) in entries {
                self.shape(*child, &format!("{path}/{name:?}"), seen, out);
            }
        }

        fn shown(&self) -> Vec<String> {
            let mut out = Vec::new();
            self.shape(1, "", &mut BTreeMap::new(), &mut out);
            out
        }
    }

    fn id(ino: u64) -> InodeId {
        InodeId { ino, dev: 7, generation: 0 }
    }

    type Ops = Vec<(u8, u8, u8, u8)>;

    proptest! {
        /// Whatever was done, the plan leads back; and what it took apart half way, too.
        #[test]
        fn the_plan_leads_back(before: Ops, after: Ops) {
            let mut world = World::new();
            for op in before { world.op(op); }
            let then = world.clone();
            for op in after { world.op(op); }
            let tree = then.tree();
            let origin = Origin { known: &|_| true, include_foreign: false };
            let plan = plan(&tree, &world.local(), &|_| Some(7), &origin).unwrap();
            world.follow(&plan, &tree);
            prop_assert_eq!(world.shown(), then.shown());
        }

        /// What nobody followed made is never taken away.
        #[test]
        fn what_others_made_stays(before: Ops, after: Ops, foreign: Ops) {
            let mut world = World::new();
            for op in before.into_iter().chain(after) { world.op(op); }
            let tree = world.tree();
            let known = world.next;
            for op in foreign { world.op(op); }
            let origin = Origin { known: &|inode| inode.ino < known, include_foreign: false };
            if let Ok(plan) = plan(&tree, &world.local(), &|_| Some(7), &origin) {
                prop_assert!(plan.detach.iter().all(|(_, _, what)| what.ino < known));
            }
        }
    }

    #[test]
    fn what_is_in_the_way_of_others_is_named() {
        let mut world = World::new();
        world.op((0, 0, 0, 1));
        let tree = world.tree();
        // The directory is replaced by one that somebody else made.
        let other = world.make(true);
        world.nodes.get_mut(&1).unwrap().2.insert(Name::new(b"n1").unwrap(), other);
        let origin = Origin { known: &|inode| inode.ino != other, include_foreign: false };
        let refused = plan(&tree, &world.local(), &|_| Some(7), &origin);
        assert!(matches!(refused, Err(RollbackError::InTheWay(paths)) if paths == [PathBuf::from("/r/n1")]));
    }
}
