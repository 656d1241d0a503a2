//! `cargo xtask run`: the whole on this machine, for somebody who sees it for the first time.
//!
//! A replayer on a unix socket with a store in a temporary directory, a program under
//! `bfs-agent run`, its positions live, one kill -9 of the replayer, and at the end two proofs:
//! `bfs-agent verify`, and a comparison that shares no code with what it judges.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bfs_tests::oracle;
use bfs_tests::watch::until;
use bfs_tests::world::{Transport, World, number_named};

use crate::setup;
use crate::shell::{cargo, run as must, target};

/// How long our own program works.
const WORK: Duration = Duration::from_secs(16);
/// When the replayer is killed, and how long it stays away.
const KILL_AT: Duration = Duration::from_secs(6);
const AWAY: Duration = Duration::from_secs(3);

/// Runs the command, and stays until it may leave, so that the files rest while they are verified.
const LINGER: &str = "\
aux=$1; shift
: > \"$aux/ready\"
\"$@\"
status=$?
: > \"$aux/done\"
while [ ! -e \"$aux/leave\" ]; do sleep 0.05; done
exit $status";

/// Builds the daemons as users have them, and makes the harness find them.
pub fn release_binaries() -> Result<()> {
    if std::env::var_os("BFS_BIN_DIR").is_some() {
        // Binaries that were built elsewhere.
        return Ok(());
    }
    setup::setup(false)?;
    println!("building (release) ...");
    must(cargo().args(["build", "--quiet", "--release", "-p", "bfs-agent", "-p", "bfs-tests", "--bins"]))?;
    // SAFETY: xtask has no other thread yet.
    unsafe { std::env::set_var("BFS_BIN_DIR", target().join("release")) };
    Ok(())
}

/// See the module. Without `path` and `command`: SQLite with four writers.
pub fn run(path: Option<PathBuf>, command: Vec<String>) -> Result<()> {
    release_binaries()?;
    let mut world = World::new("demo", Transport::Unix)?;
    world.checkpoints("every=1s");
    let own_program = path.is_none();
    let command = match &path {
        None => {
            let workload = bfs_tests::world::binary("bfs-workload").display().to_string();
            let place = [&world.place.data, &world.place.aux].map(|p| p.display().to_string());
            [workload, "sqlite-journal".to_owned()].into_iter().chain(place).collect()
        }
        Some(path) => {
            let path = path.canonicalize().with_context(|| format!("--path {}", path.display()))?;
            ensure!(path.is_dir(), "--path {} is not a directory", path.display());
            world.place.data = path;
            command
        }
    };
    let shown = if own_program {
        "SQLite, 4 processes that write to one database".to_owned()
    } else {
        command.join(" ")
    };
    let line: Vec<String> = ["/bin/sh", "-c", LINGER, "sh", &world.place.aux.display().to_string()]
        .map(str::to_owned)
        .into_iter()
        .chain(command)
        .collect();
    println!("replicated directory  {}", world.place.data.display());
    println!("backup                {}", world.backup().display());
    println!("program               {shown}");
    let outcome = demonstrate(&mut world, &line, own_program);
    if outcome.is_err() {
        world.print_logs();
    }
    outcome
}

fn demonstrate(world: &mut World, line: &[String], own_program: bool) -> Result<()> {
    world.start_replayer()?;
    println!("the replayer listens on {}", world.destination());
    world.run(line)?;
    println!("the agent started the program; a checkpoint is taken every second\n");
    println!("captured, durable: the last record made on the primary, and the last one safe on the backup");
    println!(
        "confirmed, applied: the last checkpoint that is safe, and the one that the backup files show\n"
    );
    println!(
        "{:>6}  {:>9}  {:>9}  {:>9}  {:>9}  {:>7}  what happens",
        "time", "captured", "durable", "lag bytes", "confirmed", "applied"
    );
    let began = Instant::now();
    let (mut killed, mut back) = (None, None);
    let mut tick = 0;
    let done = world.place.aux.join("done");
    let over = || done.exists() || (own_program && began.elapsed() >= WORK);
    while world.program_runs() && !over() {
        let mut event = "";
        if killed.is_none() && began.elapsed() >= KILL_AT {
            world.kill_replayer()?;
            killed = Some(Instant::now());
            event = "kill -9 of the replayer: the program goes on, nothing is confirmed";
        } else if back.is_none() && killed.is_some_and(|at| at.elapsed() >= AWAY) {
            world.start_replayer()?;
            back = Some(Instant::now());
            event = "the replayer is back, and catches up";
        }
        show(world, began.elapsed(), event);
        tick += 1;
        // One line a second; a program that ends is seen at once.
        while began.elapsed() < Duration::from_secs(tick) && world.program_runs() && !done.exists() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    if killed.is_some() && back.is_none() {
        world.start_replayer()?;
    }
    std::fs::write(world.place.stop(), "")?;
    until("the program to end", Duration::from_secs(60), || done.exists().then_some(()))?;
    let worked = began.elapsed();
    show(world, worked, "the program is done");
    println!("\nbfs-agent verify ...");
    let verified = world.agent_command(&["verify"], Duration::from_secs(600))?;
    let said = String::from_utf8_lossy(&verified.stdout).into_owned();
    print!("{said}");
    ensure!(
        verified.status.success(),
        "verify ended with {}: {}",
        verified.status,
        String::from_utf8_lossy(&verified.stderr)
    );
    let taken = number_named(&world.status()?, &["checkpoints_taken"]).unwrap_or(0);
    std::fs::write(world.place.aux.join("leave"), "")?;
    let status = world.finish()?;
    let differences = oracle::compare(&world.place.data, &world.backup())?;

    println!("\nSummary");
    println!(
        "  the program ran {:.0} s beside {taken} checkpoints, and ended with {status}",
        worked.as_secs_f64()
    );
    if killed.is_some() {
        println!("  the replayer was killed once with -9 and brought back; the program did not notice");
    }
    println!("  bfs-agent verify: {}", last_line(&said));
    let (objects, bytes) = size(&world.place.data)?;
    println!(
        "  an independent comparison of {objects} files and directories ({bytes} bytes) with the backup:"
    );
    println!("  {} differences in names, bytes, modes, owners, times, attributes, links", differences.len());
    ensure!(differences.is_empty(), "the backup differs:\n{}", differences.join("\n"));
    ensure!(status.success(), "the program ended with {status}");
    println!("  the backup equals the primary");
    Ok(())
}

/// One line of positions; what the agent does not say is shown as a dash.
fn show(world: &World, time: Duration, event: &str) {
    let status = world.status().unwrap_or_default();
    let cell = |names: &[&str]| number_named(&status, names).map_or("-".to_owned(), |n| n.to_string());
    let line = format!(
        "{:>5.1}s  {:>9}  {:>9}  {:>9}  {:>9}  {:>7}  {event}",
        time.as_secs_f64(),
        cell(&["last_sequence"]),
        cell(&["durable"]),
        cell(&["lag_bytes"]),
        cell(&["confirmed"]),
        cell(&["applied"]),
    );
    println!("{}", line.trim_end());
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or("")
}

/// Objects and bytes below a directory.
fn size(root: &Path) -> Result<(u64, u64)> {
    let meta = std::fs::symlink_metadata(root)?;
    let mut total = (1, if meta.is_file() { meta.size() } else { 0 });
    if meta.is_dir() {
        for entry in std::fs::read_dir(root)? {
            let (objects, bytes) = size(&entry?.path())?;
            total = (total.0 + objects, total.1 + bytes);
        }
    }
    Ok(total)
}
