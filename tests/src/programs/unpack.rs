//! Unpacking a source tree of at least 5,000 files and deleting it, again and again.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::scripts::{last_mark, marks_hold, script};
use super::{Place, Program};
use crate::oracle;

const DIRECTORIES: usize = 100;
const FILES_EACH: usize = 52;

/// See the module.
pub struct Unpack;

impl Program for Unpack {
    fn name(&self) -> &'static str {
        "unpack"
    }

    fn prepare(&self, place: &Place) -> Result<()> {
        archive(&place.aux)?;
        let reference = place.aux.join("reference");
        fs::create_dir(&reference)?;
        tar(&["-xpf", "src.tar", "-C", "reference"], &place.aux)
    }

    fn command(&self, place: &Place) -> Vec<String> {
        script("unpack", include_str!("../../programs/unpack.sh"), place)
    }

    fn half_way(&self, place: &Place) -> bool {
        marks_hold(place, "unpacked 1")
    }

    /// Between two marks are seconds: directories of the tree come and go meanwhile.
    fn activity(&self, place: &Place) -> Result<u64> {
        let trees = fs::read_dir(&place.data)?.flatten();
        let there = trees.filter_map(|tree| fs::read_dir(tree.path().join("src")).ok());
        let there: usize = there.map(Iterator::count).sum();
        Ok(self.progress(&place.data)? * 1_000 + there as u64)
    }

    fn check(&self, tree: &Path, place: &Place) -> Result<Vec<String>> {
        match last_mark(tree)? {
            Some((mark, round)) if mark == "unpacked" => {
                oracle::compare(&place.aux.join("reference/src"), &tree.join(format!("tree-{round}/src")))
                    .context("comparing with the archive")
            }
            Some((mark, round)) if mark == "removed" && tree.join(format!("tree-{round}")).exists() => {
                Ok(vec![format!("tree-{round} is there although it was removed")])
            }
            _ => Ok(Vec::new()),
        }
    }
}

/// Makes `aux/src.tar`.
///
/// # Errors
/// When a file cannot be made or tar fails.
pub fn archive(aux: &Path) -> Result<()> {
    let src = aux.join("src");
    let mut random = 1u64;
    for directory in 0..DIRECTORIES {
        let path = src.join(format!("part-{}/module-{directory}", directory % 10));
        fs::create_dir_all(&path)?;
        for file in 0..FILES_EACH {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let len = (random >> 33) as usize % 6000;
            let line = format!("line of file {file} in directory {directory}: {random:x}\n");
            let mut text = line.repeat(len / line.len() + 1).into_bytes();
            text.truncate(len);
            let path = path.join(format!("file-{file}.c"));
            fs::File::create(&path)?.write_all(&text)?;
            if file % 10 == 0 {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o750))?;
            }
        }
        std::os::unix::fs::symlink("file-1.c", path.join("link"))?;
        fs::hard_link(path.join("file-2.c"), path.join("same"))?;
    }
    tar(&["--format=posix", "-cf", "src.tar", "src"], aux)?;
    fs::remove_dir_all(&src).context("removing the tree that was packed")
}

fn tar(args: &[&str], directory: &Path) -> Result<()> {
    let done =
        Command::new("tar").args(args).current_dir(directory).output().context("tar does not start")?;
    ensure!(done.status.success(), "tar {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}
