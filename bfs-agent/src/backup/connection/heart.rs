//! Heartbeats to the agent that writes a group. An agent sends its own; those of the replayer tell it that a replayer is
//! there which takes long for a frame, and tell the replayer of an agent whose host is gone: no network says that.

use std::time::{Duration, Instant};

/// Between two beats.
pub(super) const EVERY: Duration = Duration::from_secs(1);
/// An agent of which not a byte came for so long is gone. It sends something each second by itself.
pub(super) const SILENT_MAX: Duration = Duration::from_secs(10);

/// What was sent and heard. Pure.
#[derive(Debug)]
pub(super) struct Heart {
    beat_at: Instant,
    /// Of the last beat, and when it was.
    sent: (u64, Instant),
    heard: Instant,
    /// Bytes of a frame that is not whole.
    buffered: usize,
}

impl Heart {
    pub(super) fn new(now: Instant) -> Self {
        Self { beat_at: now, sent: (0, now), heard: now, buffered: 0 }
    }

    /// When to beat next.
    pub(super) fn beat_at(&self) -> Instant {
        self.beat_at
    }

    /// A frame came, or one that came has been dealt with: nothing is heard while that goes on.
    pub(super) fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// Beats: the number to send. `buffered`: how much is there of a frame that is not whole. `None` when there was
    /// silence for too long.
    pub(super) fn beat(&mut self, buffered: usize, now: Instant) -> Option<u64> {
        if buffered != self.buffered {
            self.buffered = buffered;
            self.heard = now;
        }
        if now.duration_since(self.heard) >= SILENT_MAX {
            return None;
        }
        self.beat_at = now + EVERY;
        self.sent = (self.sent.0 + 1, now);
        Some(self.sent.0)
    }

    /// The answer to a beat: how long the last one took.
    pub(super) fn answered(&self, number: u64, now: Instant) -> Option<Duration> {
        (number == self.sent.0).then(|| now.duration_since(self.sent.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_silent_is_told_from_who_is_slow() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut heart = Heart::new(start);
        assert_eq!((heart.beat(0, at(0)), heart.beat_at()), (Some(1), at(1)));
        assert_eq!(heart.beat(0, at(1)), Some(2));
        assert_eq!((heart.answered(1, at(2)), heart.answered(2, at(2))), (None, Some(EVERY)));
        // A frame that comes byte by byte.
        assert_eq!(heart.beat(7, at(9)), Some(3));
        assert_eq!(heart.beat(8, at(18)), Some(4));
        assert_eq!(heart.beat(8, at(27)), Some(5));
        assert_eq!(heart.beat(8, at(28)), None);
        // It was dealt with what had come, for long.
        heart.heard(at(40));
        assert_eq!(heart.beat(8, at(41)), Some(6));
    }
}
