//! Two hosts on one machine: each has a network, mounts, a name and a machine id of its own, and both have the same
//! paths, behind which other files stand.
//!
//! ```text
//! DIR/a, DIR/b       what the hosts have: srv, run, keys, store, spool
//! DIR/srv            where programs expect their files: on each host its own srv
//! ```
//! A host is the namespaces of a process that sleeps: when it is killed the kernel removes the network, the wire to the
//! other one, and the mounts. The leash kills it at the end at the latest, also after a failure.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::leash::Leash;
use crate::programs::Place;
use crate::watch::{SOON, until};
use crate::world::{binary, command_ok};

/// Port of the replayers.
const PORT: u16 = 7400;

/// One of the two.
pub struct Host {
    /// Its name.
    pub name: &'static str,
    /// What it has.
    pub own: PathBuf,
    /// Where programs expect their files, and what they are told by.
    pub place: Place,
    address: String,
    wire: String,
    holder: Child,
    replayer: Option<Child>,
    agent: Option<Child>,
}

/// See the module.
pub struct Hosts {
    /// The first primary.
    pub a: Host,
    /// The first backup.
    pub b: Host,
    /// Name of the group.
    pub group: String,
    leash: Leash,
    directory: TempDir,
}

/// What a host is made of: $1 its name, $2 its folder, $3 the path of programs.
const HOLDER: &str = "\
hostname \"$1\" && mount --bind \"$2/srv\" \"$3\" && mount --bind \"$2/run\" /run/bfs &&
mount -t bpf bpf /sys/fs/bpf && mount --bind \"$2/machine-id\" /etc/machine-id && ip link set lo up &&
touch \"$2/ready\" && exec sleep 1000000";

impl Host {
    fn new(name: &'static str, leash: &Leash, directory: &Path, number: u8) -> Result<Self> {
        let own = directory.join(name);
        for sub in ["srv", "run", "aux"] {
            fs::create_dir_all(own.join(sub))?;
        }
        fs::write(own.join("machine-id"), format!("{number:032x}\n"))?;
        let expected = directory.join("srv");
        let mut holder = Command::new("unshare");
        holder.args(["--net", "--mount", "--uts", "--propagation", "private", "sh", "-c", HOLDER, "holder"]);
        holder.arg(name).arg(&own).arg(&expected).stdin(Stdio::null());
        holder.stderr(File::create(own.join("holder.log"))?);
        let mut holder = leash.hold(&mut holder)?.spawn().context("unshare does not start")?;
        until("a host", SOON, || {
            if let Ok(Some(ended)) = holder.try_wait() {
                let said = fs::read_to_string(own.join("holder.log")).unwrap_or_default();
                return Some(Err(anyhow::anyhow!("a host cannot be made: {ended}: {said}")));
            }
            own.join("ready").exists().then_some(Ok(()))
        })??;
        Ok(Self {
            name,
            place: Place { data: expected.join("data"), aux: own.join("aux") },
            own,
            address: format!("10.77.0.{number}"),
            wire: format!("bfs{number}"),
            holder,
            replayer: None,
            agent: None,
        })
    }

    /// A command on this host.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--mount", "--uts", "--target", &self.holder.id().to_string(), "--"]);
        command.arg(program).stdin(Stdio::null());
        command
    }

    /// Its store.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.own.join("store")
    }

    /// The files of the program, as every host can see them.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.own.join("srv/data")
    }

    /// How others reach its replayer.
    #[must_use]
    pub fn destination(&self) -> String {
        format!("tcp://{}:{PORT}", self.address)
    }

    fn log(&self, name: &str) -> Result<File> {
        Ok(File::options().create(true).append(true).open(self.own.join(name))?)
    }

    /// Cuts the wire, or mends it.
    ///
    /// # Errors
    /// When ip(8) fails.
    pub fn wire(&self, up: bool) -> Result<()> {
        let mut ip = self.command("ip");
        command_ok(ip.args(["link", "set", &self.wire, if up { "up" } else { "down" }])).map(drop)
    }
}

