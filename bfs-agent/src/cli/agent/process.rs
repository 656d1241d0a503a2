//! The options of process state.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::options::parse_map;

use crate::primary::failure::{Failure, Kind};
use crate::primary::images::DIRECTORY;
use crate::primary::session::ProcessOptions;

/// Process state in checkpoints, whoever began the processes.
#[derive(Debug, Args)]
pub(super) struct Keeping {
    /// CRIU's program
    #[arg(long, value_name = "PATH", default_value = "criu", requires = "with_process")]
    criu: PathBuf,
    /// Of how many checkpoints the process state is kept
    #[arg(long, value_name = "NUMBER", default_value = "3", requires = "with_process",
        value_parser = clap::value_parser!(u16).range(1..))]
    process_keep: u16,
    /// Where the kernel tells which memory changed (`criu check --feature mem_dirty_track`): dump it ahead, while the
    /// command runs, in so many rounds at most, so that it stands only for what changed since the last; 0 for none
    #[arg(long, value_name = "ROUNDS", default_value = "3", requires = "with_process",
        value_parser = clap::value_parser!(u32).range(..=10))]
    process_ahead: u32,
    /// Where it is kept, in a folder of the group's name
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, requires = "with_process")]
    process_dir: PathBuf,
    /// Where a dump takes longer than every=TIME: `stretch` the time between checkpoints, or `skip` process state, and count
    /// that, until the program has run for as long as it stood
    #[arg(long, value_enum, value_name = "HOW", default_value = "stretch", requires = "with_process")]
    process_overrun: Overrun,
    /// Where CRIU cannot dump the processes: the checkpoint has `files` only, or there is none (`refuse`) until it can
    #[arg(long, value_enum, value_name = "HOW", default_value = "files", requires = "with_process")]
    process_failure: OnFailure,
}

/// Process state of the command of `run`.
#[derive(Debug, Args)]
pub(super) struct Process {
    /// With each checkpoint, dump the command's processes by CRIU: files and memory are of the same instant. The
    /// command runs in PID and mount namespaces of its own, without a controlling terminal
    #[arg(long)]
    with_process: bool,
    #[command(flatten)]
    keeping: Keeping,
    /// When a signal ends the command that did not come through bfs-agent, bring files and processes back to the
    /// last checkpoint that has both, and go on from there; so often within an hour
    #[arg(
        long,
        value_name = "TIMES",
        default_value = "0",
        hide_default_value = true,
        requires = "with_process"
    )]
    restart_on_abort: u32,
    /// Instead of a command: the processes whose images stand there, as `bfs-replayer promote --with-process` gives them
    #[arg(long, value_name = "DIR", requires = "with_process", conflicts_with_all = ["command", "rollback_on_failure"])]
    restore: Option<PathBuf>,
    /// The processes see the directory FROM at TO (may be repeated)
    #[arg(long = "bind", value_name = "FROM=TO", requires = "with_process", value_parser = parse_map)]
    binds: Vec<(PathBuf, PathBuf)>,
}

/// Process state of a cgroup that is attached to.
#[derive(Debug, Args)]
pub(super) struct Attached {
    /// With --cgroup: with each checkpoint, dump its processes by CRIU: files and memory are of the same instant. They have to be
    /// one tree. They go back under their old numbers, so whoever has one of those meanwhile is in the way, and that is said
    #[arg(long)]
    with_process: bool,
    #[command(flatten)]
    keeping: Keeping,
}

/// What is done when a dump takes too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Overrun {
    /// Checkpoints are further apart.
    Stretch,
    /// They have files only.
    Skip,
}

/// What becomes of a checkpoint whose processes cannot be dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnFailure {
    /// It has files only.
    Files,
    /// There is none.
    Refuse,
}

impl Keeping {
    fn options(self) -> ProcessOptions {
        ProcessOptions {
            criu: self.criu,
            directory: self.process_dir,
            keep: usize::from(self.process_keep),
            ahead: self.process_ahead,
            restarts: 0,
            restore: None,
            binds: Vec::new(),
            skips: self.process_overrun == Overrun::Skip,
            refuses: self.process_failure == OnFailure::Refuse,
        }
    }
}

impl Process {
    pub(super) fn options(self) -> Option<ProcessOptions> {
        let Self { with_process, keeping, restart_on_abort: restarts, restore, binds } = self;
        with_process.then(|| ProcessOptions { restarts, restore, binds, ..keeping.options() })
    }
}

impl Attached {
    /// `apart`: those who are followed have a cgroup, so that they can be found.
    ///
    /// # Errors
    /// [`Kind::Usage`].
    pub(super) fn options(self, apart: bool) -> Result<Option<ProcessOptions>, Failure> {
        if self.with_process && !apart {
            return Err(Failure::new(
                Kind::Usage,
                "attach --with-process needs --cgroup: CRIU has to find the processes standing in a cgroup of their own",
                "mkdir a cgroup (such as /sys/fs/cgroup/NAME), write the numbers of the program's processes into its \
                 cgroup.procs, all of them, and give it with --cgroup; or start the command with `bfs-agent run \
                 --with-process`; or leave --with-process out: attach keeps the files",
            ));
        }
        Ok(self.with_process.then(|| self.keeping.options()))
    }
}
