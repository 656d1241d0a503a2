//! The options by which others learn how an agent stands.

use std::time::Duration;

use clap::Args;

use crate::net::Destination;
use crate::primary::schedule::parse_time;
use crate::primary::session::AlertOptions;

/// Alerts and metrics.
#[derive(Debug, Args)]
pub(super) struct Watching {
    /// Run by the shell when something goes wrong, and when that is over. BFS_ALERT says what: detached, away,
    /// fenced, diverged, full or unconfirmed; BFS_STATE begins or ends; BFS_MESSAGE more
    #[arg(long, value_name = "CMD")]
    alert: Option<String>,
    /// How long nothing may be confirmed, before that is an alert
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    alert_after: Duration,
    /// Show numbers for Prometheus at /metrics there: tcp://127.0.0.1:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    metrics: Option<Destination>,
}

impl Watching {
    pub(super) fn options(self) -> (AlertOptions, Option<Destination>) {
        (AlertOptions { command: self.alert, unconfirmed_after: self.alert_after }, self.metrics)
    }
}
