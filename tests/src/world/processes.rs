//! The processes of a world: their numbers, and signals to them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::{FileSystem, World};
use crate::processes::close_others;
use crate::watch::{SOON, until};

/// The number here of the process below a cgroup that has this number in a namespace of its own.
fn outer_number(cgroup: &Path, inner: i32) -> Result<i32> {
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
    bail!("process {inner} of the namespace is not there")
}

fn signal(child: &Child, signal: i32) -> Result<()> {
    // SAFETY: a system call without pointers; the child was not waited for, so the number is its own.
    ensure!(unsafe { libc::kill(child.id() as i32, signal) } == 0, "{} cannot be signalled", child.id());
    Ok(())
}

/// Makes a process stand, or go on.
fn pause(child: &Child, stand: bool) -> Result<()> {
    signal(child, if stand { libc::SIGSTOP } else { libc::SIGCONT })
}

impl World {
    /// Makes the agent stand (SIGSTOP), or go on.
    ///
    /// # Errors
    /// When none runs.
    pub fn pause_agent(&self, stand: bool) -> Result<()> {
        pause(self.agent.as_ref().context("no agent runs")?, stand)
    }

    /// Makes the replayer stand (SIGSTOP), or go on.
    ///
    /// # Errors
    /// When none runs.
    pub fn pause_replayer(&self, stand: bool) -> Result<()> {
        pause(self.replayer.as_ref().context("no replayer runs")?, stand)
    }

    /// Process number of the agent.
    ///
    /// # Errors
    /// When none runs.
    pub fn agent_pid(&self) -> Result<u32> {
        Ok(self.agent.as_ref().context("no agent runs")?.id())
    }

    /// Number of the program's first process.
    ///
    /// # Errors
    /// When it was not started.
    pub fn program_pid(&self) -> Result<i32> {
        let text = fs::read_to_string(self.place.aux.join("pid")).context("the program was not started")?;
        ensure!(text.ends_with('\n'), "the program's number is not written yet");
        let number = text.trim().parse()?;
        let apart = self.place.aux.join("apart").exists();
        if !apart && self.agent_options.iter().any(|option| option == "--with-process") {
            return outer_number(self.leash.cgroup(), number);
        }
        Ok(number)
    }

    /// Starts the program in a cgroup of its own, as the leader of a session, by a process that ends at once; gives the cgroup,
    /// when the program works.
    ///
    /// # Errors
    /// When it does not come.
    pub fn start_apart(&self, command: &[String]) -> Result<PathBuf> {
        let cgroup = self.cgroup("apart")?;
        let mut line = Command::new("setsid");
        // "0" means the process that writes.
        line.args(["-f", "sh", "-c", "echo 0 > \"$1\" && echo $$ > \"$2\" && shift 2 && exec \"$@\"", "sh"]);
        line.arg(cgroup.join("cgroup.procs")).arg(self.place.aux.join("pid")).args(command);
        line.stdin(Stdio::null()).stdout(self.log("program.log")?).stderr(self.log("program.log")?);
        ensure!(self.leash.hold(close_others(&mut line))?.status()?.success(), "setsid(1) fails");
        fs::write(self.place.aux.join("apart"), "")?;
        until("the program to work", SOON, || self.place.aux.join("ready").exists().then_some(()))?;
        Ok(cgroup)
    }

    /// Whether the program still runs.
    #[must_use]
    pub fn program_runs(&self) -> bool {
        let Ok(pid) = self.program_pid() else { return false };
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        state.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z') && !rest.starts_with('X'))
    }

    /// Puts the folder of process images on a small file system of its own, in memory.
    ///
    /// # Errors
    /// When it cannot be made or mounted.
    pub fn mount_images(&mut self, mebibytes: u64) -> Result<()> {
        let at = self.root().join("images");
        fs::create_dir(&at)?;
        self.mount_at(FileSystem::Tmpfs, mebibytes, at)
    }

    /// Sends a signal to the agent.
    ///
    /// # Errors
    /// When none runs.
    pub fn signal_agent(&self, number: i32) -> Result<()> {
        signal(self.agent.as_ref().context("no agent runs")?, number)
    }
}
