//! What `run`, `attach` and `rollback` are told alike, and what of it can be checked before anything is started.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{Group, commands, hooks, keys, logging, policies, sending, spool, watching, words};
use crate::net::Destination;
use crate::primary::engine::filter::Filter;
use crate::primary::failure::{Failure, Kind};
use crate::primary::further::Confirm;
use crate::primary::preflight;
use crate::primary::schedule::{Schedule, parse_size, parse_time};
use crate::primary::session::{GoingBack, PolicyOptions, SessionOptions};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// A directory to replicate, with everything below it (may be repeated)
    #[arg(long = "path", value_name = "DIR", required = true)]
    pub(super) paths: Vec<PathBuf>,
    /// Where the backup is: tcp://HOST:PORT or unix:PATH of a replayer, or dir:STORE on another
    /// disk of this machine. May be repeated: the first gets the stream, and each further one whole checkpoints, without
    /// anybody waiting for it
    #[arg(long, value_name = "DEST", required = true, num_args = 1)]
    backup: Vec<Destination>,
    /// With several --backup, when a checkpoint counts as confirmed: when `all` have it, `any`, so many of them (2), one
    /// as given to --backup, or all that are `attached` at the time
    #[arg(long, value_name = "WHO", default_value_t)]
    confirm: Confirm,
    #[command(flatten)]
    pub(super) group: Group,
    /// When checkpoints are taken: a comma list of every=TIME, bytes=SIZE, ops=NUMBER, cron=EXPRESSION (five fields,
    /// in the time zone of this host, like "cron=0 3 * * *"), or manual
    #[arg(long, value_name = "WHEN", default_value = "every=1s")]
    pub(super) checkpoint: Schedule,
    /// Keep files below FROM at TO on the backup, instead of at the same path (may be repeated)
    #[arg(long = "map", value_name = "FROM=TO", value_parser = parse_map)]
    pub(super) maps: Vec<(PathBuf, PathBuf)>,
    #[command(flatten)]
    keys: keys::Place,
    /// Where commands reach this agent [default: /run/bfs/agent-GROUP.sock]
    #[arg(long, value_name = "PATH")]
    pub(super) socket: Option<PathBuf>,
    /// What below --path is left out, with all below it: a name (*.tmp), or a path from there (/cache,
    /// a/**/b); may be repeated
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// The only files that are taken, unless an --exclude matches: a name, a path, or a directory with all
    /// below it (may be repeated)
    #[arg(long, value_name = "GLOB")]
    include: Vec<String>,
    /// How long to wait for the last checkpoint
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    pub(super) final_wait: Duration,
    /// What is done when processes that are not selected change something below --path
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    foreign: words::Foreign,
    #[command(flatten)]
    hooks: hooks::Hooks,
    #[command(flatten)]
    watching: watching::Watching,
    #[command(flatten)]
    policies: policies::PolicyWords,
    #[command(flatten)]
    spool: spool::Spool,
    #[command(flatten)]
    link: sending::Link,
    /// Longest write whose bytes travel through the ring
    #[arg(long, value_name = "SIZE", hide = true, value_parser = parse_size)]
    inline_max: Option<u64>,
    /// Size of the ring, a power of two
    #[arg(long, value_name = "SIZE", hide = true, value_parser = parse_size)]
    ring_bytes: Option<u64>,
}

impl Options {
    pub(super) fn filter(&self) -> Result<Filter, Failure> {
        Filter::new(&self.include, &self.exclude).map_err(|why| {
            Failure::new(Kind::Usage, why, "write --exclude '*.tmp', or --exclude 'cache/**' for a path")
        })
    }

    /// The policies, checked together.
    pub(super) fn policies(&self) -> Result<PolicyOptions, Failure> {
        self.policies.options()
    }

    /// Has a running agent go back with the processes, if it keeps their state.
    pub(super) fn go_back(&self, at: Option<&str>) -> Result<Option<u8>, Failure> {
        commands::go_back(&self.group.group, self.socket.as_deref(), at, self.final_wait)
    }

    /// Everything that can be checked before anything is started.
    pub(super) fn check(self) -> Result<SessionOptions, Failure> {
        logging();
        let filter = self.filter()?;
        let keys = self.keys.folder();
        for (at, backup) in self.backup.iter().enumerate() {
            preflight::check_paired(&keys, backup)?;
            if self.backup[..at].contains(backup) {
                let why = format!("--backup {backup} is given twice");
                return Err(Failure::new(Kind::Usage, why, "give each destination once"));
            }
        }
        let addresses: Vec<_> = self.backup.iter().map(ToString::to_string).collect();
        self.confirm.check(&addresses).map_err(|why| {
            Failure::new(Kind::Usage, format!("--confirm {}: {why}", self.confirm), "give another --confirm")
        })?;
        if let Some(ring) = self.ring_bytes
            && !(ring.is_power_of_two() && (1 << 16..=1 << 32).contains(&ring))
        {
            return Err(Failure::new(Kind::Usage, "--ring-bytes is no power of two from 64K to 4G", ""));
        }
        let roots = preflight::check_roots(&self.paths, &self.backup)?;
        if let Some((from, _)) = self
            .maps
            .iter()
            .find(|(from, _)| !roots.iter().any(|r| r.starts_with(from) || from.starts_with(r)))
        {
            return Err(Failure::new(
                Kind::Usage,
                format!("--map {}=... has nothing to do with any --path", from.display()),
                "FROM is a --path, a folder in one, or a folder above it",
            ));
        }
        let policies = self.policies.options()?;
        let spool = self.spool.options();
        preflight::check_spool(&spool, &self.group.group, &roots)?;
        let mut further = self.backup;
        let backup = further.remove(0);
        preflight::check_user()?;
        preflight::check_kernel()?;
        preflight::check_namespace()?;
        let (alerts, metrics) = self.watching.options();
        Ok(SessionOptions {
            group: self.group.group,
            roots,
            backup,
            further,
            confirm: self.confirm,
            schedule: self.checkpoint,
            maps: self.maps,
            keys,
            socket: self.socket,
            filter,
            final_wait: self.final_wait,
            foreign: self.foreign.into(),
            spool,
            sending: self.link.options(),
            hooks: self.hooks.options(),
            policies,
            alerts,
            metrics,
            rollback_on_failure: false,
            going_back: GoingBack::default(),
            process: None,
            inline_max: self.inline_max,
            ring_bytes: self.ring_bytes,
        })
    }
}

pub(super) fn parse_map(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let form = "write FROM=TO, for example --map /srv/data=/data";
    let (from, to) = text.split_once('=').ok_or(form)?;
    if to.is_empty() || !from.starts_with('/') {
        return Err(format!("{form}; FROM is an absolute path"));
    }
    Ok((from.into(), to.into()))
}
