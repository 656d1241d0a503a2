//! Short sequences of operations over the whole operation set, each in a directory of its own.
//!
//! The program reads batches of sequences from files beside its data (`aux/batch-N`), does them, and
//! waits at barriers (`aux/at-N-ROUND`, then `aux/go-N-ROUND`), where the test compares: it rests
//! then, so a plain checkpoint has to equal the files. A batch goes *in steps* (a barrier after each
//! operation of all its sequences, so each operation meets a model without anything suspect in it) or
//! *at once* (one barrier at the end). A sequence with a [`CHECKPOINT`] in it has two halves, between which
//! there is a barrier, or the end of a process: what they leave stays there, to be brought back ([`Back`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Place, Program, workload};
use crate::watch::until;

mod back;
mod hunt;
mod site;
mod table;

pub use back::{Back, Way};
pub use hunt::{Failure, Hunt, shrink};
pub use site::Paths;
use site::Site;
pub use table::{CHECKPOINT, Operation, all, core, parse};

/// Operations one after the other.
pub type Sequence = Vec<Operation>;

/// Where the barriers of a batch are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// At the end.
    AtOnce,
    /// At the beginning and after each operation.
    Steps,
    /// At the [`CHECKPOINT`] and at the end; the directories stay.
    Halves,
    /// At the [`CHECKPOINT`], where it ends; the directories stay.
    FirstHalf,
    /// At the end. It begins at the [`CHECKPOINT`], in the directories that are there, which stay.
    SecondHalf,
}

impl Pace {
    const ALL: [Self; 5] = [Self::AtOnce, Self::Steps, Self::Halves, Self::FirstHalf, Self::SecondHalf];

    /// Barriers behind the first one.
    fn rounds(self, sequences: &[Sequence]) -> usize {
        match self {
            Self::AtOnce | Self::FirstHalf | Self::SecondHalf => 0,
            Self::Steps => sequences.iter().map(Vec::len).max().unwrap_or(0),
            Self::Halves => 1,
        }
    }

    /// What is done before a barrier, the first being 0.
    fn part(self, sequence: &[Operation], round: usize) -> &[Operation] {
        let middle = sequence.iter().position(|operation| *operation == CHECKPOINT);
        let (before, after) =
            middle.map_or((sequence, &[][..]), |middle| (&sequence[..middle], &sequence[middle + 1..]));
        match (self, round) {
            (Self::AtOnce, 0) => sequence,
            (Self::Steps, 1..) => sequence.get(round - 1..round).unwrap_or(&[]),
            (Self::Halves | Self::FirstHalf, 0) => before,
            (Self::Halves, 1) | (Self::SecondHalf, 0) => after,
            _ => &[],
        }
    }

    const fn leaves_all(self) -> bool {
        matches!(self, Self::Halves | Self::FirstHalf | Self::SecondHalf)
    }
}

/// How a batch is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Threads that share the sequences among them; more than one changes how probes can read.
    pub threads: usize,
    /// How paths are given.
    pub paths: Paths,
    /// Its barriers.
    pub pace: Pace,
}

impl Manner {
    fn text(self) -> String {
        format!("{} {:?} {:?}", self.threads, self.paths, self.pace)
    }

    fn parse(text: &str) -> Option<Self> {
        let [threads, paths, pace] = text.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let all = [Paths::Absolute, Paths::Descriptor, Paths::Above, Paths::Working];
        Some(Self {
            threads: threads.parse().ok()?,
            paths: all.into_iter().find(|p| format!("{p:?}") == paths)?,
            pace: Pace::ALL.into_iter().find(|p| format!("{p:?}") == pace)?,
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
    let pace = manner.pace;
    let make = |index: usize| {
        let [directory, outside] = [&directory, &outside].map(|above| above.join(index.to_string()));
        if pace == Pace::SecondHalf {
            Site::existing(&directory, &outside, manner.paths)
        } else {
            Site::new(&directory, &outside, manner.paths)
        }
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
                        pace.part(sequence, 0).iter().for_each(|operation| site.run(operation));
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
    for round in 1..=pace.rounds(sequences) {
        std::thread::scope(|scope| {
            for (chunk, sites) in sequences.chunks(per_thread).zip(&mut sites) {
                let work = move || {
                    for (sequence, site) in chunk.iter().zip(sites) {
                        pace.part(sequence, round).iter().for_each(|operation| site.run(operation));
                    }
                };
                if manner.threads == 1 {
                    work();
                } else {
                    scope.spawn(work);
                }
            }
        });
        barrier(round)?;
    }
    drop(sites);
    if pace.leaves_all() {
        return Ok(());
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_and_steps_are_all_of_a_sequence() {
        let [one, two, three] = [0, 1, 2].map(|n| all(false)[n]);
        let halves = [one, CHECKPOINT, two, three];
        assert_eq!(
            [Pace::Halves.part(&halves, 0), Pace::Halves.part(&halves, 1)],
            [&[one][..], &[two, three]]
        );
        assert_eq!(Pace::FirstHalf.part(&halves, 0), [one]);
        assert_eq!(Pace::SecondHalf.part(&halves, 0), [two, three]);
        let whole = [one, two];
        let steps: Vec<_> = (0..=4).map(|round| Pace::Steps.part(&whole, round)).collect();
        assert_eq!(steps, [&[][..], &[one], &[two], &[], &[]]);
        assert_eq!(Pace::AtOnce.part(&whole, 0), whole);
    }
}
