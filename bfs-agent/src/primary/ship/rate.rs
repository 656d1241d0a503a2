//! How fast a destination is sent to, where the user sets a limit: a token bucket that may be overdrawn by one piece.
//!
//! What is sent is owed, and the next piece waits until that is paid: so a frame is never broken off in its middle, and in the
//! long run no more is sent than the limit. What was not used counts for [`SAVED`] only, so that a pause is not followed by a
//! burst. Records go first: images of processes, which travel beside them, take what they leave. Heartbeats, answers and
//! questions are a few bytes each and do not count, nor does what the destination sends. [`Rate`] is pure.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::queue::BODY_MAX;

/// The lowest limit, in bytes a second. A record is never split, and may have 1 MiB: below this one of them alone would take
/// longer than it is waited for.
pub const RATE_MIN: u64 = 64 << 10;
/// What was not used counts for so long.
const SAVED: Duration = Duration::from_millis(100);
/// Records that had to wait go before images for so long after they may go.
const RECORDS_FIRST: Duration = Duration::from_millis(100);
/// A limit is met in about so many pieces a second.
const PIECES_PER_SECOND: u64 = 10;
/// No piece is smaller than that for a limit.
const PIECE_MIN: u64 = 64 << 10;
/// What takes longer than this to be sent goes into the spool meanwhile, in seconds.
const WAITS_SECONDS: u64 = 2;

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sends {
    /// The stream.
    Records,
    /// The courier.
    Images,
}

/// The bucket.
#[derive(Debug)]
struct Rate {
    bytes_per_second: u64,
    /// When what was sent is paid.
    paid_at: Instant,
    /// Records wait: nothing else goes until then.
    records_until: Option<Instant>,
}

impl Rate {
    fn new(bytes_per_second: u64, now: Instant) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), paid_at: now, records_until: None }
    }

    /// Whether a piece may go now, or when to ask again.
    fn may(&mut self, who: Sends, now: Instant) -> Result<(), Instant> {
        match who {
            Sends::Records if now < self.paid_at => {
                self.records_until = Some(self.paid_at + RECORDS_FIRST);
                Err(self.paid_at)
            }
            Sends::Images if now < self.paid_at => Err(self.paid_at),
            Sends::Images => match self.records_until.filter(|until| now < *until) {
                Some(until) => Err(until),
                None => Ok(()),
            },
            Sends::Records => Ok(()),
        }
    }

    /// So much was sent.
    fn sent(&mut self, who: Sends, bytes: usize, now: Instant) {
        let nanos = (bytes as u128 * 1_000_000_000).div_ceil(u128::from(self.bytes_per_second));
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let from = self.paid_at.max(now.checked_sub(SAVED).unwrap_or(now));
        self.paid_at = from.checked_add(takes).unwrap_or(from);
        if who == Sends::Records {
            self.records_until = None;
        }
    }
}

/// The limit of one destination, for all that is sent there.
#[derive(Debug)]
pub struct Limit {
    bytes_per_second: u64,
    rate: Mutex<Rate>,
}

impl Limit {
    /// At most so many bytes a second, from now on.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, rate: Mutex::new(Rate::new(bytes_per_second, Instant::now())) }
    }

    fn rate(&self) -> MutexGuard<'_, Rate> {
        self.rate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes a second.
    #[must_use]
    pub fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second
    }

    /// How much is sent at once.
    #[must_use]
    pub fn piece_max(&self) -> usize {
        let piece = (self.bytes_per_second / PIECES_PER_SECOND).max(PIECE_MIN);
        usize::try_from(piece).unwrap_or(BODY_MAX).min(BODY_MAX)
    }

    /// Whether so many bytes wait longer than memory is to hold them for.
    #[must_use]
    pub fn holds_back(&self, bytes: u64) -> bool {
        bytes > self.bytes_per_second.saturating_mul(WAITS_SECONDS)
    }

    /// Whether a piece may go now, or when to ask again.
    ///
    /// # Errors
    /// That time.
    pub fn may(&self, who: Sends) -> Result<(), Instant> {
        self.rate().may(who, Instant::now())
    }

    /// So much was sent.
    pub fn sent(&self, who: Sends, bytes: usize) {
        self.rate().sent(who, bytes, Instant::now());
    }

    /// Waits until a piece may go.
    pub async fn turn(&self, who: Sends) {
        while let Err(at) = self.may(who) {
            tokio::time::sleep_until(at.into()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Records that always wait leave nothing to images; when they do not, images go.
    #[test]
    fn records_go_first() {
        let start = Instant::now();
        let mut rate = Rate::new(1000, start);
        rate.sent(Sends::Images, 1000, start);
        let at = rate.may(Sends::Images, start).unwrap_err();
        assert_eq!(at, start + Duration::from_secs(1), "nothing was saved yet");
        assert_eq!(rate.may(Sends::Records, start), Err(at));
        let later = rate.may(Sends::Images, at).unwrap_err();
        assert_eq!(rate.may(Sends::Records, at), Ok(()));
        assert_eq!(rate.may(Sends::Images, later), Ok(()), "they did not come");
        rate.sent(Sends::Records, 500, at);
        let at = rate.may(Sends::Images, at).unwrap_err();
        assert_eq!(rate.may(Sends::Images, at), Ok(()), "no records wait");
    }

    #[test]
    fn pieces_are_neither_tiny_nor_longer_than_a_frame() {
        assert_eq!(Limit::new(RATE_MIN).piece_max(), 64 << 10);
        assert_eq!(Limit::new(10 << 20).piece_max(), 1 << 20);
        assert_eq!(Limit::new(u64::MAX).piece_max(), BODY_MAX);
        assert!(!Limit::new(u64::MAX).holds_back(u64::MAX));
        assert!(Limit::new(1000).holds_back(2001) && !Limit::new(1000).holds_back(2000));
    }

    proptest! {
        /// Whatever is sent and whenever, as soon as it may be or later: never more than the limit and what one piece, and
        /// the time that counts, are beyond it; and who always has something to send comes as far as that.
        #[test]
        fn the_limit_holds(
            limit in 1_000..10_000_000u64,
            pieces in prop::collection::vec((1..4_000_000usize, 0..2_000u64), 1..50),
        ) {
            let start = Instant::now();
            let (mut rate, mut now, mut sent, mut rested) = (Rate::new(limit, start), start, 0u64, false);
            for (bytes, pause_ms) in pieces {
                let may = ((now - start + SAVED).as_secs_f64() * limit as f64) as u64;
                prop_assert!(sent <= may + 1, "{sent} of {may}");
                rate.sent(Sends::Records, bytes, now);
                sent += bytes as u64;
                // Some wait for more to come.
                let pause = Duration::from_millis(if pause_ms > 1_500 { pause_ms } else { 0 });
                rested |= !pause.is_zero();
                now = rate.may(Sends::Records, now).err().unwrap_or(now).max(now + pause);
            }
            let full = sent as f64 / limit as f64;
            let took = (now - start).as_secs_f64();
            prop_assert!(rested || took <= full + 0.001, "{took} s for {full} s");
        }
    }
}
