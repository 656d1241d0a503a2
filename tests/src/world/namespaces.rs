//! Programs in a PID namespace of their own.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::World;

/// The number here of the process below a cgroup that has this number in a namespace of its own.
pub(super) fn outer_number(cgroup: &Path, inner: i32) -> Result<i32> {
    let mut todo = vec![cgroup.to_owned()];
    while let Some(directory) = todo.pop() {
        for pid in fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default().lines() {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
            let numbers: Vec<&str> = numbers.split_whitespace().collect();
            if numbers.len() > 1 && numbers.last().and_then(|n| n.parse().ok()) == Some(inner) {
                return Ok(pid.parse()?);
            }
        }
        let below = fs::read_dir(&directory).into_iter().flatten().flatten();
        todo.extend(below.map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    anyhow::bail!("process {inner} of the namespace is not there")
}

impl World {
    /// Sends a signal to the agent.
    ///
    /// # Errors
    /// When none runs.
    pub fn signal_agent(&self, signal: i32) -> Result<()> {
        let agent = self.agent.as_ref().context("no agent runs")?;
        // SAFETY: a system call without pointers; the child was not waited for, so the number is its own.
        ensure!(unsafe { libc::kill(agent.id() as i32, signal) } == 0, "the agent cannot be signalled");
        Ok(())
    }
}
