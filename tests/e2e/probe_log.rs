//! Diagnostics of the probes: asked for, they stand in the agent's log; else nothing is said.

use std::process::Command;

use bfs_tests::world::{Transport, World, binary};

/// What the agent says while a command writes a file.
fn said(world: &World, level: &str) -> String {
    let store = world.scratch.join("store");
    let backup = format!("dir:{}", store.display());
    let done = Command::new(binary("bfs-agent"))
        .args(["run", "--group", &world.group, "--checkpoint", "manual", "--path"])
        .arg(&world.place.data)
        .args(["--backup", &backup, "--", "/bin/sh", "-c", "echo something > \"$0/file\""])
        .arg(&world.place.data)
        .env("BFS_LOG", level)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    said
}

#[test]
fn what_the_probes_log_stands_in_the_agents_log() {
    let world = World::new("probe-log", Transport::Unix).unwrap();
    let calls = said(&world, "warn,bfs_agent::primary::capture::log=trace");
    assert!(calls.contains("call 1 of thread ") && calls.contains(" ended with 10"), "no write: {calls}");
    assert!(calls.contains(" has ended"), "no end of a thread: {calls}");
    let threads = said(&world, "warn,bfs_agent::primary::capture::log=debug");
    assert!(threads.contains(" has ended") && !threads.contains("call 1 of"), "{threads}");
    let nothing = said(&world, "warn");
    assert!(!nothing.contains("thread"), "{nothing}");
}
