//! Waiting for a condition, with a deadline: the only way in which tests wait.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long the tests wait for what should come at once; generous, because two cores are shared, and
/// may be those of a machine that is emulated.
pub const SOON: Duration = Duration::from_secs(180);

/// Asks until there is an answer.
///
/// # Errors
/// When the deadline passes; `what` names what did not come.
pub fn until<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if started.elapsed() > limit {
            bail!("waited {} s for {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
