//! One group at work: capture, engine, shipper and control tied together.

mod alerts;
mod attached;
mod begin;
mod commands;
mod comparing;
mod destinations;
mod foreign;
mod hooks;
mod known;
mod left;
mod link;
mod mapped;
mod mending;
mod multiple;
mod notes;
mod paths;
mod policies;
mod program;
mod recoveries;
mod reports;
mod requests;
mod restoring;
mod rollback;
mod select;
mod state;
mod status;
mod surplus;
mod switching;
mod triggers;
mod watching;
mod work;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use super::capture::Probes;
use super::capture::probes::group_dir;
use super::control::WaitFor;
use super::engine::filter::Filter;
use super::engine::foreign::Policy;
use super::failure::{FENCED_HINT, Failure, Kind, NOT_RECOVERED_HINT};
use super::further::Confirm;
use super::images::criu::Criu;
use super::preflight;
use super::process::{Inherited, Signals, exit_status, tree_of};
use super::schedule::Schedule;
use super::ship::Sending;
use super::spool::SpoolOptions;
use super::stop::freezer::Freezer;
use super::stop::guard::Guard;
use super::stop::ptrace::Ptrace;
use crate::keys::Folder;
use crate::net::Destination;
use crate::service::Service;
pub use alerts::AlertOptions;
use begin::Ground;
pub use hooks::{HookOptions, LIMIT as HOOK_LIMIT};
pub use left::flush;
pub use policies::PolicyOptions;
pub use program::ProcessOptions;
use restoring::After;
pub use rollback::rollback;
pub use state::group_id;
use state::{Selection, State};
pub use surplus::surplus;
use work::Ending;

/// What the user asked for, checked as far as that needs no kernel and no replayer.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Name of the group.
    pub group: String,
    /// The subtrees: absolute, without symlinks, not nested.
    pub roots: Vec<PathBuf>,
    /// Where the backup is.
    pub backup: Destination,
    /// Where further ones are.
    pub further: Vec<Destination>,
    /// Whose confirmation counts.
    pub confirm: Confirm,
    /// When checkpoints are taken.
    pub schedule: Schedule,
    /// FROM=TO of `--map`.
    pub maps: Vec<(PathBuf, PathBuf)>,
    /// The folder of keys.
    pub keys: Folder,
    /// The control socket, if not the default.
    pub socket: Option<PathBuf>,
    /// What below the roots belongs to the group.
    pub filter: Filter,
    /// How long the last checkpoint is waited for.
    pub final_wait: Duration,
    /// What is done with what others change.
    pub foreign: Policy,
    /// Where records go that the backup cannot take.
    pub spool: SpoolOptions,
    /// How the stream travels.
    pub sending: Sending,
    /// What is run before and after each checkpoint.
    pub hooks: HookOptions,
    /// What is done with single files beyond checkpoints.
    pub policies: PolicyOptions,
    /// Who is told when something goes wrong.
    pub alerts: AlertOptions,
    /// Where monitors can ask.
    pub metrics: Option<Destination>,
    /// `run`: when the command fails, everything is brought back to what it was before.
    pub rollback_on_failure: bool,
    /// How files are brought back.
    pub going_back: GoingBack,
    /// `run` and `attach --cgroup`: checkpoints have process state as well.
    pub process: Option<ProcessOptions>,
    /// Longest write whose bytes travel through the ring; `None` for the built-in choice.
    pub inline_max: Option<u64>,
    /// Size of the ring; `None` for the built-in choice.
    pub ring_bytes: Option<u64>,
}

impl SessionOptions {
    /// All destinations, the first one first.
    pub(super) fn destinations(&self) -> Vec<Destination> {
        [&self.backup].into_iter().chain(&self.further).cloned().collect()
    }

    /// The folder of keys, wherever it is looked at from.
    pub(super) fn absolute_keys(&self) -> Folder {
        Folder::new(std::path::absolute(self.keys.path()).unwrap_or_else(|_| self.keys.path().into()))
    }

    /// Refuses what cannot tell what is left out from what others made.
    ///
    /// # Errors
    /// [`Kind::Usage`].
    pub fn no_filter(&self, what: &str) -> Result<(), Failure> {
        if self.filter.is_empty() {
            return Ok(());
        }
        Err(Failure::new(
            Kind::Usage,
            format!("{what} together with --include or --exclude comes in a later version"),
            "restore what is needed with `bfs-replayer restore`",
        ))
    }

