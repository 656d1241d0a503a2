//! `strace -f` of the calls that have to do with files, thrown away: what it costs to look at a program by ptrace.

use anyhow::Result;
use bfs_tests::world::World;

use super::{Begun, Peer};
use crate::setup::Tool;

/// See the module.
pub struct Strace;

impl Peer for Strace {
    fn name(&self) -> &'static str {
        "strace -f"
    }

    fn kind(&self) -> &'static str {
        "stops the program at each call, keeps no copy"
    }

    fn copies(&self) -> bool {
        false
    }

    fn tools(&self) -> &'static [Tool] {
        &[("strace", "strace", "a peer in `bench peers`")]
    }

    fn begin(&self, _: &mut World, cpu: Option<usize>) -> Result<Begun> {
        let mut before = Vec::new();
        if let Some(cpu) = cpu {
            before.extend(["taskset".to_owned(), "-c".to_owned(), cpu.to_string()]);
        }
        // Calls that are not asked for do not stop the program.
        let words = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=%file,%desc", "-o", "/dev/null"];
        before.extend(words.map(str::to_owned));
        Ok(Begun { before, copy: None, guard: Box::new(()) })
    }
}
