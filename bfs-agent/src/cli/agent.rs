//! Command line of `bfs-agent`: what can be written, and where it goes.
//!
//! The arguments are here and in `options`, so that `--help` can be read in one place; `dispatch` does what a command
//! line asks, `commands` asks a running agent and prints, `show` puts a status into words. Exit statuses are those of
//! [`Kind`](crate::primary::failure::Kind), listed in [`STATUSES`].

mod check;
mod commands;
mod config;
mod destinations;
mod dispatch;
mod groups;
mod hooks;
mod keys;
mod options;
mod policies;
mod process;
mod sending;
mod show;
mod spool;
mod supervise;
mod watching;
mod words;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::generation::At;
use crate::keys::Token;
use crate::net::Destination;
use crate::primary::failure::{Failure, Kind};
use crate::primary::process::Inherited;
use crate::primary::schedule::parse_time;
use crate::primary::{contained, stop::guard};
use dispatch::dispatch;
use options::Options;

/// Exit statuses, for `--help`.
pub const STATUSES: &str = "\
Exit statuses:
  0    done; for verify: equal
  1    verify: different (each difference is listed); status --check: something does not hold
  2    verify: not everything could be compared
  64   the command line makes no sense
  65   a --path is missing, is no directory, lies in another, or overlaps the store
  66   not root
  67   the kernel has no BTF or refuses the probes
  68   the replayer cannot be reached
  69   the replayer refuses (its message says why)
  70   anything else that went wrong
  71   the group has an agent already
  72   there is no agent for this group
  73   the checkpoint was given up, or another command is in the way
  74   not done within the time
  75   run: the command ended with 0, but its last checkpoint is not confirmed
  76   files are to be brought back to a checkpoint, and are not yet (the message says how to go on)
  77   fenced: the backup was promoted, another host is the primary now (the message says which and since when)
  126, 127   run: the command cannot be executed, is not found
run ends with the status of its command (128 + N when signal N ended it).";

