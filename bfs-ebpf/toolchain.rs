//! Finding a compiler for the probes, and running it.
//!
//! Shared source: the agent's build script and xtask include this file with `#[path]`. It uses the
//! standard library only. The probes need the sources of `core` (it is compiled for the BPF
//! target) and a bpf-linker of the same LLVM major version as the compiler. Two pairs are known:
//! a rustup nightly with `rust-src`, and Debian's `/usr/bin/rustc` with `rust-web-src` or `rust-src`.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

/// The target of the probes.
const TARGET: &str = "bpfel-unknown-none";

/// Debian's compiler.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// What is needed to compile the probes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// The cargo that drives it.
    pub cargo: PathBuf,
    /// The directory that bpf-linker is in.
    pub linker_dir: PathBuf,
    /// The major version of LLVM in the compiler.
    pub llvm_major: u32,
}

/// What is missing, in one sentence that ends with what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing(String);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the probes cannot be compiled: {}; run `cargo xtask setup`", self.0)
    }
}

impl std::error::Error for Missing {}

/// Finds a toolchain; a rustup nightly goes before Debian's compiler.
pub fn find() -> Result<Toolchain, Missing> {
    let mut seen = Vec::new();
    for rustc in compilers() {
        let Some(llvm_major) = llvm_major(&rustc) else {
            continue;
        };
        if !has_sources(&rustc) {
            seen.push(format!("{} has no sources of the standard library (rust-src)", rustc.display()));
            continue;
        }
        let Some(linker_dir) = linker_dir(llvm_major) else {
            seen.push(format!("there is no bpf-linker for LLVM {llvm_major} (of {})", rustc.display()));
            continue;
        };
        let Some(cargo) = cargo_for(&rustc) else {
            seen.push(format!("there is no cargo for {}", rustc.display()));
            continue;
        };
        return Ok(Toolchain { rustc, cargo, linker_dir, llvm_major });
    }
    if seen.is_empty() {
        seen.push(
            "there is neither a nightly of rustup with rust-src nor Debian's rustc-web with rust-web-src"
                .to_owned(),
        );
    }
    Err(Missing(seen.join(", and ")))
}

/// A compiler with the sources that are needed, and the major version of its LLVM, whether or not
/// a bpf-linker for it is there: what setup needs to know to install one.
#[allow(dead_code, reason = "of the two that include this file only xtask installs")]
pub fn compiler() -> Option<(PathBuf, u32)> {
    let usable = compilers().into_iter().filter(|rustc| has_sources(rustc));
    usable.map(|rustc| (llvm_major(&rustc), rustc)).find_map(|(major, rustc)| Some((rustc, major?)))
}

impl Toolchain {
    /// Compiles the crate in `manifest_dir` into `target_dir`; the path of the object.
    pub fn build(&self, manifest_dir: &Path, target_dir: &Path) -> Result<PathBuf, String> {
        let mut command = Command::new(&self.cargo);
        // What cargo and rustup set for the outer build means another compiler and target.
        for (name, _) in env::vars_os() {
            if is_of_outer_build(&name) {
                command.env_remove(name);
            }
        }
        command
            .current_dir(manifest_dir)
            .args(["build", "--release", "--locked", "-Z", "build-std=core", "--target", TARGET])
            .arg("--target-dir")
            .arg(target_dir)
            .env("RUSTC", &self.rustc)
            // `-Z` on a stable compiler.
            .env("RUSTC_BOOTSTRAP", "1")
            // Without types (--btf needs debuginfo) the kernel refuses callbacks.
            .env("RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf -C link-arg=--disable-expand-memcpy-in-order")
            .env("PATH", self.path());
        let output =
            command.output().map_err(|error| format!("cannot run {}: {error}", self.cargo.display()))?;
        if !output.status.success() {
            return Err(format!(
                "compiling the probes with {} failed ({}):\n{}",
                self.rustc.display(),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        let object = target_dir.join(TARGET).join("release").join("bfs-ebpf");
        if object.is_file() { Ok(object) } else { Err(format!("{} was not made", object.display())) }
    }

    /// `PATH` with the linker's directory in front.
    fn path(&self) -> OsString {
        let rest = env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(self.linker_dir.clone()).chain(env::split_paths(&rest));
        env::join_paths(dirs).unwrap_or(rest)
    }
}

fn is_of_outer_build(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    // CARGO_HOME and CARGO_NET_* say where packages are and how to get them: they stay.
    let kept =
        ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_REGISTRY_", "CARGO_SOURCE_"];
    (name.starts_with("CARGO") && !kept.iter().any(|prefix| name.starts_with(prefix)))
        || name.starts_with("RUSTC")
        || [
            "RUSTFLAGS",
            "RUSTDOC",
            "RUSTDOCFLAGS",
            "RUSTUP_TOOLCHAIN",
            "TARGET",
            "HOST",
            "OUT_DIR",
            "LD_LIBRARY_PATH",
        ]
        .contains(&name)
}

/// Compilers to try, best first.
fn compilers() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let home = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".rustup")));
    if let Some(entries) = home.and_then(|home| std::fs::read_dir(home.join("toolchains")).ok()) {
        let mut nightlies: Vec<_> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("nightly")))
            .map(|path| path.join("bin/rustc"))
            .collect();
        nightlies.sort();
        found.append(&mut nightlies);
    }
    found.push(PathBuf::from(DEBIAN_RUSTC));
    found.retain(|path| path.is_file());
    found
}

fn output(command: &mut Command) -> Option<String> {
    for name in ["RUSTUP_TOOLCHAIN", "RUSTC", "RUSTFLAGS", "LD_LIBRARY_PATH"] {
        command.env_remove(name);
    }
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

fn llvm_major(rustc: &Path) -> Option<u32> {
    let text = output(Command::new(rustc).arg("-vV"))?;
    let version = text.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.parse().ok()
}

fn has_sources(rustc: &Path) -> bool {
    let Some(sysroot) = output(Command::new(rustc).args(["--print", "sysroot"])) else {
        return false;
    };
    Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

/// Cargo beside the compiler; else the one that runs us or is in the path, which takes the
/// compiler from `RUSTC`.
fn cargo_for(rustc: &Path) -> Option<PathBuf> {
    let beside = rustc.with_file_name("cargo");
    if beside.is_file() {
        return Some(beside);
    }
    let outer = env::var_os("CARGO").map(PathBuf::from).filter(|path| path.is_file());
    outer.or_else(|| path_dirs().map(|dir| dir.join("cargo")).find(|path| path.is_file()))
}

fn path_dirs() -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).collect::<Vec<_>>().into_iter()
}

/// Where a bpf-linker for that LLVM is: in the path, in cargo's folder, in the workspace's.
fn linker_dir(llvm_major: u32) -> Option<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned);
    let dirs = workspace
        .map(|root| root.join("target/tools/bin"))
        .into_iter()
        .chain(cargo_home.map(|home| home.join("bin")))
        .chain(path_dirs());
    dirs.filter(|dir| dir.join("bpf-linker").is_file())
        .find(|dir| linker_llvm(&dir.join("bpf-linker")).is_none_or(|major| major == llvm_major))
}

/// The LLVM of a bpf-linker, where it says so (`--version` of 0.13 does not always).
fn linker_llvm(linker: &Path) -> Option<u32> {
    let text = output(Command::new(linker).arg("--version"))?;
    let rest = &text[text.to_ascii_lowercase().find("llvm")? + 4..];
    let digits: String =
        rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}
