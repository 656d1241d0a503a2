//! Checkpoints that are kept: each one that is given back is the primary as it was then, also
//! when the replayer was killed in between, and with or without a replayer that serves the store.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bfs_tests::programs::Program;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::names::RandomNames;
use bfs_tests::random::{Random, given_seed};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, binary, command_ok, rounds};
use bfs_tests::{copy, oracle};
use serde_json::Value;

/// Restores a checkpoint and compares it with the copy of the primary.
fn restored_equals(world: &World, at: &str, then: &Path) {
    let to = world.scratch.join(format!("restored-{}", at.replace(':', "-")));
    let mut restore = Command::new(binary("bfs-replayer"));
    restore.args(["restore", "--group", &world.group, "--at", at, "--store"]).arg(&world.store).arg(&to);
    command_ok(&mut restore).unwrap();
    let below = world.place.data.strip_prefix("/").unwrap();
    let differences = oracle::compare(then, &to.join(below)).unwrap();
    assert_eq!(differences, Vec::<String>::new(), "checkpoint {at}");
    fs::remove_dir_all(&to).unwrap();
}

/// `diff` of two checkpoints names every path that differs between their copies, or a directory above it that
/// got another name; and where the copies are equal, nothing.
fn differences_are_told(world: &World, (older, then): &(u64, PathBuf), (newer, now): &(u64, PathBuf)) {
    let mut diff = Command::new(binary("bfs-replayer"));
    diff.args(["diff", "--json", "--group", &world.group, "--store"]).arg(&world.store);
    let said = command_ok(diff.args([older.to_string(), newer.to_string()])).unwrap().stdout;
    let said: Vec<Value> = serde_json::from_slice(&said).unwrap();
    let mut named = Vec::new();
    for side in said.iter().flat_map(|d| [&d["before"], &d["after"]]) {
        let paths = side["paths"].as_array().into_iter().flatten();
        named.extend(paths.map(|path| PathBuf::from(path.as_str().unwrap())));
    }
    let differ = oracle::compare(then, now).unwrap();
    assert_eq!(said.is_empty(), differ.is_empty(), "{older} to {newer}: {said:?} {differ:?}");
    for line in differ.iter().take(oracle::LISTED_MAX) {
        let path = world.place.data.join(line.split(": ").next().unwrap().trim_start_matches("./"));
        let path = if path.ends_with(".") { world.place.data.clone() } else { path };
        assert!(named.iter().any(|n| path.starts_with(n)), "{older} to {newer}: {line}, named are {named:?}");
    }
}

fn generations(world: &World) -> Vec<Value> {
    let mut list = Command::new(binary("bfs-replayer"));
    list.args(["generations", "--json", "--group", &world.group, "--store"]).arg(&world.store);
    let said = command_ok(&mut list).unwrap().stdout;
    serde_json::from_slice::<Value>(&said).unwrap().as_array().unwrap().clone()
}

/// Checkpoints with the program stopped and copied, others between them, kills between them too.
fn all_are_given_back(program: &dyn Program, transport: Transport) {
    let mut world = World::new(&format!("generations-{}", program.name()), transport).unwrap();
    world.start(program, How::Run).unwrap();
    let mut moments = Random::new(given_seed().unwrap_or(20_261_121));
    let mut copies: Vec<(u64, PathBuf)> = Vec::new();
    for index in 0..rounds(6, 30) {
        let at = world.scratch.join(format!("then-{index}"));
        let number = world.checkpoint_stopped(&copy::command(&world.place.data, &at)).unwrap();
        copies.push((number, at));
        // One that nobody copied lies between them.
        world.checkpoint_until("sealed").unwrap();
        if index % 2 == 1 {
            // The moment of the kill is what is tested: in the log, in an image, in a step.
            std::thread::sleep(Duration::from_millis(moments.below(60) as u64));
            world.kill_replayer().unwrap();
            world.start_replayer().unwrap();
        }
        let (number, at) = moments.of(&copies).clone();
        until("the replayer to go on", SOON, || {
            let known = generations(&world);
            known.iter().any(|g| g["checkpoint"].as_u64() == Some(number)).then_some(())
        })
        .unwrap();
        restored_equals(&world, &number.to_string(), &at);
    }
    world.finish().unwrap();
    for (number, at) in &copies {
        restored_equals(&world, &number.to_string(), at);
    }
    for pair in copies.windows(2) {
        differences_are_told(&world, &pair[0], &pair[1]);
    }
    differences_are_told(&world, &copies[0], &copies[copies.len() - 1]);
    // Without an owner the store is read by the command itself.
    world.kill_replayer().unwrap();
    for (number, at) in &copies {
        restored_equals(&world, &number.to_string(), at);
    }
}

#[test]
fn names_that_change() {
    all_are_given_back(&RandomNames, Transport::Unix);
}

#[test]
fn files_that_grow() {
    all_are_given_back(&AppendWriters, Transport::Tcp);
}