/// Keeps a second copy of chosen files exact while any program works on them.
#[derive(Debug, Parser)]
#[command(
    name = "bfs-agent",
    version,
    about = "Keeps a second copy of chosen files exact, checkpoint by checkpoint, while any program works on them",
    after_help = STATUSES,
    after_long_help = STATUSES,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true,
)]
pub struct Cli {
    /// Do what a configuration file says: each of its groups is a `run` or an `attach`
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only this group of the file
    #[arg(long, value_name = "NAME", requires = "config")]
    only: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command and replicate what it and its children do to the files
    ///
    /// Example:
    ///   bfs-agent run --path /srv/data --backup tcp://backup.example:7400 -- ./server
    ///
    /// What exists below --path is copied first, while the command is already running. A last
    /// checkpoint is taken and waited for when the command has ended.
    #[command(verbatim_doc_comment)]
    Run {
        #[command(flatten)]
        options: Options,
        /// Start the command only when a checkpoint of the state before it is confirmed, and when it
        /// ends with anything but 0, bring everything below --path back to that
        #[arg(long)]
        rollback_on_failure: bool,
        /// Processes that the command started and that still run when it has failed are ended, first by
        /// SIGTERM, after 5 s by SIGKILL; without this they are waited for
        #[arg(long, requires = "rollback_on_failure")]
        kill_descendants: bool,
        /// Bring back also what other processes changed
        #[arg(long, requires = "rollback_on_failure")]
        include_foreign: bool,
        #[command(flatten)]
        process: process::Process,
        /// The command and its arguments
        #[arg(last = true, required_unless_present = "restore", value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Replicate what programs do that run already, and all their children
    ///
    /// Examples:
    ///   bfs-agent attach --path /srv/data --backup unix:/run/bfs/backup.sock --pid 4711
    ///   bfs-agent attach --path /srv/data --backup unix:/run/bfs/backup.sock \
    ///     --cgroup /sys/fs/cgroup/system.slice/postgresql.service
    ///
    /// Ends when they have ended (with --cgroup: when it is removed), or with `bfs-agent stop` (with --everyone: only
    /// so).
    #[command(verbatim_doc_comment)]
    Attach {
        #[command(flatten)]
        options: Options,
        /// A process; its threads and descendants are selected with it (may be repeated)
        #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
        pid: Vec<u32>,
        /// All in this cgroup (v2) or below it, and whoever comes into it later; who leaves it is no
        /// longer selected
        #[arg(long, value_name = "DIR", conflicts_with = "pid")]
        cgroup: Option<PathBuf>,
        #[command(flatten)]
        process: process::Attached,
        /// Where an agent of this group died, go on as `resume` does, with its options: for service managers
        #[arg(long)]
        resume: bool,
        /// Any process: what anybody changes below --path. Each changed file is read whole, and nobody can be
        /// stopped, so who writes without a pause keeps checkpoints from being taken (Linux 6.13)
        #[arg(long, conflicts_with_all = ["pid", "cgroup"])]
        everyone: bool,
    },
    /// Go on for an agent that died, with the options that it was started with
    ///
    /// Example:
    ///   bfs-agent resume --group default
    ///
    /// The kernel went on capturing meanwhile: nothing is lost.
    #[command(verbatim_doc_comment)]
    Resume {
        #[command(flatten)]
        group: Group,
    },
    /// Take a checkpoint now; prints its number
    ///
    /// Examples:
    ///   bfs-agent checkpoint --tag before-upgrade
    ///   bfs-agent checkpoint --stopped -- cp -a /srv/data /tmp/copy
    ///
    /// With --stopped the selected processes stand while CMD runs, and the checkpoint holds
    /// exactly the files that CMD sees. CMD finds the number in BFS_CHECKPOINT.
    #[command(verbatim_doc_comment)]
    Checkpoint {
        #[command(flatten)]
        target: Target,
        /// A name to find it by
        #[arg(long, default_value = "", hide_default_value = true)]
        tag: String,
        /// Wait until it is so far
        #[arg(long, value_enum, default_value = "confirmed")]
        wait: words::Wait,
        /// How long to wait, altogether
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
        timeout: Duration,
        /// Stop the selected processes, take it, run CMD, let them go
        #[arg(long, requires = "command")]
        stopped: bool,
        /// With --stopped: they stand no longer than this
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
        limit: Duration,
        /// What to run while they stand
        #[arg(last = true, value_name = "CMD", requires = "stopped")]
        command: Vec<OsString>,
    },
    /// Show how far the backup is, and what is in the way
    ///
    /// Examples:
    ///   bfs-agent status --json
    ///   bfs-agent status --check lag=10s,connected
    #[command(verbatim_doc_comment)]
    Status {
        #[command(flatten)]
        target: Target,
        /// As one JSON object
        #[arg(long)]
        json: bool,
        /// For monitors: say what of this does not hold, and end with 1 then; a comma list of lag=TIME (the backup
        /// is at most so far behind), spool=SIZE (so much waits at most), connected
        #[arg(long, value_name = "WHAT", conflicts_with = "json")]
        check: Option<check::Checks>,
    },
    /// Send everything that is captured to the backup, and wait for it
    ///
    /// Example:
    ///   bfs-agent flush --timeout 5m
    ///
    /// Where no agent of the group runs any more, what it left in its spool is sent.
    #[command(verbatim_doc_comment)]
    Flush {
        #[command(flatten)]
        target: Target,
        /// How long to wait for an agent that runs
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
        timeout: Duration,
        #[command(flatten)]
        spool: spool::Place,
    },
    /// Take a checkpoint and compare the files of both sides, byte by byte
    ///
    /// Example:
    ///   bfs-agent verify
    ///
    /// What the program changes meanwhile is compared at a later checkpoint, a few times. Ends with 0 when
    /// they are equal (or with --repair became so), 1 when they differ (each difference is listed), 2 when
    /// not everything could be compared, because the program was changing it.
    #[command(verbatim_doc_comment)]
    Verify {
        #[command(flatten)]
        target: Target,
        /// How long to wait
        #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_time)]
        timeout: Duration,
        /// Put back what others changed in the backup, and send again what differs
        #[arg(long)]
        repair: bool,
    },
    /// Bring one file back, as it was in a checkpoint that is kept, while the program goes on
    ///
    /// Examples:
    ///   bfs-agent recover /srv/data/table
    ///   bfs-agent recover --at tag:before-upgrade /srv/data/table
    ///   bfs-agent recover --at newest /srv/data/table
    ///
    /// It comes in the place of the one that stands there in one step. That must not be open, and have one name only.
    /// With `--at newest` what was captured last is written where it stands, whoever has it open: a policy with the
    /// recovery `request` or `automatic` has to allow that.
    #[command(verbatim_doc_comment)]
    Recover {
        #[command(flatten)]
        target: Target,
        /// The file; it may be gone
        path: PathBuf,
        /// Which checkpoint: its number, tag:NAME, or a time (UTC) like 2026-11-21T14:05:00, which takes the
        /// last one up to then [default: the newest]; or `newest`: what was captured last, in no checkpoint yet
        #[arg(long, value_name = "N|TIME|tag:NAME|newest")]
        at: Option<String>,
        /// How long to wait
        #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_time)]
        timeout: Duration,
    },
    /// Bring the files of the primary back to a checkpoint that is kept
    ///
    /// Examples:
    ///   bfs-agent rollback --path /srv/data --backup dir:/mnt/disk/store --dry-run
    ///   bfs-agent rollback --path /srv/data --backup dir:/mnt/disk/store --to tag:before-upgrade
    ///
    /// The program must have ended. The present state is kept, too, as a checkpoint of its own; what
    /// is brought back becomes the next one. Also finishes a rollback that was interrupted.
    ///
    /// Where an agent runs that keeps process state (`run` or `attach --with-process`), it does this instead: what is left
    /// of the processes is ended, and they go on as they were at that checkpoint.
    #[command(verbatim_doc_comment)]
    Rollback {
        #[command(flatten)]
        options: Options,
        /// Which: its number, tag:NAME, or a time (UTC) like 2026-11-21T14:05:00, which takes the
        /// last one up to then [default: the newest]
        #[arg(long, value_name = "N|TIME|tag:NAME", value_parser = parse_at)]
        to: Option<(String, At)>,
        /// Only list what would be done
        #[arg(long)]
        dry_run: bool,
        /// End the processes that an agent of this group followed which is dead: first by SIGTERM, after
        /// 5 s by SIGKILL
        #[arg(long)]
        stop: bool,
        /// Do not keep the present state: its checkpoint goes as soon as the last ones that are always
        /// kept (`serve --keep-min`) are newer
        #[arg(long)]
        discard: bool,
        /// Bring back also what nobody followed
        #[arg(long)]
        include_foreign: bool,
    },
    /// Hand over to another host without loss: end the program, take and confirm the last checkpoint, end the agent
    ///
    /// Example:
    ///   bfs-agent switchover --to tcp://backup.example:7400
    ///
    /// The processes get SIGTERM. When they do not end within the time, nothing has changed and they are followed as before.
    /// Then, on the other host: `bfs-replayer promote`.
    #[command(verbatim_doc_comment)]
    Switchover {
        #[command(flatten)]
        target: Target,
        /// The destination that becomes the primary, as given to --backup
        #[arg(long, value_name = "DEST")]
        to: Destination,
        /// Wait until the program ends by itself
        #[arg(long, conflicts_with = "kill")]
        wait: bool,
        /// Kill what has not ended 5 s after SIGTERM
        #[arg(long)]
        kill: bool,
        /// How long, altogether
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
        timeout: Duration,
    },
    /// Keep what this host has, after the backup was promoted and another host is the primary
    ///
    /// Example:
    ///   bfs-agent surplus --path /srv/data --backup tcp://backup.example:7400
    ///
    /// All files below --path become a checkpoint `surplus of HOST`, in a group of its own (GROUP.surplus-HOST) of the same
    /// store. Nothing is changed on this host. End the program first.
    #[command(verbatim_doc_comment)]
    Surplus {
        #[command(flatten)]
        options: Options,
    },
    /// Take a last checkpoint, and end the agent (never the program)
    ///
    /// Example:
    ///   bfs-agent stop --group default
    #[command(verbatim_doc_comment)]
    Stop {
        #[command(flatten)]
        target: Target,
        /// How long to wait for the last checkpoint
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
        timeout: Duration,
    },
    /// Add, remove or list replicated directories while everything runs
    ///
    /// Examples:
    ///   bfs-agent path add /srv/more
    ///   bfs-agent path list
    ///
    /// add and remove print the number of the first checkpoint that has the directory, or has it no
    /// more, when it is confirmed.
    #[command(verbatim_doc_comment)]
    Path {
        #[command(subcommand)]
        what: PathCommand,
    },
    /// Show or change the destinations while everything runs
    ///
    /// Examples:
    ///   bfs-agent dest add tcp://third.example:7400
    ///   bfs-agent dest pause dir:/mnt/usb/store
    ///   bfs-agent dest list
    ///
    /// The first destination gets the stream and stays; a further one gets whole checkpoints. A change counts at once, and
    /// is shown with where each destination stands.
    #[command(verbatim_doc_comment)]
    Dest {
        #[command(subcommand)]
        what: destinations::DestCommand,
    },
    /// Show or change policies (how single files are backed up beside the checkpoints) while everything runs
    ///
    /// Examples:
    ///   bfs-agent policy add /srv/db/table --backup write
    ///   bfs-agent policy suspend '*.pdf'
    ///
    /// A change counts at once, touches nothing else, and is still there after the agent is started again.
    #[command(verbatim_doc_comment)]
    Policy {
        #[command(subcommand)]
        what: policies::PolicyCommand,
    },
    /// Configuration files (`bfs-agent --config FILE` does what one says)
    Config {
        #[command(subcommand)]
        what: ConfigCommand,
    },
    /// Pair this host with the replayer of a backup host: each knows the other's key from then on
    ///
    /// Example:
    ///   bfs-agent pair tcp://backup.example:7400 bfs-pair-...
    ///
    /// The token comes from `bfs-replayer pair --store STORE` there. It is good for one host and for a short time.
    #[command(verbatim_doc_comment)]
    Pair {
        #[command(flatten)]
        keys: keys::Place,
        /// Where the replayer listens, as it is going to be given to --backup
        #[arg(value_name = "tcp://HOST:PORT")]
        replayer: Destination,
        /// What `bfs-replayer pair` printed
        #[arg(value_name = "TOKEN")]
        token: Token,
    },
    /// Show this host's key (one is made if there is none), or change which keys are trusted
    ///
    /// Examples:
    ///   bfs-agent key
    ///   bfs-agent key trust tcp://backup.example:7400 FINGERPRINT
    #[command(verbatim_doc_comment)]
    Key {
        #[command(flatten)]
        keys: keys::Place,
        #[command(subcommand)]
        what: Option<keys::KeyCommand>,
    },
    /// Thaws what the agent stopped, should the agent die
    #[command(name = guard::SUBCOMMAND, hide = true)]
    Guard,
    /// Makes the namespaces of a command that CRIU can restore
    #[command(name = contained::SUBCOMMAND, hide = true)]
    Contain {
        /// None: for the processes of this cgroup
        #[arg(long, value_name = "DIR")]
        beside: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
enum PathCommand {
    /// Replicate a further directory, with everything below it
    Add(PathChange),
    /// Replicate a directory no longer: it is not in the next checkpoint, and stays in those before
    Remove(PathChange),
    /// Show which directories are replicated
    List {
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Look at a configuration file without starting anything
    Check {
        /// The file
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// How each of its groups stands: a line each; ends with 72 when one has no agent
    Status {
        /// The file
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct PathChange {
    #[command(flatten)]
    target: Target,
    /// The directory
    #[arg(value_name = "DIR")]
    path: PathBuf,
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_time)]
    timeout: Duration,
}

#[derive(Debug, Args)]
struct Group {
    /// Name of the replicated set
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = parse_group)]
    group: String,
}

#[derive(Debug, Args)]
struct Target {
    #[command(flatten)]
    group: Group,
    /// Where the agent listens [default: /run/bfs/agent-GROUP.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// A checkpoint, and how it was written.
fn parse_at(text: &str) -> Result<(String, At), String> {
    Ok((text.to_owned(), text.parse()?))
}

/// The group's name becomes part of file names on both sides.
fn parse_group(text: &str) -> Result<String, String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if text.is_empty() || text.len() > 64 || text.starts_with(['.', '-']) || !text.chars().all(fine) {
        return Err("1 to 64 letters, digits, '.', '_' or '-', not beginning with '.' or '-'".into());
    }
    Ok(text.to_owned())
}

/// Runs the command line of this process; returns its exit status.
#[must_use]
pub fn main() -> u8 {
    // Before any thread exists: the signals are blocked in all of them.
    let inherited = Inherited::take_over();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { Kind::Usage.exit_status() } else { 0 };
        }
    };
    let done = inherited
        .map_err(|e| Failure::new(Kind::Other, format!("cannot take over the signals: {e}"), ""))
        .and_then(|inherited| match (cli.config, cli.command) {
            (Some(file), _) => groups::start(&file, cli.only.as_deref(), inherited),
            (None, Some(command)) => dispatch(command, inherited),
            (None, None) => Err(Failure::new(Kind::Usage, "there is nothing to do", "bfs-agent --help")),
        });
    done.unwrap_or_else(|failure| {
        complain(&failure);
        failure.kind.exit_status()
    })
}

/// What failed, and what to do, on two lines.
fn complain(failure: &Failure) {
    let mut err = std::io::stderr().lock();
    let (bold, plain) = if err.is_terminal() { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
    let _ = writeln!(err, "{bold}bfs-agent:{plain} {}", failure.message);
    if !failure.hint.is_empty() {
        let _ = writeln!(err, "  try: {}", failure.hint);
    }
}

/// Messages of the agent itself go to standard error; `BFS_LOG=debug` shows more.
fn logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BFS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// The command line as clap knows it, for the generated reference and its test.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn what_comes_after_the_dashes_is_the_command() {
        let cli =
            parse("bfs-agent run --path /a --path /b --backup dir:/s --map /a=/x -- cmd --path /c").unwrap();
        let Some(Command::Run { options, command, .. }) = cli.command else { panic!() };
        assert_eq!(command, ["cmd", "--path", "/c"]);
        assert_eq!(options.paths, [PathBuf::from("/a"), "/b".into()]);
        assert_eq!(options.checkpoint.every, Some(Duration::from_secs(1)));
        assert_eq!(options.maps, [(PathBuf::from("/a"), PathBuf::from("/x"))]);
        assert_eq!(options.final_wait, Duration::from_secs(60));
    }

