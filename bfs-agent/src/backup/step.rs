//! One step of the applier: from the applied checkpoint to a marker, by log and index.

use std::path::Path;

use bfs_common::record::{CheckpointId, Record};

use super::apply::{self, Area, CrashPoint, Step};
use super::error::BackupError;
use super::gate::Marker;
use super::index::{GroupRow, Index, Phase, PlanRow};
use super::plan::plan;
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
    let begun = index.plan(row.number)?;
    let (to, phase) = begun.as_ref().map_or((marker, None), |plan| (plan.to.clone(), Some(plan.phase)));
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
    let view = index.view(row.number)?;
    let plan = plan(&view, &row.roots, &target)?;
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
        row.label = to.label;
        row.highest_object = highest;
        row.boot_id = boot_id;
        if let Some(roots) = target.roots {
            row.roots = roots;
        }
    })
}
