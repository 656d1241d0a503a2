//! The spool at the start of a session, and without one: what an agent before left goes first.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bfs_common::record::PathBytes;
use bfs_common::wire::Refusal;

use super::SessionOptions;
use super::begin::{RETAIN_BYTES_MAX, START_LIMIT, open_store};
use super::state;
use crate::backup::ReplayerHandle;
use crate::keys::Folder;
use crate::net::Destination;
use crate::primary::failure::{Failure, Kind};
use crate::primary::further::Place;
use crate::primary::preflight;
use crate::primary::reader::{Reader, Root};
use crate::primary::ship::{Connect, Limit, Progress, ShipError, ShipOptions, Shipper, network, send_left};
use crate::primary::spool::{self, Address, Left, Spool, SpoolError, SpoolOptions};

/// Between two lines about how it goes on.
const TELL_EVERY: Duration = Duration::from_secs(1);

impl From<SpoolError> for Failure {
    fn from(error: SpoolError) -> Self {
        let kind = if matches!(error, SpoolError::InUse(_)) { Kind::GroupBusy } else { Kind::Other };
        let hint = "give another folder with --spool DIR, or none with --spool-size 0";
        Self::new(kind, error.to_string(), hint)
    }
}

/// How a destination is reached. A store of this machine is opened, once.
pub(super) fn connector(
    backup: &Destination,
    keys: &Folder,
) -> Result<(Connect, Option<Arc<ReplayerHandle>>), Failure> {
    let Destination::Dir(store) = backup else {
        return Ok((network(backup.clone(), keys.clone()), None));
    };
    let handle = Arc::new(open_store(store)?);
    let local = Arc::clone(&handle);
    let connect: Connect = Arc::new(move || {
        let handle = Arc::clone(&handle);
        Box::pin(async move { Ok(handle.connect_local()) })
    });
    Ok((connect, Some(local)))
}

/// The same for a session: its subtrees are outside of the store.
pub(super) fn place(
    options: &SessionOptions,
    backup: &Destination,
) -> Result<(Place, Option<Arc<ReplayerHandle>>), Failure> {
    let (connect, local) = connector(backup, &options.keys)?;
    if let Some(images) = local.as_ref().map(|handle| handle.images())
        && let Some(root) = preflight::overlapping(images, &options.roots)
    {
        return Err(Failure::new(
            Kind::Path,
            format!("--path {} overlaps the before-images in {}", root.display(), images.display()),
            "take a store whose before-images are outside of every --path",
        ));
    }
    let limit = options.sending.rate_limit.map(|rate| Arc::new(Limit::new(rate)));
    Ok((Place { address: backup.to_string(), connect, limit }, local))
}

/// What a session says at a connection.
pub(super) fn ship_options(connect: Connect, address: &Address, take_over: bool) -> ShipOptions {
    ShipOptions {
        connect,
        group: address.group.clone(),
        group_id: address.group_id,
        boot_id: address.boot_id,
        epoch: None,
        take_over,
        maps: address.maps.iter().map(|(a, b)| (PathBytes::new(a), PathBytes::new(b))).collect(),
        retain_bytes_max: RETAIN_BYTES_MAX,
        start_limit: START_LIMIT,
        sending: address.sending,
    }
}

/// The address of what a session is going to spool.
pub(super) fn address(options: &SessionOptions, boot_id: [u8; 16]) -> Address {
    let mut address = Address::new(&options.group, state::group_id(&options.group), boot_id);
    address.backup = options.backup.to_string();
    address.keys = options.absolute_keys();
    address.maps.clone_from(&options.maps);
    address.sending = options.sending;
    address
}

/// What [`take_spool`] gives.
pub(super) struct Taken {
    /// The spool, empty; `None` where there is to be none.
    pub spool: Option<Spool>,
    /// There was something in it, and the destination has it now.
    pub sent: bool,
}

/// The spool of a session: what was in it is sent.
pub(super) fn take_spool(
    options: &SessionOptions,
    address: &Address,
    connect: &Connect,
) -> Result<Taken, Failure> {
    let wanted = options.spool.bytes_max > 0;
    if !wanted && !spool::folder(&options.spool, &options.group).exists() {
        return Ok(Taken { spool: None, sent: false });
    }
    let mut sent = false;
    let mut spool = Spool::open(options.spool.clone(), address.clone())?;
    if let Some(left) = spool.left()? {
        spool = match send(spool, &left, connect) {
            Ok((spool, _)) => {
                sent = true;
                spool
            }
            Err(ShipError::Refused(
                why @ (Refusal::Fenced { .. } | Refusal::Fork { .. } | Refusal::Gap { .. } | Refusal::Bad(_)),
            )) => given_up(options, address, &left, &why)?,
            Err(ShipError::Refused(refusal @ Refusal::Promoted { .. })) => {
                // Fenced now, or then, and promoted again since.
                Shipper::start(ship_options(Arc::clone(connect), address, false), None, None)?;
                set_aside(options, address, &refusal)?
            }
            Err(error) => return Err(error.into()),
        };
    }
    Ok(Taken { spool: Some(spool).filter(|_| wanted), sent })
}

