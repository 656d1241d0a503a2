//! A forwarder as of 1993: a library between the program and libc (LD_PRELOAD) hands the calls that write to a process
//! with a second copy, and waits for its answer. Written for the comparison; it sees only what goes through the dynamic symbols,
//! so neither static programs nor what libc writes itself.

use std::cell::OnceCell;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{World, command_ok};
use tempfile::TempDir;

use super::super::leftovers;
use super::{Begun, Peer, daemon};
use crate::setup::Tool;

/// Both are one C file each.
const SOURCES: [(&str, &str); 2] =
    [("forward", include_str!("forward.c")), ("receive", include_str!("receive.c"))];
const PROTOCOL: &str = include_str!("forward.h");

/// See the module.
pub struct Forwarder {
    /// What was compiled, at the first use.
    built: OnceCell<TempDir>,
}

impl Forwarder {
    /// One that is not compiled yet.
    pub fn new() -> Self {
        Self { built: OnceCell::new() }
    }

    fn built(&self) -> Result<&TempDir> {
        if self.built.get().is_none() {
            let folder = leftovers::folder()?;
            fs::write(folder.path().join("forward.h"), PROTOCOL)?;
            for (name, text) in SOURCES {
                let source = format!("{name}.c");
                fs::write(folder.path().join(&source), text)?;
                let mut compile = Command::new("cc");
                compile.args(["-O2", "-Wall", "-pthread", "-o", name, &source]).current_dir(folder.path());
                if name == "forward" {
                    compile.args(["-shared", "-fPIC", "-ldl"]);
                }
                command_ok(&mut compile)?;
            }
            self.built.set(folder).map_err(|_| anyhow!("compiled twice"))?;
        }
        self.built.get().context("compiled above")
    }
}

impl Peer for Forwarder {
    fn name(&self) -> &'static str {
        "LD_PRELOAD forwarder"
    }

    fn kind(&self) -> &'static str {
        "waits for a second write in each call, no fsync there"
    }

    fn tools(&self) -> &'static [Tool] {
        &[("cc", "gcc libc6-dev", "compiles the forwarder of `bench peers`")]
    }

    fn begin(&self, world: &mut World, cpu: Option<usize>) -> Result<Begun> {
        let built = self.built()?.path().to_owned();
        let copy = world.store.join("copy");
        fs::create_dir_all(&copy)?;
        let socket = world.root().join("forward.sock");
        let script =
            format!("exec '{}/receive' '{}' '{}'", built.display(), socket.display(), copy.display());
        let receiver = daemon(world, cpu, &script)?;
        until("the receiver", SOON, || socket.exists().then_some(()))?;
        let before = vec![
            "env".to_owned(),
            format!("FORWARD_SOCKET={}", socket.display()),
            format!("FORWARD_BELOW={}", world.place.data.display()),
            format!("LD_PRELOAD={}/forward", built.display()),
        ];
        Ok(Begun { before, copy: Some(copy), guard: Box::new(receiver) })
    }
}
