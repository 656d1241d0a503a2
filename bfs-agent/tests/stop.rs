//! The freezer and its guard, with real cgroups and the real binary. Needs root and cgroup v2; a
//! machine without them fails these tests with a sentence, it does not pass them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bfs_agent::primary::process::{exit_status, tree_of};
use bfs_agent::primary::stop::freezer::Freezer;
use bfs_agent::primary::stop::guard::Guard;
use bfs_agent::primary::stop::{Limits, StopError, Stopper};

const LIMITS: Limits = Limits { reach: Duration::from_secs(5), stand: Duration::from_secs(30) };

fn guard() -> Guard {
    Guard::start_program(Path::new(env!("CARGO_BIN_EXE_bfs-agent"))).expect("the guard starts")
}

fn freezer(name: &str) -> Freezer {
    Freezer::create(name, guard()).expect("these tests need root and a cgroup2 mount")
}

/// A program that counts in a file, with a child that does, too.
struct Counting {
    child: Child,
    dir: tempfile::TempDir,
}

impl Counting {
    fn start() -> Self {
        // In memory: a disk that others keep busy would make the program stand, too.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let script =
            "read go; for n in 1 2; do (i=0; while :; do i=$((i+1)); echo $i > $0/$n; done) & done; wait";
        let mut child =
            Command::new("sh").args(["-c", script]).arg(dir.path()).stdin(Stdio::piped()).spawn().unwrap();
        drop(child.stdin.take());
        let counting = Self { child, dir };
        counting.until_runs();
        counting
    }

    fn pids(&self) -> Vec<u32> {
        tree_of(self.child.id()).unwrap().iter().map(|t| t.tgid).collect()
    }

    fn counts(&self) -> Vec<Vec<u8>> {
        (1..=2).map(|n| fs::read(self.dir.path().join(n.to_string())).unwrap_or_default()).collect()
    }

    /// Waits until both have counted on; how long that took.
    fn until_runs(&self) -> Duration {
        let since = Instant::now();
        let before = self.counts();
        while self.counts().iter().zip(&before).any(|(a, b)| a == b) {
            assert!(since.elapsed() < Duration::from_secs(10), "the program does not run");
            std::thread::yield_now();
        }
        since.elapsed()
    }

    fn assert_stands(&self) {
        let before = self.counts();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(self.counts(), before, "the program runs while it should stand");
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        for pid in self.pids() {
            let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

#[test]
fn a_frozen_program_stands_and_goes_on() {
    let program = Counting::start();
    let mut freezer = freezer("test-go");
    for pid in program.pids() {
        freezer.enter(pid).unwrap();
    }
    for _ in 0..5 {
        let stopped = freezer.stop(LIMITS).unwrap();
        assert!(stopped.reached_in < Duration::from_secs(1));
        assert!(freezer.standing());
        assert!(matches!(freezer.stop(LIMITS), Err(StopError::Already)));
        program.assert_stands();
        assert!(freezer.go().unwrap() >= Duration::from_millis(50));
        program.until_runs();
    }
    let directory = freezer.directory().to_owned();
    drop(program);
    let deadline = Instant::now() + Duration::from_secs(10);
    while freezer.populated().unwrap() {
        assert!(Instant::now() < deadline);
    }
    drop(freezer);
    assert!(!directory.exists(), "an empty cgroup is removed");
}

#[test]
fn a_stop_beyond_its_limit_is_ended_by_the_guard() {
    let program = Counting::start();
    let mut freezer = freezer("test-limit");
    for pid in program.pids() {
        freezer.enter(pid).unwrap();
    }
    freezer.stop(Limits { reach: Duration::from_secs(5), stand: Duration::from_millis(200) }).unwrap();
    program.until_runs();
    assert!(!freezer.standing());
    assert!(matches!(freezer.go(), Err(StopError::LetGo { .. })));
    freezer.stop(LIMITS).unwrap();
    freezer.go().unwrap();
    drop(program);
    let deadline = Instant::now() + Duration::from_secs(10);
    while freezer.populated().unwrap() {
        assert!(Instant::now() < deadline);
    }
}

/// The agent that is killed: freezes and says so. Does nothing unless started by the test below.
#[test]
#[ignore = "a helper process of the next test"]
fn holder() {
    let Some(pids) = std::env::var_os("BFS_TEST_FREEZE") else { return };
    let mut freezer = freezer("test-kill");
    for pid in pids.to_str().unwrap().split(',') {
        freezer.enter(pid.parse().unwrap()).unwrap();
    }
    freezer.stop(LIMITS).unwrap();
    println!("\nfrozen {}", freezer.directory().display());
    loop {
        std::thread::park();
    }
}

#[test]
fn the_program_runs_again_within_a_second_when_the_agent_is_killed() {
    let program = Counting::start();
    let pids: Vec<String> = program.pids().iter().map(u32::to_string).collect();
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["holder", "--exact", "--ignored", "--nocapture"])
        .env("BFS_TEST_FREEZE", pids.join(","))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let directory: PathBuf = BufReader::new(agent.stdout.take().unwrap())
        .lines()
        .find_map(|l| l.unwrap().strip_prefix("frozen ").map(PathBuf::from))
        .expect("the holder freezes");
    program.assert_stands();
    agent.kill().unwrap();
    let took = program.until_runs();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let status = agent.wait().unwrap();
    assert_eq!(exit_status(status), 128 + 9);
    drop(program);
    let deadline = Instant::now() + Duration::from_secs(10);
    while fs::remove_dir(&directory).is_err() && directory.exists() {
        assert!(Instant::now() < deadline, "the cgroup is empty again");
    }
}

/// The tracer that is killed, likewise.
#[test]
#[ignore = "a helper process of the next test"]
fn tracer() {
    let Some(pid) = std::env::var_os("BFS_TEST_TRACE") else { return };
    let pid: u32 = pid.to_str().unwrap().parse().unwrap();
    let members = move || Ok(tree_of(pid).unwrap().iter().map(|t| t.tgid).collect());
    let mut ptrace = bfs_agent::primary::stop::ptrace::Ptrace::new(Box::new(members));
    ptrace.stop(LIMITS).unwrap();
    println!("\nstopped");
    loop {
        std::thread::park();
    }
}

#[test]
fn traced_programs_run_again_when_the_agent_is_killed() {
    let program = Counting::start();
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["tracer", "--exact", "--ignored", "--nocapture"])
        .env("BFS_TEST_TRACE", program.child.id().to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(agent.stdout.take().unwrap()).lines();
    assert!(lines.any(|l| l.unwrap() == "stopped"));
    program.assert_stands();
    agent.kill().unwrap();
    let took = program.until_runs();
    assert!(took < Duration::from_secs(1), "{took:?}");
    agent.wait().unwrap();
}
