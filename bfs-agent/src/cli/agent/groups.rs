//! What a configuration file says is done: one group by this process, several by one process each.
//!
//! A group that fails does not touch the others, and one whose agent died gets another one ([`super::supervise`] says when). A
//! signal that asks this process to end is passed on to all, and it ends when all have; with the status of the first that was
//! not 0.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use clap::Parser;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast;
use tokio::task::JoinSet;

use super::commands::print;
use super::config::{self, ConfigGroup};
use super::supervise::{Next, Watch};
use super::{Cli, Command, dispatch, show};
use crate::primary::control::{Client, default_socket};
use crate::primary::failure::{Failure, Kind};
use crate::primary::process::{Inherited, exit_status};
use crate::service::Service;

/// Between two signs of life where nobody waits for one.
const IDLE: Duration = Duration::from_secs(3600);

fn read(file: &Path) -> Result<Vec<ConfigGroup>, Failure> {
    let hint = "docs/agent.toml has every key with an explanation";
    config::read(file).map_err(|e| Failure::new(Kind::Usage, format!("{}: {e}", file.display()), hint))
}

/// What a group says, as the command line would have it.
fn command(file: &Path, group: &ConfigGroup) -> Result<Command, Failure> {
    let words = std::iter::once(OsString::from("bfs-agent")).chain(group.arguments.iter().cloned());
    let parsed = Cli::try_parse_from(words).map_err(|error| {
        let text = error.to_string();
        let why = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        Failure::new(
            Kind::Usage,
            format!("{}: group {:?}: {why}", file.display(), group.name),
            "docs/agent.toml has every key with an explanation",
        )
    })?;
    parsed.command.ok_or_else(|| Failure::new(Kind::Usage, "there is nothing to do", ""))
}

/// Looks at a file, and says what it would do.
pub(super) fn check(file: &Path) -> Result<u8, Failure> {
    let groups = read(file)?;
    for group in &groups {
        match command(file, group)? {
            Command::Run { options, .. } | Command::Attach { options, .. } => {
                options.filter()?;
                options.policies()?;
            }
            _ => unreachable!("a group is a run or an attach"),
        }
        let words: Vec<_> = group.arguments.iter().map(|word| word.to_string_lossy()).collect();
        print(&format!("bfs-agent {}", words.join(" ")))?;
    }
    Ok(0)
}

/// Does what a file says.
pub(super) fn start(file: &Path, only: Option<&str>, inherited: Inherited) -> Result<u8, Failure> {
    let mut groups = read(file)?;
    let names: Vec<String> = groups.iter().map(|group| group.name.clone()).collect();
    groups.retain(|group| only.is_none_or(|only| group.name == only));
    // All of them, before the first is started.
    let mut commands = Vec::new();
    for group in &groups {
        commands.push(command(file, group)?);
    }
    match (groups.len(), commands.pop()) {
        (1, Some(command)) => dispatch(command, inherited),
        (0, _) | (_, None) => {
            let hint = format!("it has {}", names.join(", "));
            let what = format!("{}: it has no group {:?}", file.display(), only.unwrap_or_default());
            Err(Failure::new(Kind::Usage, what, hint))
        }
        _ => {
            let failed =
                |e: std::io::Error| Failure::new(Kind::Other, format!("cannot start the groups: {e}"), "");
            inherited.give_back().map_err(failed)?;
            several(&groups).map_err(failed)
        }
    }
}

/// How the groups of a file stand.
pub(super) fn status(file: &Path) -> Result<u8, Failure> {
    let mut status = 0;
    for group in read(file)? {
        let (Command::Run { options, .. } | Command::Attach { options, .. }) = command(file, &group)? else {
            unreachable!("a group is a run or an attach")
        };
        let socket = options.socket.unwrap_or_else(|| default_socket(&group.name));
        let stands = Client::connect(&socket).and_then(|mut client| client.status());
        let text = match stands {
            Ok(stands) => show::in_short(&stands),
            Err(error) => {
                status = Kind::NoAgent.exit_status();
                format!("NO AGENT: {error}")
            }
        };
        print(&format!("{}: {text}", group.name))?;
    }
    Ok(status)
}

