//! Command line of `bfs-replayer`.

mod changes;
mod follow;
mod giveback;
mod keep;
mod keys;
mod processes;
mod promote;
mod serve;
mod transfer;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::task::Poll;
use std::time::Duration;

use bfs_common::wire::{Frame, GroupStatus, PromoteStage, Refusal, StoreState};
use clap::{Args, CommandFactory, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use crate::backup::retention;
use crate::backup::watching::agent_text;
use crate::backup::{BackupError, ServeOptions, store};
use crate::cli::{say, sayln};
use crate::generation::{At, ReadError, time_text};
use crate::keys::{self as key_files, Folder, KeyError};
use crate::net::{self, AddressError, AskError, ConnectError, Destination, ScrapeError};

/// How long `status` waits for an answer.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Anything else.
    Other = 1,
    /// The command line is wrong (clap's own status).
    Usage = 2,
    /// The store is in use by another process.
    InUse = 10,
    /// The store is damaged.
    Corrupt = 11,
    /// The store was written by a newer release.
    NewerFormat = 12,
    /// The folder is no store.
    NotAStore = 13,
    /// An address cannot be used or bound.
    Address = 14,
    /// Keys are missing, accessible to others, or damaged.
    Keys = 15,
    /// No replayer answers.
    Unreachable = 16,
    /// The replayer refused, or did not authenticate itself.
    Refused = 17,
    /// The peer speaks another protocol or version.
    Protocol = 18,
    /// `check` found damage.
    Damaged = 19,
}

const EXIT_HELP: &str = "\
Exit status:
  0   all went well
  1   another error
  2   the command line is wrong
  10  the store is in use by another process
  11  the store is damaged (the message names the file and the place)
  12  the store was written by a newer release
  13  the folder is neither a store nor empty
  14  an address cannot be used
  15  keys are missing, accessible to others, or damaged
  16  no replayer answers
  17  the replayer refused, or is not the one that was meant
  18  the peer speaks another protocol or version
  19  check: something is damaged (each is listed)";

#[derive(Debug, Parser)]
#[command(
    name = "bfs-replayer",
    version,
    about = "Keeps the backup: takes the stream of agents, and brings the backup files from checkpoint to checkpoint",
    after_help = EXIT_HELP
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Own a store and take the streams of agents, until SIGTERM or SIGINT
    #[command(after_help = "\
Example:
  bfs-replayer serve --store /backup/store --listen tcp://0.0.0.0:7400
Over TCP only hosts get in that were paired (`bfs-replayer pair`).
The backup files of group G stand at STORE/tree/G/ followed by the path on the primary.")]
    Serve {
        /// Folder of the store; made if it is missing
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
        /// Where to listen: unix:PATH or tcp://ADDRESS:PORT (0.0.0.0 or [::] for all of this host; port 0 takes a free
        /// one). May be given several times. The owner's own socket is always STORE/replayer.sock
        #[arg(long, value_name = "ADDR")]
        listen: Vec<Destination>,
        /// Folder with the replayer's key and those that it knows [default: STORE/keys]
        #[arg(long, value_name = "DIR")]
        keys: Option<PathBuf>,
        /// Folder outside the store that an agent's --map may lead into. May be given several
        /// times
        #[arg(long, value_name = "DIR")]
        allow_root: Vec<PathBuf>,
        /// Which checkpoints are kept, beside all with a tag: a comma list of all=AGE (everything that is younger),
        /// SPAN=AGE (up to that age the last of each span), last=NUMBER. With GROUP: before it the rules of that group,
        /// else those of all others. May be given several times
        #[arg(long, value_name = "[GROUP:]RULES", default_value = keep::DEFAULT)]
        keep: Vec<keep::Keep>,
        /// How much of the disk they may take together; the oldest without a tag go first
        #[arg(long, value_name = "PERCENT", default_value_t = retention::SPACE_PERCENT, value_parser = clap::value_parser!(u8).range(1..=100))]
        keep_space: u8,
        /// So many of the last ones are kept in any case, whatever a primary sends and how little room there is
        #[arg(long, value_name = "N", default_value_t = retention::KEEP_MIN)]
        keep_min: u32,
        /// Where before-images are to be: a folder of its own, on another disk. Only for a store that has none yet; it
        /// says so itself from then on
        #[arg(long, value_name = "DIR")]
        images: Option<PathBuf>,
        /// How much of a group's stream may wait to be applied; then nothing more is taken. Without a bound: as much as
        /// there is room for. The first copy of a group is one checkpoint, and must fit
        #[arg(long, value_name = "BYTES")]
        pending_max: Option<u64>,
        #[command(flatten)]
        watching: serve::Watching,
    },
    /// List the checkpoints that are kept
    #[command(after_help = "\
