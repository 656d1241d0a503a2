//! The end of a world: its processes, its mounts, and what was said when a test failed.

use std::fs;
use std::process::Command;
use std::time::Duration;

use super::World;

/// Lines of each log that a failed test prints.
const LOG_LINES: usize = 60;
/// How long a daemon may take to say how it stands after a test failed.
const SAYS_WITHIN: Duration = Duration::from_secs(5);
/// Between two looks at it: what moves is seen to move.
const LOOKS_APART: Duration = Duration::from_millis(500);

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_standing();
        }
        // Everything at once, also what is stopped or was never waited for.
        self.leash.kill();
        for child in [&mut self.agent, &mut self.program, &mut self.replayer].into_iter().flatten() {
            let _ = child.wait();
        }
        for mount in self.mounted() {
            let _ = Command::new("umount").arg("-l").arg(mount).status();
        }
        if std::thread::panicking() {
            self.print_logs();
        }
        if std::env::var_os("BFS_KEEP").is_some()
            && let Some(directory) = self.directory.take()
        {
            eprintln!("kept: {}", directory.keep().display());
        }
    }
}

impl World {
    /// What is mounted below the directory, by us or by a program; the last first.
    fn mounted(&self) -> Vec<String> {
        let Some(directory) = &self.directory else { return Vec::new() };
        let below = format!("{}/", directory.path().display());
        let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let points = table.lines().rev().filter_map(|line| line.split(' ').nth(1));
        points.filter(|point| point.starts_with(&below)).map(str::to_owned).collect()
    }

    /// Prints how the agent and the program stand, twice.
    fn print_standing(&self) {
        for look in 0..2 {
            if look > 0 {
                std::thread::sleep(LOOKS_APART);
            }
            match self.agent_command(&["status", "--json"], SAYS_WITHIN) {
                Ok(said) => eprintln!("--- agent: {}", String::from_utf8_lossy(&said.stdout).trim_end()),
                Err(error) => eprintln!("--- agent: {error:#}"),
            }
            for (name, child) in [("agent", &self.agent), ("program", &self.program)] {
                let Some(child) = child else { continue };
                let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
                let state = status.lines().find(|line| line.starts_with("State:")).unwrap_or("gone");
                eprintln!("--- {name} {}: {state}", child.id());
            }
        }
    }

    /// Prints the end of each log.
    pub fn print_logs(&self) {
        let Ok(entries) = fs::read_dir(&self.logs) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- {} (the last of {} lines)", path.display(), lines.len());
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                eprintln!("{line}");
            }
        }
    }
}
