//! What kind of machine a figure is of: enough to read it, nothing that names the machine.

use std::fmt;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use bfs_tests::world::command_ok;
use serde::{Deserialize, Serialize};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory in GiB.
    pub memory_gib: u64,
    /// Major and minor version.
    pub kernel: String,
    /// File system of the temporary directory, where the programs work.
    pub file_system: String,
    /// Load of the last minute when the run began: others that worked there too.
    pub load: f64,
}

impl Machine {
    /// The one that this runs on.
    ///
    /// # Errors
    /// When /proc does not say it.
    pub fn this() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
        let memory = read("/proc/meminfo")?;
        let kib = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).context("no MemTotal")?;
        let kib: u64 = kib.trim().trim_end_matches(" kB").parse()?;
        let release = read("/proc/sys/kernel/osrelease")?;
        let load = read("/proc/loadavg")?;
        let mut df = Command::new("df");
        let types = command_ok(df.arg("--output=fstype").arg(std::env::temp_dir()))?.stdout;
        let types = String::from_utf8_lossy(&types).into_owned();
        Ok(Self {
            cpus: std::thread::available_parallelism()?.get(),
            memory_gib: (kib + (1 << 19)) >> 20,
            kernel: release.split('.').take(2).collect::<Vec<_>>().join("."),
            file_system: types.lines().last().context("df says nothing")?.trim().to_owned(),
            load: load.split(' ').next().context("no load")?.parse()?,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { cpus, memory_gib, kernel, file_system, load } = self;
        write!(f, "{cpus} CPUs, {memory_gib} GiB, Linux {kernel}, {file_system}; load at the start {load}")
    }
}
