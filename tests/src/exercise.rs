//! What is done with every program: checkpoints while it works, each compared or checked.
//!
//! Every second checkpoint is taken `--stopped` with a command that copies the primary: the backup
//! must equal that copy. The others stop nobody: the program's own check reads a copy of the backup,
//! which rests because checkpoints are taken on demand only. And the cut must lie between what was
//! there before it was asked for and what was there when it was done; in most cuts those two differ,
//! so it is known that the program worked meanwhile.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::copy;
use crate::oracle;
use crate::programs::Program;
use crate::watch::{SOON, until};
use crate::world::{How, World};

/// Takes `count` checkpoints of the program while it works, then ends it and compares once more.
///
/// # Errors
/// Every difference, and whatever does not work.
pub fn checkpoints(world: &mut World, program: &dyn Program, how: How, count: usize) -> Result<()> {
    world.start(program, how)?;
    let mut last = 0;
    let (mut cuts, mut at_work) = (0, 0);
    for index in 0..count {
        if index == count / 4 {
            let place = world.place.clone();
            until("the program half way", SOON, || program.half_way(&place).then_some(()))?;
        }
        let taken = if index % 2 == 0 {
            stopped(world, index)
        } else {
            cuts += 1;
            cut_at_work(world, program, index).map(|(number, worked)| {
                at_work += usize::from(worked);
                number
            })
        };
        let number =
            taken.with_context(|| format!("checkpoint {} of {count} ({})", index + 1, program.name()))?;
        ensure!(number > last, "checkpoint {number} came after checkpoint {last}");
        last = number;
        ensure!(world.program_runs(), "the program ended after {} of {count} checkpoints", index + 1);
    }
    ensure!(at_work * 2 >= cuts, "the program was at work during {at_work} of {cuts} cuts only");
    let status = world.finish()?;
    ensure!(status.success(), "the program ended with {status}");
    equal(world).context("after the end of the program")
}

/// A checkpoint with the program stopped: the backup equals the copy made meanwhile.
///
/// # Errors
/// The differences.
pub fn stopped(world: &World, index: usize) -> Result<u64> {
    stopped_taken(world, index, &|_, _| true)
}

/// The same where only a part is taken: see [`oracle::compare_taken`].
///
/// # Errors
/// The differences.
pub fn stopped_taken(world: &World, index: usize, takes: &dyn Fn(&Path, bool) -> bool) -> Result<u64> {
    let at = world.scratch.join(format!("stopped-{index}"));
    let number = world.checkpoint_stopped(&copy::command(&world.place.data, &at))?;
    let differences = oracle::compare_taken(&at, &world.backup(), takes)?;
    ensure!(differences.is_empty(), "checkpoint {number} (stopped):\n{}", differences.join("\n"));
    fs::remove_dir_all(&at)?;
    Ok(number)
}

/// A checkpoint as a plain cut: the program's check finds nothing wrong in it.
///
/// # Errors
/// What is wrong.
pub fn cut(world: &World, program: &dyn Program, index: usize) -> Result<u64> {
    Ok(cut_at_work(world, program, index)?.0)
}

/// The same, and whether the program got on meanwhile.
fn cut_at_work(world: &World, program: &dyn Program, index: usize) -> Result<(u64, bool)> {
    let before = program.progress(&world.place.data)?;
    let active = program.activity(&world.place)?;
    let number = world.checkpoint()?;
    let at = world.scratch.join(format!("cut-{index}"));
    copy::exact(&world.backup(), &at)?;
    let worked = program.activity(&world.place)? != active;
    let after = program.progress(&world.place.data)?;
    let found = program.progress(&at)?;
    // What could be seen before the checkpoint was asked for had begun: it is covered.
    ensure!(
        (before..=after).contains(&found),
        "checkpoint {number} (cut) holds {found}, but {before} was there before it and {after} after it"
    );
    let wrong = program.check(&at, &world.place)?;
    ensure!(wrong.is_empty(), "checkpoint {number} (cut):\n{}", wrong.join("\n"));
    fs::remove_dir_all(&at)?;
    Ok((number, worked))
}

/// The backup equals the primary, which rests.
///
/// # Errors
/// The differences.
pub fn equal(world: &World) -> Result<()> {
    let differences = oracle::compare(&world.place.data, &world.backup())?;
    ensure!(differences.is_empty(), "the trees differ:\n{}", differences.join("\n"));
    Ok(())
}
