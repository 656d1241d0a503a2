//! `cargo xtask test`: everything, in the order in which mistakes are cheapest to find, and the true
//! totals at the end.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::shell::{cargo, root, shown};
use crate::{setup, tidy};

/// End-to-end tests beside each other. They wait more than they work; many more make each other late on a small machine.
const E2E_THREADS: &str = "3";

/// How long what a runner printed is waited for once it has ended: a process that it left may hold the pipe for ever.
const LEFT_WAIT: Duration = Duration::from_secs(2);

/// One profile for all that is built here: the daemons are tested as users have them, nothing is
/// compiled twice, and lints share the build scripts (the probes, SQLite) with the tests.
pub const PROFILE: &str = "--release";

/// What test runners counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
}

impl Totals {
    /// Adds those of another runner.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }

    /// Prints the last line of a run; its status.
    pub fn verdict(self) -> ExitCode {
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    /// Of something that either works or does not.
    fn check(ok: bool) -> Self {
        Self { passed: u64::from(ok), failed: u64::from(!ok) }
    }
}

/// Runs it all; the line with the totals is the last one.
pub fn test(long: bool, filter: Option<&str>) -> Result<ExitCode> {
    let mut totals = Totals::default();
    let mut parts = Parts::default();
    // The tests load probes: where nothing can be installed or loaded, this is where it ends.
    totals.add(parts.time("setup", || report("setup", setup::setup(true))));
    totals.add(parts.time("tidy", || report("tidy", tidy::tidy())));
    totals.add(parts.time("format", || {
        let mut both = step(cargo().args(["fmt", "--all", "--check"]));
        both.add(step(cargo().args(["fmt", "--check"]).current_dir(root().join("bfs-ebpf"))));
        both
    }));
    totals.add(parts.time("lints", || {
        step(cargo().args([
            "clippy",
            "--quiet",
            PROFILE,
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]))
    }));
    // Built once, then started from here: `cargo test` of single packages would choose other
    // features of the crates that they share, and compile those again.
    let built = parts.time("build", || runners(&[]));
    totals.add(report("build", built.as_ref().map(drop).map_err(|e| anyhow::anyhow!("{e:#}"))));
    for (name, end_to_end) in [("unit tests", false), ("end to end", true)] {
        let chosen = built.iter().flatten().filter(|r| r.folder.ends_with("tests") == end_to_end);
        totals.add(parts.time(name, || -> Result<Totals> {
            let mut sum = Totals::default();
            for Runner { executable, folder } in chosen {
                let mut command = Command::new(executable);
                command.current_dir(folder).env("CARGO_MANIFEST_DIR", folder).args(filter);
                if end_to_end {
                    command.args(["--test-threads", E2E_THREADS]);
                }
                if long {
                    command.env("BFS_LONG", "1");
                }
                sum.add(runner(&mut command)?);
            }
            Ok(sum)
        })?);
    }
    parts.print();
    Ok(totals.verdict())
}

/// A program full of tests.
pub struct Runner {
    /// The program.
    pub executable: PathBuf,
    /// The package's folder, where it expects to be started.
    pub folder: PathBuf,
}

/// Builds tests: all of them and the daemons that they use, or, with `targets`, those that cargo
/// chooses by it.
pub fn runners(targets: &[&str]) -> Result<Vec<Runner>> {
    let mut command = cargo();
    command.args(["test", PROFILE, "--workspace", "--no-run", "--message-format", "json-render-diagnostics"]);
    command.args(targets);
    println!("+ {}", shown(&command));
    let done = command.stderr(Stdio::inherit()).output().context("cargo does not start")?;
    ensure!(done.status.success(), "{}: {}", shown(&command), done.status);
    let messages = String::from_utf8_lossy(&done.stdout).into_owned();
    let runners: Vec<Runner> = messages.lines().filter_map(test_program).collect();
    ensure!(!runners.is_empty(), "cargo built no tests");
    Ok(runners)
}

/// The test program that a message of cargo tells of.
fn test_program(message: &str) -> Option<Runner> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    if message["profile"]["test"] != true {
        return None;
    }
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    Some(Runner { executable: message["executable"].as_str()?.into(), folder })
}

