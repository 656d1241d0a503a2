//! `cargo xtask bench process`: for how long a program stands for a checkpoint with process state, over its memory, and of
//! which parts that time is. Beside it, in the same run, `criu dump --leave-running` alone of the same program.
//!
//! The program has so much memory that was written once, and goes on writing one page in 64. Writes
//! target/bench/process.json.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bfs_tests::watch::until;
use bfs_tests::world::{Transport, World};
use serde_json::json;

use crate::demo::release_binaries;
use crate::shell::{target, write_report};

/// How often each is measured.
const TIMES: usize = 5;
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
pub fn process() -> Result<()> {
    release_binaries()?;
    let criu = target().join("criu/criu");
    ensure!(criu.exists(), "there is no {}: `cargo xtask setup --criu` provides it", criu.display());
    let criu = criu.display().to_string();
    println!("medians of {TIMES}, milliseconds; sent: of the last checkpoint, beside the program");
    println!(
        "{:>7} {:>9} {:>9} {:>9} {:>11} {:>10} {:>9}",
        "MiB", "stop", "of it dump", "criu alone", "images MiB", "sent MiB", "sent ms"
    );
    let mut results = Vec::new();
    for mib in ["10", "100", "500"] {
        let with = with_agent(&criu, mib).with_context(|| format!("{mib} MiB under an agent"))?;
        let alone = alone(&criu, mib).with_context(|| format!("{mib} MiB, criu alone"))?;
        let ms = |name: &str| with[name].as_f64().unwrap_or(f64::NAN);
        println!(
            "{mib:>7} {:>9.1} {:>10.1} {alone:>10.1} {:>11.1} {:>10.1} {:>9.1}",
            ms("stop_ms"),
            ms("dump_ms"),
            ms("images_mib"),
            ms("sent_mib"),
            ms("sent_ms")
        );
        results.push(json!({"mib": mib, "with_agent": with, "criu_alone_ms": alone}));
    }
    write_report("process", results)
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn with_agent(criu: &str, mib: &str) -> Result<serde_json::Value> {
    let mut world = World::new("bench-process", Transport::Unix)?;
    world.checkpoints("manual");
    let images = world.root().join("images").display().to_string();
    world.agent_options(&["--with-process", "--criu", criu, "--process-dir", &images]);
    world.start_replayer()?;
    let (data, aux) = (world.place.data.display().to_string(), world.place.aux.display().to_string());
    world.run(&["python3", "-c", PROGRAM, mib, &data, &aux].map(str::to_owned))?;
    let number = |status: &serde_json::Value, name: &str| status["process"][name].as_f64().unwrap_or(0.0);
    let (mut stops, mut dumps, mut status) = (Vec::new(), Vec::new(), world.status()?);
    for _ in 0..=TIMES {
        let checkpoint = world.checkpoint()?;
        status = until("its images on the backup", LIMIT, || {
            world.status().ok().filter(|status| status["process"]["shipped"].as_u64() >= Some(checkpoint))
        })?;
        ensure!(number(&status, "failed") == 0.0, "{}", status["process"]);
        stops.push(number(&status, "last_stop_us") / 1e3);
        dumps.push(number(&status, "last_us") / 1e3);
    }
    // The first sends everything, and looks at all pages for the first time.
    let (stop, dump) = (median(stops.split_off(1)), median(dumps.split_off(1)));
    ensure!(world.finish()?.success(), "the program failed");
    const MIB: f64 = 1_048_576.0;
    Ok(json!({
        "stop_ms": stop,
        "dump_ms": dump,
        "images_mib": number(&status, "last_bytes") / MIB,
        "sent_mib": number(&status, "shipped_bytes") / MIB,
        "sent_ms": number(&status, "shipped_us") / 1e3,
    }))
}

fn alone(criu: &str, mib: &str) -> Result<f64> {
    let dir = tempfile::tempdir()?;
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
    for round in 0..TIMES {
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
    Ok(median(all))
}
