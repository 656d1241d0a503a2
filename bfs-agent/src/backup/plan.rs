//! From the state before a step and its target to what has to be done: pure.
//!
//! An object lives from its `Object` record to its `Forget`; without an entry it is kept aside.
//! A directory has one place: the entry set last.

use std::collections::{BTreeMap, BTreeSet};

use bfs_common::record::{FileKind, Identity, Meta, ObjectId, PathBytes};
use bytes::Bytes;

use super::error::BackupError;
use super::index::{Base, Node, Place};
use super::target::{ObjectChange, Target};

/// An object that the step touches.
#[derive(Clone, Debug)]
pub struct Touched {
    /// As it was; `None` for a new one.
    pub before: Option<Node>,
    /// As it will be (its `ino` not known yet if it is new); `None` for a forgotten one.
    pub after: Option<Node>,
    /// What happens to it.
    pub change: ObjectChange,
    /// It is moved aside or made, so its file stands in `aside/` or `stage/` for a time.
    pub loose: bool,
    /// Its attributes are to be set (also a directory whose entries change).
    pub attributes: bool,
}

/// A step, ready to be done.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Objects in the order of their numbers.
    pub objects: BTreeMap<ObjectId, Touched>,
    /// Places that lose their object: all of them empty before the first is filled.
    pub detach: BTreeMap<Place, ObjectId>,
    /// Places that get an object.
    pub attach: BTreeMap<Place, ObjectId>,
}

impl Plan {
    /// Objects that go for good while older generations need their bytes.
    #[must_use]
    pub fn kept(&self) -> Vec<ObjectId> {
        let gone = |t: &Touched| match (&t.before, &t.after) {
            (Some(before), None) => before.kind == FileKind::Regular && before.size > 0,
            _ => false,
        };
        self.objects.iter().filter(|(_, t)| gone(t)).map(|(object, _)| *object).collect()
    }

    /// How many objects change, and how many bytes of files are written.
    #[must_use]
    pub fn extent(&self) -> (u64, u64) {
        let written = |t: &Touched| -> u64 {
            let size = t.after.as_ref().map_or(0, |n| n.size);
            t.change.content.extents.iter().map(|(start, end, _)| end.min(size).saturating_sub(start)).sum()
        };
        (self.objects.len() as u64, self.objects.values().map(written).sum())
    }
}

/// Plans the step from `base` (with these roots) to `target`.
///
/// # Errors
/// [`BackupError::Stream`] if the records do not make sense together.
pub fn plan(
    base: &impl Base,
    base_roots: &[(PathBytes, ObjectId)],
    target: &Target,
) -> Result<Plan, BackupError> {
    let mut planner = Planner { base, target, plan: Plan::default() };
    planner.objects()?;
    planner.entries()?;
    planner.roots(base_roots)?;
    planner.forgotten()?;
    planner.single_places()?;
    planner.finish()
}

struct Planner<'a, B> {
    base: &'a B,
    target: &'a Target,
    plan: Plan,
}

