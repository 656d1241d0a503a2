//! What people would use instead, beside the same workloads in the same run.
//!
//! Peers that watch and copy afterwards cost a program little while they have a core of their own, and the copy is no
//! state that ever existed; those that copy with each call are what stands against a call that is captured. What a
//! peer is stands in its rows, with the time until its copy was equal after the program's end.

mod forwarder;
mod gluster;
mod strace;
mod watchers;

use std::any::Any;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Error, Result};
use bfs_tests::watch::until;
use bfs_tests::world::World;

use super::Settings;
use super::leftovers;
use super::report::Report;
use super::row::{Aim, Row};
use super::stage::{Beside, Run};
use super::workloads::{WORKLOADS, Workload};
use crate::setup::{self, Tool};

pub const ABOUT: &str = "time of a program beside what people would use instead, by its time alone; pinned";

/// The two who are no peers.
const ALONE: &str = "alone";
const BFS: &str = "bfs";
/// Longest that a copy is waited for.
const EQUAL_WITHIN: Duration = Duration::from_secs(60);

/// Something that can be used instead.
pub trait Peer {
    /// As the table has it.
    fn name(&self) -> &'static str;
    /// What it does, in a few words.
    fn kind(&self) -> &'static str;
    /// Whether it keeps a copy.
    fn copies(&self) -> bool {
        true
    }
    /// What it needs.
    fn tools(&self) -> &'static [Tool];
    /// Starts it, on this core only, for what will be done in `world.place.data`, which it may change.
    ///
    /// # Errors
    /// When it does not come.
    fn begin(&self, world: &mut World, cpu: Option<usize>) -> Result<Begun>;
}

/// A peer at work.
pub struct Begun {
    /// Words before the command line of the program.
    pub before: Vec<String>,
    /// The copy.
    pub copy: Option<PathBuf>,
    /// Ends it when dropped.
    #[expect(dead_code, reason = "it is kept, and nothing else")]
    pub guard: Box<dyn Any>,
}

/// A process that ends with its owner.
pub struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a script on this core; it has the world's directories as `$1` (data) and `$2` (aux).
fn daemon(world: &World, cpu: Option<usize>, script: &str) -> Result<Daemon> {
    let pinned = cpu.map_or(String::new(), |cpu| format!("taskset -cp {cpu} $$ > /dev/null; "));
    Ok(Daemon(world.spawn_shell(&format!("{pinned}{script}"))?))
}

/// Seconds until the copy equals the program's files; none when it did not in time.
pub fn equal_after(data: &Path, copy: &Path) -> Option<f64> {
    let begun = Instant::now();
    until("the copy to be equal", EQUAL_WITHIN, || {
        let mut diff = Command::new("diff");
        diff.args(["-rq", "--no-dereference", "-x", ".glusterfs", "-x", ".stfolder"]).args([data, copy]);
        diff.output().is_ok_and(|done| done.status.success()).then(|| begun.elapsed().as_secs_f64())
    })
    .ok()
}

/// Everybody that a workload is run with.
struct Entrant<'a> {
    beside: Beside<'a>,
    name: &'static str,
    kind: &'static str,
    copies: bool,
    samples: Vec<f64>,
    /// Of the last run: until its copy was equal, and whether it has one.
    equal_after: Option<Option<f64>>,
    out: Option<Row>,
}

/// See the module.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let forwarder = forwarder::Forwarder::new();
    let (lsyncd, syncthing, rsync) = (watchers::Lsyncd, watchers::Syncthing, watchers::RsyncLoop);
    let peers: [&dyn Peer; 6] = [&strace::Strace, &lsyncd, &syncthing, &rsync, &gluster::Gluster, &forwarder];
    // Once for each peer, not once for each workload.
    let provided: Vec<(&dyn Peer, Result<()>)> =
        peers.into_iter().map(|peer| (peer, setup::tools(peer.tools()))).collect();
    for workload in WORKLOADS.iter().filter(|w| w.beside_peers || settings.long) {
        let wanted = |name: &str| settings.takes(&row_name(workload, name));
        if !wanted(BFS) && !peers.iter().any(|peer| wanted(peer.name())) {
            continue;
        }
        let inputs = leftovers::folder()?;
        if let Err(why) = workload.provide(inputs.path()) {
            report.add(Row::not_here(workload.name, &why));
            continue;
        }
        beside_all(settings, workload, inputs.path(), &provided, report);
    }
    Ok(())
}

