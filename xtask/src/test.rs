//! `cargo xtask test`: everything, in the order in which mistakes are cheapest to find, and the true
//! totals at the end.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::shell::{cargo, root, shown};
use crate::{setup, tidy};

/// End-to-end tests beside each other. More of them only make each other late on a small machine.
const E2E_THREADS: &str = "2";

/// One profile for all that is built here: the daemons are tested as users have them, nothing is
/// compiled twice, and lints share the build scripts (the probes, SQLite) with the tests.
const PROFILE: &str = "--release";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    passed: u64,
    failed: u64,
}

impl Totals {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
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
    totals.add(parts.time("setup", || report("setup", setup::setup())));
    totals.add(parts.time("tidy", || report("tidy", tidy::tidy())));
    totals.add(parts.time("format", || {
        let mut both = step(cargo().args(["fmt", "--all", "--check"]));
        both.add(step(cargo().args(["fmt", "--check"]).current_dir(root().join("bfs-ebpf"))));
        both
    }));
    // Two packages may use a crate with different features: always the whole workspace, so that
    // each step finds what the one before has built.
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
    totals.add(parts.time("build", || {
        let mut both = step(cargo().args(["build", "--quiet", PROFILE, "--workspace", "--bins"]));
        both.add(step(cargo().args(["test", "--quiet", PROFILE, "--workspace", "--no-run"])));
        both
    }));
    for (name, packages, threads) in [
        ("unit tests", &["--workspace", "--exclude", "bfs-tests"][..], None),
        ("end to end", &["--package", "bfs-tests"], Some(E2E_THREADS)),
    ] {
        let mut command = cargo();
        command.args(["test", PROFILE, "--no-fail-fast"]).args(packages).args(filter);
        if let Some(threads) = threads {
            command.args(["--", "--test-threads", threads]);
        }
        if long {
            command.env("BFS_LONG", "1");
        }
        totals.add(parts.time(name, || runner(&mut command))?);
    }
    parts.print();
    println!("{} passed, {} failed", totals.passed, totals.failed);
    Ok(if totals.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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

/// Runs `cargo test`, shows what it prints, and adds up its summaries.
fn runner(command: &mut Command) -> Result<Totals> {
    println!("+ {}", shown(command));
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} does not start", shown(command)))?;
    let mut totals = Totals::default();
    for line in BufReader::new(child.stdout.take().expect("piped")).lines() {
        let line = line?;
        println!("{line}");
        totals.add(summary(&line).unwrap_or_default());
    }
    let status = child.wait()?;
    if !status.success() && totals.failed == 0 {
        // It did not compile, or it died: no summary says so.
        totals.failed = 1;
    }
    Ok(totals)
}

/// The numbers of `test result: ok. 3 passed; 0 failed; ...`.
fn summary(line: &str) -> Option<Totals> {
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
    fn a_runner_that_dies_without_a_summary_has_failed() {
        let died = runner(Command::new("sh").args(["-c", "exit 3"])).unwrap();
        assert_eq!(died, Totals { passed: 0, failed: 1 });
        let script = "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; exit 1";
        let died = runner(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(died, Totals { passed: 2, failed: 1 });
    }
}
