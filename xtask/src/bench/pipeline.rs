//! From the program's bytes to durable and to applied, beside what the machine can do:
//! the same bytes through a socket into a file, synced as the log is.
//!
//! The log's disk is that of the temporary directory. Shown are
//! - the limit, and to-durable as a share of it: a program writes new files in pieces of 1 MiB; time runs from its
//!   first write until the last record is acknowledged. The limit is measured before and after it.
//!   That over a unix socket, and once more by TCP, encrypted;
//! - how fast the applier is: the same bytes, from the confirmed checkpoint to the applied one;
//! - the time of a command from a small write to the acknowledgement, p50 and p99;
//! - what a sync costs in a file that is written over, beside one that grows (the baseline): why the log writes over
//!   segments that are applied;
//! - bytes that the replayer wrote for each byte of the stream (`write_bytes` of /proc/PID/io), for new files;
//! - the net effect, for a compile-like workload, where temporaries come and go between two checkpoints: the bytes that
//!   the program wrote, and all that the replayer wrote for them, log and tree.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bfs_tests::exercise;
use bfs_tests::random::Random;
use bfs_tests::watch::until;
use bfs_tests::world::{Transport, World};

use super::Settings;
use super::leftovers;
use super::report::Report;
use super::row::{Aim, Row, percentile};
use super::strangers::cpu_seconds;

pub const ABOUT: &str =
    "from the program to durable and applied; the baseline is a socket into a synced file";

/// Bytes of the new files.
const BYTES: u64 = 384 << 20;
/// Bytes of a frame, and that are synced at once at most, as the agent and the replayer have it.
const FRAME: usize = 4 << 20;
const SYNCED: usize = 32 << 20;
/// Longest that anything may take.
const LIMIT: Duration = Duration::from_secs(180);
/// Small writes whose acknowledgement is waited for.
const SMALL: usize = 100;

/// See the module.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let repetitions = settings.repetitions(3);
    if settings.takes("new files") {
        report.attempt("new files", new_files_rows(settings.sized(BYTES / 8, BYTES), repetitions));
    }
    if settings.takes("synced over a file") {
        let rows = || {
            let sizes =
                [("4 KiB", 4 << 10, settings.sized(50, 1000)), ("4 MiB", 4 << 20, settings.sized(4, 16))];
            sizes
                .into_iter()
                .map(|(name, size, count)| {
                    let (grown, over) = syncs(size, count, repetitions)?;
                    Ok(Row::new(format!("{name} synced over a file"), "ms", grown, over))
                })
                .collect()
        };
        report.attempt("synced over a file", rows());
    }
    if settings.takes("acknowledged") {
        let rows = latency(settings.sized(10, SMALL)).map(|all| {
            let row = |what: &str, percent| {
                let value = percentile(&all, percent).into_iter().collect();
                Row::new(format!("a small write acknowledged, {what}"), "ms", Vec::new(), value)
            };
            vec![row("p50", 50), row("p99", 99), row("longest", 100)]
        });
        report.attempt("acknowledged", rows);
    }
    if settings.takes("compile-like") {
        let rows = (0..repetitions).map(|_| compile()).collect::<Result<Vec<Compile>>>().map(|done| {
            let of = |of: &dyn Fn(&Compile) -> f64| done.iter().map(of).collect::<Vec<f64>>();
            let row = |what: &str, value| {
                let name = format!("compile-like, bytes of the program: {what}");
                Row::new(name, "MB", of(&|c| c.program / 1e6), value)
            };
            vec![
                row("written on the backup", of(&|c| c.disk / 1e6)).aim(Aim::RatioAtMost(0.5)),
                row("sent", of(&|c| c.stream / 1e6)),
                row("in the tree at the end", of(&|c| c.tree / 1e6)),
            ]
        });
        report.attempt("compile-like", rows);
    }
    Ok(())
}

