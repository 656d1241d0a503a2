//! One file of which is noted where calls changed its content, for whoever brings it back meanwhile.

use std::ops::Range;

use bfs_common::record::ObjectId;

use super::Engine;
use super::interpret::Thing;

/// Changes that are told apart; with more, all of the file counts as changed.
const CHANGES_MAX: usize = 1024;

/// The file, and where it was changed since.
#[derive(Debug)]
pub(super) struct Watched {
    object: ObjectId,
    changes: Vec<Range<u64>>,
}

impl Watched {
    pub(super) fn note(&mut self, thing: &Thing) {
        let Thing::Data(object, range) = thing else { return };
        if *object != self.object {
            return;
        }
        let is_full = self.changes.len() >= CHANGES_MAX;
        match self.changes.last_mut() {
            // Who writes on and on is one change.
            Some(last) if last.end == range.start => last.end = range.end,
            _ if is_full => {
                self.changes.clear();
                self.changes.push(0..u64::MAX);
            }
            _ => self.changes.push(range.clone()),
        }
    }
}

impl Engine {
    /// From now on it is noted where the content of this file is changed. (A call that failed left what it was; whatever
    /// it may have changed is read again anyway.)
    pub fn watch(&mut self, object: ObjectId) {
        self.watched = Some(Watched { object, changes: Vec::new() });
    }

    /// No longer.
    pub fn watch_nothing(&mut self) {
        self.watched = None;
    }

    /// Whether these bytes of it were changed since, or anything else of it.
    #[must_use]
    pub fn has_changed(&self, range: &Range<u64>) -> bool {
        let changes = self.watched.iter().flat_map(|watched| &watched.changes);
        changes.into_iter().any(|change| change.start < range.end && range.start < change.end)
    }

    /// Whether any of it was.
    #[must_use]
    pub fn has_changed_at_all(&self) -> bool {
        self.has_changed(&(0..u64::MAX))
    }
}
