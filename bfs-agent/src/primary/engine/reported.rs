//! Updates that a program reports by itself, because no event may tell of them: they are read before the next
//! checkpoint, like whatever else is suspect.

use std::ops::Range;

use bfs_common::record::{FileKind, Name, ObjectId};

use super::Engine;

impl Engine {
    /// An object was changed: these bytes of a file of this size, or anything about it. (What else of a file got
    /// another size is read, too: it was cut or grew, and the report may have told only of a part.)
    pub fn suspect_update(&mut self, object: ObjectId, bytes: Option<Range<u64>>, size: u64, now: u64) {
        let Some(known) = self.model.get(object) else { return };
        let (kind, known_size) = (known.kind, known.size);
        self.stats.ops += 1;
        match bytes {
            Some(bytes) if kind == FileKind::Regular && size >= known_size => {
                let bytes = bytes.start..bytes.end.min(size);
                self.stats.written_bytes += bytes.end.saturating_sub(bytes.start);
                self.suspect_ranges(object, &[(bytes.start, bytes.end), (known_size, size)], now);
            }
            _ => self.suspect_object(object, now),
        }
    }

    /// An entry of a directory was changed, and the directory with it. `deep`: whatever stands there is taken
    /// whole.
    pub fn suspect_name(&mut self, directory: ObjectId, name: &Name, deep: bool, now: u64) {
        self.stats.ops += 1;
        self.dirty.entry(directory, name, deep);
        self.dirty.meta(directory, now);
    }
}