impl Hosts {
    /// Each is the backup of the other.
    ///
    /// # Errors
    /// When something of that cannot be made.
    pub fn both_ways(name: &str) -> Result<Self> {
        let mut hosts = Self::new(name)?;
        for (backup, primary) in [("b", "a"), ("a", "b")] {
            hosts.serve(backup)?;
            hosts.pair(primary, backup, &[])?;
        }
        Ok(hosts)
    }

    /// Two hosts with a wire between them.
    ///
    /// # Errors
    /// Where this machine cannot make them.
    pub fn new(name: &str) -> Result<Self> {
        Self::with_disk(name, None)
    }

    /// The same with a disk of this file system, which both see below [`Self::disk`].
    ///
    /// # Errors
    /// Where this machine cannot make them.
    pub fn with_disk(name: &str, file_system: Option<&str>) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "hosts are namespaces: run these tests as root");
        let directory = tempfile::Builder::new().prefix(&format!("bfs-{name}-")).tempdir()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        fs::create_dir(directory.path().join("srv"))?;
        fs::create_dir_all("/run/bfs")?;
        let leash = Leash::new(directory.path(), None)?;
        if let Some(file_system) = file_system {
            let (image, at) = (directory.path().join("image"), directory.path().join("disk"));
            File::create(&image)?.set_len(512 << 20)?;
            fs::create_dir(&at)?;
            command_ok(Command::new(format!("mkfs.{file_system}")).arg("-q").arg(&image))?;
            command_ok(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at))?;
        }
        let a = Host::new("a", &leash, directory.path(), 1)?;
        let b = Host::new("b", &leash, directory.path(), 2)?;
        let mut ip = Command::new("ip");
        ip.args([
            "link",
            "add",
            &a.wire,
            "netns",
            &a.holder.id().to_string(),
            "type",
            "veth",
            "peer",
            "name",
        ]);
        command_ok(ip.args([&b.wire, "netns", &b.holder.id().to_string()]))?;
        for host in [&a, &b] {
            let mut ip = host.command("ip");
            command_ok(ip.args(["address", "add", &format!("{}/24", host.address), "dev", &host.wire]))?;
            host.wire(true)?;
        }
        fs::create_dir(a.data())?;
        let group = format!("{name}-{}", std::process::id());
        Ok(Self { a, b, group, leash, directory })
    }

    /// The disk of [`Self::with_disk`].
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.scratch("disk")
    }

    /// Room for copies.
    #[must_use]
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes a cgroup in the one that holds all processes of both.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn cgroup(&self, name: &str) -> Result<PathBuf> {
        let path = self.leash.cgroup().join(name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// One of the two.
    #[must_use]
    pub fn host(&self, name: &str) -> &Host {
        if name == "a" { &self.a } else { &self.b }
    }

    fn host_mut(&mut self, name: &str) -> &mut Host {
        if name == "a" { &mut self.a } else { &mut self.b }
    }

    /// Runs a command on a host to its end.
    ///
    /// # Errors
    /// When it does not start.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        self.leash.hold(command)?.output().context("nsenter does not start")
    }

    /// What a command on a host said, which must end well.
    ///
    /// # Errors
    /// When it does not.
    pub fn said(&self, command: &mut Command) -> Result<String> {
        let done = self.output(command)?;
        ensure!(
            done.status.success(),
            "{command:?}: {} {}",
            done.status,
            String::from_utf8_lossy(&done.stderr)
        );
        Ok(String::from_utf8(done.stdout)?)
    }

    /// Starts the replayer of a host.
    ///
    /// # Errors
    /// When it does not come.
    pub fn serve(&mut self, name: &str) -> Result<()> {
        let host = self.host(name);
        let mut command = host.command(binary("bfs-replayer"));
        command.args(["serve", "--listen", &format!("tcp://0.0.0.0:{PORT}"), "--store"]).arg(host.store());
        command.stdout(host.log("replayer.log")?).stderr(host.log("replayer.log")?);
        let child = self.leash.hold(&mut command)?.spawn()?;
        let socket = host.store().join("replayer.sock");
        self.host_mut(name).replayer = Some(child);
        until("the replayer", SOON, || std::os::unix::net::UnixStream::connect(&socket).ok())?;
        Ok(())
    }

    /// Kills the replayer of a host with -9.
    ///
    /// # Errors
    /// When none runs.
    pub fn kill_replayer(&mut self, name: &str) -> Result<()> {
        let mut child = self.host_mut(name).replayer.take().context("no replayer runs")?;
        // nsenter became the replayer.
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Pairs a host with the replayer of the other one.
    ///
    /// # Errors
    /// When they are not paired.
    pub fn pair(&self, primary: &str, backup: &str, options: &[&str]) -> Result<()> {
        let (primary, backup) = (self.host(primary), self.host(backup));
        let mut pair = backup.command(binary("bfs-replayer"));
        let token = self.said(pair.args(["pair", "--store"]).arg(backup.store()).args(options))?;
        let mut pair = primary.command(binary("bfs-agent"));
        pair.args(["pair", "--keys"]).arg(primary.own.join("keys"));
        self.said(pair.args([&backup.destination(), token.trim()])).map(drop)
    }

    /// Starts an agent with a command on a host, and returns when both work.
    ///
    /// # Errors
    /// When one of them does not come.
    pub fn run(&mut self, name: &str, backup: &str, command: &[String]) -> Result<()> {
        let host = self.host(name);
        for mark in ["ready", "stop"] {
            let _ = fs::remove_file(host.place.aux.join(mark));
        }
        let mut agent = self.agent(name, "run");
        agent.args(["--checkpoint", "manual", "--backup", backup, "--path"]).arg(&host.place.data);
        agent.arg("--keys").arg(host.own.join("keys")).arg("--spool").arg(host.own.join("spool"));
        agent.arg("--").args(command).stdout(host.log("agent.log")?).stderr(host.log("agent.log")?);
        let mut child = self.leash.hold(&mut agent)?.spawn()?;
        let ready = host.place.aux.join("ready");
        let log = host.own.join("agent.log");
        until("the program", SOON, || {
            if let Ok(Some(ended)) = child.try_wait() {
                let said = fs::read_to_string(&log).unwrap_or_default();
                return Some(Err(anyhow::anyhow!("the agent of {name} ended: {ended}: {said}")));
            }
            ready.exists().then_some(Ok(()))
        })??;
        self.host_mut(name).agent = Some(child);
        until("the agent", SOON, || self.status(name).ok())?;
        Ok(())
    }

    /// Starts what becomes the agent of a host, and returns when that answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(&mut self, name: &str, mut agent: Command) -> Result<()> {
        let host = self.host(name);
        agent.stdout(host.log("agent.log")?).stderr(host.log("agent.log")?);
        let mut child = self.leash.hold(&mut agent)?.spawn()?;
        let log = host.own.join("agent.log");
        until("the agent", SOON, || {
            if let Ok(Some(ended)) = child.try_wait() {
                let said = fs::read_to_string(&log).unwrap_or_default();
                return Some(Err(anyhow::anyhow!("the agent of {name} ended: {ended}: {said}")));
            }
            self.status(name).ok().map(|_| Ok(()))
        })??;
        self.host_mut(name).agent = Some(child);
        Ok(())
    }

    /// Kills the agent of a host and all that it started with -9.
    ///
    /// # Errors
    /// When none runs.
    pub fn kill_agent(&mut self, name: &str) -> Result<()> {
        let mut agent = self.host_mut(name).agent.take().context("no agent runs")?;
        let mut all = vec![agent.id()];
        let mut next = 0;
        while let Some(pid) = all.get(next).copied() {
            next += 1;
            for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                all.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
            }
        }
        for pid in &all {
            // SAFETY: a process that this host's agent started, or the agent.
            unsafe { libc::kill(*pid as i32, libc::SIGKILL) };
        }
        agent.wait()?;
        until("its processes to end", SOON, || {
            all.iter().all(|pid| !Path::new(&format!("/proc/{pid}/exe")).exists()).then_some(())
        })
    }

    /// A program that does nothing until it is told to end.
    #[must_use]
    pub fn resting(&self, name: &str) -> Vec<String> {
        let place = &self.host(name).place;
        let script = format!(
            "touch {}; while ! [ -e {} ]; do sleep 0.05; done",
            place.aux.join("ready").display(),
            place.stop().display()
        );
        ["sh", "-c", &script].map(str::to_owned).to_vec()
    }

    /// `bfs-agent VERB --group GROUP` on a host.
    #[must_use]
    pub fn agent(&self, name: &str, verb: &str) -> Command {
        let mut command = self.host(name).command(binary("bfs-agent"));
        command.args([verb, "--group", &self.group]);
        command
    }

    /// `bfs-replayer VERB --group GROUP --store STORE` on a host.
    #[must_use]
    pub fn replayer(&self, name: &str, verb: &str) -> Command {
        let mut command = self.host(name).command(binary("bfs-replayer"));
        command.args([verb, "--group", &self.group, "--store"]).arg(self.host(name).store());
        command
    }

    /// What the agent of a host says of itself.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self, name: &str) -> Result<Value> {
        let said = self.said(self.agent(name, "status").arg("--json"))?;
        serde_json::from_str(&said).context("not JSON")
    }

    /// What the replayer of a host says of the group.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn replayer_status(&self, name: &str) -> Result<Value> {
        let mut command = self.host(name).command(binary("bfs-replayer"));
        let said = self.said(command.args(["status", "--json", "--store"]).arg(self.host(name).store()))?;
        let all: Value = serde_json::from_str(&said).context("not JSON")?;
        let own = all.as_array().into_iter().flatten().find(|one| one["group"] == self.group.as_str());
        own.cloned().context("the group is not there")
    }

    /// Takes a checkpoint and waits until it is applied; gives its number.
    ///
    /// # Errors
    /// When it does not come.
    pub fn checkpoint(&self, name: &str) -> Result<u64> {
        let said = self.said(self.agent(name, "checkpoint").args(["--wait", "applied"]))?;
        said.trim().parse().context("not a number")
    }

    /// Tells the program of a host to end, and waits for its agent; gives the status.
    ///
    /// # Errors
    /// When it does not end.
    pub fn finish(&mut self, name: &str) -> Result<i32> {
        fs::write(self.host(name).place.stop(), "")?;
        self.ended(name)
    }

    /// Waits for the agent of a host; gives the status.
    ///
    /// # Errors
    /// When it does not end.
    pub fn ended(&mut self, name: &str) -> Result<i32> {
        let mut child = self.host_mut(name).agent.take().context("no agent runs")?;
        let ended = until("the agent to end", SOON, || child.try_wait().transpose())??;
        Ok(ended.code().unwrap_or(-1))
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in [&self.a, &self.b] {
                for log in ["agent.log", "replayer.log"] {
                    let said = fs::read_to_string(host.own.join(log)).unwrap_or_default();
                    eprintln!("---- {log} of host {}\n{said}", host.name);
                }
            }
        }
        // What stands on the mounts of the hosts ends before their folders go.
        self.leash.kill();
        for host in [&mut self.a, &mut self.b] {
            let children = [host.agent.take(), host.replayer.take()];
            for mut child in children.into_iter().flatten() {
                let _ = child.wait();
            }
            let _ = host.holder.wait();
        }
        if self.disk().exists() {
            let _ = Command::new("umount").arg(self.disk()).status();
        }
    }
}
