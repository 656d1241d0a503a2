//! What stores say and give back, by the commands.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::oracle;
use crate::watch::{SOON, until};
use crate::world::{World, binary, command_ok};

/// `bfs-replayer WORDS... --store STORE`.
#[must_use]
pub fn replayer(words: &[&str], store: &Path) -> Command {
    let mut command = Command::new(binary("bfs-replayer"));
    command.args(words).arg("--store").arg(store);
    command
}

/// The checkpoints that a store keeps of the world's group.
///
/// # Panics
/// When it does not say so.
#[must_use]
pub fn kept(world: &World, store: &Path) -> Vec<u64> {
    let said =
        command_ok(&mut replayer(&["generations", "--json", "--group", &world.group], store)).unwrap().stdout;
    let said: Value = serde_json::from_slice(&said).unwrap();
    said.as_array().unwrap().iter().map(|line| line["checkpoint"].as_u64().unwrap()).collect()
}

/// Restored from a store a checkpoint equals the copy.
///
/// # Panics
/// When it does not.
pub fn restored_equals(world: &World, store: &Path, number: u64, then: &Path) {
    let to = world.scratch.join("restored");
    let at = number.to_string();
    let mut restore = replayer(&["restore", "--group", &world.group, "--at", &at], store);
    command_ok(restore.arg(&to)).unwrap();
    let differences = oracle::compare(then, &to.join(below(world))).unwrap();
    assert_eq!(differences, Vec::<String>::new(), "checkpoint {number} of {}", store.display());
    fs::remove_dir_all(&to).unwrap();
}

/// Where the primary's directory stands below a place that something was restored to.
///
/// # Panics
/// Never: the directory has an absolute path.
#[must_use]
pub fn below(world: &World) -> PathBuf {
    world.place.data.strip_prefix("/").unwrap().to_owned()
}

/// A store that nobody owns has no damage.
///
/// # Panics
/// When it has.
pub fn is_sound(store: &Path) {
    command_ok(&mut replayer(&["check", "--read-data"], store)).unwrap();
}

/// Waits until the destination of that index has applied a checkpoint.
///
/// # Panics
/// When it does not.
pub fn has(world: &World, at: usize, number: u64) {
    until(&format!("checkpoint {number} at destination {at}"), SOON, || {
        let status = world.status().ok()?;
        (status["destinations"][at]["applied"].as_u64()? >= number).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:#}", world.status().unwrap()["destinations"]));
}
