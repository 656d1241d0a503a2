//! The command of `run`: started plainly, or in namespaces of its own so that CRIU can restore it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{cannot, remove_cgroup};
use crate::primary::capture::Probes;
use crate::primary::contained::{Contained, Place, Role};
use crate::primary::failure::{Failure, Kind};
use crate::primary::images::criu::Criu;
use crate::primary::images::{Images, export_folder, folder};
use crate::primary::process::{Held, Inherited, ProcessError, Running, Signals, hold, tasks_of_cgroup};
use crate::primary::stop::freezer::Freezer;
use crate::primary::stop::guard::Guard;

/// What is wanted of process state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessOptions {
    /// CRIU's program.
    pub criu: PathBuf,
    /// Where images are kept.
    pub directory: PathBuf,
    /// Of how many checkpoints.
    pub keep: usize,
    /// In how many rounds memory is dumped ahead, at most.
    pub ahead: u32,
    /// How often within an hour a command that was ended by a signal is restored; 0 for never.
    pub restarts: u32,
    /// Instead of a command that begins, the processes whose images stand there.
    pub restore: Option<PathBuf>,
    /// The processes see the first directory at the second path.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Where a dump takes longer than the interval: the next checkpoints have files only, or the interval gets longer.
    pub skips: bool,
    /// Where they cannot be dumped there is no checkpoint; else it has files only.
    pub refuses: bool,
}

/// A command that has not begun, in a cgroup of its own.
pub(super) enum Waiting {
    Plain(Held),
    Contained {
        contained: Contained,
        root: i32,
    },
    /// Its processes are going to be restored.
    Restored {
        contained: Contained,
        from: PathBuf,
    },
}

/// A command that was begun.
pub(super) enum Program {
    Plain(Running),
    Contained(Arc<Mutex<Contained>>),
}

/// Starts the command up to just before its first instruction, selected.
pub(super) fn prepare(
    group: &str,
    guard: Guard,
    command: &[OsString],
    inherited: &Inherited,
    process: Option<&ProcessOptions>,
    probes: &Probes,
) -> Result<(Freezer, Waiting), Failure> {
    let freezer = Freezer::create(group, guard)?;
    let waiting = (|| {
        if let Some(process) = process {
            let mut contained = Contained::start(inherited, Place::Apart)?;
            for (from, to) in &process.binds {
                contained.bind(from, to)?;
            }
            if let Some(from) = &process.restore {
                return Ok(Waiting::Restored { contained, from: from.clone() });
            }
            let root = contained.hold(Role::Command, command, Some(freezer.directory()), None)?;
            select(probes, freezer.directory()).map_err(|e| cannot("select the command", &e))?;
            return Ok(Waiting::Contained { contained, root });
        }
        let held = hold(command, inherited)?;
        // Its threads and children follow by themselves, in the cgroup and in the probes.
        let ready = freezer
            .enter(held.pid())
            .map_err(Failure::from)
            .and_then(|()| Ok(probes.select_task(held.pid(), held.pid())?));
        match ready {
            Ok(_) => Ok(Waiting::Plain(held)),
            Err(e) => {
                held.cancel();
                Err(e)
            }
        }
    })();
    match waiting {
        Ok(waiting) => Ok((freezer, waiting)),
        Err(e) => {
            remove_cgroup(freezer.directory());
            Err(e)
        }
    }
}

