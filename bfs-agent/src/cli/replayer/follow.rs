//! `follow`: a store that takes each checkpoint of another one, as it comes. The other store knows nothing of it.
//!
//! A difference needs the checkpoint that it begins with on both sides. The connection that brought the newest one is
//! kept until a younger one is there: for as long as it lives the other store keeps that checkpoint, whatever its rules say.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bfs_common::record::CheckpointId;
use clap::Args;
use tokio::signal::unix::SignalKind;

use super::{Exit, Owner, at_signal, exit_of, transfer};
use crate::backup::ReplayerHandle;
use crate::backup::retention::{KEEP_MIN, Retention};
use crate::cli::sayln;
use crate::generation::Client;
use crate::generation::next::{Apart, Step, carry, kept, next};
use crate::keys::Folder;
use crate::net::{self, Destination};
use crate::primary::schedule::parse_time;
use crate::service::Service;

/// Between two tries to reach a store that is away, at first; then twice as long each time.
const AGAIN_MIN: Duration = Duration::from_millis(500);
/// The longest of these, unless `--every` is longer.
const AGAIN_MAX: Duration = Duration::from_secs(30);

/// Which store follows which.
#[derive(Debug, Args)]
pub(super) struct Follow {
    /// Folder of the store that follows; made if it is missing. Where a replayer serves it, that is asked; else this
    /// command owns it until it ends, and keeps every checkpoint
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Address of the replayer that it follows: tcp://HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    from: Destination,
    /// Name of the group
    #[arg(long, value_name = "NAME", default_value = "default")]
    group: String,
    /// How often to look for a new checkpoint: 500ms, 10s, 5m, 1h
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    every: Duration,
    /// Take the newest checkpoint, and end
    #[arg(long)]
    once: bool,
    /// Folder of keys of this host, for tcp://
    #[arg(long, value_name = "DIR", default_value = crate::keys::DEFAULT)]
    keys: PathBuf,
}

/// Whether the command is to end, and the wait for that.
#[derive(Debug, Default)]
struct Ending {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Ending {
    /// A thread waits for the signals that end the command.
    fn by_signal() -> anyhow::Result<Arc<Self>> {
        let ending = Arc::new(Self::default());
        let theirs = Arc::clone(&ending);
        at_signal(&[SignalKind::terminate(), SignalKind::interrupt()], move || {
            *theirs.asked.lock().unwrap_or_else(PoisonError::into_inner) = true;
            theirs.changed.notify_all();
        })?;
        Ok(ending)
    }

    fn is_asked(&self) -> bool {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits; true when the command is to end.
    fn wait(&self, time: Duration) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        *self
            .changed
            .wait_timeout_while(asked, time, |asked| !*asked)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }
}

/// Both stores, and what is held of the other one.
struct Pair<'a> {
    what: &'a Follow,
    here: Owner,
    owned: Option<ReplayerHandle>,
    /// Over this the newest checkpoint came.
    held: Option<Client>,
    ending: Arc<Ending>,
}

/// Follows until a signal comes, or what cannot heal by itself.
pub(super) fn follow(what: &Follow) -> anyhow::Result<()> {
    let ending = Ending::by_signal()?;
    let here = Owner { store: Some(what.store.clone()), connect: None, keys: what.keys.clone() };
    let (_, owned) = here.open_or_make(Retention::everything(KEEP_MIN))?;
    let mut pair = Pair { what, here, owned, held: None, ending: Arc::clone(&ending) };
    let mut service = Service::of_environment();
    service.ready("following");
    let (mut again, mut told) = (AGAIN_MIN, None);
    loop {
        let pause = match pair.round() {
            Ok(taken) => {
                if told.take().is_some() {
                    eprintln!("bfs-replayer: {} answers again", what.from);
                }
                again = AGAIN_MIN;
                if taken.is_some() && what.once {
                    return Ok(());
                }
                what.every
            }
            Err(_) if ending.is_asked() => break,
            Err(error) if what.once || is_final(&error) => return Err(error),
            Err(error) => {
                let text = format!("{error:#}");
                if told.as_ref() != Some(&text) {
                    eprintln!("bfs-replayer: {text}; it is tried again");
                    told = Some(text);
                }
                again = (again * 2).min(AGAIN_MAX.max(what.every));
                again
            }
        };
        // In pieces, so that a service manager hears of it.
        let until = Instant::now() + pause;
        while !ending.is_asked() && Instant::now() < until {
            service.alive();
            let left = until.saturating_duration_since(Instant::now());
            ending.wait(service.every().map_or(left, |every| left.min(every)));
        }
        if ending.is_asked() {
            break;
        }
    }
    service.stopping();
    Ok(())
}

/// Whether trying again is of no use.
fn is_final(error: &anyhow::Error) -> bool {
    error.is::<Apart>() || !matches!(exit_of(error), Exit::Other | Exit::Unreachable)
}

impl Pair<'_> {
    fn client_here(&self) -> anyhow::Result<Client> {
        match &self.owned {
            Some(handle) => Ok(Client::open(async { Ok(handle.connect_local()) })?),
            None => Ok(self.here.open_or_make(Retention::everything(KEEP_MIN))?.0),
        }
    }

    /// Looks once, and takes what is new; gives the newest checkpoint that is here then.
    fn round(&mut self) -> anyhow::Result<Option<CheckpointId>> {
        let group = &self.what.group;
        let mut there = Client::open(net::connect(&self.what.from, &Folder::new(&self.what.keys)))?;
        let mut here = self.client_here()?;
        let (theirs, ours) = (kept(&mut there, group)?, kept(&mut here, group)?);
        let (older, newest) = match next(&ours, &theirs)? {
            Step::Wait => return Ok(None),
            Step::Done(newest) => return Ok(Some(newest)),
            Step::Take { older, newest } => (older, newest),
        };
        let ending = &self.ending;
        let bytes = carry(&mut there, &mut here, group, (older, newest), &mut |_| {
            if ending.is_asked() { Err(std::io::ErrorKind::Interrupted.into()) } else { Ok(()) }
        })?;
        transfer::applied(&mut here, group, newest)?;
        self.held = Some(there);
        let how = older.map_or_else(|| "whole".to_owned(), |older| format!("what differs from {older}"));
        sayln!("group {group}: checkpoint {newest} of {} ({how}, {bytes} bytes)", self.what.from)?;
        Ok(Some(newest))
    }
}
