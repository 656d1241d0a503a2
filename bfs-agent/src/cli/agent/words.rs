//! Words that some options take.

use clap::ValueEnum;

use crate::primary::control::WaitFor;
use crate::primary::engine::foreign::Policy;

/// `--foreign`: what is done with what processes change that are not selected.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(super) enum Foreign {
    /// It is taken in, like what the selected ones do
    #[default]
    Follow,
    /// No checkpoint is taken any more; status names the process
    Refuse,
    /// The content of a file that they changed does not count any more; status lists it
    Ignore,
}

impl From<Foreign> for Policy {
    fn from(foreign: Foreign) -> Self {
        match foreign {
            Foreign::Follow => Self::Follow,
            Foreign::Refuse => Self::Refuse,
            Foreign::Ignore => Self::Ignore,
        }
    }
}

/// `--wait`: how far a checkpoint has to come.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Wait {
    /// Its instant is behind us
    Taken,
    /// All of it is durable somewhere
    Sealed,
    /// It is durable on the backup
    Confirmed,
    /// The backup's files are as at the checkpoint
    Applied,
}

impl From<Wait> for WaitFor {
    fn from(wait: Wait) -> Self {
        match wait {
            Wait::Taken => Self::Taken,
            Wait::Sealed => Self::Sealed,
            Wait::Confirmed => Self::Confirmed,
            Wait::Applied => Self::Applied,
        }
    }
}
