//! What a successor needs to know: the state file of a group, and the group's identity.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_common::record::{GroupId, ObjectId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::SessionOptions;
use super::alerts::AlertOptions;
use super::hooks::{HookOptions, Owed};
use super::multiple::Multiple;
use super::policies::PolicyOptions;
use crate::keys::Folder;
use crate::net::Destination;
use crate::primary::engine::filter::Filter;
use crate::primary::engine::foreign::Policy;
use crate::primary::further::Confirm;
use crate::primary::ship::Sending;
use crate::primary::spool::SpoolOptions;

/// Where the state files lie: gone with the boot, like the probes that they describe.
pub(super) const DIRECTORY: &str = "/run/bfs";

/// How a group came to its processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Selection {
    /// `run`: they live in this cgroup.
    Cgroup(PathBuf),
    /// `attach --cgroup`: they are where somebody else put them.
    Attached(PathBuf),
    /// `attach --pid`: they are stopped one by one.
    Processes(Vec<u32>),
    /// `attach --everyone`: whoever changes something; nobody is stopped.
    Everyone,
}

/// The state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    roots: Vec<PathBuf>,
    backup: String,
    #[serde(default)]
    further: Vec<String>,
    #[serde(default)]
    confirm: Confirm,
    schedule: String,
    maps: Vec<(PathBuf, PathBuf)>,
    #[serde(default)]
    keys: Folder,
    socket: Option<PathBuf>,
    #[serde(default)]
    include: Vec<String>,
    #[serde(default)]
    exclude: Vec<String>,
    final_wait_ms: u64,
    #[serde(default)]
    foreign: Policy,
    #[serde(default)]
    spool: SpoolOptions,
    #[serde(default)]
    sending: Sending,
    #[serde(default)]
    hooks: HookOptions,
    #[serde(default)]
    policies: PolicyOptions,
    #[serde(default)]
    alerts: AlertOptions,
    #[serde(default)]
    metrics: Option<String>,
    inline_max: Option<u64>,
    ring_bytes: Option<u64>,
    /// Events were thrown away: a successor cannot go on, it has to copy everything.
    #[serde(default)]
    pub incomplete: bool,
    /// A file is being brought back in place: its times may be those of the agent's own writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mending: Option<ObjectId>,
    /// What the group replicates, in words.
    pub program: String,
    /// How to stop its processes.
    pub selection: Selection,
}

impl State {
    /// The state of a session.
    #[must_use]
    pub fn new(options: &SessionOptions, program: &str, selection: Selection) -> Self {
        let absolute = |p: &PathBuf| std::path::absolute(p).unwrap_or_else(|_| p.clone());
        Self {
            roots: options.roots.clone(),
            backup: options.backup.to_string(),
            further: options.further.iter().map(ToString::to_string).collect(),
            confirm: options.confirm.clone(),
            schedule: options.schedule.to_string(),
            maps: options.maps.clone(),
            keys: options.absolute_keys(),
            socket: options.socket.as_ref().map(absolute),
            include: options.filter.texts().0.to_vec(),
            exclude: options.filter.texts().1.to_vec(),
            final_wait_ms: options.final_wait.as_millis() as u64,
            foreign: options.foreign,
            spool: options.spool.clone(),
            sending: options.sending,
            hooks: options.hooks.clone(),
            policies: options.policies.clone(),
            alerts: options.alerts.clone(),
            metrics: options.metrics.as_ref().map(ToString::to_string),
            inline_max: options.inline_max,
            ring_bytes: options.ring_bytes,
            incomplete: false,
            mending: None,
            program: program.into(),
            selection,
        }
    }

