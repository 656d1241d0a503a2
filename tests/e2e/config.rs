//! Configuration files at work: each group is what its options would be, in one process or in several.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World, binary};
use bfs_tests::{exercise, oracle};

/// Two groups; what each command does.
fn write(world: &World, file: &Path, scripts: [&str; 2]) {
    let mut text = String::new();
    for (name, script) in ["one", "two"].into_iter().zip(scripts) {
        let data = world.place.data.join(name);
        fs::create_dir_all(&data).unwrap();
        let (group, scratch) = (&world.group, world.scratch.display());
        text += &format!(
            "[group.{group}-{name}]\npaths = ['{0}']\nbackup = 'dir:{scratch}/store-{name}'\nspool = '{1}'\n\
             exclude = ['*.tmp']\ncheckpoint = {{ every = '200ms' }}\nrun = ['sh', '-c', 'cd {0}; {script}']\n",
            data.display(),
            world.spool().display(),
        );
    }
    fs::write(file, text).unwrap();
}

fn backup(world: &World, name: &str) -> PathBuf {
    let tree = world.scratch.join(format!("store-{name}/tree/{}-{name}", world.group));
    tree.join(world.place.data.strip_prefix("/").unwrap()).join(name)
}

#[test]
fn each_group_is_what_its_options_would_be() {
    let world = World::new("config", Transport::Unix).unwrap();
    let file = world.scratch.join("agent.toml");
    let agent = |more: &str| {
        let line = format!("exec {} --config {} {more}", binary("bfs-agent").display(), file.display());
        world.spawn_shell(&line).unwrap()
    };
    let is_equal = |name: &str| {
        let data = world.place.data.join(name);
        let differences = oracle::compare_taken(&data, &backup(&world, name), &|path, _| {
            path.extension().is_none_or(|e| e != "tmp")
        });
        assert_eq!(differences.unwrap(), Vec::<String>::new(), "{name}");
    };
    write(&world, &file, ["echo a > a; echo b > b.tmp", "mkdir d; echo x > d/x; exit 3"]);
    let ended = until("one group", SOON * 2, {
        let mut only = agent(&format!("--only {}-one", world.group));
        move || only.try_wait().transpose()
    });
    assert_eq!(ended.unwrap().unwrap().code(), Some(0));
    is_equal("one");
    assert!(!world.scratch.join("store-two").exists());

    write(&world, &file, ["echo again >> a", "mkdir d; echo x > d/x; exit 3"]);
    let mut both = agent("");
    let ended = until("both groups", SOON * 2, || both.try_wait().transpose());
    assert_eq!(ended.unwrap().unwrap().code(), Some(3));
    is_equal("one");
    is_equal("two");

    // A signal reaches the commands of all.
    let wait = "touch ready; exec sleep 1000";
    write(&world, &file, [wait, wait]);
    let mut both = agent("");
    until("the commands", SOON, || {
        ["one", "two"].iter().all(|name| world.place.data.join(name).join("ready").exists()).then_some(())
    })
    .unwrap();
    // SAFETY: a system call without pointers; the child was not waited for, so the number is its own.
    assert_eq!(unsafe { libc::kill(both.id() as i32, libc::SIGTERM) }, 0);
    let ended = until("the end of both", SOON * 2, || both.try_wait().transpose());
    assert_eq!(ended.unwrap().unwrap().code(), Some(128 + libc::SIGTERM));
    is_equal("one");
    is_equal("two");
}

/// A minute of the calendar makes a checkpoint, where something changed.
#[test]
fn a_time_of_the_calendar_makes_a_checkpoint() {
    let mut world = World::new("cron", Transport::Unix).unwrap();
    world.checkpoints("cron=* * * * *");
    world.start_replayer().unwrap();
    let (data, ready, stop) = (&world.place.data, world.place.aux.join("ready"), world.place.stop());
    let script = format!(
        "touch {}; while ! [ -e {} ]; do echo x >> {}/f; sleep 0.2; done",
        ready.display(),
        stop.display(),
        data.display()
    );
    world.run(&["sh".to_owned(), "-c".to_owned(), script]).unwrap();
    // The first copy comes whatever the schedule.
    let confirmed = |number: u64| {
        until("the checkpoint", Duration::from_secs(150), || {
            (world.status_number(&["confirmed"]).ok()? >= number).then_some(())
        })
    };
    confirmed(1).unwrap();
    let next = world.status().unwrap()["next_by_calendar"].as_str().unwrap().to_owned();
    assert!(next.ends_with(":00Z"), "{next}");
    confirmed(2).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!(now % 60 < 20, "it came {} s after the minute", now % 60);
    assert_eq!(world.status().unwrap()["checkpoints_taken"], 2);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}
