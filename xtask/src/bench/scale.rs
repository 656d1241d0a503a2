//! What grows with the number of files: start, memory, idle CPU, checkpoints.
//!
//! The start is that of a first session, with a store that has nothing: it runs from the agent's own start until
//! its first checkpoint is confirmed, so all files were read, sent and synced. Beside it `find -printf` with all
//! attributes, which only looks, with everything in the kernel's memory both times.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World, command_ok};

use super::Settings;
use super::checkpoints::populate;
use super::report::Report;
use super::row::{Aim, Row, percentile};
use super::strangers::cpu_seconds;

pub const ABOUT: &str = "what grows with the number of files";

/// By `find`.
const START_AIM: f64 = 1.5;
/// The ring, and what the agent may have beside it.
const RING_MIB: f64 = 64.0;
const ROOM_MIB: f64 = 64.0;
const BYTES_PER_FILE: f64 = 200.0;
/// Percent of a core.
const IDLE_AIM: f64 = 0.5;

/// See the module.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut numbers = settings.sized(vec![1_000], vec![10_000, 100_000]);
    numbers.extend(settings.long.then_some(1_000_000));
    for files in numbers {
        if settings.takes(&format!("{files} files")) {
            report.attempt(&format!("{files} files"), measure(settings, files));
        }
    }
    Ok(())
}

fn measure(settings: &Settings, files: u64) -> Result<Vec<Row>> {
    let mut found = Vec::new();
    let mut starts = [Vec::new(), Vec::new()];
    let mut last = None;
    for _ in 0..settings.repetitions(3) {
        // Each start is a first one: the world of the one before is gone.
        drop(last.take());
        let mut world = World::new("bench-scale", Transport::Unix)?;
        populate(&world.place.data.join("untouched"), files)?;
        command_ok(Command::new("sync").arg("-f").arg(&world.place.data))?;
        find(&world)?;
        found.push(find(&world)?);
        world.start_replayer()?;
        let begun = Instant::now();
        world.run(&waiting(&world))?;
        starts[0].push(begun.elapsed().as_secs_f64());
        world.checkpoint_until("confirmed")?;
        starts[1].push(begun.elapsed().as_secs_f64());
        last = Some(world);
    }
    let mut world = last.context("at least one")?;
    world.checkpoint()?;
    let memory_mib = memory_mib(world.agent_pid()?)?;
    let (agent, time) = (world.agent_pid()?, Duration::from_secs(settings.sized(2, 10)));
    let before = cpu_seconds(agent)?;
    std::thread::sleep(time);
    let idle = 100.0 * (cpu_seconds(agent)? - before) / time.as_secs_f64();
    let mut taken = Vec::new();
    for n in 0..settings.sized(5, 50) {
        let line = format!("{n}\n");
        fs::write(world.place.aux.join("touch"), &line)?;
        let one = world.place.data.join("one");
        until("the change", SOON, || fs::read_to_string(&one).is_ok_and(|text| text == line).then_some(()))?;
        let asked = Instant::now();
        world.checkpoint_until("confirmed")?;
        taken.push(asked.elapsed().as_secs_f64() * 1e3);
    }
    fs::write(world.place.aux.join("touch"), "end\n")?;
    ensure!(world.finish()?.success(), "the waiting program failed");
    let name = |what: &str| format!("{files} files: {what}");
    let [follows, confirmed] = starts;
    let bound_mib = ROOM_MIB + RING_MIB + BYTES_PER_FILE * files as f64 / (1 << 20) as f64;
    let checkpoint = |what: &str, percent| {
        let value = percentile(&taken, percent).into_iter().collect();
        Row::new(name(what), "ms", Vec::new(), value)
    };
    Ok(vec![
        Row::new(name("start until the program works"), "s", found.clone(), follows),
        Row::new(name("start until all is confirmed"), "s", found, confirmed)
            .aim(Aim::RatioAtMost(START_AIM))
            .note("baseline: find -printf"),
        Row::single(name("memory of the agent"), "MiB", memory_mib).aim(Aim::AtMost(bound_mib)),
        Row::single(name("idle CPU of the agent"), "% of a core", idle).aim(Aim::AtMost(IDLE_AIM)),
        checkpoint("a checkpoint of one change confirmed, p50", 50),
        checkpoint("the same, longest", 100),
    ])
}

/// A program that does nothing but put into a file what it is given.
fn waiting(world: &World) -> Vec<String> {
    let script = "mkfifo \"$2/touch\"; : > \"$2/ready\"
        while read -r line < \"$2/touch\" && [ \"$line\" != end ]; do echo \"$line\" > \"$1/one\"; done";
    world.script(script)
}

/// Seconds in which find(1) tells all attributes.
fn find(world: &World) -> Result<f64> {
    let begun = Instant::now();
    let mut find = Command::new("find");
    find.arg(&world.place.data).args(["-printf", "%p %i %n %m %U %G %s %b %A@ %C@ %T@ %y %l\\n"]);
    command_ok(&mut find)?;
    Ok(begun.elapsed().as_secs_f64())
}

/// What a process has in memory, each page once: the ring is mapped twice, so the resident set has it twice.
fn memory_mib(pid: u32) -> Result<f64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = maps.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}
