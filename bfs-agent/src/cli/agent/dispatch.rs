//! From a command line to what does it.

use super::{Command, ConfigCommand, PathCommand, commands, destinations, groups, keys, logging, policies};
use crate::primary::failure::{Failure, Kind};
use crate::primary::process::Inherited;
use crate::primary::session::{self, GoingBack, ProcessOptions, SessionOptions, Whom};
use crate::primary::{contained, preflight, stop::guard};

fn resume(group: &str, process: Option<ProcessOptions>, inherited: Inherited) -> Result<u8, Failure> {
    logging();
    preflight::check_user()?;
    preflight::check_kernel()?;
    preflight::check_namespace()?;
    session::resume(group, process, inherited)
}

/// Does what a command line asks; the exit status.
///
/// # Errors
/// [`Failure`].
pub(super) fn dispatch(command: Command, inherited: Inherited) -> Result<u8, Failure> {
    // Only what captures keeps the signals; a command that asks is ended by them as usual.
    let asks = |inherited: Inherited| {
        inherited
            .give_back()
            .map_err(|e| Failure::new(Kind::Other, format!("cannot give the signals back: {e}"), ""))
    };
    match command {
        Command::Run {
            options,
            rollback_on_failure,
            kill_descendants,
            include_foreign,
            process,
            command,
        } => {
            let going_back = GoingBack { discard: false, include_foreign, end_processes: kill_descendants };
            let process = process.options();
            let options = SessionOptions { rollback_on_failure, going_back, process, ..options.check()? };
            options.check_process()?;
            if rollback_on_failure {
                options.no_filter("--rollback-on-failure")?;
                options.no_hooks("--rollback-on-failure")?;
            }
            session::run(options, command, inherited)
        }
        Command::Attach { options, cgroup, process, resume: true, .. }
            if session::is_left(&options.group.group) =>
        {
            resume(&options.group.group, process.options(cgroup.is_some())?, inherited)
        }
        Command::Attach { options, pid, cgroup, everyone, process, resume: _ } => {
            let process = process.options(cgroup.is_some())?;
            let whom = match cgroup {
                Some(directory) => Whom::Cgroup(directory),
                None if everyone => Whom::Everyone,
                None if pid.is_empty() => {
                    return Err(Failure::new(
                        Kind::Usage,
                        "attach needs somebody to follow",
                        "add --pid PID, --cgroup DIR or --everyone",
                    ));
                }
                None => Whom::Processes(pid),
            };
            let options = SessionOptions { process, ..options.check()? };
            options.check_process()?;
            session::attach(options, &whom, &inherited)
        }
        Command::Resume { group } => resume(&group.group, None, inherited),
        Command::Checkpoint { target, tag, wait, timeout, stopped: false, .. } => {
            asks(inherited)?;
            commands::checkpoint(&target, tag, wait.into(), timeout)
        }
        Command::Checkpoint { target, tag, wait, timeout, stopped: true, limit, command } => {
            // The signals stay blocked: Ctrl-C ends CMD, and the processes go on right then.
            commands::checkpoint_stopped(&target, tag, wait.into(), timeout, limit, &command, &inherited)
        }
        Command::Status { target, json, check } => {
            asks(inherited)?;
            match check {
                Some(checks) => commands::check(&target, &checks),
                None => commands::status(&target, json),
            }
        }
        Command::Flush { target, timeout, spool } => {
            asks(inherited)?;
            commands::flush(&target, timeout, &spool.options())
        }
        Command::Recover { target, path, at, timeout } => {
            asks(inherited)?;
            commands::recover(&target, &path, at.as_deref(), timeout)
        }
        Command::Verify { target, timeout, repair } => {
            asks(inherited)?;
            commands::verify(&target, timeout, repair)
        }
        Command::Rollback { options, to, dry_run, stop, discard, include_foreign } => {
            let asked = to.as_ref().map(|to| to.0.as_str());
            if !dry_run && let Some(done) = options.go_back(asked)? {
                return Ok(done);
            }
            let to = to.map(|to| to.1);
            let going_back = GoingBack { discard, include_foreign, end_processes: stop };
            let options = SessionOptions { going_back, ..options.check()? };
            options.no_filter("rollback")?;
            session::rollback(options, to, dry_run, &inherited)
        }
        Command::Switchover { target, to, wait, kill, timeout } => {
            asks(inherited)?;
            commands::switchover(&target, &to, (!wait, kill), timeout)
        }
        Command::Surplus { options } => session::surplus(options.check()?, &inherited),
        Command::Stop { target, timeout } => {
            asks(inherited)?;
            commands::stop(&target, timeout)
        }
        Command::Path { what } => {
            asks(inherited)?;
            match what {
                PathCommand::Add(change) => commands::change_path(&change, true),
                PathCommand::Remove(change) => commands::change_path(&change, false),
                PathCommand::List { target } => commands::paths(&target),
            }
        }
        Command::Dest { what } => {
            asks(inherited)?;
            destinations::dest(&what)
        }
        Command::Policy { what } => {
            asks(inherited)?;
            policies::policy(&what)
        }
        Command::Config { what: ConfigCommand::Check { file } } => {
            asks(inherited)?;
            groups::check(&file)
        }
        Command::Config { what: ConfigCommand::Status { file } } => {
            asks(inherited)?;
            groups::status(&file)
        }
        Command::Pair { keys, replayer, token } => {
            asks(inherited)?;
            keys::pair(&keys.folder(), &replayer, &token)
        }
        Command::Key { keys, what } => {
            asks(inherited)?;
            keys::key(&keys.folder(), what)
        }
        Command::Contain { beside } => {
            // The command has the mask that the agent was started with.
            asks(inherited)?;
            contained::init::serve(beside).map_err(|e| {
                Failure::new(Kind::Other, format!("the namespaces of the command cannot be made: {e}"), "")
            })
        }
        Command::Guard => guard::serve()
            .map(|()| 0)
            .map_err(|e| Failure::new(Kind::Other, format!("the guard cannot read its pipe: {e}"), "")),
    }
}