A store that nobody owns is opened by this command.
Example:
  bfs-replayer generations --store /backup/store --group default")]
    Generations {
        #[command(flatten)]
        from: giveback::From,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// List the checkpoints that changed a file or directory
    #[command(after_help = "\
A file is followed through renames, and on to what it replaced at its path. Of a directory that is what changes it
itself, not what changes in it: `diff` shows that.
Example:
  bfs-replayer versions --store /backup/store /srv/data/app.conf")]
    Versions {
        #[command(flatten)]
        from: giveback::From,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Its absolute path on the primary
        #[arg(value_name = "PATH")]
        path: PathBuf,
    },
    /// Show what differs between two checkpoints that are kept
    #[command(after_help = "\
Each is a number, tag:NAME, or a time, as for `restore`. It takes as long as what changed between them is much.
Example:
  bfs-replayer diff --store /backup/store 41 tag:release")]
    Diff {
        #[command(flatten)]
        from: giveback::From,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// From this one
        #[arg(value_name = "N|TIME|tag:NAME")]
        a: At,
        /// To this one
        #[arg(value_name = "N|TIME|tag:NAME")]
        b: At,
    },
    /// Mount a checkpoint that is kept, read-only, while replication goes on
    #[command(after_help = "\
Nothing is restored: each file is read where it is, and stands below DIR at its absolute path of the primary. The
checkpoint stays for as long as it is mounted. The command runs until `umount DIR` or a signal. The mount is for the
user who makes it; set-user-ID programs and devices in it do nothing. A store that nobody owns is opened by this
command, and is in use until it ends.
Examples:
  bfs-replayer mount --store /backup/store --at 41 /mnt/then
  bfs-replayer mount --store /backup/store --at 2026-11-21T14:05 /mnt/then")]
    Mount {
        #[command(flatten)]
        from: giveback::From,
        /// Which: its number, tag:NAME, or a time (UTC), as for `restore`
        #[arg(long, value_name = "N|TIME|tag:NAME")]
        at: At,
        /// Other users may look, too: what each sees follows from modes and ACLs
        #[arg(long)]
        allow_other: bool,
        /// Where to: a directory
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Write the files of a checkpoint that is kept to another place
    #[command(after_help = "\
Examples:
  bfs-replayer restore --store /backup/store --at 41 /tmp/then
  bfs-replayer restore --store /backup/store --at 2026-11-21T14:05 --path /srv/data/db /tmp/then
Each file stands below DEST at its absolute path of the primary. A store that nobody owns is opened by this
command.")]
    Restore {
        #[command(flatten)]
        from: giveback::From,
        /// Which: its number, tag:NAME, or a time (UTC) like 2026-11-21T14:05:00, which takes the
        /// last one up to then
        #[arg(long, value_name = "N|TIME|tag:NAME")]
        at: At,
        /// Only this file or directory of the primary
        #[arg(long, value_name = "PATH")]
        path: Option<PathBuf>,
        /// Where to: an empty or missing directory
        #[arg(value_name = "DEST")]
        to: PathBuf,
    },
    /// Make several checkpoints that are kept one: the newer of the two, with all that changed since the older
    #[command(after_help = "\
Those from the older one up to the newer one go, and with them the room that only they needed; the newer one, and all
others, stay as they are. One with a tag stays, and so do the last ones of --keep-min: a merge of those is refused. It
may be broken off at any moment, and done again.
Example:
  bfs-replayer merge --store /backup/store 12 41")]
    Merge {
        #[command(flatten)]
        from: giveback::From,
        /// So many of the last ones stay; where a replayer owns the store, its own number counts
        #[arg(long, value_name = "N", default_value_t = retention::KEEP_MIN)]
        keep_min: u32,
        /// From this one
        #[arg(value_name = "N|TIME|tag:NAME")]
        a: At,
        /// To this one, which stays
        #[arg(value_name = "N|TIME|tag:NAME")]
        b: At,
    },
    /// Write a checkpoint as a stream, whole or as the difference to an older one, for `receive` into another store
    #[command(after_help = "\
Only what is used is sent, and of a difference only what changed: of a region that changed several times the newest.
Examples:
  bfs-replayer send --store /backup/store --to 41 > 41.bfs
  bfs-replayer send --store /backup/store --from 41 --to 57 | ssh other bfs-replayer receive --store /second/store")]
    Send {
        #[command(flatten)]
        from: giveback::From,
        /// The difference to this one; without it everything
        #[arg(long = "from", value_name = "N|TIME|tag:NAME")]
        older: Option<At>,
        /// Which: its number, tag:NAME, or a time (UTC), as for `restore`
        #[arg(long, value_name = "N|TIME|tag:NAME")]
        to: At,
    },
    /// Take a stream of `send` into a store; it is made if it is missing
    #[command(after_help = "\
A difference must be one to the newest checkpoint that the group has in this store. Nothing is changed before all of the
stream is there and fits: one that is cut off leaves nothing behind. Prints the group and the number of the checkpoint.
Examples:
  bfs-replayer receive --store /second/store 41.bfs
  ssh first bfs-replayer send --store /backup/store --from 41 --to 57 | bfs-replayer receive --store /second/store")]
    Receive {
        #[command(flatten)]
        owner: Owner,
        /// Name of the group here; without it the one that the stream has
        #[arg(long, value_name = "NAME")]
        group: Option<String>,
        /// The stream; without it standard input
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Take each checkpoint of another store, as it comes, until SIGTERM or SIGINT
    #[command(after_help = "\
The other replayer needs to know this host (`bfs-replayer pair` there, `bfs-agent pair` here, with the right to read the
group), and nothing else: this store has its own rules, keys and state. After a kill of either side, or a network that was
away, the same command goes on from the newest checkpoint that is here.
Example:
  bfs-replayer follow --store /third/store --from tcp://second:7400 --group db --every 30s")]
    Follow(follow::Follow),
    /// Write the files of a checkpoint as a tar archive to standard output
    #[command(after_help = "\
It has all that `restore` writes (hard links, holes, extended attributes, times to the nanosecond), in the format of
POSIX (pax) as GNU tar reads it; an archive has no sockets. Each file has its path on the primary, without the first
slash.
Example:
  bfs-replayer export --store /backup/store --at 41 | zstd > 41.tar.zst
  zstd -d < 41.tar.zst | tar -x --xattrs --xattrs-include='*' --numeric-owner -C /tmp/then")]
    Export {
        #[command(flatten)]
        from: giveback::From,
        /// Which: its number, tag:NAME, or a time (UTC), as for `restore`
        #[arg(long, value_name = "N|TIME|tag:NAME")]
        at: At,
        /// Only this file or directory of the primary
        #[arg(long, value_name = "PATH")]
        path: Option<PathBuf>,
    },
    /// Make this host the primary of a group: its last confirmed checkpoint becomes files that a program may write
    #[command(after_help = "\
The primary before is fenced, durably, before anything else: it cannot write to this store any more. While its agent
answers, that takes --force. The program gets files of its own, which share their blocks with the backup where the file
system can do that (reflink: btrfs, xfs), and are copied else. Broken off at any moment the same command goes on with it.
All checkpoints that are kept stay, and the next agent goes on from there, with this store too.
Examples:
  bfs-replayer promote --store /backup/store --to /
  bfs-replayer promote --store /backup/store --test /tmp/try-it")]
    Promote(promote::Promote),
    /// Look for damage in a store that nobody owns, without the primary
    #[command(after_help = "\
Examples:
  bfs-replayer check --store /backup/store
  bfs-replayer check --store /backup/store --read-data
  bfs-replayer check --store /backup/store --rebuild-index
Each line names what does not fit, and the checkpoints that need it. Nothing is changed but by --rebuild-index, which
first makes the index again from its copy (STORE/index-copy/), exactly as it was after its last change, or says why not and
leaves it as it is. The one that stood there becomes index.redb.replaced.")]
    Check {
        /// Folder of the store
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
        /// Read every byte of the tree and of the before-images, and compare it with its checksum
        #[arg(long)]
        read_data: bool,
        /// Make the index again that is lost, spoiled or an older copy
        #[arg(long)]
        rebuild_index: bool,
        /// As given to `serve`
        #[arg(long, value_name = "DIR")]
        allow_root: Vec<PathBuf>,
    },
    /// Let one more host in: prints a token for `bfs-agent pair` there, good once and for a short time
    #[command(after_help = "\
Example:
  bfs-replayer pair --store /backup/store
The host may write new groups, which are its own from then on, and read them. With --group it may do so with the groups
that are named, whoever wrote them.")]
    Pair(keys::Pair),
    /// Show the replayer's key (one is made if there is none), or list and change the keys that it knows
    #[command(after_help = "\
Examples:
  bfs-replayer key --store /backup/store
  bfs-replayer key --store /backup/store list
  bfs-replayer key --store /backup/store revoke FINGERPRINT
A replayer that runs takes changes up at once: `revoke` returns when the connections of that key have ended.")]
    Key {
        #[command(flatten)]
        place: keys::Place,
        #[command(subcommand)]
        what: Option<keys::KeyCommand>,
    },
    /// Show how the groups of a store stand
    Status {
        #[command(flatten)]
        owner: Owner,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Whom to ask about a store.
#[derive(Debug, Args)]
struct Owner {
    /// Folder of the store: its owner is asked over STORE/replayer.sock
    #[arg(long, value_name = "DIR", required_unless_present = "connect", conflicts_with = "connect")]
    store: Option<PathBuf>,
    /// Address of a replayer
    #[arg(long, value_name = "ADDR")]
    connect: Option<Destination>,
    /// Folder of keys of this host, for tcp://
    #[arg(long, value_name = "DIR", default_value = key_files::DEFAULT)]
    keys: PathBuf,
}

impl Owner {
    fn address(&self) -> anyhow::Result<(Destination, Folder)> {
        let address = match (&self.store, &self.connect) {
            (Some(path), _) => {
                store::check_format(path)?;
                Destination::Unix(net::store_socket(path))
            }
            (None, Some(address)) => address.clone(),
            (None, None) => anyhow::bail!("give --store DIR or --connect ADDR"),
        };
        Ok((address, Folder::new(&self.keys)))
    }
}

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("BFS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = match cli.command {
        Command::Serve {
            store,
            listen,
            keys,
            allow_root,
            keep,
            keep_space,
            keep_min,
            images,
            pending_max,
            watching,
        } => {
            let kept = keep::retentions(keep, keep_space, keep_min);
            let (retention, retention_of) = match kept {
                Ok(kept) => kept,
                Err(why) => Cli::command().error(clap::error::ErrorKind::ArgumentConflict, why).exit(),
            };
            let options = ServeOptions {
                store,
                listen,
                keys: keys.map(Folder::new),
                allow_roots: allow_root,
                pending_max,
                retention,
                retention_of,
                images,
            };
            serve::serve(options, &watching)
        }
        Command::Generations { from, json } => giveback::generations(&from, json),
        Command::Versions { from, json, path } => changes::versions(&from, &path, json),
        Command::Diff { from, json, a, b } => changes::diff(&from, [&a, &b], json),
        Command::Mount { from, at, allow_other, dir } => giveback::mount(&from, &at, allow_other, &dir),
        Command::Restore { from, at, path, to } => giveback::restore(&from, &at, path.as_deref(), &to),
        Command::Merge { from, keep_min, a, b } => giveback::merge(&from, [&a, &b], keep_min),
        Command::Send { from, older, to } => transfer::send(&from, older.as_ref(), &to),
        Command::Receive { owner, group, file } => transfer::receive(&owner, group, file.as_deref()),
        Command::Follow(what) => follow::follow(&what),
        Command::Export { from, at, path } => transfer::export(&from, &at, path.as_deref()),
        Command::Promote(promote) => promote::promote(&promote),
        Command::Check { store, read_data, rebuild_index, allow_root } => {
            let rebuilt = if rebuild_index { rebuild(&store) } else { Ok(()) };
            match rebuilt.and_then(|()| check(&store, read_data, &allow_root)) {
                Ok(true) => Ok(()),
                Ok(false) => return ExitCode::from(Exit::Damaged as u8),
                Err(error) => Err(error),
            }
        }
        Command::Pair(pair) => keys::pair(&pair),
        Command::Key { place, what } => keys::key(&place, what),
        Command::Status { owner, json } => status(&owner, json),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bfs-replayer: {error:#}");
            ExitCode::from(exit_of(&error) as u8)
        }
    }
}

fn exit_of(error: &anyhow::Error) -> Exit {
    if let Some(error) = error.downcast_ref::<BackupError>() {
        return match error {
            BackupError::InUse { .. } => Exit::InUse,
            BackupError::Corrupt { .. }
            | BackupError::NoIndex { .. }
            | BackupError::IndexUnusable { .. }
            | BackupError::NoRebuild { .. }
            | BackupError::Foreign(_) => Exit::Corrupt,
            BackupError::NewerFormat { .. } => Exit::NewerFormat,
            BackupError::NotAStore(_) | BackupError::NoStore(_) => Exit::NotAStore,
            BackupError::Address(_) | BackupError::Listen { .. } => Exit::Address,
            BackupError::Keys(_) => Exit::Keys,
            _ => Exit::Other,
        };
    }
    if error.downcast_ref::<ScrapeError>().is_some() {
        return Exit::Address;
    }
    if let Some(error) = error.downcast_ref::<ConnectError>() {
        return match error {
            ConnectError::Address(_) | ConnectError::NotANetwork(_) => Exit::Address,
            ConnectError::Unreachable { .. } | ConnectError::Timeout { .. } | ConnectError::Broken { .. } => {
                Exit::Unreachable
            }
            ConnectError::Keys(_) | ConnectError::NotPaired(_) => Exit::Keys,
            ConnectError::Wire { .. } => Exit::Protocol,
            ConnectError::Impostor(_)
            | ConnectError::WrongKey { .. }
            | ConnectError::NotKnown { .. }
            | ConnectError::Revoked { .. }
            | ConnectError::NotPairing { .. }
            | ConnectError::Refused { .. } => Exit::Refused,
        };
    }
    if let Some(ReadError::Ask(AskError::Refused(
        Refusal::NotAllowed { .. } | Refusal::KeyChanged | Refusal::Attached { .. },
    ))) = error.downcast_ref::<ReadError>()
    {
        return Exit::Refused;
    }
    if error.is::<KeyError>() {
        return Exit::Keys;
    }
    if error.is::<AddressError>() {
        return Exit::Address;
    }
    Exit::Other
}

/// Does something, once, on a thread of its own, when one of these signals comes. From here on none of them ends the
/// process.
fn at_signal(kinds: &[SignalKind], does: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut signals = {
        let _inside = runtime.enter();
        kinds.iter().map(|kind| signal(*kind)).collect::<Result<Vec<_>, _>>()?
    };
    std::thread::Builder::new().name("bfs-signals".into()).spawn(move || {
        runtime.block_on(std::future::poll_fn(|context| {
            let came = signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
            if came { Poll::Ready(()) } else { Poll::Pending }
        }));
        does();
    })?;
    Ok(())
}

/// Makes the index again.
fn rebuild(store: &Path) -> anyhow::Result<()> {
    let rebuilt = crate::backup::check::rebuild(store)?;
    sayln!(
        "the index was made again up to its last change, {}, from the copy of change {} and what came since",
        rebuilt.last,
        rebuilt.whole
    )?;
    if let Some(aside) = rebuilt.aside {
        sayln!("the one that stood there is {} now", aside.display())?;
    }
    Ok(())
}

/// False when something is damaged.
fn check(store: &Path, read_data: bool, allowed: &[PathBuf]) -> anyhow::Result<bool> {
    let report = crate::backup::check::check(store, read_data, allowed)?;
    for problem in &report.problems {
        sayln!("{problem}")?;
    }
    for group in &report.between {
        sayln!(
            "group {group}: a checkpoint is half applied, so its tree was not looked at: start the replayer"
        )?;
    }
    if report.recorded > 0 {
        sayln!("{} files had no checksums (an earlier release wrote them); they have now", report.recorded)?;
    }
    sayln!(
        "{} records, {} lines of before-images, {} objects, {} bytes read: {}",
        report.records,
        report.lines,
        report.objects,
        report.bytes,
        match report.problems.len() {
            0 => "nothing is damaged".to_owned(),
            n => format!("{n} damaged"),
        }
    )?;
    Ok(report.problems.is_empty())
}

fn status(owner: &Owner, json: bool) -> anyhow::Result<()> {
    let (address, keys) = owner.address()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let groups = runtime.block_on(ask(&address, &keys))?;
    if json {
        sayln!("{}", serde_json::to_string_pretty(&groups)?)?;
    } else {
        say(format_args!("{}", table(&groups)))?;
    }
    Ok(())
}

async fn ask(address: &Destination, keys: &Folder) -> anyhow::Result<Vec<GroupStatus>> {
    let mut connection = net::connect(address, keys).await?;
    connection.writer.send(&Frame::GetStatus, b"").await?;
    let answer = tokio::time::timeout(STATUS_TIMEOUT, connection.reader.next()).await;
    let answer = answer
        .map_err(|_| anyhow::anyhow!("{address} did not answer within {} s", STATUS_TIMEOUT.as_secs()))?;
    match answer? {
        Some((Frame::Status { groups }, _)) => Ok(groups),
        Some((Frame::Refused(refusal), _)) => {
            Err(ConnectError::Refused { destination: address.to_string(), refusal }.into())
        }
        _ => anyhow::bail!("{address} did not answer with its status"),
    }
}

fn table(groups: &[GroupStatus]) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    if groups.is_empty() {
        out.push_str("no groups yet: an agent makes one when it connects\n");
    }
    for g in groups {
        let applying = if g.applying { ", applying the next one now" } else { "" };
        // Writing to a string does not fail.
        let _ = writeln!(out, "group {} (epoch {})", g.group, g.epoch);
        let _ = writeln!(out, "  agent       {}", agent_text(&g.agent));
        let _ = writeln!(out, "  checkpoint  applied {}{applying}, confirmed {}", g.applied, g.confirmed);
        let _ = writeln!(out, "  stream      durable to record {}", g.durable);
        let _ = writeln!(
            out,
            "  pending     {} records, {} bytes after the last checkpoint",
            g.pending_records, g.pending_bytes
        );
        if g.open_gaps > 0 {
            let _ = writeln!(out, "  suspect     {} places are not exact yet", g.open_gaps);
        }
        if let Some(to) = g.rolling_back {
            let _ =
                writeln!(out, "  ROLLING BACK the primary to checkpoint {to}: its next agent finishes it");
        }
        if let Some(history) = &g.history {
            let (host, at) = (&history.by.host, history.at);
            let since = time_text(history.since_ns);
            let how = match history.stage {
                PromoteStage::Done => "",
                _ => "; NOT FINISHED: give the same `bfs-replayer promote` again",
            };
            let _ = writeln!(out, "  promoted    on {host}, from checkpoint {at}, at {since}{how}");
            if let Some(then) = history.refused_ns {
                let _ = writeln!(
                    out,
                    "  DIVERGED    a primary from before came at {}: it is fenced, and may have more than checkpoint {at}",
                    time_text(then)
                );
            }
        }
        if let Some(trouble) = &g.trouble {
            let what = match g.state {
                StoreState::Ready => "TROUBLE   ",
                StoreState::Stuck => "STUCK     ",
                StoreState::Full => "FULL      ",
                StoreState::Behind => "BEHIND    ",
                StoreState::LogFailed => "LOG FAILED",
                StoreState::Damaged => "DAMAGED   ",
            };
            let _ = writeln!(out, "  {what}  {trouble}");
        }
    }
    out
}
