//! One replayer, one agent, one program, and everything that belongs to them.
//!
//! A world has a temporary directory, a group name that no other test uses, and a leash that ends
//! all its processes, also when the test fails (then it prints what they said) or is killed. Worlds
//! do not disturb each other, so tests run beside each other.
//!
//! ```text
//! DIR/data      the replicated directory          DIR/store     the replayer's store
//! DIR/aux       marks and sockets of the program  DIR/logs      what the daemons said
//! DIR/scratch   copies for comparison             DIR/keys      the agent's keys
//! ```
//! Checkpoints are manual unless asked otherwise, so the backup tree rests between them.
//! `BFS_KEEP=1` keeps the directory, `BFS_BIN_DIR` names the folder of the binaries.

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::bad_disk::{self, BadDisk};
use crate::faults::Faults;
use crate::leash::Leash;
use crate::programs::{Place, Program};
use crate::watch::{SOON, until};

mod address;
mod cleanup;
mod commands;
mod faulty;
mod keys;
mod power;
mod processes;

pub use commands::{Dropped, number_in, number_named};
pub use keys::said;

/// How the replayer is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A unix socket, told apart by peer credentials.
    Unix,
    /// Loopback TCP, told apart by keys.
    Tcp,
}

/// What the replicated directory can lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// An image.
    Ext4,
    /// An image.
    Xfs,
    /// An image.
    Btrfs,
    /// Memory.
    Tmpfs,
    /// Layers on the temporary directory.
    Overlay,
}

impl FileSystem {
    /// Its name for mount(8).
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Tmpfs => "tmpfs",
            Self::Overlay => "overlay",
        }
    }
}

/// How the agent comes to the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// `bfs-agent run`.
    Run,
    /// `bfs-agent attach --pid`, when the program has been at work for a while.
    AttachHalfWay,
}

/// See the module.
pub struct World {
    /// The program's directories.
    pub place: Place,
    /// The replayer's store.
    pub store: PathBuf,
    /// Room for copies.
    pub scratch: PathBuf,
    /// Name of the group.
    pub group: String,
    transport: Transport,
    /// Socket path or HOST:PORT.
    address: String,
    /// HOST:PORT that agents are given instead.
    through: Option<String>,
    /// The address with which it was paired.
    paired: Option<String>,
    checkpoints: String,
    agent_options: Vec<String>,
    replayer_options: Vec<String>,
    daemon_cpu: Option<usize>,
    daemon_environment: Vec<(String, String)>,
    logs: PathBuf,
    faults: Option<Faults>,
    agent_faults: Option<Faults>,
    replayer: Option<Child>,
    agent: Option<Child>,
    /// The program, when the test itself started it.
    program: Option<Child>,
    /// Everything that was started. Before the directory: what it kills works there.
    leash: Leash,
    directory: Option<TempDir>,
}

/// The path of a binary of the workspace: in `BFS_BIN_DIR`, else beside the running test.
///
/// # Panics
/// When the test does not know its own path.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    if let Some(directory) = std::env::var_os("BFS_BIN_DIR") {
        return PathBuf::from(directory).join(name);
    }
    let exe = std::env::current_exe().expect("a process knows its binary");
    let beside = exe.parent().expect("a binary stands in a folder");
    // Tests stand in target/PROFILE/deps, binaries in target/PROFILE.
    let folder = if beside.ends_with("deps") { beside.parent().expect("deps has a parent") } else { beside };
    folder.join(name)
}

/// Runs of a long test (`BFS_LONG`), or of the short one.
#[must_use]
pub fn rounds(short: usize, long: usize) -> usize {
    if std::env::var_os("BFS_LONG").is_some() { long } else { short }
}