/// How long each part took.
#[derive(Default)]
struct Parts(Vec<(&'static str, f64)>);

impl Parts {
    fn time<T>(&mut self, name: &'static str, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let done = work();
        self.0.push((name, began.elapsed().as_secs_f64()));
        done
    }

    fn print(&self) {
        let shown: Vec<String> =
            self.0.iter().map(|(name, seconds)| format!("{name} {seconds:.0} s")).collect();
        let total: f64 = self.0.iter().map(|part| part.1).sum();
        println!("time: {}; {total:.0} s altogether", shown.join(", "));
    }
}

fn report(name: &str, result: Result<()>) -> Totals {
    if let Err(error) = &result {
        println!("{name}: {error:#}");
    }
    Totals::check(result.is_ok())
}

fn step(command: &mut Command) -> Totals {
    println!("+ {}", shown(command));
    report(&shown(command), crate::shell::run(command))
}

/// Runs a test program, shows what it prints, and adds up its summaries.
fn runner(command: &mut Command) -> Result<Totals> {
    println!("+ {}", shown(command));
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} does not start", shown(command)))?;
    let printed = BufReader::new(child.stdout.take().expect("piped"));
    let (counted, counts) = mpsc::channel();
    std::thread::spawn(move || {
        for line in printed.lines().map_while(Result::ok) {
            println!("{line}");
            // Nobody waits any more where the runner left a process that goes on printing.
            let _ = counted.send(summary(&line).unwrap_or_default());
        }
    });
    let status = child.wait()?;
    let mut totals = Totals::default();
    loop {
        match counts.recv_timeout(LEFT_WAIT) {
            Ok(more) => totals.add(more),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                println!("{}: a process that it left holds its output", shown(command));
                break;
            }
        }
    }
    if !status.success() && totals.failed == 0 {
        // It did not compile, or it died: no summary says so.
        totals.failed = 1;
    }
    Ok(totals)
}

/// The numbers of `test result: ok. 3 passed; 0 failed; ...`.
pub fn summary(line: &str) -> Option<Totals> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |word: &str| {
        let before = rest.split(word).next()?.trim_end();
        before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    Some(Totals { passed: number(" passed")?, failed: number(" failed")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_added_up() {
        let line = "test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(summary(line), Some(Totals { passed: 12, failed: 3 }));
        assert_eq!(summary("test a ... ok"), None);
    }

    #[test]
    fn test_programs_are_found_among_the_messages_of_cargo() {
        let message = r#"{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml",
            "profile":{"test":true},"executable":"/w/target/release/deps/gate-1"}"#;
        let found = test_program(message).unwrap();
        assert_eq!(
            (found.executable, found.folder),
            ("/w/target/release/deps/gate-1".into(), "/w/tests".into())
        );
        assert!(test_program(&message.replace("true", "false")).is_none());
        assert!(test_program(r#"{"reason":"build-finished","success":true}"#).is_none());
    }

    #[test]
    fn a_runner_that_dies_without_a_summary_has_failed() {
        let died = runner(Command::new("sh").args(["-c", "exit 3"])).unwrap();
        assert_eq!(died, Totals { passed: 0, failed: 1 });
        let script = "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; exit 1";
        let died = runner(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(died, Totals { passed: 2, failed: 1 });
    }

    #[test]
    fn what_a_runner_leaves_running_is_not_waited_for() {
        let (script, began) =
            ("sleep 20 & echo 'test result: ok. 2 passed; 0 failed; 0 ignored'", Instant::now());
        let left = runner(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(left, Totals { passed: 2, failed: 0 });
        assert!(began.elapsed() < Duration::from_secs(15));
    }
}
