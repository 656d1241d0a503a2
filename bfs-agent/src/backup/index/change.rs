//! A transaction of the index: every row that changes goes into the copy as well, before it counts.

use bfs_common::record::ObjectId;
use bytes::Bytes;
use redb::{ReadableTable, Table, WriteTransaction};

use super::super::damage::Damage;
use super::super::error::BackupError;
use super::super::sums::{Edit, SumChange};
use super::copy::Line;
use super::copy::changes::Changes;
use super::{
    DAMAGE, ENTRIES, GENERATIONS, GROUPS, GroupRow, KEPT, OBJECTS, PLANS, SUMS, group_row, pack, rows,
    sum_row, unpack,
};

/// All tables, open for writing.
pub(super) struct Tables<'t> {
    pub groups: Table<'t, &'static str, &'static [u8]>,
    pub objects: Table<'t, (u32, u64), &'static [u8]>,
    pub entries: Table<'t, (u32, u64, &'static [u8]), u64>,
    pub plans: Table<'t, u32, &'static [u8]>,
    pub generations: Table<'t, (u32, u64), &'static [u8]>,
    pub kept: Table<'t, (u32, u64), u64>,
    pub sums: Table<'t, (u32, u64, u64), &'static [u8]>,
    pub damage: Table<'t, (u32, u64), &'static [u8]>,
}

impl<'t> Tables<'t> {
    /// Of a transaction.
    ///
    /// # Errors
    /// If the index fails.
    pub fn of(write: &'t WriteTransaction) -> Result<Self, BackupError> {
        Ok(Self {
            groups: write.open_table(GROUPS)?,
            objects: write.open_table(OBJECTS)?,
            entries: write.open_table(ENTRIES)?,
            plans: write.open_table(PLANS)?,
            generations: write.open_table(GENERATIONS)?,
            kept: write.open_table(KEPT)?,
            sums: write.open_table(SUMS)?,
            damage: write.open_table(DAMAGE)?,
        })
    }

    /// Makes a row what a line says.
    ///
    /// # Errors
    /// If the index fails.
    pub fn put(&mut self, line: &Line) -> Result<(), BackupError> {
        macro_rules! put {
            ($table:ident, $key:expr, $row:expr) => {
                match $row {
                    Some(row) => drop(self.$table.insert($key, row)?),
                    None => drop(self.$table.remove($key)?),
                }
            };
        }
        match line {
            Line::Group(name, row) => put!(groups, name.as_str(), row.as_deref()),
            Line::Object(group, object, row) => put!(objects, (*group, *object), row.as_deref()),
            Line::Entry(group, directory, name, object) => {
                put!(entries, (*group, *directory, name.as_bytes()), *object);
            }
            Line::Plan(group, row) => put!(plans, *group, row.as_deref()),
            Line::Generation(group, at, row) => put!(generations, (*group, *at), row.as_deref()),
            Line::Kept(group, object, last) => put!(kept, (*group, *object), *last),
            Line::Sums(group, object, n, row) => put!(sums, (*group, *object, *n), row.as_deref()),
            Line::Damage(group, object, row) => put!(damage, (*group, *object), row.as_deref()),
        }
        Ok(())
    }
}

/// A transaction.
pub(super) struct Change<'c, 't> {
    pub tables: Tables<'t>,
    pub copy: &'c mut Changes,
}

/// The whole range of a group in a table of (group, number).
const fn all(group: u32) -> std::ops::RangeInclusive<(u32, u64)> {
    (group, 0)..=(group, u64::MAX)
}

impl Change<'_, '_> {
    /// Changes a row.
    ///
    /// # Errors
    /// If index or copy fail.
    pub fn put(&mut self, line: &Line) -> Result<(), BackupError> {
        self.tables.put(line)?;
        self.copy.line(line)
    }

    /// A group's row.
    ///
    /// # Errors
    /// If there is none, or the index fails.
    pub fn group(&self, name: &str) -> Result<GroupRow, BackupError> {
        group_row(&self.tables.groups, name)
    }

    /// Changes it.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn put_group(&mut self, name: &str, row: &GroupRow) -> Result<(), BackupError> {
        self.put(&Line::Group(name.into(), Some(pack(row).into())))
    }

    /// Drops all generations of a group.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn drop_all_generations(&mut self, group: u32) -> Result<(), BackupError> {
        let mut lines = Vec::new();
        for line in self.tables.generations.range(all(group))? {
            lines.push(Line::Generation(group, line?.0.value().1, None));
        }
        for line in self.tables.kept.range(all(group))? {
            lines.push(Line::Kept(group, line?.0.value().1, None));
        }
        lines.iter().try_for_each(|line| self.put(line))
    }

    /// Drops what is known of the bytes of a file that is gone.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn drop_bytes(&mut self, group: u32, object: ObjectId) -> Result<(), BackupError> {
        self.drop_sums(group, object, (0, u64::MAX))?;
        self.put_damage(group, object, &Damage::default())
    }

    fn drop_sums(
        &mut self,
        group: u32,
        object: ObjectId,
        (first, end): (u64, u64),
    ) -> Result<(), BackupError> {
        let mut lines = Vec::new();
        for line in self.tables.sums.range(rows(group, object, first, end))? {
            lines.push(Line::Sums(group, object.0, line?.0.value().2, None));
        }
        lines.iter().try_for_each(|line| self.put(line))
    }

    /// What is damaged of a file.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn put_damage(&mut self, group: u32, object: ObjectId, damage: &Damage) -> Result<(), BackupError> {
        let row = (!damage.is_empty()).then(|| pack(damage).into());
        if row.is_none() && self.tables.damage.get((group, object.0))?.is_none() {
            return Ok(());
        }
        self.put(&Line::Damage(group, object.0, row))
    }

    /// What was noted as damaged of a file.
    ///
    /// # Errors
    /// If the index fails.
    pub fn damage(&self, group: u32, object: ObjectId) -> Result<Damage, BackupError> {
        let had = self.tables.damage.get((group, object.0))?;
        had.map_or(Ok(Damage::default()), |row| unpack("damage", row.value()))
    }

    /// Changes the checksums of an object.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn change_sums(
        &mut self,
        group: u32,
        object: ObjectId,
        change: &SumChange,
    ) -> Result<(), BackupError> {
        let edit = Edit::of(change);
        for gone in edit.gone {
            self.drop_sums(group, object, gone)?;
        }
        for number in edit.rows {
            let before = self.tables.sums.get((group, object.0, number))?;
            let before = before.map(|row| sum_row(row.value())).transpose()?;
            let row = change.row(number, before.as_ref()).map(|row| Bytes::from(row.encode()));
            self.put(&Line::Sums(group, object.0, number, row))?;
        }
        Ok(())
    }
}
