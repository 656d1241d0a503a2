//! Whom the agent follows: cgroups, and tasks that are moved in and out of them.

use std::fs;
use std::path::Path;

use bfs_tests::exercise;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World};

/// Appends to files of its own and makes further ones in children, from the moment that `$2/go-NAME` is
/// there; says so with `$2/at-work-NAME`.
fn writer(name: &str) -> String {
    format!(
        "while [ ! -e \"$2/go-{name}\" ]; do sleep 0.01; done; i=0
         while [ ! -e \"$2/stop\" ]; do
             i=$((i + 1)); echo \"{name} $i\" >> \"$1/{name}\"
             (echo \"$i\" > \"$1/{name}-$((i % 7))\"; mv \"$1/{name}-$((i % 7))\" \"$1/{name}-moved\")
             [ $i -lt 20 ] || : > \"$2/at-work-{name}\"
         done"
    )
}

fn go(world: &World, name: &str) {
    fs::write(world.place.aux.join(format!("go-{name}")), "").unwrap();
    let at_work = world.place.aux.join(format!("at-work-{name}"));
    until(&format!("writer {name}"), SOON, || at_work.exists().then_some(())).unwrap();
}

fn enter(cgroup: &Path, pid: u32) {
    fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
}

fn selected(world: &World) -> u64 {
    world.status_number(&["selected_threads"]).unwrap()
}

#[test]
fn a_cgroup_is_followed_with_those_who_come_and_without_those_who_leave() {
    let mut world = World::new("cgroup", Transport::Unix).unwrap();
    let followed = world.cgroup("followed").unwrap();
    let nested = world.cgroup("followed/nested").unwrap();
    let outside = world.cgroup("outside").unwrap();
    world.start_replayer().unwrap();
    let mut first = world.spawn_shell(&writer("first")).unwrap();
    enter(&nested, first.id());
    go(&world, "first");
    let mut later = world.spawn_shell(&writer("later")).unwrap();
    enter(&outside, later.id());
    world.attach_to(&["--cgroup", &followed.display().to_string()]).unwrap();
    exercise::stopped(&world, 0).unwrap();

    // Who is moved in is followed from the moment that the move is done.
    enter(&followed, later.id());
    go(&world, "later");
    for index in 1..5 {
        exercise::stopped(&world, index).unwrap();
    }

    // Who is moved out is not, when his call has ended.
    enter(&outside, later.id());
    fs::write(nested.join("cgroup.freeze"), "1").unwrap();
    until("the one who left to be forgotten", SOON, || (selected(&world) <= 2).then_some(())).unwrap();
    fs::write(nested.join("cgroup.freeze"), "0").unwrap();

    // What its owner froze before our stop stays frozen.
    fs::write(followed.join("cgroup.freeze"), "1").unwrap();
    let frozen = || fs::read_to_string(followed.join("cgroup.events")).unwrap().contains("frozen 1");
    until("the cgroup to stand", SOON, || frozen().then_some(())).unwrap();
    world.checkpoint_stopped(&["true".to_owned()]).unwrap();
    assert!(frozen());
    fs::write(followed.join("cgroup.freeze"), "0").unwrap();

    // A successor goes on with the same cgroup.
    world.kill_agent().unwrap();
    world.resume().unwrap();
    fs::write(world.place.stop(), "").unwrap();
    assert!(first.wait().unwrap().success() && later.wait().unwrap().success());
    assert!(followed.exists(), "it is not ours");
    world.stop_agent().unwrap();
    assert!(followed.exists(), "it is not ours");
}

#[test]
fn a_cgroup_that_the_agent_is_in_or_that_is_none_is_refused() {
    let mut world = World::new("cgroup-refused", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let own = world.leash_cgroup();
    let (path, backup) = (world.place.data.display().to_string(), world.destination());
    for (cgroup, why) in [(own.as_str(), "this agent is in it"), ("/tmp", "not a cgroup v2")] {
        let words = ["attach", "--path", &path, "--backup", &backup, "--cgroup", cgroup];
        let done = world.agent_command(&words, SOON).unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(64), "{said}");
        assert!(said.contains(why), "{said}");
    }
}
