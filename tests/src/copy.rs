//! An exact copy of a tree, for the command of `checkpoint --stopped` and for the checkers.
//!
//! `cp -a` keeps everything that the oracle compares; that it does is itself a test (e2e/harness.rs).

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Copies from the working directory to descriptor 9: both paths are short, so that names near the longest path
/// there is can be copied too. $1 from, $2 to, $3 cp(1): some shells have one of their own.
const SCRIPT: &str = "mkdir \"$2\" && exec 9< \"$2\" && cd \"$1\" && exec \"$3\" -a --reflink=auto --sparse=auto -T . /proc/self/fd/9/.";

/// The command that makes `to` (which must not exist) an exact copy of `from`.
#[must_use]
pub fn command(from: &Path, to: &Path) -> Vec<String> {
    let text = |path: &Path| path.to_str().expect("paths of tests are text").to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cp = std::env::split_paths(&path).map(|folder| folder.join("cp")).find(|cp| cp.is_file());
    let cp = cp.unwrap_or_else(|| PathBuf::from("cp"));
    ["sh", "-c", SCRIPT, "copy"]
        .map(str::to_owned)
        .into_iter()
        .chain([text(from), text(to), text(&cp)])
        .collect()
}

/// Makes `to` an exact copy of `from`.
///
/// # Errors
/// When `cp` fails.
pub fn exact(from: &Path, to: &Path) -> Result<()> {
    let line = command(from, to);
    let done = Command::new(&line[0]).args(&line[1..]).output().context("cp does not start")?;
    ensure!(done.status.success(), "{line:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}
