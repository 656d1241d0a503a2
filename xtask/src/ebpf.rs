//! Building the probes alone, with the compiler that the agent's build script finds too.

use anyhow::{Result, anyhow};

use crate::shell::{root, target};

#[path = "../../bfs-ebpf/toolchain.rs"]
pub mod toolchain;

/// Builds the probes, and says where they are.
pub fn build() -> Result<()> {
    let toolchain = toolchain::find()?;
    println!("building the probes with {} (LLVM {})", toolchain.rustc.display(), toolchain.llvm_major);
    // A target folder of its own: another compiler, another set of flags.
    let object = toolchain.build(&root().join("bfs-ebpf"), &target().join("ebpf")).map_err(|e| anyhow!(e))?;
    println!("{}", object.display());
    Ok(())
}
