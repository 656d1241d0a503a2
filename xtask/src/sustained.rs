//! `cargo xtask bench sustained`: a program writes as fast as it can to a replayer on loopback.
//!
//! The program on core 0, agent and replayer on core 1. Shown: the rate, what found no room in the
//! ring (counted and named by the agent, read again before the next checkpoint), and how long after
//! the last write the backup was equal, which the independent comparison says. A workload at half
//! speed shows what one core takes without a drop. Writes target/bench/sustained.json.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bfs_tests::exercise;
use bfs_tests::watch::until;
use bfs_tests::world::{Dropped, Transport, World};
use serde_json::json;

use crate::demo::release_binaries;
use crate::shell::write_report;

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
pub fn sustained() -> Result<()> {
    release_binaries()?;
    println!(
        "{:<20} {:>9} {:>10} {:>10} {:>8} {:>8}  equal after",
        "workload", "MB/s", "writes/s", "dropped", "rescans", "by ref."
    );
    let mut results = Vec::new();
    for load in &LOADS {
        let done = measure(load).with_context(|| load.name.to_owned())?;
        let writes = (load.count * load.times) as f64;
        println!(
            "{:<20} {:>9.0} {:>10.0} {:>10} {:>8} {:>8}  {:.1} s",
            load.name,
            writes * load.block as f64 / 1e6 / done.seconds,
            writes / done.seconds,
            done.dropped.events,
            done.dropped.rescans,
            done.by_reference,
            done.equal_after,
        );
        results.push(json!({
            "workload": load.name, "bytes": writes * load.block as f64, "writes": writes,
            "seconds": done.seconds, "dropped": done.dropped.events, "rescans": done.dropped.rescans,
            "by_reference": done.by_reference, "equal_after_s": done.equal_after,
        }));
    }
    println!("what was dropped was read from the files: the backup was equal in each case");
    write_report("sustained", results)
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
