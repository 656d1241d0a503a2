//! docs/write-paths.md as data, and what the running kernel has.
//!
//! A row of the table is `| way | calls | captured | test |`. Calls stand in backticks by the kernel's
//! own names (`sys_` left out), ioctls as `ioctl:NAME`, opcodes of io_uring as `uring:NAME`. A test is
//! the name of a row ([`super::all`]), or `FILE: function` of a file in tests/e2e or bfs-agent/tests,
//! or the word limit.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// How a way to change a file is treated.
pub const CAPTURED: [&str; 6] = ["exact", "by reference", "suspect", "everything", "refused", "limit"];

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What is done.
    pub way: String,
    /// By which calls.
    pub calls: Vec<String>,
    /// One of [`CAPTURED`], and perhaps more words after a colon.
    pub captured: String,
    /// Which tests show it.
    pub tests: Vec<String>,
}

/// The lines of all tables in a text.
///
/// # Errors
/// A line that is not one.
pub fn parse(text: &str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        ensure!(cells.len() == 4, "not four cells: {line}");
        if cells[0] == "Way" || cells[0].starts_with("--") {
            continue;
        }
        let word = cells[2].split(':').next().unwrap_or_default();
        ensure!(CAPTURED.contains(&word), "{word:?} is none of {CAPTURED:?}: {line}");
        let tests = ticked(cells[3]);
        ensure!(!tests.is_empty() || word == "limit", "no test, and not a limit: {line}");
        let (way, captured) = (cells[0].to_owned(), cells[2].to_owned());
        lines.push(Line { way, calls: ticked(cells[1]), captured, tests });
    }
    Ok(lines)
}

/// The words in backticks.
fn ticked(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether a test of this name is there; `root` is the repository.
///
/// # Errors
/// When the file it names cannot be read.
pub fn test_exists(root: &Path, name: &str) -> Result<bool> {
    let Some((file, function)) = name.split_once(": ") else {
        return Ok(super::all().iter().any(|row| row.name == name));
    };
    let path = root.join(file);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.contains(&format!("fn {function}(")))
}

/// The system calls of the running kernel, by the names of their functions.
///
/// # Errors
/// When the kernel does not show its symbols.
pub fn system_calls() -> Result<BTreeSet<String>> {
    let symbols = std::fs::read_to_string("/proc/kallsyms").context("/proc/kallsyms cannot be read")?;
    let names: BTreeSet<String> = symbols
        .lines()
        .filter_map(|line| line.split(' ').nth(2)?.split('\t').next()?.strip_prefix("__x64_sys_"))
        // What the compiler split off is not a call of its own.
        .filter(|name| !name.contains('.'))
        .map(str::to_owned)
        .collect();
    ensure!(names.len() > 300, "the kernel shows only {} system calls (root?)", names.len());
    Ok(names)
}

/// The words of a list that are not comments (`#` to the end of the line).
#[must_use]
pub fn words(list: &str) -> BTreeSet<String> {
    let lines = list.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
}
