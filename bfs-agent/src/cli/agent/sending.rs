//! How what is captured travels.

use clap::Args;

use crate::primary::schedule::parse_size;
use crate::primary::ship::{RATE_MIN, Sending};

/// The options of the link to the backup.
#[derive(Debug, Args)]
pub(super) struct Link {
    /// Send at most so many bytes a second to the backup, 64K at least; the program never waits for that, what is not sent yet goes
    /// into the spool [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    rate_limit: Option<u64>,
    /// Compress what is sent (LZ4), where the replayer can read that and it gets smaller
    #[arg(long)]
    compress: bool,
}

impl Link {
    pub(super) fn options(&self) -> Sending {
        Sending { rate_limit: self.rate_limit, compress: self.compress }
    }
}

fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Ok(rate) if rate < RATE_MIN => Err("a limit is at least 64K bytes a second".into()),
        Ok(rate) => Ok(rate),
        Err(error) => Err(error.to_string()),
    }
}
