//! Commands that ask a running agent.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::check::Checks;
use super::{PathChange, Target, show};
use crate::cli::sayln;
use crate::net::Destination;
use crate::primary::control::{
    Client, NEWEST, Reply, Request, VerifyReport, WaitFor, default_socket, milliseconds,
};
use crate::primary::failure::{Failure, Kind, NOT_RECOVERED_HINT};
use crate::primary::process::{self, Inherited};
use crate::primary::session;
use crate::primary::spool::SpoolOptions;

/// Beyond the exit statuses of failures: what verify found.
const DIFFERENT: u8 = 1;
const NOT_COMPARED: u8 = 2;
/// What `status --check` found.
const DOES_NOT_HOLD: u8 = 1;

pub(super) fn connect(target: &Target) -> Result<Client, Failure> {
    let path: PathBuf = target.socket.clone().unwrap_or_else(|| default_socket(&target.group.group));
    Ok(Client::connect(&path)?)
}

pub(super) fn ask(target: &Target, request: &Request) -> Result<Reply, Failure> {
    Ok(connect(target)?.ask(request)?)
}

pub(super) fn unexpected(reply: &Reply) -> Failure {
    Failure::new(
        Kind::Other,
        format!("the agent answered something else than was asked: {reply:?}"),
        "use bfs-agent of the same release as the agent that runs",
    )
}

/// Output that is asked for.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    sayln!("{text}").map_err(|e| Failure::new(Kind::Other, e.to_string(), "see where the output goes"))
}

pub(super) fn checkpoint(
    target: &Target,
    tag: String,
    wait: WaitFor,
    timeout: Duration,
) -> Result<u8, Failure> {
    print(&connect(target)?.checkpoint(&tag, wait, timeout)?.to_string())?;
    Ok(0)
}

/// Runs CMD between two messages. Its status is ours when it is not 0.
pub(super) fn checkpoint_stopped(
    target: &Target,
    tag: String,
    wait: WaitFor,
    timeout: Duration,
    limit: Duration,
    command: &[OsString],
    inherited: &Inherited,
) -> Result<u8, Failure> {
    let mut client = connect(target)?;
    let request = Request::CheckpointStopped {
        tag,
        wait,
        timeout_ms: milliseconds(timeout),
        limit_ms: milliseconds(limit),
    };
    let Reply::Standing { checkpoint, .. } = client.ask(&request)? else {
        return Err(Failure::new(Kind::Other, "the agent did not stop the program", ""));
    };
    // From here on every way out lets the processes go: the end of the connection does, too.
    let ran = run_command(command, &checkpoint.to_string(), inherited);
    let reply = client.go();
    let status = ran?;
    match reply? {
        Reply::Checkpoint { checkpoint, .. } => {
            print(&checkpoint.to_string())?;
            Ok(status)
        }
        other => Err(unexpected(&other)),
    }
}

fn run_command(command: &[OsString], checkpoint: &str, inherited: &Inherited) -> Result<u8, Failure> {
    let variable = [(OsString::from("BFS_CHECKPOINT"), OsString::from(checkpoint))];
    let mut running = process::hold_with(command, &variable, inherited)?.release()?;
    let sender = running.sender()?;
    let _signals = process::Signals::start(inherited, move |received| sender.forward(received))?;
    let status = loop {
        if let Some(status) = running.wait(Duration::from_secs(3600))? {
            break status;
        }
    };
    Ok(process::exit_status(status))
}

pub(super) fn status(target: &Target, json: bool) -> Result<u8, Failure> {
    let status = connect(target)?.status()?;
    if json {
        let text = serde_json::to_string_pretty(&status)
            .map_err(|e| Failure::new(Kind::Other, format!("cannot print the status: {e}"), ""))?;
        print(&text)?;
    } else {
        print(&show::status(&status))?;
    }
    Ok(0)
}