fn new_files_rows(bytes: u64, repetitions: usize) -> Result<Vec<Row>> {
    let rate = |seconds: f64| bytes as f64 / 1e6 / seconds;
    let (mut limits, mut plain, mut over_tls) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..repetitions {
        // The disk's speed drifts: once on each side of what is measured.
        limits.push(limit(bytes)?);
        plain.push(new_files(Transport::Unix, bytes)?);
        over_tls.push(new_files(Transport::Tcp, bytes)?);
        limits.push(limit(bytes)?);
    }
    let of = |done: &[NewFiles], of: &dyn Fn(&NewFiles) -> f64| done.iter().map(of).collect::<Vec<f64>>();
    let row = |name: &str, value| Row::new(format!("new files: {name}"), "MB/s", limits.clone(), value);
    Ok(vec![
        row("the program itself", of(&plain, &|done| rate(done.written))),
        row("to durable", of(&plain, &|done| rate(done.durable))).aim(Aim::RatioAtLeast(0.45)),
        row("to durable, TCP with TLS", of(&over_tls, &|done| rate(done.durable))),
        row("from confirmed to applied", of(&plain, &|done| rate(done.applied))),
        Row::new(
            "new files: written on the backup",
            "bytes/byte",
            Vec::new(),
            of(&plain, &|done| done.amplification),
        )
        .aim(Aim::AtMost(2.2)),
        Row::new("new files: CPU of the agent", "s/GB", Vec::new(), of(&plain, &|done| done.cpu[0])),
        Row::new("new files: CPU of the replayer", "s/GB", Vec::new(), of(&plain, &|done| done.cpu[1])),
        Row::new("new files: CPU of the agent, TLS", "s/GB", Vec::new(), of(&over_tls, &|done| done.cpu[0])),
        Row::new(
            "new files: CPU of the replayer, TLS",
            "s/GB",
            Vec::new(),
            of(&over_tls, &|done| done.cpu[1]),
        ),
    ])
}

/// MB/s of bytes through a socket into a file that is synced whenever nothing more waits, or 32 MiB.
fn limit(bytes: u64) -> Result<f64> {
    let dir = leftovers::folder()?;
    let (mut from, mut to) = UnixStream::pair()?;
    let began = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(move || -> std::io::Result<()> {
            let frame = vec![0x5a; FRAME];
            (0..bytes / FRAME as u64).try_for_each(|_| to.write_all(&frame))
        });
        let mut file = File::create(dir.path().join("log"))?;
        let (mut buffer, mut unsynced) = (vec![0; FRAME], 0);
        for _ in 0..bytes / FRAME as u64 {
            from.read_exact(&mut buffer)?;
            file.write_all(&buffer)?;
            unsynced += FRAME;
            if unsynced >= SYNCED {
                file.sync_data()?;
                unsynced = 0;
            }
        }
        file.sync_data()?;
        sender.join().expect("it does not panic").context("the socket broke")
    })?;
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

struct NewFiles {
    /// Seconds until all was written, durable; and from confirmed to applied.
    written: f64,
    durable: f64,
    applied: f64,
    amplification: f64,
    /// CPU seconds per GB, of agent and replayer, until all is applied.
    cpu: [f64; 2],
}

