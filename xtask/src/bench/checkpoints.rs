//! How many checkpoints needed a stop of the program, and how long it stood
//! then, while it makes 10,000 calls a second; beside little and beside much that it does not touch, and with
//! little and with much written between two checkpoints.
//!
//! How long the program stood counts from the first thread that stopped to the last that was let go, as the
//! agent measures it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bfs_tests::exercise;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World, binary, number_named};

use super::Settings;
use super::report::Report;
use super::row::{Aim, Row, percentile};

pub const ABOUT: &str =
    "checkpoints of a program that makes 10,000 calls a second, beside files that it does not touch";

/// The longest that a program may stand, beyond what the freezer alone takes.
const BEYOND_FREEZER_MS: f64 = 5.0;
/// Calls a second.
const RATE: u64 = 10_000;

struct Load {
    name: &'static str,
    /// Whether it stores into a shared mapping all the time.
    mapped: bool,
    /// Time between two checkpoints.
    every: Duration,
}

const LOADS: [Load; 3] = [
    Load { name: "calls, each 100 ms", mapped: false, every: Duration::from_millis(100) },
    Load { name: "calls, each 1 s", mapped: false, every: Duration::from_secs(1) },
    Load { name: "calls and mapped stores", mapped: true, every: Duration::from_millis(100) },
];

/// See the module.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let count: u64 = settings.sized(30, 1000);
    let mut numbers: Vec<u64> = settings.sized(vec![100], vec![10_000]);
    numbers.extend(settings.long.then_some(1_000_000));
    for files in numbers {
        for load in &LOADS {
            let name = format!("{}, {files} files", load.name);
            if settings.takes(&name) {
                // A tenth of them where they are rarer.
                let count = if load.every >= Duration::from_secs(1) { count.div_ceil(10) } else { count };
                let rows = measure(load, files, count).and_then(|done| {
                    let bare = if load.mapped { bare_freezer(settings.sized(20, 500))? } else { Vec::new() };
                    Ok(rows(&name, load, &done, &bare))
                });
                report.attempt(&name, rows);
            }
        }
    }
    Ok(())
}

/// `bare`: how long a freezer alone takes, in ms.
fn rows(name: &str, load: &Load, done: &Done, bare: &[f64]) -> Vec<Row> {
    let row = |what: &str, unit: &str, value: f64| Row::single(format!("{name}: {what}"), unit, value);
    let stopped = row("needed a stop", "%", 100.0 * done.stopped as f64 / done.taken as f64);
    let mut rows = vec![
        row("taken", "checkpoints", done.taken as f64),
        row("late", "checkpoints", done.late as f64),
        if load.mapped { stopped } else { stopped.aim(Aim::AtMost(0.0)) },
        row("to sealed, p50", "ms", done.settled_ms[0]),
        row("to sealed, p99", "ms", done.settled_ms[1]),
    ];
    for ((what, percent), us) in
        [("stood, p50", 50), ("stood, p99", 99), ("stood, longest", 100)].into_iter().zip(done.stood_us)
    {
        let baseline = percentile(bare, percent).into_iter().collect();
        let stood = Row::new(format!("{name}: {what}"), "ms", baseline, vec![us as f64 / 1e3]);
        rows.push(if load.mapped && percent == 99 {
            stood.aim(Aim::AboveBaselineAtMost(BEYOND_FREEZER_MS)).note("baseline: the cgroup freezer alone")
        } else {
            stood
        });
    }
    rows
}

struct Done {
    taken: u64,
    late: u64,
    stopped: u64,
    /// p50, p99, longest.
    stood_us: [u64; 3],
    /// From the command to the sealed checkpoint: p50, p99.
    settled_ms: [f64; 2],
}

/// The program, without what belongs to a run.
fn command(load: &Load, world: &World) -> Vec<String> {
    let mut line = vec![binary("bfs-workload").display().to_string()];
    line.push(if load.mapped { "steady-mapped" } else { "steady" }.to_owned());
    line.extend([&world.place.data, &world.place.aux].map(|p| p.display().to_string()));
    line.push(RATE.to_string());
    line
}

/// Milliseconds in which the same program, without an agent, was frozen and let go.
fn bare_freezer(count: usize) -> Result<Vec<f64>> {
    let mut world = World::new("freezer", Transport::Unix)?;
    let load = LOADS.iter().find(|load| load.mapped).context("one of them stores into a mapping")?;
    world.start_program(&command(load, &world))?;
    let cgroup = world.cgroup("bare")?;
    fs::write(cgroup.join("cgroup.procs"), world.program_pid()?.to_string())?;
    let freeze = |on: bool| -> Result<()> {
        let (value, wanted) = if on { ("1", "frozen 1") } else { ("0", "frozen 0") };
        fs::write(cgroup.join("cgroup.freeze"), value)?;
        let asked = Instant::now();
        while !fs::read_to_string(cgroup.join("cgroup.events"))?.contains(wanted) {
            ensure!(asked.elapsed() < Duration::from_secs(10), "the cgroup is not {wanted} after 10 s");
        }
        Ok(())
    };
    let mut all = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        freeze(true)?;
        freeze(false)?;
        all.push(begun.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::write(world.place.stop(), "")?;
    until("the program to end", SOON, || (!world.program_runs()).then_some(()))?;
    Ok(all)
}

fn measure(load: &Load, files: u64, count: u64) -> Result<Done> {
    let mut world = World::new("checkpoints", Transport::Unix)?;
    populate(&world.place.data.join("untouched"), files)?;
    world.checkpoints(&format!("every={}ms", load.every.as_millis()));
    world.start_replayer()?;
    world.run(&command(load, &world))?;
    world.checkpoint()?;
    let before = Counted::of(&world)?;
    let limit = load.every * 20 * u32::try_from(count)?;
    let mut settled = Vec::new();
    let now = until("the checkpoints", limit, || {
        let asked = Instant::now();
        world.checkpoint_until("sealed").ok()?;
        settled.push(asked.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(load.every * 5);
        let now = Counted::of(&world).ok()?;
        (now.taken >= before.taken + count).then_some(now)
    })?;
    let status = world.status()?;
    let stood = |name: &str| number_named(&status["stops"], &[name]).with_context(|| format!("no {name}"));
    let stood_us = [stood("p50_us")?, stood("p99_us")?, stood("max_us")?];
    ensure!(world.finish()?.success(), "the program failed");
    exercise::equal(&world)?;
    let at = |percent| percentile(&settled, percent).unwrap_or(f64::NAN);
    Ok(Done {
        taken: now.taken - before.taken,
        late: now.late - before.late,
        stopped: now.stopped - before.stopped,
        stood_us,
        settled_ms: [at(50), at(99)],
    })
}

struct Counted {
    taken: u64,
    late: u64,
    stopped: u64,
}

impl Counted {
    fn of(world: &World) -> Result<Self> {
        let status = world.status()?;
        let of = |name: &str| number_named(&status, &[name]).with_context(|| format!("no {name}"));
        Ok(Self {
            taken: of("checkpoints_taken")?,
            late: of("checkpoints_late")?,
            stopped: of("checkpoints_stopped")?,
        })
    }
}

/// Small files, a thousand to a folder.
///
/// # Errors
/// What the disk met.
pub fn populate(folder: &Path, files: u64) -> Result<()> {
    for n in 0..files {
        let below = folder.join((n / 1000).to_string());
        if n % 1000 == 0 {
            fs::create_dir_all(&below)?;
        }
        fs::write(below.join(n.to_string()), n.to_string())?;
    }
    Ok(())
}
