//! Programs whose processes are dumped and restored, under `bfs-agent run --with-process`, or attached to.
//!
//! They count, in memory and in a log: at the end it has each number once, with the sum that only memory knew.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use crate::copy;
use crate::exercise;
use crate::hosts::Hosts;
use crate::stores;
use crate::watch::{SOON, until};
use crate::world::{Transport, World, binary};

/// CRIU as `cargo xtask setup --criu` provides it.
///
/// # Panics
/// When that was not run.
#[must_use]
pub fn criu() -> String {
    let built = binary("bfs-agent");
    let beside = built.ancestors().map(|folder| folder.join("criu/criu")).find(|path| path.exists());
    beside.expect("`cargo xtask setup --criu` was run").display().to_string()
}

/// A CRIU of which each `dump`, or each `restore`, begins with these lines of shell; `$folder` has room for marks.
///
/// # Panics
/// When it cannot be written.
#[must_use]
pub fn criu_that(folder: &Path, what: &str, begins: &str) -> PathBuf {
    let program = folder.join("criu");
    let text = format!(
        "#!/bin/sh\ncriu={}\nfolder={}\nif [ \"$1\" = {what} ]; then\n{begins}\nfi\nexec $criu \"$@\"\n",
        criu(),
        folder.display()
    );
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

/// Once the mark `hold` is there, CRIU stands in the middle of a dump until it is gone.
pub const STANDS: &str = "\
if [ -e $folder/hold ]; then
    $criu \"$@\" &
    pid=$!
    while [ -d /proc/$pid ] && ! ls $folder/../images/*/unfinished/pages-*.img; do :; done
    kill -STOP $pid
    touch $folder/held
    while [ -e $folder/hold ]; do sleep 0.02; done
    kill -CONT $pid
    wait $pid
    exit
fi";

/// One of the programs; argv: data aux.
#[must_use]
pub fn script(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs/process").join(name)
}

/// What the command executes has the standard streams only: who runs the tests may have given them more, pipes to others
/// among it.
pub fn close_others(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only close_range(2) is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            let flag = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
            if libc::close_range(3, u32::MAX, flag) == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        })
    }
}

/// One of the programs under an agent, with checkpoints by time.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn started(name: &str, program: &str, more: &[&str]) -> World {
    started_by(&criu(), name, program, more)
}

/// The same with this CRIU.
///
/// # Panics
/// As [`started`].
#[must_use]
pub fn started_by(criu: &str, name: &str, program: &str, more: &[&str]) -> World {
    let mut world = World::new(name, Transport::Unix).unwrap();
    start(&mut world, criu, program, more);
    world
}

/// The same in a world that is there already.
///
/// # Panics
/// As [`started`].
pub fn start(world: &mut World, criu: &str, program: &str, more: &[&str]) {
    prepare(world, criu, more);
    world.run(&line(world, program)).unwrap();
}

/// One of the programs, which nobody's agent began: it runs in a cgroup of its own, and half way an agent attaches to that.
///
/// # Panics
/// When something does not come.
#[must_use]
pub fn attached(name: &str, program: &str, more: &[&str]) -> (World, PathBuf) {
    let mut world = World::new(name, Transport::Unix).unwrap();
    let cgroup = attach(&mut world, &criu(), program, more);
    (world, cgroup)
}

/// The same in a world that is there already, with this CRIU.
///
/// # Panics
/// As [`attached`].
pub fn attach(world: &mut World, criu: &str, program: &str, more: &[&str]) -> PathBuf {
    let cgroup = world.start_apart(&line(world, program)).unwrap();
    until("the program half way", SOON, || (counted_loosely(world) > 50).then_some(())).unwrap();
    prepare(world, criu, more);
    world.attach_to(&["--cgroup", &cgroup.display().to_string()]).unwrap();
    cgroup
}

fn line(world: &World, program: &str) -> Vec<String> {
    let line = ["python3".to_owned(), script(program).display().to_string()];
    let places = [&world.place.data, &world.place.aux].map(|place| place.display().to_string());
    line.into_iter().chain(places).collect()
}

/// Agents have these options from now on, and there is a replayer.
fn prepare(world: &mut World, criu: &str, more: &[&str]) {
    world.checkpoints("every=150ms");
    let images = world.root().join("images").display().to_string();
    let mut options = vec!["--with-process", "--criu", criu, "--process-dir", &images];
    options.extend(more);
    world.agent_options(&options);
    world.start_replayer().unwrap();
}

/// The log goes from 1 without a gap or a repetition, and what memory knew is right on each line; how many there are.
///
/// # Panics
/// When it is not so.
pub fn counted(world: &World) -> u64 {
    counted_in(&world.place.data.join("log"))
}

/// The same of this log.
///
/// # Panics
/// As [`counted`].
pub fn counted_in(log: &Path) -> u64 {
    let (mut count, mut total) = (0u64, 0u64);
    for line in fs::read_to_string(log).unwrap().lines() {
        count += 1;
        total += count;
        assert_eq!(line, format!("{count} {total}"), "{}", log.display());
    }
    count
}

/// Of the process images: how many dumps came about, how many did not, how often they were restored.
///
/// # Panics
/// When the agent does not say it.
#[must_use]
pub fn images(world: &World) -> (u64, u64, u64) {
    let status = world.status().unwrap();
    let number = |name: &str| status["process"][name].as_u64().unwrap_or_else(|| panic!("{name}: {status}"));
    (number("dumped"), number("failed"), number("restored"))
}

/// A checkpoint with the program stopped has what stood there meanwhile, whatever checkpoints come behind it.
///
/// # Panics
/// When it has not.
pub fn stopped(world: &World) {
    let then = world.scratch.join("stopped");
    let number = world.checkpoint_stopped(&copy::command(&world.place.data, &then)).unwrap();
    stores::restored_equals(world, &world.store, number, &then);
    fs::remove_dir_all(&then).unwrap();
}

/// Ends the command, and waits until it is restored.
///
/// # Panics
/// When it is not.
pub fn kill(world: &World, restored: u64) {
    let pid = world.program_pid().unwrap();
    // SAFETY: a process of this world.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    until("the program to be restored", SOON, || (images(world).2 > restored).then_some(())).unwrap();
}

/// The program goes on: it counts.
///
/// # Panics
/// When it does not.
pub fn progress(world: &World) {
    let at = counted_loosely(world);
    until("the program to go on", SOON, || (counted_loosely(world) > at + 20).then_some(())).unwrap();
}

/// The log is right, and the backup is equal; how many lines there are.
///
/// # Panics
/// When it is not so.
pub fn is_right(world: &World) -> u64 {
    let count = counted(world);
    exercise::equal(world).unwrap();
    count
}

/// The program is told to end, and found itself right; then as [`is_right`].
///
/// # Panics
/// When it is not so.
pub fn ends_right(world: &mut World) -> u64 {
    assert!(world.finish().unwrap().success(), "the program found itself wrong");
    is_right(world)
}

/// `bfs-agent rollback`, with these words behind those that it needs.
///
/// # Panics
/// When it does not end.
#[must_use]
pub fn rollback(world: &World, more: &[&str]) -> Output {
    let words = rollback_words(world);
    let words = words.iter().map(String::as_str).chain(more.iter().copied());
    world.agent_command(&words.collect::<Vec<_>>(), SOON).unwrap()
}

/// The same, which is not waited for.
///
/// # Panics
/// When it does not start.
#[must_use]
pub fn begin_rollback(world: &World) -> Child {
    world.spawn_agent_command(&rollback_words(world).each_ref().map(String::as_str)).unwrap()
}

fn rollback_words(world: &World) -> [String; 5] {
    let path = world.place.data.display().to_string();
    ["rollback".into(), "--path".into(), path, "--backup".into(), world.destination()]
}

/// Has a store's processes go on from their last checkpoint, in a directory of its own. They were told to end: they do, as soon as
/// they are restored and have found themselves right. How many lines the log has.
///
/// # Panics
/// When it is not so.
pub fn promoted(world: &World, store: &Path) -> u64 {
    let place = |name: &str| world.scratch.join(name).display().to_string();
    let (to, folder, spool, criu) = (place("promoted"), place("images"), place("spool"), criu());
    let (store, backup) = (store.display().to_string(), format!("dir:{}", place("other")));
    fs::create_dir(&to).unwrap();
    let words = ["promote", "--store", &store, "--group", &world.group, "--to", &to, "--with-process"];
    let more = ["--process-dir", &folder, "--", "--backup", &backup, "--criu", &criu, "--spool", &spool];
    let mut promote = world.spawn_replayer_command(&[&words[..], &more].concat()).unwrap();
    assert!(promote.wait().unwrap().success());
    let said = fs::read_to_string(world.logs().join("replayer-commands.log")).unwrap();
    assert!(said.contains("go on from checkpoint"), "{said}");
    let log = Path::new(&to).join(world.place.data.strip_prefix("/").unwrap()).join("log");
    counted_in(&log)
}

/// What agents on a host need for process state, with checkpoints by time.
#[must_use]
pub fn host_options(hosts: &Hosts, name: &str) -> Vec<String> {
    let own = &hosts.host(name).own;
    let folder = |sub: &str| own.join(sub).display().to_string();
    let words = ["--checkpoint", "every=150ms", "--criu", &criu(), "--keys", &folder("keys"), "--spool"];
    words.iter().map(|word| (*word).to_owned()).chain([folder("spool")]).collect()
}

/// Lines of the log just now.
#[must_use]
pub fn counted_loosely(world: &World) -> u64 {
    counted_lines(&world.place.data.join("log"))
}

/// Lines of a log just now.
#[must_use]
pub fn counted_lines(log: &Path) -> u64 {
    fs::read(log).unwrap_or_default().iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Checkpoints that the backup has, each with the bytes of the process state that it has of it.
///
/// # Panics
/// When the replayer does not say it.
#[must_use]
pub fn on_backup(world: &World) -> Vec<(u64, Option<u64>)> {
    let said = world.of_replayer(&["generations", "--json", "--group", &world.group]).unwrap();
    let all: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    let line = |g: &serde_json::Value| (g["checkpoint"].as_u64().unwrap(), g["process"].as_u64());
    all.as_array().unwrap().iter().map(line).collect()
}
