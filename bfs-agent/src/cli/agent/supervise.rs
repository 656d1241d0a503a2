//! What becomes of a group whose agent has ended: pure.
//!
//! An agent that died (a signal that nobody passed on to it: a bug, the kernel's memory killer, somebody's `kill -9`) leaves a program
//! that works, and a kernel that goes on capturing: the next one goes on with what is there, after a pause that grows while
//! they die at once. An agent that *said* that it ends is believed, unless its group says `resume`: then what may pass (a
//! backup that cannot be reached, say) is tried again, as a service manager would do it with the group's unit.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use crate::primary::failure::Kind;
use crate::primary::process::exit_status;

/// The first pause.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// An agent that lived for so long did not die at once.
const LIVED: Duration = Duration::from_secs(60);

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The group has ended, with this status.
    Ends(u8),
    /// It gets another agent after a pause.
    Again {
        /// One that goes on for the one that died, instead of one that begins.
        resumes: bool,
        /// The pause.
        after: Duration,
    },
}

/// One group, seen from outside.
#[derive(Debug)]
pub(super) struct Watch {
    /// Its settings say that a new agent goes on for an old one.
    says_resume: bool,
    /// An agent that goes on for one that died.
    resumes: bool,
    /// It was told to end.
    asked: bool,
    pause: Duration,
}

impl Watch {
    pub(super) fn new(says_resume: bool) -> Self {
        Self { says_resume, resumes: false, asked: false, pause: PAUSE_MIN }
    }

    /// A signal was passed on: whatever follows is its end.
    pub(super) fn asked(&mut self) {
        self.asked = true;
    }

    /// The agent has ended, after it lived for so long.
    pub(super) fn ended(&mut self, end: ExitStatus, lived: Duration) -> Next {
        let status = exit_status(end);
        let died = end.signal().is_some();
        let again = died || (self.says_resume || self.resumes) && may_pass(status);
        if self.asked || !again {
            return Next::Ends(status);
        }
        if lived >= LIVED {
            self.pause = PAUSE_MIN;
        }
        let after = self.pause;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.resumes |= died;
        // What the settings start looks for an agent that died by itself.
        Next::Again { resumes: self.resumes && !self.says_resume, after }
    }
}

/// Whether another try may go better.
fn may_pass(status: u8) -> bool {
    let kinds =
        [Kind::Unreachable, Kind::Refused, Kind::Other, Kind::GroupBusy, Kind::GivenUp, Kind::Timeout];
    kinds.iter().any(|kind| kind.exit_status() == status)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(100);
    const SHORT: Duration = Duration::from_millis(10);

    fn code(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    fn killed() -> ExitStatus {
        ExitStatus::from_raw(9)
    }

    fn again(resumes: bool, seconds: u64) -> Next {
        Next::Again { resumes, after: Duration::from_secs(seconds) }
    }

    #[test]
    fn who_died_is_followed_by_one_that_goes_on() {
        let mut watch = Watch::new(false);
        assert_eq!(watch.ended(killed(), LONG), again(true, 1));
        // It cannot reach the backup: what was captured still waits for somebody who goes on.
        assert_eq!(watch.ended(code(68), SHORT), again(true, 2));
        assert_eq!(watch.ended(killed(), SHORT), again(true, 4));
        // There is nobody to go on for any more.
        assert_eq!(watch.ended(code(72), SHORT), Next::Ends(72));
        assert_eq!(
            Watch::new(true).ended(killed(), SHORT),
            again(false, 1),
            "attach --resume sees that itself"
        );
    }

    #[test]
    fn who_said_why_is_believed_unless_it_may_pass() {
        for status in [0, 3, 64, 66, 68, 70, 75, 143] {
            assert_eq!(Watch::new(false).ended(code(status), LONG), Next::Ends(status as u8));
        }
        for status in [68, 69, 70, 71] {
            assert_eq!(Watch::new(true).ended(code(status), LONG), again(false, 1), "{status}");
        }
        for status in [0, 64, 65, 66, 67, 77] {
            assert_eq!(Watch::new(true).ended(code(status), LONG), Next::Ends(status as u8));
        }
    }

    #[test]
    fn who_was_asked_to_end_has_ended_however() {
        for says_resume in [false, true] {
            let mut watch = Watch::new(says_resume);
            watch.asked();
            assert_eq!(watch.ended(killed(), LONG), Next::Ends(137));
            assert_eq!(watch.ended(code(68), LONG), Next::Ends(68));
        }
    }

    #[test]
    fn the_pause_grows_to_its_bound_and_begins_anew_after_a_long_life() {
        let mut watch = Watch::new(true);
        let pauses: Vec<Next> = (0..8).map(|_| watch.ended(killed(), SHORT)).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60].map(|seconds| again(false, seconds)));
        assert_eq!(watch.ended(killed(), LONG), again(false, 1));
    }
}
