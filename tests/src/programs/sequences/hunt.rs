//! The other side of the program: gives batches, compares at the barriers, makes failures small.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, ensure};

use super::{CHECKPOINT, Manner, PATIENCE, Pace, Sequence, barrier_file, batch_file};
use crate::oracle;
use crate::programs::Place;
use crate::watch::until;
use crate::world::World;

/// A sequence after which the backup differed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// As text.
    pub sequence: String,
    /// After which operation, where it was done in steps (0: before the first).
    pub round: usize,
    /// What differed.
    pub differences: Vec<String>,
}

/// See the module.
pub struct Hunt<'a> {
    world: &'a World,
    batch: usize,
}

impl<'a> Hunt<'a> {
    /// In a world where [`super::Sequences`] runs.
    #[must_use]
    pub const fn new(world: &'a World) -> Self {
        Self { world, batch: 0 }
    }

    /// Does the sequences and compares; those after which something differed.
    ///
    /// # Errors
    /// When the program or a checkpoint fails.
    pub fn batch(&mut self, manner: Manner, sequences: &[Sequence]) -> Result<Vec<Failure>> {
        let (place, batch) = (&self.world.place, self.batch);
        self.batch += 1;
        give(place, batch, manner, sequences)?;
        let rounds = manner.pace.rounds(sequences);
        let mut failures: BTreeMap<usize, Failure> = BTreeMap::new();
        for round in 0..=rounds {
            let at = barrier_file(place, "at", batch, round);
            while !at.exists() {
                ensure!(self.world.program_runs(), "the program ended in batch {batch}");
                if manner.pace == Pace::Steps {
                    until("a batch", PATIENCE, || (at.exists() || !self.world.program_runs()).then_some(()))?;
                } else {
                    // Cuts in between: what they settle, later calls build on.
                    self.world.checkpoint()?;
                }
            }
            self.world.checkpoint()?;
            note(
                &mut failures,
                batch,
                round,
                sequences,
                oracle::compare(&place.data, &self.world.backup())?,
            )?;
            fs::write(barrier_file(place, "go", batch, round), "")?;
        }
        Ok(failures.into_values().collect())
    }
}

/// Gives the program a batch.
pub(super) fn give(place: &Place, batch: usize, manner: Manner, sequences: &[Sequence]) -> Result<()> {
    let mut text = manner.text();
    for sequence in sequences {
        text.push('\n');
        text.push_str(&shown(sequence));
    }
    text.push('\n');
    // Renamed into place: the program must not read half of it.
    let half = place.aux.join("next-batch");
    fs::write(&half, text)?;
    fs::rename(&half, batch_file(place, batch))?;
    Ok(())
}

/// Each of these lines is of one sequence; of each the first round counts in which something differs.
pub(super) fn note(
    failures: &mut BTreeMap<usize, Failure>,
    batch: usize,
    round: usize,
    sequences: &[Sequence],
    lines: Vec<String>,
) -> Result<()> {
    // How many more there are is of nobody.
    for line in lines.into_iter().filter(|line| !line.starts_with("and ")) {
        let index = index_of(&line, batch)
            .filter(|i| *i < sequences.len())
            .with_context(|| format!("not of one sequence: {line}"))?;
        let failure = failures.entry(index).or_insert_with(|| Failure {
            sequence: shown(&sequences[index]),
            round,
            differences: Vec::new(),
        });
        if failure.round == round {
            failure.differences.push(line);
        }
    }
    Ok(())
}

/// Leaves out operations for as long as something still differs after a batch of what is left; gives the shortest.
///
/// # Errors
/// As the batches.
pub fn shrink(
    failure: Failure,
    mut batch: impl FnMut(&[Sequence]) -> Result<Vec<Failure>>,
) -> Result<Failure> {
    let mut smallest = failure;
    loop {
        let operations: Sequence = smallest.sequence.split_whitespace().filter_map(super::parse).collect();
        let shorter: BTreeSet<String> = (0..operations.len())
            .filter(|left_out| operations[*left_out] != CHECKPOINT)
            .map(|left_out| {
                let mut operations = operations.clone();
                operations.remove(left_out);
                shown(&operations)
            })
            .collect();
        let shorter: Vec<Sequence> = shorter
            .iter()
            .map(|text| text.split_whitespace().filter_map(super::parse).collect())
            .filter(|sequence: &Sequence| !sequence.is_empty())
            .collect();
        if shorter.is_empty() {
            return Ok(smallest);
        }
        match batch(&shorter)?.into_iter().next() {
            Some(next) => smallest = next,
            None => return Ok(smallest),
        }
    }
}

fn shown(sequence: &[super::Operation]) -> String {
    sequence.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// The number of the sequence that a difference belongs to.
fn index_of(line: &str, batch: usize) -> Option<usize> {
    let (_, rest) = line.split_once(&format!("batch-{batch}/"))?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_of_the_sequence_in_its_path() {
        assert_eq!(index_of("batch-3/17/d/x: mode is ..", 3), Some(17));
        assert_eq!(index_of("[\"batch-3/4/a\", \"batch-3/4/n\"] are one file", 3), Some(4));
        assert_eq!(index_of("batch-2/4/a: ..", 3), None);
    }
}
