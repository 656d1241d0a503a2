//! What the records of the stream say: the simplest possible replayer.

use std::collections::{BTreeMap, BTreeSet};

use bfs_common::codec::take;
use bfs_common::record::{CheckpointId, GapScope, Identity, Meta, Name, ObjectId, Record, Sequence};
use bfs_common::wire::CatalogObject;

use super::fs::{Fs, Inode, ROOT};
use crate::backup::gate::closes;
use crate::primary::engine::outbox::Batch;

/// The records of a batch.
pub(super) fn records(batch: &Batch) -> Vec<Record> {
    let mut bytes = batch.bytes.clone();
    let next =
        || take(&mut bytes).expect("sound records").map(|encoded| encoded.decode().expect("records").0);
    std::iter::from_fn(next).collect()
}

/// The state that records say.
#[derive(Clone, Default)]
pub(super) struct Backup {
    pub(super) objects: BTreeMap<ObjectId, Inode>,
    pub(super) entries: BTreeMap<(ObjectId, Vec<u8>), ObjectId>,
    pub(super) root: ObjectId,
    pub(super) next: u64,
    pub(super) gaps: Vec<GapScope>,
    identities: BTreeMap<ObjectId, Identity>,
    /// Bytes of files that came.
    pub(super) written: usize,
}

impl Backup {
    pub(super) fn apply(&mut self, batch: &Batch) -> Option<CheckpointId> {
        self.apply_until(batch, Sequence(u64::MAX))
    }

    /// The same of the records up to this one.
    pub(super) fn apply_until(&mut self, batch: &Batch, last: Sequence) -> Option<CheckpointId> {
        let mut bytes = batch.bytes.clone();
        let mut checkpoint = None;
        while let Some(encoded) = take(&mut bytes).expect("sound records") {
            if encoded.sequence > last {
                break;
            }
            assert_eq!(encoded.sequence.0, self.next + 1, "no gap in the stream");
            self.next += 1;
            let (record, payload) = encoded.decode().expect("records");
            checkpoint = None;
            match record {
                Record::Roots { roots } => self.root = roots[0].1,
                Record::Object { object, kind, meta, identity, .. } => {
                    self.identities.insert(object, identity);
                    let mut inode = Fs::inode(kind, meta.mtime_sec.cast_unsigned());
                    inode.mode = meta.permissions;
                    inode.target = payload.to_vec();
                    assert!(self.objects.insert(object, inode).is_none(), "numbers are never used again");
                }
                Record::Rebind { object, identity } => {
                    self.identities.insert(object, identity).expect("it was there");
                }
                Record::Forget { object } => {
                    self.objects.remove(&object).expect("it was there");
                    assert!(!self.entries.values().any(|o| *o == object), "a forgotten object has no name");
                }
                Record::EntrySet { directory, name, object } => {
                    assert!(self.objects.contains_key(&object) && object != directory);
                    self.entries.insert((directory, name.as_bytes().to_vec()), object);
                }
                Record::EntryDelete { directory, name } => {
                    self.entries.remove(&(directory, name.as_bytes().to_vec())).expect("it was there");
                }
                Record::Write { object, offset } => {
                    let data = &mut self.objects.get_mut(&object).expect("known").data;
                    let end = offset as usize + payload.len();
                    self.written += payload.len();
                    if data.len() < end {
                        data.resize(end, 0);
                    }
                    data[offset as usize..end].copy_from_slice(&payload);
                }
                Record::Zero { object, offset, length } => {
                    let data = &mut self.objects.get_mut(&object).expect("known").data;
                    data[offset as usize..(offset + length) as usize].fill(0);
                }
                Record::Truncate { object, size } => {
                    self.objects.get_mut(&object).expect("known").data.resize(size as usize, 0);
                }
                Record::Meta { object, meta } => {
                    let inode = self.objects.get_mut(&object).expect("known");
                    inode.mode = meta.permissions;
                    inode.mtime = meta.mtime_sec.cast_unsigned();
                }
                Record::Gap { scope } => self.gaps.push(scope),
                Record::Repaired { scope } => self.gaps.retain(|open| !closes(&scope, open)),
                Record::Checkpoint { checkpoint: number, .. } => {
                    assert_eq!(self.gaps, [], "no marker over an open gap");
                    self.check_names();
                    checkpoint = Some(number);
                }
                _ => {}
            }
        }
        checkpoint
    }

    /// At a checkpoint nothing is there that has no name.
    fn check_names(&self) {
        let named: BTreeSet<_> = self.entries.values().chain([&self.root]).collect();
        let nameless: Vec<_> = self.objects.keys().filter(|object| !named.contains(object)).collect();
        assert_eq!(nameless, Vec::<&ObjectId>::new(), "objects without a name");
    }

    /// The highest number of an object that there ever was.
    pub(super) fn highest(&self) -> ObjectId {
        self.identities.last_key_value().map_or(ObjectId(0), |(object, _)| *object)
    }

    /// Its state, as the one who goes on for an agent without its ring gets it.
    pub(super) fn catalog(&self) -> Vec<CatalogObject> {
        let line = |(object, inode): (&ObjectId, &Inode)| CatalogObject {
            object: *object,
            identity: self.identities[object],
            kind: inode.kind,
            device: 0,
            meta: Meta { permissions: inode.mode, mtime_sec: inode.mtime.cast_signed(), ..Meta::default() },
            size: inode.data.len() as u64,
            xattrs: Vec::new(),
            target: inode.target.clone().into(),
            entries: self
                .entries
                .range((*object, Vec::new())..(object.next(), Vec::new()))
                .map(|((_, name), child)| (Name::new(name).expect("a name"), *child))
                .collect(),
        };
        self.objects.iter().map(line).collect()
    }

    pub(super) fn dump(&self) -> Vec<String> {
        let mut fs = Fs::default();
        for (object, inode) in &self.objects {
            let number = if *object == self.root { ROOT } else { object.0 + 1000 };
            fs.inodes.insert(number, inode.clone());
        }
        for ((directory, name), object) in &self.entries {
            let number = if *directory == self.root { ROOT } else { directory.0 + 1000 };
            if let Some(d) = fs.inodes.get_mut(&number) {
                d.entries.insert(name.clone(), object.0 + 1000);
            }
        }
        fs.dump(&|_, _| true)
    }
}
