//! `attach --cgroup --with-process`: process state of programs that nobody's agent began, under the numbers that they have among all
//! others. Who is in the way is named, and the program goes on.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bfs_tests::hosts::Hosts;
use bfs_tests::processes::{
    STANDS, attach, attached, close_others, counted_in, counted_lines, counted_loosely, criu_that,
    ends_right, host_options, images, on_backup, progress, rollback, script,
};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World};

/// The command line makes no sense.
const USAGE: i32 = 64;
/// It was given up: `bfs-agent --help`.
const GIVEN_UP: i32 = 73;

/// The next checkpoint that has processes, on the backup as well.
fn tagged(world: &World, tag: &str) {
    let before = images(world).0;
    until("a dump", SOON, || (images(world).0 > before).then_some(())).unwrap();
    let done = world.agent_command(&["checkpoint", "--tag", tag, "--wait", "applied"], SOON).unwrap();
    assert!(done.status.success(), "{done:?}");
}

fn failure(world: &World) -> String {
    world.status().unwrap()["process"]["failure"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn who_runs_already_goes_back_with_its_files() {
    let (mut world, _) = attached("attached-counter", "counter.py", &["--process-keep", "50"]);
    let pid = world.program_pid().unwrap();
    tagged(&world, "here");
    let had = counted_loosely(&world);
    for round in 0..3 {
        // It runs on while it is looked at.
        until("progress", SOON, || (counted_loosely(&world) > had + 1000).then_some(())).unwrap();
        let done = rollback(&world, &["--to", "tag:here"]);
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success() && said.contains("the processes run"), "{round}: {said} {done:?}");
        let now = counted_loosely(&world);
        println!("{round}: from beyond {} to {now}, and it was {had}", had + 1000);
        assert!(now < had + 1000, "{round}");
        assert!(world.program_runs(), "under its number, {pid}");
    }
    let (dumped, failed, restored) = images(&world);
    println!("{dumped} dumps, {failed} failed, {restored} restored: {}", failure(&world));
    assert_eq!((failed, restored), (0, 3));
    // Also what was restored is dumped, and brought to the backup.
    tagged(&world, "again");
    progress(&world);
    let done = rollback(&world, &["--to", "tag:again"]);
    assert!(done.status.success(), "{done:?}");
    let all = on_backup(&world);
    assert!(all.iter().any(|(_, bytes)| bytes.is_some_and(|bytes| bytes > 1 << 20)), "{all:?}");
    // It was never the agent's: when that ends it goes on.
    world.stop_agent().unwrap();
    progress(&world);
    let cgroup = Path::new(&world.leash_cgroup()).join("apart").display().to_string();
    world.attach_to(&["--cgroup", &cgroup]).unwrap();
    tagged(&world, "then");
    progress(&world);
    assert!(rollback(&world, &["--to", "tag:then"]).status.success());
    assert!(ends_right(&mut world) > had);
}

/// A process of the test with a number that the test chooses; it ends with it.
struct Taken(i32);

impl Taken {
    fn take(number: i32) -> Self {
        let set = [number];
        // SAFETY: all zeros are a value of this type.
        let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
        how.exit_signal = libc::SIGCHLD as u64;
        (how.set_tid, how.set_tid_size) = (set.as_ptr() as u64, 1);
        // SAFETY: a child as of fork(2), which makes system calls only.
        let made = unsafe { libc::syscall(libc::SYS_clone3, &raw const how, size_of_val(&how)) };
        if made == 0 {
            // SAFETY: as said; the child never comes back from here.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::pause();
                }
            }
        }
        assert_eq!(made, i64::from(number), "{}", std::io::Error::last_os_error());
        Self(number)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // SAFETY: a child of ours that was not waited for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

/// A number that is needed has somebody else: nothing is ended, and that one is named.
#[test]
fn a_number_that_is_somebody_elses_is_found_before_anything_is_ended() {
    let (mut world, cgroup) = attached("attached-taken", "family.py", &["--process-keep", "50"]);
    tagged(&world, "both");
    let child: i32 = fs::read_to_string(world.place.aux.join("child")).unwrap().trim().parse().unwrap();
    fs::write(world.place.aux.join("leave"), "").unwrap();
    until("the child's end", SOON, || world.place.aux.join("left").exists().then_some(())).unwrap();
    tagged(&world, "alone");
    let taken = Taken::take(child);
    let had = counted_loosely(&world);
    let restored = images(&world).2;
    let done = rollback(&world, &["--to", "tag:both"]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(GIVEN_UP), "{said}");
    let named = format!("number {child} is needed, and process {child} (");
    assert!(said.contains(&named) && said.contains(") has it"), "{said}");
    assert!(counted_loosely(&world) >= had && images(&world).2 == restored);
    progress(&world);
    // What does not need it can be gone back to.
    let done = rollback(&world, &["--to", "tag:alone"]);
    assert!(done.status.success(), "{done:?}");
    drop(taken);
    fs::remove_file(world.place.aux.join("leave")).unwrap();
    // The later one is not there any more; the earlier one is, and nobody is in its way now.
    let done = rollback(&world, &["--to", "tag:both"]);
    assert!(done.status.success(), "{done:?}");
    let there = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    assert!(there.lines().any(|pid| pid == child.to_string()), "{there}");
    progress(&world);
    ends_right(&mut world);
}

/// A frozen cgroup takes nobody in; also that is found first.
#[test]
fn a_cgroup_that_its_owner_froze_is_left_alone() {
    let (mut world, cgroup) = attached("attached-frozen", "counter.py", &[]);
    tagged(&world, "here");
    fs::write(cgroup.join("cgroup.freeze"), "1").unwrap();
    let done = rollback(&world, &[]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("frozen"), "{said}");
    fs::write(cgroup.join("cgroup.freeze"), "0").unwrap();
    progress(&world);
    ends_right(&mut world);
}

/// Whoever manages the program starts it anew as soon as it has ended.
#[test]
fn who_comes_into_the_cgroup_meanwhile_is_named() {
    let (mut world, cgroup) = attached("attached-manager", "counter.py", &[]);
    tagged(&world, "here");
    // It starts another one as often as none is there.
    let script = format!(
        "while :; do if grep -q 'populated 0' {0}/cgroup.events; then \
         sh -c 'echo $$ > {0}/cgroup.procs; exec sleep 1000'; fi; done",
        cgroup.display()
    );
    let mut manager = world.spawn_shell(&script).unwrap();
    let done = rollback(&world, &[]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    println!("{said}");
    assert!(!done.status.success(), "{said}");
    assert!(said.contains("has come into the cgroup"), "{said}");
    assert!(said.contains("the same command makes them again"), "{said}");
    assert!(!world.program_runs());
    manager.kill().unwrap();
    manager.wait().unwrap();
    // What it started is ended as any that is in the cgroup.
    let done = rollback(&world, &[]);
    assert!(done.status.success(), "{done:?}");
    progress(&world);
    ends_right(&mut world);
}

/// What is no tree of its own has files only, and each time it is said why.
#[test]
fn what_cannot_be_one_tree_has_files_only() {
    let (mut world, cgroup) = attached("attached-roots", "counter.py", &[]);
    let procs = cgroup.join("cgroup.procs");
    let because = |world: &World, why: &str| {
        until(why, SOON, || failure(world).contains(why).then_some(())).unwrap();
        println!("{}", failure(world));
        let taken = world.checkpoint().unwrap();
        let kept = world.status().unwrap()["process"]["kept"].clone();
        assert!(!kept.as_array().unwrap().iter().any(|at| at.as_u64() == Some(taken)), "{taken} {kept}");
    };
    let again = |world: &World| {
        let before = images(world).0;
        until("dumps again", SOON, || (images(world).0 > before + 1).then_some(())).unwrap();
    };
    let mut other = world.spawn_shell("exec sleep 1000").unwrap();
    fs::write(&procs, other.id().to_string()).unwrap();
    because(&world, "have no common ancestor in the cgroup");
    other.kill().unwrap();
    other.wait().unwrap();
    again(&world);

    let below = cgroup.join("below");
    fs::create_dir(&below).unwrap();
    let pid = world.program_pid().unwrap().to_string();
    fs::write(below.join("cgroup.procs"), &pid).unwrap();
    because(&world, "is in a cgroup below");
    fs::write(&procs, &pid).unwrap();
    again(&world);

    let mut other = world.spawn_shell("exec unshare --pid --fork --kill-child sleep 1000").unwrap();
    fs::remove_dir(&below).unwrap();
    let inner = format!("/proc/{0}/task/{0}/children", other.id());
    let inner = until("its child", SOON, || {
        let child = fs::read_to_string(&inner).ok()?.trim().to_owned();
        let name = fs::read_to_string(format!("/proc/{child}/comm")).ok()?;
        (name == "sleep\n").then_some(child)
    });
    fs::write(&procs, inner.unwrap()).unwrap();
    because(&world, "PID namespace");
    other.kill().unwrap();
    other.wait().unwrap();
    again(&world);

    ends_right(&mut world);
}

#[test]
fn without_a_cgroup_of_their_own_they_are_not_dumped_and_that_is_said() {
    let world = World::new("attached-pid", Transport::Unix).unwrap();
    let (path, backup) = (world.place.data.display().to_string(), world.destination());
    for whom in [&["--pid", "1"][..], &["--everyone"]] {
        let words = ["attach", "--with-process", "--path", &path, "--backup", &backup];
        let words: Vec<_> = words.iter().chain(whom).copied().collect();
        let done = world.agent_command(&words, SOON).unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(USAGE), "{said}");
        assert!(said.contains("needs --cgroup") && said.contains("cgroup.procs"), "{said}");
    }
}

/// The agent is killed: its successor keeps process state again, of who was restored by the one before.
#[test]
fn a_successor_keeps_process_state_again() {
    let (mut world, cgroup) = attached("attached-successor", "counter.py", &["--process-keep", "50"]);
    tagged(&world, "here");
    assert!(rollback(&world, &[]).status.success());
    progress(&world);
    world.kill_agent().unwrap();
    progress(&world);
    world.attach_to(&["--resume", "--cgroup", &cgroup.display().to_string()]).unwrap();
    tagged(&world, "then");
    let had = counted_loosely(&world);
    until("progress", SOON, || (counted_loosely(&world) > had + 100).then_some(())).unwrap();
    let done = rollback(&world, &["--to", "tag:then"]);
    assert!(done.status.success(), "{done:?}");
    progress(&world);
    ends_right(&mut world);
}

/// The agent dies in a dump: CRIU leaves the cgroup frozen as it found it, and nobody else of the agent's is left who would thaw it.
#[test]
fn who_runs_already_goes_on_when_the_agent_dies_in_a_dump() {
    let mut world = World::new("attached-dies", Transport::Unix).unwrap();
    let criu = criu_that(&world.scratch, "dump", STANDS);
    let cgroup = attach(&mut world, criu.to_str().unwrap(), "counter.py", &[]);
    until("a dump", SOON, || (images(&world).0 > 1).then_some(())).unwrap();
    let (hold, held) = (world.scratch.join("hold"), world.scratch.join("held"));
    fs::write(&hold, "").unwrap();
    until("a dump half way", SOON, || held.exists().then_some(())).unwrap();
    world.kill_agent().unwrap();
    // CRIU holds it still, or the guard has thawed it already.
    std::thread::sleep(Duration::from_millis(200));
    fs::remove_file(&hold).unwrap();
    progress(&world);
    world.attach_to(&["--resume", "--cgroup", &cgroup.display().to_string()]).unwrap();
    tagged(&world, "then");
    progress(&world);
    assert!(rollback(&world, &[]).status.success());
    progress(&world);
    ends_right(&mut world);
}

/// The primary dies: what it had attached to goes on on the host of the backup, in namespaces of its own.
#[test]
fn who_ran_already_goes_on_on_the_other_host() {
    let mut hosts = Hosts::both_ways("attached-hosts").unwrap();
    let cgroup = hosts.cgroup("apart").unwrap();
    let place = hosts.a.place.clone();
    let mut program = hosts.a.command("setsid");
    // Its standard streams are of this host's mounts.
    program.args([
        "-f",
        "sh",
        "-c",
        "echo 0 > \"$1\" && shift && exec \"$@\" < /dev/null > /dev/null 2>&1",
        "sh",
    ]);
    program.arg(cgroup.join("cgroup.procs")).arg("python3").arg(script("counter.py"));
    hosts.said(close_others(program.args([&place.data, &place.aux]))).unwrap();
    let mut attach = hosts.agent("a", "attach");
    attach.args(["--with-process", "--process-dir"]).arg(hosts.a.own.join("images"));
    attach.arg("--cgroup").arg(&cgroup).arg("--path").arg(&place.data);
    attach.args(["--backup", &hosts.b.destination()]).args(host_options(&hosts, "a"));
    hosts.start("a", attach).unwrap();
    let status = |hosts: &Hosts, name: &str| hosts.status(name).map(|status| status["process"].clone());
    let shipped = |hosts: &Hosts, name: &str| status(hosts, name).ok()?["shipped"].as_u64();
    until("process state on the backup", SOON, || shipped(&hosts, "a").filter(|last| *last > 2)).unwrap();
    let log_a = hosts.a.data().join("log");
    hosts.kill_agent("a").unwrap();
    fs::write(cgroup.join("cgroup.kill"), "1").unwrap();
    let ended = || fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|e| e.contains("populated 0"));
    until("the program's end", SOON, || ended().then_some(())).unwrap();
    let had = counted_in(&log_a);

    let mut promote = hosts.replayer("b", "promote");
    promote.args(["--to", "/", "--with-process", "--process-dir"]).arg(hosts.b.own.join("images"));
    promote.args(["--", "--backup", &hosts.a.destination()]).args(host_options(&hosts, "b"));
    hosts.start("b", promote).unwrap();
    let log_b = hosts.b.data().join("log");
    until("progress on b", SOON, || (counted_lines(&log_b) > had + 100).then_some(())).unwrap();
    until("process state back on a", SOON, || shipped(&hosts, "b").filter(|last| *last > 0)).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    fs::write(place.stop(), "").unwrap();
    assert_eq!(hosts.ended("b").unwrap(), 0);
    assert!(counted_in(&log_b) > had + 100);
}
