//! The stream as the primary made it, and what is missing in it of a state.

use std::collections::{BTreeMap, BTreeSet};

use bfs_common::codec;
use bfs_common::record::*;
use bytes::BytesMut;

use crate::backup::model::{Model, ROOT, TOP};
use crate::primary::ship::Batch;

/// A record with its payload.
pub type Line = (Record, Vec<u8>);

/// All records since the beginning of the group, and the states at its markers.
#[derive(Clone, Default)]
pub struct Stream {
    lines: Vec<(Line, ChainHash)>,
    /// By the number of the marker: the checkpoint, and what the primary was.
    markers: BTreeMap<u64, (CheckpointId, Model)>,
}

impl Stream {
    /// The last record.
    pub fn end(&self) -> Sequence {
        Sequence(self.lines.len() as u64)
    }

    /// The chain hash after a record; `None` when it was never made.
    pub fn chain(&self, at: Sequence) -> Option<ChainHash> {
        match at.0.checked_sub(1) {
            None => Some(ChainHash::START),
            Some(index) => self.lines.get(index as usize).map(|line| line.1),
        }
    }

    /// What is behind this record was lost with its agent, and is told anew.
    pub fn cut(&mut self, to: Sequence) {
        self.lines.truncate(to.0 as usize);
        self.markers.split_off(&(to.0 + 1));
    }

    /// The last checkpoint.
    pub fn checkpoint(&self) -> CheckpointId {
        self.markers.values().next_back().map_or(CheckpointId(0), |(checkpoint, _)| *checkpoint)
    }

    /// The state at a checkpoint.
    pub fn state(&self, of: CheckpointId) -> Option<&Model> {
        self.markers.values().find(|(checkpoint, _)| *checkpoint == of).map(|(_, model)| model)
    }

    /// The label of a checkpoint.
    pub fn label(&self, of: CheckpointId) -> Option<&CheckpointLabel> {
        let (at, _) = self.markers.iter().find(|(_, (checkpoint, _))| *checkpoint == of)?;
        match &self.lines.get(*at as usize - 1)?.0.0 {
            Record::Checkpoint { label, .. } => Some(label),
            _ => None,
        }
    }

    /// The roots at its end.
    pub fn roots(&self) -> Vec<(PathBytes, ObjectId)> {
        let all = self.lines.iter().rev().find_map(|((record, _), _)| match record {
            Record::Roots { roots } => Some(roots.clone()),
            _ => None,
        });
        all.unwrap_or_default()
    }

    /// The last marker up to a record.
    pub fn confirmed(&self, durable: Sequence) -> CheckpointId {
        self.markers
            .range(..=durable.0)
            .next_back()
            .map_or(CheckpointId(0), |(_, (checkpoint, _))| *checkpoint)
    }

    /// Adds records; a marker is of this state.
    pub fn batch(&mut self, lines: Vec<Line>, ring_position: Option<u64>, model: &Model) -> Batch {
        let first = self.end().next();
        let mut chain_after = self.chain(self.end()).expect("the last one");
        let (mut bytes, count) = (BytesMut::new(), lines.len() as u32);
        for line in lines {
            let (start, sequence) = (bytes.len(), self.end().next());
            codec::encode(&mut bytes, sequence, &line.0, &line.1);
            chain_after = codec::chain(chain_after, &bytes[start..]);
            if let Record::Checkpoint { checkpoint, .. } = line.0 {
                self.markers.insert(sequence.0, (checkpoint, model.clone()));
            }
            self.lines.push((line, chain_after));
        }
        Batch { first, count, bytes: bytes.freeze(), ring_position, chain_after }
    }

    /// What has to be said so that the stream tells this state, of these objects or of all.
    pub fn difference(&self, model: &Model, only: Option<&BTreeSet<ObjectId>>) -> Vec<Line> {
        let wanted = |object: &ObjectId| only.is_none_or(|only| only.contains(object));
        let (known, entries, rooted) = self.folded();
        let mut lines = Vec::new();
        let mut say = |record| lines.push((record, Vec::new()));
        for (object, node) in
            model.nodes.iter().filter(|(object, _)| !known.contains(object) && wanted(object))
        {
            let kind = if node.directory { FileKind::Directory } else { FileKind::Regular };
            let (identity, meta) = (Identity::default(), model.meta(node.mtime));
            say(Record::Object { object: *object, identity, kind, device: 0, meta });
        }
        if !rooted {
            say(Record::Roots { roots: vec![(PathBytes::new(ROOT.as_ref()), TOP)] });
        }
        for ((directory, name), object) in entries.iter().filter(|((directory, _), _)| wanted(directory)) {
            let now = model.nodes.get(directory).and_then(|node| node.entries.get(name));
            if now != Some(object) {
                say(Record::EntryDelete { directory: *directory, name: name.clone() });
            }
        }
        for (directory, node) in model.nodes.iter().filter(|(object, _)| wanted(object)) {
            for (name, object) in &node.entries {
                if entries.get(&(*directory, name.clone())) != Some(object) {
                    say(Record::EntrySet { directory: *directory, name: name.clone(), object: *object });
                }
            }
        }
        for object in known.iter().filter(|object| !model.nodes.contains_key(object) && wanted(object)) {
            say(Record::Forget { object: *object });
        }
        for (object, node) in model.nodes.iter().filter(|(object, _)| wanted(object)) {
            let object = *object;
            if !node.directory {
                lines.push((Record::Truncate { object, size: 0 }, Vec::new()));
                lines.push((Record::Write { object, offset: 0 }, node.data.clone()));
            }
            lines.push((Record::Meta { object, meta: model.meta(node.mtime) }, Vec::new()));
        }
        lines
    }

    /// The objects that there are at its end.
    pub fn known(&self) -> BTreeSet<ObjectId> {
        self.folded().0
    }

    /// Objects, entries, and whether there is a root, at the end.
    #[allow(clippy::type_complexity, reason = "taken apart at once")]
    fn folded(&self) -> (BTreeSet<ObjectId>, BTreeMap<(ObjectId, Name), ObjectId>, bool) {
        let (mut known, mut entries, mut rooted) = (BTreeSet::new(), BTreeMap::new(), false);
        for ((record, _), _) in &self.lines {
            match record {
                Record::Object { object, .. } => {
                    known.insert(*object);
                }
                Record::Forget { object } => {
                    known.remove(object);
                }
                Record::EntrySet { directory, name, object } => {
                    entries.insert((*directory, name.clone()), *object);
                }
                Record::EntryDelete { directory, name } => {
                    entries.remove(&(*directory, name.clone()));
                }
                Record::Roots { .. } => rooted = true,
                _ => {}
            }
        }
        (known, entries, rooted)
    }
}

/// The objects that a record is about.
pub fn touched(record: &Record) -> Vec<ObjectId> {
    match record {
        Record::Object { object, .. }
        | Record::Forget { object }
        | Record::Write { object, .. }
        | Record::Zero { object, .. }
        | Record::Truncate { object, .. }
        | Record::Meta { object, .. } => vec![*object],
        Record::EntrySet { directory, object, .. } => vec![*directory, *object],
        Record::EntryDelete { directory, .. } => vec![*directory],
        Record::Roots { .. } => vec![TOP],
        other => panic!("not of the model: {other:?}"),
    }
}
