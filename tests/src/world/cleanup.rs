//! The end of a world: its processes, its mounts, and what was said when a test failed.

use std::fs;
use std::process::Command;

use super::World;

/// Lines of each log that a failed test prints.
const LOG_LINES: usize = 60;

impl Drop for World {
    fn drop(&mut self) {
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
