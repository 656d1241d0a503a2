//! Daemons whose system calls fail.

use std::process::Child;

use anyhow::Result;

use super::World;
use crate::faults::Faults;

impl World {
    /// Calls of the replayers that are started from now on fail as these say.
    pub fn replayer_faults(&mut self, faults: Faults) {
        self.faults = Some(faults);
    }

    /// What [`World::replayer_faults`] was given.
    #[must_use]
    pub fn faults(&self) -> Option<&Faults> {
        self.faults.as_ref()
    }

    /// The same of the agents from now on, which do not start a program.
    pub fn faults_of_agents(&mut self, faults: Faults) {
        self.agent_faults = Some(faults);
    }

    /// What [`World::faults_of_agents`] was given.
    #[must_use]
    pub fn agent_faults(&self) -> Option<&Faults> {
        self.agent_faults.as_ref()
    }

    /// `bfs-agent` with these words, in the group of the world.
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn_faulty_command(&self, words: &[&str], faults: &mut Faults) -> Result<Child> {
        let mut command = self.agent_line(words);
        Ok(faults.hold(self.leash.hold(&mut command)?)?.spawn()?)
    }
}
