//! Policies on the command line: `--policy`, and the commands that change them in a running agent.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::Target;
use super::commands::{ask, print, unexpected};
use crate::policy::{BadPolicy, Policy, Table};
use crate::primary::control::{PolicySettings, Reply, Request, milliseconds};
use crate::primary::failure::{Failure, Kind};
use crate::primary::policies::store::DIRECTORY;
use crate::primary::schedule::parse_time;
use crate::primary::session::PolicyOptions;

/// What is done with single files.
#[derive(Debug, Args)]
pub(super) struct PolicyWords {
    /// How single files are backed up, beside the checkpoints that have every file: a path, an absolute pattern or one
    /// for names, a colon, and settings, like /srv/db/table:backup=write or '*.pdf:backup=close,retries=5' (may be
    /// repeated). A path goes before patterns, and of patterns the last one that matches counts
    #[arg(long = "policy", value_name = "PATTERN:SETTING=VALUE,...", value_parser = parse)]
    policy: Vec<Policy>,
    /// Where it is written, in a file of the group's name, what `bfs-agent policy` changes
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    policies: PathBuf,
}

impl PolicyWords {
    pub(super) fn options(&self) -> Result<PolicyOptions, Failure> {
        let failed = |bad: BadPolicy| Failure::new(Kind::Usage, format!("--policy: {bad}"), bad.hint);
        Table::new(self.policy.clone()).map_err(failed)?;
        let directory = std::path::absolute(&self.policies).unwrap_or_else(|_| self.policies.clone());
        Ok(PolicyOptions { entries: self.policy.clone(), directory })
    }
}

