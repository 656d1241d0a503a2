//! `cargo xtask bench pipeline`: from the program's bytes to durable and to applied, beside what the machine can do:
//! the same bytes through a socket into a file, synced as the log is.
//!
//! The log's disk is that of the temporary directory. Shown are
//! - the limit, and to-durable as a share of it: a program writes new files in pieces of 1 MiB; time runs from its
//!   first write until the last record is acknowledged. Before and after it the limit is measured, the mean counts.
//!   That over a unix socket, and once more by TCP, encrypted;
//! - how fast the applier is: the same bytes, from the confirmed checkpoint to the applied one;
//! - the time of a command from a small write to the acknowledgement, p50 and p99;
//! - bytes that the replayer wrote for each byte of the stream (`write_bytes` of /proc/PID/io): for new files, and
//!   for a compile-like workload, where temporaries come and go between two checkpoints; of that, also how many
//!   bytes of its stream reached the tree.
//!
//! Writes target/bench/pipeline.json.

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
use serde_json::json;

use crate::demo::release_binaries;
use crate::shell::write_report;

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
pub fn pipeline() -> Result<()> {
    release_binaries()?;
    let before = limit()?;
    let new = new_files(Transport::Unix)?;
    let over_tls = new_files(Transport::Tcp)?;
    let after = limit()?;
    let limit = (before + after) / 2.0;
    let [p50, p99] = latency()?;
    let compile = compile()?;
    let rate = |seconds: f64| BYTES as f64 / 1e6 / seconds;
    println!(
        "limit           {limit:>8.0} MB/s  (a socket into a file, the same syncs: {before:.0}, {after:.0})"
    );
    println!(
        "to durable      {:>8.0} MB/s  {:.0} % of the limit; the program itself wrote with {:.0}",
        rate(new.durable),
        100.0 * rate(new.durable) / limit,
        rate(new.written)
    );
    println!("... over TLS    {:>8.0} MB/s  the same by TCP on loopback", rate(over_tls.durable));
    println!("applied         {:>8.0} MB/s  from confirmed to applied", rate(new.applied));
    println!(
        "acknowledged    {p50:>8.1} ms    p99 {p99:.1} ms  a small write and the command that waits for it"
    );
    println!("written         {:>8.2} bytes for each of the stream, new files", new.amplification);
    println!(
        "compile-like    {:>8.2} bytes for each of the stream; {:.0} % of its {:.0} MB reached the tree",
        compile.amplification,
        100.0 * compile.tree / compile.stream,
        compile.stream / 1e6
    );
    write_report(
        "pipeline",
        json!({
            "bytes": BYTES, "limit_mb_s": [before, after], "to_durable_mb_s": rate(new.durable),
            "to_durable_tls_mb_s": rate(over_tls.durable), "share_of_limit": rate(new.durable) / limit,
            "program_mb_s": rate(new.written),
            "applied_mb_s": rate(new.applied), "acknowledged_ms_p50_p99": [p50, p99],
            "written_per_stream_byte": new.amplification,
            "compile": {
                "written_per_stream_byte": compile.amplification, "stream_bytes": compile.stream,
                "tree_bytes": compile.tree,
            },
        }),
    )
}