    #[test]
    fn nonsense_is_refused_by_the_parser() {
        for line in [
            "bfs-agent",
            "bfs-agent run --path /a --backup dir:/s",
            "bfs-agent run --path /a -- x",
            "bfs-agent run --backup dir:/s -- x",
            "bfs-agent run --path /a --backup ftp:/s -- x",
            "bfs-agent run --path /a --backup dir:/s --group ../x -- x",
            "bfs-agent run --path /a --backup dir:/s --checkpoint never -- x",
            "bfs-agent run --path /a --backup dir:/s --map a -- x",
            "bfs-agent run --path /a --backup dir:/s --exclude -- x",
            "bfs-agent attach --path /a --backup dir:/s --pid 0",
            "bfs-agent checkpoint --stopped",
            "bfs-agent checkpoint -- cmd",
            "bfs-agent checkpoint --wait done",
            "bfs-agent rollback",
            "bfs-agent pair tcp://h:1 bfs-pair-x",
            "bfs-agent key trust tcp://h:1 AAAA",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn every_status_is_in_the_help_and_none_is_used_twice() {
        let kinds = [
            Kind::Usage,
            Kind::Path,
            Kind::NotRoot,
            Kind::NoBpf,
            Kind::Unreachable,
            Kind::Refused,
            Kind::Other,
            Kind::GroupBusy,
            Kind::NoAgent,
            Kind::GivenUp,
            Kind::Timeout,
            Kind::NotConfirmed,
            Kind::RollbackUnfinished,
            Kind::Fenced,
        ];
        let mut seen = std::collections::BTreeSet::from([0, 1, 2]);
        for kind in kinds {
            assert!(seen.insert(kind.exit_status()), "{kind:?}");
            assert!(STATUSES.contains(&format!("\n  {}   ", kind.exit_status())), "{kind:?}");
        }
    }
}
