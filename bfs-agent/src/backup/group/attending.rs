//! Who writes a group, since when, and how the last one who did left.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bfs_common::wire::AgentStanding;
use tokio::sync::Notify;

use super::{State, locked};
use crate::generation::wall_ns;

/// What is heard of a connection.
#[derive(Debug)]
pub struct Pulse {
    heard: Mutex<Instant>,
    round_trip_us: AtomicU64,
}

impl Pulse {
    /// Something came.
    pub fn heard(&self) {
        *locked(&self.heard) = Instant::now();
    }

    /// The answer to a heartbeat came after this time.
    pub fn answered(&self, after: Duration) {
        self.round_trip_us.store(u64::try_from(after.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// For how long nothing came.
    #[must_use]
    pub fn silence(&self) -> Duration {
        locked(&self.heard).elapsed()
    }
}

/// The connection that writes a group.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Number of the connection.
    pub connection: u64,
    /// Tells it that it lost the group.
    pub fenced: Arc<Notify>,
    /// When something came from it, and how fast it answers.
    pub pulse: Arc<Pulse>,
}

impl Slot {
    /// For a connection of which something just came.
    #[must_use]
    pub fn of(connection: u64) -> Self {
        let pulse = Pulse { heard: Mutex::new(Instant::now()), round_trip_us: AtomicU64::new(0) };
        Self { connection, fenced: Arc::default(), pulse: Arc::new(pulse) }
    }
}

/// How an agent's connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leave {
    /// The agent said that it ends.
    Bye,
    /// It did not, and this is how that was seen.
    Lost(String),
}

/// The agent that came last.
#[derive(Clone, Debug, Default)]
pub(super) enum Attendance {
    /// None since the start.
    #[default]
    Unseen,
    /// It is there.
    Here { slot: Slot, since_ns: i64 },
    /// It is not.
    Gone { leave: Leave, since_ns: i64 },
}

impl State {
    /// An agent has the group now.
    pub fn attend(&mut self, slot: Slot) {
        self.attendance = Attendance::Here { slot: slot.clone(), since_ns: wall_ns() };
        self.slot = Some(slot);
    }

    /// The connection of an agent ended. Whether the group is free with that: another connection may have it.
    pub fn leave(&mut self, connection: u64, leave: Leave) -> bool {
        if let Attendance::Here { slot, .. } = &self.attendance
            && slot.connection == connection
        {
            self.attendance = Attendance::Gone { leave, since_ns: wall_ns() };
        }
        self.slot.take_if(|slot| slot.connection == connection).is_some()
    }

    /// How the agent stands.
    pub(super) fn agent(&self) -> AgentStanding {
        match &self.attendance {
            Attendance::Unseen => AgentStanding::Unseen,
            Attendance::Here { slot: Slot { pulse, .. }, since_ns } => AgentStanding::Attached {
                since_ns: *since_ns,
                heard_ms: u64::try_from(pulse.silence().as_millis()).unwrap_or(u64::MAX),
                round_trip_us: pulse.round_trip_us.load(Ordering::Relaxed),
            },
            Attendance::Gone { leave: Leave::Bye, since_ns } => AgentStanding::Ended { since_ns: *since_ns },
            Attendance::Gone { leave: Leave::Lost(why), since_ns } => {
                AgentStanding::Lost { since_ns: *since_ns, why: why.clone() }
            }
        }
    }
}
