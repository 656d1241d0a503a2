//! The compiler of the probes: finding one, and building the probes alone.
//!
//! `core` is compiled for the eBPF target, so the compiler must have the sources of the standard
//! library: a rustup nightly with rust-src, or Debian's rustc-web with rust-web-src.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::shell::{cargo, output, root, run, target};

/// A compiler that can build the probes.
pub struct Compiler {
    /// Its binary.
    pub rustc: PathBuf,
    /// Major version of its LLVM; bpf-linker must be of the same.
    pub llvm: u32,
    /// For people.
    pub name: &'static str,
}

/// The compiler that is there, rustup's first.
pub fn find() -> Option<Compiler> {
    let nightly = output("rustup", &["which", "rustc", "--toolchain", "nightly"]);
    let nightly = nightly.map(|path| (PathBuf::from(path.trim()), "rustup nightly with rust-src"));
    let debian = Some((PathBuf::from("/usr/bin/rustc"), "Debian's rustc with its sources"));
    [nightly, debian].into_iter().flatten().find_map(|(rustc, name)| {
        let sysroot = output(&rustc, &["--print", "sysroot"])?;
        let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !sources.exists() {
            return None;
        }
        let version = output(&rustc, &["-vV"])?;
        let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
        Some(Compiler { llvm: llvm.split('.').next()?.parse().ok()?, rustc, name })
    })
}

/// Builds the probes.
pub fn build() -> Result<()> {
    let Some(compiler) = find() else {
        bail!("no Rust compiler with the sources of the standard library: run `cargo xtask setup`");
    };
    let mut command: Command = cargo();
    // A target folder of its own: another compiler, another set of flags.
    run(command
        .current_dir(root().join("bfs-ebpf"))
        .env("RUSTC", &compiler.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf")
        .env_remove("RUSTUP_TOOLCHAIN")
        .args([
            "build",
            "--release",
            "-Z",
            "build-std=core",
            "--target",
            "bpfel-unknown-none",
            "--target-dir",
        ])
        .arg(target().join("ebpf")))
}