impl<B: Base> Planner<'_, B> {
    /// The object in the plan, loaded if it was not yet. `None` if it never was or is gone.
    fn touch(&mut self, object: ObjectId) -> Result<Option<&mut Touched>, BackupError> {
        if !self.plan.objects.contains_key(&object) {
            let Some(node) = self.base.node(object)? else { return Ok(None) };
            let touched = Touched {
                before: Some(node.clone()),
                after: Some(node),
                change: ObjectChange::default(),
                loose: false,
                attributes: false,
            };
            self.plan.objects.insert(object, touched);
        }
        Ok(self.plan.objects.get_mut(&object))
    }

    fn lives(&mut self, object: ObjectId) -> Result<bool, BackupError> {
        Ok(self.touch(object)?.is_some_and(|t| t.after.is_some()))
    }

    fn objects(&mut self) -> Result<(), BackupError> {
        for (object, change) in &self.target.objects {
            let before = self.base.node(*object)?;
            if change.forgotten {
                // Came and went within the step: nothing to do.
                if before.is_some() {
                    let touched = Touched {
                        before,
                        after: None,
                        change: change.clone(),
                        loose: false,
                        attributes: false,
                    };
                    self.plan.objects.insert(*object, touched);
                }
                continue;
            }
            let after = match (&change.created, &before) {
                (Some(_), Some(_)) => {
                    return Err(BackupError::Stream(format!("object {object} is made a second time")));
                }
                (Some(created), None) => Node {
                    identity: Identity::default(),
                    kind: created.kind,
                    device: created.device,
                    meta: Meta::default(),
                    size: 0,
                    xattrs: Vec::new(),
                    target: created.target.clone(),
                    places: Vec::new(),
                    ino: 0,
                },
                (None, Some(node)) => node.clone(),
                // Something about an object that was forgotten in an earlier step: without effect.
                (None, None) => continue,
            };
            let after = changed(after, change);
            if !change.content.is_empty() && after.kind != FileKind::Regular && change.created.is_none() {
                return Err(BackupError::Stream(format!("bytes for object {object}, which has none")));
            }
            let touched = Touched {
                loose: before.is_none(),
                attributes: before.is_none()
                    || change.meta.is_some()
                    || !change.xattrs.is_empty()
                    || !change.content.is_empty(),
                before,
                after: Some(after),
                change: change.clone(),
            };
            self.plan.objects.insert(*object, touched);
        }
        Ok(())
    }

    fn entries(&mut self) -> Result<(), BackupError> {
        for ((directory, name), wanted) in &self.target.entries {
            let place = Place::Entry(*directory, name.clone());
            let had = self.base.entry(*directory, name)?;
            let mut wanted = *wanted;
            if let Some(object) = wanted
                && !self.lives(object)?
            {
                if !self.was(object)? {
                    return Err(BackupError::Stream(format!(
                        "entry {name:?} of {directory} is object {object}, which does not exist"
                    )));
                }
                wanted = None;
            }
            if wanted.is_some() && !self.lives(*directory)? {
                if !self.was(*directory)? {
                    return Err(BackupError::Stream(format!(
                        "entry {name:?} is in directory {directory}, which does not exist"
                    )));
                }
                wanted = None;
            }
            if had == wanted {
                continue;
            }
            if let Some(object) = had {
                self.plan.detach.insert(place.clone(), object);
            }
            if let Some(object) = wanted {
                self.plan.attach.insert(place, object);
            }
        }
        Ok(())
    }

    /// Whether the object existed before or within the step.
    fn was(&self, object: ObjectId) -> Result<bool, BackupError> {
        Ok(self.target.objects.get(&object).is_some_and(|c| c.forgotten) || self.base.node(object)?.is_some())
    }

    fn roots(&mut self, base_roots: &[(PathBytes, ObjectId)]) -> Result<(), BackupError> {
        let Some(wanted) = &self.target.roots else { return Ok(()) };
        for (path, object) in base_roots {
            if !wanted.contains(&(path.clone(), *object)) {
                self.plan.detach.insert(Place::Root(path.clone()), *object);
            }
        }
        for (path, object) in wanted {
            if !self.lives(*object)? {
                return Err(BackupError::Stream(format!(
                    "root {path:?} is object {object}, which does not exist"
                )));
            }
            if !base_roots.contains(&(path.clone(), *object)) {
                self.plan.attach.insert(Place::Root(path.clone()), *object);
            }
        }
        Ok(())
    }

    /// What is forgotten loses its places, and a directory all its entries.
    fn forgotten(&mut self) -> Result<(), BackupError> {
        let gone: Vec<(ObjectId, Node)> = self
            .plan
            .objects
            .iter()
            .filter(|(_, t)| t.after.is_none())
            .filter_map(|(object, t)| Some((*object, t.before.clone()?)))
            .collect();
        for (object, node) in gone {
            for place in &node.places {
                self.plan.detach.entry(place.clone()).or_insert(object);
            }
            if node.kind == FileKind::Directory {
                for (name, child) in self.base.entries(object)? {
                    self.plan.detach.entry(Place::Entry(object, name)).or_insert(child);
                }
            }
        }
        Ok(())
    }

    /// A directory that was given a second place keeps only the newer one.
    fn single_places(&mut self) -> Result<(), BackupError> {
        for (object, attached) in by_object(&self.plan.attach) {
            let Some(touched) = self.touch(object)? else { continue };
            let Some(node) = &touched.after else { continue };
            if node.kind != FileKind::Directory {
                continue;
            }
            let before = node.places.clone();
            let last = self.target.last_place.get(&object).map(|(d, n)| Place::Entry(*d, n.clone()));
            if attached.iter().any(|place| matches!(place, Place::Root(_))) {
                continue;
            }
            for place in attached.iter().filter(|place| Some(*place) != last.as_ref()) {
                self.plan.attach.remove(place);
            }
            for place in before {
                self.plan.detach.entry(place).or_insert(object);
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Plan, BackupError> {
        for (object, places) in by_object(&self.plan.detach) {
            if let Some(touched) = self.touch(object)? {
                touched.loose = true;
                if let Some(after) = &mut touched.after {
                    after.places.retain(|place| !places.contains(place));
                }
            }
            for place in &places {
                self.entries_change(place)?;
            }
        }
        let attach: Vec<_> = self.plan.attach.iter().map(|(p, o)| (p.clone(), *o)).collect();
        for (place, object) in attach {
            if let Some(Touched { before, after: Some(after), loose, .. }) = self.touch(object)? {
                after.places.push(place.clone());
                // It stands aside, and is found there until it has its place.
                *loose |= before.as_ref().is_some_and(|before| before.places.is_empty());
            }
            self.entries_change(&place)?;
        }
        Ok(self.plan)
    }

    /// A directory whose entries change gets its times set again.
    fn entries_change(&mut self, place: &Place) -> Result<(), BackupError> {
        if let Place::Entry(directory, name) = place
            && let Some(touched) = self.touch(*directory)?
        {
            if let Some(after) = &touched.after
                && after.kind != FileKind::Directory
            {
                return Err(BackupError::Stream(format!(
                    "entry {name:?} in {directory}, which is no directory"
                )));
            }
            touched.attributes = true;
        }
        Ok(())
    }
}

/// The places of each object.
fn by_object(places: &BTreeMap<Place, ObjectId>) -> BTreeMap<ObjectId, BTreeSet<Place>> {
    let mut all: BTreeMap<ObjectId, BTreeSet<Place>> = BTreeMap::new();
    for (place, object) in places {
        all.entry(*object).or_default().insert(place.clone());
    }
    all
}

/// The object after a change, its places apart.
#[must_use]
pub fn changed(mut node: Node, change: &ObjectChange) -> Node {
    if let Some(identity) = change.identity {
        node.identity = identity;
    }
    if let Some(meta) = change.meta {
        node.meta = meta;
    }
    if node.kind == FileKind::Regular {
        node.size = change.content.size(node.size);
    }
    if !change.xattrs.is_empty() {
        let mut xattrs: BTreeMap<String, Bytes> = node.xattrs.drain(..).collect();
        for (name, value) in &change.xattrs {
            match value {
                Some(value) => xattrs.insert(name.clone(), value.clone()),
                None => xattrs.remove(name),
            };
        }
        node.xattrs = xattrs.into_iter().collect();
    }
    node
}