/// For monitors: whether all of it holds.
pub(super) fn check(target: &Target, checks: &Checks) -> Result<u8, Failure> {
    let status = connect(target)?.status()?;
    let broken = checks.broken(&status);
    if broken.is_empty() {
        print(&format!("ok: group {}, {:.1} s behind", status.group, status.lag_ms as f64 / 1e3))?;
        return Ok(0);
    }
    broken.iter().try_for_each(|line| print(line))?;
    Ok(DOES_NOT_HOLD)
}

pub(super) fn flush(target: &Target, timeout: Duration, spool: &SpoolOptions) -> Result<u8, Failure> {
    let (durable, confirmed) = match ask(target, &Request::Flush { timeout_ms: milliseconds(timeout) }) {
        Ok(Reply::Flushed { durable, confirmed }) => (durable, confirmed),
        Ok(other) => return Err(unexpected(&other)),
        Err(failure) if failure.kind == Kind::NoAgent => match session::flush(spool, &target.group.group)? {
            Some(progress) => (progress.durable.sequence, progress.confirmed),
            None => return Err(failure),
        },
        Err(failure) => return Err(failure),
    };
    print(&format!("durable on the backup up to record {durable}; checkpoint {confirmed} confirmed"))?;
    Ok(0)
}

pub(super) fn recover(
    target: &Target,
    path: &Path,
    at: Option<&str>,
    timeout: Duration,
) -> Result<u8, Failure> {
    if at == Some(NEWEST) {
        let (bytes, written) = connect(target)?.recover_newest(&absolute(path)?, timeout)?;
        print(&format!("{} is as it was captured last: {bytes} bytes, {written} written", path.display()))?;
        return Ok(0);
    }
    let (checkpoint, bytes) = connect(target)?.recover(&absolute(path)?, at, timeout)?;
    print(&format!("{} is as in checkpoint {checkpoint}: {bytes} bytes", path.display()))?;
    Ok(0)
}

/// Goes back with the processes, where an agent of the group runs that keeps their state; `None` where not.
pub(super) fn go_back(
    group: &str,
    socket: Option<&Path>,
    at: Option<&str>,
    timeout: Duration,
) -> Result<Option<u8>, Failure> {
    let path = socket.map_or_else(|| default_socket(group), Path::to_owned);
    let Ok(mut client) = Client::connect(&path) else { return Ok(None) };
    if client.status()?.process.is_none() {
        return Ok(None);
    }
    let (checkpoint, outside) = client.go_back(at, timeout)?;
    for open in outside {
        print(&format!("open elsewhere: {open}"))?;
    }
    print(&format!("files and processes are as at checkpoint {checkpoint}; the processes run"))?;
    Ok(Some(0))
}

/// The agent has another working directory.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|e| Failure::new(Kind::Path, format!("{}: {e}", path.display()), "give an absolute path"))
}

pub(super) fn verify(target: &Target, timeout: Duration, repair: bool) -> Result<u8, Failure> {
    match ask(target, &Request::Verify { timeout_ms: milliseconds(timeout), repair })? {
        Reply::Verified(report) => {
            print(&show::verify(&report))?;
            Ok(verify_status(&report))
        }
        other => Err(unexpected(&other)),
    }
}

fn verify_status(report: &VerifyReport) -> u8 {
    if report.different_count > 0 {
        DIFFERENT
    } else if report.not_compared_count > 0 {
        NOT_COMPARED
    } else {
        0
    }
}

/// Adds a directory, or takes one out.
pub(super) fn change_path(change: &PathChange, add: bool) -> Result<u8, Failure> {
    let path = absolute(&change.path)?;
    let timeout_ms = milliseconds(change.timeout);
    let request =
        if add { Request::PathAdd { path, timeout_ms } } else { Request::PathRemove { path, timeout_ms } };
    match ask(&change.target, &request)? {
        Reply::Checkpoint { checkpoint, .. } => {
            print(&checkpoint.to_string())?;
            Ok(0)
        }
        other => Err(unexpected(&other)),
    }
}

