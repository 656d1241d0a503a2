//! What replication costs everybody else: a system call of a process that is not selected, real programs that make
//! many, and the CPU of an agent whose program does nothing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bfs_tests::programs::unpack;
use bfs_tests::world::{Transport, World, binary, command_ok};

use super::Settings;
use super::leftovers;
use super::report::Report;
use super::row::{Aim, Row};
use super::stage::{OTHER_CPU, PROGRAM_CPU, by_turns};

pub const ABOUT: &str = "what an agent costs programs that are not selected, and an idle machine";

/// The dearest that a system call may become, in ns.
const SYSCALL_AIM_NS: f64 = 60.0;
/// The slowest that a real program may become.
const PROGRAM_AIM: f64 = 1.01;
/// The most that an idle agent may use, in percent of a core.
const IDLE_AIM_PERCENT: f64 = 0.5;

/// Programs of a stranger: name, aim, script with `$1` the folder of the archive, `$2` one to work in, which is on
/// the file system of the replicated directory.
const PROGRAMS: [(&str, f64, &str); 3] = [
    (
        "find and grep over a source tree",
        PROGRAM_AIM,
        "find \"$1/tree\" -ls > \"$2/found\"; grep -r nothing \"$1/tree\" || :",
    ),
    ("tar of a source tree into a pipe", PROGRAM_AIM, "tar -cf - -C \"$1\" tree | cat > /dev/null"),
    ("unpack beside, on the same file system", PROGRAM_AIM, "tar -xpf \"$1/src.tar\" -C \"$2\""),
];

/// See the module.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let repetitions = settings.repetitions(5);
    let name = "a system call (getppid)";
    if settings.takes(name) {
        let count = settings.sized(500_000_u64, 5_000_000).to_string();
        let rows = beside(repetitions, |_| {
            let mut command = pinned(&binary("bfs-workload").display().to_string());
            command.args(["getppid", "-", "-", &count]);
            Ok(String::from_utf8_lossy(&command_ok(&mut command)?.stdout).trim().parse()?)
        });
        report.attempt(
            name,
            rows.map(|[without, with]| {
                vec![Row::new(name, "ns", without, with).aim(Aim::AboveBaselineAtMost(SYSCALL_AIM_NS))]
            }),
        );
    }
    let sources = leftovers::folder()?;
    unpack::archive(sources.path())?;
    fs::create_dir(sources.path().join("tree"))?;
    let mut tar = Command::new("tar");
    command_ok(tar.args(["-xpf", "src.tar", "-C", "tree"]).current_dir(sources.path()))?;
    let rounds = settings.sized(1, 10);
    for (name, aim, script) in PROGRAMS.iter().filter(|(name, ..)| settings.takes(name)) {
        let rows = beside(repetitions, |_| {
            let mut seconds = 0.0;
            for _ in 0..rounds {
                let room = leftovers::folder()?;
                command_ok(Command::new("sync").arg("-f").arg(room.path()))?;
                let begun = Instant::now();
                let mut command = pinned("/bin/sh");
                command_ok(command.args(["-c", script, "sh"]).arg(sources.path()).arg(room.path()))?;
                seconds += begun.elapsed().as_secs_f64();
            }
            Ok(seconds)
        });
        report.attempt(
            name,
            rows.map(|[without, with]| vec![Row::new(*name, "s", without, with).aim(Aim::RatioAtMost(*aim))]),
        );
    }
    if settings.takes("idle") {
        let rows = idle(Duration::from_secs(settings.sized(3, 30)), repetitions.min(3));
        report.attempt("idle", rows);
    }
    Ok(())
}

fn pinned(program: &str) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &PROGRAM_CPU.to_string(), program]);
    command
}

/// By turns without an agent, and with one whose program waits.
fn beside(repetitions: usize, measure: impl Fn(&World) -> Result<f64>) -> Result<[Vec<f64>; 2]> {
    let mut samples = by_turns(&[false, true], repetitions, |with, _| {
        let mut world = World::new("bench-stranger", Transport::Unix)?;
        world.pin_daemons(OTHER_CPU);
        if !with {
            return measure(&world);
        }
        world.start_replayer()?;
        wait(&mut world)?;
        let measured = measure(&world)?;
        end(&mut world)?;
        Ok(measured)
    })?;
    let with = samples.remove(1);
    Ok([samples.remove(0), with])
}

/// Starts an agent whose program sleeps until [`end`].
fn wait(world: &mut World) -> Result<()> {
    let aux = world.place.aux.display().to_string();
    let script = "mkfifo \"$1/fifo\"; : > \"$1/ready\"; read -r _ < \"$1/fifo\" || :";
    world.run(&["/bin/sh", "-c", script, "sh", &aux].map(str::to_owned))
}

fn end(world: &mut World) -> Result<()> {
    // The other end is open: the program waits there.
    fs::write(world.place.aux.join("fifo"), "\n")?;
    ensure!(world.finish()?.success(), "the waiting program failed");
    Ok(())
}

/// CPU of agent and replayer while the program, and everything else, does nothing.
fn idle(time: Duration, repetitions: usize) -> Result<Vec<Row>> {
    let mut world = World::new("bench-idle", Transport::Unix)?;
    world.checkpoints("every=1s");
    world.start_replayer()?;
    wait(&mut world)?;
    world.checkpoint()?;
    let (agent, replayer) = (world.agent_pid()?, world.replayer_pid());
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..repetitions {
        let before = [cpu_seconds(agent)?, cpu_seconds(replayer)?];
        let begun = Instant::now();
        std::thread::sleep(time);
        let elapsed = begun.elapsed().as_secs_f64();
        for (samples, (pid, before)) in samples.iter_mut().zip([agent, replayer].into_iter().zip(before)) {
            samples.push(100.0 * (cpu_seconds(pid)? - before) / elapsed);
        }
    }
    end(&mut world)?;
    let [of_agent, of_replayer] = samples;
    Ok(vec![
        Row::new("idle: the agent", "% of a core", Vec::new(), of_agent).aim(Aim::AtMost(IDLE_AIM_PERCENT)),
        Row::new("idle: the replayer", "% of a core", Vec::new(), of_replayer)
            .aim(Aim::AtMost(IDLE_AIM_PERCENT)),
    ])
}

/// CPU time of all threads of a process that live.
///
/// # Errors
/// When it is gone.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    let threads = format!("/proc/{pid}/task");
    for thread in fs::read_dir(&threads).with_context(|| threads.clone())? {
        let path = thread?.path().join("schedstat");
        nanoseconds += first_number(&path)?;
    }
    Ok(nanoseconds as f64 / 1e9)
}

fn first_number(path: &Path) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let number = text.split_whitespace().next().context("an empty file")?;
    number.parse().with_context(|| path.display().to_string())
}
