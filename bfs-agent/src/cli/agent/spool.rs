//! The options of the spool.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::primary::schedule::{ScheduleError, parse_size, parse_time};
use crate::primary::spool::{DIRECTORY, SpoolOptions};

/// What is kept for a backup that is away.
#[derive(Debug, Args)]
pub(super) struct Spool {
    #[command(flatten)]
    place: Place,
    /// How many bytes of records the spool may hold; 0 for none
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = size_or_none)]
    spool_size: u64,
    /// How old records in the spool may get
    #[arg(long, value_name = "TIME", default_value = "1d", value_parser = parse_time)]
    spool_time: Duration,
}

/// Where the spool is.
#[derive(Debug, Args)]
pub(super) struct Place {
    /// Where records go, in a folder of the group's name, while the backup cannot take them
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    spool: PathBuf,
}

impl Spool {
    pub(super) fn options(self) -> SpoolOptions {
        SpoolOptions { bytes_max: self.spool_size, time_max: self.spool_time, ..self.place.options() }
    }
}

impl Place {
    pub(super) fn options(&self) -> SpoolOptions {
        let directory = std::path::absolute(&self.spool).unwrap_or_else(|_| self.spool.clone());
        SpoolOptions { directory, ..SpoolOptions::default() }
    }
}

fn size_or_none(text: &str) -> Result<u64, ScheduleError> {
    if text == "0" { Ok(0) } else { parse_size(text) }
}
