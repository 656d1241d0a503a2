//! `cargo xtask bench`: what the project says of its speed, measured, beside its limits and its peers.
//!
//! Each bench yields rows ([`row`]): a name, a unit, the samples of what was measured and those of its baseline,
//! taken by turns in the same run, and where there is an aim whether it is met. A figure counts as a ratio of
//! medians within one run. What cannot be measured on this machine is a row that says why. A table is printed as the rows
//! come, and each bench leaves NAME.json and NAME.svg ([`report`], [`plot`]).

mod checkpoints;
mod docs;
mod leftovers;
mod machine;
mod overhead;
mod peers;
mod pipeline;
mod plot;
mod process;
mod report;
mod rollback;
mod row;
mod scale;
mod stage;
mod strangers;
mod sustained;
mod workloads;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use crate::demo::release_binaries;
use crate::shell::target;
use report::Report;

/// What `cargo xtask bench` is told.
#[derive(Args)]
pub struct Settings {
    /// overhead, peers, strangers, pipeline, checkpoints, sustained, scale, rollback or process; all of them
    /// without a name. `docs` puts what was measured last into docs/performance.md.
    pub name: Option<String>,
    /// Only rows whose name holds this; of the others what an earlier run found is kept.
    pub filter: Option<String>,
    /// A short run, to see that all works: its figures are no good.
    #[arg(long)]
    quick: bool,
    /// Also what takes long: a million files, every workload beside every peer.
    #[arg(long, conflicts_with = "quick")]
    long: bool,
    /// How often each thing is measured, instead of what the bench thinks right.
    #[arg(long)]
    repetitions: Option<usize>,
    /// Folder for NAME.json and NAME.svg [default: target/bench]
    #[arg(long)]
    out: Option<PathBuf>,
}

impl Settings {
    /// Whether a row of this name is wanted.
    fn takes(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }

    /// How often something is measured, that is else measured so often.
    fn repetitions(&self, usual: usize) -> usize {
        self.repetitions.unwrap_or(if self.quick { 1 } else { usual }).max(1)
    }

    /// One size for a short run, another for the usual.
    fn sized<T>(&self, quick: T, usual: T) -> T {
        if self.quick { quick } else { usual }
    }

    fn out(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| target().join("bench"))
    }
}

/// A bench: its name, what it measures, and how.
struct Bench {
    name: &'static str,
    about: &'static str,
    run: fn(&Settings, &mut Report) -> Result<()>,
}

const BENCHES: [Bench; 9] = [
    Bench { name: "overhead", about: overhead::ABOUT, run: overhead::run },
    Bench { name: "peers", about: peers::ABOUT, run: peers::run },
    Bench { name: "strangers", about: strangers::ABOUT, run: strangers::run },
    Bench { name: "pipeline", about: pipeline::ABOUT, run: pipeline::run },
    Bench { name: "checkpoints", about: checkpoints::ABOUT, run: checkpoints::run },
    Bench { name: "sustained", about: sustained::ABOUT, run: sustained::run },
    Bench { name: "scale", about: scale::ABOUT, run: scale::run },
    Bench { name: "rollback", about: rollback::ABOUT, run: rollback::run },
    Bench { name: "process", about: process::ABOUT, run: process::run },
];

/// Runs what was asked for. Missing an aim is reported, and is no error: it is a measurement.
pub fn run(settings: &Settings) -> Result<()> {
    if settings.name.as_deref() == Some("docs") {
        return docs::write(&settings.out());
    }
    let chosen: Vec<&Bench> = BENCHES
        .iter()
        .filter(|bench| settings.name.as_deref().is_none_or(|name| name == bench.name))
        .collect();
    if chosen.is_empty() {
        let names: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
        bail!("no bench is named so: there are {}, and docs", names.join(", "));
    }
    release_binaries()?;
    leftovers::sweep();
    let mut failed = Vec::new();
    for bench in chosen {
        let mut report = Report::begin(bench.name, bench.about, settings.quick)?;
        // What was measured before a failure is kept.
        if let Err(why) = (bench.run)(settings, &mut report) {
            println!("{} failed: {why:#}", bench.name);
            report.failed = true;
        }
        if report.failed {
            failed.push(bench.name);
        }
        if settings.filter.is_some()
            && let Some(earlier) = Report::read(&settings.out(), bench.name)?
        {
            report.keep(earlier);
        }
        report.write(&settings.out())?;
    }
    if failed.is_empty() { Ok(()) } else { bail!("failed: {}", failed.join(", ")) }
}
