//! `bfs-agent surplus`: what a host has that is not the primary any more is kept, in a group of its own beside the one
//! that went on without it. Nothing is changed on this host.

use bfs_common::wire::Refusal;

use super::begin::Ground;
use super::state::{self, Selection, State};
use super::{SessionOptions, cannot, left};
use crate::net::ConnectError;
use crate::primary::control::WaitFor;
use crate::primary::failure::{Failure, Kind};
use crate::primary::process::{Inherited, Signals};
use crate::primary::ship::{ShipError, Shipper};
use crate::primary::spool::SpoolOptions;

/// Longest name of a group.
const NAME_MAX: usize = 100;

/// The group that keeps the surplus of a host.
fn group_of(group: &str, host: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let host: String = host.chars().map(plain).take(NAME_MAX / 2).collect();
    let ending = format!(".surplus-{host}");
    let group: String = group.chars().take(NAME_MAX - ending.len()).collect();
    group + &ending
}

/// Whether the store says that this host is not the primary any more, and what it says.
///
/// # Errors
/// What else it refuses.
fn fenced(options: &SessionOptions) -> Result<Option<Refusal>, Failure> {
    let boot_id = state::boot_id().map_err(|e| cannot("read the boot id", &e))?;
    let (connect, _local) = left::connector(&options.backup, &options.keys)?;
    let ship = left::ship_options(connect, &left::address(options, boot_id), false);
    match Shipper::start(ship, None, None) {
        Ok(_) => Ok(None),
        Err(
            ShipError::Refused(refusal @ Refusal::Promoted { .. })
            | ShipError::Connect(ConnectError::Refused { refusal: refusal @ Refusal::Promoted { .. }, .. }),
        ) => Ok(Some(refusal)),
        Err(error) => Err(error.into()),
    }
}

/// Keeps the surplus of this host: a session that follows nobody, for one checkpoint.
///
/// # Errors
/// [`Failure`].
pub fn surplus(mut options: SessionOptions, inherited: &Inherited) -> Result<u8, Failure> {
    let _signals = Signals::start(inherited, |_| {}).map_err(|e| cannot("read signals", &e))?;
    let Some(Refusal::Promoted { at, host: primary, .. }) = fenced(&options)? else {
        return Err(Failure::new(
            Kind::Usage,
            format!("this host is the primary of group {:?}: what it has is no surplus", options.group),
            "go on with `bfs-agent run` or `bfs-agent attach`",
        ));
    };
    let (group, spool) = (options.group.clone(), options.spool.clone());
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    options.group = group_of(&group, &host);
    options.spool = SpoolOptions { bytes_max: 0, ..options.spool };
    let kept_in = options.group.clone();
    let ground = Ground::open(options, false)?;
    let probes = ground.load_probes(None)?;
    let state = State::new(&ground.options, "surplus", Selection::Processes(Vec::new()));
    let mut work = ground.build(probes, None, &state, false)?;
    let taken = work.checkpoint_reaching(&format!("surplus of {host}"), "surplus", WaitFor::Applied, None);
    work.close();
    let taken = taken?;
    println!(
        "kept: checkpoint {taken} of group {kept_in:?} in the same store. Group {group:?} went on without this host from \
         its checkpoint {at}, on {primary}"
    );
    if let Some(aside) = left::put_aside(&spool, &group)? {
        println!(
            "the spool stands in {} now: its records cannot be sent any more, and what they made is in that checkpoint",
            aside.display()
        );
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_kept_in_a_group_that_can_be_one() {
        assert_eq!(group_of("web", "db1.example"), "web.surplus-db1.example");
        assert_eq!(group_of("web", "a b/c"), "web.surplus-a_b_c");
        let long = group_of(&"g".repeat(100), &"h".repeat(100));
        assert!(long.len() == NAME_MAX && long.ends_with("h"), "{long}");
    }
}