impl World {
    /// A world without processes. `name` is fit for a file name.
    ///
    /// # Errors
    /// When this machine cannot run such tests, with a sentence why.
    pub fn new(name: &str, transport: Transport) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "end-to-end tests load probes: run them as root");
        for binary in ["bfs-agent", "bfs-replayer"].map(binary) {
            ensure!(binary.exists(), "{} is not built: use `cargo xtask test`", binary.display());
        }
        let directory = tempfile::Builder::new().prefix(&format!("bfs-{name}-")).tempdir()?;
        // Programs that run as another user must get through.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let sub = |name: &str| -> Result<PathBuf> {
            let path = directory.path().join(name);
            fs::create_dir(&path)?;
            Ok(path)
        };
        let place = Place { data: sub("data")?, aux: sub("aux")? };
        let (logs, scratch) = (sub("logs")?, sub("scratch")?);
        let store = directory.path().join("store");
        let address = match transport {
            Transport::Unix => directory.path().join("replayer.sock").display().to_string(),
            // Port 0 for a moment: a port that is free now.
            Transport::Tcp => std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string(),
        };
        let group = format!("{name}-{}", std::process::id());
        let leash = Leash::new(directory.path(), Some(&group))?;
        Ok(Self {
            place,
            store,
            scratch,
            group,
            transport,
            address,
            through: None,
            paired: None,
            checkpoints: "manual".to_owned(),
            agent_options: Vec::new(),
            replayer_options: Vec::new(),
            daemon_cpu: None,
            daemon_environment: Vec::new(),
            logs,
            faults: None,
            agent_faults: None,
            replayer: None,
            agent: None,
            program: None,
            leash,
            directory: Some(directory),
        })
    }

    /// Takes checkpoints at these times instead of only on demand.
    pub fn checkpoints(&mut self, when: &str) {
        self.checkpoints = when.to_owned();
    }

    /// More options for the first agent.
    pub fn agent_options(&mut self, options: &[&str]) {
        self.agent_options = options.iter().map(|o| (*o).to_owned()).collect();
    }

    /// More options for a replayer that is started from now on.
    pub fn replayer_options(&mut self, options: &[&str]) {
        self.replayer_options = options.iter().map(|o| (*o).to_owned()).collect();
    }

    /// Agent and replayer run on this core only.
    pub fn pin_daemons(&mut self, cpu: usize) {
        self.daemon_cpu = Some(cpu);
    }

    /// Agent and replayer that are started from now on have this in their environment.
    pub fn daemon_environment(&mut self, name: &str, value: &str) {
        self.daemon_environment.push((name.to_owned(), value.to_owned()));
    }

    /// The command that starts a daemon, without its arguments.
    fn daemon(&self, name: &str) -> Result<Command> {
        let mut command = match self.daemon_cpu {
            None => Command::new(binary(name)),
            Some(cpu) => {
                // taskset becomes the daemon: the process number is the same.
                let mut command = Command::new("taskset");
                command.args(["-c", &cpu.to_string()]).arg(binary(name));
                command
            }
        };
        command.envs(self.daemon_environment.iter().map(|(name, value)| (name, value)));
        self.leash.hold(&mut command)?;
        Ok(command)
    }

    /// The backup of the replicated directory.
    #[must_use]
    pub fn backup(&self) -> PathBuf {
        let below = self.place.data.strip_prefix("/").expect("temporary directories are absolute");
        self.store.join("tree").join(&self.group).join(below)
    }

    /// The follower of a file of the replicated directory.
    #[must_use]
    pub fn follower(&self, name: &str) -> PathBuf {
        let below = self.place.data.strip_prefix("/").expect("temporary directories are absolute");
        self.store.join("now").join(&self.group).join(below).join(name)
    }

    /// The directory of the world.
    ///
    /// # Panics
    /// Never before it is dropped.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.directory.as_ref().expect("taken only when dropped").path()
    }

    /// What agents are given as `--spool`.
    #[must_use]
    pub fn spool(&self) -> PathBuf {
        self.root().join("spool")
    }

    /// Makes the folder of the spool a small ext4 of its own.
    ///
    /// # Errors
    /// When it cannot be made or mounted.
    pub fn mount_spool(&mut self, mebibytes: u64) -> Result<()> {
        let at = self.spool();
        fs::create_dir(&at)?;
        self.mount_at(FileSystem::Ext4, mebibytes, at)
    }

    /// Makes the replicated directory a small ext4 of its own.
    ///
    /// # Errors
    /// When it cannot be made or mounted.
    pub fn mount_ext4(&mut self, mebibytes: u64) -> Result<()> {
        let at = self.place.data.clone();
        self.mount_at(FileSystem::Ext4, mebibytes, at)
    }

    /// Makes the replicated directory an ext4 on a disk that fails as the test says.
    ///
    /// # Errors
    /// When it cannot be made or mounted.
    pub fn mount_bad_disk(&mut self, mebibytes: u64) -> Result<BadDisk> {
        let at = self.root().join("disk");
        fs::create_dir(&at)?;
        let disk = BadDisk::mount(&self.root().join("image"), mebibytes << 20, &at)?;
        let image = at.join(bad_disk::DISK);
        command_ok(Command::new("mkfs.ext4").args(["-q", "-b", "4096"]).arg(&image))?;
        command_ok(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&self.place.data))?;
        Ok(disk)
    }

    /// Puts the replicated directory on a file system of this type, with room [`World::beside`] it.
    ///
    /// # Errors
    /// When it cannot be made or mounted.
    pub fn mount(&mut self, file_system: FileSystem) -> Result<()> {
        let at = self.place.data.clone();
        self.mount_at(file_system, 512, at.clone())?;
        self.place.data = at.join("data");
        fs::create_dir(&self.place.data)?;
        Ok(())
    }

    /// Puts the replayer's store on a file system of its own, in memory: neither its writes nor its syncs
    /// disturb the disk that the program uses, as on another machine.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn store_apart(&mut self, mebibytes: u64) -> Result<()> {
        fs::create_dir(&self.store)?;
        self.mount_at(FileSystem::Tmpfs, mebibytes, self.store.clone())
    }

    /// What the daemons said.
    #[must_use]
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// A directory on the file system of [`World::mount`] that is not replicated.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn beside(&self) -> Result<PathBuf> {
        let path = self.place.data.with_file_name("beside");
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    fn mount_at(&mut self, file_system: FileSystem, mebibytes: u64, at: PathBuf) -> Result<()> {
        let mut mount = Command::new("mount");
        if file_system == FileSystem::Tmpfs {
            mount.args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"]);
        } else if file_system == FileSystem::Overlay {
            let layers = ["lowerdir", "upperdir", "workdir"].map(|layer| {
                let path = self.root().join(layer);
                fs::create_dir(&path).map(|()| format!("{layer}={}", path.display()))
            });
            let layers = layers.into_iter().collect::<std::io::Result<Vec<_>>>()?;
            mount.args(["-t", "overlay", "-o", &layers.join(","), "overlay"]);
        } else {
            let image = self.root().join("image");
            File::create(&image)?.set_len(mebibytes << 20)?;
            let mut make = Command::new(format!("mkfs.{}", file_system.name()));
            if file_system == FileSystem::Ext4 {
                // With checksums the generation of an inode cannot be set (ext4_ioctl_setversion()).
                make.args(["-O", "^metadata_csum"]);
            }
            command_ok(make.arg("-q").arg(&image))?;
            mount.args(["-o", "loop"]).arg(&image);
        }
        command_ok(mount.arg(&at)).map(drop)
    }

    fn log(&self, name: &str) -> Result<Stdio> {
        let path = self.logs.join(name);
        let log = File::options().create(true).append(true).open(&path);
        Ok(log.with_context(|| path.display().to_string())?.into())
    }

    /// Starts the replayer, again after it was killed, and waits until it can be reached.
    ///
    /// # Errors
    /// When it ends or does not come.
    pub fn start_replayer(&mut self) -> Result<()> {
        ensure!(self.replayer.is_none(), "the replayer runs");
        let mut line = vec!["serve".to_owned(), "--store".to_owned(), self.store.display().to_string()];
        line.extend(["--listen".to_owned(), self.listens()]);
        line.extend(self.replayer_options.iter().cloned());
        let mut command = self.daemon("bfs-replayer")?;
        command.args(&line).stdin(Stdio::null());
        command.stdout(self.log("replayer.log")?).stderr(self.log("replayer.log")?);
        if let Some(faults) = &mut self.faults {
            faults.hold(&mut command)?;
        }
        let mut child = command.spawn()?;
        let reached = until("the replayer", SOON, || {
            if let Ok(Some(status)) = child.try_wait() {
                return Some(Err(anyhow::anyhow!("the replayer ended with {status}")));
            }
            let there = match self.transport {
                Transport::Unix => UnixStream::connect(&self.address).is_ok(),
                Transport::Tcp => TcpStream::connect(&self.address).is_ok(),
            };
            there.then_some(Ok(()))
        });
        self.replayer = Some(child);
        reached?
    }

    /// Process number of the replayer.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn replayer_pid(&self) -> u32 {
        self.replayer.as_ref().expect("the replayer was started").id()
    }

    /// Kills the replayer with -9.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill_replayer(&mut self) -> Result<()> {
        let mut child = self.replayer.take().context("no replayer runs")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Kills the agent with -9.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill_agent(&mut self) -> Result<()> {
        let mut child = self.agent.take().context("no agent runs")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    fn start_agent(&mut self, arguments: &[String]) -> Result<()> {
        ensure!(self.agent.is_none(), "the agent runs");
        self.pair_if_needed()?;
        let mut command = self.daemon("bfs-agent")?;
        command.args(arguments).stdin(Stdio::null());
        command.stdout(self.log("agent.log")?).stderr(self.log("agent.log")?);
        if let Some(faults) = &mut self.agent_faults {
            faults.hold(&mut command)?;
        }
        self.agent = Some(command.spawn()?);
        Ok(())
    }

    fn common(&self, verb: &str) -> Vec<String> {
        let mut line = [verb, "--group", &self.group, "--checkpoint", &self.checkpoints, "--path"]
            .map(str::to_owned)
            .to_vec();
        line.extend([self.place.data.display().to_string(), "--backup".to_owned(), self.destination()]);
        line.extend(["--keys".to_owned(), self.keys().display().to_string()]);
        line.extend(["--spool".to_owned(), self.spool().display().to_string()]);
        line.extend(["--policies".to_owned(), self.root().join("policies").display().to_string()]);
        line.extend(self.agent_options.iter().cloned());
        line
    }

    /// Starts the agent with a command, and returns when the command works and the agent answers.
    ///
    /// # Errors
    /// When either ends or does not come.
    pub fn run(&mut self, command: &[String]) -> Result<()> {
        let mut line = self.common("run");
        line.push("--".to_owned());
        line.extend(self.telling_its_pid(command));
        self.start_agent(&line)?;
        self.wait_program()?;
        self.wait_agent_answers(true)
    }

    /// The same with a program that does nothing until it is told to end.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn rest(&mut self) -> Result<()> {
        let (ready, stop) = (self.place.aux.join("ready"), self.place.stop());
        let script =
            format!("touch {}; while ! [ -e {} ]; do sleep 0.05; done", ready.display(), stop.display());
        self.run(&["sh".to_owned(), "-c".to_owned(), script])
    }

    /// Starts the program without an agent, and returns when it works.
    ///
    /// # Errors
    /// When it ends or does not come.
    pub fn start_program(&mut self, command: &[String]) -> Result<()> {
        let line = self.telling_its_pid(command);
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).stdin(Stdio::null());
        command.stdout(self.log("program.log")?).stderr(self.log("program.log")?);
        self.program = Some(self.leash.hold(&mut command)?.spawn()?);
        self.wait_program()
    }

    /// Starts the successor of an agent that was killed: it reads on where that one was.
    ///
    /// # Errors
    /// When it ends or does not answer.
    pub fn resume(&mut self) -> Result<()> {
        self.start_agent(&["resume", "--group", &self.group].map(str::to_owned))?;
        fs::write(self.place.aux.join("resumed"), "")?;
        self.wait_agent_answers(false)
    }

    /// Starts the first agent for a program that runs already.
    ///
    /// # Errors
    /// When it ends or does not answer.
    pub fn attach(&mut self) -> Result<()> {
        let pid = self.program_pid()?.to_string();
        self.attach_to(&["--pid", &pid])
    }

    /// The same, with other words for whom it follows.
    ///
    /// # Errors
    /// When it ends or does not answer.
    pub fn attach_to(&mut self, whom: &[&str]) -> Result<()> {
        let mut line = self.common("attach");
        line.extend(whom.iter().map(|word| (*word).to_owned()));
        self.start_agent(&line)?;
        self.wait_agent_answers(false)
    }

    /// Starts a further process, which ends with the world at the latest. It has the directories of
    /// [`Place`] as `$1` (data) and `$2` (aux).
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn_shell(&self, script: &str) -> Result<Child> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, "sh"]).arg(&self.place.data).arg(&self.place.aux);
        command.stdin(Stdio::null()).stdout(self.log("program.log")?).stderr(self.log("program.log")?);
        self.leash.hold(&mut command)?.spawn().context("a shell does not start")
    }

    /// Makes a cgroup in the one that holds the world's processes.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn cgroup(&self, name: &str) -> Result<PathBuf> {
        let path = self.leash.cgroup().join(name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// The cgroup that holds all processes of the world, daemons too.
    #[must_use]
    pub fn leash_cgroup(&self) -> String {
        self.leash.cgroup().display().to_string()
    }

    /// Ends an agent that was attached to something that goes on.
    ///
    /// # Errors
    /// When it does not end well.
    pub fn stop_agent(&mut self) -> Result<()> {
        self.end_attached()
    }

    /// Starts replayer, program and agent, in the order that `how` says.
    ///
    /// # Errors
    /// When one of them does not come.
    pub fn start(&mut self, program: &dyn Program, how: How) -> Result<()> {
        program.prepare(&self.place)?;
        self.start_replayer()?;
        let command = program.command(&self.place);
        match how {
            How::Run => self.run(&command),
            How::AttachHalfWay => {
                self.start_program(&command)?;
                let place = self.place.clone();
                until("the program half way", SOON, || program.half_way(&place).then_some(()))?;
                self.attach()
            }
        }
    }

    /// The program writes its number before it begins.
    fn telling_its_pid(&self, command: &[String]) -> Vec<String> {
        let script = format!("echo $$ > '{}'; exec \"$@\"", self.place.aux.join("pid").display());
        ["/bin/sh", "-c", &script, "sh"]
            .map(str::to_owned)
            .into_iter()
            .chain(command.iter().cloned())
            .collect()
    }

    fn wait_program(&mut self) -> Result<()> {
        let ready = self.place.aux.join("ready");
        let (agent, program) = (&mut self.agent, &mut self.program);
        until("the program to work", SOON, || {
            if ready.exists() {
                return Some(Ok(()));
            }
            for (name, child) in [("agent", &mut *agent), ("program", &mut *program)] {
                if let Some(Ok(Some(status))) = child.as_mut().map(Child::try_wait)
                    && !ready.exists()
                {
                    return Some(Err(anyhow::anyhow!("the {name} ended at once with {status}")));
                }
            }
            None
        })?
    }

    /// `may_end`: a short program under `run` may be done, and its agent with it, before it was asked.
    fn wait_agent_answers(&mut self, may_end: bool) -> Result<()> {
        let mut agent = self.agent.take().context("no agent runs")?;
        let answered = until("the agent to answer", SOON, || match agent.try_wait() {
            Ok(Some(_)) if may_end => Some(Ok(())),
            Ok(Some(status)) => Some(Err(anyhow::anyhow!("the agent ended with {status}"))),
            _ => self.status().ok().map(|_| Ok(())),
        });
        self.agent = Some(agent);
        answered?
    }

    /// Tells the program to end, waits for it and for the last checkpoint, and ends the agent.
    /// Returns the status of the program, as the agent gave it or as the test saw it.
    ///
    /// # Errors
    /// When something does not end, or the last checkpoint is not confirmed.
    pub fn finish(&mut self) -> Result<ExitStatus> {
        let status = self.end_program()?;
        // The agent ends when it is confirmed, and with much to do beside it is applied a while later.
        let is_behind = || {
            let status = self.replayer_status().ok()?;
            let number = |name: &str| status[name].as_u64();
            let works_on = status["trouble"].is_null() && number("applied")? < number("confirmed")?;
            works_on.then_some(())
        };
        if self.replayer.is_some() {
            until("the last checkpoint to be applied", SOON, || is_behind().is_none().then_some(()))?;
        }
        Ok(status)
    }

    fn end_program(&mut self) -> Result<ExitStatus> {
        fs::write(self.place.stop(), "")?;
        let limit = SOON * 3;
        if let Some(mut program) = self.program.take() {
            let status = until("the program to end", limit, || program.try_wait().transpose())??;
            self.end_attached()?;
            return Ok(status);
        }
        until("the program to end", limit, || (!self.program_runs()).then_some(()))?;
        if ["resumed", "apart"].iter().any(|mark| self.place.aux.join(mark).exists()) {
            // The agent is not the program's parent: nobody has its status any more.
            self.end_attached()?;
            return Ok(std::os::unix::process::ExitStatusExt::from_raw(0));
        }
        let mut agent = self.agent.take().context("no agent runs")?;
        let ended = until("the agent to end", limit, || agent.try_wait().transpose());
        if ended.is_err() {
            self.agent = Some(agent);
        }
        Ok(ended??)
    }

    /// An attached agent may end by itself with its last process, or is told to stop.
    fn end_attached(&mut self) -> Result<()> {
        let mut agent = self.agent.take().context("no agent runs")?;
        if self.checkpoint().is_ok() {
            let _ = self.agent_command(&["stop"], Duration::from_secs(30));
        }
        let ended = until("the agent to end", SOON, || agent.try_wait().transpose());
        if ended.is_err() {
            self.agent = Some(agent);
        }
        let status = ended??;
        ensure!(status.success(), "the agent ended with {status}");
        Ok(())
    }
}

/// Runs a command that must succeed.
///
/// # Errors
/// When it does not, with what it said.
pub fn command_ok(command: &mut Command) -> Result<Output> {
    let done = command.output().with_context(|| format!("{command:?} does not start"))?;
    if !done.status.success() {
        bail!("{command:?}: {} {}", done.status, String::from_utf8_lossy(&done.stderr));
    }
    Ok(done)
}
