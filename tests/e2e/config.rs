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

/// Two groups have the same files, each with a schedule and a backup of its own. The agent of one is killed: the other does not notice, and
/// another agent goes on for it, with what was captured meanwhile and without a new copy.
#[test]
fn a_group_whose_agent_died_gets_another_and_the_other_does_not_notice() {
    let world = World::new("config-killed", Transport::Unix).unwrap();
    let file = world.scratch.join("agent.toml");
    let data = world.place.data.clone();
    fs::write(data.join("untouched"), vec![7; 8 << 20]).unwrap();
    let mut writer = world
        .spawn_shell(
            "i=0; while [ ! -e \"$2/stop\" ]; do i=$((i + 1)); echo $i >> \"$1/log\"
             echo $i > \"$1/new\"; mv \"$1/new\" \"$1/file-$((i % 10))\"; sleep 0.01; done",
        )
        .unwrap();
    let mut text = String::new();
    for (name, every) in [("often", "100ms"), ("seldom", "900ms")] {
        let (group, scratch) = (&world.group, world.scratch.display());
        text += &format!(
            "[group.{group}-{name}]\npaths = ['{}']\nbackup = 'dir:{scratch}/store-{name}'\nspool = '{}'\n\
             checkpoint = {{ every = '{every}' }}\npid = {}\nresume = true\n",
            data.display(),
            world.spool().display(),
            writer.id(),
        );
    }
    fs::write(&file, text).unwrap();
    let run = |words: &[&str]| {
        let mut command = std::process::Command::new(binary("bfs-agent"));
        command.args(words).output().unwrap()
    };
    let status = |name: &str| -> Option<serde_json::Value> {
        let done = run(&["status", "--json", "--group", &format!("{}-{name}", world.group)]);
        done.status.success().then(|| serde_json::from_slice(&done.stdout).unwrap())
    };
    let taken =
        |name: &str| status(name).and_then(|status| status["checkpoints_taken"].as_u64()).unwrap_or(0);
    let all = |words: &str| {
        let done = run(&["config", words, &file.display().to_string()]);
        (done.status.code(), String::from_utf8(done.stdout).unwrap())
    };
    assert_eq!(all("status").0, Some(72), "nobody runs yet");
    let log = world.logs().join("supervisor.log");
    let line =
        format!("exec {} --config {} 2> {}", binary("bfs-agent").display(), file.display(), log.display());
    let mut both = world.spawn_shell(&line).unwrap();
    until("checkpoints of both", SOON, || (taken("often") > 8 && taken("seldom") > 2).then_some(())).unwrap();
    assert!(taken("often") > taken("seldom"), "each has its own schedule");
    let (code, said) = all("status");
    assert_eq!((code, said.lines().count()), (Some(0), 2), "{said}");
    assert!(
        said.contains("-often: following, agent pid ") && said.contains("confirmed checkpoint"),
        "{said}"
    );

    let first = |name: &str| status(name).unwrap()["pid"].as_i64().unwrap();
    let (killed, other) = (first("often"), first("seldom"));
    // SAFETY: a system call without pointers; the agent is a child of a process of this test, and was not waited for.
    assert_eq!(unsafe { libc::kill(killed as i32, libc::SIGKILL) }, 0);
    let before = taken("seldom");
    let successor = until("another agent", SOON, || {
        status("often")
            .filter(|status| status["pid"] != killed && status["checkpoints_taken"].as_u64() > Some(1))
    })
    .unwrap();
    let sent = successor["counters"]["stream_bytes"].as_u64().unwrap();
    assert!(sent < 4 << 20, "{sent} bytes: that is a new copy");
    until("the other group to go on", SOON, || (taken("seldom") > before).then_some(())).unwrap();
    assert_eq!(first("seldom"), other);
    let told = fs::read_to_string(&log).unwrap();
    assert!(told.contains("-often was ended by signal 9; another one goes on in 1 s"), "{told}");

    // What they follow ends, so they do, and then the one that watches over them.
    fs::write(world.place.stop(), "").unwrap();
    assert!(writer.wait().unwrap().success());
    let ended = until("the end of both", SOON * 2, || both.try_wait().transpose()).unwrap().unwrap();
    assert_eq!(ended.code(), Some(0), "{}", fs::read_to_string(&log).unwrap());
    for name in ["often", "seldom"] {
        let tree = world.scratch.join(format!("store-{name}/tree/{}-{name}", world.group));
        let backup = tree.join(data.strip_prefix("/").unwrap());
        assert_eq!(oracle::compare(&data, &backup).unwrap(), Vec::<String>::new(), "{name}");
    }
}
