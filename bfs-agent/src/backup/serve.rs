//! The replayer as a whole: a store, its groups, and the sockets it listens on.
//!
//! [`Replayer::start`] opens everything, so that an error is an error of the start, and then
//! works on a runtime of its own threads: `bfs-replayer serve` and an agent with `dir:STORE` use
//! the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bfs_common::record::{GroupId, PathBytes};
use bfs_common::wire::{GroupStatus, Refusal};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use super::access::Access;
use super::apply::Area;
use super::connection;
use super::door::{self, Door};
use super::error::BackupError;
use super::group::{Group, Limits};
use super::images;
use super::index::{GroupRow, Index, Keeper, View};
use super::metrics::Following;
use super::places;
use super::retention::Retention;
use super::room::{Disk, Disks, Room};
use super::store::Store;
use super::transfer::{Busy, Incoming, finish_all};
use crate::keys::Folder;
use crate::log::writer::SEGMENT_BYTES;
use crate::net::{Connection, Destination, destination, listen_unix, store_socket};

/// Groups of one store.
const GROUPS_MAX: usize = 256;
/// How long the end waits for what connections are doing just now.
const CONNECTIONS_END: Duration = Duration::from_secs(5);

/// What a replayer is told.
#[derive(Clone, Debug, Default)]
pub struct ServeOptions {
    /// The store's folder; made if it is missing.
    pub store: PathBuf,
    /// Where to listen, besides the owner's socket in the store.
    pub listen: Vec<Destination>,
    /// The folder of keys, for TCP; that of the store, if not given.
    pub keys: Option<Folder>,
    /// Folders outside the store that maps may lead into.
    pub allow_roots: Vec<PathBuf>,
    /// Bytes of a group's log that may wait to be applied; as many as there is room for, if not given.
    pub pending_max: Option<u64>,
    /// How many generations are kept.
    pub retention: Retention,
    /// And of these groups.
    pub retention_of: BTreeMap<String, Retention>,
    /// Where the before-images of a store are to be that has none yet.
    pub images: Option<PathBuf>,
}

/// What groups may take and keep.
#[derive(Clone, Debug)]
struct AllLimits {
    pending_max: u64,
    retention: Retention,
    retention_of: BTreeMap<String, Retention>,
}

impl AllLimits {
    fn of(&self, group: &str) -> Limits {
        let retention = self.retention_of.get(group).unwrap_or(&self.retention).clone();
        Limits { pending_max: self.pending_max, retention }
    }
}

/// A store at work: what all connections share.
#[derive(Debug)]
pub struct Shared {
    store: Store,
    index: Arc<Index>,
    groups: Mutex<BTreeMap<String, Arc<Group>>>,
    allowed: Vec<PathBuf>,
    limits: AllLimits,
    room: Arc<Room>,
    receiving: Busy,
    /// Longest segments of what is taken in, in bytes.
    segments_max: u64,
    /// True when the replayer ends.
    pub(super) stop: watch::Sender<bool>,
    connections: AtomicU64,
    pub(super) door: Door,
    /// There when it listens on TCP.
    pub(super) access: Option<Arc<Access>>,
}

impl Shared {
    fn open(options: &ServeOptions) -> Result<Self, BackupError> {
        let store = Store::open_with(&options.store, options.images.as_deref())?;
        let index = Arc::new(Index::open(store.path())?);
        let access = if options.listen.iter().any(|listen| matches!(listen, Destination::Tcp(_))) {
            Some(Access::open(options.keys.clone().unwrap_or_else(|| store_keys(store.path())))?)
        } else {
            None
        };
        let mut allowed = Vec::new();
        for dir in &options.allow_roots {
            let dir = std::fs::canonicalize(dir).map_err(BackupError::io("find the allowed root", dir))?;
            let images = store.images();
            if !images.starts_with(store.path()) && (images.starts_with(&dir) || dir.starts_with(images)) {
                let why = format!("it overlaps {}, where backup files may be (--allow-root)", dir.display());
                return Err(BackupError::Images { folder: images.into(), why });
            }
            allowed.push(dir);
        }
        let limits = AllLimits {
            pending_max: options.pending_max.unwrap_or(u64::MAX),
            retention: options.retention.clone(),
            retention_of: options.retention_of.clone(),
        };
        let room = Arc::new(Room::default());
        // A stream that was taken in as a whole belongs to its log.
        let rows = index.groups()?;
        finish_all(&store.path().join("receive"), |name| {
            let row = rows.iter().find(|(known, _)| known == name);
            row.map(|(_, row)| Ok((store.group_dir("log", name)?, row.id))).transpose()
        })?;
        let mut groups = BTreeMap::new();
        for (name, row) in rows {
            let group = open_group(&store, &index, &name, row, &allowed, limits.of(&name), &room)?;
            groups.insert(name, group);
        }
        Ok(Self {
            store,
            index,
            groups: Mutex::new(groups),
            allowed,
            limits,
            room,
            receiving: Busy::default(),
            segments_max: SEGMENT_BYTES,
            stop: watch::Sender::new(false),
            connections: AtomicU64::new(0),
            door: Door::default(),
            access,
        })
    }

