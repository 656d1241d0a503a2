//! The one door for development: `cargo xtask setup|ebpf|test|run|bench|tidy`.
//!
//! Depends on nothing that needs the eBPF compiler, so it works on a machine where nothing is
//! installed yet.

mod bench;
mod checkpoints;
mod demo;
mod ebpf;
mod kernels;
mod pipeline;
mod process;
mod rollback;
mod setup;
mod shell;
mod sustained;
mod test;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Development of bfs: everything through one door.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing: the eBPF compiler and linker, the programs that the tests use.
    Setup {
        /// Also a CRIU that works on this kernel, as target/criu/criu: for --with-process, and its tests.
        #[arg(long)]
        criu: bool,
    },
    /// Build the probes only.
    Ebpf,
    /// Format, lints, unit tests, end-to-end tests. Ends with a line "N passed, N failed".
    Test {
        /// The long runs: more kills, more checkpoints.
        #[arg(long)]
        long: bool,
        /// Only tests whose name holds this; or `kernels`: in QEMU, on other kernels.
        filter: Option<String>,
        /// After `kernels`: only versions that begin with one of these.
        versions: Vec<String>,
    },
    /// A demonstration on this machine, with a program of ours or with yours.
    #[command(override_usage = "cargo xtask run [-- --path DIR -- CMD ARGS...]")]
    Run {
        /// The directory that your command works in.
        #[arg(long, requires = "command")]
        path: Option<PathBuf>,
        /// Your command.
        #[arg(last = true, requires = "path")]
        command: Vec<String>,
    },
    /// Measure.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Check the rules of the repository itself.
    Tidy,
}

#[derive(Subcommand)]
enum Bench {
    /// What replication costs the program, against the same program without it.
    Overhead {
        /// Pairs of measurements for each workload; the median counts.
        #[arg(long, default_value_t = 3)]
        pairs: usize,
        /// Only workloads whose name holds this.
        filter: Option<String>,
    },
    /// How fast a program may write to a replayer on loopback before the ring has no room, and what
    /// becomes of the rest.
    Sustained,
    /// How long it takes to bring files back, when little of much was changed.
    Rollback,
    /// For how long a program stands for a checkpoint with process state, beside CRIU alone.
    Process,
    /// From the program's bytes to durable and to applied, beside what the machine can do.
    Pipeline,
    /// How many checkpoints need a stop of the program, and how long it stands then.
    Checkpoints {
        /// Checkpoints for each workload.
        #[arg(long, default_value_t = 1000)]
        count: u64,
        /// Files that lie beside, untouched: one run for each number.
        #[arg(long, value_delimiter = ',', default_value = "10000,1000000")]
        files: Vec<u64>,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    // `cargo xtask run -- --path DIR -- CMD`: the first `--` only ends cargo's own habit.
    let mut words: Vec<_> = std::env::args_os().collect();
    if words.get(1).is_some_and(|w| w == "run") && words.get(2).is_some_and(|w| w == "--") {
        words.remove(2);
    }
    match Arguments::parse_from(words).command {
        Task::Test { filter: Some(word), versions, .. } if word == "kernels" => {
            return kernels::test(&versions);
        }
        Task::Test { long, filter, .. } => return test::test(long, filter.as_deref()),
        Task::Setup { criu } => {
            setup::setup()?;
            if criu {
                setup::criu()?;
            }
        }
        Task::Ebpf => {
            setup::setup()?;
            ebpf::build()?;
        }
        Task::Run { path, command } => demo::run(path, command)?,
        Task::Bench { what: Bench::Overhead { pairs, filter } } => {
            bench::overhead(pairs, filter.as_deref())?;
        }
        Task::Bench { what: Bench::Sustained } => sustained::sustained()?,
        Task::Bench { what: Bench::Pipeline } => pipeline::pipeline()?,
        Task::Bench { what: Bench::Process } => process::process()?,
        Task::Bench { what: Bench::Rollback } => rollback::rollback()?,
        Task::Bench { what: Bench::Checkpoints { count, files } } => checkpoints::checkpoints(count, &files)?,
        Task::Tidy => tidy::tidy()?,
    }
    Ok(ExitCode::SUCCESS)
}
