//! Selecting processes that run already, so that nobody is missed who is born, moved or ends meanwhile.
//!
//! The probes are loaded first and keep the set from then on. Here those are added that they did not
//! see come. A stop for a moment at the end: the calls that the processes are in have no start that
//! was seen, so they have to have ended before anything is read.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::state::Selection;
use super::{Whom, link};
use crate::primary::capture::Probes;
use crate::primary::failure::{Failure, Kind};
use crate::primary::process::{Task, in_cgroup, tasks_of_cgroup, tree_of};
use crate::primary::stop::Stopper;
use crate::primary::stop::freezer::Freezer;
use crate::primary::stop::guard::Guard;
use crate::primary::stop::ptrace::{Members, Ptrace};

/// Passes over the tasks; each further one means that tasks came or were being moved during the one
/// before.
const PASSES_MAX: u32 = 1000;

/// A cgroup that can be attached to.
pub(super) struct Cgroup {
    /// Its directory, without symlinks.
    pub directory: PathBuf,
    /// How the kernel names it.
    pub id: u64,
}

/// The cgroup that the user named.
pub(super) fn check_cgroup(directory: &Path) -> Result<Cgroup, Failure> {
    let shown = directory.display();
    let fail = |why: String| {
        Failure::new(
            Kind::Usage,
            format!("--cgroup {shown}: {why}"),
            "give the directory of a cgroup v2 that is not the topmost, such as \
             /sys/fs/cgroup/system.slice/NAME.service",
        )
    };
    let directory = fs::canonicalize(directory).map_err(|e| fail(e.to_string()))?;
    if !directory.join("cgroup.freeze").exists() {
        return Err(fail("this is not a cgroup v2 that can be stopped".into()));
    }
    let own = std::process::id();
    if in_cgroup(own, &directory) == Some(true) {
        return Err(Failure::new(
            Kind::Usage,
            format!("--cgroup {shown}: this agent is in it, and would stop itself"),
            "start the agent in another cgroup (systemd-run --scope bfs-agent ...)",
        ));
    }
    let id = fs::metadata(&directory).map_err(|e| fail(e.to_string()))?.ino();
    Ok(Cgroup { directory, id })
}

/// A way to stop the selected processes, if there is one.
pub(super) type Stops = Option<Box<dyn Stopper>>;

/// Selects, and lets go what was in flight. Gives how to stop them, and who they are, in words and
/// for the state file.
pub(super) fn select(
    probes: &Probes,
    whom: &Whom,
    cgroup: Option<&Cgroup>,
    guard: Guard,
) -> Result<(Stops, String, Selection), Failure> {
    let (mut stopper, program, selection): (Box<dyn Stopper>, _, _) = match (whom, cgroup) {
        (_, Some(Cgroup { directory, .. })) => {
            select_cgroup(probes, directory)?;
            let program = format!("cgroup {}", directory.display());
            (Box::new(Freezer::attach(directory, guard)?), program, Selection::Attached(directory.clone()))
        }
        (Whom::Everyone, None) => {
            if !probes.foreign().is_seen() {
                return Err(Failure::new(
                    Kind::NoBpf,
                    "--everyone needs to see what any process changes, which this kernel does not tell",
                    "use a kernel >= 6.13, or name processes with --pid, or a cgroup with --cgroup",
                ));
            }
            return Ok((None, "everyone".to_owned(), Selection::Everyone));
        }
        (Whom::Cgroup(_), None) => return Err(Failure::new(Kind::Other, "the cgroup was not looked up", "")),
        (Whom::Processes(pids), None) => {
            select_trees(probes, pids)?;
            let list = pids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            (
                Box::new(Ptrace::new(members(probes)?)),
                format!("pid {list}"),
                Selection::Processes(pids.clone()),
            )
        }
    };
    stopper.stop(link::STOP_LIMITS)?;
    stopper.go()?;
    Ok((Some(stopper), program, selection))
}

/// The processes, all their threads and descendants.
fn select_trees(probes: &Probes, pids: &[u32]) -> Result<(), Failure> {
    for _ in 0..PASSES_MAX {
        // First who is followed, then who is there: the children of all others are born followed.
        let selected = selected(probes)?;
        let there: Vec<Task> = pids.iter().flat_map(|pid| tree_of(*pid).unwrap_or_default()).collect();
        if there.is_empty() {
            return Err(Failure::new(Kind::Usage, "the process has ended already", "look for it with `ps`"));
        }
        let mut changed = false;
        for task in there.iter().filter(|task| !selected.contains(&task.tid)) {
            // One that has ended is let go of at once.
            changed |= probes.select_task(task.tid, task.tgid)?;
        }
        if !changed {
            return Ok(());
        }
    }
    Err(restless("threads come and end all the time".into()))
}

fn selected(probes: &Probes) -> Result<HashSet<u32>, Failure> {
    Ok(probes.selected_tasks()?.into_iter().map(|(tid, _)| tid).collect())
}

fn restless(what: String) -> Failure {
    Failure::new(Kind::Other, what, "try again when that has ended")
}

/// The tasks of a cgroup. A pass that finds nothing to change ends it: whatever moves after that
/// pass has begun is seen by the probes, and nothing is done here that could undo what they did.
fn select_cgroup(probes: &Probes, directory: &Path) -> Result<(), Failure> {
    for _ in 0..PASSES_MAX {
        let mut changed = false;
        let there = tasks_of_cgroup(directory);
        let selected = selected(probes)?;
        for (tid, tgid) in there.iter().filter(|t| !selected.contains(&t.0)) {
            // Somebody whom the probes took out since, or who ended.
            if in_cgroup(*tid, directory) == Some(true) {
                changed |= probes.select_task(*tid, *tgid)?;
            }
        }
        for tid in selected.iter().filter(|tid| !there.iter().any(|t| t.0 == **tid)) {
            if in_cgroup(*tid, directory) == Some(false) {
                changed |= probes.deselect_task(*tid)?;
            }
        }
        if !changed {
            return Ok(());
        }
    }
    Err(restless(format!("processes are moved in and out of {} all the time", directory.display())))
}

/// The selected processes, for a stop.
pub(super) fn members(probes: &Probes) -> Result<Members, Failure> {
    let probes = Probes::adopt(probes.pin_dir())?;
    Ok(Box::new(move || probes.selected_processes().map_err(std::io::Error::other)))
}
