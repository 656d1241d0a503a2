//! Destinations beside the first: at the start, and as commands change them.

use std::io;

use bfs_common::record::{ObjectId, PathBytes, Sequence};

use super::link::Link;
use super::work::Work;
use super::{SessionOptions, left};
use crate::net::Destination;
use crate::primary::control::{DestinationStatus, FailureKind, Replies, Reply};
use crate::primary::failure::{Failure, Kind};
use crate::primary::further::{Further, FurtherOptions, Leg, Place};
use crate::primary::preflight;

/// Most bytes of records that are kept for destinations that are behind; no more than the spool may take.
const BYTES_MAX: u64 = 1 << 30;

/// What a command wants of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Add,
    Remove,
    Pause,
    Resume,
    Resync,
}

impl Link {
    /// One more destination. With the first of them begins what is kept for them.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) fn add_further(
        &mut self,
        options: &SessionOptions,
        roots: Vec<(PathBytes, ObjectId)>,
        place: Place,
    ) -> Result<(), Failure> {
        let address = place.address.clone();
        let failed = |error: io::Error| {
            let hint =
                "give another folder with --spool DIR: records that a destination misses are kept there";
            Failure::new(Kind::Other, format!("cannot begin with --backup {address}: {error}"), hint)
        };
        if self.further.is_none() {
            let spool = &options.spool;
            let bytes_max = if spool.bytes_max > 0 { spool.bytes_max.min(BYTES_MAX) } else { BYTES_MAX };
            let further = Further::start(FurtherOptions {
                group: options.group.clone(),
                folder: spool.directory.clone(),
                bytes_max,
                first: self.first.clone(),
                roots,
            });
            self.further = Some(further.map_err(failed)?);
        }
        self.further.as_mut().map_or(Ok(()), |further| further.add(place)).map_err(failed)
    }
}

impl Work {
    /// Changes the destinations, at once; what that means for each is in the status.
    pub(super) fn change_destination(&mut self, change: Change, address: &str, replies: &Replies) {
        match self.changed_destination(change, address) {
            Ok(()) => replies.send(Reply::Destinations { destinations: self.destinations() }),
            Err(failure) => {
                replies.send(Reply::failed(FailureKind::Failed, failure.message, failure.hint));
            }
        }
    }

    fn changed_destination(&mut self, change: Change, address: &str) -> Result<(), Failure> {
        let usage = |why: String, hint: &str| Failure::new(Kind::Usage, why, hint);
        let to: Destination = address
            .parse()
            .map_err(|e| usage(format!("{address}: {e}"), "write it as it is given to --backup"))?;
        if to == self.options.backup {
            return Err(usage(
                format!("{to} is the first destination, which the stream goes to"),
                "end this agent, and start it with another first --backup",
            ));
        }
        let known = self.options.further.contains(&to);
        match change {
            Change::Add if known => return Err(usage(format!("{to} is a destination already"), "")),
            Change::Add => self.add_destination(to)?,
            _ if !known => {
                let known = self.options.destinations().iter().map(ToString::to_string).collect::<Vec<_>>();
                let why = format!("group {:?} has no destination {to}", self.options.group);
                return Err(usage(why, &format!("it has {}", known.join(", "))));
            }
            Change::Remove => {
                let mut left = self.options.destinations();
                left.retain(|known| *known != to);
                let left: Vec<_> = left.iter().map(ToString::to_string).collect();
                self.link.confirm.check(&left).map_err(|why| {
                    usage(why, "it is needed for what --confirm says: start the agent again with another")
                })?;
                self.options.further.retain(|known| *known != to);
                if let Some(further) = &self.link.further {
                    further.remove(&to.to_string());
                }
                if let Some(images) = &mut self.images {
                    images.couriers.remove(&to.to_string());
                }
                self.keep_destinations()?;
                if self.options.further.is_empty() {
                    self.link.further = None;
                }
            }
            Change::Pause | Change::Resume => {
                if let Some(further) = &self.link.further {
                    further.pause(&to.to_string(), change == Change::Pause);
                }
                if let Some(images) = &self.images {
                    images.couriers.pause(&to.to_string(), change == Change::Pause);
                }
            }
            Change::Resync => {
                if let Some(further) = &mut self.link.further {
                    further.look_again(&to.to_string()).map_err(|e| {
                        Failure::new(Kind::Other, format!("cannot begin again with {to}: {e}"), "")
                    })?;
                }
            }
        }
        Ok(())
    }

    fn add_destination(&mut self, to: Destination) -> Result<(), Failure> {
        preflight::check_paired(&self.options.keys, &to)?;
        preflight::check_store(&to, &self.options.roots)?;
        let (place, _) = left::place(&self.options, &to)?;
        self.link.add_further(&self.options, self.engine.roots(), place.clone())?;
        self.bring_images_to(place);
        self.options.further.push(to);
        self.keep_destinations()
    }

    /// A successor has the same ones.
    fn keep_destinations(&mut self) -> Result<(), Failure> {
        self.kept.set_further(&self.options.further);
        self.kept.write(&self.options.group).map_err(|e| {
            let hint = "an agent that goes on for this one would have the destinations of before";
            Failure::new(Kind::Other, format!("cannot write the state file in /run/bfs: {e}"), hint)
        })
    }

    /// How all of them stand, the first one first.
    pub(super) fn destinations(&self) -> Vec<DestinationStatus> {
        let progress = self.link.shipper.progress();
        let first = DestinationStatus {
            address: self.options.backup.to_string(),
            connected: progress.connected,
            standing: self.watch.standing,
            since_ns: self.watch.since_ns,
            why: self.watch.why.clone(),
            durable: progress.durable.sequence,
            confirmed: progress.confirmed,
            applied: progress.applied,
            store: progress.store,
            round_trip_us: progress.round_trip_us,
            reconnects: progress.reconnects,
            last_error: progress.last_error,
            refusal: progress.refusal.as_ref().map(ToString::to_string),
            rate_limit: self.options.sending.rate_limit,
            held_back: progress.held_back,
            sent_bytes: progress.sent_bytes,
            wire_bytes: progress.wire_bytes,
            compressed: progress.compressed,
        };
        let legs = self.link.further.iter().flat_map(Further::legs).map(|leg| self.of_leg(leg));
        [first].into_iter().chain(legs).collect()
    }

    fn of_leg(&self, leg: Leg) -> DestinationStatus {
        let Leg { address, connected, standing, since_ns, why, confirmed, applied, .. } = leg;
        DestinationStatus {
            address,
            connected,
            standing,
            since_ns,
            last_error: why.clone(),
            why,
            // It gets whole checkpoints.
            durable: Sequence(0),
            confirmed,
            applied,
            store: leg.store,
            round_trip_us: 0,
            reconnects: leg.reconnects,
            refusal: None,
            rate_limit: self.options.sending.rate_limit,
            held_back: false,
            sent_bytes: leg.sent_bytes,
            wire_bytes: leg.sent_bytes,
            compressed: false,
        }
    }
}
