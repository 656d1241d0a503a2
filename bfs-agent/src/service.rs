//! What a service manager wants to hear (`sd_notify(3)`): ready, stopping, and signs of life.
//!
//! Only a process that was started with `NOTIFY_SOCKET` says anything. `WATCHDOG_USEC` tells how long it may be
//! silent; a sign of life is meant as one: it comes from where the work goes on, not from a thread beside it.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// The way to the service manager, if there is one.
#[derive(Debug)]
pub struct Service {
    /// A sign of life is due this often.
    every: Option<Duration>,
    last: Instant,
}

impl Default for Service {
    /// Nobody listens.
    fn default() -> Self {
        Self { every: None, last: Instant::now() }
    }
}

impl Service {
    /// Whoever started this process.
    #[must_use]
    pub fn of_environment() -> Self {
        // Four times as often as is asked for: a machine can be slow.
        let every = sd_notify::watchdog_enabled().map(|within| within / 4);
        Self { every, last: Instant::now() }
    }

    /// How often [`Service::alive`] is to be called; `None` when nobody wants to know.
    #[must_use]
    pub fn every(&self) -> Option<Duration> {
        self.every
    }

    /// It works from now on.
    pub fn ready(&mut self, status: &str) {
        say(&[NotifyState::Ready, NotifyState::Status(status)]);
        self.last = Instant::now();
    }

    /// The work goes on.
    pub fn alive(&mut self) {
        if self.every.is_some_and(|every| self.last.elapsed() >= every) {
            say(&[NotifyState::Watchdog]);
            self.last = Instant::now();
        }
    }

    /// It ends because it was asked to.
    pub fn stopping(&self) {
        say(&[NotifyState::Stopping]);
    }
}

fn say(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager does not listen");
    }
}
