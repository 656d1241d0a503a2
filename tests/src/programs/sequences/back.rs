//! Sequences in two halves: the first is done for real, a checkpoint is taken and the files are copied, the second
//! is done, and the files are brought back. They must be those of the copy, and so must the backup.
//!
//! Every batch has a session of its own: files are brought back when the program has ended.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use super::hunt::{Failure, give, note};
use super::{Manner, PATIENCE, Pace, Paths, Sequence, Sequences, barrier_file, directories};
use crate::copy;
use crate::oracle;
use crate::programs::Program;
use crate::watch::{SOON, until};
use crate::world::{World, command_ok};

/// How files are brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One process does both halves with the same descriptors; `rollback` when it has ended, and then forth again to
    /// what the second half had left.
    ByHand,
    /// The first half is there already; `run --rollback-on-failure` of a process that does the second one.
    OnFailure,
}

/// See the module.
pub struct Back<'a> {
    world: &'a mut World,
    number: usize,
}

impl<'a> Back<'a> {
    /// In a world with a replayer and without a program.
    #[must_use]
    pub const fn new(world: &'a mut World) -> Self {
        Self { world, number: 0 }
    }

    /// Does the halves of the sequences and brings back what the second ones did; those that differ afterwards.
    ///
    /// # Errors
    /// When something fails that is not of one of the sequences.
    pub fn batch(
        &mut self,
        way: Way,
        threads: usize,
        paths: Paths,
        sequences: &[Sequence],
    ) -> Result<Vec<Failure>> {
        self.clear()?;
        self.number += 1;
        let mut failures = BTreeMap::new();
        let manner = |pace| Manner { threads, paths, pace };
        match way {
            Way::ByHand => self.by_hand(manner(Pace::Halves), sequences, &mut failures)?,
            Way::OnFailure => {
                self.on_failure([Pace::FirstHalf, Pace::SecondHalf].map(manner), sequences, &mut failures)?;
            }
        }
        Ok(failures.into_values().collect())
    }

    /// What the batch before left. Its directories have the same names.
    fn clear(&self) -> Result<()> {
        let place = &self.world.place;
        let (directory, outside) = directories(place, 0);
        for old in [directory, outside] {
            if old.exists() {
                fs::remove_dir_all(&old).with_context(|| old.display().to_string())?;
            }
        }
        self.clear_marks()
    }

    fn clear_marks(&self) -> Result<()> {
        for mark in fs::read_dir(&self.world.place.aux)? {
            let mark = mark?;
            if mark.file_type()?.is_file() {
                fs::remove_file(mark.path())?;
            }
        }
        Ok(())
    }

    fn copied(&self, name: &str) -> Result<PathBuf> {
        let to = self.world.scratch.join(format!("{name}-{}", self.number));
        copy::exact(&self.world.place.data, &to)?;
        Ok(to)
    }

    fn by_hand(
        &mut self,
        manner: Manner,
        sequences: &[Sequence],
        failures: &mut BTreeMap<usize, Failure>,
    ) -> Result<()> {
        let place = self.world.place.clone();
        give(&place, 0, manner, sequences)?;
        let command = Sequences.command(&place);
        self.world.run(&command)?;
        self.at_barrier(0)?;
        let number = self.world.checkpoint()?;
        let then = self.copied("then")?;
        fs::write(barrier_file(&place, "go", 0, 0), "")?;
        self.at_barrier(1)?;
        let end = self.copied("end")?;
        fs::write(barrier_file(&place, "go", 0, 1), "")?;
        ensure!(!oracle::compare(&then, &end)?.is_empty(), "there is something to bring back");
        let status = self.world.finish()?;
        ensure!(status.success(), "the program ended with {status}");
        let last = self.world.replayer_status()?["applied"].as_u64().context("no applied checkpoint")?;
        // Forth again only where the way back was right: else the same would be told twice.
        for (to, copy) in [(number, &then), (last, &end)] {
            let (path, backup) = (place.data.display().to_string(), self.world.destination());
            let to = to.to_string();
            let words =
                ["rollback", "--checkpoint", "manual", "--path", &path, "--backup", &backup, "--to", &to];
            let done = self.world.agent_command(&words, SOON * 3)?;
            self.judge(&done, 0, copy, sequences, failures)?;
            if !failures.is_empty() {
                break;
            }
        }
        self.forget(&[then, end])
    }

    fn on_failure(
        &mut self,
        [first, second]: [Manner; 2],
        sequences: &[Sequence],
        failures: &mut BTreeMap<usize, Failure>,
    ) -> Result<()> {
        let place = self.world.place.clone();
        let line = Sequences.command(&place);
        // Told to end before it begins: it waits at no barrier.
        give(&place, 0, first, sequences)?;
        fs::write(place.stop(), "")?;
        command_ok(Command::new(&line[0]).args(&line[1..]))?;
        let then = self.copied("then")?;
        self.clear_marks()?;
        give(&place, 0, second, sequences)?;
        fs::write(place.stop(), "")?;
        let (path, backup) = (place.data.display().to_string(), self.world.destination());
        let mut words = vec!["run", "--checkpoint", "manual", "--path", &path, "--backup", &backup];
        words.extend(["--rollback-on-failure", "--", "/bin/sh", "-c", "\"$@\" && exit 3; exit 4", "sh"]);
        words.extend(line.iter().map(String::as_str));
        let done = self.world.agent_command(&words, SOON * 3)?;
        self.judge(&done, 3, &then, sequences, failures)?;
        self.forget(&[then])
    }

    fn at_barrier(&self, round: usize) -> Result<()> {
        let at = barrier_file(&self.world.place, "at", 0, round);
        until("a half", PATIENCE, || (at.exists() || !self.world.program_runs()).then_some(()))?;
        ensure!(at.exists(), "the program ended in its half {round}");
        Ok(())
    }

    /// What differs from the copy, or what the command said about one of the sequences.
    fn judge(
        &self,
        done: &Output,
        expected: i32,
        copy: &Path,
        sequences: &[Sequence],
        failures: &mut BTreeMap<usize, Failure>,
    ) -> Result<()> {
        if done.status.code() != Some(expected) {
            let text = [&done.stdout, &done.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat();
            let lines = text.lines().filter(|line| line.contains("batch-0/")).map(str::to_owned).collect();
            note(failures, 0, 0, sequences, lines)?;
            ensure!(!failures.is_empty(), "{}: {text}", done.status);
            return Ok(());
        }
        for tree in [&self.world.place.data, &self.world.backup()] {
            note(failures, 0, 0, sequences, oracle::compare(copy, tree)?)?;
        }
        Ok(())
    }

    fn forget(&self, copies: &[PathBuf]) -> Result<()> {
        copies.iter().try_for_each(fs::remove_dir_all)?;
        Ok(())
    }
}
