//! One run of a workload, alone or with something beside it: inputs, the handshake around the measured part, and
//! its time.
//!
//! Pinned, the program has core 0 and everything else core 1, and the store or copy stands in memory: two machines
//! would share neither a core nor a disk. The measured part begins when everything that the workload prepared is
//! replicated and synced, and ends before the program does.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bfs_tests::exercise;
use bfs_tests::watch::until;
use bfs_tests::world::{Transport, World, binary, command_ok, number_named};

use super::peers::{Peer, equal_after};
use super::workloads::Workload;

/// The program's core, and that of the others.
pub const PROGRAM_CPU: usize = 0;
pub const OTHER_CPU: usize = 1;
/// Longest that one run may take.
const LIMIT: Duration = Duration::from_secs(900);
/// Room for a store: the most that a workload writes, in the log and in the tree, and as much again.
const STORE_MEBIBYTES: u64 = 5 << 10;

/// What is beside the program.
#[derive(Clone, Copy)]
pub enum Beside<'a> {
    /// Nothing.
    Nothing,
    /// An agent and a replayer of ours.
    Replication,
    /// What people would use instead.
    Peer(&'a dyn Peer),
}

/// How a workload is run.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// What is run.
    pub workload: &'a Workload,
    /// How much of it; see [`Workload`].
    pub amount: u64,
    /// Folder with what the workload reads.
    pub inputs: &'a Path,
    /// Whether program and others have a core each.
    pub pinned: bool,
}

/// What one run gave.
pub struct Measured {
    /// That the measured part took.
    pub seconds: f64,
    /// Seconds until a peer's copy was equal, if it ever was; nothing where that was not looked at.
    pub equal_after: Option<Option<f64>>,
}

impl Run<'_> {
    /// Runs it once. `compare`: our backup must equal the files afterwards, and a peer's copy is waited for.
    ///
    /// # Errors
    /// When the workload or what is beside it fails.
    pub fn measure(&self, beside: Beside, compare: bool) -> Result<Measured> {
        let mut world = World::new("bench", Transport::Tcp)?;
        let measured = match beside {
            Beside::Replication => self.replicated(&mut world, compare),
            Beside::Nothing | Beside::Peer(_) => self.alone(&mut world, beside, compare),
        };
        if measured.is_err() {
            world.print_logs();
        }
        measured.with_context(|| self.workload.name.to_owned())
    }

    fn replicated(&self, world: &mut World, compare: bool) -> Result<Measured> {
        self.place_store(world)?;
        world.checkpoints("every=1s");
        world.start_replayer()?;
        let line = self.command(world);
        world.run(&line)?;
        world.checkpoint()?;
        let seconds = self.work(world)?;
        let status = world.finish()?;
        ensure!(status.success(), "the program ended with {status}");
        if compare {
            // The agent ends when the last checkpoint is confirmed.
            until("the last checkpoint to be applied", LIMIT, || {
                let status = world.replayer_status().ok()?;
                let number = |name: &str| number_named(&status, &[name]);
                (number("applied")? >= number("confirmed")?).then_some(())
            })?;
            exercise::equal(world)?;
        }
        Ok(Measured { seconds, equal_after: None })
    }

    fn alone(&self, world: &mut World, beside: Beside, compare: bool) -> Result<Measured> {
        self.place_store(world)?;
        let begun = match beside {
            Beside::Peer(peer) => Some(peer.begin(world, self.pinned.then_some(OTHER_CPU))?),
            _ => None,
        };
        let mut line = begun.as_ref().map_or(Vec::new(), |begun| begun.before.clone());
        line.extend(self.command(world));
        world.start_program(&line)?;
        let seconds = self.work(world)?;
        until("the program to end", LIMIT, || (!world.program_runs()).then_some(()))?;
        let copy = begun.as_ref().and_then(|begun| begun.copy.as_ref()).filter(|_| compare);
        Ok(Measured { seconds, equal_after: copy.map(|copy| equal_after(&world.place.data, copy)) })
    }

    fn place_store(&self, world: &mut World) -> Result<()> {
        if self.pinned {
            world.pin_daemons(OTHER_CPU);
            world.store_apart(STORE_MEBIBYTES)?;
        }
        Ok(())
    }

    /// The measured part, in seconds; the program waits for its beginning.
    fn work(&self, world: &World) -> Result<f64> {
        // Nothing of what came before may still be on its way to the disk.
        command_ok(Command::new("sync").arg("-f").arg(&world.place.data))?;
        fs::write(world.place.aux.join("go"), "")?;
        let end = world.place.aux.join("end");
        until("the workload", LIMIT, || (end.exists() || !world.program_runs()).then_some(()))?;
        ensure!(end.exists(), "the workload failed");
        self.measured(world)
    }

    /// The workload as a shell has it, with the handshake.
    fn command(&self, world: &World) -> Vec<String> {
        let script = format!(
            "set -eu; data=$1 inputs=$2 tool=$3 aux=$4 amount=$5\n{}\n\
             : > \"$aux/ready\"; while [ ! -e \"$aux/go\" ]; do sleep 0.01; done\n\
             date +%s%N > \"$aux/begin\"\n{}\n\
             date +%s%N > \"$aux/end.new\"; mv \"$aux/end.new\" \"$aux/end\"\n{}\n",
            self.workload.prepare, self.workload.work, self.workload.after
        );
        let mut line = Vec::new();
        if self.pinned {
            line.extend(["taskset".to_owned(), "-c".to_owned(), PROGRAM_CPU.to_string()]);
        }
        line.extend(["/bin/sh", "-c", &script, "sh"].map(str::to_owned));
        let tool = binary("bfs-workload");
        for path in [&world.place.data, self.inputs, tool.as_path(), &world.place.aux] {
            line.push(path.display().to_string());
        }
        line.push(self.amount.to_string());
        line
    }

    /// What the workload says that it took, or else the time between its two stamps.
    fn measured(&self, world: &World) -> Result<f64> {
        let number = |name: &str| -> Result<f64> {
            let path = world.place.aux.join(name);
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            text.trim().parse().with_context(|| format!("{name} has {text:?}"))
        };
        if world.place.aux.join("milliseconds").exists() {
            return Ok(number("milliseconds")? / 1e3);
        }
        Ok((number("end")? - number("begin")?) / 1e9)
    }
}

/// The same things again and again, each time beginning with another one: whoever comes second finds a warmer
/// machine. What `measure` gives for each of the `settings`.
///
/// # Errors
/// Of the first that fails.
pub fn by_turns<T>(
    settings: &[T],
    repetitions: usize,
    mut measure: impl FnMut(&T, usize) -> Result<f64>,
) -> Result<Vec<Vec<f64>>> {
    let mut samples = vec![Vec::new(); settings.len()];
    for round in 0..repetitions {
        for turn in 0..settings.len() {
            let at = (round + turn) % settings.len();
            samples[at].push(measure(&settings[at], round)?);
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::by_turns;

    #[test]
    fn everybody_begins_once() {
        let mut order = Vec::new();
        let samples = by_turns(&[1.0, 2.0], 2, |setting, _| {
            order.push(*setting);
            Ok(*setting)
        });
        assert_eq!(samples.unwrap(), [[1.0, 1.0], [2.0, 2.0]]);
        assert_eq!(order, [1.0, 2.0, 2.0, 1.0]);
    }
}
