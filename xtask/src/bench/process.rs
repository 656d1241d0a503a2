//! For how long a program stands for a checkpoint with process state, over its memory, and of
//! which parts that time is. Beside it, in the same run, `criu dump --leave-running` alone of the same program.
//!
//! The program has so much memory that was written once, and goes on writing one page in 64.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use bfs_tests::watch::until;
use bfs_tests::world::{Transport, World};

use super::Settings;
use super::leftovers;
use super::report::Report;
use super::row::Row;
use crate::shell::target;

pub const ABOUT: &str = "a stop for a checkpoint with process state; the baseline is CRIU alone";

/// How often each is measured.
const TIMES: usize = 5;
/// Sets that the agent keeps. Before there are so many, each dump takes memory for its pages that nobody had yet, which a virtual
/// machine has to get from its host.
const KEPT: usize = 3;
/// Most that one thing may take.
const LIMIT: Duration = Duration::from_secs(120);

/// argv: MiB of memory, a folder, and one for the marks `ready` and `stop`.
const PROGRAM: &str = "\
import mmap, os, random, sys, time
size = int(sys.argv[1]) << 20
memory = mmap.mmap(-1, size)
for at in range(0, size, 1 << 20):
    memory[at:at + (1 << 20)] = random.randbytes(1 << 20)
log = open(sys.argv[2] + '/log', 'a')
open(sys.argv[3] + '/ready', 'w').close()
n = 0
while not os.path.exists(sys.argv[3] + '/stop'):
    n += 1
    for at in range((n % 64) * 4096, size, 64 * 4096):
        memory[at:at + 8] = b'%08d' % n
    log.write('%d\\n' % n)
    log.flush()
    time.sleep(0.1)
";

/// See the module.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let criu = target().join("criu/criu");
    if !criu.exists() {
        let why = anyhow!("there is no CRIU: `cargo xtask setup --criu` provides it");
        report.add(Row::not_here("a checkpoint with process state", &why));
        return Ok(());
    }
    let criu = criu.display().to_string();
    let times = settings.repetitions(TIMES);
    for mib in settings.sized(&["10"][..], &["10", "100", "500"]) {
        report.attempt(&format!("{mib} MiB"), rows(&criu, mib, times));
    }
    Ok(())
}

fn rows(criu: &str, mib: &str, times: usize) -> Result<Vec<Row>> {
    let with = with_agent(criu, mib, times).with_context(|| format!("{mib} MiB under an agent"))?;
    let alone = alone(criu, mib, times).with_context(|| format!("{mib} MiB, criu alone"))?;
    Ok(vec![
        Row::new(format!("{mib} MiB: stop, the first ones"), "ms", Vec::new(), with.first_ms),
        Row::new(format!("{mib} MiB: stop, from then on"), "ms", alone.clone(), with.stops_ms),
        Row::new(format!("{mib} MiB: of that the dump"), "ms", alone, with.dumps_ms),
        Row::single(format!("{mib} MiB: images"), "MiB", with.images_mib),
        Row::single(format!("{mib} MiB: sent, of the last"), "MiB", with.sent_mib),
        Row::single(format!("{mib} MiB: sent, beside the program"), "ms", with.sent_ms),
    ])
}

struct WithAgent {
    /// Until as many sets are there as are kept, and one goes.
    first_ms: Vec<f64>,
    stops_ms: Vec<f64>,
    dumps_ms: Vec<f64>,
    images_mib: f64,
    sent_mib: f64,
    sent_ms: f64,
}

fn with_agent(criu: &str, mib: &str, times: usize) -> Result<WithAgent> {
    let mut world = World::new("bench-process", Transport::Unix)?;
    world.checkpoints("manual");
    let images = world.root().join("images").display().to_string();
    let keep = KEPT.to_string();
    world.agent_options(&[
        "--with-process",
        "--criu",
        criu,
        "--process-dir",
        &images,
        "--process-keep",
        &keep,
    ]);
    world.start_replayer()?;
    let (data, aux) = (world.place.data.display().to_string(), world.place.aux.display().to_string());
    world.run(&["python3", "-c", PROGRAM, mib, &data, &aux].map(str::to_owned))?;
    let number = |status: &serde_json::Value, name: &str| status["process"][name].as_f64().unwrap_or(0.0);
    let (mut stops, mut dumps, mut status) = (Vec::new(), Vec::new(), world.status()?);
    for _ in 0..=KEPT + times {
        let checkpoint = world.checkpoint()?;
        status = until("its images on the backup", LIMIT, || {
            world.status().ok().filter(|status| status["process"]["shipped"].as_u64() >= Some(checkpoint))
        })?;
        ensure!(number(&status, "failed") == 0.0, "{}", status["process"]);
        stops.push(number(&status, "last_stop_us") / 1e3);
        dumps.push(number(&status, "last_us") / 1e3);
    }
    // The first one of all sends everything, and looks at all pages for the first time.
    let (stops_ms, dumps_ms) = (stops.split_off(KEPT + 1), dumps.split_off(KEPT + 1));
    let first_ms = stops.split_off(1);
    ensure!(world.finish()?.success(), "the program failed");
    const MIB: f64 = 1_048_576.0;
    Ok(WithAgent {
        first_ms,
        stops_ms,
        dumps_ms,
        images_mib: number(&status, "last_bytes") / MIB,
        sent_mib: number(&status, "shipped_bytes") / MIB,
        sent_ms: number(&status, "shipped_us") / 1e3,
    })
}

fn alone(criu: &str, mib: &str, times: usize) -> Result<Vec<f64>> {
    let dir = leftovers::folder()?;
    let at = dir.path().display().to_string();
    let mut program = Command::new("python3");
    program
        .args(["-c", PROGRAM, mib, &at, &at])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: setsid(2) is async-signal-safe; CRIU wants a session of its own.
    unsafe {
        program.pre_exec(|| if libc::setsid() < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) });
    }
    let mut program = program.spawn()?;
    until("the program", LIMIT, || dir.path().join("ready").exists().then_some(()))?;
    let mut all = Vec::new();
    for round in 0..times {
        let images = dir.path().join(round.to_string());
        fs::create_dir(&images)?;
        let begun = Instant::now();
        let done = Command::new(criu)
            .args([
                "dump",
                "--leave-running",
                "--file-locks",
                "--tree",
                &program.id().to_string(),
                "--images-dir",
            ])
            .arg(&images)
            .output()?;
        all.push(begun.elapsed().as_secs_f64() * 1e3);
        ensure!(done.status.success(), "criu: {}", String::from_utf8_lossy(&done.stderr));
        fs::remove_dir_all(&images)?;
    }
    program.kill()?;
    program.wait()?;
    Ok(all)
}
