//! Whom the agent follows: cgroups, and tasks that are moved in and out of them; descriptors that are handed over;
//! programs that have something open when they are attached to; several agents for the same files.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::thread;

use bfs_tests::exercise;
use bfs_tests::programs::names::RandomNames;
use bfs_tests::programs::puppet::Puppet;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{FileSystem, How, Transport, World, rounds};

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

/// A world whose program is a puppet, not followed yet unless `followed`.
fn puppet(world: &mut World, followed: bool) -> Puppet {
    world.start_replayer().unwrap();
    let (command, listener) = Puppet::prepare(&world.place).unwrap();
    if followed { world.run(&command) } else { world.start_program(&command) }.unwrap();
    Puppet::new(&listener).unwrap()
}

/// A checkpoint, after which both sides are equal.
fn equal_after(world: &World, what: &str) {
    world.checkpoint().unwrap();
    exercise::equal(world).unwrap_or_else(|e| panic!("after {what:?}: {e:#}"));
}

#[test]
fn descriptors_are_handed_out_of_the_selection_and_into_it() {
    let mut world = World::new("handed", Transport::Unix).unwrap();
    let mut puppet = puppet(&mut world, true);
    puppet.does("open 1 shared").unwrap();
    puppet.does("write 1 ours-1").unwrap();
    puppet.does("open 2 other").unwrap();
    equal_after(&world, "the beginning");

    // What is written through a descriptor that was handed out is not seen; what the program itself writes goes
    // where it went, though the position was moved by somebody who is not followed.
    let mut theirs = puppet.gives(1).unwrap();
    theirs.write_all(b"theirs").unwrap();
    puppet.does("write 1 ours-2").unwrap();
    theirs.seek(SeekFrom::Start(3)).unwrap();
    puppet.does("write 1 X").unwrap();
    world.checkpoint().unwrap();
    let [here, there] =
        [&world.place.data, &world.backup()].map(|tree| fs::read(tree.join("shared")).unwrap());
    assert_eq!(here, b"ourX-1theirsours-2");
    assert_eq!((here.len(), &here[..6], &here[12..]), (there.len(), &there[..6], &there[12..]));
    // It is shown, never taken for equal.
    let verified = world.agent_command(&["verify"], SOON).unwrap();
    assert_eq!(verified.status.code(), Some(i32::from(here != there)), "{verified:?}");
    // Whatever makes the agent read the file brings it.
    puppet.does("map 1").unwrap();
    equal_after(&world, "the file was mapped");

    // What a followed process writes through a descriptor that it was given is followed.
    let given = fs::File::options().append(true).open(world.place.data.join("other")).unwrap();
    puppet.takes(3, &given).unwrap();
    drop(given);
    puppet.does("write 3 by the program").unwrap();
    equal_after(&world, "a descriptor was taken");
    puppet.does("end").unwrap_err();
    assert!(world.finish().unwrap().success());
}

#[test]
fn a_program_is_attached_to_with_all_that_it_has_open() {
    for file_system in [None, Some(FileSystem::Tmpfs)] {
        let mut world = World::new("attached-open", Transport::Unix).unwrap();
        if let Some(file_system) = file_system {
            world.mount(file_system).unwrap();
        }
        fs::create_dir(world.place.data.join("sub")).unwrap();
        let mut puppet = puppet(&mut world, false);
        for what in [
            "open 1 positioned",
            "write 1 0123456789",
            "seek 1 4",
            "append 2 log",
            "write 2 early",
            "open 3 deleted",
            "write 3 something",
            "unlink deleted",
            "open 4 mapped",
            "write 4 0123456789012345678901234567890123456789",
            "map 4",
            "store 4 3 before",
            "close 4",
            "open 5 sub/inside",
            "cd sub",
        ] {
            puppet.does(what).unwrap();
        }
        world.attach().unwrap();
        equal_after(&world, "the first copy");
        for what in [
            "write 1 XY",
            "write 2 late",
            "write 3 more of what nobody sees",
            "store 4 20 after",
            "store 4 20 again",
            "open 6 relative",
            "write 6 by a working directory",
            "rename ../positioned ../renamed",
            "write 1 Z",
            "seek 1 100000",
            "write 1 far",
            "rename ../sub ../moved",
            "write 5 in what was moved",
            "open 7 also",
            "write 7 in what was moved",
            "seek 3 0",
            "write 3 ends with the last descriptor",
            "close 3",
        ] {
            puppet.does(what).unwrap();
            equal_after(&world, what);
        }
        assert!(!world.backup().join("deleted").exists());
        puppet.does("end").unwrap_err();
        assert!(world.finish().unwrap().success());
    }
}

/// Who has ended and is not waited for when the agent comes is nobody to wait for.
#[test]
fn an_agent_ends_with_its_last_process_also_when_a_child_was_a_zombie() {
    let mut world = World::new("zombie", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let mut parent = world.spawn_shell("true & exec sleep 1000").unwrap();
    let children = format!("/proc/{0}/task/{0}/children", parent.id());
    until("a zombie", SOON, || {
        let children = fs::read_to_string(&children).ok()?;
        let stat = fs::read_to_string(format!("/proc/{}/stat", children.trim())).ok()?;
        let of_sleep = fs::read_to_string(format!("/proc/{}/comm", parent.id())).ok()? == "sleep\n";
        (of_sleep && stat.contains(") Z ")).then_some(())
    })
    .unwrap();
    world.attach_to(&["--pid", &parent.id().to_string()]).unwrap();
    assert_eq!(selected(&world), 1);
    parent.kill().unwrap();
    parent.wait().unwrap();
    until("the agent to end", SOON, || world.status().is_err().then_some(())).unwrap();
    exercise::equal(&world).unwrap();
}

/// Two agents for the same program and files: the first one of `run`, so it stops by the cgroup that it made.
fn two_groups(name: &str, second: impl Fn(&World) -> Vec<String>) {
    let [mut one, mut two] =
        ["one", "two"].map(|n| World::new(&format!("{name}-{n}"), Transport::Unix).unwrap());
    two.place = one.place.clone();
    one.start(&RandomNames, How::Run).unwrap();
    two.start_replayer().unwrap();
    let whom = second(&one);
    two.attach_to(&whom.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    thread::scope(|scope| {
        for world in [&one, &two] {
            scope.spawn(move || {
                for index in 0..rounds(4, 60) {
                    if index % 2 == 0 {
                        exercise::stopped(world, index).unwrap();
                    } else {
                        exercise::cut(world, &RandomNames, index).unwrap();
                    }
                }
            });
        }
    });
    assert!(one.finish().unwrap().success());
    two.stop_agent().unwrap();
    for world in [&one, &two] {
        exercise::equal(world).unwrap();
    }
}

#[test]
fn two_groups_have_the_same_files_and_stop_the_same_cgroup() {
    two_groups("same-cgroup", |one| {
        let line = fs::read_to_string(format!("/proc/{}/cgroup", one.program_pid().unwrap())).unwrap();
        let path = line.lines().find_map(|l| l.strip_prefix("0::")).unwrap();
        let name = Path::new(path).file_name().unwrap();
        let cgroup = Path::new(&one.leash_cgroup()).join(name);
        vec!["--cgroup".to_owned(), cgroup.display().to_string()]
    });
}

#[test]
fn two_groups_have_the_same_files_and_stop_in_different_ways() {
    two_groups("same-files", |one| vec!["--pid".to_owned(), one.program_pid().unwrap().to_string()]);
}
