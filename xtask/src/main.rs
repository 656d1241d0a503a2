//! The one door for development: `cargo xtask setup|ebpf|test|run|bench|tidy`.
//!
//! Depends on nothing that needs the eBPF compiler, so it works on a machine where nothing is
//! installed yet.

mod bench;
mod demo;
mod ebpf;
mod kernels;
mod setup;
mod shell;
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
        /// After `kernels`: only this test program, of those that run there.
        #[arg(long, value_name = "NAME")]
        only: Option<String>,
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
    /// Measure: what replication costs, beside its limits and its peers.
    Bench(bench::Settings),
    /// Check the rules of the repository itself.
    Tidy,
}

fn main() -> anyhow::Result<ExitCode> {
    // `cargo xtask run -- --path DIR -- CMD`: the first `--` only ends cargo's own habit.
    let mut words: Vec<_> = std::env::args_os().collect();
    if words.get(1).is_some_and(|w| w == "run") && words.get(2).is_some_and(|w| w == "--") {
        words.remove(2);
    }
    match Arguments::parse_from(words).command {
        Task::Test { filter: Some(word), versions, only, .. } if word == "kernels" => {
            return kernels::test(&versions, only.as_deref());
        }
        Task::Test { long, filter, .. } => return test::test(long, filter.as_deref()),
        Task::Setup { criu } => {
            setup::setup(criu)?;
        }
        Task::Ebpf => {
            setup::setup(false)?;
            ebpf::build()?;
        }
        Task::Run { path, command } => demo::run(path, command)?,
        Task::Bench(settings) => bench::run(&settings)?,
        Task::Tidy => tidy::tidy()?,
    }
    Ok(ExitCode::SUCCESS)
}
