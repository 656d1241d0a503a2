//! A machine inside QEMU: its root file system, its boot, and what its tests say.
//!
//! The root file system is an initramfs: busybox, our programs with their libraries, the modules that
//! file systems need. Its `/init` runs the tests and turns the machine off. There is no network, no
//! disk, and nothing of this machine that it could write to.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::fetch::Kernel;
use crate::setup::{self, quiet};
use crate::shell::{find, target};
use crate::test::{Runner, Totals, summary};

/// What runs in the guest: test binary, and the filters of its tests that need no program that the
/// guest has not.
const RUNNERS: [(&str, &[&str]); 5] = [
    ("write_paths", &["rows_on", "overlayfs"]),
    ("programs", &["append_writers", "racing_buffer", "sqlite"]),
    ("gate", &["nothing_of_a_pending_checkpoint_is_ever_seen"]),
    ("crashes", &["killed_during_appends", "runs_again"]),
    // What it prints is what was measured.
    ("process_ahead", &["--nocapture"]),
];

/// Modules that the guest loads, where the kernel has them as modules; those that they need follow.
const MODULES: [&str; 17] = [
    "crc32c_generic",
    "crc32c-intel",
    "loop",
    "ext4",
    "xfs",
    "btrfs",
    "overlay",
    "fuse",
    // CRIU tries them when it looks at the kernel, and asks the last ones for sockets.
    "tun",
    "veth",
    "nf_tables",
    "unix_diag",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "netlink_diag",
    "af_packet_diag",
];

/// Where CRIU stands in the guest, beside the programs under test.
const CRIU: &str = "bfs/criu";

/// Programs of this machine that the guest gets.
const PROGRAMS: [&str; 6] = ["cp", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "setpriv", "taskset"];

/// How long a guest may take; without KVM it is some twenty times slower than this machine.
const LIMIT: Duration = Duration::from_secs(3600);

/// The last line of a guest that ran to its end.
const DONE: &str = "guest: done";

