//! fio writes blocks that carry their own checksums; fio itself checks the backup.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Place, Program};

/// fio with one of its engines.
pub struct Fio {
    /// The engine: `io_uring`, `libaio`, ...
    pub engine: &'static str,
    /// What is special about it.
    pub options: &'static [&'static str],
}

impl Fio {
    fn arguments(&self, directory: &Path) -> Vec<String> {
        let mut line: Vec<String> = [
            "--name=job",
            "--rw=randwrite",
            "--bs=4k",
            "--size=24M",
            "--numjobs=2",
            "--iodepth=16",
            "--fallocate=none",
            "--verify=crc32c",
            "--randrepeat=1",
            // Else it leaves files where it was started.
            "--verify_state_save=0",
            // Some seconds, so that checkpoints come into the middle of it.
            "--rate_iops=2000",
            "--output-format=terse",
        ]
        .map(str::to_owned)
        .into();
        line.push(format!("--ioengine={}", self.engine));
        line.push(format!("--directory={}", directory.display()));
        line.extend(self.options.iter().map(|o| (*o).to_owned()));
        line
    }

    /// Lets the program end when fio has: until then it can be asked for checkpoints.
    ///
    /// # Errors
    /// When it did not begin.
    pub fn enough(place: &Place) -> Result<File> {
        // For reading too: that does not wait for the other side, as long as it is kept open.
        let mut gate = File::options().read(true).write(true).open(place.aux.join("enough"))?;
        gate.write_all(b"\n")?;
        Ok(gate)
    }

    /// What fio finds wrong with the blocks in a tree, block by block.
    ///
    /// # Errors
    /// When it does not start.
    pub fn verify(&self, tree: &Path) -> Result<Vec<String>> {
        let found = Command::new("fio")
            .args(self.arguments(tree))
            .arg("--verify_only")
            .current_dir(tree)
            .output()
            .context("fio does not start (xtask setup installs it)")?;
        let said = String::from_utf8_lossy(&found.stderr).replace(&tree.display().to_string(), "");
        let mut wrong: Vec<String> =
            said.lines().filter(|line| line.contains("verify")).map(str::to_owned).collect();
        wrong.sort();
        Ok(wrong)
    }
}

impl Program for Fio {
    fn name(&self) -> &'static str {
        "fio"
    }

    fn command(&self, place: &Place) -> Vec<String> {
        let script = "aux=$1; shift; mkfifo \"$aux/enough\"; touch \"$aux/ready\"; \
                      fio --do_verify=0 \"$@\"; status=$?; read -r _ < \"$aux/enough\"; exit $status";
        ["/bin/sh", "-c", script, "sh"]
            .map(str::to_owned)
            .into_iter()
            .chain([place.aux.display().to_string()])
            .chain(self.arguments(&place.data))
            .collect()
    }

    fn check(&self, _: &Path, _: &Place) -> Result<Vec<String>> {
        // What it wrote so far only fio knows, at its end.
        Ok(Vec::new())
    }
}
