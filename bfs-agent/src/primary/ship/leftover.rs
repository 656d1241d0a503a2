//! Sending what an agent before left in its spool, in the epoch that it is of.

use std::time::{Duration, Instant};

use super::{Progress, ShipError, ShipOptions, Shipper};
use crate::primary::spool::{Left, Spool};

/// Without any progress for so long it is given up.
const STANDS_STILL: Duration = Duration::from_secs(60);

/// Sends it and waits until it is durable at the destination; `tell` hears how it goes on. Gives the empty
/// spool back, and how the destination stands.
///
/// # Errors
/// [`ShipError`]; then the spool is as it was.
pub fn send_left(
    options: ShipOptions,
    spool: Spool,
    left: &Left,
    mut tell: impl FnMut(&Progress),
) -> Result<(Option<Spool>, Progress), ShipError> {
    let (shipper, _) = Shipper::start(options, Some(spool), Some(left))?;
    let mut moved = (Instant::now(), shipper.progress().durable);
    loop {
        let progress = shipper.progress();
        tell(&progress);
        if let Some(refusal) = progress.refusal {
            return Err(refusal.into());
        }
        if progress.spool.records == 0 {
            return Ok((shipper.end(), progress));
        }
        if progress.durable != moved.1 {
            moved = (Instant::now(), progress.durable);
        }
        if moved.0.elapsed() > STANDS_STILL {
            return Err(ShipError::Silent(STANDS_STILL.as_secs()));
        }
        let _ = shipper.wait_change(progress.version, Instant::now() + Duration::from_millis(500));
    }
}
