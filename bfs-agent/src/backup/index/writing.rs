//! What changes in the index: each is one transaction.

use bfs_common::record::{Epoch, ObjectId};
use bytes::Bytes;
use redb::ReadableTable;

use super::super::damage::Damage;
use super::super::error::BackupError;
use super::super::sums::SumChange;
use super::copy::Line;
use super::{GenerationRow, GroupRow, Index, Node, PlanRow, StepResult, pack, unpack};

impl Index {
    /// Puts a group in, durably.
    ///
    /// # Errors
    /// If the index fails.
    pub fn put_group(&self, name: &str, row: &GroupRow) -> Result<(), BackupError> {
        self.change(|change| change.put_group(name, row))
    }

    /// Grants the next epoch, durably.
    ///
    /// # Errors
    /// If the index fails; then none is granted.
    pub fn grant(&self, name: &str) -> Result<Epoch, BackupError> {
        self.change(|change| {
            let mut row = change.group(name)?;
            row.granted = row.granted.next();
            change.put_group(name, &row)?;
            Ok(row.granted)
        })
    }

    /// Notes a plan or its next phase, durably.
    ///
    /// # Errors
    /// If the index fails.
    pub fn put_plan(&self, group: u32, plan: &PlanRow) -> Result<(), BackupError> {
        self.change(|change| change.put(&Line::Plan(group, Some(pack(plan).into()))))
    }

    /// Ends a step: objects, entries, applied position, generations and the end of the plan in
    /// one transaction. `update` changes the group's row. `imaged`: the images of the step are
    /// sealed; without them nothing before it can be read any more.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn finish(
        &self,
        name: &str,
        result: &StepResult,
        imaged: bool,
        update: impl FnOnce(&mut GroupRow),
    ) -> Result<GroupRow, BackupError> {
        self.change(|change| {
            let mut row = change.group(name)?;
            let group = row.number;
            if imaged {
                let before = row.checkpoint.0;
                if change.tables.generations.get((group, before))?.is_none() {
                    // Applied by a release that kept none.
                    let (label, roots) = (row.label.clone(), row.roots.clone());
                    let first = GenerationRow { label, roots, changed: 0, bytes: 0 };
                    change.put(&Line::Generation(group, before, Some(pack(&first).into())))?;
                }
                for object in &result.kept {
                    change.put(&Line::Kept(group, object.0, Some(before)))?;
                }
            } else {
                // Before the first checkpoint nothing is kept, so there are no checksums of it either.
                change.drop_all_generations(group)?;
            }
            update(&mut row);
            let (changed, bytes) = result.extent;
            let newest = GenerationRow { label: row.label.clone(), roots: row.roots.clone(), changed, bytes };
            change.put(&Line::Generation(group, row.checkpoint.0, Some(pack(&newest).into())))?;
            change.put_group(name, &row)?;
            for (object, node) in &result.objects {
                let node = node.as_ref().map(|node| Bytes::from(pack(node)));
                let is_gone = node.is_none();
                change.put(&Line::Object(group, object.0, node))?;
                if is_gone && (!imaged || !result.kept.contains(object)) {
                    change.drop_bytes(group, *object)?;
                }
            }
            for (object, left) in &result.damage {
                change.put_damage(group, *object, left)?;
            }
            for (object, sums) in &result.sums {
                change.change_sums(group, *object, sums)?;
            }
            for (directory, name, object) in &result.entries {
                let object = object.map(|object| object.0);
                change.put(&Line::Entry(group, directory.0, name.clone(), object))?;
            }
            change.put(&Line::Plan(group, None))?;
            Ok(row)
        })
    }

    /// Notes checksums of files, durably: of files that had none.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn put_sums(&self, group: u32, sums: &[(ObjectId, SumChange)]) -> Result<(), BackupError> {
        self.change(|change| {
            sums.iter().try_for_each(|(object, sums)| change.change_sums(group, *object, sums))
        })
    }

    /// Notes what is damaged of files, beside what was noted before, durably.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn add_damage(&self, group: u32, found: &[(ObjectId, Damage)]) -> Result<(), BackupError> {
        self.change(|change| {
            for (object, more) in found {
                let mut all = change.damage(group, *object)?;
                more.iter().for_each(|(start, end)| all.add(start, end));
                change.put_damage(group, *object, &all)?;
            }
            Ok(())
        })
    }

    /// Notes the files that objects have now, durably.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn put_inos(&self, group: u32, inos: &[(ObjectId, u64)]) -> Result<(), BackupError> {
        self.change(|change| {
            for (object, ino) in inos {
                let row = change.tables.objects.get((group, object.0))?;
                let node = row.map(|row| unpack::<Node>("object", row.value())).transpose()?;
                let Some(node) = node else { continue };
                let row = pack(&Node { ino: *ino, ..node });
                change.put(&Line::Object(group, object.0, Some(row.into())))?;
            }
            Ok(())
        })
    }
}
