//! `cargo xtask setup`: installs what is missing, says what and why, asks nothing, and does nothing
//! when all is there.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, bail, ensure};

use crate::ebpf::toolchain;
use crate::shell::{cargo, find, is_root, run, shown, target};

/// The linker of the probes, and the version that works with the compilers named in ebpf.rs.
const BPF_LINKER: &str = "0.13.0";

/// A program that must be there: name, Debian packages, why.
pub type Tool = (&'static str, &'static str, &'static str);

/// What every build and test needs.
const PROGRAMS: [Tool; 21] = [
    ("cc", "gcc libc6-dev", "compiles the SQLite of the tests"),
    ("git", "git", "a program that the tests replicate"),
    ("tar", "tar", "a program that the tests replicate"),
    ("initdb", "postgresql", "a program that the tests replicate"),
    ("pgbench", "postgresql", "load for PostgreSQL"),
    ("strace", "strace", "shows that acknowledging waits for the sync"),
    ("setpriv", "util-linux", "runs commands of tests as another user"),
    ("taskset", "util-linux", "pins the programs of `bench`"),
    ("mkfs.ext4", "e2fsprogs", "small file systems for tests"),
    ("mkfs.xfs", "xfsprogs", "every way to change a file is tried on xfs too"),
    ("fio", "fio", "writes by io_uring and AIO, and checks the backup of it"),
    ("mkfs.btrfs", "btrfs-progs", "every way to change a file is tried on btrfs too"),
    ("stress-ng", "stress-ng", "a program that the tests replicate"),
    ("systemd-analyze", "systemd", "checks the units that are installed with bfs"),
    ("rsync", "rsync", "a program that the tests replicate"),
    ("redis-server", "redis-server", "a program that the tests replicate"),
    ("db_bench", "rocksdb-tools", "a program that the tests replicate"),
    ("mdb_load", "lmdb-utils", "a program that the tests replicate"),
    ("python3", "python3", "the examples of docs/interface.md are run"),
    ("socat", "socat", "the examples of docs/interface.md are run"),
    ("openssl", "openssl", "TLS is looked at from outside"),
];

/// Test suites for file systems, and their versions, which the tests replicate. They are programs in Rust that
/// no distribution packages.
const SUITES: [(&str, &str); 2] = [("fsx", "0.3.2"), ("pjdfstest", "0.2.2")];

/// Makes this machine ready; see the module. With CRIU where that is wanted.
pub fn setup(with_criu: bool) -> Result<()> {
    let mut apt = Apt::default();
    compiler(&mut apt)?;
    let suites = begin_suites()?;
    let rest = (|| {
        linker()?;
        install(&mut apt, &PROGRAMS)?;
        if with_criu {
            criu(&mut apt)?;
        }
        bpffs()
    })();
    // Nobody is left at work, whatever became of the rest.
    let ended: Vec<_> = suites.into_iter().map(|(line, mut suite)| (line, suite.wait())).collect();
    for (line, status) in ended {
        let status = status?;
        ensure!(status.success(), "{line}: {status}");
    }
    rest
}

/// Installs the suites that are missing: they are compiled while the rest is fetched.
fn begin_suites() -> Result<Vec<(String, Child)>> {
    let mut begun = Vec::new();
    for (name, version) in SUITES {
        if find(name, &[target().join("tools/bin")]).is_none() {
            println!("setup: cargo install {name} {version} (into target/tools): the tests replicate it");
            let mut install = installation(name, version);
            let child = install.spawn().with_context(|| format!("{} does not start", shown(&install)))?;
            begun.push((shown(&install), child));
        }
    }
    Ok(begun)
}

/// Provides a CRIU that works on this kernel, as `target/criu/criu`: the one that is installed where that does, else
/// Debian's of a newer release in a folder of its own, started by its own loader with its own libraries.
fn criu(apt: &mut Apt) -> Result<()> {
    let folder = target().join("criu");
    let launcher = folder.join("criu");
    let works = |program: &Path| {
        Command::new(program).arg("check").output().is_ok_and(|checked| checked.status.success())
    };
    if works(&launcher) {
        return Ok(());
    }
    std::fs::create_dir_all(&folder)?;
    let script = match find("criu", &["/usr/sbin".into()]).filter(|installed| works(installed)) {
        Some(installed) => format!("#!/bin/sh\nexec {} \"$@\"\n", installed.display()),
        None => {
            println!("setup: no CRIU that works on this kernel (it dumps and restores processes)");
            ensure!(is_root(), "unpacking one needs root: run `cargo xtask setup --criu` as root");
            install(apt, &[("debootstrap", "debootstrap", "unpacks packages of a newer release")])?;
            let root = folder.join("root");
            println!("setup: debootstrap trixie with criu (into {})", root.display());
            if root.exists() {
                std::fs::remove_dir_all(&root)?;
            }
            quiet(
                Command::new("debootstrap")
                    .args(["--variant=minbase", "--include=criu", "trixie"])
                    .arg(&root),
            )?;
            let CriuProgram { file, loader } = criu_program().context("no CRIU was unpacked")?;
            let (loader, folders) = loader.context("it has its own loader")?;
            format!(
                "#!/bin/sh\nexec {} --library-path {folders} {} \"$@\"\n",
                loader.display(),
                file.display()
            )
        }
    };
    std::fs::write(&launcher, script)?;
    std::fs::set_permissions(&launcher, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let checked = Command::new(&launcher).arg("check").output()?;
    ensure!(
        checked.status.success(),
        "{} check: {}",
        launcher.display(),
        String::from_utf8_lossy(&checked.stderr)
    );
    Ok(())
}

/// Where CRIU is that [`setup`] provides.
pub struct CriuProgram {
    /// The program itself.
    pub file: PathBuf,
    /// Its loader, and where that looks for libraries, where these are not the system's.
    pub loader: Option<(PathBuf, String)>,
}

/// Finds it.
pub fn criu_program() -> Option<CriuProgram> {
    let root = target().join("criu/root");
    if !root.exists() {
        return find("criu", &["/usr/sbin".into()]).map(|file| CriuProgram { file, loader: None });
    }
    let folders = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
    let folders = folders.map(|folder| root.join(folder).display().to_string()).join(":");
    let loader = Some((root.join("lib64/ld-linux-x86-64.so.2"), folders));
    Some(CriuProgram { file: root.join("usr/sbin/criu"), loader })
}

/// `cargo install` of a program into a folder below target/.
fn installation(name: &str, version: &str) -> Command {
    let mut command = cargo();
    command.args(["install", "--quiet", "--force", name, "--version", version, "--root"]);
    command.arg(target().join("tools"));
    command
}

/// Installs what of these is missing.
pub fn tools(tools: &[Tool]) -> Result<()> {
    install(&mut Apt::default(), tools)
}

fn install(apt: &mut Apt, tools: &[Tool]) -> Result<()> {
    let folders: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .collect();
    for (program, packages, why) in tools {
        if find(program, &folders).is_none() {
            println!("setup: {program} is missing ({why})");
            apt.install(&packages.split(' ').collect::<Vec<_>>())?;
            ensure!(
                *program == "initdb" || find(program, &folders).is_some(),
                "{program} is still missing after installing {packages}"
            );
        }
    }
    Ok(())
}

/// Debian's package manager; its lists are fetched once, before the first package.
#[derive(Default)]
struct Apt {
    updated: bool,
}

impl Apt {
    fn install(&mut self, packages: &[&str]) -> Result<()> {
        let list = packages.join(" ");
        if find("apt-get", &[]).is_none() {
            bail!(
                "this system has no apt-get: install what Debian calls `{list}` yourself, then run this again"
            );
        }
        if !is_root() {
            bail!("installing packages needs root: run `apt-get install {list}` as root, then this again");
        }
        if !self.updated {
            println!("setup: apt-get update");
            quiet(Command::new("apt-get").args(["-qq", "update"]))?;
            self.updated = true;
        }
        println!("setup: apt-get install {list}");
        quiet(
            Command::new("apt-get")
                .env("DEBIAN_FRONTEND", "noninteractive")
                .args(["-qq", "install", "-y", "--no-install-recommends"])
                .args(packages),
        )
    }
}

/// Runs without showing what it says, unless it fails.
pub fn quiet(command: &mut Command) -> Result<()> {
    let done = command.output().with_context(|| format!("{} does not start", shown(command)))?;
    ensure!(
        done.status.success(),
        "{} failed: {}\n{}{}",
        shown(command),
        done.status,
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}

fn compiler(apt: &mut Apt) -> Result<()> {
    if toolchain::compiler().is_some() {
        return Ok(());
    }
    println!("setup: no compiler for the probes (it needs the sources of Rust's standard library)");
    if find("apt-get", &[]).is_none() && find("rustup", &[]).is_some() {
        println!("setup: rustup toolchain install nightly --component rust-src");
        run(Command::new("rustup").args(["toolchain", "install", "nightly", "--component", "rust-src"]))?;
    } else {
        apt.install(&["rustc-web", "rust-web-src", "llvm-22-dev"])?;
    }
    ensure!(
        toolchain::compiler().is_some(),
        "there is still no compiler for the probes: install a rustup nightly with rust-src, or Debian's \
         rustc-web and rust-web-src"
    );
    Ok(())
}

fn linker() -> Result<()> {
    if toolchain::find().is_ok() {
        return Ok(());
    }
    let (rustc, llvm) = toolchain::compiler().context("the compiler was just found")?;
    let feature = format!("llvm-{llvm}");
    println!(
        "setup: cargo install bpf-linker {BPF_LINKER} ({feature}, into {}): links what {} compiles",
        target().join("tools").display(),
        rustc.display()
    );
    let mut command = installation("bpf-linker", BPF_LINKER);
    command.args(["--no-default-features", "--features", &feature]);
    let prefix = PathBuf::from(format!("/usr/lib/{feature}"));
    if prefix.exists() {
        command.env("LLVM_PREFIX", prefix);
    }
    run(&mut command)?;
    toolchain::find().context("bpf-linker was installed")?;
    Ok(())
}

fn bpffs() -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("/proc is not mounted")?;
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf")) {
        return Ok(());
    }
    if !Path::new("/sys/fs/bpf").exists() {
        bail!("this kernel has no BPF file system (/sys/fs/bpf): it must be built with CONFIG_BPF_SYSCALL");
    }
    if !is_root() {
        println!("setup: /sys/fs/bpf is not mounted; only root can do that (needed to run, not to build)");
        return Ok(());
    }
    println!("setup: mounting /sys/fs/bpf (ring and maps are pinned there)");
    quiet(Command::new("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))
}