/// MB/s of bytes through a socket into a file that is synced whenever nothing more waits, or 32 MiB.
fn limit() -> Result<f64> {
    let dir = tempfile::tempdir()?;
    let (mut from, mut to) = UnixStream::pair()?;
    let began = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(move || -> std::io::Result<()> {
            let frame = vec![0x5a; FRAME];
            (0..BYTES / FRAME as u64).try_for_each(|_| to.write_all(&frame))
        });
        let mut file = File::create(dir.path().join("log"))?;
        let (mut buffer, mut unsynced) = (vec![0; FRAME], 0);
        for _ in 0..BYTES / FRAME as u64 {
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
    Ok(BYTES as f64 / 1e6 / began.elapsed().as_secs_f64())
}

struct NewFiles {
    /// Seconds until all was written, durable; and from confirmed to applied.
    written: f64,
    durable: f64,
    applied: f64,
    amplification: f64,
}

fn shell(world: &mut World, script: &str) -> Result<()> {
    let places = [&world.place.data, &world.place.aux].map(|p| p.display().to_string());
    let line = ["/bin/sh", "-c", script, "sh"].map(str::to_owned);
    world.run(&line.into_iter().chain(places).collect::<Vec<_>>())
}

/// Bytes that are no zeros, for the program to copy.
fn source(world: &World, len: u64) -> Result<()> {
    let mut random = Random::new(len);
    let bytes: Vec<u8> = (0..len / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    Ok(fs::write(world.place.aux.join("src"), bytes)?)
}

const WAIT: &str = ": > \"$2/ready\"; while [ ! -e \"$2/go\" ]; do sleep 0.01; done;";
const DONE: &str = "; : > \"$2/done\"; while [ ! -e \"$2/stop\" ]; do sleep 0.02; done";

/// Lets the script work, until it is done.
fn go(world: &World) -> Result<()> {
    fs::write(world.place.aux.join("go"), "")?;
    let done = world.place.aux.join("done");
    until("the program", LIMIT, || done.exists().then_some(()))
}

fn new_files(transport: Transport) -> Result<NewFiles> {
    let mut world = World::new("pipeline", transport)?;
    world.start_replayer()?;
    source(&world, BYTES / 12)?;
    let script = format!(
        "{WAIT} i=0; while [ $i -lt 12 ]; do
            dd if=\"$2/src\" of=\"$1/file$i\" bs=1M status=none; i=$((i + 1))
        done {DONE}"
    );
    shell(&mut world, &script)?;
    world.checkpoint()?;
    let (stream, disk) = (stream_bytes(&world)?, disk_bytes(&world)?);
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
    let amplification = (disk_bytes(&world)? - disk) as f64 / (stream_bytes(&world)? - stream) as f64;
    ensure!(world.finish()?.success(), "the program failed");
    exercise::equal(&world)?;
    Ok(NewFiles { written, durable, applied, amplification })
}

/// Milliseconds: p50, p99.
fn latency() -> Result<[f64; 2]> {
    let mut world = World::new("pipeline-latency", Transport::Unix)?;
    world.start_replayer()?;
    shell(
        &mut world,
        "exec 5> \"$1/file\"; : > \"$2/ready\"
        while [ ! -e \"$2/stop\" ]; do echo one more >&5; sleep 0.005; done",
    )?;
    world.checkpoint()?;
    let mut all = Vec::new();
    for _ in 0..SMALL {
        let asked = Instant::now();
        world.checkpoint_until("confirmed")?;
        all.push(asked.elapsed().as_secs_f64() * 1e3);
    }
    world.finish()?;
    all.sort_by(f64::total_cmp);
    Ok([all[all.len() / 2], all[all.len() * 99 / 100]])
}

struct Compile {
    amplification: f64,
    stream: f64,
    tree: f64,
}

/// Temporaries, objects that are written in pieces and renamed, an archive that is written anew: the way of a compiler.
fn compile() -> Result<Compile> {
    let mut world = World::new("pipeline-compile", Transport::Unix)?;
    world.start_replayer()?;
    source(&world, 96 << 10)?;
    let script = format!(
        "{WAIT} mkdir \"$1/obj\"; i=0; while [ $i -lt 300 ]; do
            dd if=\"$2/src\" of=\"$1/obj/t$i.s\" bs=16k count=6 status=none
            dd if=\"$2/src\" of=\"$1/obj/t$i.o.tmp\" bs=4k count=10 status=none
            mv \"$1/obj/t$i.o.tmp\" \"$1/obj/t$i.o\"; rm \"$1/obj/t$i.s\"
            if [ $((i % 30)) -eq 29 ]; then cat \"$1\"/obj/*.o > \"$1/lib.a\"; fi
            i=$((i + 1))
        done {DONE}"
    );
    shell(&mut world, &script)?;
    world.checkpoint()?;
    let (stream, disk) = (stream_bytes(&world)?, disk_bytes(&world)?);
    go(&world)?;
    world.checkpoint()?;
    let stream = (stream_bytes(&world)? - stream) as f64;
    let amplification = (disk_bytes(&world)? - disk) as f64 / stream;
    let tree = bytes_below(&world.backup())? as f64;
    ensure!(world.finish()?.success(), "the program failed");
    exercise::equal(&world)?;
    Ok(Compile { amplification, stream, tree })
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
