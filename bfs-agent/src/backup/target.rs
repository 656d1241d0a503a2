//! From records to a target state: what a step of the applier has to reach.
//!
//! Pure. [`Target::fold`] takes the records of a step in order; afterwards only their net effect
//! is left: of bytes written twice the last, of files that came and went nothing. Data stay in
//! the log; a target holds references ([`LogRef`]), so its size follows the number of changes and
//! not the number of bytes.

use std::collections::{BTreeMap, HashMap};

use bfs_common::record::{FileKind, Identity, Meta, Name, ObjectId, PathBytes, PolicyLine, Record};
use bytes::Bytes;

use super::gate::RECEIVED;
use crate::log::LogRef;

/// Where the bytes of a range come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From the log.
    Log(LogRef),
    /// They are zeros.
    Zero,
}

/// The new bytes of a file, as ranges that do not overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents(BTreeMap<u64, (u64, Source)>);

impl Extents {
    /// The range (offset and end) comes from here now, whatever it was before.
    pub fn set(&mut self, start: u64, end: u64, source: Source) {
        if start >= end {
            return;
        }
        self.clear(start, end);
        self.0.insert(start, (end, source));
    }

    /// Nothing is said about the range any more.
    fn clear(&mut self, start: u64, end: u64) {
        if let Some((&s, &(e, source))) = self.0.range(..start).next_back()
            && e > start
        {
            self.0.insert(s, (start, source));
            if e > end {
                self.0.insert(end, (e, shifted(source, end - s)));
            }
        }
        while let Some((&s, &(e, source))) = self.0.range(start..end).next() {
            self.0.remove(&s);
            if e > end {
                self.0.insert(end, (e, shifted(source, end - s)));
            }
        }
    }

    /// The ranges in order: offset, end, source.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, Source)> + '_ {
        self.0.iter().map(|(s, (e, source))| (*s, *e, *source))
    }

    /// The ranges that have some of these bytes, in order: offset, end, source.
    pub fn over(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, Source)> + '_ {
        let before = self.0.range(..start).next_back().filter(|(_, (e, _))| *e > start);
        before.into_iter().chain(self.0.range(start..end)).map(|(s, (e, source))| (*s, *e, *source))
    }

    /// Whether nothing is said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

pub(super) const fn shifted(source: Source, by: u64) -> Source {
    match source {
        Source::Log(at) => Source::Log(LogRef { segment: at.segment, offset: at.offset + by }),
        Source::Zero => Source::Zero,
    }
}

/// The net effect on the content of a regular file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Of the old content only the bytes before this are left.
    pub keep: u64,
    /// The size if it was set; else at least `at_least`.
    exact: Option<u64>,
    at_least: u64,
    /// New bytes. Zeros may lie beyond the size, then they mean nothing.
    pub extents: Extents,
}

impl Default for Content {
    fn default() -> Self {
        Self { keep: u64::MAX, exact: None, at_least: 0, extents: Extents::default() }
    }
}

impl Content {
    /// The size afterwards of a file that had this size.
    #[must_use]
    pub fn size(&self, before: u64) -> u64 {
        self.exact.unwrap_or_else(|| before.max(self.at_least))
    }

    /// Whether nothing happens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.exact.is_none() && self.at_least == 0 && self.extents.is_empty()
    }

    /// What is lost of the old content of a file that had this size: ranges (offset and end) in
    /// order, which do not overlap.
    #[must_use]
    pub fn lost(&self, before: u64) -> Vec<(u64, u64)> {
        let cut = (self.keep < before).then_some((self.keep, before));
        let written = self.extents.iter().map(|(start, end, _)| (start, end.min(before)));
        let mut ranges: Vec<(u64, u64)> = written.chain(cut).filter(|(start, end)| start < end).collect();
        ranges.sort_unstable();
        let mut lost: Vec<(u64, u64)> = Vec::new();
        for (start, end) in ranges {
            match lost.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => lost.push((start, end)),
            }
        }
        lost
    }

    fn write(&mut self, offset: u64, end: u64, source: Source) {
        self.extents.set(offset, end, source);
        match &mut self.exact {
            Some(size) => *size = end.max(*size),
            None => self.at_least = self.at_least.max(end),
        }
    }

    fn truncate(&mut self, size: u64) {
        self.keep = self.keep.min(size);
        self.extents.clear(size, u64::MAX);
        self.exact = Some(size);
    }
}

