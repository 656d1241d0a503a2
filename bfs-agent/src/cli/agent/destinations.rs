//! `dest`: the destinations of a running agent.

use clap::{Args, Subcommand};

use super::commands::{ask, connect, print, unexpected};
use super::{Target, show};
use crate::net::Destination;
use crate::primary::control::{DestinationStatus, Reply, Request};
use crate::primary::failure::Failure;

#[derive(Debug, Subcommand)]
pub(super) enum DestCommand {
    /// Send each checkpoint to a further destination, beginning with a copy of what another one has
    Add(Which),
    /// Send nothing more to a destination; what it has it keeps
    Remove(Which),
    /// Send nothing to a destination until it is resumed
    Pause(Which),
    /// Go on with a destination where it stands
    Resume(Which),
    /// Look anew what a destination has, and bring it to what the others have
    Resync(Which),
    /// Show the destinations, and how far each is
    List {
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Args)]
pub(super) struct Which {
    #[command(flatten)]
    target: Target,
    /// The destination: tcp://HOST:PORT, unix:PATH or dir:STORE
    #[arg(value_name = "DEST")]
    address: Destination,
}

/// Asks the agent for it, and shows the destinations as they are then.
pub(super) fn dest(what: &DestCommand) -> Result<u8, Failure> {
    let change = |which: &Which, request: fn(String) -> Request| match ask(
        &which.target,
        &request(which.address.to_string()),
    )? {
        Reply::Destinations { destinations } => Ok(destinations),
        other => Err(unexpected(&other)),
    };
    let all = match what {
        DestCommand::Add(which) => change(which, |address| Request::DestAdd { address })?,
        DestCommand::Remove(which) => change(which, |address| Request::DestRemove { address })?,
        DestCommand::Pause(which) => change(which, |address| Request::DestPause { address })?,
        DestCommand::Resume(which) => change(which, |address| Request::DestResume { address })?,
        DestCommand::Resync(which) => change(which, |address| Request::DestResync { address })?,
        DestCommand::List { target } => connect(target)?.status()?.destinations,
    };
    all.iter().try_for_each(|destination| print(&line(destination)))?;
    Ok(0)
}

fn line(destination: &DestinationStatus) -> String {
    let DestinationStatus { address, confirmed, applied, .. } = destination;
    let why = destination.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
    format!(
        "{address}  {}, confirmed {confirmed}, applied {applied}{why}",
        show::standing(destination.standing)
    )
}
