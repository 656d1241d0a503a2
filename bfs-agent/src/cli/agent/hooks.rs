//! The options of the hooks.

use std::time::Duration;

use clap::Args;

use crate::primary::schedule::parse_time;
use crate::primary::session::HookOptions;

/// Commands around a checkpoint.
#[derive(Debug, Args)]
pub(super) struct Hooks {
    /// Run by the shell before each checkpoint, which is taken when it has ended with 0, and else not. It
    /// finds BFS_GROUP, BFS_CHECKPOINT, BFS_TAG and BFS_REASON in its environment
    #[arg(long, value_name = "CMD")]
    before_checkpoint: Option<String>,
    /// Run by the shell when the instant of the checkpoint is behind us, and whenever the one before was
    /// started; BFS_RESULT says whether it was taken
    #[arg(long, value_name = "CMD")]
    after_checkpoint: Option<String>,
    /// How long each of them may take; then it is ended, with all that it started
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    hook_limit: Duration,
}

impl Hooks {
    pub(super) fn options(self) -> HookOptions {
        HookOptions { before: self.before_checkpoint, after: self.after_checkpoint, limit: self.hook_limit }
    }
}
