//! How long it takes to bring back 10 MiB of a tree of 1 GiB, in 100 files and in 2,560 single pages.
//!
//! Two ways: at the end of `run --rollback-on-failure` (from the end of the command to the end of the
//! agent), and by `bfs-agent rollback` without an agent, which compares everything. Beside
//! them, in the same run, what the program and the disk take for the change itself, synced.
//! Each time the files are compared with a copy.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bfs_tests::programs::rewrite;
use bfs_tests::world::{Transport, World, binary, command_ok};
use bfs_tests::{copy, oracle};

use super::Settings;
use super::report::Report;
use super::row::{Aim, Row};
use super::stage::by_turns;

pub const ABOUT: &str = "bringing 10 MiB of 1 GiB back; the baseline is the change itself, synced";

/// Most that one rollback may take.
const LIMIT: Duration = Duration::from_secs(300);
/// What is aimed at, with capture.
const AIM_S: f64 = 1.0;

/// See the module.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut world = World::new("bench-rollback", Transport::Unix)?;
    rewrite::make(&world.place.data)?;
    let then = world.scratch.join("then");
    copy::exact(&world.place.data, &then)?;
    copy::exact(&world.place.data, &world.scratch.join("other"))?;
    world.start_replayer()?;
    for (name, workload, count) in
        [("100 files", "rewrite-files", "100"), ("2,560 pages", "rewrite-pages", "2560")]
    {
        let data = world.place.data.display().to_string();
        let workload =
            [binary("bfs-workload").display().to_string(), workload.into(), data, "-".into(), count.into()];
        for (how, measure) in [
            ("run --rollback-on-failure", at_the_end as fn(&World, &[String]) -> Result<f64>),
            ("rollback, without an agent", without_agent),
        ] {
            let name = format!("{name}, {how}");
            if !settings.takes(&name) {
                continue;
            }
            let measured = by_turns(&[baseline, measure], settings.repetitions(3), |measure, _| {
                let seconds = measure(&world, &workload)?;
                let differ = oracle::compare(&then, &world.place.data)?;
                ensure!(differ.is_empty(), "{differ:?}");
                Ok(seconds)
            });
            report.attempt(
                &name,
                measured.map(|mut samples| {
                    let taken = samples.remove(1);
                    let row = Row::new(&name, "s", samples.remove(0), taken);
                    vec![if how.starts_with("run") { row.aim(Aim::AtMost(AIM_S)) } else { row }]
                }),
            );
        }
    }
    Ok(())
}

/// The disk alone: the same program writes the same bytes into another copy of the tree, and they are synced.
fn baseline(world: &World, workload: &[String]) -> Result<f64> {
    let other = world.scratch.join("other").display().to_string();
    // What was written before may not count.
    command_ok(&mut Command::new("sync"))?;
    let begun = Instant::now();
    let words = ["-c", "\"$@\" && sync", "sh", &workload[0], &workload[1], &other, "-", &workload[4]];
    command_ok(Command::new("/bin/sh").args(words))?;
    Ok(begun.elapsed().as_secs_f64())
}

/// The agent's end, after its command changed the files, synced them and failed.
fn at_the_end(world: &World, workload: &[String]) -> Result<f64> {
    let end = world.place.aux.join("end");
    // The copy of the state before is not what is measured: it is applied when the program begins.
    let agent = binary("bfs-agent").display().to_string();
    let script = format!(
        "'{agent}' checkpoint --group '{}' --wait applied >/dev/null && \"$@\" && sync && \
         date +%s%N > '{}'; exit 1",
        world.group,
        end.display()
    );
    let (path, backup) = (world.place.data.display().to_string(), world.destination());
    let mut words = vec!["run", "--checkpoint", "manual", "--path", &path, "--backup", &backup];
    words.extend(["--rollback-on-failure", "--", "/bin/sh", "-c", &script, "sh"]);
    words.extend(workload.iter().map(String::as_str));
    let done = world.agent_command(&words, LIMIT)?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
    ensure!(done.status.code() == Some(1), "{done:?}");
    let ended = fs::read_to_string(&end)?.trim().parse::<u64>()? as f64 / 1e9;
    Ok(now - ended)
}

/// A change that nobody saw, brought back by an agent that has to look at everything.
fn without_agent(world: &World, workload: &[String]) -> Result<f64> {
    let status = Command::new(&workload[0]).args(&workload[1..]).stdin(Stdio::null()).status()?;
    ensure!(status.success(), "the program ended with {status}");
    command_ok(&mut Command::new("sync"))?;
    let (path, backup) = (world.place.data.display().to_string(), world.destination());
    let begun = Instant::now();
    let words = ["rollback", "--checkpoint", "manual", "--path", &path, "--backup", &backup];
    let done = world.agent_command(&words, LIMIT)?;
    let seconds = begun.elapsed().as_secs_f64();
    ensure!(done.status.success(), "{done:?}");
    Ok(seconds)
}
