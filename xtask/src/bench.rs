//! `cargo xtask bench overhead`: what replication costs a program, as the ratio of its time with and
//! without, in pairs one after the other, so that whatever the machine does beside hits both.
//!
//! The program is pinned to core 0, agent and replayer to core 1, and the store stands in memory: two machines
//! would share neither a core nor a disk. Then each workload once unpinned and with the store on the program's
//! disk, for the record. Prints a table, and writes target/bench/overhead.json.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bfs_tests::exercise;
use bfs_tests::programs::unpack;
use bfs_tests::world::{Transport, World, binary, command_ok};
use serde_json::{Value, json};

use crate::demo::release_binaries;
use crate::shell::write_report;

const PROGRAM_CPU: usize = 0;
const DAEMON_CPU: usize = 1;

struct Workload {
    name: &'static str,
    /// The highest ratio that is aimed at, pinned.
    aim: f64,
    /// Shell command; works in $1, reads from $2.
    script: &'static str,
}

const WORKLOADS: [Workload; 5] = [
    Workload {
        name: "dd 64 KiB",
        aim: 1.06,
        script: "dd if=/dev/zero of=\"$1/file\" bs=64k count=16384 status=none",
    },
    Workload {
        name: "dd 4 KiB",
        aim: 1.15,
        script: "dd if=/dev/zero of=\"$1/file\" bs=4k count=200000 status=none",
    },
    Workload {
        name: "dd 128 B",
        aim: 1.6,
        script: "dd if=/dev/zero of=\"$1/file\" bs=128 count=1200000 status=none",
    },
    Workload { name: "SQLite inserts", aim: 1.05, script: "\"$3\" sqlite-inserts \"$1\" \"$2\" 1500" },
    Workload { name: "unpack a source tree", aim: 1.15, script: "tar -xpf \"$2/src.tar\" -C \"$1\"" },
];

/// Room for the store: the most that a workload writes, in the log and in the tree, and as much again.
const STORE_MEBIBYTES: u64 = 5 << 10;

/// The dearest that a syscall of a stranger may become, in ns.
const STRANGER_AIM_NS: f64 = 130.0;

