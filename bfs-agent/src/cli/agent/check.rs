//! What a monitor wants to hold of an agent: the words of `status --check`. Pure.

use std::str::FromStr;
use std::time::Duration;

use super::show::size;
use crate::nearest::{did_you_mean, nearest};
use crate::primary::control::Status;
use crate::primary::schedule::{parse_size, parse_time};

/// The words.
const WORDS: [&str; 3] = ["connected", "lag", "spool"];

/// What has to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Checks {
    /// The backup is at most so far behind.
    lag: Option<Duration>,
    /// The spool holds at most so much.
    spool: Option<u64>,
    /// There is a connection to the backup.
    connected: bool,
}

impl FromStr for Checks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut checks = Self::default();
        for word in text.split(',').map(str::trim) {
            match word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value))) {
                ("lag", Some(time)) => checks.lag = Some(parse_time(time).map_err(|e| e.to_string())?),
                ("spool", Some(bytes)) => checks.spool = Some(parse_size(bytes).map_err(|e| e.to_string())?),
                ("connected", None) => checks.connected = true,
                (name, _) => {
                    let near = did_you_mean(nearest(&WORDS, name).filter(|near| *near != name));
                    return Err(format!("{word:?} is not one of lag=TIME, spool=SIZE, connected{near}"));
                }
            }
        }
        Ok(checks)
    }
}

impl Checks {
    /// What does not hold, a sentence each.
    pub(super) fn broken(&self, status: &Status) -> Vec<String> {
        let mut broken = Vec::new();
        let seconds = |ms: u64| ms as f64 / 1e3;
        if let Some(max) = self.lag.filter(|max| u128::from(status.lag_ms) > max.as_millis()) {
            let mut text =
                format!("lag: {:.1} s, more than {:.1} s", seconds(status.lag_ms), max.as_secs_f64());
            if let Some(why) = &status.not_confirmed_because {
                text.push_str(": ");
                text.push_str(why);
            }
            broken.push(text);
        }
        if let Some(max) = self.spool.filter(|max| status.spool.bytes > *max) {
            broken.push(format!("spool: {} wait there, more than {}", size(status.spool.bytes), size(max)));
        }
        for away in status.destinations.iter().filter(|d| self.connected && !d.connected) {
            let why = away.last_error.as_deref().unwrap_or("no connection");
            broken.push(format!("connected: {} is away: {why}", away.address));
        }
        broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::control::{DestinationStatus, SpoolStatus};

    #[test]
    fn what_does_not_hold_is_named() {
        let checks: Checks = "lag=10s, spool=1M,connected".parse().unwrap();
        let mut status = Status { lag_ms: 10_000, ..Status::default() };
        status.destinations =
            vec![DestinationStatus { address: "unix:/x".into(), connected: true, ..Default::default() }];
        assert_eq!(checks.broken(&status), Vec::<String>::new());
        status.lag_ms = 10_500;
        status.not_confirmed_because = Some("the disk".into());
        status.spool = SpoolStatus { bytes: 2 << 20, ..SpoolStatus::default() };
        status.destinations[0].connected = false;
        status.destinations[0].last_error = Some("gone".into());
        assert_eq!(
            checks.broken(&status),
            [
                "lag: 10.5 s, more than 10.0 s: the disk",
                "spool: 2.0 MiB wait there, more than 1.0 MiB",
                "connected: unix:/x is away: gone"
            ]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "lag", "lag=", "lag=10", "spool=x", "connected=1", "lgo=1s"] {
            assert!(text.parse::<Checks>().is_err(), "{text:?}");
        }
        assert!("lga=1s".parse::<Checks>().unwrap_err().contains("did you mean \"lag\""));
    }
}
