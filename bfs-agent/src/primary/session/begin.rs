//! Starting a session: control socket, file systems, destination, probes, model.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bfs_common::abi::counter;
use bfs_common::record::CheckpointId;
use bfs_common::wire::DIGEST_BLOCK;

use super::multiple::Multiple;
use super::state::{self, State};
use super::work::{Beside, Work};
use super::{SessionOptions, left, link, rollback};
use crate::backup::{Replayer, ReplayerHandle, ServeOptions};
use crate::net::Scrape;
use crate::primary::capture::probes::group_dir;
use crate::primary::capture::{CaptureError, LoadOptions, Probes};
use crate::primary::clock::monotonic_ns;
use crate::primary::control::{self, Client, Inbound};
use crate::primary::engine::Engine;
use crate::primary::engine::adopt::{is_promoted, promoted_place};
use crate::primary::engine::foreign::Policy;
use crate::primary::engine::host::HostError;
use crate::primary::engine::model::{FileSystems, Model};
use crate::primary::engine::outbox::Outbox;
use crate::primary::failure::{Failure, Kind};
use crate::primary::further::Place;
use crate::primary::metrics::metrics;
use crate::primary::policies::Policies;
use crate::primary::reader::{Reader, ReaderError, Root};
use crate::primary::ship::{Shipper, Welcome};
use crate::primary::stop::{StopError, Stopper};

/// Most bytes of records that wait in memory for the destination; twice as many with notes of what was
/// touched.
pub(super) const RETAIN_BYTES_MAX: usize = 256 << 20;
/// How long the first connection may take.
pub(super) const START_LIMIT: Duration = Duration::from_secs(10);
/// How long the catalogue of a store may take.
const CATALOG_LIMIT: Duration = Duration::from_secs(300);
/// Writes up to this size are copied in the probe where that is exact. Beyond, the copy costs the
/// program more than a record that names the range, and ranges that are rewritten travel once.
const INLINE_MAX: u32 = 1 << 10;
/// Size of the ring.
const RING_BYTES: u32 = 64 << 20;

/// The parts of a session before its processes are known.
pub struct Ground {
    /// What the user asked for.
    pub options: SessionOptions,
    /// The control socket.
    server: control::Server,
    inbound: mpsc::Receiver<Inbound>,
    reader: Reader,
    roots: Vec<Root>,
    shipper: Shipper,
    welcome: Welcome,
    boot_id: [u8; 16],
    /// A rollback that was not finished was, to this checkpoint.
    pub rolled_back: Option<CheckpointId>,
    /// The spool that the agent before relied on is not there, or cannot be sent.
    spool_lost: bool,
    /// Answers monitors.
    scrape: Option<Scrape>,
    /// What is done with single files, as commands left it.
    policies: Policies,
    /// The replayer of a `dir:` destination.
    local: Option<Arc<ReplayerHandle>>,
    /// The first destination.
    place: Place,
    /// The further ones.
    further: Vec<Place>,
}

impl From<CaptureError> for Failure {
    fn from(error: CaptureError) -> Self {
        let (kind, hint) = match &error {
            CaptureError::NotRoot => (Kind::NotRoot, "run it with sudo"),
            CaptureError::NoBtf { .. } | CaptureError::NoBtrfs | CaptureError::MissingField { .. } => {
                (Kind::NoBpf, "use a kernel >= 6.12 built with CONFIG_DEBUG_INFO_BTF=y")
            }
            CaptureError::Load { .. } | CaptureError::NoBpfFs { .. } => {
                (Kind::NoBpf, "capturing needs root, a kernel >= 6.12, and no lockdown of BPF")
            }
            CaptureError::AlreadyPinned { .. } => (
                Kind::GroupBusy,
                "an agent of this group died and its program goes on being captured: \
                 go on with `bfs-agent resume --group NAME`",
            ),
            _ => (Kind::Other, ""),
        };
        Self::new(kind, error.to_string(), hint)
    }
}

impl From<ReaderError> for Failure {
    fn from(error: ReaderError) -> Self {
        Self::new(Kind::Path, error.to_string(), "choose a directory on ext4, xfs, btrfs or tmpfs")
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        Self::new(Kind::Other, error.to_string(), "")
    }
}

impl From<StopError> for Failure {
    fn from(error: StopError) -> Self {
        Self::new(Kind::Other, error.to_string(), "")
    }
}

fn other(what: &str, error: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Other, format!("{what}: {error}"), "")
}

