//! Names that come and go, for measurements: files that are made, get another name, and are removed.

use std::fs::{self, File};
use std::path::Path;

use anyhow::Result;

/// Files that exist at the same time.
const ALIVE: usize = 100;

/// Makes, renames and removes `count` files below `data`.
///
/// # Errors
/// What a call met.
pub fn run(data: &Path, count: usize) -> Result<()> {
    for folder in ["new", "kept"] {
        fs::create_dir(data.join(folder))?;
    }
    let kept = |n: usize| data.join("kept").join(n.to_string());
    for n in 0..count {
        let new = data.join("new").join(n.to_string());
        File::create(&new)?;
        fs::rename(&new, kept(n))?;
        if n >= ALIVE {
            fs::remove_file(kept(n - ALIVE))?;
        }
    }
    Ok(())
}