/// The first process of the guest.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin HOME=/ BFS_BIN_DIR=/bfs
# The first root cannot be exchanged for another (pivot_root(2)); one that is mounted can.
if [ ! -e /moved ]; then
    mkdir /next
    mount -t tmpfs -o mode=755,size=2G next /next
    for entry in /*; do
        [ $entry = /next ] || cp -a $entry /next/
    done
    touch /next/moved
    exec switch_root /next /init
fi
ulimit -n 1048576
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts /run
mount -t tmpfs tmp /dev/shm
mount -t tmpfs run /run
mount -t devpts pts /dev/pts
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t tracefs trace /sys/kernel/tracing
ip link set lo up
for module in $(cat /modules/order); do insmod /modules/$module || echo "guest: $module was refused"; done
truncate -s 1600M /dev/shm/disk
mkfs.ext4 -q /dev/shm/disk
mkdir -p /tmp
mount -o loop /dev/shm/disk /tmp || echo "guest: no ext4"
echo "guest: Linux $(uname -r)"
cd /tests
while read -r line; do
    echo "+ $line"
    $line 2>&1
done < /runners
echo "guest: done"
poweroff -f
"#;

/// That there is a test program of this name that runs in the guest.
///
/// # Errors
/// When there is none: with those that there are.
pub fn knows(name: &str) -> Result<()> {
    let all = RUNNERS.map(|(name, _)| name);
    ensure!(all.contains(&name), "--only {name}: what runs there is {}", all.join(", "));
    Ok(())
}

/// Boots the kernel, runs the tests there, gives what they counted. What the guest prints goes to
/// standard output, and into a file beside the kernel.
pub fn run(kernel: &Kernel, folder: &Path, built: &[Runner], only: Option<&str>) -> Result<Totals> {
    let image = pack(kernel, folder, built, only)?;
    let log = folder.join(format!("{}.log", kernel.version));
    println!("kernels: booting {} in QEMU (log: {})", kernel.version, log.display());
    let guest = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "4G"])
        .args(["-nographic", "-no-reboot", "-nic", "none"])
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&image)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("qemu-system-x86_64 does not start")?;
    let totals = watch(Guest(guest), &log);
    fs::remove_file(&image)?;
    totals
}

/// Ends with its handle.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn watch(mut guest: Guest, log: &Path) -> Result<Totals> {
    let output = guest.0.stdout.take().context("the guest's output is a pipe")?;
    let (lines, received) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
    let end = Instant::now() + LIMIT;
    let (mut totals, mut text, mut done) = (Totals::default(), String::new(), false);
    // A runner without a summary died.
    let mut running = 0u64;
    while let Ok(line) = received.recv_timeout(end.saturating_duration_since(Instant::now())) {
        println!("  {line}");
        text.push_str(&line);
        text.push('\n');
        if line.starts_with("+ /") {
            running += 1;
        } else if let Some(sum) = summary(&line) {
            running -= 1;
            totals.add(sum);
        }
        done |= line == DONE;
    }
    fs::write(log, text)?;
    totals.failed += running + u64::from(!done);
    if !done {
        println!("  the guest did not come to its end within {} minutes", LIMIT.as_secs() / 60);
    }
    Ok(totals)
}

/// The root file system as a file.
fn pack(kernel: &Kernel, folder: &Path, built: &[Runner], only: Option<&str>) -> Result<PathBuf> {
    let root = folder.join("root");
    let _ = fs::remove_dir_all(&root);
    for sub in ["bin", "bfs", "tests", "modules", "proc", "sys", "dev", "etc", "lib64", "var/tmp"] {
        fs::create_dir_all(root.join(sub))?;
    }
    let mut libraries = BTreeSet::new();
    let mut place = |from: &Path, to: &str| -> Result<()> {
        let to = root.join(to);
        fs::copy(from, &to).with_context(|| from.display().to_string())?;
        // What the debugger needs is most of it.
        quiet(Command::new("strip").arg("--strip-debug").arg(&to))?;
        libraries.extend(needed(from)?);
        Ok(())
    };
    let release = target().join("release");
    for program in ["bfs-agent", "bfs-replayer", "bfs-workload"] {
        place(&release.join(program), &format!("bfs/{program}"))?;
    }
    let mut runners = String::new();
    for (name, filters) in RUNNERS.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)) {
        place(runner(built, name)?, &format!("tests/{name}"))?;
        runners += &format!("/tests/{name} --test-threads 1 {}\n", filters.join(" "));
    }
    for program in PROGRAMS {
        let path = find(program, &["/usr/sbin", "/sbin"].map(PathBuf::from));
        place(&path.with_context(|| format!("{program} is missing"))?, &format!("bin/{program}"))?;
    }
    pack_criu(&root.join(CRIU))?;
    for library in libraries {
        let to = root.join(library.strip_prefix("/")?);
        fs::create_dir_all(to.parent().context("a library stands in a folder")?)?;
        fs::copy(&library, to).with_context(|| library.display().to_string())?;
    }
    let busybox = find("busybox", &[]).context("busybox is missing")?;
    fs::copy(&busybox, root.join("bin/busybox"))?;
    let applets = Command::new(&busybox).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines() {
        let link = root.join("bin").join(applet);
        if !link.exists() {
            symlink("busybox", link)?;
        }
    }
    fs::write(root.join("runners"), runners)?;
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    fs::write(root.join("init"), INIT)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    modules(kernel, &root.join("modules"))?;
    let image = folder.join(format!("{}.cpio", kernel.version));
    let script = "cd \"$1\" && find . | cpio --quiet -o -H newc > \"$2\"";
    quiet(Command::new("/bin/sh").args(["-c", script, "sh"]).arg(&root).arg(&image))?;
    fs::remove_dir_all(&root)?;
    Ok(image)
}

/// The shared libraries of a program, and its loader.
fn needed(program: &Path) -> Result<Vec<PathBuf>> {
    libraries(Command::new("ldd").arg(program))
}

/// What such a command lists.
fn libraries(list: &mut Command) -> Result<Vec<PathBuf>> {
    let done = list.output().with_context(|| format!("{} does not start", crate::shell::shown(list)))?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let words = text.lines().filter_map(|l| l.split_whitespace().find(|w| w.starts_with('/')));
    Ok(words.map(PathBuf::from).collect())
}

/// CRIU as `cargo xtask setup --criu` provides it, with a loader and libraries of its own.
fn pack_criu(to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let program = setup::criu_program().context("there is no CRIU")?;
    let mut list = match &program.loader {
        Some((loader, folders)) => {
            let mut list = Command::new(loader);
            list.args(["--library-path", folders, "--list"]);
            list
        }
        None => Command::new("ldd"),
    };
    let (own, libraries): (Vec<_>, Vec<_>) = libraries(list.arg(&program.file))?
        .into_iter()
        .partition(|path| path.to_string_lossy().contains("/ld-"));
    // The list names the system's loader also where it is another one's.
    let loader = program.loader.map(|(loader, _)| loader).or(own.into_iter().next()).context("no loader")?;
    let name = |path: &Path| path.file_name().map(ToOwned::to_owned).context("a library has a name");
    for library in libraries.iter().chain([&loader]) {
        fs::copy(library, to.join(name(library)?)).with_context(|| library.display().to_string())?;
    }
    fs::copy(&program.file, to.join("program"))?;
    let launcher = format!(
        "#!/bin/sh\nexec /{CRIU}/{} --library-path /{CRIU} /{CRIU}/program \"$@\"\n",
        name(&loader)?.to_string_lossy()
    );
    fs::write(to.join("criu"), launcher)?;
    fs::set_permissions(to.join("criu"), fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The end-to-end test program of that name.
fn runner<'a>(built: &'a [Runner], name: &str) -> Result<&'a Path> {
    let named = |path: &Path| path.file_name()?.to_str()?.rsplit_once('-').map(|(stem, _)| stem == name);
    let mut all = built.iter().filter(|r| r.folder.ends_with("tests")).map(|r| r.executable.as_path());
    all.find(|path| named(path) == Some(true)).with_context(|| format!("there are no tests {name}"))
}

/// Puts the modules, unpacked, into `folder`, and `order` beside them: what is needed comes first.
fn modules(kernel: &Kernel, folder: &Path) -> Result<()> {
    let text = fs::read_to_string(kernel.modules.join("modules.dep"))?;
    let table: Vec<(&str, &str)> = text.lines().filter_map(|l| l.split_once(':')).collect();
    let mut order: Vec<&str> = Vec::new();
    for name in MODULES {
        let Some((path, needs)) = table.iter().find(|(path, _)| stem(path) == name) else { continue };
        // modules.dep names all that is needed, the last one first.
        for path in needs.split_whitespace().rev().chain([*path]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    ensure!(!order.is_empty(), "{} names none of {}", kernel.modules.display(), MODULES.join(" "));
    let mut list = String::new();
    for path in order {
        let (from, to) = (kernel.modules.join(path), folder.join(format!("{}.ko", stem(path))));
        if path.ends_with(".xz") {
            let file = fs::File::create(&to)?;
            let status = Command::new("xz").arg("-dc").arg(&from).stdout(file).status()?;
            ensure!(status.success(), "xz -dc {}: {status}", from.display());
        } else {
            fs::copy(&from, &to)?;
        }
        list += &format!("{}.ko\n", stem(path));
    }
    fs::write(folder.join("order"), list)?;
    Ok(())
}

/// Name of a module, given its path.
fn stem(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file)
}

#[cfg(test)]
mod tests {
    use super::stem;

    #[test]
    fn a_module_is_named_after_its_file() {
        assert_eq!(stem("kernel/fs/ext4/ext4.ko.xz"), "ext4");
        assert_eq!(stem("loop.ko"), "loop");
    }
}