fn beside_all(
    settings: &Settings,
    workload: &Workload,
    inputs: &Path,
    peers: &[(&dyn Peer, Result<()>)],
    report: &mut Report,
) {
    let entrant = |beside, name, kind, copies| Entrant {
        beside,
        name,
        kind,
        copies,
        samples: Vec::new(),
        equal_after: None,
        out: None,
    };
    let mut all = vec![
        entrant(Beside::Nothing, ALONE, "", false),
        entrant(Beside::Replication, BFS, "captured, whole checkpoints", true),
    ];
    for (peer, provided) in peers {
        let mut entrant = entrant(Beside::Peer(*peer), peer.name(), peer.kind(), peer.copies());
        entrant.out = provided.as_ref().err().map(|why| not_here(workload, peer.name(), why));
        all.push(entrant);
    }
    all.retain(|entrant| entrant.name == ALONE || settings.takes(&row_name(workload, entrant.name)));
    let run = Run { workload, amount: workload.amounts[settings.sized(0, 1)], inputs, pinned: true };
    for round in 0..settings.repetitions(3) {
        for turn in 0..all.len() {
            let at = (round + turn) % all.len();
            let entrant = &mut all[at];
            if entrant.out.is_some() {
                continue;
            }
            match run.measure(entrant.beside, round == 0) {
                Ok(measured) => {
                    entrant.samples.push(measured.seconds);
                    entrant.equal_after = entrant.equal_after.or(measured.equal_after);
                }
                Err(why) => entrant.out = Some(not_here(workload, entrant.name, &why)),
            }
        }
    }
    rows(workload, &all).into_iter().for_each(|row| report.add(row));
}

fn not_here(workload: &Workload, name: &str, why: &Error) -> Row {
    Row::not_here(row_name(workload, name), why)
}

fn row_name(workload: &Workload, name: &str) -> String {
    format!("{}: {name}", workload.name)
}

fn rows(workload: &Workload, all: &[Entrant]) -> Vec<Row> {
    let alone = &all[0].samples;
    let mut rows: Vec<Row> = all[1..]
        .iter()
        .map(|entrant| {
            if let Some(out) = &entrant.out {
                return out.clone();
            }
            let equal = match entrant.equal_after {
                None => String::new(),
                Some(Some(seconds)) => format!("; copy equal {seconds:.1} s after the end"),
                Some(None) => format!("; copy not equal {} s after the end", EQUAL_WITHIN.as_secs()),
            };
            let name = row_name(workload, entrant.name);
            Row::new(name, "s", alone.clone(), entrant.samples.clone())
                .note(format!("{}{equal}", entrant.kind))
        })
        .collect();
    let others = rows.iter().zip(&all[1..]).filter(|(_, entrant)| entrant.copies && entrant.name != BFS);
    let best = others.filter_map(|(row, _)| row.ratio()).min_by(f64::total_cmp);
    // Ahead of every peer that replicates.
    if let Some(at) = all[1..].iter().position(|entrant| entrant.name == BFS) {
        rows[at].aim = best.map(Aim::RatioAtMost);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_are_to_be_ahead_of_those_that_copy() {
        let entrant = |name, copies, seconds| Entrant {
            beside: Beside::Nothing,
            name,
            kind: "",
            copies,
            samples: vec![seconds],
            equal_after: Some(None),
            out: None,
        };
        let mut all = [(ALONE, 1.0), (BFS, 1.2), ("traces", 1.1), ("copies", 1.5), ("other", 9.0)]
            .map(|(name, seconds)| entrant(name, name != "traces", seconds));
        assert_eq!(rows(&WORKLOADS[0], &all)[0].aim, Some(Aim::RatioAtMost(1.5)));
        all[3].out = Some(Row::not_here("copies", &anyhow::anyhow!("why")));
        let rows = rows(&WORKLOADS[0], &all);
        assert_eq!((rows[0].aim, rows.len()), (Some(Aim::RatioAtMost(9.0)), 4));
        assert_eq!(rows[2].note, "not here: why");
    }
}