/// One process for each group, until all have ended; who dies is followed by another one.
fn several(groups: &[ConfigGroup]) -> std::io::Result<u8> {
    let program = std::env::current_exe()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let [mut terminate, mut interrupt, mut hangup] = [
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::hangup())?,
        ];
        let pass_on = broadcast::Sender::new(16);
        let mut ends = JoinSet::new();
        for group in groups {
            ends.spawn(supervise(program.clone(), group.clone(), pass_on.subscribe()));
        }
        let mut service = Service::of_environment();
        let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
        service.ready(&format!("an agent for each of {}", names.join(", ")));
        let mut alive = tokio::time::interval(service.every().unwrap_or(IDLE));
        let mut status = 0;
        loop {
            let asked = tokio::select! {
                end = ends.join_next() => {
                    let Some(end) = end else { return Ok(status) };
                    let end = end.map_err(std::io::Error::other)?;
                    status = if status == 0 { end } else { status };
                    continue;
                }
                _ = alive.tick() => {
                    service.alive();
                    continue;
                }
                _ = terminate.recv() => Signal::TERM,
                _ = interrupt.recv() => Signal::INT,
                _ = hangup.recv() => Signal::HUP,
            };
            service.stopping();
            // Nobody listens where all are about to end.
            let _ = pass_on.send(asked);
        }
    })
}

/// One group, until it has ended; gives its status.
async fn supervise(program: PathBuf, group: ConfigGroup, mut signals: broadcast::Receiver<Signal>) -> u8 {
    let name = &group.name;
    let mut watch = Watch::new(group.resumes);
    let mut arguments = group.arguments.clone();
    loop {
        let began = Instant::now();
        let end = match run(&program, &arguments, &mut signals, &mut watch).await {
            Ok(end) => end,
            Err(error) => {
                eprintln!("bfs-agent: group {name} has no agent: {error}");
                return Kind::Other.exit_status();
            }
        };
        match watch.ended(end, began.elapsed()) {
            Next::Ends(0) => return 0,
            Next::Ends(status) => {
                eprintln!("bfs-agent: group {name} ended with {status}");
                return status;
            }
            Next::Again { resumes, after } => {
                let (how, seconds) = (ended_how(end), after.as_secs());
                eprintln!("bfs-agent: the agent of group {name} {how}; another one goes on in {seconds} s");
                tokio::select! {
                    () = tokio::time::sleep(after) => {}
                    _ = signals.recv() => {
                        eprintln!("bfs-agent: group {name} ended without an agent");
                        return exit_status(end);
                    }
                }
                if resumes {
                    arguments = ["resume", "--group", name].map(OsString::from).to_vec();
                }
            }
        }
    }
}

fn ended_how(end: ExitStatus) -> String {
    match end.signal() {
        Some(number) => format!("was ended by signal {number}"),
        None => format!("ended with {}", exit_status(end)),
    }
}

/// An agent, until it has ended; signals are passed on to it.
async fn run(
    program: &Path,
    arguments: &[OsString],
    signals: &mut broadcast::Receiver<Signal>,
    watch: &mut Watch,
) -> std::io::Result<ExitStatus> {
    let mut command = tokio::process::Command::new(program);
    command.args(arguments);
    // This process is what a service manager knows.
    for name in ["WATCHDOG_USEC", "WATCHDOG_PID"] {
        command.env_remove(name);
    }
    if arguments.first().is_some_and(|verb| verb != "run") {
        command.env_remove("NOTIFY_SOCKET");
    }
    let mut child = command.spawn()?;
    // By descriptor: a number may be another process's by the time of the signal.
    let pid = child.id().and_then(|id| Pid::from_raw(id as i32));
    let process = match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())).transpose() {
        Ok(process) => process,
        Err(error) => {
            child.kill().await?;
            return Err(error.into());
        }
    };
    loop {
        tokio::select! {
            end = child.wait() => return end,
            Ok(signal) = signals.recv() => {
                watch.asked();
                if let Some(process) = &process {
                    // It may have ended.
                    let _ = pidfd_send_signal(process, signal);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the manual shows is what can be started, and it shows every key.
    #[test]
    fn the_example_is_sound() {
        let text = include_str!("../../../../docs/agent.toml");
        let groups = config::parse(text).unwrap();
        assert_eq!(groups.len(), 3);
        for group in &groups {
            command(Path::new("docs/agent.toml"), group)
                .unwrap_or_else(|failure| panic!("{}", failure.message));
        }
        // Also what is shown as a comment.
        let shown: String = text
            .lines()
            .map(|line| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).unwrap_or(line))
            .map(|line| format!("{line}\n"))
            .collect();
        for key in config::names() {
            assert!(
                shown.lines().any(|line| line.split(" = ").next() == Some(key)),
                "{key} is not explained"
            );
        }
    }

    #[test]
    fn what_an_option_refuses_is_refused_with_its_group() {
        let group = |line: &str| {
            let text = format!("[group.web]\npaths = ['/a']\nbackup = 'dir:/x'\npid = 1\n{line}");
            match command(Path::new("f"), &config::parse(&text).unwrap()[0]) {
                Ok(_) => String::new(),
                Err(failure) => failure.message,
            }
        };
        assert_eq!(group(""), "");
        let said = group("checkpoint = 'now'");
        assert!(said.starts_with("f: group \"web\": invalid value 'now'"), "{said}");
        assert!(group("spool_size = 'much'").contains("much"));
    }
}
