//! Files with several names, of which some may lie outside of what is taken: who changes something by a name that the
//! model does not have may have changed any of them.

use bfs_common::record::{FileKind, ObjectId, Sequence};
use foldhash::HashSet;

use super::Engine;
use super::host::{Host, HostError};
use super::interpret::Thing;
use super::model::Model;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Multiple {
    all: HashSet<ObjectId>,
    /// Which of them a successor cannot know: neither the catalogue nor the host has them.
    fresh: Vec<ObjectId>,
    /// What is none of them any more, but the host may still have.
    gone: HashSet<ObjectId>,
}

impl Multiple {
    /// Those that a model has by several names.
    pub(super) fn of(model: &Model) -> Self {
        let linked = |object: &ObjectId| model.get(*object).is_some_and(|known| known.links.len() > 1);
        Self { all: model.ids().filter(linked).collect(), ..Self::default() }
    }

    pub(super) fn insert(&mut self, object: ObjectId) {
        if self.all.insert(object) {
            self.fresh.push(object);
            self.gone.remove(&object);
        }
    }

    pub(super) fn remove(&mut self, object: ObjectId) {
        if self.all.remove(&object) {
            self.gone.insert(object);
        }
    }

    pub(super) fn contains(&self, object: ObjectId) -> bool {
        self.all.contains(&object)
    }
}

impl Engine {
    /// What the agent before knew of; the host has it.
    pub fn adopt_multiple(&mut self, known: &[ObjectId]) {
        let (known, gone): (Vec<ObjectId>, Vec<ObjectId>) =
            known.iter().partition(|object| self.model.get(**object).is_some());
        self.multiple.all.extend(known);
        self.multiple.gone.extend(gone);
    }

    /// Behind the marker with this number: a successor that finds it does not have these objects.
    pub(super) fn forget_multiple(&mut self, marker: Sequence, host: &mut dyn Host) {
        if !self.multiple.gone.is_empty() {
            host.forget_multiple(self.multiple.gone.drain().collect(), marker);
        }
    }

    /// Ships the closed batches, which lets the ring be released: what a successor would have known by it is kept before.
    pub(super) fn hand_over(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        if !self.multiple.fresh.is_empty() {
            host.keep_multiple(&std::mem::take(&mut self.multiple.fresh));
        }
        host.ship(self.out.take())
    }

    pub(super) fn note_links(&mut self, object: ObjectId, links: u32) {
        if links > 1 && self.model.get(object).is_some_and(|o| o.kind != FileKind::Directory) {
            self.multiple.insert(object);
        }
    }

    /// The other call may have changed another object by this name than was believed. What the name leads to is read
    /// when the entry is settled; but the one that was believed can live on under another name.
    pub(super) fn suspect_named(&mut self, entry: &Thing, end_ns: u64) {
        if let Thing::Entry(directory, name) = entry
            && let Some(object) = self.model.entry(*directory, name)
            && self.multiple.contains(object)
        {
            self.suspect_object(object, end_ns);
        }
    }

    /// A call changed an object by a name of which the model does not know for sure what it
    /// names. What the name names is read when the entry is settled; but should the name be gone
    /// by then, the object may live on under another one.
    pub(super) fn suspect_multiple(&mut self, end_ns: u64) {
        let multiple: Vec<_> = self.multiple.all.iter().copied().collect();
        for object in multiple {
            self.suspect_object(object, end_ns);
        }
    }
}
