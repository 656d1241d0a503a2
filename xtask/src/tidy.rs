//! The rules of the repository itself.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::shell::root;

/// Longest file, in lines.
const LINES_MAX: usize = 700;
/// Files that must be there.
const NEEDED: [&str; 6] =
    ["README.md", "ARCHITECTURE.md", "LICENSE-MIT", "LICENSE-APACHE", "LICENSE-GPL-2.0", ".ci/run"];

/// Checks all of it; an error lists what is wrong.
pub fn tidy() -> Result<()> {
    let mut wrong = Vec::new();
    for name in NEEDED {
        if !root().join(name).exists() {
            wrong.push(format!("{name} is missing"));
        }
    }
    let mut files = Vec::new();
    collect(root(), &mut files)?;
    for path in files {
        let text = fs::read_to_string(&path)?;
        let shown = path.strip_prefix(root()).unwrap_or(&path).display().to_string();
        wrong.extend(check(&text).into_iter().map(|what| format!("{shown}: {what}")));
    }
    if wrong.is_empty() {
        println!("tidy: nothing to say");
        return Ok(());
    }
    bail!("tidy:\n  {}", wrong.join("\n  "))
}

/// What is wrong with a source file.
fn check(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let lines = text.lines().count();
    if lines > LINES_MAX {
        wrong.push(format!("{lines} lines (at most {LINES_MAX}): it holds two things"));
    }
    if !text.starts_with("//!") {
        wrong.push("the first line does not say what the file holds (//!)".to_owned());
    }
    // Put together here, so that this file does not hold them.
    for word in
        [["FIX", "ME"], ["to", "do!"], ["unimple", "mented!"], ["db", "g!("]].map(|parts| parts.concat())
    {
        if let Some(at) = text.lines().position(|line| line.contains(&word)) {
            wrong.push(format!("line {}: {word}", at + 1));
        }
    }
    wrong
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            collect(&path, files)?;
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_file_is_let_through_and_a_bad_one_is_not() {
        assert!(check("//! Says what it is.\n").is_empty());
        assert_eq!(check("fn main() {}\n").len(), 1);
        assert_eq!(check(&format!("//! x\n// {}{}\n", "FIX", "ME")).len(), 1);
        assert_eq!(check(&format!("//! x\n{}", "\n".repeat(LINES_MAX))).len(), 1);
    }
}