    /// Whether what is wanted of process state goes together with the rest.
    ///
    /// # Errors
    /// [`Kind::Usage`], [`Kind::Path`].
    pub fn check_process(&self) -> Result<(), Failure> {
        let Some(process) = &self.process else { return Ok(()) };
        self.no_filter("--with-process")?;
        preflight::check_images(&process.directory, &self.group, &self.roots)
    }

    /// Refuses what does not look at what others than the command change, as hooks are.
    ///
    /// # Errors
    /// [`Kind::Usage`].
    pub fn no_hooks(&self, what: &str) -> Result<(), Failure> {
        if self.hooks.is_empty() {
            return Ok(());
        }
        Err(Failure::new(
            Kind::Usage,
            format!("{what} does not go together with --before-checkpoint or --after-checkpoint"),
            "leave one of them out",
        ))
    }
}

/// How files are brought back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GoingBack {
    /// The present state is no checkpoint that is kept longer than the floor.
    pub discard: bool,
    /// What others changed is brought back too.
    pub include_foreign: bool,
    /// Selected processes that still run are ended.
    pub end_processes: bool,
}

/// Runs a command and replicates what it does; returns the exit status of the whole.
///
/// # Errors
/// [`Failure`] when replication could not be started; the command was not run then.
pub fn run(options: SessionOptions, command: Vec<OsString>, inherited: Inherited) -> Result<u8, Failure> {
    let group = options.group.clone();
    let criu = options.process.as_ref().map(|process| Criu::find(&process.criu)).transpose()?;
    let guard = Guard::start().map_err(|e| cannot("start the guard process", &e))?;
    let ground = Ground::open(options, false)?;
    let probes = ground.load_probes(None)?;
    let process = ground.options.process.clone();
    let ready = program::prepare(&group, guard, &command, &inherited, process.as_ref(), &probes);
    let (freezer, waiting) = match ready {
        Ok(ready) => ready,
        Err(e) => {
            let _ = probes.unpin();
            return Err(e);
        }
    };
    let shown = match process.as_ref().and_then(|process| process.restore.as_ref()) {
        Some(from) => format!("restored from {}", from.display()),
        None => command.iter().map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" "),
    };
    let cgroup = freezer.directory().to_owned();
    let state = State::new(&ground.options, &shown, Selection::Cgroup(cgroup.clone()));
    let back = ground.options.rollback_on_failure;
    let mut work = ground.build(probes, Some(Box::new(freezer)), &state, false)?;
    let before = if back { work.before_command().map(Some) } else { Ok(None) };
    let before = match before {
        Ok(before) => before,
        Err(e) => {
            waiting.cancel();
            work.close();
            remove_cgroup(&cgroup);
            return Err(e);
        }
    };
    let images = process.as_ref().zip(criu);
    let roots = work.options.roots.clone();
    let images = images.map(|(process, criu)| (process, criu, group.as_str(), roots.as_slice()));
    let (mut program, images) = match waiting.release(&command, &cgroup, images, &work.link.probes) {
        Ok(begun) => begun,
        Err(e) => {
            work.close();
            remove_cgroup(&cgroup);
            return Err(e);
        }
    };
    work.images = images;
    work.bring_images();
    let sent = Arc::new(AtomicI32::new(0));
    let noted = Arc::clone(&sent);
    let _signals = program.pass_signals(&inherited, move |signal| noted.store(signal, Ordering::Relaxed))?;
    work.start_hooks(&inherited);
    work.start_alerts(&inherited);
    let mut status = None;
    loop {
        work.follow(|switches| {
            status = program.ended();
            // Who the command left behind writes still.
            status.is_some() && !switches
        });
        match work.go_back_as_asked() {
            Some(After::Runs) => {
                status = None;
                continue;
            }
            Some(After::Ended | After::Unfinished) => status = program.ended(),
            None => {}
        }
        match status {
            Some(ended) if work.restarts(ended, sent.load(Ordering::Relaxed)) => {
                match work.go_back_with_processes(None) {
                    Ok(to) => eprintln!(
                        "bfs-agent: the command was ended by a signal; it goes on from checkpoint {to}"
                    ),
                    Err(e) => {
                        eprintln!(
                            "bfs-agent: the command was ended by a signal and cannot be restored: {}",
                            e.message
                        );
                        break;
                    }
                }
            }
            _ => break,
        }
    }
    // After `stop` nobody knows yet how the command ends: it is left alone.
    let rolled_back = match (before, status.map(exit_status)) {
        (Some(before), Some(failed @ 1..)) => Some(rollback::after_failure(&mut work, before, failed)),
        _ => None,
    };
    let ending = work.finish();
    if let Some(mut images) = work.images.take() {
        images.clear();
    }
    work.close();
    // After `stop` the command goes on without us; its status is still ours.
    let status = match status {
        Some(status) => status,
        None => program.wait()?,
    };
    remove_cgroup(&cgroup);
    let command_status = rolled_back.unwrap_or_else(|| exit_status(status));
    Ok(final_status(command_status, &ending, &group))
}

