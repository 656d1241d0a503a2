//! What replication costs a program, as the ratio of its time with and without.
//!
//! Pinned as on two machines (see [`super::stage`]), which is what the aims are for, and unpinned with the store on
//! the program's disk, for the record. After the last pinned run of each workload the backup is compared.

use anyhow::Result;

use super::Settings;
use super::leftovers;
use super::report::Report;
use super::row::{Aim, Row};
use super::stage::{Beside, Run, by_turns};
use super::workloads::WORKLOADS;

pub const ABOUT: &str = "time of a program with replication, by its time without";

/// Measured so often, pinned and unpinned.
const REPETITIONS: [usize; 2] = [5, 3];

/// See the module.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    for workload in WORKLOADS.iter().filter(|workload| settings.takes(workload.name)) {
        let inputs = leftovers::folder()?;
        if let Err(why) = workload.provide(inputs.path()) {
            report.add(Row::not_here(workload.name, &why));
            continue;
        }
        for (pinned, usual) in [(true, REPETITIONS[0]), (false, REPETITIONS[1])] {
            let run = Run {
                workload,
                amount: settings.sized(workload.amounts[0], workload.amounts[2]),
                inputs: inputs.path(),
                pinned,
            };
            let repetitions = settings.repetitions(usual);
            let measured = by_turns(&[Beside::Nothing, Beside::Replication], repetitions, |beside, round| {
                Ok(run.measure(*beside, pinned && round + 1 == repetitions)?.seconds)
            });
            let name = if pinned { workload.name.to_owned() } else { format!("{}, unpinned", workload.name) };
            let rows = measured.map(|mut samples| {
                let with = samples.remove(1);
                let row = Row::new(&name, "s", samples.remove(0), with);
                vec![match workload.aim.filter(|_| pinned) {
                    Some(aim) => row.aim(Aim::RatioAtMost(aim)),
                    None => row,
                }]
            });
            report.attempt(&name, rows);
        }
    }
    Ok(())
}
