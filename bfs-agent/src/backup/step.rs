//! One step of the applier: from the applied checkpoint to a marker, by log and index.

use std::collections::HashSet;
use std::path::Path;

use bfs_common::record::{CheckpointId, ObjectId, Record};

use super::apply::{self, Area, CrashPoint, Step};
use super::error::BackupError;
use super::gate::Marker;
use super::index::{GroupRow, Index, Phase, PlanRow};
use super::plan::{Plan, plan};
use super::target::Target;
use crate::log::read_range;
use crate::mutant::{self, Mutant};

/// Does one step: from the applied checkpoint to this marker, or goes on with one that was begun. `row` is the
/// group's row as the index has it. What the step leaves in `stage/` and `aside/` is for [`apply::clean`].
pub(super) fn apply_step(
    name: &str,
    row: &GroupRow,
    index: &Index,
    area: &Area,
    log: &Path,
    marker: Marker,
    crash: &mut CrashPoint,
) -> Result<GroupRow, BackupError> {
    let to = index.plan(row.number)?.map_or(marker, |plan| plan.to);
    let mut target = Target::default();
    let (mut highest, mut boot_id) = (row.highest_object, row.boot_id);
    read_range(log, row.id, row.applied.sequence, to.position.sequence, |found| {
        match &found.record {
            Record::Object { object, .. } => highest = highest.max(*object),
            Record::EpochBegin { boot_id: id, .. } => boot_id = *id,
            _ => {}
        }
        target
            .fold(found.record, &found.payload, found.at)
            .map_err(|e| BackupError::Stream(format!("record {}: {e}", found.encoded.sequence)))
    })?;
    let step = Whole { name, row, index, area, target: &target, to, highest, boot_id };
    match step.run(crash) {
        Err(BackupError::Foreign(why)) => {
            tracing::warn!("group {name}: {why}: what is missing is made again from the index");
            step.heal(&HashSet::new(), crash)?;
            step.run(crash)
        }
        other => other,
    }
}

/// Compares the tree with the index, at a checkpoint that is applied, and puts back what is not in it as it should be;
/// bytes of `suspects` are read. What of them is lost is noted as damaged.
pub(super) fn heal(
    name: &str,
    row: &GroupRow,
    index: &Index,
    area: &Area,
    suspects: &HashSet<ObjectId>,
) -> Result<(), BackupError> {
    if index.plan(row.number)?.is_some() {
        return Err(BackupError::Applying(name.into()));
    }
    let (target, to) = (
        Target::default(),
        Marker { checkpoint: row.checkpoint, label: row.label.clone(), position: row.applied },
    );
    let (highest, boot_id) = (row.highest_object, row.boot_id);
    Whole { name, row, index, area, target: &target, to, highest, boot_id }
        .heal(suspects, &mut CrashPoint::default())
}

/// A step with what it has to reach.
struct Whole<'a> {
    name: &'a str,
    row: &'a GroupRow,
    index: &'a Index,
    area: &'a Area,
    target: &'a Target,
    to: Marker,
    highest: ObjectId,
    boot_id: [u8; 16],
}

impl Whole<'_> {
    fn run(&self, crash: &mut CrashPoint) -> Result<GroupRow, BackupError> {
        let Self { name, row, index, area, target, .. } = *self;
        let to = self.to.clone();
        let begun = index.plan(row.number)?;
        let phase = begun.as_ref().map(|plan| plan.phase);
        let mut view = index.view(row.number)?;
        let plan = plan(&view, &row.roots, target)?;
        let mut plan_row = begun.unwrap_or_else(|| PlanRow {
            from: row.checkpoint,
            to: to.clone(),
            phase: Phase::Planned,
            // There is nothing before the first checkpoint.
            imaged: row.checkpoint > CheckpointId(0),
        });
        if phase.is_none() {
            // Left by the step before, if it crashed after its transaction.
            apply::clean(area, &view)?;
        }
        if plan_row.imaged {
            let step = Step::new(area, &view, &plan, crash);
            let damage = match phase {
                None => step.look()?,
                Some(phase) => step.look_again(phase, row.id, row.checkpoint)?,
            };
            if !damage.is_empty() {
                for (object, damage) in &damage {
                    tracing::warn!(
                        "group {name}: bytes of object {object} are not what was written: {damage:?}"
                    );
                }
                index.add_damage(row.number, &damage)?;
                view = index.view(row.number)?;
            }
        }
        let again = mutant::is(Mutant::RetakesImages) && phase == Some(Phase::Planned);
        if phase.is_none() || again {
            if plan_row.imaged {
                Step::new(area, &view, &plan, crash).take_images(
                    area.images(),
                    row.id,
                    row.checkpoint,
                    to.checkpoint,
                )?;
            }
            index.put_plan(row.number, &plan_row)?;
        }
        // From here on a reader of the tree looks into the images of this step, too.
        area.seal(to.checkpoint);
        let result = Step::new(area, &view, &plan, crash).run(phase.unwrap_or(Phase::Planned), || {
            plan_row.phase = Phase::Detached;
            index.put_plan(row.number, &plan_row)
        })?;
        index.finish(name, &result, plan_row.imaged, |row| {
            row.applied = to.position;
            row.checkpoint = to.checkpoint;
            row.label = to.label.clone();
            row.highest_object = self.highest;
            row.boot_id = self.boot_id;
            if let Some(roots) = &target.roots {
                row.roots = roots.clone();
            }
            if let Some(policies) = &target.policies {
                row.policies.clone_from(policies);
            }
        })
    }

    /// Puts back what somebody else took, as far as the index has it.
    fn heal(&self, suspects: &HashSet<ObjectId>, crash: &mut CrashPoint) -> Result<(), BackupError> {
        let Self { name, row, index, area, .. } = *self;
        let begun = index.plan(row.number)?;
        let view = index.view(row.number)?;
        let plan = match &begun {
            Some(_) => plan(&view, &row.roots, self.target)?,
            None => Plan::default(),
        };
        let detached = begun.as_ref().is_some_and(|plan| plan.phase == Phase::Detached);
        let step = Step::new(area, &view, &plan, crash);
        let healed = step
            .heal(detached, begun.is_none(), suspects, &mut |damage| index.add_damage(row.number, damage))?;
        index.put_inos(row.number, &healed.inos)?;
        for did in healed.did {
            tracing::warn!("group {name}: {did}");
        }
        Ok(())
    }
}