/// A policy as one word. Neither a colon nor a comma can be in a value.
fn parse(text: &str) -> Result<Policy, String> {
    let form = "write PATTERN:SETTING=VALUE,..., for example /srv/db/table:backup=write";
    let (pattern, settings) = text.rsplit_once(':').ok_or(form)?;
    let shown = |bad: BadPolicy| format!("{bad}; {}", bad.hint);
    let mut policy = Policy::new(pattern).map_err(shown)?;
    for setting in settings.split(',') {
        let (key, value) = setting.split_once('=').ok_or(form)?;
        match key {
            "time_limit" => {
                let time = parse_time(value).map_err(|e| format!("time_limit: {e}"))?;
                policy.set("time_limit_ms", &milliseconds(time).to_string())
            }
            _ => policy.set(key, value),
        }
        .map_err(shown)?;
    }
    Ok(policy)
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// Show the policies that hold, in their order
    List {
        #[command(flatten)]
        target: Target,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// A further policy; files that come under it have a first full copy
    Add(Settings),
    /// Other settings for a policy; what is not given stays as it is
    Set(Settings),
    /// Do nothing by a policy until it is resumed: its followers stay as they are
    Suspend(Which),
    /// Go on with a suspended policy: its followers have a new copy
    Resume(Which),
    /// One policy less: its followers go, the files stay in every checkpoint
    Delete(Which),
}

/// Which policy.
#[derive(Debug, Args)]
pub(super) struct Which {
    #[command(flatten)]
    target: Target,
    /// An absolute path, an absolute pattern ('/srv/**/*.db'), or a pattern for names ('*.db')
    #[arg(value_name = "PATTERN")]
    pattern: String,
    /// How long to wait until it is durable
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    timeout: Duration,
}

/// Its settings.
#[derive(Debug, Args)]
pub(super) struct Settings {
    #[command(flatten)]
    which: Which,
    /// checkpoint: with each checkpoint, like every file; write: a follower repeats each durable operation; close: a
    /// follower changes as a whole when the last writer has closed the file
    #[arg(long, value_name = "CLASS")]
    backup: Option<String>,
    /// manual: `bfs-agent recover` brings it back; request: also what was captured last, when a program asks for it;
    /// automatic: the same by itself, when a selected process sees an error of the disk
    #[arg(long, value_name = "CLASS")]
    recovery: Option<String>,
    /// How often a copy for a follower, or a recovery, is tried again that failed
    #[arg(long, value_name = "NUMBER")]
    retries: Option<u32>,
    /// How long one try of these may take
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    time_limit: Option<Duration>,
    /// Where the follower stands, below STORE/now/GROUP, instead of at the path of the file
    #[arg(long, value_name = "PATH")]
    place: Option<String>,
}

impl Settings {
    fn settings(&self) -> PolicySettings {
        PolicySettings {
            backup: self.backup.clone(),
            recovery: self.recovery.clone(),
            retries: self.retries,
            time_limit_ms: self.time_limit.map(milliseconds),
            place: self.place.clone(),
        }
    }
}

/// Asks the agent.
pub(super) fn policy(command: &PolicyCommand) -> Result<u8, Failure> {
    let (pattern, timeout_ms) = match command {
        PolicyCommand::List { target, json } => return list(target, *json),
        PolicyCommand::Add(settings) | PolicyCommand::Set(settings) => named(&settings.which),
        PolicyCommand::Suspend(which) | PolicyCommand::Resume(which) | PolicyCommand::Delete(which) => {
            named(which)
        }
    };
    let (target, request) = match command {
        PolicyCommand::List { .. } => unreachable!("it is answered above"),
        PolicyCommand::Add(of) => {
            (&of.which.target, Request::PolicyAdd { pattern, settings: of.settings(), timeout_ms })
        }
        PolicyCommand::Set(of) => {
            (&of.which.target, Request::PolicySet { pattern, settings: of.settings(), timeout_ms })
        }
        PolicyCommand::Suspend(which) => (&which.target, Request::PolicySuspend { pattern, timeout_ms }),
        PolicyCommand::Resume(which) => (&which.target, Request::PolicyResume { pattern, timeout_ms }),
        PolicyCommand::Delete(which) => (&which.target, Request::PolicyDelete { pattern, timeout_ms }),
    };
    match ask(target, &request)? {
        Reply::Policies { .. } => Ok(0),
        other => Err(unexpected(&other)),
    }
}

fn named(which: &Which) -> (String, u64) {
    (which.pattern.clone(), milliseconds(which.timeout))
}

fn list(target: &Target, json: bool) -> Result<u8, Failure> {
    let policies = match ask(target, &Request::PolicyList)? {
        Reply::Policies { policies } => policies,
        other => return Err(unexpected(&other)),
    };
    if json {
        let text = serde_json::to_string_pretty(&policies)
            .map_err(|e| Failure::new(Kind::Other, format!("cannot print the policies: {e}"), ""))?;
        print(&text)?;
        return Ok(0);
    }
    policies.iter().try_for_each(|policy| print(&shown(policy)))?;
    Ok(0)
}

fn shown(policy: &Policy) -> String {
    let place = policy.place.as_ref().map(|place| format!(" place={place}")).unwrap_or_default();
    format!(
        "{}  backup={} recovery={} retries={} time_limit={}ms{place}{}",
        policy.pattern,
        policy.backup.name(),
        policy.recovery.name(),
        policy.retries,
        policy.time_limit_ms,
        if policy.suspended { " suspended" } else { "" }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Backup;

    #[test]
    fn a_policy_is_one_word() {
        let policy = parse("/srv/a:b/table:backup=close,retries=5,time_limit=2s,place=copies/t").unwrap();
        assert_eq!((policy.pattern.as_str(), policy.backup), ("/srv/a:b/table", Backup::Close));
        assert_eq!((policy.retries, policy.time_limit_ms), (5, 2000));
        assert!(
            shown(&policy)
                .ends_with("backup=close recovery=manual retries=5 time_limit=2000ms place=copies/t")
        );
        for (text, says) in [
            ("/srv/table", "write PATTERN"),
            ("/srv/table:write", "write PATTERN"),
            ("/srv/table:bakup=write", "did you mean \"backup\""),
            ("/srv/../x:backup=write", "pattern"),
            ("x:time_limit=2", "time_limit"),
        ] {
            let why = parse(text).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
    }
}
