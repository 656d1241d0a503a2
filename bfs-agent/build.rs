//! Compiles the probes and puts the object where the agent embeds it from.

use std::{env, path::Path};

#[path = "../bfs-ebpf/toolchain.rs"]
mod toolchain;

fn main() {
    println!("cargo::rerun-if-changed=../bfs-ebpf/src");
    println!("cargo::rerun-if-changed=../bfs-ebpf/toolchain.rs");
    println!("cargo::rerun-if-changed=../bfs-ebpf/Cargo.toml");
    println!("cargo::rerun-if-changed=../bfs-ebpf/Cargo.lock");
    println!("cargo::rerun-if-changed=../bfs-common/src/abi");
    if let Err(message) = build() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<(), String> {
    let variable = |name| env::var_os(name).ok_or_else(|| format!("cargo did not set {name}"));
    let manifest = variable("CARGO_MANIFEST_DIR")?;
    let out = variable("OUT_DIR")?;
    let out = Path::new(&out);
    let source = Path::new(&manifest).with_file_name("bfs-ebpf");
    let toolchain = toolchain::find().map_err(|missing| missing.to_string())?;
    let object = toolchain.build(&source, &out.join("bfs-ebpf-target"))?;
    std::fs::copy(&object, out.join("bfs-ebpf"))
        .map_err(|error| format!("cannot copy {}: {error}", object.display()))?;
    Ok(())
}