/// What is in the spool is of a history that ended. Nobody can take it, and nobody throws it away.
fn set_aside(options: &SessionOptions, address: &Address, why: &Refusal) -> Result<Spool, Failure> {
    if let Some(aside) = put_aside(&options.spool, &options.group)? {
        eprintln!("bfs-agent: what was left in the spool stands in {} now: {why}", aside.display());
    }
    Ok(Spool::open(options.spool.clone(), address.clone())?)
}

/// Gives the folder of a spool another name, if there is something in it; nobody may have it.
///
/// # Errors
/// [`Failure`].
pub(super) fn put_aside(options: &SpoolOptions, group: &str) -> Result<Option<PathBuf>, Failure> {
    let folder = spool::folder(options, group);
    if !folder.exists() {
        return Ok(None);
    }
    let boot_id = state::boot_id().map_err(|e| Failure::new(Kind::Other, e.to_string(), ""))?;
    let mut spool = Spool::open(options.clone(), Address::new(group, state::group_id(group), boot_id))?;
    let Some(left) = spool.left()? else { return Ok(None) };
    let mut aside = folder.clone().into_os_string();
    aside.push(format!(".fenced-{}", left.address.epoch));
    let aside = PathBuf::from(aside);
    let failed = |e: std::io::Error| {
        Failure::new(
            Kind::Other,
            format!("cannot rename {}: {e}", folder.display()),
            "move it away, and try again",
        )
    };
    if aside.exists() {
        return Err(failed(std::io::ErrorKind::AlreadyExists.into()));
    }
    std::fs::rename(&folder, &aside).map_err(failed)?;
    drop(spool);
    let _ = state::rely_on_spool(group, false);
    Ok(Some(aside))
}

/// Whether the spool lies outside of the subtrees, by whatever path it is reached.
pub(super) fn check_place(
    spool: &SpoolOptions,
    group: &str,
    reader: &Reader,
    roots: &[Root],
) -> Result<(), Failure> {
    let folder = spool::folder(spool, group);
    let opened = folder.ancestors().find_map(|place| File::open(place).ok());
    let place = opened.and_then(|place| reader.inode_of(place.as_fd()).ok().flatten());
    // On another file system than the subtrees it is outside.
    let Some(place) = place.and_then(|place| reader.real_path(place)) else { return Ok(()) };
    let holds = |root: &&Root| reader.real_path(root.stat.inode).is_some_and(|root| place.starts_with(root));
    match roots.iter().find(holds) {
        Some(root) if spool.bytes_max > 0 => Err(preflight::spool_inside(spool, &root.path)),
        _ => Ok(()),
    }
}

/// What is in the spool is of no use any more. Its records are not lost in silence, nor their effect: the
/// session that begins compares everything.
fn given_up(
    options: &SessionOptions,
    address: &Address,
    left: &Left,
    why: &Refusal,
) -> Result<Spool, Failure> {
    let mut spool = Spool::open(options.spool.clone(), address.clone())?;
    eprintln!(
        "bfs-agent: {} records in the spool {} cannot be sent any more, and are thrown away: {why}\n  \
         the files as they are now are copied instead; checkpoints that were only sealed are lost",
        left.end.sequence.0 - left.begin.sequence.0,
        spool.dir().display(),
    );
    spool.clear()?;
    Ok(spool)
}

fn send(spool: Spool, left: &Left, connect: &Connect) -> Result<(Spool, Progress), ShipError> {
    let mut ship = ship_options(Arc::clone(connect), &left.address, true);
    ship.epoch = Some(left.address.epoch);
    let (options, address) = (spool.options().clone(), left.address.clone());
    let mut told = Instant::now();
    let mut err = std::io::stderr();
    let shows = err.is_terminal();
    let (spool, progress) = send_left(ship, spool, left, |progress| {
        if shows && told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let left = progress.spool.left.map_or(String::new(), |t| format!(", about {} s", t.as_secs()));
            let mib = progress.spool.bytes >> 20;
            let _ = write!(err, "\rbfs-agent: {mib} MiB of the spool are to be sent{left}   ");
        }
    })?;
    if shows && told.elapsed() < TELL_EVERY {
        eprintln!();
    }
    let again = |e: SpoolError| ShipError::Start(std::io::Error::other(e.to_string()));
    let mut spool = match spool {
        Some(spool) => spool,
        None => Spool::open(options, address).map_err(again)?,
    };
    spool.clear().map_err(again)?;
    Ok((spool, progress))
}

/// Sends what an agent left that is gone. `None` when there is nothing.
///
/// # Errors
/// [`Failure`].
pub fn flush(options: &SpoolOptions, group: &str) -> Result<Option<Progress>, Failure> {
    if !spool::folder(options, group).exists() {
        return Ok(None);
    }
    let boot_id = state::boot_id().map_err(|e| Failure::new(Kind::Other, e.to_string(), ""))?;
    let mut spool = Spool::open(options.clone(), Address::new(group, state::group_id(group), boot_id))?;
    let Some(left) = spool.left()? else { return Ok(None) };
    let address = &left.address;
    let backup = address.backup.parse::<Destination>().map_err(|e| {
        let message = format!("the spool {} is for {}: {e}", spool.dir().display(), address.backup);
        Failure::new(Kind::Other, message, "")
    })?;
    let (connect, _local) = connector(&backup, &address.keys)?;
    let (_, progress) = send(spool, &left, &connect)?;
    // What an agent that died relied on is there: it can be gone on for.
    let _ = state::rely_on_spool(group, false);
    Ok(Some(progress))
}