    /// One with this group, whose threads are the simulation's.
    #[cfg(test)]
    pub(super) fn simulated(
        store: Store,
        index: Arc<Index>,
        (name, group): (&str, &Arc<Group>),
        room: Arc<Room>,
        segments_max: u64,
    ) -> Self {
        let (retention, retention_of) = (Retention::last(1, 1), BTreeMap::new());
        Self {
            store,
            index,
            groups: Mutex::new(BTreeMap::from([(name.to_owned(), Arc::clone(group))])),
            allowed: Vec::new(),
            limits: AllLimits { pending_max: u64::MAX, retention, retention_of },
            room,
            receiving: Busy::default(),
            segments_max,
            stop: watch::Sender::new(false),
            connections: AtomicU64::new(0),
            door: Door::default(),
            access: None,
        }
    }

    /// A group by name.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<Arc<Group>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Whether the store has a group of this name, also one that could not be opened. Blocks on the disk.
    ///
    /// # Errors
    /// The refusal for the agent.
    pub(super) fn has_group(&self, name: &str) -> Result<bool, Refusal> {
        if self.group(name).is_some() {
            return Ok(true);
        }
        let rows = self.index.groups().map_err(|e| Refusal::Store(e.to_string()))?;
        Ok(rows.iter().any(|(known, _)| known == name))
    }

    /// The group of this name and identity; made if the name is new. Blocks on the disk.
    ///
    /// # Errors
    /// The refusal for the agent.
    pub fn group_for(
        &self,
        name: &str,
        id: GroupId,
        maps: &[(PathBytes, PathBytes)],
    ) -> Result<Arc<Group>, Refusal> {
        if !places::group_name_is_valid(name) {
            return Err(places::invalid_group_name(name));
        }
        for (from, _) in maps {
            places::root_place(from.as_path(), maps, &self.allowed)
                .map_err(|e| Refusal::Bad(e.to_string()))?;
        }
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = groups.get(name) {
            group.admit_writer(id)?;
            if group.maps() != maps {
                let why = format!(
                    "group {name:?} began with another --map: give the same again, or another --group"
                );
                return Err(Refusal::Bad(why));
            }
            return Ok(group.clone());
        }
        if groups.len() >= GROUPS_MAX {
            return Err(Refusal::Store(format!("it holds {GROUPS_MAX} groups already")));
        }
        let make = || -> Result<Arc<Group>, BackupError> {
            // By the index: it may have one that could not be opened, and so got no record.
            let rows = self.index.groups()?;
            let begun = rows.iter().find(|(known, _)| known == name).map(|(_, row)| row.number);
            let highest = rows.iter().map(|(_, row)| row.number).max().unwrap_or(0);
            let row = GroupRow::new(begun.unwrap_or(highest + 1), id, maps.to_vec());
            self.index.put_group(name, &row)?;
            open_group(&self.store, &self.index, name, row, &self.allowed, self.limits.of(name), &self.room)
        };
        let group = make().map_err(|e| Refusal::Store(e.to_string()))?;
        groups.insert(name.into(), group.clone());
        Ok(group)
    }

    /// Opens logs again that had failed, as an agent's Hello does. Trouble that does not go away stays with the group.
    pub(super) async fn open_logs_again(&self) {
        let troubled: Vec<_> = {
            let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
            groups.values().filter(|group| group.is_troubled()).cloned().collect()
        };
        for group in troubled {
            let _ = group.drain().await;
        }
    }

    /// Groups that a stream is being taken in for.
    pub(super) fn receiving(&self) -> &Busy {
        &self.receiving
    }

