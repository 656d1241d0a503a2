//! Diagnostics of the probes: what aya-log carries goes into the agent's log, as from this module.
//!
//! Off unless the agent's log shows this module at DEBUG (which threads are followed) or TRACE (each call
//! of theirs); then the probes have no code for it. Only the agent that loaded the probes reads it.

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};

use super::CaptureError;

/// The global of aya-log that says how much is wanted.
pub(super) const LEVEL: &str = aya_log::LEVEL;

/// How much is wanted, as aya-log counts: 0 is nothing.
#[must_use]
pub fn wanted() -> u8 {
    if tracing::enabled!(tracing::Level::TRACE) {
        aya_log::Level::Trace as u8
    } else if tracing::enabled!(tracing::Level::DEBUG) {
        aya_log::Level::Debug as u8
    } else {
        0
    }
}

struct ToAgentLog;

impl Log for ToAgentLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        match record.level() {
            Level::Error => tracing::error!("{}", record.args()),
            Level::Warn => tracing::warn!("{}", record.args()),
            Level::Info => tracing::info!("{}", record.args()),
            Level::Debug => tracing::debug!("{}", record.args()),
            Level::Trace => tracing::trace!("{}", record.args()),
        }
    }

    fn flush(&self) {}
}

/// The reading end.
pub struct ProbeLog(EbpfLogger<ToAgentLog>);

impl ProbeLog {
    /// Takes the reading end out of probes that were just loaded.
    pub(super) fn open(probes: &mut Ebpf) -> Result<Self, CaptureError> {
        let logger =
            EbpfLogger::init_with_logger(probes, ToAgentLog).map_err(|error| CaptureError::Kernel {
                what: "cannot read the log of the probes".to_owned(),
                source: std::io::Error::other(error),
            })?;
        Ok(Self(logger))
    }

    /// Hands on what there is.
    pub fn forward(&mut self) {
        self.0.flush();
    }
}
