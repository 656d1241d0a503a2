//! `cargo xtask test`: everything, in the order in which mistakes are cheapest to find, and the true
//! totals at the end.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::shell::{cargo, root, shown};
use crate::{setup, tidy};

/// End-to-end tests beside each other: they mostly wait for each other's daemons and disks.
const E2E_THREADS: &str = "4";

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

/// Runs it all; an error when anything failed, after the line with the totals.
pub fn test(long: bool, filter: Option<&str>) -> Result<()> {
    let mut totals = Totals::default();
    // The tests load probes: where nothing can be installed or loaded, this is where it ends.
    let set_up = setup::setup();
    totals.add(report("setup", set_up));
    totals.add(report("tidy", tidy::tidy()));
    totals.add(step(cargo().args(["fmt", "--all", "--check"])));
    let probes = root().join("bfs-ebpf");
    totals.add(step(cargo().args(["fmt", "--check"]).current_dir(probes)));
    let lints = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    totals.add(step(cargo().args(lints)));
    totals.add(step(cargo().args(["build", "--quiet", "--workspace", "--bins"])));

    let mut unit = cargo();
    unit.args(["test", "--workspace", "--exclude", "bfs-tests", "--no-fail-fast"]);
    let mut end_to_end = cargo();
    end_to_end.args(["test", "--package", "bfs-tests", "--no-fail-fast"]);
    for command in [&mut unit, &mut end_to_end] {
        command.args(filter);
    }
    end_to_end.args(["--", "--test-threads", E2E_THREADS]);
    if long {
        end_to_end.env("BFS_LONG", "1");
    }
    for command in [&mut unit, &mut end_to_end] {
        totals.add(runner(command)?);
    }
    println!("{} passed, {} failed", totals.passed, totals.failed);
    if totals.failed > 0 {
        bail!("{} of {} failed", totals.failed, totals.passed + totals.failed);
    }
    Ok(())
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