pub(super) fn paths(target: &Target) -> Result<u8, Failure> {
    connect(target)?.status()?.roots.iter().try_for_each(|root| print(root))?;
    Ok(0)
}

/// Between two looks whether an agent has ended.
const END_LOOK: Duration = Duration::from_millis(50);
/// How long that may take when it has said so.
const END_WAIT: Duration = Duration::from_secs(30);

/// Ends program and agent with everything on the backup.
pub(super) fn switchover(
    target: &Target,
    to: &Destination,
    (signal, kill): (bool, bool),
    timeout: Duration,
) -> Result<u8, Failure> {
    let status = connect(target)?.status()?;
    let first = status.destinations.first().map_or("", |first| first.address.as_str());
    if first != to.to_string() {
        let known = status.destinations.iter().any(|known| known.address == to.to_string());
        let what = if known { "as its first destination" } else { "as a destination" };
        let message = format!("group {:?} has not {to} {what}", status.group);
        return Err(Failure::new(
            Kind::Usage,
            message,
            format!("give --to {first}, which the stream goes to"),
        ));
    }
    let request = Request::Switchover { timeout_ms: milliseconds(timeout), signal, kill };
    let checkpoint = match ask(target, &request)? {
        Reply::Ended { checkpoint, reached: Some(WaitFor::Confirmed | WaitFor::Applied), .. } => checkpoint,
        Reply::Ended { checkpoint, .. } => {
            return Err(Failure::new(
                Kind::NotConfirmed,
                format!(
                    "the program has ended, but the last checkpoint ({checkpoint}) is not confirmed by {to}"
                ),
                "do not promote it yet: start the program here again, or `bfs-agent flush` when the backup is there",
            ));
        }
        other => return Err(unexpected(&other)),
    };
    // Its connection ends with it: until then the replayer would say that the primary answers.
    let deadline = Instant::now() + END_WAIT;
    while connect(target).is_ok() && Instant::now() < deadline {
        std::thread::sleep(END_LOOK);
    }
    print(&format!(
        "the program has ended; checkpoint {checkpoint} is confirmed by {to}, and nothing is behind it\n\
         on that host: bfs-replayer promote --store STORE --group {} --to /",
        status.group
    ))?;
    Ok(0)
}

pub(super) fn stop(target: &Target, timeout: Duration) -> Result<u8, Failure> {
    match ask(target, &Request::Stop { timeout_ms: milliseconds(timeout) })? {
        Reply::Ended {
            checkpoint,
            reached: Some(WaitFor::Confirmed | WaitFor::Applied),
            not_recovered,
            ..
        } => {
            print(&format!("stopped; checkpoint {checkpoint} is confirmed"))?;
            if not_recovered.is_empty() {
                return Ok(0);
            }
            Err(Failure::new(Kind::NotRecovered, not_recovered.join("\n  "), NOT_RECOVERED_HINT))
        }
        Reply::Ended { checkpoint, send_by: Some(command), .. } => Err(Failure::new(
            Kind::NotConfirmed,
            format!(
                "stopped; the last checkpoint ({checkpoint}) is only sealed: in the spool, not on the backup"
            ),
            format!("when the replayer is there again: {command}"),
        )),
        Reply::Ended { checkpoint, .. } => Err(Failure::new(
            Kind::NotConfirmed,
            format!("stopped, but the last checkpoint ({checkpoint}) is not confirmed by the backup"),
            "start the replayer, and the agent with the same --group and --backup: what is missing is copied then",
        )),
        other => Err(unexpected(&other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_weighs_more_than_what_could_not_be_compared() {
        let mut report = VerifyReport::default();
        assert_eq!(verify_status(&report), 0);
        report.skipped("x".into());
        assert_eq!(verify_status(&report), 2);
        report.differs("y".into());
        assert_eq!(verify_status(&report), 1);
    }
}
