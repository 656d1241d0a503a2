//! Reading one group's objects, entries and checksums as they are at its applied checkpoint.

use bfs_common::record::{CheckpointId, FileKind, Name, ObjectId};

use super::super::damage::Damage;
use super::super::error::BackupError;
use super::super::sums::{SumRow, Sums};
use super::{Node, rows, sum_row, unpack};

/// Objects that are unpacked at once.
const AT_ONCE: usize = 1024;

/// One group's objects at its applied checkpoint.
#[derive(Debug)]
pub struct View {
    pub(super) objects: redb::ReadOnlyTable<(u32, u64), &'static [u8]>,
    pub(super) entries: redb::ReadOnlyTable<(u32, u64, &'static [u8]), u64>,
    pub(super) kept: redb::ReadOnlyTable<(u32, u64), u64>,
    pub(super) sums: redb::ReadOnlyTable<(u32, u64, u64), &'static [u8]>,
    pub(super) damage: redb::ReadOnlyTable<(u32, u64), &'static [u8]>,
    pub(super) group: u32,
    pub(super) newest: Option<CheckpointId>,
}

/// The checksums of one object in a [`View`].
#[derive(Debug)]
pub struct SumsOf<'a> {
    view: &'a View,
    object: ObjectId,
}

impl Sums for SumsOf<'_> {
    fn row(&self, row: u64) -> Result<Option<SumRow>, BackupError> {
        let found = self.view.sums.get((self.view.group, self.object.0, row))?;
        found.map(|row| sum_row(row.value())).transpose()
    }

    fn next_row(&self, row: u64) -> Result<Option<u64>, BackupError> {
        let found = self.view.sums.range(rows(self.view.group, self.object, row, u64::MAX))?.next();
        Ok(found.transpose()?.map(|(key, _)| key.value().2))
    }
}

/// The state before a step: what planning needs to know.
pub trait Base {
    /// An object.
    ///
    /// # Errors
    /// If it cannot be looked up.
    fn node(&self, object: ObjectId) -> Result<Option<Node>, BackupError>;
    /// An entry.
    ///
    /// # Errors
    /// If it cannot be looked up.
    fn entry(&self, directory: ObjectId, name: &Name) -> Result<Option<ObjectId>, BackupError>;
    /// All entries of a directory, in the order of their names.
    ///
    /// # Errors
    /// If they cannot be looked up.
    fn entries(&self, directory: ObjectId) -> Result<Vec<(Name, ObjectId)>, BackupError>;
}

impl Base for View {
    fn node(&self, object: ObjectId) -> Result<Option<Node>, BackupError> {
        self.objects.get((self.group, object.0))?.map(|row| unpack("object", row.value())).transpose()
    }

    fn entry(&self, directory: ObjectId, name: &Name) -> Result<Option<ObjectId>, BackupError> {
        let found = self.entries.get((self.group, directory.0, name.as_bytes()))?;
        Ok(found.map(|object| ObjectId(object.value())))
    }

    fn entries(&self, directory: ObjectId) -> Result<Vec<(Name, ObjectId)>, BackupError> {
        let mut found = Vec::new();
        let from = (self.group, directory.0, &[][..]);
        let to = (self.group, directory.0 + 1, &[][..]);
        for line in self.entries.range(from..to)? {
            let (key, object) = line?;
            let name = Name::new(key.value().2)
                .ok_or_else(|| BackupError::corrupt("index.redb", "an entry without a valid name"))?;
            found.push((name, ObjectId(object.value())));
        }
        Ok(found)
    }
}

impl View {
    /// The newest generation: it is the applied checkpoint.
    #[must_use]
    pub const fn newest(&self) -> Option<CheckpointId> {
        self.newest
    }

    /// Whether the file of an object that is gone is kept.
    ///
    /// # Errors
    /// If the index fails.
    pub fn is_kept(&self, object: ObjectId) -> Result<bool, BackupError> {
        Ok(self.kept.get((self.group, object.0))?.is_some())
    }

    /// What is known to be damaged of an object's file.
    ///
    /// # Errors
    /// If the index fails.
    pub fn damage(&self, object: ObjectId) -> Result<Damage, BackupError> {
        let found = self.damage.get((self.group, object.0))?;
        found.map_or(Ok(Damage::default()), |row| unpack("damage", row.value()))
    }

    /// Objects of which something is damaged. Those that are gone and only kept are not among them: of these nothing
    /// comes again.
    ///
    /// # Errors
    /// If the index fails.
    pub fn damaged(&self) -> Result<Vec<ObjectId>, BackupError> {
        let mut found = Vec::new();
        for line in self.damage.range((self.group, 0)..=(self.group, u64::MAX))? {
            let object = line?.0.value().1;
            if self.objects.get((self.group, object))?.is_some() {
                found.push(ObjectId(object));
            }
        }
        Ok(found)
    }

    /// The checksums of an object's file.
    #[must_use]
    pub fn sums(&self, object: ObjectId) -> SumsOf<'_> {
        SumsOf { view: self, object }
    }

    /// Objects with checksums.
    ///
    /// # Errors
    /// If the index fails.
    #[cfg(test)]
    pub fn with_sums(&self) -> Result<Vec<ObjectId>, BackupError> {
        let all = self.sums.range((self.group, 0, 0)..(self.group + 1, 0, 0))?;
        all.map(|line| Ok(ObjectId(line?.0.value().1))).collect()
    }

    /// Objects that are gone and whose files are kept, and the last checkpoint that had each.
    ///
    /// # Errors
    /// If the index fails.
    pub fn kept(&self) -> Result<Vec<(ObjectId, CheckpointId)>, BackupError> {
        let mut found = Vec::new();
        for line in self.kept.range((self.group, 0)..=(self.group, u64::MAX))? {
            let (key, last) = line?;
            found.push((ObjectId(key.value().1), CheckpointId(last.value())));
        }
        Ok(found)
    }

    /// Number and type of every object.
    ///
    /// # Errors
    /// If the index fails.
    pub fn each_kind(&self, mut each: impl FnMut(ObjectId, FileKind)) -> Result<(), BackupError> {
        for line in self.objects.range((self.group, 0)..=(self.group, u64::MAX))? {
            let (key, row) = line?;
            each(ObjectId(key.value().1), unpack::<Node>("object", row.value())?.kind);
        }
        Ok(())
    }

    /// All objects in the order of their numbers; false if `each` gave up.
    ///
    /// # Errors
    /// If the index fails, or what `each` says.
    pub fn each(
        &self,
        mut each: impl FnMut(ObjectId, &Node) -> Result<bool, BackupError>,
    ) -> Result<bool, BackupError> {
        let mut from = ObjectId(0);
        loop {
            let some = self.objects(from, AT_ONCE)?;
            for (object, node) in &some {
                if !each(*object, node)? {
                    return Ok(false);
                }
            }
            match some.last() {
                Some((last, _)) => from = last.next(),
                None => return Ok(true),
            }
        }
    }

    /// Objects in the order of their numbers, from `from` on, at most `limit`.
    fn objects(&self, from: ObjectId, limit: usize) -> Result<Vec<(ObjectId, Node)>, BackupError> {
        let range = self.objects.range((self.group, from.0)..=(self.group, u64::MAX))?;
        let mut found = Vec::new();
        for line in range.take(limit) {
            let (key, row) = line?;
            found.push((ObjectId(key.value().1), unpack("object", row.value())?));
        }
        Ok(found)
    }
}
