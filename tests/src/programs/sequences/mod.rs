//! Short sequences of operations over the whole operation set, each in a directory of its own.
//!
//! The program reads batches of sequences from files beside its data (`aux/batch-N`), does them, and
//! waits at barriers (`aux/at-N-ROUND`, then `aux/go-N-ROUND`), where the test compares: it rests
//! then, so a plain checkpoint has to equal the files. A batch goes *in steps* (a barrier after each
//! operation of all its sequences, so each operation meets a model without anything suspect in it) or
//! *at once* (one barrier at the end).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Place, Program, workload};
use crate::watch::until;

mod hunt;
mod site;
mod table;

pub use hunt::{Failure, Hunt};
pub use site::Paths;
use site::Site;
pub use table::{Operation, all, core, parse};

/// Operations one after the other.
pub type Sequence = Vec<Operation>;

/// How a batch is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Threads that share the sequences among them; more than one changes how probes can read.
    pub threads: usize,
    /// How paths are given.
    pub paths: Paths,
    /// A barrier after each operation.
    pub in_steps: bool,
}

impl Manner {
    fn text(self) -> String {
        format!("{} {:?} {}", self.threads, self.paths, self.in_steps)
    }

    fn parse(text: &str) -> Option<Self> {
        let [threads, paths, in_steps] = text.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let all = [Paths::Absolute, Paths::Descriptor, Paths::Above, Paths::Working];
        Some(Self {
            threads: threads.parse().ok()?,
            paths: all.into_iter().find(|p| format!("{p:?}") == paths)?,
            in_steps: in_steps.parse().ok()?,
        })
    }
}

/// See the module.
pub struct Sequences;

impl Program for Sequences {
    fn name(&self) -> &'static str {
        "sequences"
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
    }

    fn check(&self, _: &Path, _: &Place) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// Longest that either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(600);

fn batch_file(place: &Place, batch: usize) -> PathBuf {
    place.aux.join(format!("batch-{batch}"))
}

fn barrier_file(place: &Place, what: &str, batch: usize, round: usize) -> PathBuf {
    place.aux.join(format!("{what}-{batch}-{round}"))
}

/// The program.
///
/// # Errors
/// What is not one of the operations: making the directories, or a test that went away.
pub fn run(place: &Place) -> Result<()> {
    // A sequence holds four descriptors.
    let files = rustix::process::Resource::Nofile;
    let most = rustix::process::getrlimit(files);
    rustix::process::setrlimit(files, rustix::process::Rlimit { current: most.maximum, ..most })?;
    place.ready()?;
    for batch in 0.. {
        let file = batch_file(place, batch);
        until("the next batch", PATIENCE, || (file.exists() || place.stopping()).then_some(()))?;
        if !file.exists() {
            break;
        }
        let text = fs::read_to_string(&file)?;
        let (manner, sequences) = text.split_once('\n').context("a batch without a manner")?;
        let manner = Manner::parse(manner).with_context(|| format!("no manner: {manner:?}"))?;
        let sequences: Vec<Sequence> = sequences
            .lines()
            .map(|line| line.split_whitespace().map(parse).collect::<Option<_>>().context("no operation"))
            .collect::<Result<_>>()?;
        one_batch(place, batch, manner, &sequences)?;
    }
    Ok(())
}

fn one_batch(place: &Place, batch: usize, manner: Manner, sequences: &[Sequence]) -> Result<()> {
    let (directory, outside) = directories(place, batch);
    let make = |index: usize| {
        Site::new(&directory.join(index.to_string()), &outside.join(index.to_string()), manner.paths)
    };
    let barrier = |round: usize| -> Result<()> {
        fs::write(barrier_file(place, "at", batch, round), "")?;
        let go = barrier_file(place, "go", batch, round);
        until("the comparison", PATIENCE, || (go.exists() || place.stopping()).then_some(()))
    };
    let per_thread = sequences.len().div_ceil(manner.threads).max(1);
    let mut sites: Vec<Vec<Site>> = std::thread::scope(|scope| {
        let parts: Vec<_> = sequences
            .chunks(per_thread)
            .enumerate()
            .map(|(part, chunk)| {
                let work = move || -> Result<Vec<Site>> {
                    let mut sites = Vec::new();
                    for (index, sequence) in chunk.iter().enumerate() {
                        let mut site = make(part * per_thread + index)?;
                        if !manner.in_steps {
                            sequence.iter().for_each(|operation| site.run(operation));
                        }
                        sites.push(site);
                    }
                    Ok(sites)
                };
                // One thread: the main one, so that the process has no other.
                if manner.threads == 1 { Part::Done(work()) } else { Part::Running(scope.spawn(work)) }
            })
            .collect();
        parts.into_iter().map(Part::join).collect::<Result<_>>()
    })?;
    barrier(0)?;
    let rounds = if manner.in_steps { sequences.iter().map(Vec::len).max().unwrap_or(0) } else { 0 };
    for round in 0..rounds {
        std::thread::scope(|scope| {
            for (chunk, sites) in sequences.chunks(per_thread).zip(&mut sites) {
                let work = move || {
                    for (sequence, site) in chunk.iter().zip(sites) {
                        sequence.get(round).into_iter().for_each(|operation| site.run(operation));
                    }
                };
                if manner.threads == 1 {
                    work();
                } else {
                    scope.spawn(work);
                }
            }
        });
        barrier(round + 1)?;
    }
    drop(sites);
    fs::remove_dir_all(&directory)?;
    fs::remove_dir_all(&outside)?;
    Ok(())
}

/// Where a batch works, and what it has outside of the replicated directory.
fn directories(place: &Place, batch: usize) -> (PathBuf, PathBuf) {
    (place.data.join(format!("batch-{batch}")), place.aux.join(format!("outside-{batch}")))
}

enum Part<'scope, T> {
    Done(T),
    Running(std::thread::ScopedJoinHandle<'scope, T>),
}

impl<T> Part<'_, T> {
    fn join(self) -> T {
        match self {
            Self::Done(value) => value,
            Self::Running(handle) => handle.join().expect("a site does not panic"),
        }
    }
}