/// Measures, prints, writes the JSON. Missing an aim is reported, not an error: it is a measurement.
pub fn overhead(pairs: usize, filter: Option<&str>) -> Result<()> {
    ensure!(pairs > 0, "--pairs must be at least 1");
    release_binaries()?;
    let sources = tempfile::tempdir()?;
    unpack::archive(sources.path())?;
    println!(
        "{:<22} {:>10} {:>10} {:>7} {:>6} {:>9}",
        "workload", "without", "with", "ratio", "aim", "unpinned"
    );
    let mut results = Vec::new();
    for workload in WORKLOADS.iter().filter(|w| filter.is_none_or(|f| w.name.contains(f))) {
        let mut measured = Vec::new();
        for pair in 0..pairs {
            // Whoever comes second finds a warmer machine: take turns.
            let mut both = [0.0; 2];
            for replicated in if pair % 2 == 0 { [0, 1] } else { [1, 0] } {
                let last = pair + 1 == pairs;
                both[replicated] = measure(workload, sources.path(), replicated == 1, true, last)?;
            }
            measured.push((both[0], both[1]));
        }
        let unpinned = measure(workload, sources.path(), true, false, false)?
            / measure(workload, sources.path(), false, false, false)?;
        let ratio = median(measured.iter().map(|(without, with)| with / without));
        let (without, with) = (median(measured.iter().map(|m| m.0)), median(measured.iter().map(|m| m.1)));
        let verdict = if ratio <= workload.aim { "" } else { "  missed" };
        println!(
            "{:<22} {without:>8.3} s {with:>8.3} s {ratio:>7.3} {:>6.2} {unpinned:>9.3}{verdict}",
            workload.name, workload.aim
        );
        let samples: Vec<Value> = measured.iter().map(|(a, b)| json!([a, b])).collect();
        results.push(json!({
            "workload": workload.name, "aim": workload.aim, "ratio": ratio, "without_s": without,
            "with_s": with, "unpinned_ratio": unpinned, "samples_s": samples,
        }));
    }
    let stranger = if filter.is_none() { Some(stranger(pairs)?) } else { None };
    if let Some((without, with)) = stranger {
        println!(
            "\na syscall of a process that is not selected: {without:.0} ns without, {with:.0} ns with the \
             probes: {:.0} ns dearer (aim {STRANGER_AIM_NS:.0})",
            with - without
        );
    }
    let report = json!({
        "pairs": pairs, "overhead": results,
        "stranger_syscall_ns": stranger.map(|(without, with)| json!({"without": without, "with": with})),
    });
    write_report("overhead", report)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

/// Seconds that the workload took, as its own shell saw it: without the start of the daemons, and
/// without the last checkpoint. `compare`: the backup is compared afterwards.
fn measure(
    workload: &Workload,
    sources: &Path,
    replicated: bool,
    pinned: bool,
    compare: bool,
) -> Result<f64> {
    let mut world = World::new("bench", Transport::Tcp)?;
    if pinned {
        world.pin_daemons(DAEMON_CPU);
        world.store_apart(STORE_MEBIBYTES)?;
    }
    world.checkpoints("every=1s");
    let (begin, end) = (world.place.aux.join("begin"), world.place.aux.join("end"));
    // Nothing of the run before may still be on its way to the disk.
    let script = format!(
        ": > '{}'; sync; date +%s%N > '{}'; {} && date +%s%N > '{}'",
        world.place.aux.join("ready").display(),
        begin.display(),
        workload.script,
        end.display()
    );
    let mut line: Vec<String> = Vec::new();
    if pinned {
        line.extend(["taskset".to_owned(), "-c".to_owned(), PROGRAM_CPU.to_string()]);
    }
    line.extend(["/bin/sh".to_owned(), "-c".to_owned(), script, "sh".to_owned()]);
    line.push(world.place.data.display().to_string());
    line.push(sources.display().to_string());
    line.push(binary("bfs-workload").display().to_string());
    if replicated {
        world.start_replayer()?;
        world.run(&line)?;
        let status = world.finish()?;
        ensure!(status.success(), "{}: ended with {status}", workload.name);
        if compare {
            exercise::equal(&world).with_context(|| workload.name.to_owned())?;
        }
    } else {
        command_ok(Command::new(&line[0]).args(&line[1..]))?;
    }
    let time = |path: &Path| -> Result<f64> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok(text.trim().parse::<u64>()? as f64 / 1e9)
    };
    Ok(time(&end)? - time(&begin)?)
}

/// Time of a getppid, in ns, without any probe and with the probes of an agent at work.
fn stranger(pairs: usize) -> Result<(f64, f64)> {
    let loop_ns = || -> Result<f64> {
        let cpu = PROGRAM_CPU.to_string();
        let mut command = Command::new("taskset");
        command.args(["-c", &cpu]).arg(binary("bfs-workload")).args(["getppid", "-", "-", "5000000"]);
        Ok(String::from_utf8_lossy(&command_ok(&mut command)?.stdout).trim().parse()?)
    };
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        without.push(loop_ns()?);
        let mut world = World::new("bench-stranger", Transport::Unix)?;
        world.pin_daemons(DAEMON_CPU);
        world.start_replayer()?;
        let wait = ": > \"$1/ready\"; while [ ! -e \"$1/stop\" ]; do sleep 0.1; done";
        let aux = world.place.aux.display().to_string();
        let line = ["taskset", "-c", "1", "/bin/sh", "-c", wait, "sh", &aux].map(str::to_owned);
        world.run(&line)?;
        with.push(loop_ns()?);
        ensure!(world.finish()?.success(), "the waiting program failed");
    }
    Ok((median(without.into_iter()), median(with.into_iter())))
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median([3.0, 1.0, 2.0].into_iter()) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0, 2.0, 3.0].into_iter()) - 2.5).abs() < 1e-9);
    }
}
