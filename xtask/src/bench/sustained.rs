//! A program writes as fast as it can to a replayer on loopback.
//!
//! The program on core 0, agent and replayer on core 1. Shown: the rate, what found no room in the
//! ring (counted and named by the agent, read again before the next checkpoint), and how long after
//! the last write the backup was equal, which the independent comparison says. A workload with
//! rests shows what one core takes without a drop.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use bfs_tests::exercise;
use bfs_tests::watch::until;
use bfs_tests::world::{Dropped, Transport, World};

use super::Settings;
use super::report::Report;
use super::row::Row;

pub const ABOUT: &str = "a program that writes as fast as it can to a replayer on loopback";

/// Longest that a workload may take.
const LIMIT: Duration = Duration::from_secs(120);

struct Load {
    name: &'static str,
    /// Bytes of each write, and number of writes between two rests.
    block: u64,
    count: u64,
    /// How often, with a rest of 0.1 s behind each (none when it is once).
    times: u64,
    /// More options for the agent.
    options: &'static [&'static str],
}

const LOADS: [Load; 6] = [
    Load { name: "64 KiB, full speed", block: 64 << 10, count: 16384, times: 1, options: &[] },
    Load { name: "64 KiB, with rests", block: 64 << 10, count: 800, times: 20, options: &[] },
    Load { name: "4 KiB, full speed", block: 4 << 10, count: 200_000, times: 1, options: &[] },
    Load { name: "4 KiB, with rests", block: 4 << 10, count: 5_000, times: 30, options: &[] },
    Load { name: "128 B, full speed", block: 128, count: 2_000_000, times: 1, options: &[] },
    Load {
        name: "128 B, 64 KiB ring",
        block: 128,
        count: 2_000_000,
        times: 1,
        options: &["--ring-bytes", "64K"],
    },
];

/// See the module.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    for load in LOADS.iter().filter(|load| settings.takes(load.name)) {
        report.attempt(load.name, rows(settings, load));
    }
    Ok(())
}

fn rows(settings: &Settings, load: &Load) -> Result<Vec<Row>> {
    let load = &Load { count: load.count / settings.sized(10, 1), ..*load };
    let done = (0..settings.repetitions(1)).map(|_| measure(load)).collect::<Result<Vec<Done>>>()?;
    let writes = (load.count * load.times) as f64;
    let row = |what: &str, unit: &str, of: &dyn Fn(&Done) -> f64| {
        Row::new(format!("{}: {what}", load.name), unit, Vec::new(), done.iter().map(of).collect())
    };
    Ok(vec![
        row("written", "MB/s", &|done| writes * load.block as f64 / 1e6 / done.seconds),
        row("writes", "1/s", &|done| writes / done.seconds),
        row("dropped, read again", "events", &|done| done.dropped.events as f64),
        row("everything suspect", "times", &|done| done.dropped.rescans as f64),
        row("by reference", "writes", &|done| done.by_reference as f64),
        row("equal after", "s", &|done| done.equal_after),
    ])
}

struct Done {
    seconds: f64,
    dropped: Dropped,
    by_reference: u64,
    equal_after: f64,
}

fn measure(load: &Load) -> Result<Done> {
    let mut world = World::new("sustained", Transport::Tcp)?;
    world.pin_daemons(1);
    world.checkpoints("every=1s");
    world.agent_options(load.options);
    world.start_replayer()?;
    let rest = if load.times > 1 { "sleep 0.1" } else { ":" };
    let script = format!(
        ": > \"$2/ready\"; sync; date +%s%N > \"$2/begin\"
        i=0; while [ $i -lt {times} ]; do
            dd if=/dev/zero of=\"$1/file\" bs={block} count={count} seek=$((i * {count})) conv=notrunc status=none
            {rest}; i=$((i + 1))
        done
        date +%s%N > \"$2/end.new\"; mv \"$2/end.new\" \"$2/end\"
        while [ ! -e \"$2/stop\" ]; do sleep 0.02; done",
        times = load.times,
        block = load.block,
        count = load.count,
    );
    let place = [&world.place.data, &world.place.aux].map(|p| p.display().to_string());
    let line = ["taskset", "-c", "0", "/bin/sh", "-c", &script, "sh"].map(str::to_owned);
    world.run(&line.into_iter().chain(place).collect::<Vec<_>>())?;
    let end = world.place.aux.join("end");
    until("the writes to be done", LIMIT, || end.exists().then_some(()))?;
    let written = Instant::now();
    world.checkpoint()?;
    let equal_after = written.elapsed().as_secs_f64();
    let dropped = world.dropped()?;
    let by_reference = world.status_number(&["by_reference"])?;
    exercise::equal(&world)?;
    world.finish()?;
    exercise::equal(&world)?;
    let time = |name: &str| -> Result<f64> {
        Ok(fs::read_to_string(world.place.aux.join(name))?.trim().parse::<u64>()? as f64 / 1e9)
    };
    Ok(Done { seconds: time("end")? - time("begin")?, dropped, by_reference, equal_after })
}