/// Whom `attach` follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whom {
    /// These processes and their descendants.
    Processes(Vec<u32>),
    /// Who is in this cgroup (v2), or one below it, and who comes into it.
    Cgroup(PathBuf),
    /// Any process: nobody's calls are followed, but what they change.
    Everyone,
}

/// Replicates what running processes do, until they end or `stop`.
///
/// # Errors
/// [`Failure`].
pub fn attach(options: SessionOptions, whom: &Whom, inherited: &Inherited) -> Result<u8, Failure> {
    let group = options.group.clone();
    let cgroup = match whom {
        Whom::Processes(pids) => {
            for pid in pids {
                tree_of(*pid)?;
            }
            None
        }
        Whom::Cgroup(directory) => Some(select::check_cgroup(directory)?),
        Whom::Everyone if options.foreign != Policy::Follow => {
            return Err(Failure::new(
                Kind::Usage,
                "--everyone leaves nobody to refuse or to ignore",
                "leave --foreign out",
            ));
        }
        Whom::Everyone => None,
    };
    let criu = options.process.as_ref().map(|process| Criu::find(&process.criu)).transpose()?;
    let guard = Guard::start().map_err(|e| cannot("start the guard process", &e))?;
    let ground = Ground::open(options, false)?;
    let probes = ground.load_probes(cgroup.as_ref().map(|c| c.id))?;
    let (stopper, program, selection) = match select::select(&probes, whom, cgroup.as_ref(), guard) {
        Ok(selected) => selected,
        Err(e) => {
            let _ = probes.unpin();
            return Err(e);
        }
    };
    let state = State::new(&ground.options, &program, selection);
    let mut work = ground.build(probes, stopper, &state, false)?;
    let found = work.find_mapped().map_err(Failure::from);
    if let Err(e) = found.and_then(|()| attached::begin(&mut work, criu, inherited)) {
        work.close();
        return Err(e);
    }
    work.expect_asynchronous();
    follow_processes(work, &group, inherited, &state.selection)
}

/// Whether an agent of this group died and left something to go on with.
#[must_use]
pub fn is_left(group: &str) -> bool {
    Probes::are_pinned(&group_dir(group)) && matches!(State::read(group), Ok(Some(_)))
}

/// Goes on for an agent that died, with the configuration in the group's state file. With `process` what is in a cgroup that
/// is somebody else's has process state again, from the next checkpoint on.
///
/// # Errors
/// [`Failure`].
pub fn resume(group: &str, process: Option<ProcessOptions>, inherited: Inherited) -> Result<u8, Failure> {
    let nothing = |why: String| {
        Failure::new(
            Kind::NoAgent,
            format!("there is nothing to go on with for group {group:?}: {why}"),
            "start anew with `bfs-agent run` or `bfs-agent attach`",
        )
    };
    let state = State::read(group)
        .map_err(|e| nothing(format!("its state file cannot be read: {e}")))?
        .ok_or_else(|| nothing("no agent of this group ran since the start of this host".into()))?;
    let pin_dir = group_dir(group);
    if !Probes::are_pinned(&pin_dir) {
        return Err(nothing("no probes are left of it".into()));
    }
    let criu = process.as_ref().map(|process| Criu::find(&process.criu)).transpose()?;
    let guard = Guard::start().map_err(|e| cannot("start the guard process", &e))?;
    let options = SessionOptions { process, ..state.options(group).map_err(nothing)? };
    options.check_process()?;
    let ground = Ground::open(options, true)?;
    let probes = Probes::adopt(&pin_dir)?;
    let stopper: select::Stops = match &state.selection {
        Selection::Cgroup(directory) if directory.exists() => {
            Some(Box::new(Freezer::adopt(directory, guard)?))
        }
        Selection::Attached(directory) if directory.exists() => {
            Some(Box::new(Freezer::attach(directory, guard)?))
        }
        Selection::Everyone => None,
        _ => Some(Box::new(Ptrace::new(select::members(&probes)?))),
    };
    let complete = !state.incomplete;
    let mut work = ground.build(probes, stopper, &state, complete)?;
    work.find_mapped()?;
    attached::begin(&mut work, criu, &inherited)?;
    work.expect_asynchronous();
    work.take_told()?;
    let status = follow_processes(work, group, &inherited, &state.selection)?;
    if let Selection::Cgroup(directory) = &state.selection {
        remove_cgroup(directory);
    }
    Ok(status)
}