/// How an object that is new in this step begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// Type.
    pub kind: FileKind,
    /// Device number, user-space form.
    pub device: u64,
    /// Target of a symlink, else empty.
    pub target: Bytes,
}

/// The net effect on one object, its entries apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObjectChange {
    /// It is new.
    pub created: Option<Created>,
    /// Which inode of the primary it is now.
    pub identity: Option<Identity>,
    /// Its attributes.
    pub meta: Option<Meta>,
    /// Its extended attributes that change; `None` removes.
    pub xattrs: BTreeMap<String, Option<Bytes>>,
    /// Its content.
    pub content: Content,
    /// It is gone for good.
    pub forgotten: bool,
}

/// Why records cannot be applied.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TargetError {
    /// A range that no file can have.
    #[error("object {object}: a range that ends beyond 2^63")]
    Range {
        /// The object.
        object: ObjectId,
    },
}

/// The net effect of the records of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// What happens to objects.
    pub objects: BTreeMap<ObjectId, ObjectChange>,
    /// What happens to entries; `None` deletes.
    pub entries: BTreeMap<(ObjectId, Name), Option<ObjectId>>,
    /// The entry set last for an object: a directory has only this one.
    pub last_place: HashMap<ObjectId, (ObjectId, Name)>,
    /// The roots, if they changed.
    pub roots: Option<Vec<(PathBytes, ObjectId)>>,
    /// The policies, if they changed.
    pub policies: Option<Vec<PolicyLine>>,
}

impl Target {
    /// Takes the next record. `payload` is what came with it, `at` where it stands in the log.
    ///
    /// # Errors
    /// [`TargetError`] for a record that can never be applied.
    pub fn fold(&mut self, record: Record, payload: &Bytes, at: LogRef) -> Result<(), TargetError> {
        match record {
            Record::Object { object, identity, kind, device, meta } => {
                let target = Bytes::copy_from_slice(payload);
                let content = Content { keep: 0, exact: Some(0), ..Content::default() };
                let change = ObjectChange {
                    created: Some(Created { kind, device, target }),
                    identity: Some(identity),
                    meta: Some(meta),
                    content,
                    ..ObjectChange::default()
                };
                self.objects.insert(object, change);
            }
            Record::Rebind { object, identity } => self.change(object).identity = Some(identity),
            Record::Forget { object } => {
                let new = self.change(object).created.is_some();
                // What came and went in one step leaves no trace but that it is gone.
                let created = if new { self.objects[&object].created.clone() } else { None };
                self.objects
                    .insert(object, ObjectChange { forgotten: true, created, ..ObjectChange::default() });
            }
            Record::EntrySet { directory, name, object } => {
                self.last_place.insert(object, (directory, name.clone()));
                self.entries.insert((directory, name), Some(object));
            }
            Record::EntryDelete { directory, name } => {
                self.entries.insert((directory, name), None);
            }
            Record::Write { object, offset } => {
                let end = end_of(object, offset, payload.len() as u64)?;
                self.change(object).content.write(offset, end, Source::Log(at));
            }
            Record::Zero { object, offset, length } => {
                let end = end_of(object, offset, length)?;
                self.change(object).content.extents.set(offset, end, Source::Zero);
            }
            Record::Truncate { object, size } => {
                end_of(object, size, 0)?;
                self.change(object).content.truncate(size);
            }
            Record::Meta { object, meta } => self.change(object).meta = Some(meta),
            Record::XattrSet { object, name } => {
                self.change(object).xattrs.insert(name, Some(Bytes::copy_from_slice(payload)));
            }
            Record::XattrRemove { object, name } => {
                self.change(object).xattrs.insert(name, None);
            }
            Record::Roots { roots } => self.roots = Some(roots),
            Record::Policies { lines } => self.policies = Some(lines),
            // No marker covers what stands before it.
            Record::EpochBegin { boot_id: RECEIVED, .. } => *self = Self::default(),
            // They change no file: the gate or a later piece of work looks at them.
            Record::EpochBegin { .. }
            | Record::Closed { .. }
            | Record::Gap { .. }
            | Record::Repaired { .. }
            | Record::ProcessImage { .. }
            | Record::RollbackIntent { .. }
            | Record::RollbackDone { .. }
            | Record::History { .. }
            | Record::Checkpoint { .. } => {}
        }
        Ok(())
    }