/// Median time of a write with its sync, in ms, for each repetition: where the file grows, and where it is written over.
fn syncs(size: usize, count: usize, repetitions: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let folder = tempfile::tempdir()?;
    let bytes = noise(size as u64);
    let (mut grown, mut over) = (Vec::new(), Vec::new());
    for number in 0..repetitions {
        let path = folder.path().join(number.to_string());
        for all in [&mut grown, &mut over] {
            let mut file = File::options().create(true).truncate(false).write(true).open(&path)?;
            let mut times = Vec::new();
            for _ in 0..count {
                let begun = Instant::now();
                file.write_all(&bytes)?;
                file.sync_data()?;
                times.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            all.extend(percentile(&times, 50));
        }
        fs::remove_file(&path)?;
    }
    Ok((grown, over))
}

/// Bytes that are no zeros, for the program to copy.
fn source(world: &World, len: u64) -> Result<()> {
    Ok(fs::write(world.place.aux.join("src"), noise(len))?)
}

/// So many bytes that cannot be packed.
fn noise(len: u64) -> Vec<u8> {
    let mut random = Random::new(len);
    (0..len / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

const WAIT: &str = ": > \"$2/ready\"; while [ ! -e \"$2/go\" ]; do sleep 0.01; done;";
const DONE: &str = "; : > \"$2/done\"; while [ ! -e \"$2/stop\" ]; do sleep 0.02; done";

/// Lets the script work, until it is done.
fn go(world: &World) -> Result<()> {
    fs::write(world.place.aux.join("go"), "")?;
    let done = world.place.aux.join("done");
    until("the program", LIMIT, || done.exists().then_some(()))
}

fn new_files(transport: Transport, bytes: u64) -> Result<NewFiles> {
    let mut world = World::new("pipeline", transport)?;
    world.start_replayer()?;
    source(&world, bytes / 12)?;
    let script = format!(
        "{WAIT} i=0; while [ $i -lt 12 ]; do
            dd if=\"$2/src\" of=\"$1/file$i\" bs=1M status=none; i=$((i + 1))
        done {DONE}"
    );
    world.run(&world.script(&script))?;
    world.checkpoint()?;
    let (stream, disk) = (stream_bytes(&world)?, disk_bytes(&world)?);
    let daemons = [world.agent_pid()?, world.replayer_pid()];
    let cpu = [cpu_seconds(daemons[0])?, cpu_seconds(daemons[1])?];
    let began = Instant::now();
    go(&world)?;
    let written = began.elapsed().as_secs_f64();
    let number = world.checkpoint_until("confirmed")?;
    let durable = began.elapsed().as_secs_f64();
    let confirmed = Instant::now();
    until("the checkpoint to be applied", LIMIT, || {
        (world.status_number(&["applied"]).ok()? >= number).then_some(())
    })?;
    let applied = confirmed.elapsed().as_secs_f64();
    let per_gb = |daemon: usize| -> Result<f64> {
        Ok((cpu_seconds(daemons[daemon])? - cpu[daemon]) / (bytes as f64 / 1e9))
    };
    let cpu = [per_gb(0)?, per_gb(1)?];
    let amplification = (disk_bytes(&world)? - disk) as f64 / (stream_bytes(&world)? - stream) as f64;
    ensure!(world.finish()?.success(), "the program failed");
    exercise::equal(&world)?;
    Ok(NewFiles { written, durable, applied, amplification, cpu })
}

/// Milliseconds, of each.
fn latency(count: usize) -> Result<Vec<f64>> {
    let mut world = World::new("pipeline-latency", Transport::Unix)?;
    world.start_replayer()?;
    world.run(&world.script(
        "exec 5> \"$1/file\"; : > \"$2/ready\"
        while [ ! -e \"$2/stop\" ]; do echo one more >&5; sleep 0.005; done",
    ))?;
    world.checkpoint()?;
    let mut all = Vec::new();
    for _ in 0..count {
        let asked = Instant::now();
        world.checkpoint_until("confirmed")?;
        all.push(asked.elapsed().as_secs_f64() * 1e3);
    }
    world.finish()?;
    Ok(all)
}

/// Bytes.
struct Compile {
    /// That the program wrote.
    program: f64,
    /// Of the stream.
    stream: f64,
    /// That the replayer gave to the disk.
    disk: f64,
    /// Of the files at the end.
    tree: f64,
}

/// Objects of the compile-like workload, and after how many of them the archive is written anew.
const OBJECTS: u64 = 300;
const ARCHIVED: u64 = 30;

/// Temporaries, objects that are written in pieces and renamed, an archive that is written anew: the way of a compiler.
fn compile() -> Result<Compile> {
    let mut world = World::new("pipeline-compile", Transport::Unix)?;
    world.start_replayer()?;
    source(&world, 96 << 10)?;
    let script = format!(
        "{WAIT} mkdir \"$1/obj\"; i=0; while [ $i -lt {OBJECTS} ]; do
            dd if=\"$2/src\" of=\"$1/obj/t$i.s\" bs=16k count=6 status=none
            dd if=\"$2/src\" of=\"$1/obj/t$i.o.tmp\" bs=4k count=10 status=none
            mv \"$1/obj/t$i.o.tmp\" \"$1/obj/t$i.o\"; rm \"$1/obj/t$i.s\"
            if [ $((i % {ARCHIVED})) -eq $(({ARCHIVED} - 1)) ]; then cat \"$1\"/obj/*.o > \"$1/lib.a\"; fi
            i=$((i + 1))
        done {DONE}"
    );
    world.run(&world.script(&script))?;
    world.checkpoint()?;
    let (stream, disk) = (stream_bytes(&world)?, disk_bytes(&world)?);
    go(&world)?;
    world.checkpoint()?;
    // Each has 96 KiB of assembly and 40 KiB; an archive has all objects so far.
    let archives: u64 = (1..=OBJECTS / ARCHIVED).map(|archive| archive * ARCHIVED * (40 << 10)).sum();
    let program = (OBJECTS * (136 << 10) + archives) as f64;
    let stream = (stream_bytes(&world)? - stream) as f64;
    let disk = (disk_bytes(&world)? - disk) as f64;
    let tree = bytes_below(&world.backup())? as f64;
    ensure!(world.finish()?.success(), "the program failed");
    exercise::equal(&world)?;
    Ok(Compile { program, stream, disk, tree })
}

fn stream_bytes(world: &World) -> Result<u64> {
    world.status_number(&["stream_bytes"])
}

/// Bytes that the replayer gave to the disk.
fn disk_bytes(world: &World) -> Result<u64> {
    let io = fs::read_to_string(format!("/proc/{}/io", world.replayer_pid()))?;
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).context("no write_bytes")?;
    Ok(line.trim().parse()?)
}

fn bytes_below(folder: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        total += if meta.is_dir() { bytes_below(&entry.path())? } else { meta.len() };
    }
    Ok(total)
}