/// Follows until no selected process is left, or a signal or command ends it. A cgroup can be empty
/// and fill again: there it ends when the cgroup is removed. With everyone nothing else ends it.
fn follow_processes(
    mut work: work::Work,
    group: &str,
    inherited: &Inherited,
    selection: &Selection,
) -> Result<u8, Failure> {
    let asked = Arc::new(AtomicBool::new(false));
    let signalled = Arc::clone(&asked);
    let _signals = Signals::start(inherited, move |received| {
        if matches!(received.signal, libc::SIGTERM | libc::SIGINT | libc::SIGHUP) {
            signalled.store(true, Ordering::Relaxed);
        }
    })
    .map_err(|e| cannot("read signals", &e))?;
    let probes = Probes::adopt(&group_dir(group))?;
    work.link.service = Service::of_environment();
    work.link.service.ready(&format!("group {group} is followed"));
    work.start_hooks(inherited);
    work.start_alerts(inherited);
    let ended = |switches: bool| {
        asked.load(Ordering::Relaxed)
            || !switches
                && match selection {
                    Selection::Attached(directory) => !directory.exists(),
                    Selection::Everyone => false,
                    Selection::Cgroup(_) | Selection::Processes(_) => {
                        probes.nobody_is_selected().is_ok_and(|nobody| nobody)
                    }
                }
    };
    let unfinished = loop {
        work.follow(ended);
        match work.go_back_as_asked() {
            Some(After::Runs | After::Ended) => {}
            Some(After::Unfinished) => break true,
            None => break false,
        }
    };
    work.link.service.stopping();
    let ending = work.finish();
    if let Some(mut images) = work.images.take() {
        images.clear();
    }
    work.close();
    let status = if unfinished { Kind::RollbackUnfinished.exit_status() } else { 0 };
    Ok(final_status(status, &ending, group))
}

/// The command's status, or 75 where the last checkpoint is not on the backup.
fn final_status(command: u8, ending: &Ending, group: &str) -> u8 {
    for failure in &ending.not_recovered {
        eprintln!("bfs-agent: group {group:?}: {failure}");
    }
    if ending.reached >= Some(WaitFor::Confirmed) {
        if command == 0 && !ending.not_recovered.is_empty() {
            eprintln!("  what to do: {NOT_RECOVERED_HINT}");
            return Kind::NotRecovered.exit_status();
        }
        return command;
    }
    if let Some(fenced) = &ending.fenced {
        eprintln!(
            "bfs-agent: the last checkpoint of group {group:?} is on this host only. {fenced}\n  what to do: {FENCED_HINT}"
        );
        return if command == 0 { Kind::Fenced.exit_status() } else { command };
    }
    let why = ending.why.as_deref().map(|w| format!(" ({w})")).unwrap_or_default();
    if let Some(send_by) = &ending.send_by {
        eprintln!(
            "bfs-agent: the last checkpoint ({}) of group {group:?} is only sealed: it is in the spool, not on \
             the backup{why}\n  what to do: when the replayer is there again: {send_by}\n  or run with the same \
             --group and --backup again, which sends it first",
            ending.checkpoint
        );
        return if command == 0 { Kind::NotConfirmed.exit_status() } else { command };
    }
    eprintln!(
        "bfs-agent: the last checkpoint of group {group:?} is not confirmed by the backup{why}\n  \
         what to do: start the replayer and run with the same --group and --backup again; \
         what is missing is copied then"
    );
    if command == 0 { Kind::NotConfirmed.exit_status() } else { command }
}

fn cannot(what: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(Kind::Other, format!("cannot {what}: {error}"), "")
}

/// The empty cgroup of a command that has ended. Children that are left keep it.
fn remove_cgroup(directory: &Path) {
    let _ = std::fs::remove_dir(directory);
}
