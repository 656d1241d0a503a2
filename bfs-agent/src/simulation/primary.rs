//! A host with a program, beside its agent, which may go.

use std::collections::VecDeque;

use bfs_common::record::*;

use super::stream::{Line, Stream};
use crate::backup::model::Model;

/// Operations that the ring holds.
const RING: usize = 60;

/// A call of the program, in the ring until what it did is durable.
pub struct Op {
    pub number: u64,
    pub lines: Vec<Line>,
}

/// What the primary is beside its agent, which may go.
pub struct Primary {
    pub model: Model,
    pub ring: VecDeque<Op>,
    pub stream: Stream,
    /// The last record that was said to be durable, on either side.
    pub sealed: Sequence,
    /// Calls were lost, and nobody knows which.
    lost: bool,
    /// The stream says so with this operation, when that is durable.
    pub told: Option<u64>,
    pub boot: u8,
    ops: u64,
    /// A label, and nothing else.
    pub wall_ns: i64,
}

impl Primary {
    /// A first one.
    pub fn new(boot: u8) -> Self {
        let mut model = Model::new();
        model.records.clear();
        Self {
            model,
            ring: VecDeque::new(),
            stream: Stream::default(),
            sealed: Sequence(0),
            // A first agent copies everything.
            lost: true,
            told: None,
            boot,
            ops: 0,
            wall_ns: 0,
        }
    }

    /// Another one, with what this one had at a checkpoint. What this one's stream has forgotten since are other objects
    /// there.
    pub fn promoted(&self, at: CheckpointId, boot: u8) -> Self {
        let mut model = self.stream.state(at).expect("it was a checkpoint").clone();
        model.behind(&self.model, &self.stream.known());
        Self { model, stream: self.stream.clone(), ..Self::new(boot) }
    }

    /// The last operation.
    pub fn last_op(&self) -> u64 {
        self.ops
    }

    /// Whether the stream does not say of everything durably.
    pub fn has_lost(&self) -> bool {
        self.lost
    }

    /// Whether the next record has to name a loss.
    pub fn must_tell(&self) -> bool {
        self.lost && self.told.is_none()
    }

    /// The next record names it, if there is one that was not named.
    pub fn tells_loss(&mut self) -> bool {
        let tells = self.must_tell();
        if tells {
            self.told = Some(self.ops);
        }
        tells
    }

    /// Calls were lost, and nobody knows which.
    pub fn loses(&mut self) {
        self.lost = true;
        self.told = None;
    }

    /// What it did up to this operation is durable.
    pub fn released(&mut self, up_to: u64) {
        while self.ring.pop_front_if(|op| op.number <= up_to).is_some() {}
        if self.told.is_some_and(|told| told <= up_to) {
            (self.lost, self.told) = (false, None);
        }
    }

    /// The program does something.
    pub fn does(&mut self, op: (u8, u8, u8, u8)) {
        self.model.do_op(op);
        self.ops += 1;
        let lines = std::mem::take(&mut self.model.records);
        if self.ring.len() >= RING {
            self.loses();
        } else {
            self.ring.push_back(Op { number: self.ops, lines });
        }
    }
}