    /// The options that the session had.
    ///
    /// # Errors
    /// A sentence, when the file was not written by this version.
    pub fn options(&self, group: &str) -> Result<SessionOptions, String> {
        Ok(SessionOptions {
            group: group.into(),
            roots: self.roots.clone(),
            backup: destination(&self.backup)?,
            further: self.further.iter().map(|text| destination(text)).collect::<Result<_, _>>()?,
            confirm: self.confirm.clone(),
            schedule: self.schedule.parse().map_err(|e| format!("{}: {e}", self.schedule))?,
            maps: self.maps.clone(),
            keys: self.keys.clone(),
            socket: self.socket.clone(),
            filter: Filter::new(&self.include, &self.exclude)?,
            final_wait: Duration::from_millis(self.final_wait_ms),
            foreign: self.foreign,
            spool: self.spool.clone(),
            sending: self.sending,
            hooks: self.hooks.clone(),
            policies: self.policies.clone(),
            alerts: self.alerts.clone(),
            metrics: self
                .metrics
                .as_ref()
                .map(|at| at.parse().map_err(|e| format!("{at}: {e}")))
                .transpose()?,
            // Who goes on is not the command's parent: it does not learn how the command ends.
            rollback_on_failure: false,
            going_back: super::GoingBack::default(),
            // Nor has it the other end of its namespaces.
            process: None,
            inline_max: self.inline_max,
            ring_bytes: self.ring_bytes,
        })
    }

    /// The further destinations are others now.
    pub fn set_further(&mut self, further: &[Destination]) {
        self.further = further.iter().map(ToString::to_string).collect();
    }

    /// The subtrees are others now.
    pub fn set_roots(&mut self, roots: &[PathBuf]) {
        self.roots = roots.to_vec();
    }

    /// Writes it whole or not at all.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, group: &str) -> io::Result<()> {
        write_whole(&path(group), self)
    }

    /// Reads it; `None` when there is none.
    ///
    /// # Errors
    /// What the system says, or that it is not understood.
    pub fn read(group: &str) -> io::Result<Option<Self>> {
        read_whole(&path(group))
    }

    /// Removes it at a clean end.
    pub fn remove(group: &str) {
        let _ = fs::remove_file(path(group));
        let _ = fs::remove_file(relies(group));
        Multiple::remove(group);
    }
}

fn destination(text: &str) -> Result<Destination, String> {
    text.parse().map_err(|e| format!("{text}: {e}"))
}

/// Makes the folder of the state files, where it is not there yet.
pub(super) fn make_directory() -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)
}

/// Writes a file whole or not at all.
fn write_whole(path: &Path, what: &impl Serialize) -> io::Result<()> {
    make_directory()?;
    replace(path, &serde_json::to_vec(what)?).map(drop)
}

/// The same of bytes. Gives the file, to be written on.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<fs::File> {
    let new = path.with_added_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = fs::OpenOptions::new().append(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    fs::rename(&new, path)?;
    Ok(file)
}

fn read_whole<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn owed(group: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("hook-{group}.json"))
}

/// The hook after a checkpoint that an agent before did not come to run. (One that cannot be read is of another
/// release; nobody knows what it is.)
pub(super) fn owed_hook(group: &str) -> Option<Owed> {
    read_whole(&owed(group)).ok().flatten()
}

/// Notes that one is owed, or none any more.
///
/// # Errors
/// What the system says.
pub(super) fn owe_hook(group: &str, hook: Option<&Owed>) -> io::Result<()> {
    match hook {
        Some(hook) => write_whole(&owed(group), hook),
        None => match fs::remove_file(owed(group)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        },
    }
}

fn relies(group: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("spooled-{group}"))
}

/// Whether ring space was released for what only the spool has: without the spool a successor cannot go on.
#[must_use]
pub fn relies_on_spool(group: &str) -> bool {
    relies(group).exists()
}

/// Notes whether it does.
///
/// # Errors
/// What the system says.
pub fn rely_on_spool(group: &str, relied: bool) -> io::Result<()> {
    if relied {
        make_directory()?;
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(relies(group))
            .map(drop)
    } else {
        fs::remove_file(relies(group))
    }
}

fn path(group: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("state-{group}.json"))
}

/// The identity of a group of this host: the same at each start, another on another host.
#[must_use]
pub fn group_id(group: &str) -> GroupId {
    let host = fs::read("/etc/machine-id")
        .ok()
        .filter(|id| id.len() >= 32)
        .or_else(|| fs::read("/proc/sys/kernel/hostname").ok())
        .unwrap_or_default();
    let mut hasher = blake3::Hasher::new_derive_key("bfs 2026 group identity v1");
    hasher.update(&host).update(&[0]).update(group.as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    GroupId(id)
}

/// This boot.
///
/// # Errors
/// What the system says.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(io::Error::other)?;
        *byte = u8::from_str_radix(pair, 16).map_err(io::Error::other)?;
    }
    Ok(id)
}