    fn change(&mut self, object: ObjectId) -> &mut ObjectChange {
        self.objects.entry(object).or_default()
    }
}

fn end_of(object: ObjectId, offset: u64, length: u64) -> Result<u64, TargetError> {
    offset.checked_add(length).filter(|end| *end <= i64::MAX as u64).ok_or(TargetError::Range { object })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: ObjectId = ObjectId(7);

    fn fold(target: &mut Target, record: Record, payload: &[u8], offset: u64) {
        let at = LogRef { segment: 1, offset };
        target.fold(record, &Bytes::copy_from_slice(payload), at).unwrap();
    }

    #[test]
    fn what_came_and_went_leaves_only_that_it_is_gone() {
        let mut target = Target::default();
        let new = Record::Object {
            object: FILE,
            identity: Identity::default(),
            kind: FileKind::Regular,
            device: 0,
            meta: Meta::default(),
        };
        fold(&mut target, new, b"", 0);
        fold(&mut target, Record::Write { object: FILE, offset: 0 }, b"bytes", 9);
        fold(&mut target, Record::Forget { object: FILE }, b"", 20);
        let change = &target.objects[&FILE];
        assert!(change.forgotten && change.content.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u64, Vec<u8>),
        Zero(u64, u64),
        Truncate(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..40u64, prop::collection::vec(1..255u8, 1..12)).prop_map(|(o, d)| Op::Write(o, d)),
            (0..40u64, 0..20u64).prop_map(|(o, l)| Op::Zero(o, l)),
            (0..40u64).prop_map(Op::Truncate),
        ]
    }

    proptest! {
        /// The net effect of any operations gives the same bytes as doing them one by one.
        #[test]
        fn the_net_effect_is_the_effect(base in prop::collection::vec(1..255u8, 0..30), ops in prop::collection::vec(op(), 0..20)) {
            let mut model = base.clone();
            let mut log = Vec::new();
            let mut target = Target::default();
            for op in ops {
                match op {
                    Op::Write(offset, data) => {
                        let end = offset as usize + data.len();
                        if model.len() < end { model.resize(end, 0); }
                        model[offset as usize..end].copy_from_slice(&data);
                        let at = log.len() as u64;
                        log.extend_from_slice(&data);
                        fold(&mut target, Record::Write { object: FILE, offset }, &data, at);
                    }
                    Op::Zero(offset, length) => {
                        let end = (offset + length).min(model.len() as u64);
                        for at in offset..end { model[at as usize] = 0; }
                        fold(&mut target, Record::Zero { object: FILE, offset, length }, b"", 0);
                    }
                    Op::Truncate(size) => {
                        model.resize(size as usize, 0);
                        fold(&mut target, Record::Truncate { object: FILE, size }, b"", 0);
                    }
                }
            }
            let content = target.objects.get(&FILE).map(|c| c.content.clone()).unwrap_or_default();
            let mut file = base.clone();
            if content.keep < file.len() as u64 { file.truncate(content.keep as usize); }
            file.resize(content.size(base.len() as u64) as usize, 0);
            for (start, end, source) in content.extents.iter() {
                let end = end.min(file.len() as u64);
                for at in start..end {
                    file[at as usize] = match source {
                        Source::Zero => 0,
                        Source::Log(from) => log[(from.offset + at - start) as usize],
                    };
                }
            }
            // What is said to be lost, put back, gives the old bytes again.
            let mut back = file.clone();
            back.resize(base.len(), 0);
            for (start, end) in content.lost(base.len() as u64) {
                back[start as usize..end as usize].copy_from_slice(&base[start as usize..end as usize]);
            }
            prop_assert_eq!(back, base);
            prop_assert_eq!(file, model);
        }
    }
}