impl Ground {
    /// Opens what a session stands on. `successor`: an agent before may still seem connected.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn open(options: SessionOptions, successor: bool) -> Result<Self, Failure> {
        let (sender, inbound) = mpsc::channel();
        let policies = super::policies::load(&options.policies, &options.group)?;
        let server = control::Server::start(&options.group, options.socket.as_deref(), sender, || {})
            .map_err(|e| match e {
                control::ServerError::Taken(_) => Failure::new(
                    Kind::GroupBusy,
                    format!("group {:?} has an agent already: {e}", options.group),
                    "choose another --group, or end that one with `bfs-agent stop`",
                ),
                e => other("the control socket", e),
            })?;
        let socket = server.path().to_owned();
        let shown = move || Some(metrics(&Client::connect(&socket).ok()?.status().ok()?));
        let scrape = options.metrics.as_ref().map(|at| Scrape::start(at, shown)).transpose();
        let scrape = scrape.map_err(|e| {
            Failure::new(Kind::Usage, format!("--metrics: {e}"), "give another address, or leave it out")
        })?;
        let mut reader = Reader::new();
        let mut roots = Vec::new();
        for path in &options.roots {
            roots.push(reader.add_root(path)?);
        }
        left::check_place(&options.spool, &options.group, &reader, &roots)?;
        let rolled_back = rollback::finish_interrupted(&options.group, &reader, &roots)?;
        let boot_id = state::boot_id().map_err(|e| other("cannot read the boot id", e))?;
        let (place, local) = left::place(&options, &options.backup)?;
        let further = options.further.iter().map(|to| Ok(left::place(&options, to)?.0));
        let further = further.collect::<Result<Vec<_>, Failure>>()?;
        let connect = Arc::clone(&place.connect);
        let address = left::address(&options, boot_id);
        let unreachable = |mut failure: Failure| {
            failure.message = format!("--backup {}: {}", options.backup, failure.message);
            if failure.hint.is_empty() {
                failure.hint = "try another --backup or --group, or look at the replayer: \
                                bfs-replayer status"
                    .into();
            }
            failure
        };
        let taken = left::take_spool(&options, &address, &connect).map_err(unreachable)?;
        let left::Taken { spool, sent } = taken;
        // What the ring was released for is gone then.
        let spool_lost = !sent && state::relies_on_spool(&options.group);
        let ship = left::ship_options(connect, &address, successor);
        let (shipper, welcome) =
            Shipper::start(ship, spool, None).map_err(|e| unreachable(Failure::from(e)))?;
        check_promoted(&welcome, &options.roots)?;
        Ok(Self {
            options,
            server,
            inbound,
            reader,
            roots,
            shipper,
            welcome,
            boot_id,
            rolled_back,
            spool_lost,
            scrape,
            policies,
            local,
            place,
            further,
        })
    }

    /// Loads the probes; with a cgroup its tasks are selected as they are born or moved. What an agent
    /// before left is removed if nothing runs in it any more.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn load_probes(&self, cgroup: Option<u64>) -> Result<Probes, Failure> {
        let pin_dir = group_dir(&self.options.group);
        // The control socket is ours, so no agent of this group lives.
        match Probes::adopt(&pin_dir) {
            Ok(old) if old.nobody_is_selected()? => old.unpin()?,
            Ok(_) => {}
            // An agent died while it loaded them; probes of another version are left alone.
            Err(CaptureError::Kernel { .. }) if pin_dir.exists() => Probes::clear(&pin_dir)?,
            Err(_) => {}
        }
        let inline_max = self.options.inline_max.map_or(INLINE_MAX, |n| n.min(u64::from(u32::MAX)) as u32);
        let ring_bytes = self.options.ring_bytes.map_or(RING_BYTES, |n| n.min(1 << 30) as u32);
        let mut load = LoadOptions::new(&self.options.group, self.reader.devices());
        load.cgroup = cgroup;
        load.btrfs = self.reader.has_btrfs();
        load.roots = self.roots.iter().map(|root| root.stat.inode).collect();
        // What others changed is to stay as it is there.
        load.foreign = !self.options.rollback_on_failure;
        load.inline_max = inline_max;
        load.ring_bytes = ring_bytes;
        let probes = Probes::load(&load)?;
        let policy = self.options.foreign;
        if policy != Policy::Follow && !probes.foreign().is_seen() {
            probes.unpin()?;
            return Err(Failure::new(
                Kind::NoBpf,
                "--foreign refuse and ignore need to see what others change, which this kernel does not tell \
                 (or, with --rollback-on-failure, is not looked at)",
                "use a kernel >= 6.13, or leave --foreign out",
            ));
        }
        // Without it a successor reads everything.
        if let Err(e) = Multiple::begin(&self.options.group) {
            tracing::warn!("cannot begin a list in /run/bfs: {e}");
        }
        Ok(probes)
    }

    /// The session at work. `complete`: capture went on since the agent before, so only what its
    /// ring and gaps name has to be read again; else everything is.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn build(
        self,
        probes: Probes,
        stopper: Option<Box<dyn Stopper>>,
        state: &State,
        complete: bool,
    ) -> Result<Work, Failure> {
        let Self {
            options,
            server,
            inbound,
            reader,
            roots,
            shipper,
            welcome,
            boot_id,
            scrape,
            policies,
            local,
            place,
            further,
            ..
        } = self;
        let mut file_systems = FileSystems::default();
        for root in &roots {
            file_systems.add(root.stat.inode.dev, root.file_system, root.subvolume);
        }
        let mut model = if welcome.highest_object.0 == 0 {
            Model::new(welcome.highest_object, file_systems)
        } else {
            let catalog = shipper.catalog(CATALOG_LIMIT)?;
            Model::from_catalog(welcome.highest_object, file_systems, &welcome.roots, catalog)
        };
        model.filter = options.filter.clone();
        let (multiple, known_multiple) = Multiple::open(&options.group);
        // The suspects that probes named are taken out of their map when they are read, which may be before their
        // gap is durable: whoever comes next does not know which there were.
        let named = complete && probes.counters()?.get(counter::RESERVE_FAILED) > 0;
        // No probe saw what was brought back.
        let complete = complete
            && !named
            && known_multiple.is_some()
            && self.rolled_back.is_none()
            && !self.spool_lost
            && welcome.adopt.is_none()
            && welcome.boot_id == boot_id
            && welcome.highest_object.0 > 0;
        let out = Outbox::new(welcome.position.sequence, welcome.position.chain);
        let mut engine = Engine::new(model, out, welcome.confirmed);
        if !complete && welcome.highest_object.0 > 0 {
            engine.compare_blocks(DIGEST_BLOCK);
        }
        let now = monotonic_ns();
        engine.set_foreign(options.foreign);
        engine.expect_writers();
        probes.foreign().set_agent()?;
        engine.begin_epoch(welcome.epoch, boot_id, complete, now);
        let roots: Vec<_> = roots.into_iter().map(|r| (r.path, r.stat)).collect();
        if let Some(to) = &welcome.adopt {
            engine.adopt_roots(to.as_path(), &roots);
        }
        engine.set_roots(roots);
        if complete {
            engine.adopt_multiple(&known_multiple.unwrap_or_default());
            engine.adopt_gaps(&welcome.gaps, now);
        } else {
            // Once more, with the roots.
            engine.suspect_everything(now);
        }
        if let Some(object) = state.mending {
            engine.suspect_ranges(object, &[], now);
        }
        // What stands in the ring by now is in what was read or in the catalogue, or not.
        engine.suspect_events_before(now);
        state.write(&options.group).map_err(|e| other("cannot write the state file in /run/bfs", e))?;
        let mut link = link::Link::new((&options.group, place), probes, reader, shipper, stopper, multiple);
        link.confirm = options.confirm.clone();
        for place in further {
            link.add_further(&options, engine.roots(), place)?;
        }
        let beside = Beside { _scrape: scrape, _local: local };
        Ok(Work::new(options, policies, server, inbound, engine, link, welcome.epoch, state.clone(), beside))
    }
}

/// Right after a promotion nothing else is taken for the primary's files than what was promoted.
fn check_promoted(welcome: &Welcome, roots: &[PathBuf]) -> Result<(), Failure> {
    let Some(to) = &welcome.adopt else { return Ok(()) };
    let known = |path: &PathBuf| {
        welcome.roots.iter().any(|(root, _)| is_promoted(to.as_path(), root.as_path(), path))
    };
    if roots.iter().any(known) {
        return Ok(());
    }
    let place = |root: &Path| format!("--path {}", promoted_place(to.as_path(), root).display());
    let words: Vec<_> = welcome.roots.iter().map(|(root, _)| place(root.as_path())).collect();
    Err(Failure::new(
        Kind::Path,
        format!("the backup was promoted to {}, and no --path is there", to.as_path().display()),
        format!("give what was promoted: {}", words.join(" ")),
    ))
}

pub(super) fn open_store(store: &Path) -> Result<ReplayerHandle, Failure> {
    let options = ServeOptions { store: store.to_owned(), ..ServeOptions::default() };
    Replayer::start(options).map_err(|e| {
        Failure::new(
            Kind::Unreachable,
            format!("--backup dir:{}: {e}", store.display()),
            "choose another store, or end the replayer that has it",
        )
    })
}