    /// Longest segments of what is taken in, in bytes.
    pub(super) const fn segments_max(&self) -> u64 {
        self.segments_max
    }

    /// A folder of the store.
    pub(super) fn folder(&self, kind: &str) -> PathBuf {
        self.store.path().join(kind)
    }

    /// The objects of a group by its number.
    pub(super) fn view(&self, group: u32) -> Result<View, BackupError> {
        self.index.view(group)
    }

    /// Whether there is room for so many bytes beside all that waits.
    pub(super) fn has_room(&self, disks: &Disks, bytes: u64) -> Result<(), Refusal> {
        self.room.check(disks, bytes).map_err(|short| Refusal::Full(short.to_string()))
    }

    /// Ends the threads of the groups.
    fn stop_groups(&self) {
        let groups = std::mem::take(&mut *self.groups.lock().unwrap_or_else(PoisonError::into_inner));
        for group in groups.values() {
            group.stop();
        }
    }

    /// How the groups stand.
    #[must_use]
    pub fn status(&self) -> Vec<GroupStatus> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.values().map(|group| group.status()).collect()
    }

    /// Keeps the copy of the index, until it is dropped.
    fn keep_copy(&self) -> Result<Keeper, BackupError> {
        let path = self.store.path();
        let folder = std::fs::File::open(path).map_err(BackupError::io("open", path))?;
        let disk = Disk::of(folder).map_err(BackupError::io("stat", path))?;
        let room = self.room.clone();
        Keeper::start(self.index.clone(), move |bytes| {
            room.check_store(&disk, bytes).map_err(|short| short.to_string())
        })
    }

    /// How the followers of the groups stand.
    fn following(&self) -> Vec<Following> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.values().map(|group| group.following()).collect()
    }

    /// A number for a new connection.
    pub(super) fn number_connection(&self) -> u64 {
        self.connections.fetch_add(1, Ordering::Relaxed)
    }
}

fn open_group(
    store: &Store,
    index: &Arc<Index>,
    name: &str,
    row: GroupRow,
    allowed: &[PathBuf],
    limits: Limits,
    room: &Arc<Room>,
) -> Result<Arc<Group>, BackupError> {
    let area = Area::open(store, name, &row.maps, allowed)?;
    if let Some(why) = images::why_too_old(area.images(), row.checkpoint)? {
        return Err(BackupError::corrupt(
            store.path().join("index.redb"),
            format!("group {name:?} has {why}"),
        ));
    }
    let log = store.group_dir("log", name)?;
    let incoming = Incoming::of(&store.path().join("receive"), name);
    Group::open(name, row, index.clone(), area, (log, incoming), limits, room.clone())
}

/// The folder of keys of a store.
#[must_use]
pub fn store_keys(store: &Path) -> Folder {
    Folder::new(store.join("keys"))
}

/// Starts replayers.
#[derive(Debug)]
pub struct Replayer;

impl Replayer {
    /// Opens the store, binds the addresses, and serves until the handle is stopped or dropped.
    ///
    /// # Errors
    /// [`BackupError`]: the store is in use, damaged or newer, an address cannot be used.
    pub fn start(options: ServeOptions) -> Result<ReplayerHandle, BackupError> {
        // First what costs nothing to refuse.
        for listen in &options.listen {
            if let Destination::Tcp(address) = listen {
                destination::resolve_now(address)?;
            }
        }
        let shared = Arc::new(Shared::open(&options)?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("replayer")
            .enable_all()
            .build()
            .map_err(BackupError::io("start", "the runtime"))?;
        let keeper = Some(shared.keep_copy()?);
        let runtime = Some(runtime);
        let mut handle =
            ReplayerHandle { runtime, shared, keeper, listening: Vec::new(), sockets: Vec::new() };
        let own = Destination::Unix(store_socket(handle.shared.store.path()));
        handle.listen(&own)?;
        for listen in &options.listen {
            handle.listen(listen)?;
        }
        if let (Some(access), Some(runtime)) = (&handle.shared.access, &handle.runtime) {
            runtime.spawn(access.clone().look_now_and_then());
        }
        Ok(handle)
    }
}

/// A replayer at work. Dropping it stops it: what was taken is synced, a step that runs is
/// finished.
#[derive(Debug)]
pub struct ReplayerHandle {
    runtime: Option<tokio::runtime::Runtime>,
    shared: Arc<Shared>,
    keeper: Option<Keeper>,
    listening: Vec<Destination>,
    sockets: Vec<PathBuf>,
}

impl ReplayerHandle {
    /// A connection inside this process; needs no authentication.
    #[must_use]
    pub fn connect_local(&self) -> Connection {
        self.local().connect()
    }