/// Selects what is in the cgroup; what it makes is followed by itself.
pub(super) fn select(probes: &Probes, cgroup: &Path) -> Result<(), String> {
    let tasks = tasks_of_cgroup(cgroup);
    if tasks.is_empty() {
        return Err("nobody is in its cgroup".into());
    }
    for (tid, tgid) in tasks {
        probes.select_task(tid, tgid).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// What was promoted and did not begin must not do so on files with which another program goes on.
pub(super) fn forget_promoted(options: &ProcessOptions, group: &str) -> Result<(), Failure> {
    let stale = export_folder(&options.directory, group);
    if stale.exists() {
        std::fs::remove_dir_all(&stale).map_err(|e| cannot(&format!("remove {}", stale.display()), &e))?;
    }
    Ok(())
}

/// What is wanted, by which CRIU, of which group, with these directories.
type Wanted<'a> = (&'a ProcessOptions, Criu, &'a str, &'a [PathBuf]);

/// The process state of what is in the cgroup; `root` as in [`Images::new`].
pub(super) fn images_of(
    (options, criu, group, roots): Wanted<'_>,
    cgroup: &Path,
    contained: &Arc<Mutex<Contained>>,
    root: Option<i32>,
) -> Result<Images, Failure> {
    let folder = folder(&options.directory, group);
    let shown = folder.display().to_string();
    let (shared, binds) = (Arc::clone(contained), options.binds.clone());
    Images::new(criu, folder, cgroup.to_owned(), shared, root, (roots, binds), (options.keep, options.ahead))
        .map_err(|e| Failure::new(Kind::Path, format!("--process-dir: {shown}: {e}"), ""))
}

impl Waiting {
    /// Lets it begin.
    pub(super) fn release(
        self,
        command: &[OsString],
        cgroup: &Path,
        images: Option<Wanted<'_>>,
        probes: &Probes,
    ) -> Result<(Program, Option<Images>), Failure> {
        let (contained, root, from) = match self {
            Self::Plain(held) => return Ok((Program::Plain(held.release()?), None)),
            Self::Contained { contained, root } => (contained, root, None),
            Self::Restored { contained, from } => (contained, 0, Some(from)),
        };
        let contained = Arc::new(Mutex::new(contained));
        if let (None, Some((options, _, group, _))) = (&from, &images) {
            forget_promoted(options, group)?;
        }
        // What can fail comes first: then nothing of the command has run.
        let mut images =
            images.map(|wanted| images_of(wanted, cgroup, &contained, Some(root))).transpose()?;
        match (from, &mut images) {
            (Some(from), Some(images)) => {
                let hint = "its files are as they were; when the cause is gone, the same command does it";
                let restored = images.restore_promoted(&from, || select(probes, cgroup));
                let to = restored.map_err(|e| Failure::new(Kind::GivenUp, e.to_string(), hint))?;
                eprintln!("bfs-agent: the processes go on from checkpoint {to}");
                for open in &images.tally.outside {
                    eprintln!("bfs-agent: open elsewhere: {open}");
                }
            }
            _ => contained.lock().unwrap_or_else(PoisonError::into_inner).go(&command[0])?,
        }
        Ok((Program::Contained(contained), images))
    }

    /// Ends it before it began.
    pub(super) fn cancel(self) {
        match self {
            Self::Plain(held) => held.cancel(),
            Self::Contained { contained, .. } | Self::Restored { contained, .. } => contained.leave(),
        }
    }
}

impl Program {
    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        match self {
            Self::Plain(running) => running.wait(Duration::ZERO).ok().flatten(),
            Self::Contained(contained) => contained.lock().unwrap_or_else(PoisonError::into_inner).ended(),
        }
    }

    /// Waits for its end.
    pub(super) fn wait(&mut self) -> Result<ExitStatus, ProcessError> {
        loop {
            let ended = match self {
                Self::Plain(running) => running.wait(Duration::from_secs(3600))?,
                Self::Contained(_) => {
                    std::thread::sleep(Duration::from_millis(20));
                    self.ended()
                }
            };
            if let Some(status) = ended {
                return Ok(status);
            }
        }
    }

    /// Passes on the signals that reach the agent; `note` hears of each that the command got.
    pub(super) fn pass_signals(
        &self,
        inherited: &Inherited,
        note: impl Fn(i32) + Send + 'static,
    ) -> Result<Signals, Failure> {
        let signals = match self {
            Self::Plain(running) => {
                let sender = running.sender()?;
                Signals::start(inherited, move |received| {
                    note(received.signal);
                    sender.forward(received);
                })
            }
            Self::Contained(contained) => {
                let sender = contained.lock().unwrap_or_else(PoisonError::into_inner).sender()?;
                Signals::start(inherited, move |received| {
                    note(received.signal);
                    sender.send(received.signal);
                })
            }
        };
        signals.map_err(|e| cannot("read signals", &e))
    }
}
