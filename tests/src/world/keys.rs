//! The keys of both sides, and the commands that change them.

use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use super::{Transport, World, binary};

impl World {
    /// The agent's folder of keys.
    #[must_use]
    pub fn keys(&self) -> PathBuf {
        self.root().join("keys")
    }

    /// Runs `bfs-replayer WORDS... --store STORE` to its end.
    ///
    /// # Errors
    /// When it does not start.
    pub fn of_replayer(&self, words: &[&str]) -> Result<Output> {
        let mut command = Command::new(binary("bfs-replayer"));
        command.arg(words[0]).arg("--store").arg(&self.store).args(&words[1..]);
        self.leash.hold(&mut command)?.output().context("bfs-replayer does not start")
    }

    /// Runs `bfs-agent WORDS... --keys KEYS` to its end.
    ///
    /// # Errors
    /// When it does not start.
    pub fn of_host(&self, words: &[&str]) -> Result<Output> {
        let mut command = Command::new(binary("bfs-agent"));
        command.arg(words[0]).arg("--keys").arg(self.keys()).args(&words[1..]);
        self.leash.hold(&mut command)?.output().context("bfs-agent does not start")
    }

    /// A token of the replayer; with these options.
    ///
    /// # Errors
    /// When it gives none.
    pub fn token(&self, options: &[&str]) -> Result<String> {
        said(&self.of_replayer(&[&["pair"], options].concat())?)
    }

    /// Pairs the agent's host with the replayer, at the address by which agents come.
    ///
    /// # Errors
    /// When they are not paired.
    pub fn pair(&mut self, options: &[&str]) -> Result<()> {
        let (token, to) = (self.token(options)?, self.destination());
        said(&self.of_host(&["pair", &to, &token])?)?;
        self.paired = Some(to);
        Ok(())
    }

    /// Leaves pairing to the test.
    pub fn pairs_itself(&mut self) {
        self.paired = Some(self.destination());
    }

    pub(super) fn pair_if_needed(&mut self) -> Result<()> {
        let paired = self.paired.as_ref() == Some(&self.destination());
        if paired || self.transport == Transport::Unix { Ok(()) } else { self.pair(&[]) }
    }
}

/// The line that a command printed.
///
/// # Errors
/// When it failed.
pub fn said(done: &Output) -> Result<String> {
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    ensure!(done.status.success(), "{}: {out}{err}", done.status);
    Ok(out.trim().to_owned())
}