    /// To connect inside this process later.
    #[must_use]
    pub fn local(&self) -> Local {
        Local {
            runtime: self.runtime.as_ref().map(|runtime| runtime.handle().clone()),
            shared: self.shared.clone(),
        }
    }

    /// The addresses, with the ports that were chosen; the store's own socket first.
    #[must_use]
    pub fn listening(&self) -> &[Destination] {
        &self.listening
    }

    /// How the groups stand.
    #[must_use]
    pub fn status(&self) -> Vec<GroupStatus> {
        self.shared.status()
    }

    /// How the followers of the groups stand.
    #[must_use]
    pub fn following(&self) -> Vec<Following> {
        self.shared.following()
    }

    /// Comes back when the workers have taken up a request for the status and answered it.
    pub async fn answers(&self) {
        let shared = self.shared.clone();
        if let Some(runtime) = &self.runtime {
            // A worker that panicked is replaced: what counts is that there is one.
            let _ = runtime.spawn(async move { shared.status().len() }).await;
        }
    }

    /// The store's folder.
    #[must_use]
    pub fn store(&self) -> &Path {
        self.shared.store.path()
    }

    /// The folder of its before-images.
    #[must_use]
    pub fn images(&self) -> &Path {
        self.shared.store.images()
    }

    /// What its connections share.
    #[cfg(test)]
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn listen(&mut self, address: &Destination) -> Result<(), BackupError> {
        let failed = |error| BackupError::Listen { address: address.to_string(), error };
        let Some(runtime) = &self.runtime else { return Ok(()) };
        let _inside = runtime.enter();
        match (address, &self.shared.access) {
            (Destination::Tcp(text), Some(access)) => {
                let found = destination::resolve_now(text)?;
                let listener = std::net::TcpListener::bind(&found[..]).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let bound = listener.local_addr().map_err(failed)?;
                let listener = TcpListener::from_std(listener).map_err(failed)?;
                runtime.spawn(door::accept_tcp(self.shared.clone(), listener, access.clone()));
                self.listening.push(Destination::Tcp(bound.to_string()));
            }
            (Destination::Unix(path), _) => {
                let listener = listen_unix(path).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let listener = UnixListener::from_std(listener).map_err(failed)?;
                runtime.spawn(door::accept_unix(self.shared.clone(), listener));
                self.sockets.push(path.clone());
                self.listening.push(address.clone());
            }
            (Destination::Tcp(_), None) => {
                return Err(failed(std::io::Error::other("there are no keys")));
            }
            (Destination::Dir(_), _) => {
                let why = "a store is not an address to listen on; write tcp://HOST:PORT or unix:PATH";
                return Err(failed(std::io::Error::new(std::io::ErrorKind::InvalidInput, why)));
            }
        }
        Ok(())
    }
}

/// Connects to a replayer of the same process.
#[derive(Clone, Debug)]
pub struct Local {
    runtime: Option<tokio::runtime::Handle>,
    shared: Arc<Shared>,
}

impl Local {
    /// A connection; when the replayer has ended, one that is at its end.
    #[must_use]
    pub fn connect(&self) -> Connection {
        let (ours, theirs) = crate::net::local_pair();
        if let Some(runtime) = &self.runtime {
            runtime.spawn(connection::serve(self.shared.clone(), theirs));
        }
        ours
    }
}

impl Drop for ReplayerHandle {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
        self.shared.stop_groups();
        drop(self.keeper.take());
        if let Some(runtime) = self.runtime.take() {
            // Behind this no connection has the store open any more. On a thread of its own, because a handle may be
            // dropped inside another runtime, which does not let itself be waited in.
            let ended = std::thread::spawn(move || runtime.shutdown_timeout(CONNECTIONS_END)).join();
            if ended.is_err() {
                tracing::error!("the end of the connections ended by a panic");
            }
        }
        // Those that a connection opened meanwhile.
        self.shared.stop_groups();
        for socket in &self.sockets {
            // The next owner removes a socket that is left.
            let _ = std::fs::remove_file(socket);
        }
    }
}
